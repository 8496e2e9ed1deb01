"""What removals do to the index: what they cover lies in `removed` instead of `instance`, with all that is
known of it, and nothing that is searched, counted or read for people looks there.

`tombstone` holds the removals, for ever. Which of them covers an instance depends on the removals and on the
instance alone, never on what came first: facts and records may cross. A removal whose REMOVED has not come
yet may be restored or purged already; what covers nothing here yet works when it comes.

The region's word counts before a ward's: what a ward purged may be restored by the region, whose bytes are
its own; what the region purged is gone for good.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, and_, bindparam, delete, or_, select, update

from archive.database import storable
from archive.errors import Corrupt
from archive.index.rows import Content, Row
from archive.index.schema import conflict, holding, instance, outbox, removed, series, tombstone
from archive.index.statements import by_uid, insert_all, update_some
from archive.index.stored import head_of, location_of
from archive.model import START, Fact, FactKind, Level, Record, RecordKind
from archive.removals import Removal, purge_of, removal_of, restoration_of

log = logging.getLogger(__name__)

_INSTANCE_COLUMNS = tuple(column.name for column in instance.c)


@dataclass(frozen=True, slots=True)
class Standing:
    """What covers an instance: the removal that counts, and whether its bytes are given back."""

    removal: str
    purged: bool


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A removal and what became of it. `hidden` instances are covered here by it, `kept` of them still have
    their bytes."""

    removal: Removal
    restored_us: int
    restored_by: str
    purged_us: int
    purged_by: str
    purged_ward: str
    in_force: bool
    purged: bool
    hidden: int = 0
    kept: int = 0

    @property
    def final(self) -> bool:
        """Whether the region purged it: then nobody restores it."""
        return self.purged and not self.purged_ward


@dataclass(frozen=True, slots=True)
class KnownRemoved:
    """What intake asks of a UID that was removed. What is `settled` is not written when it comes again: its
    bytes are here, or were purged."""

    digest: bytes
    settled: bool


@dataclass(frozen=True, slots=True)
class RemovedContent:
    """A content that a removal covers, and where its bytes lie or lay."""

    record: Record
    study_uid: str
    series_uid: str
    evicted: bool


def bring_in(connection: Connection, facts: Sequence[Fact], *, of_region: bool) -> set[str]:
    """REMOVED, RESTORED and PURGED facts; the studies whose rows are to be made anew. In the region a ward's
    removal covers what that ward gave and nothing else: it may name UIDs that it only guessed."""
    named = []
    for fact in facts:
        try:
            named.append((_id_of(fact), fact))
        except Corrupt as error:  # of another release; it stays in the fact log
            log.error("a fact of the kind %s is passed over: %s", fact.kind.value, error)
    ids = {removal for removal, _ in named}
    rows = {
        row.removal_id: dict(row._mapping)
        for row in by_uid(connection, select(tombstone), tombstone.c.removal_id, ids)
    }
    changed: set[str] = set()
    covered: list[Row] = []  # as they were: what they covered may be free now
    for removal, fact in named:
        row = rows.setdefault(removal, {**_NOTHING, "removal_id": removal})
        before = dict(row)
        if _note(row, fact):
            changed.add(removal)
            covered.append(before)
    if not changed:
        return set()
    written = [rows[removal] for removal in sorted(changed)]
    connection.execute(
        delete(tombstone).where(tombstone.c.removal_id == bindparam("b_id")),
        [{"b_id": row["removal_id"]} for row in written],
    )
    insert_all(connection, tombstone, written)
    return _settle(connection, [row for row in (*covered, *written) if row["level"]], of_region)


def cover(connection: Connection, uids: Iterable[str], *, of_region: bool) -> set[str]:
    """Put these instances where they belong, whoever put them where they are; the studies that changed."""
    return _sort(connection, _found(connection, "sop_instance_uid", set(uids)), of_region)


def covering(
    connection: Connection, rows: Sequence[Mapping[str, Any]], *, of_region: bool
) -> dict[str, Standing]:
    """What covers these instances, by UID; those that nothing covers are left out. A row has the UIDs of its
    study, its series and its own, `received_at_us` and `ward`."""
    uids = {row[column] for row in rows for column in _COLUMN.values()}
    covers: dict[tuple[str, str], list[Any]] = {}
    for one in by_uid(connection, select(tombstone), tombstone.c.uid, uids):
        if one.level and _in_force(one._mapping):
            covers.setdefault((one.level, one.uid), []).append(one)
    found: dict[str, Standing] = {}
    for row in rows:
        over = [
            one
            for level, column in _COLUMN.items()
            for one in covers.get((level, row[column]), ())
            if (level == Level.IMAGE.value or row["received_at_us"] < one.at_us)
            and (not of_region or one.ward in ("", row["ward"]))
        ]
        if over:
            best = min(over, key=_rank)
            found[row["sop_instance_uid"]] = Standing(best.removal_id, _purged(best._mapping))
    return found


