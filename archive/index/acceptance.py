"""A person's decision which content of a SOP Instance UID is live, brought into the index: the two change
places, and everything that was counted from the one is counted from the other.

A study that loses an instance is made anew from those it has left (`remaking.py`). The same decision on the
same index gives the same rows, so a rebuild that comes to the fact at the same place of the log ends with an
equal index.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, and_, delete, insert, select, update

from archive.index.levels import patient_key
from archive.index.remaking import AttributeReader, entry_of, remake
from archive.index.removed import cover
from archive.index.rows import Row, number_of, row_of
from archive.index.schema import (
    conflict,
    early_fact,
    holding,
    instance,
    outbox,
    patient_hash,
    removed,
)
from archive.index.wardcounts import holding_row
from archive.model import (
    ConflictState,
    Fact,
    FactKind,
    IndexEntry,
    Level,
)

# What stands in both tables of what is said of a content: where it came from, where it lies, what facts say.
_COMMON = tuple(column.name for column in instance.c if column.name in conflict.c)


def accept(connection: Connection, fact: Fact, *, into_outbox: bool, read: AttributeReader) -> bool:
    """Make the content of `fact` the live one of its UID; False when it is not here. The one that was live is
    kept in its place, so that accepting that one undoes it."""
    uid = fact.sop_instance_uid
    mine = and_(conflict.c.sop_instance_uid == uid, conflict.c.digest == fact.digest)
    found = connection.execute(select(conflict).where(mine)).fetchone()
    before = _served(connection, uid)
    if found is None:
        here = before is not None and bytes(before.digest) == fact.digest
        if here:
            _forget_early(connection, uid)
        return here
    entry = entry_of(found, read)
    connection.execute(delete(conflict).where(mine))
    studies = {found.study_instance_uid}
    if before is not None:
        studies.add(before.study_instance_uid)
        for table in (instance, removed):
            connection.execute(delete(table).where(table.c.sop_instance_uid == uid))
        connection.execute(insert(conflict).values(_replaced(before, found, fact)))
    connection.execute(insert(instance).values(_live(found, entry)))
    others = and_(conflict.c.sop_instance_uid == uid, conflict.c.digest != fact.digest)
    connection.execute(update(conflict).where(others).values(compared=False))
    _forget_early(connection, uid)
    _swap_holders(connection, found, before)
    _requeue(connection, found, before, fact.at_us if into_outbox else 0)
    cover(connection, [uid], of_region=not into_outbox)  # what was removed stays so, with another content
    remake(connection, studies, read)
    return True


def _served(connection: Connection, uid: str) -> Any:
    """The row of the content that is live, or was when its UID was removed."""
    for table in (instance, removed):
        row = connection.execute(select(table).where(table.c.sop_instance_uid == uid)).fetchone()
        if row is not None:
            return row
    return None


def _replaced(before: Any, found: Any, fact: Fact) -> Row:
    """The row of the content that was live. What was the same content as the other still is."""
    same = found.state == ConflictState.EQUIVALENT.value
    state = ConflictState.EQUIVALENT if same else ConflictState.REPLACED
    row = {name: before._mapping[name] for name in _COMMON}
    row.update(state=state.value, decided_by=fact.detail, decided_us=fact.at_us, compared=True)
    return row


def _live(found: Any, entry: IndexEntry) -> Row:
    row = row_of(Level.IMAGE, entry.attributes.instance)
    row.update({name: found._mapping[name] for name in _COMMON})
    row["patient_hash"] = patient_hash(patient_key(entry), found.study_instance_uid)
    row["number"] = number_of(row["instance_number"])
    return row


def _forget_early(connection: Connection, uid: str) -> None:
    """An earlier decision for a content that has not come is overtaken."""
    connection.execute(delete(early_fact).where(
        early_fact.c.sop_instance_uid == uid, early_fact.c.kind == FactKind.ACCEPTED.value
    ))  # fmt: skip


def _swap_holders(connection: Connection, found: Any, before: Any) -> None:
    """Copies at other wards are of a content: those of the one that is no longer live wait for it to be so
    again, and those of the other count."""
    uid, copy = found.sop_instance_uid, FactKind.COPY.value
    here = holding.c.sop_instance_uid == uid
    wards = [row.ward for row in connection.execute(select(holding.c.ward).where(here))]
    connection.execute(delete(holding).where(here))
    early = and_(early_fact.c.sop_instance_uid == uid, early_fact.c.digest == found.digest,
                 early_fact.c.kind == copy)  # fmt: skip
    holders = {row.ward for row in connection.execute(select(early_fact.c.ward).where(early))}
    connection.execute(delete(early_fact).where(early))
    if wards and before is not None:
        rows = [{"sop_instance_uid": uid, "digest": before.digest, "kind": copy, "ward": ward,
                 "at_us": 0, "detail": ""} for ward in sorted(wards)]  # fmt: skip
        connection.execute(insert(early_fact), rows)
    new = [holding_row(found._mapping, ward) for ward in sorted(holders - {found.ward})]
    if new:
        connection.execute(insert(holding), new)


def _requeue(connection: Connection, found: Any, before: Any, accepted_us: int) -> None:
    """At a node: the region is told of the decision, with the content or without."""
    if before is not None:
        old = and_(outbox.c.sop_instance_uid == before.sop_instance_uid, outbox.c.digest == before.digest)
        if before.receipt_us:
            connection.execute(delete(outbox).where(old))  # the region has it, and knew it as the live one
        connection.execute(update(outbox).where(old).values(conflict=True, accepted_us=0, hidden=False))
    _queue(connection, found, accepted_us)


def tell_again(connection: Connection, uid: str, digest: bytes) -> None:
    """The region was told that this content is live when it no longer was: it is told of the one that is."""
    mine = and_(conflict.c.sop_instance_uid == uid, conflict.c.digest == digest)
    decided_us = connection.execute(select(conflict.c.decided_us).where(mine)).scalar()
    live = _served(connection, uid)
    if decided_us and live is not None:
        _queue(connection, live, decided_us, hidden="removal_id" in live._mapping)


def _queue(connection: Connection, found: Any, accepted_us: int, *, hidden: bool = False) -> None:
    """`hidden` where its UID is removed; what is about to be hidden is not yet."""
    new = and_(outbox.c.sop_instance_uid == found.sop_instance_uid, outbox.c.digest == found.digest)
    values = {"conflict": False, "accepted_us": accepted_us, "tries": 0, "hidden": hidden}
    if connection.execute(update(outbox).where(new).values(values)).rowcount or not accepted_us:
        return
    connection.execute(insert(outbox).values(
        sop_instance_uid=found.sop_instance_uid, digest=found.digest,
        study_instance_uid=found.study_instance_uid, series_instance_uid=found.series_instance_uid,
        ward=found.ward, received_at_us=found.received_at_us,
        bytes=found.payload_length - found.dataset_offset, urgent=False, set_aside=False, detail="", **values,
    ))  # fmt: skip
