"""The region as a source: the regional archive, read here, and what single wards still hold, through the
hub.

The order matters (`federation/fanout.py` says why): first the wards, then the region's index. A hub that
does not answer is no error: the ledger has what each ward said last, and the coverage says as of when the
answer is complete.

Reading promotes: `federation/promoting.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

from archive.archive import Archive
from archive.errors import MissError
from archive.index.removed import Tombstone
from archive.ledger import Ledger
from archive.model import ConflictRow, Level, Match, PatientKey, Query, StoredInstance
from certs.authority import clock_us
from federation.coverage import (
    WardCoverage,
    WardStatus,
    status_of,
)
from federation.fanout import UID_AT, Held, WardMatches, listing, merge, series_of, studies_of, uids_of
from federation.gathering import Found
from federation.node_source import conflicts_for, person_in, removals_for
from federation.policy import Act, Principal, narrowed, require
from federation.promoting import PROMOTE_DEADLINE_S, Promoting
from federation.source import Answer, Listing, WardsPart, WardsSaid
from federation.standing import Standing, Standings

log = logging.getLogger(__name__)

ASK_DEADLINE_S = 2.0
LOOKS_MAX = 3  # at what the region holds, before and after its rows are read
UIDS_IN_A_KEY_MAX = 200  # of one list of UIDs in a query


class RegionSource:
    """A `Source` over the regional archive, the ledger, and the wards through the hub."""

    def __init__(
        self,
        archive: Archive,
        ledger: Ledger,
        hub: WardsPart,
        *,
        clock: Callable[[], int] = clock_us,
        ask_deadline_s: float = ASK_DEADLINE_S,
        promote_deadline_s: float = PROMOTE_DEADLINE_S,
    ) -> None:
        self._archive = archive
        self._ledger = ledger
        self._hub = hub
        self._clock = clock
        self._standings = Standings(ledger, clock)
        self._ask_deadline_s = ask_deadline_s
        self._promoting = Promoting(archive, ledger, hub, clock, promote_deadline_s)

    def search(self, principal: Principal, query: Query) -> Answer:
        query = self._allowed(principal, query)
        return self._joined(query, self._ask_wards(principal, query))

    def listing(self, principal: Principal, query: Query, most: int) -> Listing:
        query = self._allowed(principal, query)
        asked = self._ask_wards(principal, query)
        answer = self._joined(query, asked)
        if not answer.more and not query.offset:
            return Listing(answer)
        rows = self._archive.listed(replace(query, limit=most + 1, offset=0))
        uids = listing(query.level, rows, asked.matches)
        return Listing(answer, tuple(uids[:most]), len(rows) <= most and len(uids) <= most)

    def _allowed(self, principal: Principal, query: Query) -> Query:
        scope = narrowed(query.scope, require(principal, Act.SEARCH))
        return replace(query, scope=scope, pending_only=False)

    def _joined(self, query: Query, asked: WardsSaid) -> Answer:
        """The page of what the region and the wards have."""
        uids, series = uids_of(asked.matches), series_of(asked.matches)
        held = self._held(query, uids, series, asked.matches)
        for _ in range(LOOKS_MAX):
            rows = self._rows(query, asked.matches)
            before, held = held, self._held(query, uids, series, asked.matches)
            if held == before:  # nothing of it arrived while the rows were read: they fit each other
                break
        page = merge(
            query.level, rows, asked.matches, held,
            limit=query.limit, offset=query.offset, after=query.after,
        )  # fmt: skip
        return Answer(page.matches, asked.coverage, page.more)

    def instances(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found:
        return self._promoting.instances(principal, study_uid, series_uid, sop_instance_uid)

    def at_hand(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found | None:
        return self._promoting.at_hand(principal, study_uid, series_uid, sop_instance_uid)

    def arrived(self, instance: StoredInstance) -> StoredInstance:
        return self._promoting.arrived(instance)

    def passing(self, principal: Principal, instance: StoredInstance) -> Iterator[bytes]:
        return self._promoting.passing(principal, instance)

    def open_payload(self, instance: StoredInstance) -> BinaryIO:
        return self._promoting.open_payload(instance)

    def coverage(self) -> list[WardCoverage]:
        return [one.coverage for one in self.statuses()]

    def statuses(self) -> list[WardStatus]:
        """Each ward as the ledger knows it, for those who keep the region running."""
        now_us, states = self._clock(), self._ledger.ward_states()
        return [status_of(ward, states.get(ward.id), now_us) for ward in self._ledger.wards()]

    def conflicts(self, principal: Principal, limit: int) -> list[ConflictRow]:
        return conflicts_for(self._archive, principal, limit)

    def removals(self, principal: Principal, limit: int) -> list[Tombstone]:
        return removals_for(self._archive, principal, limit)

    def person_of(self, principal: Principal, study_uid: str) -> PatientKey | None:
        query = Query(Level.STUDY, (("StudyInstanceUID", study_uid),), limit=1)
        matches = self.search(principal, query).matches
        return person_in(matches[0].issuer, matches[0].patient.get("PatientID", "")) if matches else None

    # The wards' part.

    def _ask_wards(self, principal: Principal, query: Query) -> WardsSaid:
        """Asks the hub when a ward in the scope has something pending; else the ledger says all there is to
        say.
        """
        standing = self._standings.now()
        if not standing.is_worth_searching(query.scope):
            return WardsSaid(coverage=standing.coverage(query.scope))
        asked_level = Level.STUDY if query.level is Level.PATIENT else query.level
        question = replace(query, level=asked_level, limit=None, offset=0, after=None)
        try:
            said = self._hub.search(principal, question, self._ask_deadline_s)
        except MissError as error:
            log.warning("the hub does not answer a search: %s", error)
            return WardsSaid(coverage=_without_hub(standing).coverage(query.scope))
        return WardsSaid(said.matches, [one for one in said.coverage if query.scope.allows(one.ward)])

    # The region's part.

    def _rows(self, query: Query, wards: Sequence[WardMatches]) -> list[Match]:
        """The region's first rows, as far as the page reaches, and its rows of what the wards list."""
        reach = None if query.limit is None else query.offset + query.limit + 1
        rows = self._archive.search(replace(query, limit=reach, offset=0))
        if query.level is Level.PATIENT:
            return rows + self._patients(query, wards, rows) if reach is not None else rows
        keyword, listed = _listed(query.level, wards)
        missing = sorted(listed - {_uid(query.level, row) for row in rows})
        for cut in _cuts(missing):
            keys = ((keyword, "\\".join(cut)),)
            rows += self._archive.search(replace(query, keys=keys, limit=None, offset=0, after=None))
        return rows

    def _patients(self, query: Query, wards: Sequence[WardMatches], rows: Sequence[Match]) -> list[Match]:
        """The region's rows of patients whom the wards list, beyond those that were read."""
        listed = _people(match for answer in wards for match in answer.matches) - _people(rows)
        if query.person is not None:
            listed &= query.person
        if not listed:
            return []
        return self._archive.search(replace(query, keys=(), person=listed, limit=None, offset=0))

    def _held(
        self, query: Query, uids: frozenset[str], series: frozenset[str], wards: Sequence[WardMatches]
    ) -> Held:
        """Which of what the wards list the region has, within the scope and the person of the question."""

        def here(level: Level, keyword: str, wanted: frozenset[str]) -> frozenset[str]:
            found: set[str] = set()
            for cut in _cuts(sorted(wanted)):
                question = Query(level, ((keyword, "\\".join(cut)),), scope=query.scope, person=query.person)
                found.update(str(row[UID_AT[level]]) for row in self._archive.listed(question))
            return frozenset(found)

        if not uids:
            return Held()
        return Held(
            here(Level.IMAGE, "SOPInstanceUID", uids),
            here(Level.SERIES, "SeriesInstanceUID", series),
            here(Level.STUDY, "StudyInstanceUID", studies_of(wards)),
        )


