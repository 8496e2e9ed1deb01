"""One ordered stream of numbered files of records: append, group sync, marks, sealing, and opening again
after a crash. Packs and facts are both such a stream. One process writes it; it never changes or removes
what anybody was promised.

Order of durability. `append` puts a record behind the last one and promises nothing. `wait_durable`
promises: whoever comes first syncs for everybody whose record is in the file by then, the others wait for
it, and those who come later make the next group. A sync that fails fails all its waiters for good. It is
never tried again on the same file, since after a failed fdatasync the kernel may hold the lost pages for
clean; the file is abandoned where it was last known synced, and its successor's header says so.

Opening. The last file is read from a place that is known good; `archive/recovery.py` finds where it ends. A
tail that nobody was promised is kept in `set-aside/` and cut. Whole records that nobody was promised yet
are written once more before they are built upon: a failed sync before the crash may have left them in the
page cache alone.
"""

from __future__ import annotations

import bisect
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from archive.errors import MissError, OutOfResources, SyncFailed
from archive.model import START, InstanceHead, Position, RecordKind
from archive.records import (
    FILE_HEADER_BYTES,
    NO_HEAD,
    RECORD_BYTES_MIN,
    RECORD_MAGIC,
    FileHeader,
    Framing,
    Purpose,
    aligned,
)
from archive.recovery import Damage, FoundRecord, RecordReader, Tail, find_tail
from archive.storage import AppendFile, Buffer, Storage

log = logging.getLogger(__name__)

SET_ASIDE = "set-aside"
_AHEAD_PIECE = bytes(1 << 20)
_COPY_BYTES = 1 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_DIGEST = bytes(32)


@dataclass(frozen=True, slots=True)
class LogLimits:
    """When a file of the stream is full, and how far zeros are written ahead: a sync of bytes that already
    had their place in the file costs half of one that moves its end."""

    file_bytes_max: int = 1 << 30
    file_age_s_max: float = 24 * 3600.0
    ahead_bytes: int = 4 << 20


