"""Corrections in the index: kept by their id, and laid over what the instances of their study say, whenever
one comes in or is read again. So what is counted, grouped and searched is as corrected, for what is here and
for what arrives later; a study whose corrections changed is made anew from its instances."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from archive.corrections import (
    CORRECTIONS_PER_STUDY_MAX,
    Correction,
    Withdrawal,
    corrected,
    correction_of,
    joined,
    overlay_of,
)
from archive.database import Database, storable
from archive.errors import InvalidInput, NotFound
from archive.index.remaking import AttributeReader, remake
from archive.index.schema import correction, study
from archive.index.statements import Among, by_uid
from archive.model import Attributes, Fact, FactKind, IndexEntry, Overlay, Record, StoredInstance


class Overlays:
    """What is corrected of studies, as of one transaction; asked once for each study."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: dict[str, Overlay | None] = {}

    def load(self, study_uids: Iterable[str]) -> None:
        unknown = {uid for uid in study_uids if uid not in self._known}
        if unknown:
            found = of_studies(self._connection, unknown)
            self._known.update({uid: overlay_of(found.get(uid, ())) for uid in unknown})

    def of(self, study_uid: str) -> Overlay | None:
        self.load((study_uid,))
        return self._known[study_uid]

    def over(self, entries: Sequence[IndexEntry]) -> list[IndexEntry]:
        """The entries as corrected."""
        self.load(entry.attributes.study_uid for entry in entries)
        if not any(self._known.values()):
            return list(entries)
        return [
            replace(entry, attributes=corrected(entry.attributes, self._known[entry.attributes.study_uid]))
            for entry in entries
        ]

    def reader(self, read: AttributeReader) -> AttributeReader:
        """`read`, with what it reads as corrected."""

        def corrected_read(record: Record) -> Attributes | None:
            found = read(record)
            return None if found is None else corrected(found, self.of(found.study_uid))

        return corrected_read


def apply_corrections(connection: Connection, facts: Sequence[Fact], *, read: AttributeReader) -> None:
    """Bring corrections and their withdrawals in; a fact that is known changes nothing. `read` gives the
    attributes as they came."""
    told = [fact for fact in facts if fact.kind is FactKind.CORRECTED]
    if not told:
        return
    given: dict[str, Correction] = {}
    for fact in told:
        try:
            one = correction_of(fact)
        except InvalidInput:
            continue  # of a newer release; it stays in the fact log
        given[one.id] = joined(given[one.id], one) if one.id in given else one
    rows = by_uid(connection, select(correction), correction.c.id, given)
    known = {row.id: correction_row(row) for row in rows}
    changed: set[str] = set()
    for one in given.values():
        before = known.get(one.id)
        after = one if before is None else joined(before, one)
        if after == before or (before is not None and before.study_uid != one.study_uid):
            continue
        changed.add(after.study_uid)
        connection.execute(delete(correction).where(correction.c.id == after.id))
        connection.execute(insert(correction).values(_row(after)))
    here = by_uid(connection, select(study.c.study_instance_uid), study.c.study_instance_uid, changed)
    uids = [row.study_instance_uid for row in here]
    if uids:
        remake(connection, uids, Overlays(connection).reader(read))


_OF_STUDIES = Among(select(correction), correction.c.study_instance_uid)


def of_studies(connection: Connection, study_uids: Iterable[str]) -> dict[str, list[Correction]]:
    """The corrections of these studies, withdrawn ones too."""
    found: dict[str, list[Correction]] = {}
    for row in _OF_STUDIES.rows(connection, set(study_uids)):
        found.setdefault(row.study_instance_uid, []).append(correction_row(row))
    return found


def overlaid(connection: Connection, found: Sequence[StoredInstance]) -> Sequence[StoredInstance]:
    """Instances with what is corrected of their studies."""
    told = of_studies(connection, {one.study_uid for one in found})
    overlays = {uid: overlay_of(corrections) for uid, corrections in told.items()}
    if not any(overlays.values()):
        return found
    return [replace(one, corrections=overlays.get(one.study_uid)) for one in found]


