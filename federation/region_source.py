"""The region as a source: the regional archive, read here, and what single wards still hold, through the
hub.

The order matters (`federation/fanout.py` says why): first the wards, then the region's index. A hub that
does not answer is no error: the ledger has what each ward said last, and the coverage says as of when the
answer is complete.

Reading promotes. Before instances of a study are given, the wards that are known to have a backlog are asked
to push what they hold of it. The reader waits for that as long as it comes, and then reads what is there;
what did not come in time is named by the coverage of the next search, and is not hidden by an error here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import BinaryIO

from archive.archive import Archive
from archive.errors import MissError, NotFound, Unavailable
from archive.ledger import Ledger, WardState
from archive.model import ConflictRow, Level, Match, PatientKey, Query, Scope, StoredInstance, Ward
from certs.authority import clock_us
from federation.coverage import (
    CoverageState,
    WardCoverage,
    WardStatus,
    coverage_of,
    is_worth_asking,
    status_of,
)
from federation.fanout import UID_AT, Held, WardMatches, listing, merge, series_of, studies_of, uids_of
from federation.node_source import conflicts_for, person_in
from federation.policy import Act, Principal, narrowed, require
from federation.source import Answer, Listing, WardsPart, WardsSaid

log = logging.getLogger(__name__)

ASK_DEADLINE_S = 2.0
PROMOTE_DEADLINE_S = 60.0
LOOKS_MAX = 3  # at what the region holds, before and after its rows are read
UIDS_IN_A_KEY_MAX = 200  # of one list of UIDs in a query
WHOLE_S = 2.0  # so long a study that was found whole is not asked for again
WHOLE_MAX = 1_000


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
        self._ask_deadline_s = ask_deadline_s
        self._promote_deadline_s = promote_deadline_s
        self._whole = _Recently()

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
    ) -> Sequence[StoredInstance]:
        found = self.at_hand(principal, study_uid, series_uid, sop_instance_uid)
        if found is not None:
            return found
        scope = require(principal, Act.READ)
        whole = self._promote(principal, study_uid, sop_instance_uid)
        found = self._archive.instances(study_uid, series_uid, sop_instance_uid, scope=scope)
        if not found and not whole:
            # The same for every UID, known or not: it says that nobody can tell.
            raise Unavailable("it is not in the region, and a ward that may have it does not answer now")
        if not found:
            raise NotFound("no such study, series or instance")
        return found

    def at_hand(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Sequence[StoredInstance] | None:
        scope = require(principal, Act.READ)
        # The wards before the region: what moves in between is seen.
        elsewhere = self._may_be_elsewhere(principal, scope, study_uid)
        found = self._archive.instances(study_uid, series_uid, sop_instance_uid, scope=scope)
        if found and sop_instance_uid is not None:
            return found  # an instance is whole or not here: nothing to wait for
        if elsewhere:
            return None
        if not found:
            raise NotFound("no such study, series or instance")
        return found

    def open_payload(self, instance: StoredInstance) -> BinaryIO:
        return self._archive.open_instance(instance)

    def coverage(self) -> list[WardCoverage]:
        return [one.coverage for one in self.statuses()]

    def statuses(self) -> list[WardStatus]:
        """Each ward as the ledger knows it, for those who keep the region running."""
        now_us, states = self._clock(), self._ledger.ward_states()
        return [status_of(ward, states.get(ward.id), now_us) for ward in self._ledger.wards()]

    def conflicts(self, principal: Principal, limit: int) -> list[ConflictRow]:
        return conflicts_for(self._archive, principal, limit)

    def person_of(self, principal: Principal, study_uid: str) -> PatientKey | None:
        query = Query(Level.STUDY, (("StudyInstanceUID", study_uid),), limit=1)
        matches = self.search(principal, query).matches
        return person_in(matches[0].issuer, matches[0].patient.get("PatientID", "")) if matches else None

    # The wards' part.

    def _ask_wards(self, principal: Principal, query: Query) -> WardsSaid:
        """Asks the hub when a ward in the scope has something pending; else the ledger says all there is to
        say.
        """
        states, wards = self._ledger.ward_states(), self._wards(query.scope)
        if not self._worth_asking(wards, states):
            return WardsSaid(coverage=self._from_ledger(wards, states))
        asked_level = Level.STUDY if query.level is Level.PATIENT else query.level
        question = replace(query, level=asked_level, limit=None, offset=0, after=None)
        try:
            said = self._hub.search(principal, question, self._ask_deadline_s)
        except MissError as error:
            log.warning("the hub does not answer a search: %s", error)
            return WardsSaid(coverage=self._without_hub(wards, states))
        return WardsSaid(said.matches, [one for one in said.coverage if query.scope.allows(one.ward)])

    def _wards(self, scope: Scope) -> list[Ward]:
        return [ward for ward in self._ledger.wards() if scope.allows(ward.id)]

    def _worth_asking(self, wards: list[Ward], states: Mapping[str, WardState]) -> bool:
        now_us = self._clock()
        return any(is_worth_asking(states.get(ward.id), now_us) for ward in wards)

    def _from_ledger(self, wards: list[Ward], states: Mapping[str, WardState]) -> list[WardCoverage]:
        now_us = self._clock()
        return [coverage_of(ward, states.get(ward.id), now_us) for ward in wards]

    def _without_hub(self, wards: list[Ward], states: Mapping[str, WardState]) -> list[WardCoverage]:
        """The hub is away, and so is every ward for as long: none is more than as of its last report."""
        away = {ward: replace(state, attached=False) for ward, state in states.items()}
        return self._from_ledger(wards, away)

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

    # Reading promotes.

    def _may_be_elsewhere(self, principal: Principal, scope: Scope, study_uid: str) -> bool:
        """Whether a ward may hold something of the study that the region lacks."""
        states = self._ledger.ward_states()
        return self._worth_asking(self._wards(scope), states) and not self._whole.has(
            _whose(principal, study_uid)
        )

    def _promote(self, principal: Principal, study_uid: str, sop_instance_uid: str | None) -> bool:
        """Has the wards push what they hold of it; whether each of them answered in full."""
        try:
            said = self._hub.promote(
                principal, study_uid, sop_instance_uid, self._promote_deadline_s
            )
        except MissError as error:
            log.warning("the hub does not promote: %s", error)
            return False
        if said.complete and sop_instance_uid is None:
            self._whole.add(_whose(principal, study_uid))
        for one in said.coverage:
            if one.state is CoverageState.INCOMPLETE:
                log.info("a study is read while %s is incomplete: %s", one.ward, one.reason)
        return said.complete


class _Recently:
    """The studies that were found whole a moment ago: a viewer asks for the same one many times a second."""

    def __init__(self) -> None:
        self._at_s: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._at_s.pop(key, None)
            self._at_s[key] = time.monotonic()
            while len(self._at_s) > WHOLE_MAX:
                self._at_s.popitem(last=False)

    def has(self, key: tuple[str, str]) -> bool:
        with self._lock:
            return time.monotonic() - self._at_s.get(key, -WHOLE_S) < WHOLE_S


def _whose(principal: Principal, study_uid: str) -> tuple[str, str]:
    return principal.ward or "", study_uid


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
