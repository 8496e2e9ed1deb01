"""The one byte budget that all gathering in memory shares: nobody may hold more than was granted, and what
is not granted goes to disk instead."""

from __future__ import annotations

import threading
from collections import Counter


class ByteBudget:
    """A count of bytes with an upper bound. Grants are taken at once or not at all: nobody waits here."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._lock = threading.Lock()
        self._taken = 0

    @property
    def taken_bytes(self) -> int:
        return self._taken

    def take(self, size: int) -> bool:
        """Whether `size` more bytes may be held; give them back with `give_back`."""
        with self._lock:
            if self._taken + size > self.bytes_max:
                return False
            self._taken += size
            return True

    def give_back(self, size: int) -> None:
        with self._lock:
            self._taken -= size
            assert self._taken >= 0


class SharedBudget:
    """The same, with a bound besides on what each of those who take may hold, so that none of them holds all
    of it."""

    def __init__(self, in_all_max: int, each_max: int) -> None:
        self._each_max = each_max
        self._in_all = ByteBudget(in_all_max)
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()

    @property
    def taken_bytes(self) -> int:
        return self._in_all.taken_bytes

    def take(self, who: str, size: int) -> bool:
        with self._lock:
            if self._taken[who] + size > self._each_max or not self._in_all.take(size):
                return False
            self._taken[who] += size
            return True

    def give_back(self, who: str, size: int) -> None:
        with self._lock:
            self._in_all.give_back(size)
            self._taken[who] -= size
            if not self._taken[who]:
                del self._taken[who]
