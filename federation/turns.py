"""Who of the push streams writes next, where the budget caps the line: what is urgent first, then in the
order in which they came. Waits in the uplink's event loop for what `budget.py` says."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable

from federation.budget import Bucket


class Turns:
    """See the module's docstring. As many wait here as there are push streams."""

    def __init__(self, bucket: Bucket, clock: Callable[[], int]) -> None:
        self._bucket = bucket
        self._clock = clock
        self._waiting: list[tuple[bool, int]] = []
        self._count = itertools.count()
        self._moved = asyncio.Event()

    @property
    def is_shut(self) -> bool:
        """Whether only what is urgent goes now."""
        return self._bucket.is_shut(self._clock())

    @property
    def message_bytes_max(self) -> int:
        return self._bucket.message_bytes_max(self._clock())

    async def take(self, size: int, *, urgent: bool) -> None:
        """Returns when `size` bytes may be written."""
        if not self._waiting and self._may_go(size, urgent) == 0.0:
            return
        turn = (not urgent, next(self._count))
        heapq.heappush(self._waiting, turn)
        try:
            while True:
                moved, wait_s = self._moved, None
                if self._waiting[0] == turn and (wait_s := self._may_go(size, urgent)) == 0.0:
                    return
                try:
                    async with asyncio.timeout(wait_s):
                        await moved.wait()
                except TimeoutError:
                    pass
        finally:
            self._waiting.remove(turn)
            heapq.heapify(self._waiting)
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    def _may_go(self, size: int, urgent: bool) -> float:
        now_s, now_us = time.monotonic(), self._clock()
        wait_s = self._bucket.wait_s(now_s, now_us, urgent=urgent)
        if wait_s == 0.0:
            self._bucket.took(size, now_s, now_us)
        return wait_s
