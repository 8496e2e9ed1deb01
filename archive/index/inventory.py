"""What an archive holds, as it is compared with another one's: contents by UID and digest, page by page in an
order of keys, so that no page holds a reader or a writer up. It reads; what differs is for others to mend.

A node counts what it has a receipt for; what waits for one is no difference. A region counts, of one ward,
what came from it or is a copy there. Damaged contents count nowhere: they are as good as missing. Evicted
ones do: the region has their bytes. Removed ones do until they are purged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, Select, Table, func, or_, select

from archive.database import Database
from archive.index.rows import Content, fields_of
from archive.index.schema import (
    conflict,
    holding,
    instance,
    outbox,
    removed,
    series,
    series_ward,
    study,
)
from archive.index.statements import by_uid
from archive.index.stored import INSTANCE_COLUMNS, head_of, instance_of, location_of
from archive.model import Fields, InstanceHead, Level, Location, StoredInstance

PAGE_ROWS = 5_000
PAGE_STUDIES = 200
_TABLES: tuple[Table, ...] = (instance, conflict, removed)  # a content stands in one of them


@dataclass(frozen=True, slots=True)
class Standing:
    """How a content stands here. `live` is served under its UID; else it is kept beside another
    one, or was `removed`."""

    live: bool
    whole: bool
    evicted: bool
    damaged: bool
    receipt_us: int
    pending: bool
    ward: str
    removed: bool


@dataclass(frozen=True, slots=True)
class Lying:
    """A content and where its bytes lie."""

    head: InstanceHead
    digest: bytes
    location: Location


@dataclass(frozen=True, slots=True)
class Described:
    """A live instance with what the index says of it at each level."""

    stored: StoredInstance
    patient: Fields
    study: Fields
    series: Fields


class Inventories:
    """The questions about inventories, over the database of an index."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def confirmed(self) -> Iterator[list[Content]]:
        """Page by page the contents that the region gave a receipt for and that are not damaged."""
        return self._pages(_confirmed)

    def of_ward(self, ward: str) -> Iterator[list[Content]]:
        """Page by page what is here of that ward, or is a copy there, and not damaged."""
        study = ""
        while True:
            rows, study = self._database.read(partial(_of_studies, ward=ward, after_study=study))
            if not study:
                break
            yield rows
        yield from self._pages(partial(_kept_of, ward=ward))

    def damaged(self) -> Iterator[list[Content]]:
        """Page by page what is known to be damaged here, and was not given up."""
        return self._pages(_damaged)

    def count(self, ward: str | None = None) -> int:
        """About how many contents there are, of that ward: how deep to compare."""
        return self._database.read(lambda connection: _count(connection, ward))

    def standings(self, contents: Iterable[Content]) -> dict[Content, Standing]:
        """How these stand, those that are known here."""
        return self._database.read(lambda connection: _standings(connection, contents))

    def held(self, ward: str, contents: Iterable[Content]) -> set[Content]:
        """Those that came from that ward or are a copy there."""
        return self._database.read(lambda connection: _held(connection, ward, contents))

    def last_confirmed(self, limit: int) -> list[Content]:
        """The contents with the newest receipts; reads through all that is here."""
        return self._database.read(lambda connection: _last_confirmed(connection, limit))

    def holders(self, contents: Iterable[Content]) -> list[str]:
        """The wards that gave these, or have a copy."""
        return self._database.read(lambda connection: _holders(connection, contents))

    def packs(self) -> list[str]:
        """The packs in which something lies that was not given up; reads through all that is here."""
        return self._database.read(_packs)

    def lying_in(self, packs: Iterable[str]) -> list[Lying]:
        """What lies in these, in memory at once; reads through all that is here."""
        return self._database.read(lambda connection: _lying_in(connection, packs))

    def described(self, contents: Iterable[Content]) -> list[Described]:
        """The live ones of these, each with its levels; series beside series."""
        return self._database.read(lambda connection: _described(connection, contents))

    def _pages(self, page: Callable[..., list[Content]]) -> Iterator[list[Content]]:
        rows = self._database.read(partial(page, after=None))
        while rows:
            yield rows
            rows = self._database.read(partial(page, after=rows[-1]))


