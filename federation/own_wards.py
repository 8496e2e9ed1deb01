"""The wards' part of an answer as the hub itself asks for it, for a reader whose answer is put together at
the hub (`window_service.py`): by a thread beside the loop in which wards are asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from archive.errors import Unavailable
from archive.ledger import Ledger
from archive.model import Query, Scope, StoredInstance, Ward
from federation import serde
from federation.asking import WardAsking
from federation.assertion import Assertion
from federation.bringing import Bringing
from federation.fanout import WardMatches
from federation.gathering import Coming
from federation.policy import Act, Principal, require
from federation.source import WardsSaid

T = TypeVar("T")

HUB_WAIT_S = 5.0  # for the hub's own loop, beyond the wards' deadline


class OwnWards:
    """The wards' part of an answer as the hub itself asks for it, from a thread beside its loop: a
    `WardsPart`. `besides` is a ward that reads its own archive and is not asked to push."""

    def __init__(
        self,
        asking: WardAsking,
        bringing: Bringing,
        ledger: Ledger,
        assertion: Assertion,
        besides: str,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._asking = asking
        self._bringing = bringing
        self._ledger = ledger
        self._assertion = assertion
        self._besides = besides
        self._loop = loop

    def search(self, principal: Principal, query: Query, deadline_s: float) -> WardsSaid:
        wards = self._ledger.wards()
        question = replace(query, pending_only=True, limit=None, offset=0)
        assertion = serde.assertion_to(self._assertion)
        asking = self._wait(self._asking.search(wards, question, assertion, deadline_s), deadline_s)
        return WardsSaid(
            [WardMatches(ward, tuple(matches)) for ward, matches in asking.matches.items()],
            self._asking.coverage(wards, asking.asked),
        )

    def gather(
        self, principal: Principal, study_uid: str, sop_instance_uid: str | None, deadline_s: float
    ) -> Coming:
        """What is listed comes because the wards were asked: whoever fetches it waits for it."""
        wards = self._ledger.wards()
        scope = _without(require(principal, Act.READ), self._besides, wards)
        assertion = serde.assertion_to(self._assertion)
        listing = self._wait(
            self._bringing.listing(wards, scope, study_uid, sop_instance_uid or "", assertion, deadline_s),
            deadline_s,
        )
        coverage = self._asking.coverage(wards, listing.asked)
        return Coming(listing.held, complete=listing.complete, coverage=coverage)

    def passing(self, principal: Principal, instance: StoredInstance) -> Iterator[bytes]:
        raise NotImplementedError("a window fetches what it was given")

    def _wait(self, work: Coroutine[Any, Any, T], deadline_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(deadline_s + HUB_WAIT_S)
        except TimeoutError:
            future.cancel()
            raise Unavailable("the hub did not ask its wards in time") from None


def _without(scope: Scope, ward: str, wards: Sequence[Ward]) -> Scope:
    allowed = frozenset(one.id for one in wards) if scope.wards is None else scope.wards
    return Scope(allowed - {ward})
