"""A node's end of facts that travel: it tells the region what its own people decided, and takes what the
region knows that concerns it. Rides on the line, in the uplink's event loop; what touches the archive runs in
a thread of its own.

Nothing is kept here but places in logs. How far the region was told is the region's word, asked at each
attach; how far this node was told lies in its index, after the facts. So whatever is cut off, restarted or
put back from a backup, what was missed is told again, and what is told again changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import grpc.aio

from archive.archive import Archive
from archive.backoff import Backoff
from archive.corrections import facts_of
from archive.index.travel import TRAVELLING, Cursor, sum_of
from archive.model import Fact
from federation import serde_facts
from federation.abilities import FACTS
from federation.calls import raise_if_ours, say, until
from federation.facts_pages import Page, keep_cursor, pages, take
from federation.line import Line, LinePart
from protos import facts_pb2, uplink_pb2
from protos.facts_pb2_grpc import FactsStub

if TYPE_CHECKING:
    from protos.facts_pb2_grpc import FactsAsyncStub  # a type of the stubs alone

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

REGION = "facts:region"
CALL_S = 60.0
LOOK_S = 600.0  # also when nobody said that there is anything
PAUSE_FIRST_S = 0.5
PAUSE_MAX_S = 60.0
MOVED_BYTES = 1 << 20  # of the log that holds nothing to tell: then the region is told of the place alone

OnRefused = Callable[[Fact, str], None]


class FactsExchange(LinePart):
    """See the module's docstring. `on_refused` lets the ward's people know what the region does not take, and
    why; it may write to a disk."""

    def __init__(
        self, archive: Archive, ward: str, on_refused: OnRefused = lambda fact, reason: None
    ) -> None:
        self._archive = archive
        self._ward = ward
        self._on_refused = on_refused
        self._line: Line | None = None
        self._told: Cursor | None = None  # how far the region was told; None: it is asked
        self._compare = True
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._backoff = Backoff(PAUSE_FIRST_S, PAUSE_MAX_S)

    def line_up(self, line: Line) -> None:
        self._line = line if FACTS in line.abilities else None
        self._told, self._compare = None, True
        self._wake.set()

    def line_down(self) -> None:
        self._line = None

    def come(self, come: uplink_pb2.Come) -> None:
        if come.facts:
            self._wake.set()

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._wake.set()
        self._pool = ThreadPoolExecutor(1, "facts")
        unwatch = self._archive.watch_facts(self._hear)
        try:
            await self._exchange_for_ever()
        finally:
            unwatch()
            self._loop = None
            pool, self._pool = self._pool, None
            await asyncio.to_thread(pool.shutdown, wait=True, cancel_futures=True)

    def _hear(self, facts: Sequence[Fact]) -> None:
        """In the thread that recorded them: a decision of this ward's people is told at once."""
        loop = self._loop
        if loop is not None and any(fact.kind in TRAVELLING and fact.ward == self._ward for fact in facts):
            with contextlib.suppress(RuntimeError):  # the loop has ended: it is told when there is another
                loop.call_soon_threadsafe(self._wake.set)

    async def _exchange_for_ever(self) -> None:
        failures = 0
        while True:
            await until(self._wake, LOOK_S)
            self._wake.clear()
            if (line := self._line) is None:
                continue
            stub: FactsAsyncStub = FactsStub(line.channel)
            try:
                await self._tell(stub, line)
                await self._ask(stub, line)
                failures = 0
            except (Exception, asyncio.CancelledError) as error:
                raise_if_ours(error)
                if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    log.info("the hub takes no facts: %s", error.details())
                    continue
                say("facts can't be exchanged now", error)
                self._told = None
                failures += 1
                await asyncio.sleep(self._backoff.pause_s(failures))
                self._wake.set()

    # What this ward decided.

    async def _tell(self, stub: FactsAsyncStub, line: Line) -> None:
        """Tells the region what it was not told yet, a page at a time."""
        epoch = self._archive.epoch
        if self._told is None:
            reply = await stub.Tell(facts_pb2.TellFacts(log=epoch), timeout=CALL_S)
            known = serde_facts.cursor_from(reply.cursor) if reply.HasField("cursor") else Cursor()
            self._told = known if self._line is line else None
        if self._told is None:
            return
        told = pages(self._archive, self._told, self._own)
        while (page := await self._in_pool(_next, told)) is not None:
            if not page.facts and not self._is_worth_telling(page):
                break
            request = facts_pb2.TellFacts(log=epoch, facts=map(serde_facts.fact_to, page.facts))
            if page.cursor is not None:
                request.to.CopyFrom(serde_facts.cursor_to(page.cursor))
            reply = await stub.Tell(request, timeout=CALL_S)
            for refused in reply.refused:
                if 0 <= refused.index < len(page.facts):
                    fact, reason = page.facts[refused.index], refused.reason[:500]
                    log.warning("the region does not take what was decided about %s: %s",
                                fact.sop_instance_uid, reason)  # fmt: skip
                    await self._in_pool(self._on_refused, fact, reason)
            if page.cursor is not None:
                self._told = page.cursor

    def _own(self, facts: Sequence[Fact]) -> list[Fact]:
        return [fact for fact in facts if fact.ward == self._ward]

    def _is_worth_telling(self, page: Page) -> bool:
        """Whether the place alone is: else the next start would read all of it again."""
        if page.cursor is None or self._told is None:
            return False
        before, now = self._told.position, page.cursor.position
        if before.file != now.file or now.offset - before.offset >= MOVED_BYTES:
            return True
        self._told = page.cursor  # not told, and not read again while this runs
        return False

    # What the region knows.

    async def _ask(self, stub: FactsAsyncStub, line: Line) -> None:
        """Takes what the region tells from where it was heard last."""
        cursor = await self._in_pool(self._archive.index.travel.cursor, REGION)
        request = facts_pb2.NextFacts(own=not cursor.whole, compare=self._compare)
        if cursor.log or cursor.seal:
            request.cursor.CopyFrom(serde_facts.cursor_to(cursor))
        if self._compare:
            request.corrections = await self._in_pool(self._sum)
        whole, over = cursor.whole, False
        async for message in stub.Next(request, timeout=CALL_S * 10):
            facts = [serde_facts.fact_from(fact) for fact in message.facts]
            whole, over = whole or message.last, message.last
            to = serde_facts.cursor_from(message.cursor) if message.HasField("cursor") else None
            await self._in_pool(self._take, facts, to, whole)
        if over and self._line is line:
            self._compare = False

    def _take(self, facts: Sequence[Fact], to: Cursor | None, whole: bool) -> None:
        if taken := take(self._archive, facts):
            log.info("%d decisions were taken from the region", taken)
        if to is not None and (facts or to != self._archive.index.travel.cursor(REGION)):
            keep_cursor(self._archive, REGION, to, whole=whole)

    def _sum(self) -> bytes:
        """Of what this node knows of corrections that others decided."""
        self._archive.wait_indexed()
        known = self._archive.index.travel.all_corrections()
        return sum_of(fact for one in known for fact in facts_of(one) if fact.ward != self._ward)

    async def _in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        assert self._pool is not None
        work: Awaitable[T] = asyncio.get_running_loop().run_in_executor(
            self._pool, lambda: function(*args, **kwargs)
        )
        return await work


def _next(told: Iterator[Page]) -> Page | None:
    return next(told, None)
