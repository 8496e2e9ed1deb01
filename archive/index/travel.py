"""What the index keeps of facts that travel between a ward and the region: which are known here, so that one
that is told again is not recorded again, and how far each teller has told. A rebuilt index knows the first
and not the second: it is told all once more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, exists, insert, select

from archive.corrections import Correction
from archive.database import Database
from archive.index.corrected import correction_row, of_studies
from archive.index.schema import (
    correction,
    fact_cursor,
    holding,
    instance,
    known_fact,
    removed,
    series,
    series_ward,
    tombstone,
)
from archive.index.statements import by_uid
from archive.model import START, Fact, FactKind, Position

TRAVELLING = frozenset({FactKind.REMOVED, FactKind.RESTORED, FactKind.PURGED, FactKind.CORRECTED})


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a teller's fact log is known here. `log` names that log's disk; `seal` is of what stands just
    below `position` there, so that a log that was put back is noticed. `whole` says that its end was reached
    at some time."""

    log: bytes = b""
    position: Position = START
    seal: bytes = b""
    whole: bool = False


def key_of(fact: Fact) -> bytes:
    """What makes a fact that travels the same at both ends."""
    parts = (fact.kind.value, fact.sop_instance_uid, fact.ward, str(fact.at_us), fact.detail)
    text = "\0".join(parts).encode("utf-8", "backslashreplace")
    return hashlib.blake2b(text + fact.digest, digest_size=16).digest()


def sum_of(facts: Iterable[Fact]) -> bytes:
    """Stands for these facts, whatever their order."""
    total = 0
    for fact in facts:
        total ^= int.from_bytes(key_of(fact), "big")
    return total.to_bytes(16, "big")


def note_known(connection: Connection, facts: Sequence[Fact]) -> None:
    """These facts are recorded here."""
    keys = {key_of(fact): fact.kind.value for fact in facts if fact.kind in TRAVELLING}
    if not keys:
        return
    fresh = keys.keys() - known(connection, keys)
    if fresh:
        connection.execute(insert(known_fact), [{"key": key, "kind": keys[key]} for key in sorted(fresh)])


def known(connection: Connection, keys: Iterable[bytes]) -> set[bytes]:
    """Those of these that are recorded here."""
    rows = by_uid(connection, select(known_fact.c.key), known_fact.c.key, set(keys))
    return {bytes(row.key) for row in rows}


def cursor(connection: Connection, teller: str) -> Cursor:
    row = connection.execute(select(fact_cursor).where(fact_cursor.c.teller == teller)).fetchone()
    if row is None:
        return Cursor()
    return Cursor(bytes(row.log), Position(row.file, row.place), bytes(row.seal), bool(row.whole))


def keep_cursor(connection: Connection, teller: str, to: Cursor) -> None:
    connection.execute(delete(fact_cursor).where(fact_cursor.c.teller == teller))
    connection.execute(insert(fact_cursor).values(
        teller=teller, log=to.log, file=to.position.file, place=to.position.offset, seal=to.seal,
        whole=to.whole,
    ))  # fmt: skip


def holders(connection: Connection, study_uids: Iterable[str]) -> dict[str, set[str]]:
    """The wards that hold a part of each of these studies; those not here are left out."""
    found: dict[str, set[str]] = {}
    query = select(series_ward.c.study_instance_uid, series_ward.c.ward).distinct()
    for uid, ward in by_uid(connection, query, series_ward.c.study_instance_uid, set(study_uids)):
        found.setdefault(uid, set()).add(ward)
    return found


def known_at(connection: Connection, uid: str) -> set[str]:
    """The wards that hold what lies under a UID of a study, a series or an instance, shown or removed; none
    when nothing is known of it."""
    found: set[str] = set()
    for table in (instance, removed, holding):
        for below in _below(connection, table, uid):
            found.update(connection.execute(select(table.c.ward).distinct().where(below)).scalars())
    return found


def others_hold(connection: Connection, uid: str, ward: str) -> bool:
    """Whether something lies under a UID of any level, shown or removed, that this ward holds no copy of."""
    for table in (instance, removed):
        copied = exists().where(
            holding.c.sop_instance_uid == table.c.sop_instance_uid, holding.c.ward == ward
        )  # fmt: skip
        for below in _below(connection, table, uid):
            query = select(table.c.ward).where(below, table.c.ward != ward, ~copied).limit(1)
            if connection.execute(query).fetchone() is not None:
                return True
    return False


