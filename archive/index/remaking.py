"""Studies, their series and their patients made anew from the instances that are here: what stands above
instances keeps the first value that came, so nothing can be taken out of it again.

The instances are taken in the order in which they were received, their attributes read where they lie. The
same instances give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, text, update

from archive.index.levels import Levels, patient_key
from archive.index.rows import fields_of, fill
from archive.index.schema import (
    STUDY_TEXT,
    holding,
    instance,
    patient,
    patient_hash,
    series,
    series_ward,
    study,
    text_id,
)
from archive.index.statements import by_uid
from archive.index.stored import head_of, location_of
from archive.model import START, Attributes, IndexEntry, Level, Record, RecordKind

_SET_PATIENT = (
    update(instance)
    .where(instance.c.sop_instance_uid == bindparam("b_uid"))
    .values(patient_hash=bindparam("b_hash"))
)

_LAST = 1 << 63

AttributeReader = Callable[[Record], Attributes | None]


def remake(connection: Connection, studies: Iterable[str], read: AttributeReader) -> None:
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
    moved = []
    for row in connection.execute(here).fetchall():
        entry = entry_of(row, read)
        levels.add(entry, sorted(holders.get(row.sop_instance_uid, ())))
        own = patient_hash(patient_key(entry), row.study_instance_uid)
        if entry.attributes.patient and own != bytes(row.patient_hash):
            moved.append({"b_uid": row.sop_instance_uid, "b_hash": own})
    if moved:  # a correction names another patient
        connection.execute(_SET_PATIENT, moved)
    _remake_patients(connection, people | levels.write_studies())


def _remake_patients(connection: Connection, people: set[bytes]) -> None:
    """A patient's fields are those of their studies, the first that was received first."""
    if not people:
        return
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
        ordered = sorted(  # a study that another decision of the batch has emptied is yet to be made anew
            found[key], key=lambda row: (first_us.get(row.study_instance_uid, _LAST), row.study_instance_uid)
        )
        made = {name: ordered[0]._mapping[name] for name in names}
        for other in ordered[1:]:
            fill(made, Level.PATIENT, {name: other._mapping[name] for name in names})
        rows.append(made)
    if rows:
        connection.execute(insert(patient), rows)


def entry_of(row: Any, read: AttributeReader) -> IndexEntry:
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