def tombstones(
    connection: Connection, limit: int, prefix: str = "", *, uid: str = "", in_force: bool = False
) -> list[Tombstone]:
    """The removals, newest first; those alone whose id begins with `prefix`, that name `uid`, or that
    count."""
    query = select(tombstone).where(tombstone.c.level != "").order_by(
        tombstone.c.at_us.desc(), tombstone.c.removal_id
    )  # fmt: skip
    if prefix:
        query = query.where(tombstone.c.removal_id >= prefix, tombstone.c.removal_id < prefix + "g")
    if uid:
        query = query.where(tombstone.c.uid == uid)
    if in_force:
        query = query.where(or_(tombstone.c.restored_us == 0, tombstone.c.purged_us != 0))
    rows = connection.execute(query.limit(limit)).fetchall()
    counts: dict[str, list[int]] = {}
    hidden = select(removed.c.removal_id, removed.c.evicted)
    for one in by_uid(connection, hidden, removed.c.removal_id, {row.removal_id for row in rows}):
        count = counts.setdefault(one.removal_id, [0, 0])
        count[0] += 1
        count[1] += not one.evicted
    found = [_tombstone(row, *counts.get(row.removal_id, (0, 0))) for row in rows]
    return [one for one in found if one.in_force or not in_force]


def holders(connection: Connection, uids: Iterable[str]) -> dict[str, set[str]]:
    """The wards that hold these instances, shown or removed; those not here are left out."""
    found: dict[str, set[str]] = {}
    wanted = list(uids)
    for table in (instance, removed, holding):
        query = select(table.c.sop_instance_uid, table.c.ward)
        for uid, ward in by_uid(connection, query, table.c.sop_instance_uid, wanted):
            found.setdefault(uid, set()).add(ward)
    return found


def due(connection: Connection, before_us: int, limit: int) -> list[Tombstone]:
    """Removals that cover what still has its bytes here: those that are purged, and those made before
    `before_us`."""
    both = removed.join(tombstone, removed.c.removal_id == tombstone.c.removal_id)
    old = or_(removed.c.purged, tombstone.c.at_us < before_us)
    first = select(removed.c.removal_id).select_from(both).where(removed.c.evicted.is_(False), old)
    beside = removed.join(conflict, removed.c.sop_instance_uid == conflict.c.sop_instance_uid)
    second = select(removed.c.removal_id).select_from(beside).where(
        removed.c.purged, conflict.c.evicted.is_(False)
    )  # fmt: skip
    ids = {row[0] for query in (first, second) for row in connection.execute(query.distinct().limit(limit))}
    return [_tombstone(row) for row in by_uid(connection, select(tombstone), tombstone.c.removal_id, ids)]


def contents(connection: Connection, removal: Removal, limit: int, *, kept: bool) -> list[RemovedContent]:
    """What a removal covers, also where another one counts first, pack by pack; with `kept` what still has
    its bytes, and what is kept beside it under the same UID: it goes too."""
    conditions = [removed.c[_COLUMN[removal.level.value]] == removal.uid]
    if removal.level is not Level.IMAGE:
        conditions.append(removed.c.received_at_us < removal.at_us)
    query = select(removed).where(*conditions).order_by(removed.c.pack, removed.c.payload_offset).limit(limit)
    if not kept:
        return [_content(row) for row in connection.execute(query)]
    found = [_content(row) for row in connection.execute(query.where(removed.c.evicted.is_(False)))]
    both = conflict.join(removed, removed.c.sop_instance_uid == conflict.c.sop_instance_uid)
    beside = select(conflict).select_from(both).where(*conditions, conflict.c.evicted.is_(False)).limit(limit)
    return (found + [_content(row) for row in connection.execute(beside)])[:limit]


def _content(row: Any) -> RemovedContent:
    record = Record(RecordKind.INSTANCE, 0, head_of(row), bytes(row.digest), location_of(row), START)
    return RemovedContent(record, row.study_instance_uid, row.series_instance_uid, bool(row.evicted))


_COLUMN = {
    Level.STUDY.value: "study_instance_uid",
    Level.SERIES.value: "series_instance_uid",
    Level.IMAGE.value: "sop_instance_uid",
}

_NOTHING: Row = {
    "level": "", "uid": "", "study_instance_uid": "", "code": "", "decided_by": "", "reason": "", "ward": "",
    "at_us": 0, "restored_us": 0, "restored_by": "", "restored_ward": "", "purged_us": 0, "purged_by": "",
    "purged_ward": "",
}  # fmt: skip


def _id_of(fact: Fact) -> str:
    if fact.kind is FactKind.REMOVED:
        return removal_of(fact).id
    return restoration_of(fact).removal if fact.kind is FactKind.RESTORED else purge_of(fact).removal


