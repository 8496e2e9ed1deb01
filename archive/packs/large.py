"""Objects that are too large to gather in memory: each streams into a pack of its own, at flat memory for
any size.

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

from archive.errors import MissError
from archive.model import InstanceHead, Position, RecordKind
from archive.packs.log import Log
from archive.packs.logfiles import SET_ASIDE, write_error
from archive.packs.records import FILE_HEADER_BYTES, FileHeader, Framing, Purpose, Reference, part10_prefix
from archive.packs.recovery import FoundRecord
from archive.packs.storage import AppendFile, Buffer, Storage

log = logging.getLogger(__name__)

FOLDER = "large"
_SYNC_BYTES = 64 << 20  # dirty pages of one object stay below this, and a failing disk shows early


class OwnPack:
    """A pack with one instance in it, being written. Exactly one of `seal` and `abort` ends it."""

    def __init__(
        self, storage: Storage, head: InstanceHead, *, writer: bytes, begun: Position, sequence: int
    ) -> None:
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
        self._end = self._synced = self._payload_offset + len(self._prefix)
        self._running = hashlib.sha256()
        self._file: AppendFile | None = None
        try:
            self._file = storage.create(self._part_name)
            self._file.pwritev([self._framing.header.encode(), self._header, self._prefix], 0)
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

    def write(self, view: Buffer) -> None:
        file = self._file
        assert file is not None
        try:
            file.pwritev([view], self._end)
            self._end += len(view)
            if self._end - self._synced >= _SYNC_BYTES:
                file.fdatasync()
                self._synced = self._end
        except OSError as error:
            raise write_error(error) from error
        self._running.update(view)

    def digest(self) -> bytes:
        return self._running.digest()

    @contextlib.contextmanager
    def dataset(self) -> Iterator[Buffer]:
        """The data set as it lies on disk, mapped, to read its header."""
        assert self._file is not None
        start = self._payload_offset + len(self._prefix)
        yield memoryview(self._file.map())[start : self._end]

    def seal(self) -> None:
        """Write the trailer; durable, name and all, when it returns."""
        file = self._file
        assert file is not None
        trailer = self._framing.encode_streamed_trailer(
            self._header, self._prefix, payload_bytes=self._end - self._payload_offset, digest=self.digest()
        )
        try:
            file.pwritev([trailer], self._end)
            file.fdatasync()
            self._storage.sync_directory(FOLDER)
        except OSError as error:
            raise write_error(error) from error

    def close(self) -> None:
        """Let go of a sealed pack that the log refers to."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def abort(self) -> None:
        """Nothing stays. Calling it again, or after `close`, does nothing."""
        file, self._file = self._file, None
        if file is None:
            return
        file.close()
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
    aside."""
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
    if begun:
        # A reference stands behind the place where the log ended when its pack was begun.
        for item in records.read(min(begun.values()), records.durable, check_digests=False):
            if isinstance(item, FoundRecord) and item.header.is_reference:
                with contextlib.suppress(MissError):
                    named.add(Reference.decode(item.prefix).pack)
    for name in begun:
        pack = f"{name.removesuffix('.part')}.pack"
        if pack in named:
            settle(storage, pack)
        else:
            lost.append(name)
    for name in lost:
        target = f"{SET_ASIDE}/{name.replace('/', '-')}"
        log.warning("%s was never referred to and is kept as %s", name, target)
        storage.rename(name, target)
    if lost:
        storage.sync_directory(SET_ASIDE)
        storage.sync_directory(FOLDER)
