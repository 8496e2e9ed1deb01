"""Questions to the index: search, count, and the instances behind a study, each on one snapshot.

Rows come from the table of the query's level, joined with those above it. Without a scope the counts stand in
the rows; with a scope, or for what is pending, they are made from the page's studies alone (`tallies.py`), so
that an answer never counts what its reader may not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    Table,
    and_,
    column,
    exists,
    func,
    literal,
    literal_column,
    not_,
    or_,
    select,
    table,
    tuple_,
)

from archive.catalog import BY_KEYWORD, at_level
from archive.errors import InvalidQuery
from archive.index.conditions import condition, literal_run
from archive.index.rows import split
from archive.index.schema import (
    SEARCHED,
    STUDY_TEXT,
    holding,
    instance,
    outbox,
    patient,
    patient_hash,
    series,
    series_ward,
    study,
)
from archive.index.stored import INSTANCE_COLUMNS, instance_of
from archive.index.tallies import Tally, Unit, evicted, holders, tallies, uid_lists
from archive.matching import parse
from archive.model import EVERYTHING, Level, Match, Query, Scope, StoredInstance, StudyPlace
from archive.predicates import AllOf, Empty, Like, Named, OneOf, Predicate, Worded

COMMON_MIN = 20_000

_INSTANCES = select(*INSTANCE_COLUMNS)
_TABLES = {Level.PATIENT: patient, Level.STUDY: study, Level.SERIES: series, Level.IMAGE: instance}
_ABOVE = {
    Level.PATIENT: (Level.PATIENT,),
    Level.STUDY: (Level.PATIENT, Level.STUDY),
    Level.SERIES: (Level.PATIENT, Level.STUDY, Level.SERIES),
    Level.IMAGE: (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE),
}


def search(connection: Connection, query: Query) -> list[Match]:
    """The rows that match, in the query's order."""
    query = _widened(connection, query)
    question = _Question(query, _hints(connection, query, paged=query.limit is not None))
    if question.hopeless:
        return []
    statement = question.select().limit(query.limit).offset(query.offset or None)
    rows = connection.execute(statement).fetchall()
    return _Page(connection, query, rows).matches()


def count(connection: Connection, query: Query) -> int:
    """How many rows match, whatever the limit and the offset."""
    query = _widened(connection, query)
    question = _Question(query, _hints(connection, query, paged=False))
    if question.hopeless:
        return 0
    return int(connection.execute(question.count()).scalar_one())


def listed(connection: Connection, query: Query) -> list[tuple[str | int, ...]]:
    """What orders each row that matches, its UID among it, in the query's order: the rows without reading
    them. Of studies date, time and UID; of series number, UID and study; of instances number and UID."""
    if query.level is Level.PATIENT:
        raise InvalidQuery("patients are not listed by what orders them")
    query = _widened(connection, query)
    question = _Question(query, _hints(connection, query, paged=query.limit is not None))
    if question.hopeless:
        return []
    statement = question.listed().limit(query.limit).offset(query.offset or None)
    return [tuple(row) for row in connection.execute(statement)]


def instances(
    connection: Connection,
    study_uid: str,
    series_uid: str | None,
    sop_instance_uid: str | None,
    scope: Scope,
) -> list[StoredInstance]:
    """What can be read of a study, a series or an instance, by series, number and UID."""
    conditions = [instance.c.study_instance_uid == study_uid]
    if series_uid is not None:
        conditions.append(instance.c.series_instance_uid == series_uid)
    if sop_instance_uid is not None:
        conditions.append(instance.c.sop_instance_uid == sop_instance_uid)
    if scope.wards is not None:
        conditions.append(_instance_in(sorted(scope.wards)))
    order = (instance.c.series_instance_uid, instance.c.number, instance.c.sop_instance_uid)
    rows = connection.execute(_INSTANCES.where(*conditions).order_by(*order)).fetchall()
    return [instance_of(row) for row in rows]


