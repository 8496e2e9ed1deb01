"""How the hub has wards push what they hold alone of a study that somebody reads: reading promotes. Wards are
asked all at once, and only those that are attached and have something pending.

A ward of this release lists, instance by instance, what comes: a reader is told at once, and reads each as it
arrives. Of one that does not list, the reader waits until all of it is here. A ward that does not answer in
time costs its deadline; one from which nothing comes any more is named and not waited for.

Lives in the hub's event loop; it decides nothing about who may ask: its callers have.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from archive.archive import Archive
from archive.errors import InvalidInput, MissError, NotFound, Unavailable
from archive.model import Scope, Ward
from federation.arrivals import Arrivals
from federation.asking import WardAsking
from federation.attachments import Ask, Attachments
from federation.coverage import Asked
from federation.gathering import Held
from federation.passing import Passing, Wanted
from federation.pools import Pools
from federation.settings import HubSettings
from monitoring.tracing import traceparent
from protos import common_pb2, uplink_pb2

ROUNDS_MAX = 1_000  # of 1,000 instances each, of a ward that does not list: no study is larger
TICK_S = 0.5        # between two looks at whether anything may still come
GONE_S = 5.0        # a ward that is away for as long is not waited for: its line may have flapped
TOLD_MAX = 1_000    # arrivals in one message
PROMISE_S = 3_600.0  # so long what a ward listed may be waited for
PROMISED_MAX = 100_000

_Key = tuple[str, str]  # a ward and a SOP Instance UID


@dataclass(slots=True)
class Listing:
    """What wards hold alone of a study, and how each of them answered."""

    held: list[Held] = field(default_factory=list)
    asked: dict[str, Asked] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not any(one.failure for one in self.asked.values())


class Bringing:
    """The wards, as those who bring what is read."""

    def __init__(
        self,
        settings: HubSettings,
        asking: WardAsking,
        attachments: Attachments,
        arrivals: Arrivals,
        archive: Archive,
        pools: Pools,
    ) -> None:
        self._settings = settings
        self._asking = asking
        self._attachments = attachments
        self._arrivals = arrivals
        self._archive = archive
        self._pools = pools
        # By ward, UID and digest: when it was listed last, of which study and series.
        self._promised: OrderedDict[tuple[str, str, bytes], tuple[float, str, str]] = OrderedDict()

    async def listing(
        self,
        wards: Sequence[Ward],
        scope: Scope,
        study_uid: str,
        sop_instance_uid: str,
        assertion: common_pb2.Assertion,
        deadline_s: float,
    ) -> Listing:
        """Has the wards in the scope push what they hold of a study (an empty `sop_instance_uid`) or of one
        instance, and says what that is. What wards hold that do not list it is here when this returns, or
        its deadline has passed."""
        most_s = self._settings.promote_deadline_s
        until_s = time.monotonic() + min(deadline_s or most_s, most_s)
        listing, trace = Listing(), traceparent()

        def ask(ask_id: str) -> uplink_pb2.HubMessage:
            return uplink_pb2.HubMessage(
                promote=uplink_pb2.PromoteAsk(
                    ask_id=ask_id,
                    study_uid=study_uid,
                    sop_instance_uid=sop_instance_uid,
                    assertion=assertion,
                    traceparent=trace,
                    listing=True,
                )
            )

        async def one(ward: str) -> None:
            try:
                left_out, held = await self._ask(ward, ask, until_s)
            except MissError as error:
                listing.asked[ward] = Asked(str(error) or "it did not answer")
                return
            listing.asked[ward] = Asked(left_out)
            listing.held += [each for each in held if each.instance.study_uid == study_uid]
            self._promise(listing.held)

        async with asyncio.TaskGroup() as group:
            for ward in self._asking.worth_asking(wards, scope):
                group.create_task(one(ward.id))
        return listing

    async def promote(
        self,
        wards: Sequence[Ward],
        scope: Scope,
        study_uid: str,
        sop_instance_uid: str,
        assertion: common_pb2.Assertion,
        deadline_s: float,
    ) -> dict[str, Asked]:
        """The same, and waits until all of it is here or the deadline has passed."""
        most_s = self._settings.promote_deadline_s
        wait_s = min(deadline_s or most_s, most_s)
        try:
            async with asyncio.timeout(wait_s):
                listing = await self.listing(wards, scope, study_uid, sop_instance_uid, assertion, deadline_s)
                asked = listing.asked
                try:
                    async for _ in self.arriving(listing.held):
                        pass
                except MissError as error:
                    asked |= {held.ward: Asked(str(error)) for held in listing.held}
        except TimeoutError:
            late = self._asking.worth_asking(wards, scope)
            return {ward.id: Asked("what it holds did not arrive in time") for ward in late}
        return asked

    def is_promised(self, wanted: Wanted, scope: Scope) -> bool:
        """Whether a ward in the scope listed this content of late, of this study and series, so that it is on
        its way."""
        oldest_s = time.monotonic() - PROMISE_S
        for ward in self._attachments.states:
            if scope.allows(ward) and (
                found := self._promised.get((ward, wanted.uid, wanted.digest))
            ):
                listed_s, study_uid, series_uid = found
                of_it = study_uid == wanted.study_uid and wanted.series_uid in ("", series_uid)
                if of_it and listed_s > oldest_s:
                    return True
        return False

    def _promise(self, held: Iterable[Held]) -> None:
        now_s = time.monotonic()
        for one in held:
            key = one.ward, one.instance.head.sop_instance_uid, one.instance.digest
            self._promised[key] = now_s, one.instance.study_uid, one.instance.series_uid
            self._promised.move_to_end(key)
        while len(self._promised) > PROMISED_MAX:
            self._promised.popitem(last=False)

    async def arriving(self, held: Sequence[Held]) -> AsyncIterator[Sequence[str]]:
        """The SOP Instance UIDs of these as they arrive. Unavailable when some do not: they were refused, or
        nothing came of a ward for as long as a reader waits."""
        came: asyncio.Queue[_Key] = asyncio.Queue()
        waiting: dict[_Key, asyncio.Future[None]] = {}

        def expect(key: _Key) -> None:
            waiting[key] = self._arrivals.expect(key[1])
            waiting[key].add_done_callback(lambda _: came.put_nowait(key))

        def over(keys: Iterable[_Key]) -> None:
            for key in keys:
                self._arrivals.forget(key[1], waiting.pop(key))

        refused = 0
        patience = _Patience(self._attachments, self._settings.promote_deadline_s)
        try:
            for one in held:
                expect((one.ward, one.instance.head.sop_instance_uid))
            look = list(waiting)
            while waiting:
                here = await self._pools.work(self._here, look)
                for key in look:
                    if key in here or not waiting[key].done():
                        continue
                    # It was refused, or came from another ward first, whose copy this reader may not see.
                    over([key])
                    if await self._pools.work(self._archive.index.lookup, key[1]) is not None:
                        expect(key)
                    else:
                        refused += 1
                over(here)
                for told in _cut(sorted({uid for _, uid in here}), TOLD_MAX):
                    patience.heard()
                    yield told
                if waiting:
                    look = await _next(came, patience.check, {ward for ward, _ in waiting})
                    look = [key for key in dict.fromkeys(look) if key in waiting]
            if refused:
                raise Unavailable(f"{refused:,} of its instances were refused")
        finally:
            over(list(waiting))

    async def _ask(
        self, ward: str, ask: Callable[[str], uplink_pb2.HubMessage], until_s: float
    ) -> tuple[str, list[Held]]:
        """What the ward lists, and in words what of it does not come."""
        for _ in range(ROUNDS_MAX):
            answer_s = min(self._settings.ask_deadline_s, until_s - time.monotonic())
            answer = await self._asking.ask(ward, ask, max(answer_s, 0.01))
            if answer.listed is not None:
                return _left_out(answer), [Held(ward, one) for one in answer.listed]
            uids = {uid for match in answer.matches for h in match.holdings for uid in h.sop_instance_uids}
            if uids:
                await self._arrive(ward, uids, until_s)
            if not uids or not answer.truncated:
                return "", []
        raise InvalidInput("a study past every bound")

    async def _arrive(self, ward: str, uids: set[str], until_s: float) -> None:
        expected = {uid: self._arrivals.expect(uid) for uid in uids}
        try:
            here = await self._pools.work(self._of_ward, ward, uids)
            late = [future for uid, future in expected.items() if uid not in here]
            if not late:
                return
            _, missing = await asyncio.wait(late, timeout=max(until_s - time.monotonic(), 0.01))
            if missing:
                raise Unavailable(f"{len(missing):,} of its instances did not arrive in time")
        finally:
            for uid, future in expected.items():
                self._arrivals.forget(uid, future)

    def _here(self, keys: Collection[_Key]) -> set[_Key]:
        wards = {ward for ward, _ in keys}
        return {
            (ward, uid) for ward in wards for uid in self._of_ward(ward, {u for w, u in keys if w == ward})
        }

    def _of_ward(self, ward: str, uids: Collection[str]) -> set[str]:
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


async def require_readable(
    passing: Passing, bringing: Bringing, pools: Pools, wanted: Wanted, scope: Scope
) -> None:
    """NotFound unless the instance is here or was promised: what is hidden looks like what does not exist,
    and what nobody promised is not waited for."""
    if bringing.is_promised(wanted, scope):
        return
    if await pools.work(passing.find, wanted, scope) is None:
        raise NotFound("no such instance, or none with this digest")


class _Patience:
    """How long something may still come."""

    def __init__(self, attachments: Attachments, idle_s: float) -> None:
        self._attachments = attachments
        self._idle_s = idle_s
        self._heard_s = time.monotonic()
        self._away_s: dict[str, float] = {}

    def heard(self) -> None:
        self._heard_s = time.monotonic()

    def check(self, wards: Iterable[str]) -> None:
        """Raises Unavailable when nothing of these wards is to be waited for."""
        now_s = time.monotonic()
        if now_s - self._heard_s > self._idle_s:
            raise Unavailable("nothing of it arrived for too long")
        for ward in wards:
            if self._attachments.attached(ward) is not None:
                self._away_s.pop(ward, None)
            elif now_s - self._away_s.setdefault(ward, now_s) > GONE_S:
                raise Unavailable("a ward that holds part of it went away")


async def _next(
    came: asyncio.Queue[_Key], check: Callable[[Iterable[str]], None], wards: Collection[str]
) -> list[_Key]:
    """What came since, at least one."""
    while True:
        try:
            async with asyncio.timeout(TICK_S):
                found = [await came.get()]
        except TimeoutError:
            check(wards)
            continue
        while not came.empty():
            found.append(came.get_nowait())
        return found


def _left_out(answer: Ask) -> str:
    if answer.truncated:
        return "it holds more of the study than it lists"
    if answer.left_out:
        return f"{answer.left_out:,} of its instances are set aside there"
    return ""


def _cut(uids: Sequence[str], most: int) -> list[Sequence[str]]:
    return [uids[start : start + most] for start in range(0, len(uids), most)]
