"""The replicator on a real wire: does what `federation/replicator.py` says, over the channel of the current
attach, and tells it what came of it. Lives in the uplink's event loop; everything that touches the archive
runs in its pool.

Small objects travel whole, many in a message; what is larger than a message travels in chunks of at most 1
MiB, each read from the pack as the stream takes it. So a stream holds a message or two in memory, whatever
waits in the outbox.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import grpc
import grpc.aio

from archive.archive import Archive
from archive.errors import Corrupt, Evicted, MissError, NotFound, Unavailable
from archive.model import PendingInstance
from federation import serde, status
from federation.reading import raise_if_passing, read_chunks
from federation.replicator import Idle, Offer, Record, Refill, Replicator, Step, Verdict
from protos import uplink_pb2

if TYPE_CHECKING:
    from protos.uplink_pb2_grpc import UplinkAsyncStub  # a type of the stubs alone

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

GROUP_BYTES_MAX = 1 << 20
GROUP_OBJECTS_MAX = 128
OFFER_TIMEOUT_S = 30.0
STREAM_IDLE_S = 10.0  # then a push stream with nothing to do is closed
STALL_S = 120.0  # then a hub that neither takes nor answers is given up
# What a region answers that has a fault of its own, or a line between; the rest blames what was sent.
LINE_CODES = frozenset({
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.ABORTED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DATA_LOSS,
})  # fmt: skip


class Delivery:
    """Drives a replicator. `on_recorded` is called after facts were recorded, so that a report can follow."""

    def __init__(
        self,
        archive: Archive,
        replicator: Replicator,
        pool: Executor,
        clock: Callable[[], int],
        *,
        streams: int,
        on_recorded: Callable[[], None],
    ) -> None:
        self._archive = archive
        self._replicator = replicator
        self._pool = pool
        self._clock = clock
        self._streams = streams
        self._on_recorded = on_recorded
        self._stub: UplinkAsyncStub | None = None
        self._changed = [asyncio.Event() for _ in range(streams + 1)]
        self._running: set[asyncio.Task[None]] = set()
        self._heard_s: dict[int, float] = {}
        self.bytes_sent = 0

    def line_up(self, stub: UplinkAsyncStub) -> None:
        """The node is attached: offers and pushes go over this channel."""
        self._stub = stub
        self._replicator.line_up()
        self.changed()

    def line_down(self) -> None:
        """The attach ended: nothing is offered until there is another."""
        self._stub = None
        self._replicator.line_down()
        self.changed()

    def woken(self, *, urgent: bool = False) -> None:
        """Something may have come into the outbox, or become urgent."""
        self._replicator.woken(urgent=urgent)
        self.changed()

    def changed(self) -> None:
        for event in self._changed:
            event.set()

    @property
    def drained(self) -> bool:
        """Whether the window holds nothing."""
        return self._replicator.known == 0

    async def run(self) -> None:
        """Runs until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._control())
                for stream in range(self._streams):
                    group.create_task(self._stream(stream))
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _control(self) -> None:
        while True:
            self._changed[-1].clear()
            now_s = time.monotonic()
            step = self._replicator.next(now_s)
            if isinstance(step, Idle):
                await _until(self._changed[-1], None if step.until_s is None else step.until_s - now_s)
                continue
            task = asyncio.create_task(self._perform(step))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

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
            rows = await self._in_pool(self._archive.index.pending, step.limit)
        except Exception as error:
            _say("the outbox can't be read", error)
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
            if self._stub is None:
                raise Unavailable("the hub is away")
            reply = await self._stub.Offer(uplink_pb2.OfferRequest(items=items), timeout=OFFER_TIMEOUT_S)
            verdicts = [_verdict(verdict) for verdict in reply.verdicts]
        except (Exception, asyncio.CancelledError) as error:
            self._replicator.line_failed(time.monotonic())
            raise_if_ours(error)
            _say("an offer was not answered", error)
        else:
            self._replicator.offered(verdicts)

    async def _record(self, step: Record) -> None:
        try:
            await self._in_pool(self._write_down, step)
        except Exception as error:
            _say("receipts can't be recorded", error)
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

    # Push streams.

    async def _stream(self, stream: int) -> None:
        """One push stream after another, each open while there is something to push."""
        changed = self._changed[stream]
        while True:
            changed.clear()
            now_s = time.monotonic()
            if self._stub is None or (batch := await self._next_batch(stream, now_s)) is None:
                await _until(changed, self._replicator.line_wait_s(now_s))
                continue
            await self._push(stream, self._stub, batch)

    async def _push(self, stream: int, stub: UplinkAsyncStub, batch: list[PendingInstance]) -> None:
        try:
            call = stub.Push()
        except grpc.aio.UsageError:  # its channel was closed a moment ago
            self._ended(stream, Unavailable("the hub is away"))
            return
        hear = asyncio.create_task(self._hear(stream, call))
        failure: BaseException | None = None
        try:
            await self._speak(stream, _Line(call, hear), batch)
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
            self._ended(stream, failure if isinstance(failure, grpc.aio.AioRpcError) else told or failure)

    def _ended(self, stream: int, failure: BaseException | None) -> None:
        failed = failure is not None or self._replicator.unacknowledged(stream) > 0
        blame = ""
        if isinstance(failure, grpc.aio.AioRpcError) and failure.code() not in LINE_CODES:
            blame = str(status.restored(failure))
        if failure is not None:
            _say("a push stream broke", failure)
        now_s = time.monotonic()
        self._replicator.stream_ended(stream, now_s, self._clock(), failed=failed, blame=blame)
        self.changed()

    async def _speak(self, stream: int, line: _Line, batch: list[PendingInstance] | None) -> None:
        """Writes until there is nothing to push for a while and every verdict has come."""
        changed = self._changed[stream]
        idle_since_s = time.monotonic()
        while not line.hear.done():
            if batch is not None:
                await self._write(stream, line, batch)
                idle_since_s = time.monotonic()
            changed.clear()
            now_s = time.monotonic()
            batch = await self._next_batch(stream, now_s)
            if batch is None:
                idle_s = now_s - max(idle_since_s, self._heard_s.get(stream, 0.0))
                if idle_s >= STALL_S:
                    raise Unavailable("the hub gives no verdicts")
                if idle_s >= STREAM_IDLE_S and not self._replicator.unacknowledged(stream):
                    return
                waiting = asyncio.create_task(_until(changed, max(STREAM_IDLE_S - idle_s, 1.0)))
                await asyncio.wait((waiting, line.hear), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
        await line.hear

    async def _next_batch(self, stream: int, now_s: float) -> list[PendingInstance] | None:
        """The next objects for one message: several small ones, or a large one alone."""
        batch: list[PendingInstance] = []
        size = 0
        while len(batch) < GROUP_OBJECTS_MAX and size < GROUP_BYTES_MAX:
            row = self._replicator.take(stream, now_s, GROUP_BYTES_MAX - size if batch else None)
            if row is None:
                break
            batch.append(row)
            size += row.dataset_bytes
        return batch or None

    async def _write(self, stream: int, line: _Line, batch: list[PendingInstance]) -> None:
        if len(batch) == 1 and batch[0].dataset_bytes > GROUP_BYTES_MAX:
            try:
                await self._write_large(line, batch[0])
            except (Corrupt, Evicted, NotFound, OSError) as error:  # it is cut short: so is the stream
                raise_if_passing(error)
                self._replicator.damaged(stream, batch[0], self._clock())
                raise Unavailable("an instance can't be read here any more") from error
            return
        group, unreadable = await self._in_pool(self._group, batch)
        for row in unreadable:
            self._replicator.damaged(stream, row, self._clock())
        self.bytes_sent += sum(len(whole.dataset) for whole in group.objects)
        if group.objects:
            await line.write(uplink_pb2.PushRequest(group=group))

    def _group(self, batch: list[PendingInstance]) -> tuple[uplink_pb2.PushGroup, list[PendingInstance]]:
        """The objects as one message, and those that can't be read here."""
        group, unreadable = uplink_pb2.PushGroup(), []
        for row in batch:
            try:
                dataset = b"".join(self._chunks(row))
            except (MissError, OSError) as error:
                raise_if_passing(error)
                _say("an instance can't be read", error)
                unreadable.append(row)
                continue
            group.objects.append(uplink_pb2.PushWhole(begin=_begin(row), dataset=dataset, digest=row.digest))
        return group, unreadable

    async def _write_large(self, line: _Line, row: PendingInstance) -> None:
        await line.write(uplink_pb2.PushRequest(begin=_begin(row)))
        chunks = self._chunks(row)
        ahead = asyncio.ensure_future(self._in_pool(next, chunks, None))
        try:
            while (chunk := await ahead) is not None:
                ahead = asyncio.ensure_future(self._in_pool(next, chunks, None))
                await line.write(uplink_pb2.PushRequest(chunk=chunk))
                self.bytes_sent += len(chunk)
        finally:
            ahead.cancel()
        await line.write(uplink_pb2.PushRequest(end=uplink_pb2.PushEnd(digest=row.digest)))

    def _chunks(self, row: PendingInstance) -> Iterator[bytes]:
        return read_chunks(self._archive, row.head.sop_instance_uid, row.digest, row.location)

    async def _hear(self, stream: int, call: Any) -> None:
        async for reply in call:
            self._heard_s[stream] = time.monotonic()
            verdicts = reply.group if reply.WhichOneof("message") == "group" else _alone(reply)
            for receipt in verdicts.receipts:
                if not self._replicator.received(stream, serde.receipt_from(receipt)):
                    log.warning("a receipt for nothing that was pushed was ignored")
            for refusal in verdicts.refusals:
                await self._refused(stream, refusal)
            self.changed()

    async def _refused(self, stream: int, message: uplink_pb2.Refusal) -> None:
        """Before a refusal counts, the bytes are looked at here: damaged ones are not sent again."""
        refusal = serde.refusal_from(message)
        row = self._replicator.on_stream(stream, refusal.sop_instance_uid, refusal.digest)
        if row is None:
            log.warning("a refusal of nothing that was pushed was ignored")
            return
        if not await self._in_pool(self._is_sound, row):
            self._replicator.damaged(stream, row, self._clock())
            return
        log.warning("the region refused %s: %s", refusal.sop_instance_uid, refusal.reason)
        self._replicator.refused(stream, refusal, time.monotonic(), self._clock())

    def _is_sound(self, row: PendingInstance) -> bool:
        digest = hashlib.sha256()
        try:
            for chunk in self._chunks(row):
                digest.update(chunk)
        except (MissError, OSError) as error:
            raise_if_passing(error)
            return False
        return digest.digest() == row.digest

    def _in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))


