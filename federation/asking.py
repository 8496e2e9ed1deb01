"""How the hub asks wards what they still hold alone; that it comes here is `bringing.py`. Wards are asked all
at once, each with the same deadline, and only those that are attached and have something pending or set
aside; one that did not answer lately is waited for less (`federation/leash.py`). Lives in the hub's event
loop; it decides nothing about who may ask: its callers have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from archive.errors import MissError, OutOfResources, Unavailable
from archive.ledger import WardState
from archive.model import Match, Query, Scope, Ward
from federation import serde
from federation.attachments import Ask, Attachment, Attachments
from federation.coverage import Asked, WardCoverage, coverage_of, is_worth_asking, is_worth_searching
from federation.leash import Leash
from federation.pools import Pools
from federation.settings import HubSettings
from monitoring.tracing import traceparent
from protos import common_pb2, uplink_pb2

TRUNCATED = "it listed only 1,000 of the pending instances that match"


@dataclass(slots=True)
class Asking:
    """What came of asking the wards: how each did, and the matches of those that answered."""

    asked: dict[str, Asked] = field(default_factory=dict)
    matches: dict[str, list[Match]] = field(default_factory=dict)


class WardAsking:
    """The wards, as those whom the hub may ask."""

    def __init__(
        self,
        settings: HubSettings,
        attachments: Attachments,
        pools: Pools,
    ) -> None:
        self._settings = settings
        self._attachments = attachments
        self._pools = pools
        self._leashes: dict[str, tuple[Attachment, Leash]] = {}
        self._probes: set[asyncio.Task[Ask]] = set()

    def coverage(self, wards: Sequence[Ward], asked: Mapping[str, Asked]) -> list[WardCoverage]:
        """What an answer covers of each ward, by what it said last and how asking it went."""
        now_us, states = self._pools.clock(), self._attachments.states
        return [coverage_of(ward, states.get(ward.id), now_us, asked.get(ward.id)) for ward in wards]

    async def search(
        self, wards: list[Ward], query: Query, assertion: common_pb2.Assertion, deadline_s: float
    ) -> Asking:
        """What the wards in the query's scope hold alone of what matches."""
        asking = Asking()
        most_s = self._settings.ask_deadline_s
        wait_s = min(deadline_s or most_s, most_s)
        message, trace = serde.query_to(query), traceparent()

        async def one(ward: str) -> None:
            def ask(ask_id: str) -> uplink_pb2.HubMessage:
                return uplink_pb2.HubMessage(
                    search=uplink_pb2.SearchAsk(
                        ask_id=ask_id,
                        query=message,
                        assertion=assertion,
                        deadline_s=wait_s,
                        traceparent=trace,
                    )
                )

            try:
                answer = await self.ask(ward, ask, wait_s)
            except MissError as error:
                asking.asked[ward] = Asked(str(error) or "it did not answer")
                return
            asking.matches[ward] = list(answer.matches)
            asking.asked[ward] = Asked(TRUNCATED if answer.truncated else "")

        await _all(one(ward.id) for ward in self._worth(wards, query.scope, is_worth_searching))
        return asking

    async def ask(
        self, ward: str, message: Callable[[str], uplink_pb2.HubMessage], deadline_s: float
    ) -> Ask:
        """Asks one ward, and waits as long as its leash is."""
        leash = self._leash(ward)
        waits_s = leash.wait_s(deadline_s)
        stays = leash.is_short and not leash.probing
        # What does not stay open ends with the wait below: its own deadline is behind that.
        open_s = deadline_s if stays else deadline_s + 1.0
        task = asyncio.create_task(self._attachments.ask(ward, message, open_s))
        try:
            done, _ = await asyncio.wait((task,), timeout=waits_s)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if done:
            return _heard(task, leash)
        before = "; nor did it answer before" if leash.is_short else ""
        leash.missed()
        if stays:
            leash.probing = True
            self._probes.add(task)
            task.add_done_callback(lambda ended: self._probed(ended, leash))
        else:
            task.cancel()
        raise Unavailable(f"no answer within {waits_s:g} s{before}")

    def _leash(self, ward: str) -> Leash:
        """That of the ward's attachment; a new one begins anew."""
        attachment = self._attachments.attached(ward)
        if attachment is None:
            self._leashes.pop(ward, None)
            return Leash()
        known, leash = self._leashes.get(ward, (None, Leash()))
        if known is not attachment:
            leash = Leash()
            self._leashes[ward] = attachment, leash
        return leash

    def _probed(self, task: asyncio.Task[Ask], leash: Leash) -> None:
        self._probes.discard(task)
        leash.probing = False
        if not task.cancelled() and task.exception() is None:
            leash.answered()

    def worth_asking(self, wards: Sequence[Ward], scope: Scope) -> list[Ward]:
        """Those in the scope that are attached and hold something alone that is to come here."""
        return self._worth(wards, scope, is_worth_asking)

    def _worth(
        self, wards: Sequence[Ward], scope: Scope, is_worth: Callable[[WardState | None, int], bool]
    ) -> list[Ward]:
        now_us, states = self._pools.clock(), self._attachments.states
        return [
            ward
            for ward in wards
            if scope.allows(ward.id)
            and self._attachments.attached(ward.id) is not None
            and is_worth(states.get(ward.id), now_us)
        ]


def _heard(task: asyncio.Task[Ask], leash: Leash) -> Ask:
    """What came of a question in time. That too many are open at the ward is no word of its own."""
    try:
        answer = task.result()
    except OutOfResources:
        raise
    except MissError:
        leash.answered()
        raise
    leash.answered()
    return answer


async def _all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs them at once, and ends all of them when who asked has left."""
    async with asyncio.TaskGroup() as group:
        for coroutine in coroutines:
            group.create_task(coroutine)