def _widened(connection: Connection, query: Query) -> Query:
    """Without its scope, when nobody's but the scope's wards' instances are here, as at a ward's own node:
    then the counts stand in the rows, and a question takes a seventh of the time."""
    wards = sorted(query.scope.wards or ())
    if not wards or query.pending_only:
        return query
    ward = series_ward.c.ward  # asked for gap by gap, which takes a look at its index for each
    between = (exists().where(ward > lower, ward < upper) for lower, upper in pairwise(wards))
    others = or_(exists().where(ward < wards[0]), *between, exists().where(ward > wards[-1]))
    return query if connection.execute(select(others)).scalar_one() else replace(query, scope=EVERYTHING)


@dataclass(frozen=True, slots=True)
class _Hints:
    """What SQLite, which has no statistics, is told of the data. A page of the newest is found by walking
    the studies in their order where many match, and from what matches where few do: at a million studies
    the wrong way takes seconds, the right one milliseconds. PostgreSQL's planner knows by itself."""

    sqlite: bool
    rare: Callable[[str, str], bool]  # whether few studies have this run of characters in this column
    small: bool  # whether the scope's wards have few series


def _hints(connection: Connection, query: Query, *, paged: bool) -> _Hints:
    if connection.dialect.name != "sqlite":
        return _Hints(False, lambda name, run: False, False)

    def few(chosen: Select[Any]) -> bool:
        some = chosen.limit(COMMON_MIN).subquery()
        return bool(connection.execute(select(func.count()).select_from(some)).scalar_one() < COMMON_MIN)

    def rare(name: str, run: str) -> bool:
        return not paged or few(_trigrams(name, run))

    wards = query.scope.wards
    return _Hints(True, rare, wards is not None and few(_studies_of(sorted(wards))))


