"""What portals ask of the hub: the wards' part of an answer, and that a study which only a ward holds comes
here.

The hub verifies who asks and decides again before it asks a ward; the ward does the same. Wards are asked
all at once, each with the same deadline, and only those that are attached and have something pending.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from archive.archive import Archive
from archive.errors import InvalidInput, InvalidQuery, MissError, Unavailable
from archive.ledger import Ledger
from archive.model import Level, Query, Scope, Ward, require_uid
from certs.credentials import MESSAGE_BYTES_MAX
from certs.gate import peer
from federation import serde, status
from federation.arrivals import Arrivals
from federation.assertion import verify
from federation.attachments import Attachments
from federation.coverage import Asked, WardCoverage, coverage_of, is_worth_asking, status_of
from federation.policy import Act, narrowed, require
from federation.pools import Pools
from federation.settings import HubSettings
from protos import common_pb2, region_pb2, region_pb2_grpc, uplink_pb2

log = logging.getLogger(__name__)

ROUNDS_MAX = 1_000  # of 1,000 instances each: no study is larger
REPLY_BYTES_MAX = MESSAGE_BYTES_MAX - (1 << 20)  # of matches in one reply; the rest is for the coverage
MATCH_OVERHEAD = 8  # the tag and the length of one in the message
TRUNCATED = "it listed only 1,000 of the pending instances that match"
TOO_MUCH = "what the wards hold back does not fit in one answer: search for less"


@dataclass(slots=True)
class Asking:
    """What came of asking the wards."""

    asked: dict[str, Asked] = field(default_factory=dict)
    matches: list[common_pb2.Match] = field(default_factory=list)
    size: int = 0

    def add(self, ward: str, matches: list[common_pb2.Match], truncated: bool) -> None:
        """A ward's answer, if the reply has room for all of it; the ward is incomplete otherwise: after an
        hour without the hub every ward has a backlog, and one message past the bound would be no answer.
        """
        size = sum(match.ByteSize() + MATCH_OVERHEAD for match in matches)
        if self.size + size > REPLY_BYTES_MAX:
            self.asked[ward] = Asked(TOO_MUCH)
            return
        self.size += size
        self.matches += matches
        self.asked[ward] = Asked(TRUNCATED if truncated else "")


class RegionService(region_pb2_grpc.RegionServicer):
    """Implements `miss.v1.Region`."""

    def __init__(
        self,
        settings: HubSettings,
        attachments: Attachments,
        arrivals: Arrivals,
        archive: Archive,
        ledger: Ledger,
        roots_pem: bytes,
        pools: Pools,
        version: str,
    ) -> None:
        self._settings = settings
        self._attachments = attachments
        self._arrivals = arrivals
        self._archive = archive
        self._ledger = ledger
        self._roots_pem = roots_pem
        self._pools = pools
        self._version = version

    async def Search(self, request: region_pb2.SearchRequest, context: Any) -> region_pb2.SearchReply:
        try:
            scope = await self._scope(request.assertion, Act.SEARCH, context)
            query = serde.query_from(request.query)
            if query.level is Level.PATIENT:
                raise InvalidQuery("wards are asked for studies, series or instances")
            query = replace(
                query, scope=narrowed(query.scope, scope), pending_only=True, limit=None, offset=0
            )
            wards = await self._pools.ledger(self._ledger.wards)
            asking = await self._search(wards, query, request)
        except Exception as error:
            await status.abort(context, error)
        return region_pb2.SearchReply(
            matches=asking.matches,
            coverage=[serde.coverage_to(one) for one in self._coverage(wards, asking.asked)],
        )

    async def Promote(self, request: region_pb2.PromoteRequest, context: Any) -> region_pb2.PromoteReply:
        try:
            scope = await self._scope(request.assertion, Act.READ, context)
            require_uid(request.study_uid, "a Study Instance UID")
            if request.sop_instance_uid:
                require_uid(request.sop_instance_uid, "a SOP Instance UID")
            wards = await self._pools.ledger(self._ledger.wards)
            asked = await self._promote(wards, scope, request)
        except Exception as error:
            await status.abort(context, error)
        return region_pb2.PromoteReply(
            complete=not any(one.failure for one in asked.values()),
            coverage=[serde.coverage_to(one) for one in self._coverage(wards, asked)],
        )

    async def Wards(self, request: region_pb2.WardsRequest, context: Any) -> region_pb2.WardsReply:
        try:
            wards = await self._pools.ledger(self._ledger.wards)
        except Exception as error:
            await status.abort(context, error)
        now_us, states = self._pools.clock(), self._attachments.states
        return region_pb2.WardsReply(
            wards=[serde.status_to(status_of(ward, states.get(ward.id), now_us)) for ward in wards],
            clock_us=now_us,
            version=self._version,
        )

    async def _scope(self, assertion: common_pb2.Assertion, act: Act, context: Any) -> Scope:
        """What the person who asks may see, by an assertion that holds."""
        now_us, region = self._pools.clock(), peer(context).region
        signed = serde.assertion_from(assertion)
        principal = await self._pools.work(verify, signed, self._roots_pem, region, now_us)
        return require(principal, act)

    def _worth_asking(self, wards: list[Ward], scope: Scope) -> list[Ward]:
        now_us, states = self._pools.clock(), self._attachments.states
        return [
            ward
            for ward in wards
            if scope.allows(ward.id)
            and self._attachments.attached(ward.id) is not None
            and is_worth_asking(states.get(ward.id), now_us)
        ]

    def _coverage(self, wards: list[Ward], asked: Mapping[str, Asked]) -> list[WardCoverage]:
        now_us, states = self._pools.clock(), self._attachments.states
        return [coverage_of(ward, states.get(ward.id), now_us, asked.get(ward.id)) for ward in wards]

    # Search.

    async def _search(self, wards: list[Ward], query: Query, request: region_pb2.SearchRequest) -> Asking:
        asking = Asking()
        deadline_s = min(request.deadline_s or self._settings.ask_deadline_s, self._settings.ask_deadline_s)
        message = serde.query_to(query)

        async def one(ward: str) -> None:
            def ask(ask_id: str) -> uplink_pb2.HubMessage:
                return uplink_pb2.HubMessage(
                    search=uplink_pb2.SearchAsk(
                        ask_id=ask_id, query=message, assertion=request.assertion, deadline_s=deadline_s
                    )
                )

            try:
                answer = await self._attachments.ask(ward, ask, deadline_s)
            except MissError as error:
                asking.asked[ward] = Asked(str(error) or "it did not answer")
                return
            asking.add(ward, [serde.match_to(match) for match in answer.matches], answer.truncated)

        await _all(one(ward.id) for ward in self._worth_asking(wards, query.scope))
        return asking

    # Promote.

    async def _promote(
        self, wards: list[Ward], scope: Scope, request: region_pb2.PromoteRequest
    ) -> dict[str, Asked]:
        most_s = self._settings.promote_deadline_s
        until_s = time.monotonic() + min(request.deadline_s or most_s, most_s)
        asked: dict[str, Asked] = {}

        async def one(ward: str) -> None:
            try:
                await self._fetch(ward, request, until_s)
                asked[ward] = Asked()
            except MissError as error:
                asked[ward] = Asked(str(error))

        await _all(one(ward.id) for ward in self._worth_asking(wards, scope))
        return asked

    async def _fetch(self, ward: str, request: region_pb2.PromoteRequest, until_s: float) -> None:
        """Has the ward push what it holds of the study, until it holds nothing more of it alone."""

        def ask(ask_id: str) -> uplink_pb2.HubMessage:
            return uplink_pb2.HubMessage(
                promote=uplink_pb2.PromoteAsk(
                    ask_id=ask_id,
                    study_uid=request.study_uid,
                    sop_instance_uid=request.sop_instance_uid,
                    assertion=request.assertion,
                )
            )

        for _ in range(ROUNDS_MAX):
            answer_s = min(self._settings.ask_deadline_s, until_s - time.monotonic())
            answer = await self._attachments.ask(ward, ask, max(answer_s, 0.01))
            uids = {uid for match in answer.matches for h in match.holdings for uid in h.sop_instance_uids}
            if not uids:
                return
            await self._arrive(ward, uids, until_s)
            if not answer.truncated:
                return
        raise InvalidInput("a study past every bound")

    async def _arrive(self, ward: str, uids: set[str], until_s: float) -> None:
        expected = {uid: self._arrivals.expect(uid) for uid in uids}
        try:
            here = await self._pools.work(self._here, ward, uids)
            late = [future for uid, future in expected.items() if uid not in here]
            if not late:
                return
            left_s = max(until_s - time.monotonic(), 0.01)
            _, missing = await asyncio.wait(late, timeout=left_s)
            if missing:
                raise Unavailable(f"{len(missing):,} of its instances did not arrive in time")
        finally:
            for uid, future in expected.items():
                self._arrivals.forget(uid, future)

    def _here(self, ward: str, uids: set[str]) -> set[str]:
        """Which of them the region has from this ward. The same instance of another ward is not enough: who
        may read this ward's alone does not see it until this ward's receipt says that it is here too.
        """
        index, own = self._archive.index, Scope(frozenset({ward}))

        def is_here(uid: str) -> bool:
            known = index.lookup(uid)
            return known is not None and bool(
                index.instances(known.study_uid, known.series_uid, uid, scope=own)
            )

        return {uid for uid in uids if is_here(uid)}


async def _all(coroutines: Any) -> None:
    """Runs them at once, and ends all of them when who asked has left."""
    async with asyncio.TaskGroup() as group:
        for coroutine in coroutines:
            group.create_task(coroutine)
