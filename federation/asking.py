"""How the hub asks wards: what they still hold alone, and that a study which only a ward holds comes here.
Wards are asked all at once, each with the same deadline, and only those that are attached and have something
pending; one that did not answer lately is waited for less (`federation/leash.py`). Lives in the hub's event
loop; it decides nothing about who may ask: its callers have.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from archive.archive import Archive
from archive.errors import InvalidInput, MissError, OutOfResources, Unavailable
from archive.model import Match, Query, Scope, Ward
from federation import serde
from federation.arrivals import Arrivals
from federation.attachments import Ask, Attachment, Attachments
from federation.coverage import Asked, WardCoverage, coverage_of, is_worth_asking
from federation.leash import Leash
from federation.pools import Pools
from federation.settings import HubSettings
from protos import common_pb2, uplink_pb2

ROUNDS_MAX = 1_000  # of 1,000 instances each: no study is larger
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
        arrivals: Arrivals,
        archive: Archive,
        pools: Pools,
    ) -> None:
        self._settings = settings
        self._attachments = attachments
        self._arrivals = arrivals
        self._archive = archive
        self._pools = pools
        self._leashes: dict[str, tuple[Attachment, Leash]] = {}
        self._probes: set[asyncio.Task[Ask]] = set()

    def coverage(self, wards: list[Ward], asked: Mapping[str, Asked]) -> list[WardCoverage]:
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
        message = serde.query_to(query)

        async def one(ward: str) -> None:
            def ask(ask_id: str) -> uplink_pb2.HubMessage:
                return uplink_pb2.HubMessage(
                    search=uplink_pb2.SearchAsk(
                        ask_id=ask_id, query=message, assertion=assertion, deadline_s=wait_s
                    )
                )

            try:
                answer = await self._ask(ward, ask, wait_s)
            except MissError as error:
                asking.asked[ward] = Asked(str(error) or "it did not answer")
                return
            asking.matches[ward] = list(answer.matches)
            asking.asked[ward] = Asked(TRUNCATED if answer.truncated else "")

        await _all(one(ward.id) for ward in self._worth_asking(wards, query.scope))
        return asking

    async def promote(
        self,
        wards: list[Ward],
        scope: Scope,
        study_uid: str,
        sop_instance_uid: str,
        assertion: common_pb2.Assertion,
        deadline_s: float,
    ) -> dict[str, Asked]:
        """Has the wards in the scope push what they hold of a study (an empty `sop_instance_uid`) or of one
        instance; returns when it is here or the deadline has passed."""
        most_s = self._settings.promote_deadline_s
        until_s = time.monotonic() + min(deadline_s or most_s, most_s)
        asked: dict[str, Asked] = {}

        def ask(ask_id: str) -> uplink_pb2.HubMessage:
            return uplink_pb2.HubMessage(
                promote=uplink_pb2.PromoteAsk(
                    ask_id=ask_id,
                    study_uid=study_uid,
                    sop_instance_uid=sop_instance_uid,
                    assertion=assertion,
                )
            )

        async def one(ward: str) -> None:
            try:
                await self._fetch(ward, ask, until_s)
                asked[ward] = Asked()
            except MissError as error:
                asked[ward] = Asked(str(error))

        await _all(one(ward.id) for ward in self._worth_asking(wards, scope))
        return asked

    async def _ask(
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

    def _worth_asking(self, wards: list[Ward], scope: Scope) -> list[Ward]:
        now_us, states = self._pools.clock(), self._attachments.states
        return [
            ward
            for ward in wards
            if scope.allows(ward.id)
            and self._attachments.attached(ward.id) is not None
            and is_worth_asking(states.get(ward.id), now_us)
        ]

    async def _fetch(
        self, ward: str, ask: Callable[[str], uplink_pb2.HubMessage], until_s: float
    ) -> None:
        """Has the ward push what it holds of the study, until it holds nothing more of it alone."""
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