class _Question:
    """The SQL of a query: where its rows come from, which of them, in which order."""

    def __init__(self, query: Query, hints: _Hints) -> None:
        self._hints = hints
        self._sqlite = hints.sqlite
        self._level = query.level
        self._wards = None if query.scope.wards is None else sorted(query.scope.wards)
        self._pending = query.pending_only
        predicates = parse(query)
        people = _people(query)
        self.hopeless = self._wards == [] or people == []
        self._where = [self._condition(predicate) for predicate in predicates]
        if people:
            home = patient if self._level is Level.PATIENT else study
            self._where.append(home.c.patient_hash.in_(people))
        if self._wards is not None or self._pending:
            self._where.append(self._visible())
        if query.after is not None:
            self._where.append(self._behind(query.after))

    def select(self) -> Select[Any]:
        return _selection(self._level).where(*self._where)

    def listed(self) -> Select[Any]:
        order = _order(self._level)
        columns = [study.c.study_date, study.c.study_time, study.c.study_instance_uid]
        chosen = columns if self._level is Level.STUDY else order
        return select(*chosen).select_from(_rows(self._level)).where(*self._where).order_by(*order)

    def count(self) -> Select[Any]:
        return select(func.count()).select_from(_rows(self._level)).where(*self._where)

    def plain(self, keyword: str) -> ColumnElement[str]:
        """The column of a keyword; a UID that several tables hold is taken from the lowest."""
        if keyword == "ModalitiesInStudy":
            return study.c.modalities
        if keyword == "SOPClassesInStudy":
            return study.c.sop_classes
        entry = BY_KEYWORD[keyword]
        if entry.column in ("study_instance_uid", "series_instance_uid"):
            return _TABLES[self._level].c[entry.column]
        return self._home(entry.level).c[entry.column]

    def folded(self, keyword: str) -> ColumnElement[str]:
        entry = BY_KEYWORD[keyword]
        return self._home(entry.level).c[f"{entry.column}_folded"]

    def _home(self, level: Level) -> Table:
        return study if level is Level.PATIENT and self._level is not Level.PATIENT else _TABLES[level]

    def _condition(self, predicate: Predicate) -> ColumnElement[bool]:
        if isinstance(predicate, AllOf):
            return and_(*(self._condition(each) for each in predicate.predicates))
        if self._wards is not None and isinstance(predicate, OneOf | Like | Empty):
            if predicate.keyword == "ModalitiesInStudy":
                return self._in_series_of_wards(predicate, series.c.modality)
            if predicate.keyword == "SOPClassesInStudy":
                return self._in_series_of_wards(predicate, series_ward.c.sop_classes)
        found = condition(predicate, self, sqlite=self._sqlite)
        run = literal_run(predicate) if self._sqlite and self._level is not Level.PATIENT else None
        if run is None or not isinstance(predicate, Like | Named | Worded):
            return found
        named = isinstance(predicate, Named | Worded)
        name = (self.folded if named else self.plain)(predicate.keyword).name
        if name not in SEARCHED or not self._hints.rare(name, run):
            return found
        return and_(study.c.text_id.in_(_trigrams(name, run)), found)

    def _in_series_of_wards(
        self, predicate: OneOf | Like | Empty, values: ColumnElement[str]
    ) -> ColumnElement[bool]:
        """A list of the study's, as far as the scope's wards have it."""
        assert self._wards is not None
        if isinstance(predicate, Empty):
            return not_(self._in_series_of_wards(Like(predicate.keyword, ("?*",)), values))
        source = series_ward.join(series, _same_series(series_ward))
        return (
            exists()
            .select_from(source)
            .where(
                series_ward.c.study_instance_uid == study.c.study_instance_uid,
                series_ward.c.ward.in_(self._wards),
                condition(predicate, _OneColumn(values), sqlite=self._sqlite),
            )
        )

    def _visible(self) -> ColumnElement[bool]:
        """The row has an instance that the scope allows, and that is pending when that is asked."""
        if self._level is Level.PATIENT:
            inner = self._study_visible()
            return exists().select_from(study).where(study.c.patient_hash == patient.c.patient_hash, inner)
        if self._level is Level.STUDY:
            return self._study_visible()
        if self._level is Level.SERIES:
            visible = _series_visible(self._wards, self._pending)
            return visible if self._pending else and_(visible, _names_its_patient(self._wards or []))
        if not self._pending:
            return and_(_instance_in(self._wards or []), _names_its_patient(self._wards or []))
        return exists().where(
            outbox.c.sop_instance_uid == instance.c.sop_instance_uid, *_pending_in(self._wards)
        )

    def _behind(self, place: StudyPlace) -> ColumnElement[bool]:
        """Compared as one value, which both databases look up in the index of the order."""
        if self._level is not Level.STUDY:
            raise InvalidQuery("only studies are listed from a place on")
        order = tuple_(study.c.study_date, study.c.study_time, study.c.study_instance_uid)
        return order < tuple_(literal(place.date), literal(place.time), literal(place.uid))

    def _study_visible(self) -> ColumnElement[bool]:
        uid = study.c.study_instance_uid
        if self._pending:
            return exists().where(outbox.c.study_instance_uid == uid, *_pending_in(self._wards))
        of_wards = _studies_of(self._wards or [])
        here = of_wards.where(series_ward.c.study_instance_uid == uid).exists()
        visible: ColumnElement[bool] = uid.in_(of_wards) if self._hints.small else here
        return and_(visible, _names_its_patient(self._wards or []))


@dataclass(frozen=True, slots=True)
class _OneColumn:
    """Columns for a predicate whose value lies elsewhere than in its own study."""

    values: ColumnElement[str]

    def plain(self, keyword: str) -> ColumnElement[str]:
        return self.values

    def folded(self, keyword: str) -> ColumnElement[str]:
        return self.values


