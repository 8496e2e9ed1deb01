"""How the bytes of a large object get from memory to its pack: gathered in one of two buffers of whole pages
while the other is written past the page cache by a thread beside. Knows offsets of a file, and no format."""

from __future__ import annotations

import contextlib
import errno
from concurrent.futures import Future, ThreadPoolExecutor

from archive.packs.images import PagePool
from archive.packs.storage import AppendFile, Buffer

_SYNC_BYTES = 64 << 20  # dirty pages of one object stay below this, and a failing disk shows early
LANE_BYTES = 1 << 20    # of one of the two buffers of an object
_WRITERS_MAX = 4


class Lanes:
    """Buffers and threads for the own packs of one archive."""

    def __init__(self) -> None:
        self.pool = PagePool(LANE_BYTES)
        self.writers = ThreadPoolExecutor(_WRITERS_MAX, "own-pack")

    def close(self) -> None:
        self.writers.shutdown()


class Plain:
    """Writes every piece as it comes."""

    def __init__(self, file: AppendFile, end: int = 0) -> None:
        """`end` is where what is in the file already ends."""
        self._file = file
        self._end = self._synced = end

    @property
    def written(self) -> int:
        """How far the file holds what came."""
        return self._end

    def room(self, size: int) -> memoryview | None:
        return None

    def filled(self, size: int) -> None:
        raise AssertionError("there was no room")

    def write(self, view: Buffer) -> None:
        self._file.pwritev([view], self._end)
        self._end += len(view)
        if self._end - self._synced >= _SYNC_BYTES:
            self._file.fdatasync()
            self._synced = self._end

    def finish(self) -> None:
        """Everything is in the file."""

    def release(self) -> None:
        """Nothing is held."""


class Overlapped:
    """Gathers in one buffer while the other is being written."""

    def __init__(self, file: AppendFile, lanes: Lanes, end: int = 0) -> None:
        """`end` is where what is in the file already ends: the buffer that it ends in is read back."""
        at = end % LANE_BYTES
        held = file.read(end - at, at) if at else b""
        if len(held) < at:
            raise OSError(errno.EIO, "an object that was begun is shorter than it was")
        self._file = file
        self._lanes = lanes
        self._pages = [lanes.pool.lend(), lanes.pool.lend()]
        self._views = [memoryview(pages) for pages in self._pages]
        self._views[0][:at] = held
        self._at = at         # in the buffer that is being filled
        self._base = end - at  # where that buffer goes in the file
        self._tail = at        # how much of it is in the file already
        self._writing: Future[None] | None = None
        self._written = end

    @property
    def written(self) -> int:
        """How far the file holds what came; what is gathered or being written is not counted."""
        return self._written

    def room(self, size: int) -> memoryview | None:
        return self._views[0][self._at : self._at + size]

    def filled(self, size: int) -> None:
        self._at += size
        if self._at == LANE_BYTES:
            self._await()
            self._written = max(self._written, self._base)
            self._writing = self._lanes.writers.submit(self._write_lane, self._views[0], self._base)
            self._views.reverse()
            self._base += LANE_BYTES
            self._at = self._tail = 0

    def write(self, view: Buffer) -> None:
        with memoryview(view) as rest:
            taken = 0
            while taken < len(rest):
                room = self._views[0][self._at : self._at + len(rest) - taken]
                room[:] = rest[taken : taken + len(room)]
                taken += len(room)
                self.filled(len(room))

    def _write_lane(self, view: memoryview, offset: int) -> None:
        self._file.pwritev([view], offset, direct=True)
        if offset % _SYNC_BYTES == 0:
            self._file.fdatasync()

    def _await(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def finish(self) -> None:
        self._await()
        if self._at > self._tail:
            self._file.pwritev([self._views[0][: self._at]], self._base)
            self._tail = self._at

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._await()
        for view in self._views:
            view.release()
        for pages in self._pages:
            self._lanes.pool.take_back(pages)
        self._views, self._pages = [], []