class LogFile:
    """The file that is being written. `end` is where the next record goes, `durable` how far it is known
    synced."""

    __slots__ = (
        "allocated",
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


class Log:
    """See the module's docstring. `folder` and `suffix` name the files: `packs/00000001.pack`."""

    def __init__(
        self, storage: Storage, folder: str, suffix: str, purpose: Purpose, limits: LogLimits
    ) -> None:
        self._storage = storage
        self._folder = folder
        self._suffix = suffix
        self._purpose = purpose
        self._limits = limits
        self._lock = threading.Lock()  # the order of records; held for one write
        self._synced = threading.Condition(threading.Lock())
        self._syncing = False
        self._current: LogFile | None = None
        self._ends: dict[int, int] = {}  # of files that have a successor, or are the last
        self._numbers: list[int] = []
        self._previous = Position(0, 0)
        self._sequence = 1
        self._acknowledged = START
        self._on_durable: Callable[[], None] = lambda: None
        self.writer = b""

    # Opening and closing

    @classmethod
    def open(
        cls,
        storage: Storage,
        folder: str,
        suffix: str,
        purpose: Purpose,
        *,
        promised: Position = START,
        limits: LogLimits | None = None,
        writer: bytes = b"",
    ) -> Log:
        """The stream as the last crash left it. `promised` is what is known from outside to have been
        synced."""
        self = cls(storage, folder, suffix, purpose, limits or LogLimits())
        files = self._list_files()
        headers = {number: self._read_header(name) for number, name in files.items()}
        last = max(files, default=0)
        if last and headers[last] is None and self._is_unborn(files[last], last, promised):
            self._set_aside_unborn(files.pop(last))
            last = max(files, default=0)
        self._numbers = sorted(files)
        known = [header for number in self._numbers if (header := headers[number]) is not None]
        self.writer = known[0].writer if known else writer or os.urandom(16)
        for header in known:
            if header.previous.file in files:
                self._ends[header.previous.file] = header.previous.offset
        if last:
            self._open_last(last, files[last], headers[last], promised)
        if promised > START and promised.file > last:
            # The log itself is gone, or an older copy of it came back: never use a position again.
            log.error("%s ends before a place that was read from it", folder)
            self._previous = max(self._previous, promised)
            self._close_current()
        if not self._numbers:
            # The writer's name is the disk's: it must be the same after a restart, also before the first
            # record.
            try:
                self._current = self._begin()
            except MissError as error:
                log.warning("%s can't be begun yet: %s", folder, error)
        return self

    def _open_last(self, number: int, name: str, header: FileHeader | None, promised: Position) -> None:
        file = self._storage.open(name, write=True)
        if header is None:
            size = file.size()
            file.close()
            log.error("%s: both copies of its header are damaged", name)
            self._ends[number] = size
            self._previous = self._acknowledged = Position(number, size)
            total = sum(self._storage.size(self.name_of(number)) for number in self._numbers)
            self._sequence = total // RECORD_BYTES_MIN + 1  # beyond whatever those files can hold
            return
        outside = promised.offset if promised.file == number else 0
        if promised.file > number:
            outside = aligned(file.size())
        tail = find_tail(file, Framing(header), start=outside, promised=outside, mark_kind=RecordKind.MARK)
        self._sequence = tail.sequence
        current = LogFile(name, file, header, tail.end)
        current.records_end = tail.records_end
        current.marked_end = tail.end if tail.last_is_mark else FILE_HEADER_BYTES
        current.allocated = file.size()
        self._ends[number] = tail.end
        self._previous = Position(number, tail.end)
        self._acknowledged = Position(number, tail.records_end)
        if self._settle_tail(current, tail):
            self._current = current
        else:
            file.close()

    def _is_unborn(self, name: str, number: int, promised: Position) -> bool:
        """Whether a last file without a header can have held no record: its header is synced before the
        first."""
        first = self._storage.reader(name).read(FILE_HEADER_BYTES, len(RECORD_MAGIC))
        return promised < Position(number, FILE_HEADER_BYTES) and first != RECORD_MAGIC

    def _settle_tail(self, current: LogFile, tail: Tail) -> bool:
        """Write again what is whole and cut what nobody was promised. False when the disk does not let us:
        then a new file is begun behind the last whole record, and this one keeps its bytes."""
        try:
            for offset in range(max(tail.promised, FILE_HEADER_BYTES), tail.end, _COPY_BYTES):
                length = min(_COPY_BYTES, tail.end - offset)
                current.file.pwritev([current.file.read(offset, length)], offset)
            current.file.fdatasync()
            if tail.bytes_end > tail.end:
                self._keep_aside(current, tail.end, tail.bytes_end)
                current.file.truncate(tail.end)
                current.allocated = tail.end
                current.file.fdatasync()
        except OSError as error:
            log.error("%s can't be written after a crash: errno %s", current.name, error.errno)
            return False
        return True

    def _keep_aside(self, current: LogFile, start: int, end: int) -> None:
        name = f"{SET_ASIDE}/{self._folder}-{current.number:08d}-{start}-{time.time_ns()}.cut"
        log.warning(
            "%s: %d bytes that nobody was promised are cut and kept in %s", current.name, end - start, name
        )
        kept = self._storage.create(name)
        try:
            for offset in range(start, end, _COPY_BYTES):
                kept.pwritev([current.file.read(offset, min(_COPY_BYTES, end - offset))], offset - start)
            kept.fdatasync()
        finally:
            kept.close()
        self._storage.sync_directory(SET_ASIDE)

    def _set_aside_unborn(self, name: str) -> None:
        """A last file whose header never reached the disk: no record can have been promised in it."""
        target = f"{SET_ASIDE}/{name.replace('/', '-')}-{time.time_ns()}.unborn"
        log.warning("%s never got its header and is kept as %s", name, target)
        self._storage.rename(name, target)
        self._storage.sync_directory(SET_ASIDE)
        self._storage.sync_directory(self._folder)

    def close(self) -> None:
        """Sync, promise the last group by a mark, and let go. What can't be synced stays unpromised."""
        try:
            self.flush()
            self.mark()
        except MissError:
            log.error("%s could not be synced when it was closed", self._folder)
        with self._lock:
            self._close_current()

    def _close_current(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            with current.sync_turn:
                current.sealed = True
                current.file.close()

    @classmethod
    def writer_of(cls, storage: Storage, folder: str, suffix: str) -> bytes:
        """Who writes a stream that another process has open; empty when it has no file yet."""
        for name in storage.list(folder):
            if name.endswith(f".{suffix}"):
                header = FileHeader.decode(storage.reader(name).read(0, FILE_HEADER_BYTES))
                if header is not None:
                    return header.writer
        return b""

    # Where it stands

    @property
    def end(self) -> Position:
        """Where the next record goes."""
        with self._lock:
            current = self._current
            return max(self._previous, START) if current is None else Position(current.number, current.end)

    @property
    def durable(self) -> Position:
        """Everything below is synced."""
        with self._lock:
            return self._durable()

    def _durable(self) -> Position:
        current = self._current
        return max(self._previous, START) if current is None else Position(current.number, current.durable)

    @property
    def acknowledged(self) -> Position:
        """The end of the last synced record that is no mark."""
        return self._acknowledged

    @property
    def next_sequence(self) -> int:
        return self._sequence

    def on_durable(self, callback: Callable[[], None]) -> None:
        """`callback` runs after every sync that promised something, in the thread that synced: it must be
        short."""
        self._on_durable = callback

    # Writing

    def append(
        self,
        kind: int,
        head: InstanceHead,
        payload: Sequence[Buffer],
        payload_bytes: int,
        *,
        prefix: bytes,
        digest: bytes,
        flags: int = 0,
    ) -> Appended:
        """Put a record behind the last one. `payload` begins with `prefix`, as one view or several.

        Raises OutOfResources when the disk is full, SyncFailed when it is broken; then nothing was appended.
        """
        with self._lock:
            return self._append(kind, head, payload, payload_bytes, prefix, digest, flags)

    def _append(
        self,
        kind: int,
        head: InstanceHead,
        payload: Sequence[Buffer],
        payload_bytes: int,
        prefix: bytes,
        digest: bytes,
        flags: int,
    ) -> Appended:
        current = self._writable(payload_bytes)
        offset, sequence = current.end, self._sequence
        header, trailer = current.framing.encode(
            kind, head, digest, flags=flags, sequence=sequence, offset=offset,
            durable_to=Position(current.number, current.durable), payload_bytes=payload_bytes, prefix=prefix,
        )  # fmt: skip
        end = offset + len(header) + payload_bytes + len(trailer)
        self._write(current, [header, *payload, trailer], offset, end)
        current.end = end
        self._sequence = sequence + 1
        if kind != RecordKind.MARK:
            current.records_end = end
        return Appended(current, sequence, offset + len(header), Position(current.number, end))

    def _write(self, current: LogFile, views: list[Buffer], offset: int, end: int) -> None:
        if end > current.allocated:
            self._write_ahead(current, end)
        try:
            current.file.pwritev(views, offset)
        except OSError as error:
            self._take_back(current, offset)
            if error.errno not in _NO_SPACE:
                current.failed = True
            raise write_error(error) from error
        if end > current.allocated:
            current.allocated = end

    def _write_ahead(self, current: LogFile, end: int) -> None:
        """Zeros for the next few megabytes. Large records move the end themselves: for them one more sync
        of the size is cheaper than every byte written twice."""
        ahead = min(self._limits.ahead_bytes, self._limits.file_bytes_max - current.allocated)
        if end - current.allocated > ahead // 4:
            return
        try:
            for offset in range(current.allocated, current.allocated + ahead, len(_AHEAD_PIECE)):
                length = min(len(_AHEAD_PIECE), current.allocated + ahead - offset)
                current.file.pwritev([memoryview(_AHEAD_PIECE)[:length]], offset)
            current.allocated += ahead
        except OSError:
            self._take_back(current, current.allocated)  # the record itself may still find room

    def _take_back(self, current: LogFile, offset: int) -> None:
        """After a failed write: nothing half stored stays behind the last record."""
        try:
            current.file.truncate(offset)
            current.allocated = offset
        except OSError:
            current.failed = True

    def _writable(self, payload_bytes: int) -> LogFile:
        current = self._current
        if current is not None and not current.failed:
            fits = current.end + payload_bytes + 4096 <= self._limits.file_bytes_max
            age_s = time.time() - current.framing.header.created_us / 1e6
            if current.end == FILE_HEADER_BYTES or (fits and age_s < self._limits.file_age_s_max):
                return current
        if current is not None:
            self._seal(current)
        self._current = self._begin()
        return self._current

    def _seal(self, current: LogFile) -> None:
        """The end of a file for good: synced, or abandoned where it was last synced."""
        with current.sync_turn:
            if not current.failed:
                try:
                    current.file.truncate(current.end)
                    current.file.fdatasync()
                except OSError as error:
                    self._abandon(current, error)
            end = current.durable if current.failed else current.end
            if not current.failed and current.records_end > FILE_HEADER_BYTES:
                self._acknowledged = Position(current.number, current.records_end)
            with self._synced:
                current.durable = end
                current.sealed = True
                self._ends[current.number] = end
                self._previous = Position(current.number, end)
                self._synced.notify_all()
            current.file.close()
        self._current = None
        self._on_durable()

    def _begin(self) -> LogFile:
        number = max(self._previous.file, *self._numbers, 0) + 1
        header = FileHeader.new(
            self._purpose, number, writer=self.writer, previous=self._previous, first_sequence=self._sequence,
            created_us=time.time_ns() // 1000,
        )  # fmt: skip
        name = self.name_of(number)
        try:
            file = self._storage.create(name)
        except OSError as error:
            raise write_error(error) from error
        try:
            file.pwritev([header.encode()], 0)
            file.fdatasync()
            self._storage.sync_directory(self._folder)
        except OSError as error:
            file.close()
            self._discard(name)
            raise write_error(error) from error
        self._numbers.append(number)
        return LogFile(name, file, header, FILE_HEADER_BYTES)

    def _discard(self, name: str) -> None:
        try:
            self._storage.delete(name)
        except OSError as error:
            log.error("%s was begun and can't be removed: errno %s", name, error.errno)

    # Syncing

    def wait_durable(self, appended: Appended, timeout_s: float = 30.0) -> None:
        """Return when the record is synced; SyncFailed when it never will be, or not in time."""
        current, offset = appended.log_file, appended.end.offset
        if current.durable >= offset:
            return
        deadline = time.monotonic() + timeout_s
        while True:
            with self._synced:
                while self._syncing and current.durable < offset and not (current.failed or current.sealed):
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._synced.wait(left):
                        raise SyncFailed("the disk did not confirm a write in time")
                if current.durable >= offset:
                    return
                if current.failed or current.sealed:
                    raise SyncFailed("the disk did not confirm a write")
                self._syncing = True
            self._lead(current)

    def _lead(self, current: LogFile) -> None:
        """Sync for everybody whose record is in the file by now."""
        promised = False
        try:
            with self._lock:
                end, records_end = current.end, current.records_end
            with current.sync_turn:
                if current.failed or current.sealed:
                    return
                try:
                    current.file.fdatasync()
                except OSError as error:
                    self._abandon(current, error)
                    return
                current.durable = end
                self._acknowledged = Position(current.number, records_end)
                promised = True
        finally:
            with self._synced:
                self._syncing = False
                self._synced.notify_all()
            if promised:
                self._on_durable()

    def _abandon(self, current: LogFile, error: OSError) -> None:
        log.error(
            "%s: a sync failed (errno %s), the file is abandoned at %d",
            current.name,
            error.errno,
            current.durable,
        )
        current.failed = True

    def flush(self, timeout_s: float = 30.0) -> None:
        """Sync everything that was appended so far."""
        with self._lock:
            current = self._current
            if current is None or current.durable >= current.end:
                return
            last = Appended(current, self._sequence - 1, current.end, Position(current.number, current.end))
        self.wait_durable(last, timeout_s)

    def mark(self) -> bool:
        """In an idle moment: a MARK whose `durable_to` promises the last group too. False when there is
        nothing to promise, or the log is not idle."""
        with self._lock:
            current = self._current
            if (
                current is None
                or current.failed
                or current.durable < current.end
                or current.end <= current.marked_end
            ):
                return False
            mark = self._append(RecordKind.MARK, NO_HEAD, (), 0, b"", _NO_DIGEST, 0)
            current.marked_end = current.end
        self.wait_durable(mark)
        return True

    # Reading

    def read(
        self, start: Position, stop: Position, *, check_digests: bool = True
    ) -> Iterator[FoundRecord | Damage]:
        """The records from `start` to `stop`, in order; `stop` lies at or below `durable`. What can't be
        read comes as Damage, and the records behind it follow."""
        numbers = list(self._numbers)
        for number in numbers[bisect.bisect_left(numbers, start.file) :]:
            if number > stop.file:
                return
            yield from self._missing_before(number, numbers, start)
            offset = start.offset if number == start.file else 0
            end = stop.offset if number == stop.file else self._ends.get(number)
            yield from self._read_file(number, offset, end, check_digests)

    def _missing_before(self, number: int, numbers: Sequence[int], start: Position) -> Iterator[Damage]:
        """The file that this one says it followed, when it is not there."""
        header = self._read_header(self.name_of(number))
        if (
            header is not None
            and header.previous.file
            and header.previous.file not in numbers
            and header.previous > start
        ):
            yield Damage(header.previous.file, FILE_HEADER_BYTES, header.previous.offset)

    def _read_file(
        self, number: int, start: int, end: int | None, check: bool
    ) -> Iterator[FoundRecord | Damage]:
        name = self.name_of(number)
        start = max(start, FILE_HEADER_BYTES)
        try:
            header = self._read_header(name)
            file = self._storage.reader(name)
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
        if size < end:
            log.error("%s is shorter than it was", name)
        reader = RecordReader(
            file, Framing(header), min(end, size), mark_kind=RecordKind.MARK, check_digests=check
        )
        yield from reader.walk(start)
        if size < end:
            yield Damage(number, max(start, size), end)

    def _read_header(self, name: str) -> FileHeader | None:
        return FileHeader.decode(self._storage.reader(name).read(0, FILE_HEADER_BYTES))

    def _list_files(self) -> dict[int, str]:
        files = {}
        for name in self._storage.list(self._folder):
            stem, _, suffix = name.removeprefix(f"{self._folder}/").partition(".")
            if suffix == self._suffix and stem.isdecimal():
                files[int(stem)] = name
        return files

    def name_of(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.{self._suffix}"


def write_error(error: OSError) -> MissError:
    if error.errno in _NO_SPACE:
        return OutOfResources("no space left for instances")
    return SyncFailed(f"the disk did not take a write (errno {error.errno})")
