"""What a page of an answer counts, for a scope of wards or for what is pending: never more than may be seen.

From `series_ward` where that is exact; an instance that several wards of the scope hold is counted from the
instances, once. It reads the studies of the page alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, and_, exists, func, or_, select

from archive.index.rows import split
from archive.index.schema import holding, instance, outbox, series, series_ward, study
from archive.index.statements import by_uid
from archive.model import Level, Scope, SeriesHolding

UIDS_MAX = 1000

Unit = tuple[Any, ...]


@dataclass(slots=True)
class Tally:
    """Counts and lists of one row of an answer."""

    series: set[Unit] = field(default_factory=set)
    instances: int = 0
    modalities: set[str] = field(default_factory=set)
    sop_classes: set[str] = field(default_factory=set)
    wards: set[str] = field(default_factory=set)
    studies: int = 0
    own_series_count: int | None = None

    @property
    def series_count(self) -> int:
        return len(self.series) if self.own_series_count is None else self.own_series_count


@dataclass(frozen=True, slots=True)
class _Part:
    """A series' share of a tally, of one ward and, for what is pending, of one SOP class."""

    study_uid: str
    series_uid: str
    modality: str
    sop_classes: str
    ward: str
    instances: int


def tallies(
    connection: Connection, level: Level, units: Sequence[Unit], scope: Scope, *, pending: bool
) -> dict[Unit, Tally]:
    """The tally of each unit: a patient (by hash), a study, or a series (study and series UID)."""
    counted: dict[Unit, Tally] = {unit: Tally() for unit in units}
    units_of_study = _studies(connection, level, units)
    studies: dict[Unit, set[str]] = {}
    parts = (
        _pending(connection, units_of_study, scope) if pending else _held(connection, units_of_study, scope)
    )
    for part in parts:
        unit = (part.study_uid, part.series_uid) if level is Level.SERIES else units_of_study[part.study_uid]
        tally = counted.get(unit)
        if tally is None:
            continue
        tally.series.add((part.study_uid, part.series_uid))
        tally.instances += part.instances
        tally.modalities.update(filter(None, [part.modality]))
        tally.sop_classes.update(split(part.sop_classes))
        tally.wards.add(part.ward)
        studies.setdefault(unit, set()).add(part.study_uid)
    for unit, uids in studies.items():
        counted[unit].studies = len(uids)
    return counted


def uid_lists(
    connection: Connection, level: Level, units: Sequence[Unit], scope: Scope
) -> dict[Unit, list[SeriesHolding]]:
    """The pending instances of each unit by series, at most 1,000 a unit."""
    wanted = set(units)
    units_of_study = _studies(connection, level, units)
    found: dict[Unit, dict[tuple[str, str], list[str]]] = {}
    modalities: dict[tuple[str, str], str] = {}
    room = dict.fromkeys(units, UIDS_MAX)
    for study_uid, series_uid, uid, modality in _pending_uids(connection, level, units_of_study, scope):
        unit: Unit = {
            Level.SERIES: (study_uid, series_uid), Level.IMAGE: (study_uid, series_uid, uid),
        }.get(level) or units_of_study[study_uid]  # fmt: skip
        if unit not in wanted or not room[unit]:
            continue
        room[unit] -= 1
        modalities[(study_uid, series_uid)] = modality
        found.setdefault(unit, {}).setdefault((study_uid, series_uid), []).append(uid)
    return {
        unit: [SeriesHolding(key[1], modalities[key], tuple(uids)) for key, uids in by_series.items()]
        for unit, by_series in found.items()
    }


def holders(connection: Connection, units: Sequence[Unit], scope: Scope) -> dict[Unit, set[str]]:
    """The wards that hold each instance, as far as the scope allows to know."""
    by_instance = {unit[2]: unit for unit in units}
    wards: dict[Unit, set[str]] = {unit: set() for unit in units}
    for home in (instance, holding):
        query = select(home.c.sop_instance_uid, home.c.ward)
        for uid, ward in by_uid(connection, query, home.c.sop_instance_uid, by_instance):
            if scope.allows(ward):
                wards[by_instance[uid]].add(ward)
    return wards


def evicted(connection: Connection, level: Level, units: Sequence[Unit]) -> set[Unit]:
    """The studies, series or instances of which bytes were given up here; of patients nothing is said."""
    if level is Level.PATIENT:
        return set()
    key = (instance.c.study_instance_uid, instance.c.series_instance_uid, instance.c.sop_instance_uid)
    length = {Level.STUDY: 1, Level.SERIES: 2, Level.IMAGE: 3}[level]
    query = select(*key[:length]).where(instance.c.evicted).distinct()
    # By study: that is what the index of evicted instances begins with.
    rows = by_uid(connection, query, instance.c.study_instance_uid, {unit[0] for unit in units})
    return {tuple(row) for row in rows}