def _confirmed(connection: Connection, after: Content | None) -> list[Content]:
    """The next contents, by UID and digest, that the region gave a receipt for and that are not damaged; []
    at the end."""
    rows: list[Content] = []
    for table in _TABLES:
        query = _after(table, after).where(table.c.receipt_us > 0, *_counts(table))
        rows += ((row[0], bytes(row[1])) for row in connection.execute(query))
    return _first_page(rows)


def _of_studies(connection: Connection, ward: str, after_study: str) -> tuple[list[Content], str]:
    """The live contents of that ward, or copied there, of the next studies, and the last of these; no study
    is ""."""
    studies = list(connection.execute(
        select(series_ward.c.study_instance_uid)
        .where(series_ward.c.ward == ward, series_ward.c.study_instance_uid > after_study)
        .distinct().order_by(series_ward.c.study_instance_uid).limit(PAGE_STUDIES)
    ).scalars())  # fmt: skip
    if not studies:
        return [], ""
    columns = instance.c.sop_instance_uid, instance.c.digest
    own = select(*columns).where(instance.c.ward == ward, instance.c.damaged.is_(False))
    held = select(*columns).join(holding, holding.c.sop_instance_uid == instance.c.sop_instance_uid).where(
        holding.c.ward == ward, instance.c.ward != ward, instance.c.damaged.is_(False))  # fmt: skip
    rows = [(row[0], bytes(row[1])) for query, column in
            ((own, instance.c.study_instance_uid), (held, holding.c.study_instance_uid))
            for row in by_uid(connection, query, column, studies)]  # fmt: skip
    return rows, studies[-1]


def _kept_of(connection: Connection, ward: str, after: Content | None) -> list[Content]:
    """The next contents that came from that ward and are kept beside another one, or were removed."""
    rows: list[Content] = []
    for table in (conflict, removed):
        query = _after(table, after).where(table.c.ward == ward, *_counts(table))
        rows += ((row[0], bytes(row[1])) for row in connection.execute(query))
    return _first_page(rows)


def _damaged(connection: Connection, after: Content | None) -> list[Content]:
    """The next contents whose bytes here are known not to be those that came, and were not given up."""
    rows: list[Content] = []
    for table in _TABLES:
        query = _after(table, after).where(table.c.damaged.is_(True), table.c.evicted.is_(False))
        rows += ((row[0], bytes(row[1])) for row in connection.execute(query))
    return _first_page(rows)


def _count(connection: Connection, ward: str | None) -> int:
    """About how many contents an inventory has, all of them or those of a ward: how deep to compare."""
    if ward is None:
        return int(connection.execute(select(func.count()).select_from(instance)).scalar() or 0)
    total = select(func.coalesce(func.sum(series_ward.c.instance_count), 0)).where(series_ward.c.ward == ward)
    return int(connection.execute(total).scalar() or 0)


def _standings(connection: Connection, contents: Iterable[Content]) -> dict[Content, Standing]:
    """How these stand, those that are known here."""
    wanted = set(contents)
    uids = {uid for uid, _ in wanted}
    query = select(outbox.c.sop_instance_uid, outbox.c.digest)
    queued = {(row[0], bytes(row[1])) for row in by_uid(connection, query, outbox.c.sop_instance_uid, uids)}
    found: dict[Content, Standing] = {}
    for table in _TABLES:
        query = select(table.c.sop_instance_uid, table.c.digest, table.c.evicted, table.c.damaged,
                       table.c.receipt_us, table.c.ward)  # fmt: skip
        for row in by_uid(connection, query, table.c.sop_instance_uid, uids):
            content = (row.sop_instance_uid, bytes(row.digest))
            if content in wanted:
                whole = not row.evicted and not row.damaged
                found[content] = Standing(table is instance, whole, bool(row.evicted), bool(row.damaged),
                                          row.receipt_us, content in queued, row.ward,
                                          table is removed)  # fmt: skip
    return found


