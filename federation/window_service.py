"""The hub's side of a ward's window on the region (`window.proto`): its devices search everything that the
region lets them see and read what other wards hold.

Who asks is the node's assertion, which has to come from the very ward that calls; how far it may look is the
region's grant (`hub.devices_see_region`), looked up here for every question. Only then does the hub
countersign, so that the wards which are asked can see both hands (`federation/assertion.py`). What a device
may not see looks like what does not exist. Each question is in the audit log before its first byte leaves,
under the correlation id that its node gave it and that the wards which answer write, too.

Bounds: questions and fetches at once of one ward and of all; pages of about 256 KB; chunks of 1 MiB, each
read when the one before it was taken.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import (
    AsyncIterator,
    Callable,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

from archive.archive import Archive
from archive.errors import (
    InvalidQuery,
    MissError,
    NotAuthenticated,
    OutOfResources,
    Unavailable,
)
from archive.ledger import AuditRow, Ledger
from archive.model import Query, Scope, StoredInstance, require_uid
from certs import identity as identities
from certs.gate import peer
from certs.identity import Identity
from federation import serde, status
from federation.asking import WardAsking
from federation.assertion import Assertion, countersign, verify
from federation.bringing import Bringing, require_readable
from federation.own_wards import OwnWards
from federation.paging import pages_of
from federation.passing import Passing, Wanted
from federation.policy import Act, Principal, Reach, Role, granted, narrowed, reach_named, require
from federation.pools import Pools
from federation.region_source import RegionSource
from federation.serde_facts import put_corrections
from federation.settings import HubSettings
from monitoring.tracing import carried
from protos import common_pb2, window_pb2, window_pb2_grpc

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

MATCHES_MAX = 100_001  # of one search
SAME_ACT_US = 300 * 1_000_000  # fetches of one study are one act for as long
REMEMBERED_MAX = 20_000
SUBJECT_CHARS_MAX = 2_000


@dataclass(frozen=True, slots=True)
class Asker:
    """A device that asks through its node, as far as the region lets it look, and the assertion that says so
    to the wards. `asked` is the reach that its node gave it."""

    principal: Principal
    assertion: Assertion
    asked: Reach


class WindowService(window_pb2_grpc.WindowServicer):
    """Implements `miss.v1.Window`."""

    def __init__(
        self,
        settings: HubSettings,
        asking: WardAsking,
        bringing: Bringing,
        passing: Passing,
        archive: Archive,
        ledger: Ledger,
        identity: Identity,
        pools: Pools,
    ) -> None:
        self._settings = settings
        self._asking = asking
        self._bringing = bringing
        self._passing = passing
        self._archive = archive
        self._ledger = ledger
        self._identity = identity
        self._pools = pools
        # Questions wait for wards: in threads of their own, so that what they wait for is taken meanwhile.
        self._threads = ThreadPoolExecutor(settings.window_questions_max, "hub-window")
        self._questions: Counter[str] = Counter()
        self._fetches: Counter[str] = Counter()
        self._seen: OrderedDict[tuple[str, str, str], int] = OrderedDict()

    def stop(self) -> None:
        """No question is taken any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def Search(
        self, request: window_pb2.WindowSearchRequest, context: Any
    ) -> AsyncIterator[window_pb2.WindowSearchPage]:
        try:
            asker = await self._asker(request.assertion, context)
            query = self._query(request, asker)
            async with self._turn(self._questions, asker, self._settings.window_questions_max):
                await self._audit(asker, "search", _criteria(query))
                source = self._source(asker, besides="")
                answer = await self._in_thread(source.search, asker.principal, query)
        except Exception as error:
            await status.abort(context, error)
        for page in pages_of(map(serde.match_to, answer.matches)):
            yield window_pb2.WindowSearchPage(matches=page)
        yield window_pb2.WindowSearchPage(
            coverage=[serde.coverage_to(one) for one in answer.coverage],
            last=True,
            reach=asker.principal.reach.value,
        )

    async def Instances(
        self, request: window_pb2.WindowInstancesRequest, context: Any
    ) -> AsyncIterator[window_pb2.WindowInstancesPage]:
        try:
            asker = await self._asker(request.assertion, context)
            study, series, uid = request.study_uid, request.series_uid, request.sop_instance_uid
            _require_uids(study, series, uid)
            async with self._turn(self._questions, asker, self._settings.window_questions_max):
                await self._audit(asker, "retrieve", _of(study, series, uid))
                source = self._source(asker, besides=asker.principal.ward or "")
                found = await self._in_thread(
                    source.instances, asker.principal, study, series or None, uid or None
                )
        except Exception as error:
            await status.abort(context, error)
        self._remember(asker, study)
        for page in pages_of(map(_instance_to, found)):
            yield window_pb2.WindowInstancesPage(instances=page)

    async def Fetch(
        self, request: window_pb2.WindowFetchRequest, context: Any
    ) -> AsyncIterator[window_pb2.WindowChunk]:
        try:
            asker = await self._asker(request.assertion, context)
            _require_uids(request.study_uid, request.series_uid, request.sop_instance_uid)
            async with self._turn(self._fetches, asker, self._settings.window_fetches_max):
                scope = require(asker.principal, Act.READ)
                wanted = await self._wanted(request, scope)
                if not self._remembers(asker, request.study_uid):
                    await self._audit(asker, "retrieve", _of(request.study_uid))
                    self._remember(asker, request.study_uid)
                start = max(request.start, 0)
                async for chunk in self._passing.chunks(wanted, scope, start):
                    yield window_pb2.WindowChunk(dataset=chunk, start=start)
                    start = 0
        except Exception as error:
            await status.abort(context, error)

    # Who asks.

    async def _asker(self, message: common_pb2.Assertion, context: Any) -> Asker:
        """The device, by its own node's assertion, as far as the region lets it look."""
        caller, now_us = peer(context), self._pools.clock()
        assertion = replace(serde.assertion_from(message), countersignature=b"", counter_chain=())
        signed = await self._pools.work(
            verify, assertion, self._identity.roots_pem, caller.region, now_us
        )
        if signed.role is not Role.DEVICE or signed.ward != caller.ward:
            raise NotAuthenticated("a node asks for the devices of its own ward")
        if not assertion.correlation:
            raise NotAuthenticated("a device's question has a correlation id")
        asked = reach_named(assertion.reach)
        principal = granted(replace(signed, reach=asked), self._settings.devices_see_region)
        if principal.reach is Reach.REGION:
            hub = identities.latest(self._identity)
            assertion = await self._pools.work(countersign, assertion, hub)
        return Asker(principal, assertion, asked)

    def _query(self, request: window_pb2.WindowSearchRequest, asker: Asker) -> Query:
        query = serde.query_from(request.query)
        if not 0 < (query.limit or 0) <= MATCHES_MAX or query.offset:
            raise InvalidQuery(f"a window's search asks for its first 1 to {MATCHES_MAX:,} matches")
        scope = require(asker.principal, Act.SEARCH)
        return replace(query, scope=narrowed(query.scope, scope), pending_only=False)

    def _source(self, asker: Asker, *, besides: str) -> RegionSource:
        wards = OwnWards(
            self._asking, self._bringing, self._ledger, asker.assertion, besides, asyncio.get_running_loop(),
        )
        return RegionSource(
            self._archive,
            self._ledger,
            wards,
            clock=self._pools.clock,
            ask_deadline_s=self._settings.ask_deadline_s,
            promote_deadline_s=self._settings.promote_deadline_s,
        )

    # Reading.

    async def _wanted(self, request: window_pb2.WindowFetchRequest, scope: Scope) -> Wanted:
        """What is here, or what a ward has promised: that is passed on while it arrives."""
        digest = serde.digest_from(request.digest)
        wanted = Wanted(request.study_uid, request.series_uid, request.sop_instance_uid, digest)
        await require_readable(self._passing, self._bringing, self._pools, wanted, scope)
        return wanted

    # The audit log.

    async def _audit(self, asker: Asker, act: str, subject: Mapping[str, object]) -> None:
        """One row; Unavailable when it can't be written: then nothing is shown."""
        principal = asker.principal
        if asker.asked is not principal.reach:
            subject = {**subject, "reach": "the region does not let this ward's devices see it"}
        row = AuditRow(
            at_us=self._pools.clock(),
            who=principal.user,
            role=principal.role.value,
            ward=principal.ward or "",
            act=act,
            subject=json.dumps(subject, ensure_ascii=True)[:SUBJECT_CHARS_MAX],
            outcome="ok",
            correlation=asker.assertion.correlation,
        )
        try:
            await self._pools.ledger(self._ledger.audit, row)
        except MissError:
            raise
        except Exception as error:
            raise Unavailable("the audit log can't be written: nothing is shown") from error

    def _remembers(self, asker: Asker, study_uid: str) -> bool:
        at_us = self._seen.get(_act(asker, study_uid), 0)
        return at_us > self._pools.clock() - SAME_ACT_US

    def _remember(self, asker: Asker, study_uid: str) -> None:
        key = _act(asker, study_uid)
        self._seen[key] = self._pools.clock()
        self._seen.move_to_end(key)
        while len(self._seen) > REMEMBERED_MAX:
            self._seen.popitem(last=False)

    # Turns.

    @asynccontextmanager
    async def _turn(self, busy: Counter[str], asker: Asker, most: int) -> AsyncIterator[None]:
        """A place among those who ask at once; OutOfResources when there is none."""
        ward = asker.principal.ward or ""
        if busy.total() >= most or busy[ward] >= self._settings.window_per_ward_max:
            raise OutOfResources("too many of this ward's devices look into the region at once")
        busy[ward] += 1
        try:
            yield
        finally:
            busy[ward] -= 1
            if not busy[ward]:
                del busy[ward]

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs it, and keeps the turn until its thread has ended, also when who asked has left: else threads
        that still wait for wards would be more than turns."""
        loop = asyncio.get_running_loop()
        try:
            work = loop.run_in_executor(self._threads, carried(function, *args, **kwargs))
        except RuntimeError:
            raise Unavailable("the hub stops") from None
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait((work,))
            raise


def _instance_to(instance: StoredInstance) -> window_pb2.WindowInstance:
    location = instance.location
    message = window_pb2.WindowInstance(
        study_uid=instance.study_uid,
        series_uid=instance.series_uid,
        head=serde.head_to(instance.head),
        digest=instance.digest,
        size=location.length - location.dataset_offset,
        instance=serde.fields_to(instance.instance),
    )
    put_corrections(message, instance.corrections)
    return message


def _require_uids(study_uid: str, *below: str) -> None:
    require_uid(study_uid, "a Study Instance UID")
    for uid in filter(None, below):
        require_uid(uid, "a Series or SOP Instance UID")


def _criteria(query: Query) -> Mapping[str, object]:
    return {"level": query.level.value} | {keyword: value for keyword, value in query.keys if value}


def _of(study_uid: str, series_uid: str = "", sop_instance_uid: str = "") -> Mapping[str, object]:
    named = {
        "StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid, "SOPInstanceUID": sop_instance_uid,
    }  # fmt: skip
    return {keyword: uid for keyword, uid in named.items() if uid}


def _act(asker: Asker, study_uid: str) -> tuple[str, str, str]:
    return asker.principal.ward or "", asker.principal.user, study_uid
