"""The files of a log: how they are named and listed, what their writer knows of the one it writes, and
reading their records in order. Decides nothing and cuts nothing.
"""

from __future__ import annotations

import bisect
import errno
import logging
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from archive.errors import MissError, OutOfResources, SyncFailed
from archive.model import Position, RecordKind
from archive.packs.records import FILE_HEADER_BYTES, FileHeader, Framing, Purpose
from archive.packs.recovery import Damage, FoundRecord, RecordReader
from archive.packs.storage import AppendFile, Storage

log = logging.getLogger(__name__)

SET_ASIDE = "set-aside"
KEPT = ".kept"  # ends the name of what may belong to a record that was promised
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class LogLimits:
    """When a file of the stream is full, and how far zeros are written ahead: a sync of bytes that already
    had their place in the file costs half of one that moves its end. `ahead_by_thread` has a thread of its
    own write them; without, whoever comes to the end does."""

    file_bytes_max: int = 1 << 30
    file_age_s_max: float = 24 * 3600.0
    ahead_bytes: int = 4 << 20
    ahead_by_thread: bool = True


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the files of a log lie: `packs/00000001.pack`, numbered from 1."""

    folder: str
    suffix: str
    purpose: Purpose

    def name_of(self, number: int) -> str:
        return f"{self.folder}/{number:08d}.{self.suffix}"

    def number_of(self, name: str) -> int:
        """The number of a file of this log; 0 when the name is none of its."""
        stem, _, suffix = name.removeprefix(f"{self.folder}/").partition(".")
        return int(stem) if suffix == self.suffix and stem.isdecimal() else 0

    def files(self, storage: Storage) -> dict[int, str]:
        """The files there are, by number."""
        files = {self.number_of(name): name for name in storage.list(self.folder)}
        files.pop(0, None)
        return files

    def header_of(self, storage: Storage, number: int) -> FileHeader | None:
        return FileHeader.decode(storage.reader(self.name_of(number)).read(0, FILE_HEADER_BYTES))

    def writer_of(self, storage: Storage) -> bytes:
        """Who writes a log that another process has open; empty when it has no file yet."""
        for number in sorted(self.files(storage)):
            header = self.header_of(storage, number)
            if header is not None:
                return header.writer
        return b""


class LogFile:
    """The file that is being written. `end` is where the next record goes, `durable` how far it is known
    synced."""

    __slots__ = (
        "allocated",
        "claimed",
        "durable",
        "end",
        "failed",
        "file",
        "framing",
        "marked_end",
        "name",
        "number",
        "records_end",
        "sealed",
        "sync_turn",
        "zeroed",
    )

    def __init__(self, name: str, file: AppendFile, header: FileHeader, end: int) -> None:
        self.name = name
        self.file = file
        self.number = header.number
        self.framing = Framing(header)
        self.end = self.durable = self.allocated = self.records_end = end
        self.marked_end = FILE_HEADER_BYTES  # nothing to promise by a mark up to here
        self.failed = False
        self.sealed = False
        self.sync_turn = threading.Lock()  # one sync at a time: an error is reported to one caller only
        self.claimed = False  # zeros are being written from `allocated` on: no record may go there
        self.zeroed = threading.Condition(threading.Lock())

    def await_zeros(self, end: int | None = None) -> None:
        """Return when nobody writes zeros any more, or when they have got to `end`: nothing else may be
        written there, or cut, at the same time."""
        with self.zeroed:
            while self.claimed and (end is None or end > self.allocated):
                self.zeroed.wait()


@dataclass(frozen=True, slots=True)
class Appended:
    """A record that was appended, and is durable once `Log.wait_durable` has returned for it."""

    log_file: LogFile
    sequence: int
    payload_offset: int
    end: Position

    @property
    def failed(self) -> bool:
        return self.log_file.failed and self.end.offset > self.log_file.durable

    @property
    def durable(self) -> bool:
        return self.end.offset <= self.log_file.durable


def read_records(
    storage: Storage,
    layout: Layout,
    numbers: Sequence[int],
    ends: Mapping[int, int],
    start: Position,
    stop: Position,
    *,
    check_digests: bool,
    gone: Container[int] = (),
) -> Iterator[FoundRecord | Damage]:
    """The records from `start` to `stop`, in order. What can't be read comes as Damage, and the records
    behind it follow. `ends` says where files with a successor end, `gone` at what ends of records no digest
    is checked."""
    later = numbers[bisect.bisect_left(numbers, start.file) :]
    if not later or later[0] > stop.file:
        # The file itself is gone, and no later one is read that would say that it was there.
        first = start.offset if start.file == stop.file else FILE_HEADER_BYTES
        if start < stop and first < stop.offset:
            yield Damage(stop.file, max(first, FILE_HEADER_BYTES), stop.offset)
        return
    for number in later:
        if number > stop.file:
            return
        yield from _missing_before(storage, layout, number, numbers, start)
        offset = start.offset if number == start.file else 0
        end = stop.offset if number == stop.file else ends.get(number)
        yield from _read_file(storage, layout, number, offset, end, check_digests, gone)


def _missing_before(
    storage: Storage, layout: Layout, number: int, numbers: Sequence[int], start: Position
) -> Iterator[Damage]:
    """The file that this one says it followed, when it is not there."""
    header = layout.header_of(storage, number)
    if header is None or not header.previous.file or header.previous.file in numbers:
        return
    if header.previous > start:
        yield Damage(header.previous.file, FILE_HEADER_BYTES, header.previous.offset)


def _read_file(
    storage: Storage,
    layout: Layout,
    number: int,
    start: int,
    end: int | None,
    check_digests: bool,
    gone: Container[int],
) -> Iterator[FoundRecord | Damage]:
    start = max(start, FILE_HEADER_BYTES)
    try:
        header = layout.header_of(storage, number)
        file = storage.reader(layout.name_of(number))
        size = file.size()
    except OSError:
        yield Damage(number, start, end or start)
        return
    end = size if end is None else end
    if start >= end:
        return
    if header is None:
        yield Damage(number, start, end)
        return
    stop = min(end, size)
    reader = RecordReader(
        file, Framing(header), stop, mark_kind=RecordKind.MARK, check_digests=check_digests, gone=gone
    )
    yield from reader.walk(start)
    if size < end:
        log.error("%s is shorter than it was", layout.name_of(number))
        yield Damage(number, max(start, size), end)


def write_error(error: OSError) -> MissError:
    """What a write that failed means for who wanted to store."""
    if error.errno in NO_SPACE:
        return OutOfResources("no space left for instances")
    return SyncFailed(f"the disk did not take a write (errno {error.errno})")
