"""Opening a log again as the last crash left it: judges the last file by `archive/packs/recovery.py`, keeps
aside and cuts what nobody was promised, and makes sure of the rest. Never removes or changes what anybody was
promised.

Whole records that nobody was promised yet are written once more before they are built upon: a sync that
failed before the crash may have left them in the page cache alone, and the next sync would not write them.
What the disk does not confirm even then, though tried again, is not built upon: the log stays shut, since
whoever found those records would take them for durable.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field

from archive.errors import SyncFailed
from archive.model import START, Position, RecordKind
from archive.packs.logfiles import SET_ASIDE, Layout, LogFile
from archive.packs.records import (
    FILE_HEADER_BYTES,
    RECORD_BYTES_MIN,
    RECORD_MAGIC,
    FileHeader,
    Framing,
    aligned,
)
from archive.packs.recovery import Tail, find_tail
from archive.packs.storage import Storage

log = logging.getLogger(__name__)

_COPY_BYTES = 1 << 20
_CONFIRM_TRIES = 3


@dataclass(slots=True)
class Reopened:
    """Where a log stands. `current` is the file to go on with, None when a fresh one is to be begun behind
    `previous`; `ends` says where the files end."""

    writer: bytes
    numbers: list[int] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)
    previous: Position = Position(0, 0)
    sequence: int = 1
    acknowledged: Position = START
    current: LogFile | None = None


def reopen(storage: Storage, layout: Layout, *, promised: Position, writer: bytes) -> Reopened:
    """The log as it is. `promised` is what is known from outside to have been synced; `writer` names a new
    one."""
    numbers = sorted(layout.files(storage))
    if numbers and is_unborn(storage, layout, numbers[-1], promised):
        _set_aside_unborn(storage, layout, numbers.pop())
    headers = {number: layout.header_of(storage, number) for number in numbers}
    known = [header for header in headers.values() if header is not None]
    state = Reopened(known[0].writer if known else writer or os.urandom(16), numbers)
    state.ends = {h.previous.file: h.previous.offset for h in known if h.previous.file in headers}
    last = numbers[-1] if numbers else 0
    if last:
        header = headers[last]
        if header is None:
            _pass_over(storage, layout, state)
        else:
            _open_last(storage, layout, state, header, promised)
    if promised > START and promised.file > last:
        # The log itself is gone, or an older copy of it came back: never use a position again.
        log.error("%s ends before a place that was read from it", layout.folder)
        state.previous = max(state.previous, promised)
        if state.current is not None:
            state.current.file.close()
            state.current = None
    return state


def is_unborn(storage: Storage, layout: Layout, number: int, promised: Position) -> bool:
    """Whether the last file never got its header, so that it can hold no record: the header is synced
    first."""
    if layout.header_of(storage, number) is not None or promised >= Position(number, FILE_HEADER_BYTES):
        return False
    return storage.reader(layout.name_of(number)).read(FILE_HEADER_BYTES, len(RECORD_MAGIC)) != RECORD_MAGIC


def _set_aside_unborn(storage: Storage, layout: Layout, number: int) -> None:
    name = layout.name_of(number)
    target = f"{SET_ASIDE}/{name.replace('/', '-')}-{time.time_ns()}.unborn"
    log.warning("%s never got its header and is kept as %s", name, target)
    storage.rename(name, target)
    storage.sync_directory(SET_ASIDE)
    storage.sync_directory(layout.folder)


def _pass_over(storage: Storage, layout: Layout, state: Reopened) -> None:
    """The last file's header is damaged in both its copies: its bytes stay, a fresh file follows it."""
    number = state.numbers[-1]
    size = storage.size(layout.name_of(number))
    log.error("%s: both copies of its header are damaged", layout.name_of(number))
    state.ends[number] = size
    state.previous = state.acknowledged = Position(number, size)
    total = sum(storage.size(layout.name_of(each)) for each in state.numbers)
    state.sequence = total // RECORD_BYTES_MIN + 1  # beyond whatever those files can hold


def _open_last(
    storage: Storage, layout: Layout, state: Reopened, header: FileHeader, promised: Position
) -> None:
    number = state.numbers[-1]
    name = layout.name_of(number)
    file = storage.open(name, write=True)
    outside = promised.offset if promised.file == number else 0
    if promised.file > number:
        outside = aligned(file.size())
    tail = find_tail(file, Framing(header), start=outside, promised=outside, mark_kind=RecordKind.MARK)
    current = LogFile(name, file, header, tail.end)
    current.records_end = tail.records_end
    current.marked_end = tail.end if tail.last_is_mark else FILE_HEADER_BYTES
    current.allocated = file.size()
    state.sequence = tail.sequence
    state.ends[number] = tail.end
    state.previous = Position(number, tail.end)
    state.acknowledged = Position(number, tail.records_end)
    try:
        _confirm(storage, layout, current, tail)
        _cut(storage, layout, current, tail)
        state.current = current
    except OSError as error:
        # A fresh file is begun behind the last whole record, and this one keeps its bytes.
        log.error("%s can't be written after a crash: errno %s", name, error.errno)
        file.close()


def _confirm(storage: Storage, layout: Layout, current: LogFile, tail: Tail) -> None:
    """Write again what is whole and not known to have been synced. The file's name too may be known to the
    page cache alone: its maker may have ended before it synced the directory. Raises SyncFailed when the disk
    does not confirm that, OSError when there is nothing to confirm but the file."""
    start = max(tail.promised, FILE_HEADER_BYTES)
    for tries_left in reversed(range(_CONFIRM_TRIES)):
        try:
            for offset in range(start, tail.end, _COPY_BYTES):
                length = min(_COPY_BYTES, tail.end - offset)
                current.file.pwritev([current.file.read(offset, length)], offset)
            current.file.fdatasync()
            storage.sync_directory(layout.folder)
            return
        except OSError as error:
            if tail.end <= start:
                raise
            words = f"{current.name}: the disk does not confirm what a crash left (errno {error.errno})"
            log.warning("%s", words)
            if not tries_left:
                current.file.close()
                raise SyncFailed(words) from error


def _cut(storage: Storage, layout: Layout, current: LogFile, tail: Tail) -> None:
    """Cut what nobody was promised."""
    if tail.bytes_end > tail.end:
        _keep_aside(storage, layout, current, tail.end, tail.bytes_end)
        current.file.truncate(tail.end)
        current.allocated = tail.end
        current.file.fdatasync()


def _keep_aside(storage: Storage, layout: Layout, current: LogFile, start: int, end: int) -> None:
    name = f"{SET_ASIDE}/{layout.folder}-{current.number:08d}-{start}-{time.time_ns()}.cut"
    log.warning("%s: %d bytes that nobody was promised are cut, kept in %s", current.name, end - start, name)
    kept = storage.create(name)
    try:
        for offset in range(start, end, _COPY_BYTES):
            kept.pwritev([current.file.read(offset, min(_COPY_BYTES, end - offset))], offset - start)
        kept.fdatasync()
    finally:
        kept.close()
    storage.sync_directory(SET_ASIDE)
