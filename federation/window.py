"""A node's window on the region: what its devices that only speak DIMSE may see of other wards, and the bytes
of this ward's own that were evicted. Called by the threads of services; it asks the hub (`window.proto`) in
the name of one device, and signs for it (`federation/assertion.py`).

A region that is away is not waited for: it holds nobody up whose images are here. A search then says in its
coverage that the region is missing; what was to be listed or fetched raises Unavailable.

What is fetched lies in an unlinked file of the node's state until it is closed, within a budget of bytes, and
counts only after its digest was checked here, too. Bounds: questions and fetches at once, each with a
deadline; the next one waits for its turn.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from archive.errors import MissError, OutOfResources, Unavailable
from archive.ledger import AuditRow
from archive.model import Location, Match, Query, StoredInstance
from certs.credentials import channel_sync
from certs.identity import Identity
from federation import serde
from federation.assertion import sign
from federation.coverage import CoverageState, WardCoverage
from federation.hub_channel import DRAIN_S, errors_restored
from federation.policy import Principal, Reach, reach_named
from federation.serde_facts import corrections_from
from federation.settings import WindowSettings
from federation.source import Answer
from federation.spooling import Spool, Spools
from federation.uplink import Uplink
from monitoring import tracing
from protos import common_pb2, window_pb2
from protos.window_pb2_grpc import WindowStub

log = logging.getLogger(__name__)

SEARCH_S_MAX = 15.0        # the wards' deadline at the hub, its own work, and a thin line
INSTANCES_S_MAX = 90.0     # reading promotes: what only another ward holds is brought to the region first
FETCH_S_MIN = 30.0
BYTES_PER_S_MIN = 64 << 10  # of one fetch: slower is a line that hangs
TURN_WAIT_S = 60.0
QUESTIONS_AT_ONCE = 6      # below what the hub takes of one ward
FETCHES_AT_ONCE = 6
FETCH_TRIES = 3            # of one instance, when the line breaks in between
RETRY_S = 0.5
MATCHES_MAX = 100_001      # of one search
SUBJECT_CHARS_MAX = 2_000
AWAY = "the region does not answer"


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a device, on its way: its signed assertion and the calls it may make."""

    stub: WindowStub
    assertion: common_pb2.Assertion


