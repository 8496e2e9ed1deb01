"""Packs looked at from outside: what each holds, whether it is whole, and its bytes out again. Only reads,
beside the process that writes or without one, and asks no index: facts say what was evicted or moved.

A pack that is being written ends where its writer has not promised anything yet: a record that is half there
behind that is no damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from enum import Enum

from archive.errors import Corrupt, NotFound
from archive.model import START, FactKind, Position, Record, RecordKind
from archive.packs import facts as factlog
from archive.packs import large
from archive.packs.dropping import Absences
from archive.packs.facts import FactReader
from archive.packs.logfiles import SET_ASIDE, Layout, read_records
from archive.packs.packs import LAYOUT, Packs, record_of
from archive.packs.records import (
    FILE_HEADER_BYTES,
    TRAILER_BYTES,
    FileHeader,
    Flag,
    Framing,
    RecordHeader,
    aligned,
)
from archive.packs.recovery import Damage, FoundRecord, RecordReader, find_tail
from archive.packs.reopening import is_unborn
from archive.packs.storage import AppendFile, Storage

_WINDOW_BYTES = 4096
_PIECE_BYTES = 1 << 20
_CUT = re.compile(rf"{SET_ASIDE}/{LAYOUT.folder}-(\d{{8}})-(\d+)-\d+\.cut", re.ASCII)


class State(Enum):
    """What a record of a pack is, by its kind and by facts."""

    LIVE = "live"
    CONFLICT = "conflict"
    EVICTED = "evicted"
    MOVED = "moved"


@dataclass(frozen=True, slots=True)
class Listed:
    """A record of a pack. `offset` is where its header stands; `record.location` where its payload does."""

    pack: str
    offset: int
    record: Record
    state: State


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a stretch of a pack. `sop_instance_uid` is empty when its header can't be read."""

    pack: str
    offset: int
    end: int
    sop_instance_uid: str
    words: str


@dataclass(slots=True)
class PackSummary:
    """One file: how large, what of it is on the disk, and what its records are."""

    name: str
    bytes: int
    allocated: int
    sealed: bool
    created_us: int = 0
    first_sequence: int = 0
    last_sequence: int = 0
    counts: dict[State, int] = field(default_factory=lambda: dict.fromkeys(State, 0))
    damaged: int = 0
    goes: bool = False


class LogView:
    """A log of numbered files that another process may be writing."""

    def __init__(self, storage: Storage, layout: Layout, *, promised: Position = START) -> None:
        self._storage = storage
        self._layout = layout
        self.numbers = sorted(layout.files(storage))
        if self.numbers and is_unborn(storage, layout, self.numbers[-1], promised):
            self.numbers.pop()  # its writer is just beginning it, or a crash came before its header
        self.headers: dict[int, FileHeader] = {}
        for number in self.numbers:
            with contextlib.suppress(OSError):
                header = layout.header_of(storage, number)
                if header is not None:
                    self.headers[number] = header
        self.ends = {h.previous.file: h.previous.offset for h in self.headers.values()}
        self.durable = START
        if self.numbers:
            last = self.numbers[-1]
            self.ends[last] = self._tail(last, promised)
            self.durable = Position(last, self.ends[last])

    def _tail(self, number: int, promised: Position) -> int:
        file = self._storage.reader(self._layout.name_of(number))
        header = self.headers.get(number)
        if header is None:
            return file.size()
        place = promised.offset if promised.file == number else 0
        return find_tail(file, Framing(header), start=place, promised=place, mark_kind=RecordKind.MARK).end

    def end_of(self, number: int) -> int:
        size = self._storage.size(self._layout.name_of(number))
        return self.ends.get(number, size)

    def read(
        self, start: Position, stop: Position, *, check_digests: bool = True
    ) -> Iterator[FoundRecord | Damage]:
        return read_records(
            self._storage, self._layout, self.numbers, self.ends, start, stop, check_digests=check_digests
        )

    def reader(
        self, number: int, *, gone: Container[int] = (), check_digests: bool = False
    ) -> RecordReader | None:
        """The records of one file; None when its header is damaged."""
        header = self.headers.get(number)
        if header is None:
            return None
        return RecordReader(
            self._storage.reader(self._layout.name_of(number)), Framing(header), self.end_of(number),
            mark_kind=RecordKind.MARK, check_digests=check_digests, gone=gone,
            window_bytes=_PIECE_BYTES if check_digests else _WINDOW_BYTES,
        )  # fmt: skip