def _without_hub(standing: Standing) -> Standing:
    """The hub is away, and so is every ward for as long: none is more than as of its last report."""
    away = {ward: replace(state, attached=False) for ward, state in standing.states.items()}
    return Standing(standing.wards, away, standing.now_us)


def _listed(level: Level, wards: Sequence[WardMatches]) -> tuple[str, set[str]]:
    keyword = {
        Level.STUDY: "StudyInstanceUID", Level.SERIES: "SeriesInstanceUID", Level.IMAGE: "SOPInstanceUID",
    }[level]  # fmt: skip
    return keyword, {_uid(level, match) for answer in wards for match in answer.matches}


def _uid(level: Level, match: Match) -> str:
    if level is Level.STUDY:
        return match.study["StudyInstanceUID"]
    if level is Level.SERIES:
        return match.series["SeriesInstanceUID"]
    return match.instance["SOPInstanceUID"]


def _people(matches: Iterable[Match]) -> frozenset[PatientKey]:
    return frozenset(
        PatientKey(match.issuer, match.patient["PatientID"])
        for match in matches
        if match.patient.get("PatientID")
    )


def _cuts(uids: Sequence[str]) -> list[Sequence[str]]:
    return [uids[start : start + UIDS_IN_A_KEY_MAX] for start in range(0, len(uids), UIDS_IN_A_KEY_MAX)]
