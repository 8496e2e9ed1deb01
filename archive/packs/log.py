"""One ordered stream of numbered files of records: append, group sync, marks, sealing. Packs and facts are
both such a stream. One process writes it; it never changes or removes what anybody was promised.

Order of durability. `append` puts a record behind the last one and promises nothing. `wait_durable`
promises: whoever comes first syncs for everybody whose record is in the file by then, the others wait for
it, and those who come later make the next group. A sync that fails fails all its waiters for good. It is
never tried again on the same file, since after a failed fdatasync the kernel may hold the lost pages for
clean; the file is abandoned where it was last known synced, and its successor's header says so. A crash is
`archive/packs/reopening.py`'s to put right.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from functools import lru_cache

from archive.errors import MissError, SyncFailed, Unavailable
from archive.model import START, InstanceHead, Position, RecordKind
from archive.packs.ahead import ZerosAhead
from archive.packs.images import PAGE_BYTES, RecordImage
from archive.packs.logfiles import NO_SPACE, Appended, Layout, LogFile, LogLimits, read_records, write_error
from archive.packs.records import (
    ALIGNMENT,
    FILE_HEADER_BYTES,
    NO_HEAD,
    RECORD_HEADER_BYTES_MAX,
    RECORD_HEADER_BYTES_MIN,
    TRAILER_BYTES,
    FileHeader,
    aligned,
)
from archive.packs.recovery import Damage, FoundRecord
from archive.packs.reopening import Reopened, reopen
from archive.packs.storage import Buffer, Storage

log = logging.getLogger(__name__)

_AHEAD_RECORD_BYTES_MAX = 128 << 10
_NO_DIGEST = bytes(32)
_FILL_BYTES_MIN = aligned(RECORD_HEADER_BYTES_MIN + TRAILER_BYTES)
_FRAME_BYTES_MAX = RECORD_HEADER_BYTES_MAX + 2 * TRAILER_BYTES
IMAGE_FRAME_BYTES = _FRAME_BYTES_MAX + 2 * (PAGE_BYTES + _FILL_BYTES_MIN)  # beside a data set


class Log:
    """See the module's docstring."""

    def __init__(self, storage: Storage, layout: Layout, limits: LogLimits, state: Reopened) -> None:
        self.layout = layout
        self.writer = state.writer
        self._storage = storage
        self._limits = limits
        self._lock = threading.Lock()  # the order of records; held for one write
        self._synced = threading.Condition(threading.Lock())
        self._syncing = False
        self._closed = False
        self._current = state.current
        self._ends = state.ends  # of files that have a successor
        self._numbers = state.numbers
        self._previous = state.previous  # where the files before the current one end
        self._sequence = state.sequence
        self._acknowledged = state.acknowledged
        self._on_durable: Callable[[], None] = lambda: None
        self._ahead = ZerosAhead(limits)

    @classmethod
    def open(
        cls,
        storage: Storage,
        layout: Layout,
        *,
        promised: Position = START,
        limits: LogLimits | None = None,
        writer: bytes = b"",
    ) -> Log:
        """The stream as the last crash left it. `promised` is what is known from outside to have been
        synced."""
        state = reopen(storage, layout, promised=promised, writer=writer)
        self = cls(storage, layout, limits or LogLimits(), state)
        if not self._numbers:
            # The writer's name is the disk's: it must be the same after a restart before the first record.
            try:
                self._current = self._begin()
            except MissError as error:
                log.warning("%s can't be begun yet: %s", layout.folder, error)
        return self

    def close(self) -> None:
        """Sync, promise the last group by a mark, and let go. What can't be synced stays unpromised."""
        try:
            self.flush()
            self.mark()
        except MissError:
            log.error("%s could not be synced when it was closed", self.layout.folder)
        with self._lock:
            self._closed = True
            self._ahead.close()
            current, self._current = self._current, None
            if current is not None:
                with current.sync_turn:
                    current.sealed = True
                    current.file.close()

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

    def append_image(
        self, kind: int, head: InstanceHead, image: RecordImage, *, prefix: bytes, digest: bytes
    ) -> Appended:
        """Put a record behind the last one that lies in page-aligned memory: on pages of its own, in one
        write past the page cache. Its data set is the image's; raises what `append` raises."""
        payload_bytes = len(prefix) + image.dataset_bytes
        with self._lock:
            current = self._writable(payload_bytes + IMAGE_FRAME_BYTES)
            if current.end % PAGE_BYTES:
                self._fill_page(current)
            offset = current.end
            place = Position(current.number, current.durable)
            header, trailer = current.framing.encode(
                kind, head, digest, flags=0, sequence=self._sequence, offset=offset, durable_to=place,
                payload_bytes=payload_bytes, prefix=prefix,
            )  # fmt: skip
            end = offset + len(header) + payload_bytes + len(trailer)
            filling = self._filling(current, end, self._sequence + 1) if end % PAGE_BYTES else b""
            view = image.completed(header + prefix, trailer + filling)
            self._write(current, [view], offset, end + len(filling), direct=True)
            appended = Appended(current, self._sequence, offset + len(header), Position(current.number, end))
            current.end, current.records_end = end + len(filling), end
            self._sequence += 2 if filling else 1
            return appended

    def _fill_page(self, current: LogFile) -> None:
        filling = self._filling(current, current.end, self._sequence)
        end = current.end + len(filling)
        self._write(current, [filling], current.end, end)
        current.end = end
        self._sequence += 1

    def _filling(self, current: LogFile, offset: int, sequence: int) -> bytes:
        """A MARK that reaches from `offset` to the end of a page: its payload is zeros."""
        size = -offset % PAGE_BYTES
        if size < _FILL_BYTES_MIN:
            size += PAGE_BYTES
        zeros = bytes(size - RECORD_HEADER_BYTES_MIN - TRAILER_BYTES)
        header, trailer = current.framing.encode(
            RecordKind.MARK, NO_HEAD, _digest_of_zeros(len(zeros)), flags=0, sequence=sequence, offset=offset,
            durable_to=Position(current.number, current.durable), payload_bytes=len(zeros), prefix=b"",
        )  # fmt: skip
        return header + zeros + trailer

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

    def _write(
        self, current: LogFile, views: list[Buffer], offset: int, end: int, *, direct: bool = False
    ) -> None:
        if end > current.allocated:
            current.await_zeros(end)
        try:
            current.file.pwritev(views, offset, direct=direct)
        except OSError as error:
            self._take_back(current, offset)
            if error.errno not in NO_SPACE:
                current.failed = True
            raise write_error(error) from error
        if end > current.allocated:
            current.allocated = end
        if end - offset <= _AHEAD_RECORD_BYTES_MAX:
            # Large records move the end themselves: for them one more sync of the size is cheaper than every
            # byte written twice.
            self._ahead.keep(current)

    def _take_back(self, current: LogFile, offset: int) -> None:
        """After a failed write: nothing half stored stays behind the last record."""
        current.await_zeros()
        try:
            current.file.truncate(offset)
            current.allocated = offset
        except OSError:
            current.failed = True

    def _writable(self, payload_bytes: int) -> LogFile:
        if self._closed:
            raise Unavailable(f"{self.layout.folder} are closed")
        current = self._current
        if current is not None:
            empty = current.end == FILE_HEADER_BYTES
            if not current.failed and (empty or self._fits(current, payload_bytes)):
                return current
            self._seal(current)
        self._current = self._begin()
        return self._current

    def _fits(self, current: LogFile, payload_bytes: int) -> bool:
        age_s = time.time() - current.framing.header.created_us / 1e6
        end = current.end + payload_bytes + _FRAME_BYTES_MAX
        return end <= self._limits.file_bytes_max and age_s < self._limits.file_age_s_max

    def _seal(self, current: LogFile) -> None:
        """The end of a file for good: synced, or abandoned where it was last synced."""
        current.await_zeros()
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
            self.layout.purpose,
            number,
            writer=self.writer,
            previous=self._previous,
            first_sequence=self._sequence,
            created_us=time.time_ns() // 1000,
        )
        name = self.layout.name_of(number)
        try:
            file = self._storage.create(name)
        except OSError as error:
            raise write_error(error) from error
        try:
            file.pwritev([header.encode()], 0)
            file.fdatasync()
            self._storage.sync_directory(self.layout.folder)
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
                # In this order: whoever sees the record durable answers, and is asked for it in a search.
                if records_end > FILE_HEADER_BYTES:
                    self._acknowledged = Position(current.number, records_end)
                current.durable = end
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
        nothing to promise, or the log is not idle. In a full file it begins the next one, whose header
        promises as well."""
        with self._lock:
            current = self._current
            if (
                current is None
                or current.failed
                or current.durable < current.end
                or current.end <= current.marked_end
            ):
                return False
            current.marked_end = current.end  # tried once: a full disk is not asked again and again
            mark = self._append(RecordKind.MARK, NO_HEAD, (), 0, b"", _NO_DIGEST, 0)
            mark.log_file.marked_end = mark.log_file.end
        self.wait_durable(mark)
        return True

    # Reading

    def read(
        self, start: Position, stop: Position, *, check_digests: bool = True, gone: Container[int] = ()
    ) -> Iterator[FoundRecord | Damage]:
        """The records from `start` to `stop`, in order; `stop` lies at or below `durable`. What can't be read
        comes as Damage, and the records behind it follow."""
        numbers = list(self._numbers)
        return read_records(
            self._storage, self.layout, numbers, self._ends, start, stop,
            check_digests=check_digests, gone=gone,
        )  # fmt: skip

    def sealed(self) -> dict[int, int]:
        """The files that have a successor, by number, and where each ends; not those that are missing."""
        with self._lock:
            sealed = sorted(self._numbers)[:-1]
            ends = dict(self._ends)
        sizes: dict[int, int] = {}
        for number in sealed:
            with contextlib.suppress(FileNotFoundError):
                sizes[number] = self._storage.size(self.layout.name_of(number))
        return {number: ends.get(number, size) for number, size in sizes.items()}

    def forget(self, number: int) -> None:
        """A sealed file is removed on purpose."""
        with self._lock:
            if number in self._numbers[:-1]:
                self._numbers.remove(number)
                self._ends.pop(number, None)

    def seal(self, *, age_s_min: float = 0.0) -> bool:
        """End the file that is being written, if it holds anything and is that old; the next record begins
        another. Raises MissError when that can't be begun: then records go on into a fresh one later."""
        with self._lock:
            current = self._current
            if current is None or self._closed or current.end == FILE_HEADER_BYTES:
                return False
            if time.time() - current.framing.header.created_us / 1e6 < age_s_min:
                return False
            self._seal(current)
            self._current = self._begin()
            return True

    def seal_aged(self) -> bool:
        """In an idle moment: end the file that is past its age."""
        return self.seal(age_s_min=self._limits.file_age_s_max)


@lru_cache(maxsize=2 * PAGE_BYTES // ALIGNMENT)
def _digest_of_zeros(count: int) -> bytes:
    return hashlib.sha256(bytes(count)).digest()