class Survey:
    """The packs of one state folder, as they are when it is made."""

    def __init__(self, storage: Storage, *, promised: Position = START) -> None:
        """`promised` is what the writer says that it has acknowledged (its watermark)."""
        self.storage = storage
        self.packs = Packs.open_to_read(storage)
        self._log = LogView(storage, LAYOUT, promised=promised)
        facts = FactReader(storage, LogView(storage, factlog.LAYOUT))
        self._absences = Absences.read(facts)
        self._told: tuple[int, dict[int, FactKind]] = (0, {})

    @property
    def names(self) -> list[str]:
        """The packs that there are, in the order in which they were begun; own packs are not among them."""
        return [LAYOUT.name_of(number) for number in self._log.numbers]

    def number_of(self, text: str) -> int:
        """The pack that a person means: its number or its name. NotFound when there is none."""
        number = int(text) if text.isdecimal() else LAYOUT.number_of(text)
        if number not in self._log.numbers:
            raise NotFound(f"there is no pack {text!r}; `miss packs ls` lists them")
        return number

    def summary(self, number: int) -> PackSummary:
        """What a pack holds; its headers and trailers are read, its payloads are not."""
        name = LAYOUT.name_of(number)
        header = self._log.headers.get(number)
        found = PackSummary(
            name, self.storage.size(name), self.storage.allocated(name), number != self._log.numbers[-1],
            goes=number in self._absences.dropped,
        )  # fmt: skip
        if header is not None:
            found.created_us, found.first_sequence = header.created_us, header.first_sequence
        for item in self.records(number):
            if isinstance(item, Finding):
                found.damaged += 1
            else:
                found.counts[item.state] += 1
                found.last_sequence = item.record.sequence
        return found

    def missing(self) -> list[Finding]:
        """Packs that others say they followed, that are not there, and of which no fact says that they went
        on purpose."""
        there = {*self._log.numbers, *self._absences.dropped, 0}
        return [
            Finding(LAYOUT.name_of(header.previous.file), 0, header.previous.offset, "", "it is gone")
            for header in self._log.headers.values()
            if header.previous.file not in there
        ]

    def own_packs(self) -> tuple[int, int]:
        """How many large objects have a pack of their own here, and what these take."""
        names = self.storage.list(large.FOLDER)
        return len(names), sum(self.storage.allocated(name) for name in names)

    def records(self, number: int) -> Iterator[Listed | Finding]:
        """The records of a pack in their order, no payload read."""
        yield from self._walk(number, check_digests=False)

    def verify(self, number: int, took: Callable[[int], None]) -> Iterator[Listed | Finding]:
        """The same with every byte read and compared with its digest, own packs too; `took` is told how many
        bytes were read, and may pause."""
        for item in self._walk(number, check_digests=True):
            if isinstance(item, Finding):
                took(item.end - item.offset)
                yield item
                continue
            location = item.record.location
            if location.pack.startswith(large.FOLDER) and item.state in (State.LIVE, State.CONFLICT):
                problem = self._verify_own(item.record, took)
                if problem:
                    yield Finding(
                        location.pack, location.offset, location.offset + location.length,
                        item.record.head.sop_instance_uid, problem,
                    )  # fmt: skip
                    continue
            else:
                took(location.length)
            yield item

    def _walk(self, number: int, *, check_digests: bool) -> Iterator[Listed | Finding]:
        name = LAYOUT.name_of(number)
        told = {end: fact.kind for end, fact in self._absences.facts(number).items()}
        reader = self._log.reader(number, gone=told.keys(), check_digests=check_digests)
        if reader is None:
            yield Finding(name, 0, self._log.end_of(number), "", "both copies of its header are damaged")
            return
        size, end = self.storage.size(name), self._log.end_of(number)
        if size < end:
            yield Finding(name, size, end, "", "it is shorter than it was")
        for item in reader.walk(FILE_HEADER_BYTES):
            if isinstance(item, Damage):
                yield _finding(name, item)
            elif item.header.kind != RecordKind.MARK:
                yield Listed(name, item.header.offset, record_of(item), _state(item, told))

    def _verify_own(self, record: Record, took: Callable[[int], None]) -> str:
        """What is wrong with a pack of its own, in words; empty when nothing is."""
        location = record.location
        try:
            file = self._own(location.pack)
            header = FileHeader.decode(file.read(0, FILE_HEADER_BYTES))
            if header is None:
                return "both copies of its header are damaged"
            framing = Framing(header)
            data = file.read(FILE_HEADER_BYTES, location.offset - FILE_HEADER_BYTES)
            if framing.decode(data, 0, FILE_HEADER_BYTES) is None:
                return "its record's header is damaged"
            prefix = file.read(location.offset, location.dataset_offset)
            trailer = file.read(location.offset + location.length, TRAILER_BYTES)
            if framing.decode_trailer(trailer, data, prefix, location.length) != record.digest:
                return "its trailer is damaged"
            running = hashlib.sha256()
            for place in range(location.dataset_offset, location.length, _PIECE_BYTES):
                piece = file.read(location.offset + place, min(_PIECE_BYTES, location.length - place))
                running.update(piece)
                took(len(piece))
        except FileNotFoundError:
            return "the pack of this large object is gone"
        except OSError as error:
            return f"it can't be read (errno {error.errno})"
        return "" if running.digest() == record.digest else "it does not match its digest"

    def _own(self, pack: str) -> AppendFile:
        try:
            return self.storage.reader(pack)
        except FileNotFoundError:
            return self.storage.reader(large.part_name(pack))


