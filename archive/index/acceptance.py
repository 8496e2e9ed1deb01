"""A person's decision which content of a SOP Instance UID is live, brought into the index: the two change
places, and everything that was counted from the one is counted from the other.

What stands above instances keeps the first value that came, so nothing can be taken out of it again: a study
that loses an instance is made anew from those it has left, in the order in which they were received, their
attributes read where they lie. The same decision on the same index gives the same rows, so a rebuild that
comes to the fact at the same place of the log ends with an equal index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, func, insert, select, text, update

from archive.index.levels import Levels, patient_key
from archive.index.rows import Row, fields_of, fill, number_of, row_of
from archive.index.schema import (
    STUDY_TEXT,
    conflict,
    early_fact,
    holding,
    instance,
    outbox,
    patient,
    patient_hash,
    series,
    series_ward,
    study,
    text_id,
)
from archive.index.statements import by_uid
from archive.index.stored import head_of, location_of
from archive.index.wardcounts import holding_row
from archive.model import (
    START,
    Attributes,
    ConflictState,
    Fact,
    FactKind,
    IndexEntry,
    Level,
    Record,
    RecordKind,
)

AttributeReader = Callable[[Record], Attributes | None]

# What stands in both tables of what is said of a content: where it came from, where it lies, what facts say.
_COMMON = tuple(column.name for column in instance.c if column.name in conflict.c)


def accept(connection: Connection, fact: Fact, *, into_outbox: bool, read: AttributeReader) -> bool:
    """Make the content of `fact` the live one of its UID; False when it is not here. The one that was live is
    kept in its place, so that accepting that one undoes it."""
    uid = fact.sop_instance_uid
    mine = and_(conflict.c.sop_instance_uid == uid, conflict.c.digest == fact.digest)
    found = connection.execute(select(conflict).where(mine)).fetchone()
    before = connection.execute(select(instance).where(instance.c.sop_instance_uid == uid)).fetchone()
    if found is None:
        here = before is not None and bytes(before.digest) == fact.digest
        if here:
            _forget_early(connection, uid)
        return here
    entry = _entry(found, read)
    connection.execute(delete(conflict).where(mine))
    studies = {found.study_instance_uid}
    if before is not None:
        studies.add(before.study_instance_uid)
        connection.execute(delete(instance).where(instance.c.sop_instance_uid == uid))
        connection.execute(insert(conflict).values(_replaced(before, found, fact)))
    connection.execute(insert(instance).values(_live(found, entry)))
    others = and_(conflict.c.sop_instance_uid == uid, conflict.c.digest != fact.digest)
    connection.execute(update(conflict).where(others).values(compared=False))
    _forget_early(connection, uid)
    _swap_holders(connection, found, before)
    _requeue(connection, found, before, fact.at_us if into_outbox else 0)
    _remake(connection, studies, read)
    return True


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


def _entry(row: Any, read: AttributeReader) -> IndexEntry:
    """A row of an instance or a conflict as what the levels count; one whose data set can't be read any more
    says of itself only what the index knows."""
    record = Record(RecordKind.INSTANCE, 0, head_of(row), bytes(row.digest), location_of(row), START)
    attributes = read(record)
    if attributes is None:
        attributes = Attributes(
            patient={},
            study={"StudyInstanceUID": row.study_instance_uid},
            series={"SeriesInstanceUID": row.series_instance_uid},
            instance=fields_of(Level.IMAGE, row._mapping) if "instance_number" in row._mapping else {
                "SOPInstanceUID": row.sop_instance_uid, "SOPClassUID": row.sop_class_uid},
        )  # fmt: skip
    return IndexEntry(record, attributes)


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
        connection.execute(update(outbox).where(old).values(conflict=True, accepted_us=0))
    _queue(connection, found, accepted_us)


def tell_again(connection: Connection, uid: str, digest: bytes) -> None:
    """The region was told that this content is live when it no longer was: it is told of the one that is."""
    mine = and_(conflict.c.sop_instance_uid == uid, conflict.c.digest == digest)
    decided_us = connection.execute(select(conflict.c.decided_us).where(mine)).scalar()
    live = connection.execute(select(instance).where(instance.c.sop_instance_uid == uid)).fetchone()
    if decided_us and live is not None:
        _queue(connection, live, decided_us)


def _queue(connection: Connection, found: Any, accepted_us: int) -> None:
    new = and_(outbox.c.sop_instance_uid == found.sop_instance_uid, outbox.c.digest == found.digest)
    values = {"conflict": False, "accepted_us": accepted_us, "tries": 0}
    if connection.execute(update(outbox).where(new).values(values)).rowcount or not accepted_us:
        return
    connection.execute(insert(outbox).values(
        sop_instance_uid=found.sop_instance_uid, digest=found.digest,
        study_instance_uid=found.study_instance_uid, series_instance_uid=found.series_instance_uid,
        ward=found.ward, received_at_us=found.received_at_us,
        bytes=found.payload_length - found.dataset_offset, urgent=False, set_aside=False, detail="", **values,
    ))  # fmt: skip


def _remake(connection: Connection, studies: Iterable[str], read: AttributeReader) -> None:
    """Make studies, their series and their patients anew from the instances that are here."""
    uids = sorted(studies)
    query = select(study.c.patient_hash).where(study.c.study_instance_uid.in_(uids))
    people = {bytes(row.patient_hash) for row in connection.execute(query)}
    for table in (study, series, series_ward):
        connection.execute(delete(table).where(table.c.study_instance_uid.in_(uids)))
    if connection.dialect.name == "sqlite":
        for uid in uids:
            connection.execute(text(f"DELETE FROM {STUDY_TEXT} WHERE rowid = :id"), {"id": text_id(uid)})
    holders: dict[str, list[str]] = {}
    held = select(holding.c.sop_instance_uid, holding.c.ward).where(holding.c.study_instance_uid.in_(uids))
    for row in connection.execute(held):
        holders.setdefault(row.sop_instance_uid, []).append(row.ward)
    levels = Levels(connection)
    here = (
        select(instance)
        .where(instance.c.study_instance_uid.in_(uids))
        .order_by(instance.c.received_at_us, instance.c.sop_instance_uid)
    )
    for row in connection.execute(here):
        levels.add(_entry(row, read), sorted(holders.get(row.sop_instance_uid, ())))
    _remake_patients(connection, people | levels.write_studies())


def _remake_patients(connection: Connection, people: set[bytes]) -> None:
    """A patient's fields are those of their studies, the first that was received first."""
    found: dict[bytes, list[Any]] = {}
    for row in by_uid(connection, select(study), study.c.patient_hash, people):
        found.setdefault(bytes(row.patient_hash), []).append(row)
    uids = {row.study_instance_uid for rows in found.values() for row in rows}
    received = select(instance.c.study_instance_uid, func.min(instance.c.received_at_us))
    received = received.group_by(instance.c.study_instance_uid)
    first_us = dict(map(tuple, by_uid(connection, received, instance.c.study_instance_uid, uids)))
    connection.execute(
        delete(patient).where(patient.c.patient_hash == bindparam("b_hash")),
        [{"b_hash": one} for one in sorted(people)],
    )
    rows = []
    names = [column.name for column in patient.c]
    for key in sorted(found):
        ordered = sorted(
            found[key], key=lambda row: (first_us[row.study_instance_uid], row.study_instance_uid)
        )
        made = {name: ordered[0]._mapping[name] for name in names}
        for other in ordered[1:]:
            fill(made, Level.PATIENT, {name: other._mapping[name] for name in names})
        rows.append(made)
    if rows:
        connection.execute(insert(patient), rows)
