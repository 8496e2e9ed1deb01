"""What portals ask of the hub: the wards' part of an answer, and that a study which only a ward holds comes
here.

The hub verifies who asks and decides again before it asks a ward (`federation/asking.py`); the ward does the
same.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from archive.errors import InvalidQuery
from archive.ledger import Ledger
from archive.model import Level, Scope, Ward, require_uid
from certs.credentials import MESSAGE_BYTES_MAX
from certs.gate import peer
from federation import serde, status
from federation.asking import Asking, WardAsking
from federation.assertion import verify
from federation.attachments import Attachments
from federation.bringing import Bringing, require_readable
from federation.coverage import Asked, status_of
from federation.paging import pages_of
from federation.passing import Passing, Wanted
from federation.policy import Act, narrowed, require
from federation.pools import Pools
from federation.serde_gathering import coming_to
from protos import common_pb2, region_pb2, region_pb2_grpc

log = logging.getLogger(__name__)

REPLY_BYTES_MAX = MESSAGE_BYTES_MAX - (1 << 20)  # of matches in one reply; the rest is for the coverage
MATCH_OVERHEAD = 8  # the tag and the length of one in the message
TOO_MUCH = "what the wards hold back does not fit in one answer: search for less"


class RegionService(region_pb2_grpc.RegionServicer):
    """Implements `miss.v1.Region`."""

    def __init__(
        self,
        asking: WardAsking,
        bringing: Bringing,
        passing: Passing,
        attachments: Attachments,
        ledger: Ledger,
        roots_pem: bytes,
        pools: Pools,
        version: str,
    ) -> None:
        self._asking = asking
        self._bringing = bringing
        self._passing = passing
        self._attachments = attachments
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
                query,
                scope=narrowed(query.scope, scope),
                pending_only=True,
                limit=None,
                offset=0,
                after=None,
            )
            wards = await self._pools.ledger(self._ledger.wards)
            asking = await self._asking.search(wards, query, request.assertion, request.deadline_s)
        except Exception as error:
            await status.abort(context, error)
        matches = _fitting(asking)
        return region_pb2.SearchReply(
            matches=matches,
            coverage=[serde.coverage_to(one) for one in self._asking.coverage(wards, asking.asked)],
        )

    async def Promote(self, request: region_pb2.PromoteRequest, context: Any) -> region_pb2.PromoteReply:
        try:
            wards, scope = await self._to_promote(request, context)
            asked = await self._bringing.promote(
                wards,
                scope,
                request.study_uid,
                request.sop_instance_uid,
                request.assertion,
                request.deadline_s,
            )
        except Exception as error:
            await status.abort(context, error)
        return region_pb2.PromoteReply(
            complete=not any(one.failure for one in asked.values()),
            coverage=[serde.coverage_to(one) for one in self._asking.coverage(wards, asked)],
        )

    async def Gather(
        self, request: region_pb2.PromoteRequest, context: Any
    ) -> AsyncIterator[region_pb2.Gathered]:
        try:
            wards, scope = await self._to_promote(request, context)
            listing = await self._bringing.listing(
                wards,
                scope,
                request.study_uid,
                request.sop_instance_uid,
                request.assertion,
                request.deadline_s,
            )
        except Exception as error:
            await status.abort(context, error)
        for page in pages_of(map(coming_to, listing.held)):
            yield region_pb2.Gathered(coming=page)
        coverage = [serde.coverage_to(one) for one in self._asking.coverage(wards, listing.asked)]
        yield region_pb2.Gathered(listed=True, complete=listing.complete, coverage=coverage)
        try:
            async for uids in self._bringing.arriving(listing.held):
                yield region_pb2.Gathered(arrived=uids)
        except Exception as error:
            await status.abort(context, error)
        yield region_pb2.Gathered(over=True, complete=listing.complete)

    async def Fetch(
        self, request: region_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[region_pb2.FetchChunk]:
        try:
            scope = await self._scope(request.assertion, Act.READ, context)
            for uid in (request.study_uid, request.series_uid, request.sop_instance_uid):
                require_uid(uid, "a UID of an instance")
            wanted = Wanted(
                request.study_uid,
                request.series_uid,
                request.sop_instance_uid,
                serde.digest_from(request.digest),
            )
            await require_readable(self._passing, self._bringing, self._pools, wanted, scope)
            async for chunk in self._passing.chunks(wanted, scope):
                yield region_pb2.FetchChunk(dataset=chunk)
        except Exception as error:
            await status.abort(context, error)

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

    async def _to_promote(
        self, request: region_pb2.PromoteRequest, context: Any
    ) -> tuple[list[Ward], Scope]:
        """Every ward, and which of them may be asked for what is named."""
        scope = await self._scope(request.assertion, Act.READ, context)
        require_uid(request.study_uid, "a Study Instance UID")
        if request.sop_instance_uid:
            require_uid(request.sop_instance_uid, "a SOP Instance UID")
        return await self._pools.ledger(self._ledger.wards), scope

    async def _scope(self, assertion: common_pb2.Assertion, act: Act, context: Any) -> Scope:
        """What the person who asks may see, by an assertion that holds."""
        now_us, region = self._pools.clock(), peer(context).region
        signed = serde.assertion_from(assertion)
        principal = await self._pools.work(verify, signed, self._roots_pem, region, now_us)
        return require(principal, act)


def _fitting(asking: Asking) -> list[common_pb2.Match]:
    """The wards' matches, each ward's as far as the reply has room for all of them; the ward is incomplete
    otherwise: after an hour without the hub every ward has a backlog, and one message past the bound would be
    no answer."""
    fitting: list[common_pb2.Match] = []
    room = REPLY_BYTES_MAX
    for ward, found in asking.matches.items():
        matches = [serde.match_to(match) for match in found]
        size = sum(match.ByteSize() + MATCH_OVERHEAD for match in matches)
        if size > room:
            asking.asked[ward] = Asked(TOO_MUCH)
            continue
        room -= size
        fitting += matches
    return fitting
