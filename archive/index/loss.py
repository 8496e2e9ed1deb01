"""What a LOST fact changes in the index: the region no longer has what it gave a receipt for, so the receipt
does not count, and the instance waits for another one. What was given up here is not pushed again: its bytes
are not here, and that both lost them is for people to hear."""

from __future__ import annotations

from sqlalchemy import Connection, and_, delete, insert, select, update

from archive.index.schema import conflict, early_fact, instance, outbox, removed
from archive.model import Fact, FactKind


def lose(connection: Connection, fact: Fact, *, into_outbox: bool) -> None:
    """Take a receipt back, also one that is known of a content that is not here yet. Again changes
    nothing."""
    uid, digest = fact.sop_instance_uid, fact.digest
    connection.execute(delete(early_fact).where(
        early_fact.c.sop_instance_uid == uid, early_fact.c.digest == digest,
        early_fact.c.kind == FactKind.RECEIPT.value,
    ))  # fmt: skip
    for table in (instance, conflict, removed):
        here = and_(table.c.sop_instance_uid == uid, table.c.digest == digest, table.c.evicted.is_(False))
        row = connection.execute(select(table).where(here, table.c.receipt_us > 0)).fetchone()
        if row is None:
            continue
        connection.execute(update(table).where(here).values(receipt_us=0))
        queued = and_(outbox.c.sop_instance_uid == uid, outbox.c.digest == digest)
        if into_outbox and connection.execute(select(outbox.c.digest).where(queued)).fetchone() is None:
            connection.execute(insert(outbox).values(
                sop_instance_uid=uid, digest=digest, study_instance_uid=row.study_instance_uid,
                series_instance_uid=row.series_instance_uid, ward=row.ward,
                received_at_us=row.received_at_us, bytes=row.payload_length - row.dataset_offset,
                conflict=table is conflict, urgent=False, tries=0, set_aside=False, detail="",
                hidden=table is removed,
            ))  # fmt: skip
