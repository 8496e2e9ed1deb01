"""Instances with all that the index says of them: their own attributes, their series', their study's and
their patient's, as the routing rules ask of them. Reads rows; writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from archive.index.corrected import overlaid
from archive.index.rows import fields_of
from archive.index.schema import instance, series, study
from archive.index.statements import by_uid
from archive.index.stored import INSTANCE_COLUMNS, instance_of
from archive.model import Fields, Level, StoredInstance


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
    rows = by_uid(connection, select(*INSTANCE_COLUMNS), instance.c.sop_instance_uid, uids)
    return _described(connection, [instance_of(row) for row in rows])


def of_study(connection: Connection, study_uid: str) -> list[Described]:
    """The live instances of a study, by UID."""
    query = select(*INSTANCE_COLUMNS).where(instance.c.study_instance_uid == study_uid)
    rows = connection.execute(query.order_by(instance.c.sop_instance_uid))
    return _described(connection, [instance_of(row) for row in rows])


def received_since(connection: Connection, since_us: int, after_uid: str, limit: int) -> list[Described]:
    """The live instances received at `since_us` or later, by UID, those after `after_uid`."""
    query = select(*INSTANCE_COLUMNS).where(
        instance.c.received_at_us >= since_us, instance.c.sop_instance_uid > after_uid
    )
    rows = connection.execute(query.order_by(instance.c.sop_instance_uid).limit(limit))
    return _described(connection, [instance_of(row) for row in rows])


def _described(connection: Connection, stored: Sequence[StoredInstance]) -> list[Described]:
    """Each with its series' and its study's values, which are read once: many instances share them."""
    studies = {
        row.study_instance_uid: _study(row)
        for row in by_uid(
            connection, select(study), study.c.study_instance_uid, {one.study_uid for one in stored}
        )
    }
    all_series = {
        (row.study_instance_uid, row.series_instance_uid): fields_of(Level.SERIES, row._mapping)
        for row in by_uid(
            connection, select(series), series.c.series_instance_uid, {one.series_uid for one in stored}
        )
    }
    nothing: Fields = {}
    stored = overlaid(connection, stored)
    return [
        Described(one, {
            **studies.get(one.study_uid, nothing),
            **all_series.get((one.study_uid, one.series_uid), nothing),
            **one.instance,
        })
        for one in stored
    ]  # fmt: skip


def _study(row: Any) -> Fields:
    """A study's row holds its patient's values too, and the lists that it keeps."""
    values = row._mapping
    lists = {"ModalitiesInStudy": row.modalities, "SOPClassesInStudy": row.sop_classes}
    return {
        **fields_of(Level.PATIENT, values), **fields_of(Level.STUDY, values),
        **{keyword: value for keyword, value in lists.items() if value},
    }  # fmt: skip
