"""Instances that this archive knows and never had on this disk: a node on a new disk is told by the region
what it had given, and lists it as evicted. An EVICTED fact whose entry lies in no pack says so."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, select, update

from archive.index.apply import apply_entries
from archive.index.remaking import AttributeReader
from archive.index.schema import instance, removed
from archive.index.statements import by_uid
from archive.model import Fact, FactKind, Location, Position

NOWHERE = Position(0, 0)  # where the record of a stub ends: below every pack


def stub_location(length: int, dataset_offset: int) -> Location:
    """Where a stub lies, which is nowhere; its length counts in its study's size."""
    return Location("", 0, length, dataset_offset)


def is_stub(fact: Fact) -> bool:
    return fact.kind is FactKind.EVICTED and fact.entry is not None and not fact.entry.record.location.pack


def apply_stubs(
    connection: Connection, facts: Sequence[Fact], *, into_outbox: bool, read: AttributeReader
) -> None:
    """List what is not here under any UID, as evicted. Where a UID has a content, that one stands: again
    changes nothing."""
    told = {fact.sop_instance_uid: fact for fact in facts if is_stub(fact)}
    if not told:
        return
    here = {
        row[0]
        for table in (instance, removed)
        for row in by_uid(connection, select(table.c.sop_instance_uid), table.c.sop_instance_uid, told)
    }
    new = [fact for uid, fact in told.items() if uid not in here]
    if not new:
        return
    entries = [fact.entry for fact in new if fact.entry is not None]
    apply_entries(connection, entries, into_outbox=into_outbox, read=read)
    for table in (instance, removed):  # a removal may cover it already
        mark = update(table).where(
            table.c.sop_instance_uid == bindparam("b_uid"), table.c.digest == bindparam("b_digest")
        )
        connection.execute(mark.values(evicted=True, damaged=False), [
            {"b_uid": fact.sop_instance_uid, "b_digest": fact.digest} for fact in new
        ])  # fmt: skip
