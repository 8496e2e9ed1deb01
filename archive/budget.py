"""The one byte budget that all gathering in memory shares: nobody may hold more than was granted, and what
is not granted goes to disk instead."""

from __future__ import annotations

import threading


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
