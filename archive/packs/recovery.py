"""Reading a file of records back, and judging what a crash left of it. Only reads: `archive/packs/log.py`
cuts.

A record is believed when its header, its trailer and (where asked) its digest are right. Where one is not,
the question is whether anybody was promised it. Every later authentic header carries `durable_to`, a place
that was known to be synced before that header was written; the index and the watermark read only what was
synced. What lies below any of these was promised: it is damage, it is stepped over and its bytes stay.
Above all of them nobody was promised anything: there the file ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass

from archive.model import InstanceHead
from archive.packs.records import (
    ALIGNMENT,
    FILE_HEADER_BYTES,
    RECORD_BYTES_MIN,
    RECORD_HEADER_BYTES_MAX,
    RECORD_MAGIC,
    TRAILER_BYTES,
    TRAILER_MAGIC,
    Framing,
    RecordHeader,
)
from archive.packs.storage import AppendFile

_WINDOW_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FoundRecord:
    """A record that passed its checks. `prefix` is what the trailer covers: the whole payload of a
    reference."""

    number: int
    header: RecordHeader
    digest: bytes
    prefix: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch of a file that was promised and can't be read. The head is there when its header still is."""

    number: int
    offset: int
    end: int
    head: InstanceHead | None = None
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Tail:
    """Where a file ends after a crash. `records_end` is the end of its last record that is no MARK; from
    `bytes_end` on there are only zeros."""

    end: int
    records_end: int
    sequence: int
    promised: int
    bytes_end: int
    last_is_mark: bool


class Window:
    """A file read forwards through one buffer, so that small records do not cost a system call each."""

    def __init__(self, file: AppendFile, window_bytes: int = _WINDOW_BYTES) -> None:
        self._file = file
        self._window_bytes = window_bytes
        self._data = b""
        self._offset = 0

    def get(self, offset: int, length: int) -> memoryview:
        """The bytes there are of `length` at `offset`."""
        start = offset - self._offset
        if start < 0 or start + length > len(self._data):
            self._data = self._file.read(offset, max(length, self._window_bytes))
            self._offset = offset
            start = 0
        return memoryview(self._data)[start : start + length]


class RecordReader:
    """Reads the records of one file between its header and `stop`. The digests of those that end at a place
    in `gone` are not checked; who checks none at all may read through a small window."""

    def __init__(
        self,
        file: AppendFile,
        framing: Framing,
        stop: int,
        *,
        mark_kind: int,
        check_digests: bool = True,
        gone: Container[int] = (),
        window_bytes: int = _WINDOW_BYTES,
    ) -> None:
        self._window = Window(file, window_bytes)
        self._gone = gone
        self._file = file
        self._framing = framing
        self._stop = stop
        self._mark_kind = mark_kind
        self._check_digests = check_digests

    def header_at(self, offset: int) -> RecordHeader | None:
        data = self._window.get(offset, min(RECORD_HEADER_BYTES_MAX, self._stop - offset))
        return self._framing.decode(data, 0, offset)

    def record_at(self, offset: int) -> FoundRecord | Damage:
        """The record at `offset`, or a damage that ends where the next one may begin at the earliest."""
        if offset >= self._stop:
            return Damage(self._framing.header.number, offset, offset)
        header = self.header_at(offset)
        if header is None or header.end > self._stop or header.prefix_bytes > header.payload_bytes:
            return Damage(self._framing.header.number, offset, offset + ALIGNMENT)
        head = bytes(self._window.get(offset, header.header_bytes))
        prefix = bytes(self._window.get(header.payload_offset, header.prefix_bytes))
        trailer = self._window.get(header.trailer_offset, TRAILER_BYTES)
        digest = self._framing.decode_trailer(trailer, head, prefix, header.payload_bytes)
        if digest is None:
            return Damage(self._framing.header.number, offset, header.end, header.head)
        if (
            self._check_digests
            and header.end not in self._gone
            and not self._digest_matches(header, digest)
        ):
            return Damage(self._framing.header.number, offset, header.end, header.head, digest)
        return FoundRecord(self._framing.header.number, header, digest, prefix)

    def _digest_matches(self, header: RecordHeader, digest: bytes) -> bool:
        if header.payload_bytes == header.prefix_bytes and (
            header.is_reference or header.kind == self._mark_kind
        ):
            return (
                True  # a reference carries the digest of the pack it points to; both are covered by the check
            )
        running = hashlib.sha256()
        offset, left = header.payload_offset + header.prefix_bytes, header.payload_bytes - header.prefix_bytes
        while left:
            piece = self._window.get(offset, min(left, _PIECE_BYTES))
            if not piece:
                return False
            running.update(piece)
            offset += len(piece)
            left -= len(piece)
        return running.digest() == digest

    def record_before(self, offset: int) -> RecordHeader | None:
        """The header of the authentic record that ends exactly at `offset`, found by its trailer."""
        edge = max(offset - TRAILER_BYTES - ALIGNMENT, FILE_HEADER_BYTES)
        before = self._file.read(edge, offset - edge)
        place = before.rfind(TRAILER_MAGIC)
        if place < 0 or len(before) - place < TRAILER_BYTES:
            return None
        body_bytes = int.from_bytes(before[place + 8 : place + 16], "little")
        start = edge + place - body_bytes
        if start < FILE_HEADER_BYTES or start % ALIGNMENT:
            return None
        header = self.header_at(start)
        return header if header is not None and header.end == offset else None

    def next_header(self, offset: int) -> RecordHeader | None:
        """The first authentic header at or after `offset`."""
        while offset < self._stop:
            data = self._file.read(offset, min(_WINDOW_BYTES, self._stop - offset))
            place = data.find(RECORD_MAGIC)
            while place >= 0:
                if (offset + place) % ALIGNMENT == 0 and (
                    header := self.header_at(offset + place)
                ) is not None:
                    return header
                place = data.find(RECORD_MAGIC, place + 1)
            if len(data) < _WINDOW_BYTES:
                break
            offset += len(data) - ALIGNMENT  # a magic may lie across the edge
        return None

    def walk(self, start: int) -> Iterator[FoundRecord | Damage]:
        """Every record from `start` to the end, and what can't be read between them."""
        offset = start
        while offset < self._stop:
            item = self.record_at(offset)
            if isinstance(item, Damage):
                found = self.next_header(item.end if item.head is not None else offset + ALIGNMENT)
                end = self._stop if found is None else found.offset
                if item.head is not None and item.end < end:
                    yield item
                    item = Damage(item.number, item.end, end)
                else:
                    item = Damage(item.number, offset, end, item.head, item.digest)
                offset = end
            else:
                offset = item.header.end
            yield item


