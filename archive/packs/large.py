"""Objects that are too large to gather in memory: each streams into a pack of its own, at flat memory for
any size.

What arrives is gathered in one of two buffers of whole pages while the other is written past the page cache
by a thread beside, so that receiving, digest and disk overlap and a large object leaves the cache as it was.

The pack is called `.part` until a synced reference in the log names it, then `.pack`: the log decides what
exists, and the name only saves looking it up. What a crash leaves as `.part` without a reference was
promised to nobody and is kept in `set-aside/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from archive.errors import MissError
from archive.model import InstanceHead, Position, RecordKind
from archive.packs.images import PagePool
from archive.packs.log import Log
from archive.packs.logfiles import KEPT, SET_ASIDE, write_error
from archive.packs.records import FILE_HEADER_BYTES, FileHeader, Framing, Purpose, Reference, part10_prefix
from archive.packs.recovery import Damage, FoundRecord
from archive.packs.storage import AppendFile, Buffer, Storage

log = logging.getLogger(__name__)

FOLDER = "large"
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


class _Plain:
    """Writes every piece as it comes."""

    def __init__(self, file: AppendFile) -> None:
        self._file = file
        self._end = self._synced = 0

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


class _Overlapped:
    """Gathers in one buffer while the other is being written."""

    def __init__(self, file: AppendFile, lanes: Lanes) -> None:
        self._file = file
        self._lanes = lanes
        self._pages = [lanes.pool.lend(), lanes.pool.lend()]
        self._views = [memoryview(pages) for pages in self._pages]
        self._at = 0        # in the buffer that is being filled
        self._base = 0      # where that buffer goes in the file
        self._tail = 0      # how much of it was written by `finish`
        self._writing: Future[None] | None = None

    def room(self, size: int) -> memoryview | None:
        return self._views[0][self._at : self._at + size]

    def filled(self, size: int) -> None:
        self._at += size
        if self._at == LANE_BYTES:
            self._await()
            self._writing = self._lanes.writers.submit(self._write_lane, self._views[0], self._base)
            self._views.reverse()
            self._base += LANE_BYTES
            self._at = 0

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


class OwnPack:
    """A pack with one instance in it, being written. Exactly one of `seal` and `abort` ends it."""

    def __init__(
        self,
        storage: Storage,
        head: InstanceHead,
        *,
        writer: bytes,
        begun: Position,
        sequence: int,
        lanes: Lanes | None,
    ) -> None:
        """Without `lanes`, when no memory was granted, every piece is written as it comes."""
        self._storage = storage
        self._stem = f"{FOLDER}/{os.urandom(16).hex()}"
        self._framing = Framing(
            FileHeader.new(
                Purpose.OWN_PACK,
                0,
                writer=writer,
                previous=begun,
                first_sequence=sequence,
                created_us=time.time_ns() // 1000,
            )  # fmt: skip
        )
        self._prefix = part10_prefix(head)
        self._header = self._framing.encode_streamed_header(
            head, kind=RecordKind.INSTANCE, sequence=sequence, prefix=self._prefix
        )
        self._payload_offset = FILE_HEADER_BYTES + len(self._header)
        self._end = self._payload_offset + len(self._prefix)
        self._running = hashlib.sha256()
        self._file: AppendFile | None = None
        self._out: _Plain | _Overlapped | None = None
        try:
            self._file = storage.create(self._part_name)
            self._out = _Plain(self._file) if lanes is None else _Overlapped(self._file, lanes)
            self._out.write(self._framing.header.encode() + self._header + self._prefix)
        except OSError as error:
            self.abort()
            raise write_error(error) from error

    @property
    def name(self) -> str:
        """The name that the log and the index use."""
        return f"{self._stem}.pack"

    @property
    def _part_name(self) -> str:
        return f"{self._stem}.part"

    @property
    def dataset_bytes(self) -> int:
        return self._end - self._payload_offset - len(self._prefix)

    @property
    def reference(self) -> Reference:
        return Reference(self.name, self._payload_offset, self._end - self._payload_offset, len(self._prefix))

    def room(self, size: int) -> memoryview | None:
        """Where up to `size` of the next bytes may be put without a copy; they count once `filled` says
        so."""
        assert self._out is not None
        return self._out.room(size)

    def filled(self, view: memoryview) -> None:
        """`view` is the beginning of the room that was given, and holds the next bytes."""
        assert self._out is not None
        self._running.update(view)
        self._end += len(view)
        try:
            self._out.filled(len(view))
        except OSError as error:
            raise write_error(error) from error

    def write(self, view: Buffer) -> None:
        assert self._out is not None
        self._running.update(view)
        self._end += len(view)
        try:
            self._out.write(view)
        except OSError as error:
            raise write_error(error) from error

    def digest(self) -> bytes:
        return self._running.digest()

    @contextlib.contextmanager
    def dataset(self) -> Iterator[Buffer]:
        """The data set as it lies on disk, mapped, to read its header."""
        assert self._file is not None and self._out is not None
        try:
            self._out.finish()
        except OSError as error:
            raise write_error(error) from error
        start = self._payload_offset + len(self._prefix)
        yield memoryview(self._file.map())[start : self._end]

    def seal(self) -> None:
        """Write the trailer; durable, name and all, when it returns."""
        file, out = self._file, self._out
        assert file is not None and out is not None
        trailer = self._framing.encode_streamed_trailer(
            self._header, self._prefix, payload_bytes=self._end - self._payload_offset, digest=self.digest()
        )
        try:
            out.finish()
            out.release()
            file.pwritev([trailer], self._end)
            file.fdatasync()
            self._storage.sync_directory(FOLDER)
        except OSError as error:
            raise write_error(error) from error

    def close(self) -> None:
        """Let go of a sealed pack that the log refers to."""
        self._let_go()

    def _let_go(self) -> bool:
        file, self._file = self._file, None
        out, self._out = self._out, None
        if out is not None:
            out.release()
        if file is not None:
            file.close()
        return file is not None

    def abort(self) -> None:
        """Nothing stays. Calling it again, or after `close`, does nothing."""
        if not self._let_go():
            return
        try:
            self._storage.delete(self._part_name)
        except OSError as error:
            log.warning("%s can't be removed: errno %s", self._part_name, error.errno)


def settle(storage: Storage, pack: str) -> None:
    """Give an own pack its lasting name: a synced record refers to it."""
    try:
        storage.rename(part_name(pack), pack)
    except FileNotFoundError:
        return  # it has it already
    except OSError as error:
        log.warning("%s keeps its first name: errno %s", pack, error.errno)


def part_name(pack: str) -> str:
    return f"{pack.removesuffix('.pack')}.part"


def settle_after_crash(storage: Storage, records: Log) -> None:
    """Own packs that were being written: those that the log refers to are settled, the others are kept
    aside, for good where damage in the log may hide a reference."""
    begun: dict[str, Position] = {}
    lost: list[str] = []
    for name in storage.list(FOLDER):
        if name.endswith(".part"):
            header = FileHeader.decode(storage.reader(name).read(0, FILE_HEADER_BYTES))
            if header is None:
                lost.append(name)
            else:
                begun[name] = header.previous
    named: set[str] = set()
    damaged = False
    if begun:
        # A reference stands behind the place where the log ended when its pack was begun.
        for item in records.read(min(begun.values()), records.durable, check_digests=False):
            if isinstance(item, FoundRecord) and item.header.is_reference:
                with contextlib.suppress(MissError):
                    named.add(Reference.decode(item.prefix).pack)
            damaged = damaged or isinstance(item, Damage)
    for name in begun:
        pack = f"{name.removesuffix('.part')}.pack"
        if pack in named:
            settle(storage, pack)
        else:
            lost.append(name)
    for name in lost:
        stem = name.removesuffix(".part").replace("/", "-")
        target = f"{SET_ASIDE}/{stem}-{time.time_ns()}.part{KEPT if damaged else ''}"
        log.warning("%s was never referred to and is kept as %s", name, target)
        storage.rename(name, target)
    if lost:
        storage.sync_directory(SET_ASIDE)
        storage.sync_directory(FOLDER)
