"""The hub's threads: a few that take what is pushed, a few that read the archive, more that only wait for
its disk, two for the ledger. They are apart so that pushes can't keep searches from being answered, nor waits
keep work from being done, nor a slow ledger keep images from arriving. Which ward's push is next decides
`federation/fair_queue.py` before it comes here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from archive.errors import Unavailable
from monitoring.tracing import carried

P = ParamSpec("P")
T = TypeVar("T")

WAITERS = 32
LEDGER_THREADS = 2


class Pools:
    """Bounded pools, awaited from the event loop."""

    def __init__(self, workers: int, clock: Callable[[], int]) -> None:
        self.clock = clock
        self._work = ThreadPoolExecutor(workers, "hub-work")
        self._push = ThreadPoolExecutor(workers, "hub-push")
        self._wait = ThreadPoolExecutor(WAITERS, "hub-wait")
        self._ledger = ThreadPoolExecutor(LEDGER_THREADS, "hub-ledger")

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs what reads the archive, or writes a little to it."""
        return await self._in(self._work, function, *args, **kwargs)

    async def push(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs what takes pushed objects."""
        return await self._in(self._push, function, *args, **kwargs)

    async def wait(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs what waits for a disk."""
        return await self._in(self._wait, function, *args, **kwargs)

    async def ledger(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs what reads or writes the ledger."""
        return await self._in(self._ledger, function, *args, **kwargs)

    def shutdown(self) -> None:
        for pool in (self._push, self._work, self._wait, self._ledger):
            pool.shutdown(wait=True, cancel_futures=True)

    async def _in(
        self, pool: ThreadPoolExecutor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        try:
            work = asyncio.get_running_loop().run_in_executor(pool, carried(function, *args, **kwargs))
        except RuntimeError:  # a call that outlived the pool's shutdown
            raise Unavailable("the hub stops") from None
        return await work