def _held(connection: Connection, ward: str, contents: Iterable[Content]) -> set[Content]:
    wanted = set(contents)
    uids = {uid for uid, _ in wanted}
    query = select(holding.c.sop_instance_uid).where(holding.c.ward == ward)
    copied = {row[0] for row in by_uid(connection, query, holding.c.sop_instance_uid, uids)}
    found = _standings(connection, wanted)
    return {content for content, one in found.items() if one.ward == ward or content[0] in copied}


def _last_confirmed(connection: Connection, limit: int) -> list[Content]:
    """The contents with the newest receipts; reads through all that is here."""
    query = (
        select(instance.c.sop_instance_uid, instance.c.digest)
        .where(instance.c.receipt_us > 0)
        .order_by(instance.c.receipt_us.desc()).limit(limit)
    )  # fmt: skip
    return [(row[0], bytes(row[1])) for row in connection.execute(query)]


def _holders(connection: Connection, contents: Iterable[Content]) -> list[str]:
    wanted = set(contents)
    query = select(holding.c.ward)
    copies = by_uid(connection, query, holding.c.sop_instance_uid, {uid for uid, _ in wanted})
    own = {standing.ward for standing in _standings(connection, wanted).values()}
    return sorted(own | {row[0] for row in copies})


def _packs(connection: Connection) -> list[str]:
    found = {pack for table in _TABLES for pack in connection.execute(
        select(table.c.pack).where(table.c.evicted.is_(False)).distinct()).scalars()}  # fmt: skip
    return sorted(found)


def _lying_in(connection: Connection, packs: Iterable[str]) -> list[Lying]:
    wanted = list(packs)
    return [
        Lying(head_of(row), bytes(row.digest), location_of(row))
        for table in _TABLES
        for row in by_uid(connection, select(table).where(table.c.evicted.is_(False)), table.c.pack, wanted)
    ]


def _described(connection: Connection, contents: Iterable[Content]) -> list[Described]:
    """The live ones of these, each with its levels; series beside series."""
    wanted = set(contents)
    stored = [one for one in map(instance_of, by_uid(
        connection, select(*INSTANCE_COLUMNS), instance.c.sop_instance_uid, {uid for uid, _ in wanted}
    )) if (one.head.sop_instance_uid, one.digest) in wanted]  # fmt: skip
    studies = {row.study_instance_uid: row._mapping for row in by_uid(
        connection, select(study), study.c.study_instance_uid, {one.study_uid for one in stored}
    )}  # fmt: skip
    all_series = {(row.study_instance_uid, row.series_instance_uid): row._mapping for row in by_uid(
        connection, select(series), series.c.series_instance_uid, {one.series_uid for one in stored}
    )}  # fmt: skip
    stored.sort(key=lambda one: (one.study_uid, one.series_uid, one.head.sop_instance_uid))
    return [
        Described(
            one, fields_of(Level.PATIENT, studies[one.study_uid]),
            fields_of(Level.STUDY, studies[one.study_uid]),
            fields_of(Level.SERIES, all_series[(one.study_uid, one.series_uid)]),
        )
        for one in stored
        if one.study_uid in studies and (one.study_uid, one.series_uid) in all_series
    ]  # fmt: skip


def _counts(table: Table) -> list[Any]:
    """What an inventory counts of a table."""
    whole = [table.c.damaged.is_(False)]
    return [*whole, table.c.purged.is_(False)] if table is removed else whole


def _after(table: Table, after: Content | None) -> Select[Any]:
    columns = table.c.sop_instance_uid, table.c.digest
    query = select(*columns).order_by(*columns).limit(PAGE_ROWS)
    if after is None:
        return query
    uid, digest = after
    return query.where(table.c.sop_instance_uid >= uid,
                       or_(table.c.sop_instance_uid > uid, table.c.digest > digest))  # fmt: skip


def _first_page(rows: Sequence[Content]) -> list[Content]:
    """Of pages of several tables in one order: none of them is behind what is given."""
    return sorted(rows)[:PAGE_ROWS]