def _studies(connection: Connection, level: Level, units: Sequence[Unit]) -> dict[str, Unit]:
    """The unit of each study behind the page; at series and image level the study itself."""
    if level is not Level.PATIENT:
        return {unit[0]: (unit[0],) for unit in units}
    query = select(study.c.study_instance_uid, study.c.patient_hash)
    rows = by_uid(connection, query, study.c.patient_hash, {unit[0] for unit in units})
    return {uid: (bytes(patient),) for uid, patient in rows}


def _held(connection: Connection, studies: dict[str, Unit], scope: Scope) -> Iterator[_Part]:
    query = select(
        series_ward.c.study_instance_uid, series_ward.c.series_instance_uid, series.c.modality,
        series_ward.c.sop_classes, series_ward.c.ward, series_ward.c.instance_count,
    ).join_from(series_ward, series, _same(series_ward))  # fmt: skip
    if scope.wards is not None:
        query = query.where(series_ward.c.ward.in_(sorted(scope.wards)))
    exact = {} if scope.wards is not None and len(scope.wards) < 2 else _once(connection, studies, scope)
    for row in by_uid(connection, query, series_ward.c.study_instance_uid, studies):
        key = (row[0], row[1])
        instances = exact.get(key, row[5])
        if key in exact:
            exact[key] = 0  # it stands with the first ward of the series; the others add only themselves
        yield _Part(row[0], row[1], row[2], row[3], row[4], instances)


def _once(connection: Connection, studies: dict[str, Unit], scope: Scope) -> dict[tuple[str, str], int]:
    """For series of which several wards hold the same instances: how many there are, each counted once."""
    copied = select(holding.c.study_instance_uid, holding.c.series_instance_uid).distinct()
    keys = {tuple(row) for row in by_uid(connection, copied, holding.c.study_instance_uid, studies)}
    if not keys:
        return {}
    query = select(instance.c.study_instance_uid, instance.c.series_instance_uid, func.count())
    if scope.wards is not None:
        wards = sorted(scope.wards)
        held = exists().where(
            holding.c.sop_instance_uid == instance.c.sop_instance_uid, holding.c.ward.in_(wards)
        )
        query = query.where(or_(instance.c.ward.in_(wards), held))
    query = query.group_by(instance.c.study_instance_uid, instance.c.series_instance_uid)
    rows = by_uid(connection, query, instance.c.study_instance_uid, {study_uid for study_uid, _ in keys})
    return {(row[0], row[1]): row[2] for row in rows if (row[0], row[1]) in keys}


def _pending(connection: Connection, studies: dict[str, Unit], scope: Scope) -> Iterator[_Part]:
    columns = (
        outbox.c.study_instance_uid, outbox.c.series_instance_uid, series.c.modality,
        instance.c.sop_class_uid, outbox.c.ward,
    )  # fmt: skip
    query = _of_outbox(scope, *columns, func.count()).group_by(*columns)
    for row in by_uid(connection, query, outbox.c.study_instance_uid, studies):
        yield _Part(*row)


def _pending_uids(
    connection: Connection, level: Level, studies: dict[str, Unit], scope: Scope
) -> Iterator[tuple[str, str, str, str]]:
    share = [outbox.c.study_instance_uid]
    if level in (Level.SERIES, Level.IMAGE):
        share.append(outbox.c.series_instance_uid)
    order = [outbox.c.series_instance_uid, outbox.c.sop_instance_uid]
    place = func.row_number().over(partition_by=share, order_by=order).label("place")
    for chunk in _chunks(studies):
        inner = _of_outbox(
            scope, outbox.c.study_instance_uid, outbox.c.series_instance_uid, outbox.c.sop_instance_uid,
            series.c.modality, place,
        ).where(outbox.c.study_instance_uid.in_(chunk)).subquery()  # fmt: skip
        query = select(*list(inner.c)[:4])
        if level is not Level.IMAGE:
            query = query.where(inner.c.place <= UIDS_MAX)
        rows = connection.execute(query.order_by(*list(inner.c)[:3]))
        yield from ((row[0], row[1], row[2], row[3]) for row in rows)


def _of_outbox(scope: Scope, *columns: Any) -> Any:
    source = outbox.join(instance, outbox.c.sop_instance_uid == instance.c.sop_instance_uid)
    query = (
        select(*columns).select_from(source.join(series, _same(outbox))).where(outbox.c.conflict.is_(False))
    )
    return query if scope.wards is None else query.where(outbox.c.ward.in_(sorted(scope.wards)))


def _same(home: Any) -> Any:
    return and_(
        series.c.study_instance_uid == home.c.study_instance_uid,
        series.c.series_instance_uid == home.c.series_instance_uid,
    )


def _chunks(studies: dict[str, Unit]) -> Iterator[list[str]]:
    uids = sorted(studies)
    for start in range(0, len(uids), 500):
        yield uids[start : start + 500]
