"""The replicator on a real wire: does what `federation/replicator.py` says, over the line of the current
attach, and tells it what came of it. Offers go over the channel that the node is attached by, pushes over
channels of their own (`push_stream.py`): a search is answered while they fill the line. Lives in the uplink's
event loop; everything that touches the archive runs in its pool.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import grpc.aio

from archive.archive import Archive
from archive.errors import Unavailable
from federation import serde
from federation.budget import Bucket, Budget
from federation.calls import raise_if_ours, say, until
from federation.compression import Compression
from federation.flows import Flows
from federation.line import Line
from federation.packing import Packing
from federation.push_stream import Pushing, PushStream
from federation.push_wire import push_method
from federation.replicator import Idle, Offer, Record, Refill, Replicator, Step
from federation.settings import UplinkSettings
from federation.turns import Turns
from protos import uplink_pb2
from protos.uplink_pb2_grpc import UplinkStub

if TYPE_CHECKING:
    from protos.uplink_pb2_grpc import UplinkAsyncStub  # a type of the stubs alone

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

OFFER_TIMEOUT_S = 30.0


class Delivery:
    """Drives a replicator. `on_recorded` is called after facts were recorded, so that a report can follow;
    `open_channel` makes a channel to a hub, which is closed here."""

    def __init__(
        self,
        archive: Archive,
        replicator: Replicator,
        pool: Executor,
        clock: Callable[[], int],
        settings: UplinkSettings,
        *,
        on_recorded: Callable[[], None],
        open_channel: Callable[[str], grpc.aio.Channel],
    ) -> None:
        self._archive = archive
        self._replicator = replicator
        self._pool = pool
        self._on_recorded = on_recorded
        self._open_channel = open_channel
        self._line: Line | None = None
        self._channels: list[grpc.aio.Channel | None] = [None] * settings.channels
        self._control_changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        most = settings.push_streams
        # One of several is kept for what readers wait for: the others may be busy for long.
        ordinary = most - 1 if most > 1 else 1
        self._pushing = Pushing(
            replicator=replicator,
            packing=Packing(archive),
            pool=pool,
            clock=clock,
            turns=Turns(Bucket(Budget([entry.entry() for entry in settings.budget])), clock),
            flows=Flows(ordinary),
            compression=Compression(),
            method_of=self._method_of,
            changed=self.changed,
            zstd=settings.zstd,
        )
        self._pushes = [
            PushStream(number, self._pushing, urgent_only=number >= ordinary) for number in range(most)
        ]

    def line_up(self, line: Line) -> None:
        """The node is attached: offers go over this line, pushes to its hub."""
        self._close_channels()
        self._line = line
        self._pushing.abilities = line.abilities
        self._pushing.flows.begin()
        self._replicator.line_up()
        self.changed()

    def line_down(self) -> None:
        """The attach ended: nothing is offered until there is another."""
        self._line = None
        self._close_channels()
        self._replicator.line_down()
        self.changed()

    def woken(self, *, urgent: bool = False) -> None:
        """Something may have come into the outbox, or become urgent."""
        self._replicator.woken(urgent=urgent)
        self.changed()

    def changed(self) -> None:
        self._control_changed.set()
        for push in self._pushes:
            if push.may_run:  # a dozen that rest would each wake at every receipt
                push.changed.set()

    @property
    def drained(self) -> bool:
        """Whether the window holds nothing."""
        return self._replicator.known == 0

    @property
    def bytes_sent(self) -> int:
        """Bytes of data sets that were written until now."""
        return self._pushing.sent.data

    @property
    def wire_bytes(self) -> int:
        """What they took on the wire."""
        return self._pushing.sent.wire

    @property
    def held_bytes_max(self) -> int:
        """The most that its messages ever took of the memory."""
        return self._pushing.sent.held_max

    async def run(self) -> None:
        """Runs until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._control())
                for push in self._pushes:
                    group.create_task(push.run())
        finally:
            self._close_channels()
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _control(self) -> None:
        while True:
            self._control_changed.clear()
            now_s = time.monotonic()
            step = self._replicator.next(now_s)
            if isinstance(step, Idle):
                await until(self._control_changed, None if step.until_s is None else step.until_s - now_s)
                continue
            self._spawn(self._perform(step))

    def _spawn(self, act: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(act)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _method_of(self, stream: int) -> Callable[[], Any] | None:
        """Where this stream pushes to; its channel is opened when it is needed."""
        if self._line is None:
            return None
        place = stream % len(self._channels)
        found = self._channels[place]
        if found is None:
            found = self._channels[place] = self._open_channel(self._line.hub)
        return push_method(found)

    def _close_channels(self) -> None:
        """In the background: closing waits for the calls, which end by it."""
        for place, found in enumerate(self._channels):
            if found is not None:
                self._spawn(_close(found))
                self._channels[place] = None

    async def _perform(self, step: Step) -> None:
        if isinstance(step, Refill):
            await self._refill(step)
        elif isinstance(step, Offer):
            await self._offer(step)
        elif isinstance(step, Record):
            await self._record(step)
        self.changed()

    async def _refill(self, step: Refill) -> None:
        try:
            rows = await self._in_pool(self._archive.index.pending, step.limit, step.known)
        except Exception as error:
            say("the outbox can't be read", error)
            self._replicator.refill_failed(time.monotonic())
            return
        self._replicator.refilled(rows, step.limit)

    async def _offer(self, step: Offer) -> None:
        items = [
            uplink_pb2.OfferItem(
                sop_instance_uid=row.head.sop_instance_uid, digest=row.digest, size=row.dataset_bytes,
                accepted_us=row.accepted_us,
            )  # fmt: skip
            for row in step.items
        ]
        try:
            if self._line is None:
                raise Unavailable("the hub is away")
            stub: UplinkAsyncStub = UplinkStub(self._line.channel)
            reply = await stub.Offer(uplink_pb2.OfferRequest(items=items), timeout=OFFER_TIMEOUT_S)
            verdicts = [serde.verdict_from(verdict) for verdict in reply.verdicts]
        except (Exception, asyncio.CancelledError) as error:
            self._replicator.line_failed(time.monotonic())
            raise_if_ours(error)
            say("an offer was not answered", error)
        else:
            self._replicator.offered(verdicts)

    async def _record(self, step: Record) -> None:
        try:
            await self._in_pool(self._write_down, step)
        except Exception as error:
            say("receipts can't be recorded", error)
            self._replicator.record_failed(time.monotonic())
            return
        self._replicator.recorded()
        for fact in step.facts:
            if fact.detail and fact.kind.value in ("set-aside", "damage"):
                log.warning("%s of %s: %s", fact.kind.value, fact.sop_instance_uid, fact.detail)
        self._on_recorded()

    def _write_down(self, step: Record) -> None:
        for uid, digest in step.tries:
            self._archive.index.note_try(uid, digest)
        if step.facts:
            self._archive.record_facts(step.facts)

    def _in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))


async def _close(channel: grpc.aio.Channel) -> None:
    await channel.close()