class _Page:
    """The rows of an answer as matches, with what has to be counted for them alone."""

    def __init__(self, connection: Connection, query: Query, rows: Sequence[Any]) -> None:
        self._connection = connection
        self._query = query
        self._level = query.level
        self._columns = _columns(query.level)
        self._rows = rows

    def matches(self) -> list[Match]:
        fields = [self._fields(row) for row in self._rows]
        units = [self._unit(row, by_level) for row, by_level in zip(self._rows, fields, strict=True)]
        counted = self._tallies(units, fields)
        lists: dict[Unit, Any] = {}
        if self._query.pending_only:
            lists = uid_lists(self._connection, self._level, units, self._query.scope)
        away = evicted(self._connection, self._level, units)
        return [
            self._match(by_level, counted[unit], lists.get(unit, ()), unit in away)
            for unit, by_level in zip(units, fields, strict=True)
        ]

    def _fields(self, row: Any) -> list[dict[str, str]]:
        at = 1 + len(_extra(self._level))
        by_level = []
        for keywords in self._columns:
            values = row[at : at + len(keywords)]
            by_level.append({name: value for (name, _), value in zip(keywords, values, strict=True) if value})
            at += len(keywords)
        return by_level

    def _unit(self, row: Any, by_level: list[dict[str, str]]) -> Unit:
        if self._level is Level.PATIENT:
            return (bytes(row[0]),)
        if self._level is Level.STUDY:
            return (by_level[1]["StudyInstanceUID"],)
        key = (by_level[1]["StudyInstanceUID"], by_level[2]["SeriesInstanceUID"])
        return key if self._level is Level.SERIES else (*key, by_level[3]["SOPInstanceUID"])

    def _tallies(self, units: list[Unit], fields: list[list[dict[str, str]]]) -> dict[Unit, Tally]:
        if self._level is Level.IMAGE:
            wards = holders(self._connection, units, self._query.scope)
            return {
                unit: Tally(
                    series={unit[:2]},
                    instances=1,
                    modalities=set(filter(None, [by_level[2].get("Modality")])),
                    sop_classes={by_level[3]["SOPClassUID"]},
                    wards=wards[unit],
                )
                for unit, by_level in zip(units, fields, strict=True)
            }
        whole = self._query.scope.wards is None and not self._query.pending_only
        if whole and self._level is not Level.PATIENT:
            return {unit: _own(row, self._level) for unit, row in zip(units, self._rows, strict=True)}
        return tallies(
            self._connection, self._level, units, self._query.scope, pending=self._query.pending_only
        )

    def _match(self, by_level: list[dict[str, str]], tally: Tally, lists: Any, nearline: bool) -> Match:
        empty: dict[str, str] = {}
        padded = by_level + [empty] * (4 - len(by_level))
        return Match(
            level=self._level,
            issuer=padded[0].get("IssuerOfPatientID", ""),
            patient=padded[0],
            study=padded[1],
            series=padded[2],
            instance=padded[3],
            modalities=tuple(sorted(tally.modalities)),
            sop_classes=tuple(sorted(tally.sop_classes)),
            series_count=tally.series_count,
            instance_count=tally.instances,
            study_count=tally.studies,
            wards=tuple(sorted(tally.wards)),
            holdings=tuple(lists),
            truncated=bool(lists) and sum(len(one.sop_instance_uids) for one in lists) < tally.instances,
            nearline=nearline,
        )


def _people(query: Query) -> list[bytes] | None:
    """The hashes of the patients that the query is bound to; one without a Patient ID is nobody's."""
    if query.person is None:
        return None
    return sorted(patient_hash(key, "") for key in query.person if key.patient_id)


@cache
def _selection(level: Level) -> Select[Any]:
    """A level's rows, in their order: made once, as putting it together takes longer than running it."""
    home = patient if level is Level.PATIENT else study
    chosen = [home.c.patient_hash, *_extra(level)]
    for keywords in _columns(level):
        chosen += [column for _, column in keywords]
    return select(*chosen).select_from(_rows(level)).order_by(*_order(level))


def _rows(level: Level) -> FromClause:
    same_study = study.c.study_instance_uid
    if level is Level.SERIES:
        return series.join(study, series.c.study_instance_uid == same_study)
    if level is Level.IMAGE:
        return instance.join(series, _same_series(instance)).join(
            study, instance.c.study_instance_uid == same_study
        )
    return _TABLES[level]


@cache
def _columns(asked: Level) -> tuple[tuple[tuple[str, ColumnElement[str]], ...], ...]:
    """The keywords and columns of a level and of those above it."""
    homes = ((level, study if level is Level.PATIENT and asked is not level else _TABLES[level])
             for level in _ABOVE[asked])  # fmt: skip
    return tuple(
        tuple(
            (entry.keyword, home.c[entry.column].label(f"{level.value}_{entry.column}"))
            for entry in at_level(level)
        )
        for level, home in homes
    )