def listed(connection: Connection, limit: int, study_uid: str | None = None) -> list[Correction]:
    """The newest corrections, of one study when it is named."""
    query = select(correction).where(correction.c.changes != "")
    if study_uid is not None:
        query = query.where(correction.c.study_instance_uid == study_uid)
    query = query.order_by(correction.c.at_us.desc(), correction.c.id.desc())
    return [correction_row(row) for row in connection.execute(query.limit(limit))]


def named(connection: Connection, start: str) -> list[Correction]:
    """The corrections whose id begins so; two are enough to say that it is not one."""
    query = select(correction).where(correction.c.id >= start, correction.c.id < start + "g",
                                     correction.c.changes != "")  # fmt: skip
    return [correction_row(row) for row in connection.execute(query.limit(2))]


def has_room(connection: Connection, study_uid: str) -> bool:
    """Whether one more may be made of this study."""
    query = select(correction.c.id).where(correction.c.study_instance_uid == study_uid)
    return len(connection.execute(query.limit(CORRECTIONS_PER_STUDY_MAX)).fetchall()) < (
        CORRECTIONS_PER_STUDY_MAX
    )


def correction_row(row: Any) -> Correction:
    changes = tuple(sorted(json.loads(row.changes).items())) if row.changes else ()
    undone = None
    if row.undone_us:
        undone = Withdrawal(row.undone_by, row.undone_reason, row.undone_us, row.undone_ward)
    return Correction(
        row.id, row.study_instance_uid, changes, row.by, row.reason, row.at_us, row.ward, undone
    )


def _row(one: Correction) -> dict[str, Any]:
    undone = one.undone or Withdrawal("", "", 0, "")
    changes = json.dumps(dict(one.changes), ensure_ascii=False, sort_keys=True) if one.changes else ""
    return {
        "id": one.id, "study_instance_uid": one.study_uid, "changes": storable(changes),
        "by": storable(one.by), "reason": storable(one.reason), "at_us": one.at_us, "ward": one.ward,
        "undone_by": storable(undone.by), "undone_reason": storable(undone.reason),
        "undone_us": undone.at_us, "undone_ward": undone.ward,
    }  # fmt: skip


class Corrections:
    """The corrections of an index, to read. Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def overlay(self, study_uid: str) -> Overlay | None:
        """What is corrected of a study; microseconds on SQLite where nothing is, as every retrieve asks."""
        if self._database.quick(_HAS, (study_uid,)) is None:
            return None
        return self._database.read(lambda connection: Overlays(connection).of(study_uid))

    def over(self, found: list[StoredInstance]) -> list[StoredInstance]:
        """Instances with what is corrected of their studies."""
        overlays = {uid: self.overlay(uid) for uid in {one.study_uid for one in found}}
        if not any(overlays.values()):
            return found
        return [replace(one, corrections=overlays[one.study_uid]) for one in found]

    def listed(self, limit: int = 100, *, study_uid: str | None = None) -> list[Correction]:
        """The newest, withdrawn ones too."""
        return self._database.read(lambda connection: listed(connection, limit, study_uid))

    def named(self, start: str) -> Correction:
        """The correction whose id begins so. Raises NotFound, InvalidInput when several do."""
        found = self._database.read(lambda connection: named(connection, start)) if start else []
        if not found:
            raise NotFound("no correction has an id that begins so")
        if len(found) > 1:
            raise InvalidInput("several corrections have an id that begins so: name more of it")
        return found[0]

    def has_room(self, study_uid: str) -> bool:
        """Whether one more may be made of this study."""
        return self._database.read(lambda connection: has_room(connection, study_uid))


_HAS = "SELECT 1 FROM correction WHERE study_instance_uid = ? LIMIT 1"