def _state(item: FoundRecord, told: dict[int, FactKind]) -> State:
    kind = told.get(item.header.end)
    if kind is not None:
        return State.EVICTED if kind is FactKind.EVICTED else State.MOVED
    return State.LIVE if item.header.kind == RecordKind.INSTANCE else State.CONFLICT


def _finding(name: str, damage: Damage) -> Finding:
    uid = damage.head.sop_instance_uid if damage.head is not None else ""
    if damage.digest:
        words = "its bytes do not match its digest"
    else:
        words = "its trailer is damaged" if uid else "no record can be read here"
    return Finding(name, damage.offset, damage.end, uid, words)


# What was set aside


class _Shifted:
    """A piece of a file, read by the places that it had there."""

    def __init__(self, file: AppendFile, start: int) -> None:
        self._file = file
        self._start = start

    def read(self, offset: int, length: int) -> bytes:
        before = max(self._start - offset, 0)
        if before >= length:
            return bytes(length)
        return bytes(before) + self._file.read(max(offset - self._start, 0), length - before)

    def size(self) -> int:
        return self._start + self._file.size()


@dataclass(frozen=True, slots=True)
class Salvaged:
    """An object in a file that was set aside, whole by its digest."""

    record_header: RecordHeader
    digest: bytes
    chunks: Callable[[], Iterator[bytes]]


def salvage(storage: Storage, name: str) -> Iterator[Salvaged | Finding]:
    """The whole objects in a file of `set-aside/`. NotFound when there is no such file, Corrupt when the pack
    that it was cut from is gone: its header is needed to tell records from other bytes."""
    try:
        file = storage.reader(name)
    except FileNotFoundError:
        raise NotFound(f"there is no {name!r}") from None
    cut = _CUT.fullmatch(name)
    if cut is None:
        yield from _salvage_own(file, name)
        return
    number, start = int(cut.group(1)), int(cut.group(2))
    try:
        header = LAYOUT.header_of(storage, number)
    except FileNotFoundError:
        header = None
    if header is None:
        raise Corrupt(f"{LAYOUT.name_of(number)}, from which this was cut, is gone or has no header")
    shifted = _Shifted(file, start)
    end = aligned(shifted.size())  # it was cut behind its last byte that is not zero
    reader = RecordReader(shifted, Framing(header), end, mark_kind=RecordKind.MARK)  # type: ignore[arg-type]
    for item in reader.walk(start):
        if isinstance(item, Damage):
            yield _finding(name, item)
        elif item.header.kind != RecordKind.MARK and not item.header.is_reference:
            place, length = item.header.payload_offset - start, item.header.payload_bytes
            yield Salvaged(item.header, item.digest, lambda p=place, n=length: _chunks(file, p, n))  # type: ignore[misc]


def _salvage_own(file: AppendFile, name: str) -> Iterator[Salvaged | Finding]:
    """A large object that was being written: whole when its trailer got there."""
    size = file.size()
    header = FileHeader.decode(file.read(0, FILE_HEADER_BYTES))
    if header is None:
        yield Finding(name, 0, size, "", "it has no header")
        return
    framing = Framing(header)
    data = file.read(FILE_HEADER_BYTES, _WINDOW_BYTES)
    found = framing.decode(data, 0, FILE_HEADER_BYTES)
    if found is None or not found.flags & Flag.STREAMED:
        yield Finding(name, FILE_HEADER_BYTES, size, "", "no record can be read here")
        return
    uid = found.head.sop_instance_uid
    length = size - TRAILER_BYTES - found.payload_offset
    prefix = file.read(found.payload_offset, found.prefix_bytes)
    trailer = file.read(size - TRAILER_BYTES, TRAILER_BYTES)
    digest = framing.decode_trailer(trailer, data[: found.header_bytes], prefix, length)
    if digest is None:
        yield Finding(name, found.offset, size, uid, "it was not written to its end")
        return
    running = hashlib.sha256()
    for chunk in _chunks(file, found.payload_offset + found.prefix_bytes, length - found.prefix_bytes):
        running.update(chunk)
    if running.digest() != digest:
        yield Finding(name, found.offset, size, uid, "its bytes do not match its digest")
        return
    yield Salvaged(found, digest, lambda: _chunks(file, found.payload_offset, length))


def _chunks(file: AppendFile, offset: int, length: int) -> Iterator[bytes]:
    for place in range(offset, offset + length, _PIECE_BYTES):
        yield file.read(place, min(_PIECE_BYTES, offset + length - place))
