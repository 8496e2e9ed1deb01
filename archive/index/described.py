"""Instances with all that the index says of them: their own attributes, their series', their study's and
their patient's, as the routing rules ask of them. Reads rows; writes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, select

from archive.catalog import at_level
from archive.index.schema import instance, series, study
from archive.index.statements import by_uid
from archive.index.stored import instance_of
from archive.model import Fields, Level, StoredInstance

_HOMES = {Level.PATIENT: study, Level.STUDY: study, Level.SERIES: series}
_LABELS = [
    (entry.keyword, f"{level.value}_{entry.column}", table.c[entry.column])
    for level, table in _HOMES.items()
    for entry in at_level(level)
]
_LISTS = [("ModalitiesInStudy", study.c.modalities), ("SOPClassesInStudy", study.c.sop_classes)]


@dataclass(frozen=True, slots=True)
class Described:
    """A live instance, and the values of every keyword that is known of it, of all levels."""

    stored: StoredInstance
    fields: Fields

    def value_of(self, keyword: str) -> str:
        """"" when it is unknown: what `archive/matching.py` asks for."""
        return self.fields.get(keyword, "")


def described(connection: Connection, uids: Iterable[str]) -> list[Described]:
    """The live instances of these UIDs; those that are not here are left out."""
    return [_described(row) for row in by_uid(connection, _query(), instance.c.sop_instance_uid, uids)]


def of_study(connection: Connection, study_uid: str) -> list[Described]:
    """The live instances of a study, by UID."""
    query = _query().where(instance.c.study_instance_uid == study_uid).order_by(instance.c.sop_instance_uid)
    return [_described(row) for row in connection.execute(query)]


def received_since(connection: Connection, since_us: int, after_uid: str, limit: int) -> list[Described]:
    """The live instances received at `since_us` or later, by UID, those after `after_uid`."""
    query = _query().where(instance.c.received_at_us >= since_us, instance.c.sop_instance_uid > after_uid)
    rows = connection.execute(query.order_by(instance.c.sop_instance_uid).limit(limit))
    return [_described(row) for row in rows]


def _query() -> Select[Any]:
    same_series = and_(
        series.c.study_instance_uid == instance.c.study_instance_uid,
        series.c.series_instance_uid == instance.c.series_instance_uid,
    )
    rows = instance.join(series, same_series).join(
        study, study.c.study_instance_uid == instance.c.study_instance_uid
    )
    labelled = [column.label(label) for _, label, column in _LABELS]
    return select(instance, *labelled, *(column for _, column in _LISTS)).select_from(rows)


def _described(row: Any) -> Described:
    values = row._mapping
    stored = instance_of(row)
    fields = dict(stored.instance)
    for keyword, label, _ in _LABELS:
        if values[label]:
            fields[keyword] = values[label]
    for keyword, column in _LISTS:
        if values[column]:
            fields[keyword] = values[column]
    return Described(stored, fields)
