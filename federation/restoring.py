"""How a node gets back from the region what it had given to it: instances that it evicted, whose bytes are
damaged here, or that went with a disk. They come as the messages of a push stream and go through the node's
own intake, so that each is checked against its digest and written once more: then it is whole here again.

Its provenance stays what this node's index says of it, and of what the index does not know, what the region
does: it is the same instance, not a new arrival. Keeps nothing: who asked asks again.

Bounds: two fetches at once and one more for whoever waits, each of at most 256 instances, with a message of
about 1 MiB in memory; a rate, for those that nobody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import grpc
import grpc.aio

from archive.archive import Archive
from archive.errors import Unavailable
from archive.model import Provenance
from federation import status
from federation.abilities import RESTORE
from federation.line import Line, LinePart
from federation.reading import find_content
from federation.receiving import Incoming, Pushed
from protos import restore_pb2, uplink_pb2
from protos.restore_pb2_grpc import RestoreStub

if TYPE_CHECKING:
    from protos.restore_pb2_grpc import RestoreAsyncStub  # a type of the stubs alone

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Key = tuple[str, bytes]  # SOP Instance UID and digest

PAGE = 256
FETCHES = 2
THREADS = 4
STALL_S = 120.0  # then a hub that sends nothing more is given up
BUSY_TRIES = 5   # when the hub has too much of this to do
BUSY_PAUSE_S = 1.0

NO_LINE = "there is no line to the region now"
TOO_OLD = "the hub is of a release that gives nothing back"


class Restoring(LinePart):
    """A node's end of restoring. `bytes_per_s` bounds what is not urgent; 0 is no bound."""

    def __init__(self, archive: Archive, ward: str, *, bytes_per_s: float = 0.0) -> None:
        self._archive = archive
        self._ward = ward
        self._bytes_per_s = bytes_per_s
        self._line: Line | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._turns = {False: asyncio.Semaphore(FETCHES), True: asyncio.Semaphore(1)}
        self._under_way: set[asyncio.Task[None]] = set()

    # What rides on the line

    def line_up(self, line: Line) -> None:
        self._line = line

    def line_down(self) -> None:
        self._line = None
        for task in self._under_way:
            task.cancel()

    def come(self, come: uplink_pb2.Come) -> None:
        """Nothing of this waits at the hub."""

    async def run(self) -> None:
        self._turns = {False: asyncio.Semaphore(FETCHES), True: asyncio.Semaphore(1)}
        self._pool = ThreadPoolExecutor(THREADS, "restoring")
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.get_running_loop().create_future()  # the work is done where it is asked for
        finally:
            self._loop = None
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
            pool, self._pool = self._pool, None
            await asyncio.to_thread(pool.shutdown, wait=True, cancel_futures=True)

    @property
    def is_ready(self) -> bool:
        """Whether there is a line over which something can be brought now."""
        line = self._line
        return self._loop is not None and line is not None and RESTORE in line.abilities

    # What is asked of it

    async def bring(self, keys: Sequence[Key], *, urgent: bool = False) -> frozenset[Key]:
        """Brings these back; those that are whole here when it is over. What the region does not hold of this
        ward is not among them. Called in the uplink's event loop.

        Raises Unavailable when there is no line or it broke, and what intake raises when there is no room:
        then what came until then is here, and asked again it goes on behind that."""
        wanted = list(dict.fromkeys(keys))
        for start in range(0, len(wanted), PAGE):
            page = wanted[start : start + PAGE]
            here = await self._in_pool(self._whole, page)
            missing = [key for key in page if key not in here]
            if missing:
                await self._fetch_in_turn(missing, urgent)
        return await self._in_pool(self._whole, wanted)

    def bring_blocking(
        self, keys: Sequence[Key], timeout_s: float, *, urgent: bool = False
    ) -> frozenset[Key]:
        """The same, for a thread that is not the uplink's. Raises Unavailable too when it takes too long."""
        loop = self._loop
        if loop is None:
            raise Unavailable(NO_LINE)
        work = self.bring(keys, urgent=urgent)
        try:
            future = asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:
            work.close()
            raise Unavailable(NO_LINE) from None
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            future.cancel()
            raise Unavailable(f"the region did not give it back within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            raise Unavailable("the line to the region broke") from None

    # How it is done

    async def _fetch_in_turn(self, keys: Sequence[Key], urgent: bool) -> None:
        async with self._turns[urgent]:
            for left in reversed(range(BUSY_TRIES)):
                stub = self._stub()
                # A task of its own: a line that goes down ends the fetch, not whoever waits for it.
                task = asyncio.create_task(self._fetch(stub, keys, urgent))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
                try:
                    return await task
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                        raise Unavailable(TOO_OLD) from error
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or not left:
                        raise Unavailable("the region gives nothing back now") from status.restored(error)
                except asyncio.CancelledError:
                    if _is_leaving():
                        task.cancel()
                        await asyncio.gather(task, return_exceptions=True)
                        raise
                    raise Unavailable("the line to the region broke") from None
                await asyncio.sleep(BUSY_PAUSE_S)

    def _stub(self) -> RestoreAsyncStub:
        line = self._line
        if line is None:
            raise Unavailable(NO_LINE)
        if RESTORE not in line.abilities:
            raise Unavailable(TOO_OLD)
        stub: RestoreAsyncStub = RestoreStub(line.channel)
        return stub

    async def _fetch(self, stub: RestoreAsyncStub, keys: Sequence[Key], urgent: bool) -> None:
        asked = restore_pb2.RestoreRequest(
            keys=[restore_pb2.RestoreKey(sop_instance_uid=uid, digest=digest) for uid, digest in keys]
        )
        origins = await self._in_pool(self._origins, keys)
        incoming = Incoming(self._archive, self._ward)
        pushed: list[Pushed] = []
        begun_s, count = time.monotonic(), 0
        call = stub.Fetch(asked)
        try:
            while isinstance(
                message := await asyncio.wait_for(call.read(), STALL_S), uplink_pb2.PushRequest
            ):  # else it is the end
                _keep_origins(message, origins)
                taken = await self._in_pool(incoming.take, [message])
                pushed += taken.pushed
                for refusal in taken.refused:
                    log.warning("%s was not taken back: %s", refusal.sop_instance_uid, refusal.reason)
                if taken.error is not None:
                    raise taken.error
                count += message.ByteSize()
                if self._bytes_per_s and not urgent:
                    await asyncio.sleep(max(0.0, begun_s + count / self._bytes_per_s - time.monotonic()))
        except TimeoutError:
            raise Unavailable("the region sends nothing more") from None
        finally:
            call.cancel()
            with contextlib.suppress(Unavailable):  # the pool is gone: the process ends
                await self._in_pool(incoming.abort)
        await self._in_pool(_wait_indexed, pushed)

    def _whole(self, keys: Sequence[Key]) -> frozenset[Key]:
        self._archive.wait_indexed()
        return frozenset(key for key in keys if self._archive.index.has_content(*key))

    def _origins(self, keys: Sequence[Key]) -> dict[Key, Provenance]:
        """Where this node's index says that these came from."""
        found = {key: find_content(self._archive, *key) for key in keys}
        return {key: content.head.provenance for key, content in found.items() if content is not None}

    async def _in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._pool is None:
            raise Unavailable(NO_LINE)
        try:
            work: Awaitable[T] = asyncio.get_running_loop().run_in_executor(
                self._pool, lambda: function(*args, **kwargs)
            )
        except RuntimeError:  # it was shut down
            raise Unavailable(NO_LINE) from None
        return await work


def _keep_origins(message: uplink_pb2.PushRequest, origins: dict[Key, Provenance]) -> None:
    begun = [whole.begin for whole in message.group.objects] if message.HasField("group") else []
    for begin in [message.begin] if message.HasField("begin") else begun:
        origin = origins.get((begin.head.sop_instance_uid, begin.digest))
        if origin is not None:
            begin.head.issuer, begin.head.device = origin.issuer, origin.device
            begin.head.calling_ae, begin.head.received_at_us = origin.calling_ae, origin.received_at_us


def _wait_indexed(pushed: Sequence[Pushed]) -> None:
    for one in pushed:
        one.ticket.wait_indexed()


def _is_leaving() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
