"""One push stream of a node: one call after another, each open while there is something to push. Writes what
the replicator gives it and tells it which verdicts came. What it shares with the other streams of its node is
its `Pushing`.

A stream holds the message that it writes and the next one, whatever waits in the outbox: a hub that takes
nothing stops it there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import grpc
import grpc.aio

from archive.errors import Corrupt, Evicted, NotFound, Unavailable
from archive.model import PendingInstance
from federation import abilities, push_wire, serde, status
from federation.budget import MESSAGE_BYTES_MAX
from federation.calls import raise_if_ours, say, until
from federation.compression import Compression
from federation.flows import Flows
from federation.packing import Packing, Parcel, begin_of, is_plain, next_chunk
from federation.reading import raise_if_passing
from federation.receiving import RESUMABLE_BYTES_MIN
from federation.replicator import Replicator
from federation.turns import Turns
from protos import uplink_pb2

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

GROUP_OBJECTS_MAX = 128
FAST_GROUP_BYTES_MAX = 2 << 20  # of whole objects in one message, where the line takes that in a moment
STREAM_IDLE_S = 10.0  # then a push stream with nothing to do is closed
TURNED_AWAY_S = 1.0  # what a stream waits for which the hub had no place
STALL_S = 120.0  # then a hub that neither takes nor answers is given up
# What a region answers that has no place for a stream, and what gRPC makes of that in the midst of a write.
TURNED_AWAY = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL})
# What a region answers that has a fault of its own, or a line between; the rest blames what was sent.
LINE_CODES = frozenset({
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.ABORTED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DATA_LOSS,
})  # fmt: skip


@dataclass(slots=True)
class Sent:
    """What went, and what is held of it now. `held` is bounded by two messages for each stream."""

    data: int = 0
    wire: int = 0
    held: int = 0
    held_max: int = 0

    def hold(self, size: int) -> None:
        self.held += size
        self.held_max = max(self.held_max, self.held)


@dataclass(slots=True)
class Pushing:
    """What the push streams of a node share."""

    replicator: Replicator
    packing: Packing
    pool: Executor
    clock: Callable[[], int]
    turns: Turns
    flows: Flows
    compression: Compression
    method_of: Callable[[int], Callable[[], Any] | None]
    changed: Callable[[], None]
    abilities: frozenset[str] = frozenset()
    zstd: bool = True
    sent: Sent = field(default_factory=Sent)

    @property
    def level(self) -> int:
        """The level to compress with now; 0 is none."""
        return self.compression.level if self.may_compress else 0

    @property
    def may_compress(self) -> bool:
        return self.zstd and abilities.ZSTD in self.abilities

    @property
    def group_bytes_max(self) -> int:
        """How much a message of whole objects may hold: each message costs both sides the same, however much
        is in it, and a long one would hold up a thin line."""
        most = self.turns.message_bytes_max
        return FAST_GROUP_BYTES_MAX if self.flows.is_fast and most >= MESSAGE_BYTES_MAX else most

    def probes(self) -> bool:
        return self.may_compress and self.compression.wants_probe(time.monotonic())

    def in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self.pool, lambda: function(*args, **kwargs))


class PushStream:
    """See the module's docstring. One that is `urgent_only` takes nothing that no reader waits for."""

    def __init__(self, number: int, pushing: Pushing, *, urgent_only: bool) -> None:
        self._number = number
        self._pushing = pushing
        self._urgent_only = urgent_only
        self._heard_s = 0.0
        self._full_s = 0.0  # that the next message waited because enough was on its way
        self._was_turned_away = False  # meanwhile the streams that have a place take what there is
        self.changed = asyncio.Event()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        pushing = self._pushing
        while True:
            self.changed.clear()
            now_s = time.monotonic()
            begin = pushing.method_of(self._number) if self.may_run else None
            if begin is None or (batch := self._next_batch(now_s)) is None:
                await until(self.changed, self._rest_s(now_s))
                continue
            await self._push(begin, batch)
            if self._was_turned_away:
                await asyncio.sleep(TURNED_AWAY_S)

    @property
    def may_run(self) -> bool:
        return self._urgent_only or self._number < self._pushing.flows.running

    def _rest_s(self, now_s: float) -> float | None:
        wait_s = self._pushing.replicator.line_wait_s(now_s)
        return 1.0 if wait_s is None and self._pushing.turns.is_shut else wait_s

    async def _push(self, begin: Callable[[], Any], batch: list[PendingInstance]) -> None:
        self._was_turned_away = False
        try:
            call = begin()
        except grpc.aio.UsageError:  # its channel was closed a moment ago
            self._ended(Unavailable("the hub is away"))
            return
        hear = asyncio.create_task(self._hear(call))
        failure: BaseException | None = None
        try:
            await self._speak(_Line(call, hear), batch)
            await call.done_writing()
            await hear
        except (Exception, asyncio.CancelledError) as error:
            raise_if_ours(error)
            failure = error
        finally:
            call.cancel()
            (heard,) = await asyncio.gather(hear, return_exceptions=True)
            # Who hears knows the status; who writes may only know that the call is over.
            told = heard if isinstance(heard, grpc.aio.AioRpcError) else None
            self._ended(failure if isinstance(failure, grpc.aio.AioRpcError) else told or failure)

    def _ended(self, failure: BaseException | None) -> None:
        replicator = self._pushing.replicator
        failed = failure is not None or replicator.unacknowledged(self._number) > 0
        blame = ""
        if isinstance(failure, grpc.aio.AioRpcError) and _is_of_what_was_sent(failure):
            blame = str(status.restored(failure))
        elif isinstance(failure, grpc.aio.AioRpcError):
            self._was_turned_away = failure.code() in TURNED_AWAY
        if failure is not None:
            say("a push stream broke", failure)
        now_s = time.monotonic()
        replicator.stream_ended(self._number, now_s, self._pushing.clock(), failed=failed, blame=blame)
        self._pushing.changed()

    async def _speak(self, line: _Line, batch: list[PendingInstance] | None) -> None:
        """Writes until there is nothing to push for a while and every verdict has come."""
        idle_since_s = time.monotonic()
        full_since_s: float | None = None
        while not line.hear.done():
            if batch is not None:
                await self._write(line, batch)
                idle_since_s = time.monotonic()
            self.changed.clear()
            now_s = time.monotonic()
            batch = self._next_batch(now_s)
            if batch is None:
                if full_since_s is None and self._is_full:
                    full_since_s = now_s
                idle_s = now_s - max(idle_since_s, self._heard_s)
                if idle_s >= STALL_S:
                    raise Unavailable("the hub gives no verdicts")
                if idle_s >= STREAM_IDLE_S and not self._pushing.replicator.unacknowledged(self._number):
                    return
                waiting = asyncio.create_task(until(self.changed, max(STREAM_IDLE_S - idle_s, 1.0)))
                await asyncio.wait((waiting, line.hear), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
            elif full_since_s is not None:
                self._full_s += time.monotonic() - full_since_s
                full_since_s = None
        await line.hear

    @property
    def _is_full(self) -> bool:
        """Whether as much is on its way as may be."""
        replicator = self._pushing.replicator
        return replicator.unacknowledged(self._number) >= replicator.limits.unacknowledged

    def _next_batch(self, now_s: float) -> list[PendingInstance] | None:
        """The next objects for one message: several small ones, or a large one alone."""
        batch: list[PendingInstance] = []
        pushing, size, most = self._pushing, 0, self._pushing.group_bytes_max
        piece = pushing.turns.message_bytes_max
        urgent_only = self._urgent_only or pushing.turns.is_shut
        while len(batch) < GROUP_OBJECTS_MAX and size < most:
            row = pushing.replicator.take(
                self._number, now_s, min(most - size, piece) if batch else None, urgent_only=urgent_only
            )
            if row is None:
                break
            batch.append(row)
            size += row.dataset_bytes
            if size > piece and len(batch) == 1:  # it travels in chunks
                break
        return batch or None

    async def _write(self, line: _Line, batch: list[PendingInstance]) -> None:
        pushing = self._pushing
        message_bytes = pushing.turns.message_bytes_max
        if len(batch) == 1 and batch[0].dataset_bytes > message_bytes:
            try:
                await self._write_large(line, batch[0], message_bytes)
            except (Corrupt, Evicted, NotFound, OSError) as error:  # it is cut short: so is the stream
                raise_if_passing(error)
                pushing.replicator.damaged(self._number, batch[0], pushing.clock())
                raise Unavailable("an instance can't be read here any more") from error
            return
        begun_s = time.monotonic()
        packed = await pushing.in_pool(
            pushing.packing.group, batch, level=pushing.level, probe=pushing.probes()
        )
        for row in packed.unreadable:
            pushing.replicator.damaged(self._number, row, pushing.clock())
        worked_s = time.monotonic() - begun_s
        urgent = any(row.urgent for row in batch)
        held = sum(len(parcel.message) for parcel in packed.parcels)
        pushing.sent.hold(held)
        try:
            for parcel in packed.parcels:
                await self._send(line, parcel, worked_s / len(packed.parcels), urgent)
        finally:
            pushing.sent.hold(-held)

    async def _write_large(self, line: _Line, row: PendingInstance, chunk_bytes: int) -> None:
        """The object in chunks, behind what the region has of it; the next is read while one is written."""
        pushing = self._pushing
        resumable = abilities.RESUME in pushing.abilities and row.dataset_bytes >= RESUMABLE_BYTES_MIN
        offset = pushing.replicator.resumes_at(row) if resumable else 0
        plain = is_plain(row)
        begin = begin_of(row, offset=offset, resumable=resumable)
        await self._send(line, Parcel(push_wire.other(begin=begin), 0), 0.0, row.urgent)
        chunks = pushing.packing.chunks(row, offset, chunk_bytes)

        def read() -> asyncio.Future[Parcel | None]:
            level, probe = (pushing.level, pushing.probes()) if plain else (0, False)
            return asyncio.ensure_future(pushing.in_pool(next_chunk, chunks, level, probe))

        pushing.sent.hold(2 * chunk_bytes)
        ahead = read()
        try:
            while True:
                begun_s = time.monotonic()
                parcel = await ahead
                if parcel is None:
                    break
                ahead = read()
                now = pushing.replicator.on_stream(self._number, row.head.sop_instance_uid, row.digest)
                await self._send(line, parcel, time.monotonic() - begun_s, now is not None and now.urgent)
        finally:
            pushing.sent.hold(-2 * chunk_bytes)
            ahead.cancel()
        await line.write(push_wire.other(end=uplink_pb2.PushEnd(digest=row.digest)))

    async def _send(self, line: _Line, parcel: Parcel, worked_s: float, urgent: bool) -> None:
        """Writes one message when it is its turn, and says how long that took."""
        pushing, size = self._pushing, len(parcel.message)
        begun_s = time.monotonic()
        await line.unless_over(pushing.turns.take(size, urgent=urgent))
        turned_s = time.monotonic()
        await line.write(parcel.message)
        now_s = time.monotonic()
        pushing.sent.data += parcel.data
        pushing.sent.wire += size
        if parcel.squeezed is not None:
            cost = parcel.squeezed
            pushing.compression.compressed(cost.level, cost.data, cost.made, cost.took_s, now_s)
        if parcel.data:
            full_s, self._full_s = self._full_s, 0.0
            pushing.compression.wrote(parcel.data, size, full_s + now_s - begun_s, worked_s, now_s)
            if pushing.flows.wrote(size, full_s + now_s - turned_s, worked_s + turned_s - begun_s, now_s):
                pushing.changed()

    async def _hear(self, call: Any) -> None:
        replicator = self._pushing.replicator
        async for reply in call:
            self._heard_s = time.monotonic()
            verdicts = reply.group if reply.WhichOneof("message") == "group" else _alone(reply)
            for receipt in verdicts.receipts:
                if not replicator.received(self._number, serde.receipt_from(receipt)):
                    log.warning("a receipt for nothing that was pushed was ignored")
            for refusal in verdicts.refusals:
                await self._refused(refusal)
            self._pushing.changed()

    async def _refused(self, message: uplink_pb2.Refusal) -> None:
        """Before a refusal counts, the bytes are looked at here: damaged ones are not sent again."""
        pushing = self._pushing
        refusal = serde.refusal_from(message)
        row = pushing.replicator.on_stream(self._number, refusal.sop_instance_uid, refusal.digest)
        if row is None:
            log.warning("a refusal of nothing that was pushed was ignored")
            return
        if not await pushing.in_pool(pushing.packing.is_sound, row):
            pushing.replicator.damaged(self._number, row, pushing.clock())
            return
        log.warning("the region refused %s: %s", refusal.sop_instance_uid, refusal.reason)
        pushing.replicator.refused(self._number, refusal, time.monotonic(), pushing.clock())


@dataclass(frozen=True, slots=True)
class _Line:
    """A push stream's call, and the task that hears its verdicts: it ends when the call does."""

    call: Any
    hear: asyncio.Task[None]

    async def write(self, message: bytes) -> None:
        """Writes unless the call ends first: gRPC leaves a write to a call that was cancelled before it began
        hanging for ever (grpcio 1.85)."""
        await self.unless_over(self.call.write(message), STALL_S)

    async def unless_over(self, act: Coroutine[Any, Any, None], timeout_s: float | None = None) -> None:
        """Does this, unless the call ends first or it takes too long."""
        acting = asyncio.ensure_future(act)
        try:
            await asyncio.wait((acting, self.hear), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not acting.done():
                if self.hear.done():
                    await self.hear
                raise Unavailable("the hub does not take what is pushed")
            acting.result()
        finally:
            acting.cancel()


def _alone(reply: uplink_pb2.PushReply) -> uplink_pb2.PushVerdicts:
    kind = reply.WhichOneof("message")
    if kind == "receipt":
        return uplink_pb2.PushVerdicts(receipts=[reply.receipt])
    return uplink_pb2.PushVerdicts(refusals=[reply.refusal] if kind == "refusal" else [])


def _is_of_what_was_sent(failure: grpc.aio.AioRpcError) -> bool:
    """Whether the region found fault with what was sent. gRPC itself says INTERNAL of a write to a call that
    has just ended; what a region says has the error's name with it."""
    if failure.code() is grpc.StatusCode.INTERNAL and not status.is_named(failure):
        return False
    return failure.code() not in LINE_CODES