@dataclass(frozen=True, slots=True)
class _Line:
    """A push stream's call, and the task that hears its verdicts: it ends when the call does."""

    call: Any
    hear: asyncio.Task[None]

    async def write(self, message: uplink_pb2.PushRequest) -> None:
        """Writes unless the call ends first: gRPC leaves a write to a call that was cancelled before it began
        hanging for ever (grpcio 1.85)."""
        writing = asyncio.ensure_future(self.call.write(message))
        try:
            await asyncio.wait((writing, self.hear), timeout=STALL_S, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                if self.hear.done():
                    await self.hear
                raise Unavailable("the hub does not take what is pushed")
            writing.result()
        finally:
            writing.cancel()


async def _until(event: asyncio.Event, timeout_s: float | None) -> None:
    """Waits for the event, at most this long."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass


def raise_if_ours(error: BaseException) -> None:
    """A call on a channel that closes ends as if its task had been cancelled: only a real one goes on up."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error


def _begin(row: PendingInstance) -> uplink_pb2.PushBegin:
    return uplink_pb2.PushBegin(
        head=serde.head_to(row.head), size=row.dataset_bytes, conflict=row.conflict,
        accepted_us=row.accepted_us,
    )  # fmt: skip


def _alone(reply: uplink_pb2.PushReply) -> uplink_pb2.PushVerdicts:
    kind = reply.WhichOneof("message")
    if kind == "receipt":
        return uplink_pb2.PushVerdicts(receipts=[reply.receipt])
    return uplink_pb2.PushVerdicts(refusals=[reply.refusal] if kind == "refusal" else [])


def _verdict(message: uplink_pb2.OfferVerdict) -> Verdict:
    have = message.verdict == uplink_pb2.OfferVerdict.HAVE
    return Verdict(serde.receipt_from(message.receipt) if have else None)


def _say(what: str, error: BaseException) -> None:
    if isinstance(error, grpc.aio.AioRpcError):
        log.info("%s: %s %s", what, error.code().name, error.details())
    elif isinstance(error, (MissError, asyncio.InvalidStateError, asyncio.CancelledError)):
        log.warning("%s: %s", what, error)
    else:
        log.error(what, exc_info=error)
