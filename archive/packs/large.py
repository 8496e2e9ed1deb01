"""Objects that are too large to gather in memory: each streams into a pack of its own, at flat memory for
any size.

What arrives is gathered and written by `lanes.py`, so that receiving, digest and disk overlap and a large
object leaves the page cache as it was. When its sender is cut off, a pack may be suspended and gone on with.

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
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from archive.errors import Corrupt, MissError
from archive.model import InstanceHead, Position, RecordKind
from archive.packs.growing import Growing
from archive.packs.lanes import Lanes, Overlapped, Plain
from archive.packs.log import Log
from archive.packs.logfiles import KEPT, SET_ASIDE, write_error
from archive.packs.records import (
    FILE_HEADER_BYTES,
    RECORD_HEADER_BYTES_MAX,
    FileHeader,
    Framing,
    Purpose,
    Reference,
    part10_prefix,
)
from archive.packs.recovery import Damage, FoundRecord
from archive.packs.storage import AppendFile, Buffer, Storage

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

log = logging.getLogger(__name__)

FOLDER = "large"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Suspended:
    """What is kept of an own pack whose sender was cut off: the first `dataset_bytes` of its data set, and
    their digest as far as it was taken, None after a restart: it is taken again from the disk."""

    pack: str
    dataset_bytes: int
    running: Hash | None


class OwnPack:
    """A pack with one instance in it, being written. Exactly one of `seal` and `abort` ends it."""

    def __init__(
        self, storage: Storage, head: InstanceHead, framing: Framing, stem: str, running: Hash
    ) -> None:
        """Made by `create` or `reopen`."""
        self._storage = storage
        self._stem = stem
        self._framing = framing
        self._prefix = part10_prefix(head)
        self._header = framing.encode_streamed_header(
            head, kind=RecordKind.INSTANCE, sequence=framing.header.first_sequence, prefix=self._prefix
        )
        self._payload_offset = FILE_HEADER_BYTES + len(self._header)
        self._end = self._payload_offset + len(self._prefix)
        self._running = running
        self._file: AppendFile | None = None
        self._out: Plain | Overlapped | None = None

    @classmethod
    def create(
        cls,
        storage: Storage,
        head: InstanceHead,
        *,
        writer: bytes,
        begun: Position,
        sequence: int,
        lanes: Lanes | None,
    ) -> OwnPack:
        """Without `lanes`, when no memory was granted, every piece is written as it comes."""
        header = FileHeader.new(
            Purpose.OWN_PACK,
            0,
            writer=writer,
            previous=begun,
            first_sequence=sequence,
            created_us=time.time_ns() // 1000,
        )
        own = cls(storage, head, Framing(header), f"{FOLDER}/{os.urandom(16).hex()}", hashlib.sha256())
        try:
            own._file = storage.create(own._part_name)
            own._out = Plain(own._file) if lanes is None else Overlapped(own._file, lanes)
            own._out.write(header.encode() + own._header + own._prefix)
        except OSError as error:
            own.abort()
            raise write_error(error) from error
        return own

    @classmethod
    def reopen(
        cls,
        storage: Storage,
        head: InstanceHead,
        kept: Suspended,
        *,
        begun: Position,
        lanes: Lanes | None,
    ) -> OwnPack:
        """Goes on where `suspend` stopped, perhaps in an earlier life of this process. Its reference will
        stand behind `begun`, which its header says from here on. Raises Corrupt when it is not this
        instance's; then, as after any other error, nothing stays."""
        name = part_name(kept.pack)
        file: AppendFile | None = None
        own: OwnPack | None = None
        try:
            file = storage.open(name, write=True)
            header = FileHeader.decode(file.read(0, FILE_HEADER_BYTES))
            if header is None:
                raise Corrupt("what was kept of an object can't be read")
            framing = Framing(replace(header, previous=begun))
            own = cls(storage, head, framing, name.removesuffix(".part"), hashlib.sha256())
            own._file, file = file, None
            own._go_on(kept, lanes)
        except (MissError, OSError) as error:
            if own is not None:
                own.abort()
            else:
                if file is not None:
                    file.close()
                discard(storage, kept.pack)
            if isinstance(error, OSError):
                raise write_error(error) from error
            raise
        return own

    def _go_on(self, kept: Suspended, lanes: Lanes | None) -> None:
        file = self._file
        assert file is not None
        before = self._header + self._prefix
        if file.read(FILE_HEADER_BYTES, len(before)) != before:
            raise Corrupt("what was kept of an object is another's")
        place, end = self._end, self._end + kept.dataset_bytes
        if kept.running is not None:
            self._running = kept.running
        while kept.running is None and place < end:
            piece = file.read(place, min(_PIECE_BYTES, end - place))
            if not piece:
                raise Corrupt("what was kept of an object is shorter than it was")
            self._running.update(piece)
            place += len(piece)
        file.pwritev([self._framing.header.encode()], 0)
        file.fdatasync()
        self._end = end
        self._out = Plain(file, end) if lanes is None else Overlapped(file, lanes, end)

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

    def read_beside(self) -> Growing | None:
        """For a reader in another thread, while this is written; None when it is over."""
        out = self._out
        if out is None:
            return None
        return Growing(self._storage.open(self._part_name), out, self._payload_offset + len(self._prefix))

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

    def suspend(self) -> Suspended:
        """Let go of file and memory; what has come stays, durable, for `reopen`. Raises when it can't."""
        file, out = self._file, self._out
        assert file is not None and out is not None
        try:
            out.finish()
            file.fdatasync()
            self._storage.sync_directory(FOLDER)
        except OSError as error:
            self.abort()
            raise write_error(error) from error
        kept = Suspended(self.name, self.dataset_bytes, self._running)
        self._let_go()
        return kept

    def abort(self) -> None:
        """Nothing stays. Calling it again, or after `close`, does nothing."""
        if not self._let_go():
            return
        discard(self._storage, self.name)


def discard(storage: Storage, pack: str) -> None:
    """Remove an own pack that nothing refers to."""
    try:
        storage.delete(part_name(pack))
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s can't be removed: errno %s", part_name(pack), error.errno)


def begun_bytes(storage: Storage, pack: str) -> int:
    """How much of a data set is in an own pack that was begun, by its file alone; 0 when it can't be read."""
    reader = storage.reader(part_name(pack))
    header = FileHeader.decode(reader.read(0, FILE_HEADER_BYTES))
    if header is None:
        return 0
    record = Framing(header).decode(
        reader.read(FILE_HEADER_BYTES, RECORD_HEADER_BYTES_MAX), 0, FILE_HEADER_BYTES
    )
    if record is None:
        return 0
    return max(0, storage.size(part_name(pack)) - record.payload_offset - record.prefix_bytes)


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


def settle_after_crash(storage: Storage, records: Log, resumable: Container[str] = ()) -> None:
    """Own packs that were being written: those that the log refers to are settled, those in `resumable` left
    as they are, the others are kept aside, for good where damage in the log may hide a reference."""
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
        elif damaged or pack not in resumable:
            lost.append(name)
    for name in lost:
        stem = name.removesuffix(".part").replace("/", "-")
        target = f"{SET_ASIDE}/{stem}-{time.time_ns()}.part{KEPT if damaged else ''}"
        log.warning("%s was never referred to and is kept as %s", name, target)
        storage.rename(name, target)
    if lost:
        storage.sync_directory(SET_ASIDE)
        storage.sync_directory(FOLDER)
