"""One node alone as a source: what a ward's own portal asks, also when the WAN is down. It asks nobody else,
so it says that it covers this ward and nothing of the region. What the node gave up of a study that is read,
the node itself brings back from the region, if it has a line there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import BinaryIO

from archive.archive import Archive
from archive.errors import Evicted, NotFound
from archive.index.removed import Tombstone
from archive.model import ConflictRow, Level, PatientKey, Query, Scope, StoredInstance, Ward
from certs.authority import clock_us
from federation.bringing_orders import NodeReader
from federation.coverage import CoverageState, WardCoverage
from federation.fanout import listing
from federation.gathering import Found
from federation.policy import Act, Principal, decide, narrowed, require
from federation.source import Answer, Listing

CONFLICTS_LOOKED_AT = 1_000
CHUNK_BYTES = 1 << 20


class NodeSource:
    """A `Source` over the archive of one ward's node, opened to read."""

    def __init__(
        self,
        archive: Archive,
        ward: Ward,
        *,
        clock: Callable[[], int] = clock_us,
        reader: NodeReader | None = None,
    ) -> None:
        """`reader` has the node bring back what was given up there and is read."""
        self._archive = archive
        self._ward = ward
        self._clock = clock
        self._reader = reader

    def search(self, principal: Principal, query: Query) -> Answer:
        asked = replace(query, scope=narrowed(query.scope, self._scope(principal, Act.SEARCH)))
        if query.limit is None:
            return Answer(self._archive.search(asked), self.coverage())
        matches = self._archive.search(replace(asked, limit=query.limit + 1))
        return Answer(matches[: query.limit], self.coverage(), len(matches) > query.limit)

    def listing(self, principal: Principal, query: Query, most: int) -> Listing:
        answer = self.search(principal, query)
        if not answer.more and not query.offset:
            return Listing(answer)
        scope = narrowed(query.scope, self._scope(principal, Act.SEARCH))
        rows = self._archive.listed(replace(query, scope=scope, limit=most + 1, offset=0))
        return Listing(answer, tuple(listing(query.level, rows, ())[:most]), len(rows) <= most)

    def instances(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found:
        found = self._found(principal, study_uid, series_uid, sop_instance_uid)
        gone = [one for one in found if one.evicted]
        if self._reader is None or not gone:
            return Found(found)
        try:
            self._reader.bring(gone)
        except Evicted:
            if len(gone) == len(found):
                raise
        return Found(self._found(principal, study_uid, series_uid, sop_instance_uid))

    def _found(
        self, principal: Principal, study_uid: str, series_uid: str | None, sop_instance_uid: str | None
    ) -> list[StoredInstance]:
        scope = self._scope(principal, Act.READ)
        found = self._archive.instances(study_uid, series_uid, sop_instance_uid, scope=scope)
        if not found:
            raise NotFound("no such study, series or instance")
        if self._reader is not None:
            self._reader.read(study_uid)
        return found

    def at_hand(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found | None:
        found = self._found(principal, study_uid, series_uid, sop_instance_uid)
        is_here = self._reader is None or not any(one.evicted for one in found)
        return Found(found) if is_here else None

    def arrived(self, instance: StoredInstance) -> StoredInstance:
        return instance

    def passing(self, principal: Principal, instance: StoredInstance) -> Iterator[bytes]:
        with self.open_payload(instance) as payload:
            while chunk := payload.read(CHUNK_BYTES):
                yield chunk

    def open_payload(self, instance: StoredInstance) -> BinaryIO:
        return self._archive.open_instance(instance)

    def coverage(self) -> list[WardCoverage]:
        summary = self._archive.index.pending_summary()
        now_us = self._clock()
        return [
            WardCoverage(
                ward=self._ward.id,
                hospital=self._ward.hospital,
                name=self._ward.name,
                state=CoverageState.ANSWERED,
                complete_to_us=now_us,
                pending=summary.count - summary.set_aside,
                set_aside=summary.set_aside,
                seen_at_us=now_us,
            )
        ]

    def conflicts(self, principal: Principal, limit: int) -> list[ConflictRow]:
        return conflicts_for(self._archive, principal, limit)

    def removals(self, principal: Principal, limit: int) -> list[Tombstone]:
        return removals_for(self._archive, principal, limit)

    def person_of(self, principal: Principal, study_uid: str) -> PatientKey | None:
        query = Query(Level.STUDY, (("StudyInstanceUID", study_uid),), limit=1)
        matches = self.search(principal, query).matches
        return person_in(matches[0].issuer, matches[0].patient.get("PatientID", "")) if matches else None

    def _scope(self, principal: Principal, act: Act) -> Scope:
        return narrowed(require(principal, act), Scope(frozenset({self._ward.id})))


def conflicts_for(archive: Archive, principal: Principal, limit: int) -> list[ConflictRow]:
    """The undecided conflicts of an archive that a principal is shown; every ward's to those who keep the
    region running."""
    if decide(principal, Act.HEALTH).allowed:
        return archive.index.conflicts(limit)
    found = decide(principal, Act.SEARCH)
    rows = archive.index.conflicts(CONFLICTS_LOOKED_AT)
    return [row for row in rows if found.scope.allows(row.ward)][:limit]


def removals_for(archive: Archive, principal: Principal, limit: int) -> list[Tombstone]:
    """What was removed, for those who keep the region running."""
    return archive.index.removals(limit) if decide(principal, Act.HEALTH).allowed else []


def person_in(issuer: str, patient_id: str) -> PatientKey | None:
    """The patient of a row; nobody when there is no Patient ID, which names no one."""
    return PatientKey(issuer, patient_id) if patient_id else None