def find_tail(file: AppendFile, framing: Framing, *, start: int, promised: int, mark_kind: int) -> Tail:
    """Where the file ends: after its last whole record, but never below what anybody was promised.

    `start` is where reading may begin, if a record ends there; `promised` what is known from outside.
    """
    size = file.size()
    reader = RecordReader(file, framing, size, mark_kind=mark_kind)
    offset = records_end = FILE_HEADER_BYTES
    sequence = framing.header.first_sequence
    last_is_mark = searched = False
    before = reader.record_before(start) if FILE_HEADER_BYTES < start <= size else None
    if before is not None:  # a place from outside is not simply believed
        offset = records_end = start
        sequence, last_is_mark = before.sequence + 1, before.kind == mark_kind
    while True:
        item = reader.record_at(offset) if offset < size else None
        if isinstance(item, FoundRecord):
            header = item.header
            offset, sequence = header.end, header.sequence + 1
            if header.durable_to.file == framing.header.number:
                promised = max(promised, header.durable_to.offset)
            last_is_mark = header.kind == mark_kind
            if not last_is_mark:
                records_end = offset
            continue
        if not searched:
            promised = max(promised, _promised_behind(file, framing, offset, size, mark_kind))
            searched = True
        if offset >= promised:
            break
        following = reader.next_header(offset + ALIGNMENT)
        # Damage: go on behind it. What can't be read may hold as many records as would fit.
        sequence += (promised - offset) // RECORD_BYTES_MIN + 1
        offset = records_end = promised if following is None else min(promised, following.offset)
        last_is_mark = False
    return Tail(
        offset, records_end, sequence, min(promised, offset), _bytes_end(file, offset, size), last_is_mark
    )


def _promised_behind(file: AppendFile, framing: Framing, offset: int, size: int, mark_kind: int) -> int:
    """The furthest place that any authentic header behind a bad one promises."""
    reader = RecordReader(file, framing, size, mark_kind=mark_kind, check_digests=False)
    promised = 0
    found = reader.next_header(offset + ALIGNMENT)
    while found is not None:
        if found.durable_to.file == framing.header.number:
            promised = max(promised, found.durable_to.offset)
        # Hop over the payload only when the record is whole: a length is believed with its trailer.
        item = reader.record_at(found.offset)
        found = reader.next_header(
            item.header.end if isinstance(item, FoundRecord) else found.offset + ALIGNMENT
        )
    return promised


def _bytes_end(file: AppendFile, offset: int, size: int) -> int:
    """Just after the last byte that is not zero."""
    end = offset
    while offset < size:
        data = file.read(offset, min(_WINDOW_BYTES, size - offset))
        if not data:
            break
        kept = data.rstrip(b"\0")
        if kept:
            end = offset + len(kept)
        offset += len(data)
    return end