def _below(connection: Connection, table: Table, uid: str) -> list[ColumnElement[bool]]:
    """What finds the rows of a table under a UID of each level, by its keys: a series through its study."""
    studies = {
        study
        for held in (series, removed)
        for study in connection.execute(
            select(held.c.study_instance_uid).where(held.c.series_instance_uid == uid).distinct()
        ).scalars()
    }
    return [
        table.c.study_instance_uid == uid,
        table.c.sop_instance_uid == uid,
        and_(table.c.study_instance_uid.in_(sorted(studies)), table.c.series_instance_uid == uid),
    ]


def decided_at(connection: Connection, kind: FactKind, decision: str) -> str | None:
    """The ward that made the removal or the correction of exactly this id, "" for the region; None when that
    is not known."""
    if kind is FactKind.CORRECTED:
        query = select(correction.c.ward).where(correction.c.id == decision, correction.c.changes != "")
    else:
        query = select(tombstone.c.ward).where(tombstone.c.removal_id == decision, tombstone.c.level != "")
    row = connection.execute(query).fetchone()
    return None if row is None else str(row[0])


def corrected_among(connection: Connection, uids: Iterable[str]) -> set[str]:
    """The studies of these instances of which something is corrected."""
    query = select(instance.c.study_instance_uid).distinct().where(
        exists().where(correction.c.study_instance_uid == instance.c.study_instance_uid)
    )  # fmt: skip
    return {row[0] for row in by_uid(connection, query, instance.c.sop_instance_uid, set(uids))}


def corrections_at(connection: Connection, ward: str) -> list[Correction]:
    """The corrections of studies of which this ward holds a part, by their id."""
    query = select(correction.c.study_instance_uid).distinct().where(
        exists().where(
            series_ward.c.ward == ward, series_ward.c.study_instance_uid == correction.c.study_instance_uid
        )
    )  # fmt: skip
    studies = [row.study_instance_uid for row in connection.execute(query)]
    found = of_studies(connection, studies)
    return sorted((one for each in found.values() for one in each), key=lambda one: one.id)


def all_corrections(connection: Connection) -> list[Correction]:
    return [correction_row(row) for row in connection.execute(select(correction))]


class Travel:
    """The same of an index, for who moves facts. Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def unknown(self, facts: Sequence[Fact]) -> list[Fact]:
        """Those of these that are not recorded here, each once."""
        keys = {key_of(fact): fact for fact in facts}
        there = self._database.read(lambda connection: known(connection, keys))
        return [fact for key, fact in keys.items() if key not in there]

    def cursor(self, teller: str) -> Cursor:
        return self._database.read(lambda connection: cursor(connection, teller))

    def keep_cursor(self, teller: str, to: Cursor) -> None:
        self._database.write(lambda connection: keep_cursor(connection, teller, to))

    def holders(self, study_uids: Iterable[str]) -> dict[str, set[str]]:
        """The wards that hold a part of each of these studies; those not here are left out."""
        return self._database.read(lambda connection: holders(connection, study_uids))

    def known_at(self, uid: str) -> set[str]:
        """The wards that hold what lies under a UID of any level; none when nothing is known of it."""
        return self._database.read(lambda connection: known_at(connection, uid))

    def others_hold(self, uid: str, ward: str) -> bool:
        """Whether something lies under a UID of any level that this ward holds no copy of."""
        return self._database.read(lambda connection: others_hold(connection, uid, ward))

    def decided_at(self, kind: FactKind, decision: str) -> str | None:
        """The ward that made the removal or correction of exactly this id; None when it is not known."""
        return self._database.read(lambda connection: decided_at(connection, kind, decision))

    def has_corrections(self) -> bool:
        """Whether anything was ever corrected; microseconds on SQLite."""
        return self._database.quick("SELECT 1 FROM correction LIMIT 1") is not None

    def corrected_among(self, uids: Iterable[str]) -> set[str]:
        """The studies of these instances of which something is corrected."""
        return self._database.read(lambda connection: corrected_among(connection, uids))

    def corrections_at(self, ward: str) -> list[Correction]:
        """The corrections of the studies of which this ward holds a part."""
        return self._database.read(lambda connection: corrections_at(connection, ward))

    def corrections_of(self, study_uids: Iterable[str]) -> list[Correction]:
        """The corrections of these studies."""
        found = self._database.read(lambda connection: of_studies(connection, study_uids))
        return [one for each in found.values() for one in each]

    def all_corrections(self) -> list[Correction]:
        return self._database.read(all_corrections)