def _extra(level: Level) -> list[ColumnElement[Any]]:
    """The counts and lists that a row keeps of its own."""
    if level is Level.STUDY:
        return [study.c.series_count, study.c.instance_count, study.c.modalities, study.c.sop_classes,
                study.c.wards]  # fmt: skip
    if level is Level.SERIES:
        return [series.c.instance_count, series.c.sop_classes, series.c.wards]
    return []


def _own(row: Any, level: Level) -> Tally:
    if level is Level.STUDY:
        _, series_count, instance_count, modalities, sop_classes, wards = row[:6]
        return Tally(
            instances=instance_count, modalities=set(split(modalities)), sop_classes=set(split(sop_classes)),
            wards=set(split(wards)), studies=1, own_series_count=series_count,
        )  # fmt: skip
    _, instance_count, sop_classes, wards = row[:4]
    modality = row._mapping["SERIES_modality"]
    return Tally(
        instances=instance_count, modalities={modality} if modality else set(),
        sop_classes=set(split(sop_classes)), wards=set(split(wards)), studies=1, own_series_count=1,
    )  # fmt: skip


def _order(level: Level) -> list[ColumnElement[Any]]:
    if level is Level.PATIENT:
        return [patient.c.patient_id, patient.c.issuer_of_patient_id, patient.c.patient_hash]
    if level is Level.STUDY:
        return [study.c.study_date.desc(), study.c.study_time.desc(), study.c.study_instance_uid.desc()]
    if level is Level.SERIES:
        return [series.c.number, series.c.series_instance_uid, series.c.study_instance_uid]
    return [instance.c.number, instance.c.sop_instance_uid]


def _same_series(home: Table) -> ColumnElement[bool]:
    return and_(
        series.c.study_instance_uid == home.c.study_instance_uid,
        series.c.series_instance_uid == home.c.series_instance_uid,
    )


def _instance_in(wards: list[str], instance: FromClause = instance) -> ColumnElement[bool]:
    held = exists().where(
        holding.c.sop_instance_uid == instance.c.sop_instance_uid, holding.c.ward.in_(wards)
    )
    return or_(instance.c.ward.in_(wards), held)


def _names_its_patient(wards: list[str]) -> ColumnElement[bool]:
    """Whether one of the wards has an instance that names the study's patient. A study's row shows the
    patient whom its first instance named: a ward that sent something else under another's Study Instance UID
    is not told who that patient is."""
    own = instance.alias("own")
    return exists().where(
        own.c.study_instance_uid == study.c.study_instance_uid,
        own.c.patient_hash == study.c.patient_hash,
        _instance_in(wards, own),
    )


def _pending_in(wards: list[str] | None) -> list[ColumnElement[bool]]:
    told = [outbox.c.conflict.is_(False), outbox.c.hidden.is_(False)]
    return [*told, *([] if wards is None else [outbox.c.ward.in_(wards)])]


def _studies_of(wards: list[str]) -> Select[Any]:
    return select(series_ward.c.study_instance_uid).where(series_ward.c.ward.in_(wards))


def _series_visible(wards: list[str] | None, pending: bool) -> ColumnElement[bool]:
    if pending:
        return exists().where(
            outbox.c.study_instance_uid == series.c.study_instance_uid,
            outbox.c.series_instance_uid == series.c.series_instance_uid,
            *_pending_in(wards),
        )
    return exists().where(_same_series(series_ward), series_ward.c.ward.in_(wards or []))


def _trigrams(name: str, run: str) -> Select[Any]:
    """The studies (by text id) whose searched column may contain `run`, from SQLite's trigram table."""
    phrase = '{}: "{}"'.format(name, run.replace('"', '""'))
    texts = table(STUDY_TEXT, column("rowid"))
    return select(texts.c.rowid).where(literal_column(STUDY_TEXT).op("MATCH")(phrase))
