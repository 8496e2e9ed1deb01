"""The bounded thread pools between the event loop and everything synchronous: the source, the ledger, the
disk. It owns how many calls run and how many may wait; past that it refuses at once. It never retries."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from archive.errors import OutOfResources
from monitoring.tracing import carried

P = ParamSpec("P")
T = TypeVar("T")

DECODING_AT_ONCE = 2  # threads that decode: each may hold a whole instance, more than once


class Workers:
    """`threads` calls at a time, `waiting_max` more in line, then OutOfResources."""

    def __init__(self, name: str, threads: int, waiting_max: int) -> None:
        self._name = name
        self._room = threads + waiting_max
        self._busy = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The call's result. Room is given back when the thread is done, not when the request went away: a
        caller that hangs up makes no room for another while its thread still works."""
        with self._lock:
            if self._busy >= self._room:
                raise OutOfResources(f"more than {self._room} requests at once ({self._name})")
            self._busy += 1
        future = self._pool.submit(carried(call, *args, **kwargs))
        future.add_done_callback(self._left)
        return await asyncio.wrap_future(future)

    async def later(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The call's result, for an answer that has begun: it waits for a thread, and is not refused for lack
        of room."""
        return await asyncio.wrap_future(self._pool.submit(carried(call, *args, **kwargs)))

    def _left(self, _: Future[T]) -> None:
        with self._lock:
            self._busy -= 1

    async def stream(self, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
        """The chunks of a synchronous iterator, one hop to a thread each. A stream that has begun is not
        refused for lack of room: it waits for a thread. The iterator is closed when the reader goes
        away."""
        lock = threading.Lock()  # a generator must not be closed while another thread runs it

        def step() -> bytes | None:
            with lock:
                return next(chunks, None)

        def close() -> None:
            with lock:
                getattr(chunks, "close", lambda: None)()

        try:
            while (chunk := await asyncio.wrap_future(self._pool.submit(carried(step)))) is not None:
                yield chunk
        finally:
            self._pool.submit(close)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