class RegionWindow:
    """See the module's docstring. `uplink` says where the hub is, who this node is, and whether it is worth
    calling; `audit` writes into the node's own log what was asked, before it is."""

    def __init__(
        self,
        uplink: Uplink,
        folder: Path,
        settings: WindowSettings,
        *,
        free_bytes: Callable[[], int],
        free_bytes_min: int = 0,
        audit: Callable[[AuditRow], None] | None = None,
    ) -> None:
        self._uplink = uplink
        self._audit = audit
        self._spools = Spools(
            folder, settings.spool_bytes_max, free_bytes=free_bytes, free_bytes_min=free_bytes_min
        )
        self.kept: Callable[[StoredInstance, Spool], None] | None = None
        self._line = _Line()
        self._questions = threading.BoundedSemaphore(QUESTIONS_AT_ONCE)
        self._fetches = threading.BoundedSemaphore(FETCHES_AT_ONCE)
        self._known: list[WardCoverage] | None = None

    def close(self) -> None:
        """End the channel; what is under way fails."""
        self._line.close()

    @property
    def spooled_bytes(self) -> int:
        """What lies in files that somebody has open."""
        return self._spools.taken_bytes

    def clock_us(self) -> int:
        """The hub's time: coverage is in it."""
        return self._uplink.hub_clock_us()

    def search(self, principal: Principal, query: Query) -> Answer:
        """The region's matches, other wards' pending ones included, and what they cover. The caller adds what
        this node holds (`federation/fanout.py`, with_own), so this ward counts as answered. A region that is
        away raises nothing: the coverage says so. OutOfResources when there is more than one answer holds.
        """
        limit = min(query.limit or MATCHES_MAX, MATCHES_MAX)
        asked = replace(query, limit=limit, offset=0)
        criteria = {"level": query.level.value} | {keyword: value for keyword, value in query.keys if value}
        correlation = self._audited(principal, "search", criteria)
        try:
            with self._question(principal, self._questions, correlation) as question:
                request = window_pb2.WindowSearchRequest(
                    query=serde.query_to(asked), assertion=question.assertion
                )
                with errors_restored():
                    answer = _answer(
                        question.stub.Search(request, timeout=SEARCH_S_MAX, metadata=tracing.metadata())
                    )
        except MissError as error:
            log.warning("the region does not answer a device's search: %s", error)
            return Answer([], self._without_region())
        matches, coverage, reach = answer
        if len(matches) == limit == MATCHES_MAX:
            raise OutOfResources("the region has too many matches: ask more narrowly")
        if reach is not principal.reach:
            log.warning("the region does not let the devices of this ward look beyond it "
                        "(hub.devices_see_region)")
        coverage = [self._answered(one) if one.ward == self._ward else one for one in coverage]
        self._known = coverage
        return Answer(matches, coverage)

    def instances(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Sequence[StoredInstance]:
        """What the region has of it, and what other wards held alone a moment ago: `evicted`, as their bytes
        are not here, and located nowhere. Raises NotFound when there is nothing that the device may see,
        Unavailable when that can't be said."""
        keywords = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        named = zip(keywords, (study_uid, series_uid, sop_instance_uid), strict=True)
        correlation = self._audited(principal, "retrieve", {keyword: uid for keyword, uid in named if uid})
        with self._question(principal, self._questions, correlation) as question:
            request = window_pb2.WindowInstancesRequest(
                study_uid=study_uid,
                series_uid=series_uid or "",
                sop_instance_uid=sop_instance_uid or "",
                assertion=question.assertion,
            )
            with errors_restored():
                pages = question.stub.Instances(
                    request, timeout=INSTANCES_S_MAX, metadata=tracing.metadata()
                )
                return [_instance(one) for page in pages for one in page.instances]

    def fetch(self, principal: Principal, instance: StoredInstance) -> Spool:
        """The data set in an open file, whole and verified, at its beginning; close it. Raises NotFound when
        the region has no such content, Unavailable, Corrupt when its bytes are not what their digest says,
        OutOfResources when there is no room for it."""
        spool = self.begin(instance)
        try:
            self.fill(principal, instance, spool)
            spool.checked()
        except BaseException:
            spool.close()
            raise
        return spool

    def begin(self, instance: StoredInstance) -> Spool:
        """The file that `fill` is to fill, to be read meanwhile; close it. Waits for nothing; OutOfResources
        when there is no room for it."""
        return self._spools.make(instance.location.length - instance.location.dataset_offset)

    def fill(self, principal: Principal, instance: StoredInstance, spool: Spool) -> None:
        """Fetches the data set; raises nothing, the reader of the file hears what went wrong. A line that
        breaks in between is tried again from the byte where it broke."""
        try:
            for tries_left in reversed(range(FETCH_TRIES)):
                try:
                    self._fill(principal, instance, spool)
                    break
                except (Unavailable, OutOfResources):
                    if not tries_left or spool.abandoned or not spool.received:
                        raise
                    time.sleep(RETRY_S)
            spool.end(instance.digest)
        except MissError as error:
            spool.fail(error)
        except Exception:
            log.exception("a fetch failed")
            spool.fail(MissError("an unexpected error"))
        else:
            self._keep(instance, spool)

    def _fill(self, principal: Principal, instance: StoredInstance, spool: Spool) -> None:
        with self._question(principal, self._fetches) as question:
            request = window_pb2.WindowFetchRequest(
                study_uid=instance.study_uid,
                series_uid=instance.series_uid,
                sop_instance_uid=instance.head.sop_instance_uid,
                digest=instance.digest,
                assertion=question.assertion,
                start=spool.received,
            )
            with errors_restored():
                timeout_s = FETCH_S_MIN + spool.size / BYTES_PER_S_MIN
                call = question.stub.Fetch(request, timeout=timeout_s, metadata=tracing.metadata())
                try:
                    skip: int | None = None
                    for chunk in call:
                        if skip is None:
                            skip = spool.received - chunk.start  # all of it, of a hub of an earlier release
                        data = chunk.dataset[skip:] if skip else chunk.dataset
                        skip -= len(chunk.dataset) - len(data)
                        spool.take(data)
                finally:
                    call.cancel()

    def _keep(self, instance: StoredInstance, spool: Spool) -> None:
        """What was given up here, and is here again, verified, may be kept."""
        if self.kept is None or not instance.location.pack or spool.abandoned:
            return
        try:
            self.kept(instance, spool)
        except Exception as error:
            log.warning("what was fetched is not kept again: %s", type(error).__name__)

    # Asking.

    @property
    def _ward(self) -> str:
        return self._uplink.identity.ward

    @contextmanager
    def _question(
        self, principal: Principal, turns: threading.BoundedSemaphore, correlation: str = ""
    ) -> Iterator[Question]:
        """A turn, and what is needed to ask; Unavailable at once when the region is away."""
        standing = self._uplink.status()
        if not standing.attached:
            raise Unavailable(AWAY)
        if not turns.acquire(timeout=TURN_WAIT_S):
            raise OutOfResources("too many devices look into the region at once")
        try:
            identity = self._uplink.identity
            assertion = sign(
                principal, identity, self.clock_us(), correlation=correlation or _correlation()
            )
            yield Question(self._line.stub(identity, standing.hub), serde.assertion_to(assertion))
        finally:
            turns.release()

    def _audited(self, principal: Principal, act: str, subject: Mapping[str, str]) -> str:
        """The question's correlation id, once this node's own log has it. Unavailable when it can't be
        written: then nothing is asked."""
        correlation = _correlation()
        if self._audit is None:
            return correlation
        row = AuditRow(
            at_us=self.clock_us(),
            who=principal.user,
            role=principal.role.value,
            ward=self._ward,
            act=act,
            subject=json.dumps(subject, ensure_ascii=True)[:SUBJECT_CHARS_MAX],
            outcome="ok",
            correlation=correlation,
        )
        try:
            self._audit(row)
        except MissError:
            raise
        except Exception as error:
            raise Unavailable("the audit log can't be written: the region is not asked") from error
        return correlation

    # Coverage.

    def _without_region(self) -> list[WardCoverage]:
        """Nothing of any other ward is in an answer that the region had no part in."""
        if self._known is None:
            return [WardCoverage("", "", "the region", CoverageState.UNKNOWN, reason=AWAY)]
        return [
            self._answered(one)
            if one.ward == self._ward
            else replace(one, state=CoverageState.INCOMPLETE, reason=AWAY)
            for one in self._known
        ]

    def _answered(self, own: WardCoverage) -> WardCoverage:
        now_us = self.clock_us()
        return replace(
            own, state=CoverageState.ANSWERED, complete_to_us=now_us, seen_at_us=now_us, reason=""
        )


class _Line:
    """The channel to the hub, made when it is first needed and anew with a renewed certificate or another
    hub."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str, str] | None = None
        self._channel: grpc.Channel | None = None
        self._stub: WindowStub | None = None

    def stub(self, identity: Identity, address: str) -> WindowStub:
        key = (identity.generation, address)
        with self._lock:
            if self._stub is not None and self._key == key:
                return self._stub
            older, self._channel = self._channel, channel_sync(identity, address)
            self._key, self._stub = key, WindowStub(self._channel)
            stub = self._stub
        if older is not None:
            timer = threading.Timer(DRAIN_S, older.close)
            timer.daemon = True
            timer.start()
        return stub

    def close(self) -> None:
        with self._lock:
            channel, self._channel, self._stub, self._key = self._channel, None, None, None
        if channel is not None:
            channel.close()


def _correlation() -> str:
    """The trace's id, so that logs, spans and audit logs know a question by one name."""
    return tracing.trace_id() or secrets.token_hex(8)


def _answer(
    pages: Iterator[window_pb2.WindowSearchPage],
) -> tuple[list[Match], list[WardCoverage], Reach]:
    matches: list[Match] = []
    for page in pages:
        matches += map(serde.match_from, page.matches)
        if page.last:
            return matches, [serde.coverage_from(one) for one in page.coverage], reach_named(page.reach)
    raise Unavailable("the region's answer ended early")


def _instance(message: window_pb2.WindowInstance) -> StoredInstance:
    return StoredInstance(
        study_uid=message.study_uid,
        series_uid=message.series_uid,
        head=serde.head_from(message.head, ward=message.head.ward),
        digest=serde.digest_from(message.digest),
        location=Location("", 0, message.size, 0),
        instance=serde.fields_from(message.instance),
        evicted=True,
        corrections=corrections_from(message),
    )