def _note(row: Row, fact: Fact) -> bool:
    """Bring a fact into a tombstone; False when it says nothing new. Of two that say different things the
    same one counts, whichever comes first."""
    if fact.kind is FactKind.REMOVED:
        told = removal_of(fact)
        new: Row = {
            "level": told.level.value, "uid": told.uid, "study_instance_uid": told.study_uid,
            "code": storable(told.code), "decided_by": storable(told.by), "reason": storable(told.reason),
            "ward": told.ward,
            "at_us": told.at_us,
        }  # fmt: skip
        known = tuple(row[name] for name in new) if row["level"] else None
    else:
        said = restoration_of(fact) if fact.kind is FactKind.RESTORED else purge_of(fact)
        what = "restored" if fact.kind is FactKind.RESTORED else "purged"
        # The region's, whose ward is "", sorts first.
        new = {f"{what}_ward": said.ward, f"{what}_us": max(said.at_us, 1), f"{what}_by": storable(said.by)}
        known = tuple(row[name] for name in new) if row[f"{what}_us"] else None
    if known is not None and known <= tuple(new.values()):
        return False
    row.update(new)
    return True


def _purged(row: Mapping[str, Any]) -> bool:
    if not row["purged_us"]:
        return False
    by_region = row["restored_us"] and not row["restored_ward"]
    return not (row["purged_ward"] and by_region)


def _in_force(row: Mapping[str, Any]) -> bool:
    return _purged(row) or not row["restored_us"]


def _rank(row: Any) -> tuple[bool, int, str]:
    return not _purged(row._mapping), row.at_us, row.removal_id


def _settle(connection: Connection, changed: Sequence[Row], of_region: bool) -> set[str]:
    """Whatever these removals may cover, or covered until now, goes where it belongs."""
    rows: dict[str, tuple[Table, Row]] = {}
    for level, name in _COLUMN.items():
        uids = {row["uid"] for row in changed if row["level"] == level}
        if uids:
            rows |= _found(connection, name, uids)
    return _sort(connection, rows, of_region)


def _found(connection: Connection, name: str, uids: set[str]) -> dict[str, tuple[Table, Row]]:
    """The instances of which the column `name` is one of `uids`, and where they are now."""
    found: dict[str, tuple[Table, Row]] = {}
    for table in (instance, removed):
        query = select(table)
        if table is instance and name == _COLUMN[Level.SERIES.value]:
            # An instance is found by its study; a series by its own UID.
            holds = select(series.c.study_instance_uid).where(series.c.series_instance_uid.in_(sorted(uids)))
            query = query.where(table.c.study_instance_uid.in_(holds))
        for row in by_uid(connection, query, table.c[name], uids):
            found[row.sop_instance_uid] = (table, dict(row._mapping))
    return found


def _sort(connection: Connection, rows: Mapping[str, tuple[Table, Row]], of_region: bool) -> set[str]:
    """Move rows to where they belong; the studies that gained or lost an instance."""
    standings = covering(connection, [row for _, row in rows.values()], of_region=of_region)
    hidden: list[Row] = []
    shown: list[Row] = []
    other: list[Row] = []
    for uid, (table, row) in rows.items():
        standing = standings.get(uid)
        if standing is None:
            if table is removed:
                shown.append({name: row[name] for name in _INSTANCE_COLUMNS})
            continue
        now = {**row, "removal_id": standing.removal, "purged": standing.purged}
        if table is instance:
            hidden.append(now)
        elif (row["removal_id"], bool(row["purged"])) != (standing.removal, standing.purged):
            other.append(now)
    for source, target, moved in ((instance, removed, hidden), (removed, instance, shown)):
        if moved:
            _delete(connection, source, moved)
            insert_all(connection, target, moved)
            _hide_pending(connection, moved, hidden=target is removed)
    if other:
        update_some(connection, removed, ("sop_instance_uid",), ("removal_id", "purged"), other)
    return {row["study_instance_uid"] for row in (*hidden, *shown)}


def _delete(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    here = table.c.sop_instance_uid == bindparam("b_uid")
    connection.execute(delete(table).where(here), [{"b_uid": row["sop_instance_uid"]} for row in rows])


def _hide_pending(connection: Connection, rows: Sequence[Row], *, hidden: bool) -> None:
    """What waits for the region still goes there, and is hidden there too; nobody is told of it meanwhile."""
    contents: list[Content] = [(row["sop_instance_uid"], bytes(row["digest"])) for row in rows]
    mine = and_(outbox.c.sop_instance_uid == bindparam("b_uid"), outbox.c.digest == bindparam("b_digest"))
    connection.execute(
        update(outbox).where(mine).values(hidden=hidden),
        [{"b_uid": uid, "b_digest": digest} for uid, digest in contents],
    )


def _tombstone(row: Any, hidden: int = 0, kept: int = 0) -> Tombstone:
    removal = Removal(
        row.removal_id, Level(row.level), row.uid, row.study_instance_uid, row.code, row.decided_by,
        row.reason, row.at_us, row.ward,
    )  # fmt: skip
    values = row._mapping
    return Tombstone(
        removal, row.restored_us, row.restored_by, row.purged_us, row.purged_by, row.purged_ward,
        _in_force(values), _purged(values), hidden, kept,
    )  # fmt: skip
