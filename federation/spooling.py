"""What a node fetches for its devices, as far as it has come: an unlinked file in the node's state that one
thread fills and another reads, within a budget of bytes. The reader may be ahead of it: then it waits.

What can be read is not verified. `checked` says whether the whole is what its digest says; until then the
last of it must not leave.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from archive.budget import ByteBudget
from archive.errors import Corrupt, MissError, OutOfResources, TooLarge, Unavailable

READ_WAIT_S_MAX = 120.0  # for the next bytes: whoever fills has its own, shorter patience


class Spool(io.FileIO):
    """One data set of a known size. Closed by its reader; what fills it sees that in `abandoned`."""

    def __init__(self, descriptor: int, size: int, budget: ByteBudget) -> None:
        self.size = size
        self._budget: ByteBudget | None = budget
        self._received = 0
        self._running = hashlib.sha256()
        self._changed = threading.Condition()
        self._failure: MissError | None = None
        self._whole = False
        self.abandoned = False
        super().__init__(descriptor, "r+b")

    @property
    def received(self) -> int:
        """How many bytes have come."""
        return self._received

    def take(self, data: bytes) -> None:
        """The next bytes. Corrupt when there are more than there should be."""
        with self._changed:
            if self.abandoned:
                raise Unavailable("nobody waits for it any more")
            if self._received + len(data) > self.size:
                raise Corrupt("the region sends more than the instance's size")
            self._running.update(data)
            try:
                _write(self.fileno(), data, self._received)
            except OSError as error:
                raise OutOfResources(f"what is fetched can't be written (errno {error.errno})") from error
            self._received += len(data)
            self._changed.notify_all()

    def end(self, digest: bytes) -> None:
        """All has come. Corrupt unless it is what its digest says."""
        with self._changed:
            if self._received != self.size or self._running.digest() != digest:
                raise Corrupt("what was fetched from the region does not match its digest")
            self._whole = True
            self._changed.notify_all()

    def fail(self, error: MissError) -> None:
        """It does not come."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def wait_for(self, at: int) -> None:
        """Until the byte at `at` can be read. Raises what kept it from coming."""
        self._wait(lambda: self._received > at or self._whole)

    def checked(self) -> None:
        """Until it is whole and verified. Raises what kept it from being that."""
        self._wait(lambda: self._whole)

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            heard, until_s = self._received, time.monotonic() + READ_WAIT_S_MAX
            while self._failure is None and not done():
                if not self._changed.wait(until_s - time.monotonic()):
                    raise Unavailable("what is fetched does not come")
                if self._received > heard:
                    heard, until_s = self._received, time.monotonic() + READ_WAIT_S_MAX
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        with self._changed:
            self.abandoned = True
            super().close()
            budget, self._budget = self._budget, None
        if budget is not None:
            budget.give_back(self.size)


class Spools:
    """Makes them, while there is room."""

    def __init__(
        self, folder: Path, bytes_max: int, *, free_bytes: Callable[[], int], free_bytes_min: int
    ) -> None:
        self._folder = folder
        self._budget = ByteBudget(bytes_max)
        self._free_bytes = free_bytes
        self._free_bytes_min = free_bytes_min

    @property
    def taken_bytes(self) -> int:
        """What lies in files that somebody has open."""
        return self._budget.taken_bytes

    def make(self, size: int) -> Spool:
        if size < 0:
            raise Corrupt("an instance of no size")
        if size > self._budget.bytes_max:
            raise TooLarge("it is larger than what may be fetched at all (window.spool_bytes_max)")
        if self._free_bytes() - size < self._free_bytes_min:
            raise OutOfResources("no room to fetch it from the region: the disk is full")
        if not self._budget.take(size):
            raise OutOfResources("no room to fetch it from the region (window.spool_bytes_max)")
        try:
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as unlinked:
                return Spool(os.dup(unlinked.fileno()), size, self._budget)
        except OSError as error:
            self._budget.give_back(size)
            raise OutOfResources(f"no file to fetch into (errno {error.errno})") from error


def _write(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, at)
        view, at = view[done:], at + done
