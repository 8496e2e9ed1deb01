"""What a node has of each study on its disk, as its cache needs to know it: how much, since when, and how
much of it the region has as well. It reads; what goes is decided in `node/cache/`."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Integer, and_, case, cast, func, select

from archive.database import Database
from archive.index.rows import split
from archive.index.schema import instance, study

PAGE_MAX = 1_000


@dataclass(frozen=True, slots=True)
class CachedStudy:
    """A study's bytes here. `evictable` is of those whose receipt is old enough, `held_back` counts the
    others; `received_us` is of the last one received, `aes` names who sent them."""

    study_uid: str
    instances: int
    bytes: int
    evictable: int
    evictable_bytes: int
    received_us: int
    modalities: frozenset[str]
    aes: frozenset[str] = frozenset()

    @property
    def held_back(self) -> int:
        return self.instances - self.evictable


@dataclass(frozen=True, slots=True)
class CacheTotals:
    """Instances and bytes here, those that were evicted, and those that may be."""

    instances: int
    bytes: int
    evicted: int
    evicted_bytes: int


class Cached:
    """The questions of a cache about one index. Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def studies(self, protected_to_us: int, after_uid: str = "", limit: int = PAGE_MAX) -> list[CachedStudy]:
        """By UID, behind `after_uid`: the studies of which any bytes are here."""
        return self._database.read(lambda c: _studies(c, protected_to_us, after_uid, limit))

    def totals(self) -> CacheTotals:
        """Reads through all that is here."""
        return self._database.read(_totals)

    def evicted_of(self, study_uid: str) -> list[tuple[str, bytes, int]]:
        """The instances of a study whose bytes are not here: UID, digest and size."""
        query = (
            select(instance.c.sop_instance_uid, instance.c.digest, instance.c.payload_length)
            .where(instance.c.study_instance_uid == study_uid, instance.c.evicted.is_(True))
            .order_by(instance.c.series_instance_uid, instance.c.number, instance.c.sop_instance_uid)
        )
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        return [(row[0], bytes(row[1]), row[2]) for row in rows]

    def damaged_of(self, study_uid: str) -> frozenset[tuple[str, bytes]]:
        """The instances of a study whose bytes here are not what their digest says."""
        query = select(instance.c.sop_instance_uid, instance.c.digest).where(
            instance.c.study_instance_uid == study_uid, instance.c.damaged.is_(True)
        )
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        return frozenset((row[0], bytes(row[1])) for row in rows)


def _studies(
    connection: Connection, protected_to_us: int, after_uid: str, limit: int
) -> list[CachedStudy]:
    may_go = and_(
        instance.c.receipt_us > 0, instance.c.receipt_us <= protected_to_us, instance.c.damaged.is_(False)
    )
    length = instance.c.payload_length
    here = (
        select(
            instance.c.study_instance_uid.label("uid"),
            func.count().label("instances"),
            func.sum(length).label("bytes"),
            func.sum(case((may_go, 1), else_=0)).label("evictable"),
            func.sum(case((may_go, length), else_=0)).label("evictable_bytes"),
            func.max(instance.c.received_at_us).label("received_us"),
        )
        .where(instance.c.study_instance_uid > after_uid, instance.c.evicted.is_(False))
        .group_by(instance.c.study_instance_uid)
        .order_by(instance.c.study_instance_uid)
        .limit(min(limit, PAGE_MAX))
        .subquery()
    )
    rows = connection.execute(
        select(here, study.c.modalities).join(study, study.c.study_instance_uid == here.c.uid)
        .order_by(here.c.uid)
    ).fetchall()
    aes: dict[str, set[str]] = {}
    if rows:
        sent = select(instance.c.study_instance_uid, instance.c.calling_ae).where(
            instance.c.study_instance_uid.between(rows[0].uid, rows[-1].uid)
        ).distinct()
        for uid, ae in connection.execute(sent):
            aes.setdefault(uid, set()).add(ae)
    return [
        CachedStudy(
            row.uid, row.instances, int(row.bytes), int(row.evictable), int(row.evictable_bytes),
            row.received_us, frozenset(split(row.modalities)),
            frozenset(aes.get(row.uid, ())),
        )
        for row in rows
    ]  # fmt: skip


def _totals(connection: Connection) -> CacheTotals:
    gone = cast(instance.c.evicted, Integer)
    row = connection.execute(select(
        func.count(), func.coalesce(func.sum(instance.c.payload_length), 0),
        func.coalesce(func.sum(gone), 0),
        func.coalesce(func.sum(gone * instance.c.payload_length), 0),
    )).one()  # fmt: skip
    return CacheTotals(int(row[0] - row[2]), int(row[1] - row[3]), int(row[2]), int(row[3]))
