"""What a pack still holds: its records, read by their headers and trailers alone, each beside what the index
says of its content. It decides nothing; eviction and compaction do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from archive.errors import Corrupt
from archive.index.index import Index
from archive.index.space import Place
from archive.model import Location, Position, Record, RecordKind
from archive.packs import large
from archive.packs.packs import LAYOUT, Packs, record_of
from archive.packs.records import (
    ALIGNMENT,
    FILE_HEADER_BYTES,
    RECORD_HEADER_BYTES_MAX,
    FileHeader,
    Framing,
)
from archive.packs.recovery import Damage, FoundRecord, RecordReader

_CHUNK = 500
_WINDOW_BYTES = 4096  # a header at a time: the payloads are not read


class State(Enum):
    """What the index says of a record."""

    LIVE = "live"            # served from here, or was until it was removed
    CONFLICT = "conflict"    # kept here, not served
    EVICTED = "evicted"      # its bytes were given up here
    ELSEWHERE = "elsewhere"  # its content lies at another place by now
    UNKNOWN = "unknown"      # the index does not have this content


@dataclass(frozen=True, slots=True)
class Held:
    """A record of a pack and what the index says of it; `place` is None when it is unknown there."""

    record: Record
    state: State
    place: Place | None


def holdings(packs: Packs, index: Index, number: int, end: int) -> Iterator[list[Held | Damage]]:
    """The records of the pack `number`, which ends at `end`, in their order, some hundred at a time."""
    chunk: list[Record | Damage] = []
    for item in records(packs, number, FILE_HEADER_BYTES, end):
        chunk.append(item)
        if len(chunk) >= _CHUNK:
            yield _held(index, chunk)
            chunk = []
    if chunk:
        yield _held(index, chunk)


def records(packs: Packs, number: int, start: int, end: int) -> Iterator[Record | Damage]:
    """The records of a pack between two places, no digest checked; Corrupt when the pack has no header."""
    reader = _reader(packs, number, end)
    for item in reader.walk(start):
        if isinstance(item, Damage):
            yield item
        elif item.header.kind != RecordKind.MARK:
            yield record_of(item)


def record_at(packs: Packs, sop_instance_uid: str, digest: bytes, location: Location) -> Record | None:
    """The record of a content, by where its payload lies."""
    if location.pack.startswith(large.FOLDER):
        return _reference_to(packs, digest, location)
    number = LAYOUT.number_of(location.pack)
    with contextlib.suppress(OSError, Corrupt):
        reader = _reader(packs, number, packs.storage.size(location.pack))
        first = max(location.offset - RECORD_HEADER_BYTES_MAX, FILE_HEADER_BYTES) // ALIGNMENT * ALIGNMENT
        for offset in range(first, location.offset, ALIGNMENT):
            header = reader.header_at(offset)
            if header is None or header.payload_offset != location.offset:
                continue
            item = reader.record_at(offset)
            if isinstance(item, FoundRecord) and (item.header.head.sop_instance_uid, item.digest) == (
                sop_instance_uid, digest
            ):  # fmt: skip
                return record_of(item)
    return None


def _reference_to(packs: Packs, digest: bytes, location: Location) -> Record | None:
    """The record that refers to a pack of its own: behind where the log ended when that pack was begun."""
    try:
        own = FileHeader.decode(packs.storage.reader(location.pack).read(0, FILE_HEADER_BYTES))
    except OSError:
        return None
    start = own.previous if own is not None else Position(1, 0)
    durable = packs.log.durable
    for number, end in {**packs.log.sealed(), durable.file: durable.offset}.items():
        if number < start.file:
            continue
        with contextlib.suppress(OSError, Corrupt):
            first = max(start.offset if number == start.file else 0, FILE_HEADER_BYTES)
            for item in records(packs, number, first, end):
                if isinstance(item, Record) and item.location == location and item.digest == digest:
                    return item
    return None


def _reader(packs: Packs, number: int, end: int) -> RecordReader:
    header = LAYOUT.header_of(packs.storage, number)
    if header is None:
        raise Corrupt("the header of a pack is damaged")
    file = packs.storage.reader(LAYOUT.name_of(number))
    return RecordReader(
        file, Framing(header), end, mark_kind=RecordKind.MARK, check_digests=False, window_bytes=_WINDOW_BYTES
    )


def _held(index: Index, chunk: list[Record | Damage]) -> list[Held | Damage]:
    places = index.places(item.head.sop_instance_uid for item in chunk if isinstance(item, Record))
    held: list[Held | Damage] = []
    for item in chunk:
        if isinstance(item, Damage):
            held.append(item)
            continue
        place = places.get((item.head.sop_instance_uid, item.digest))
        held.append(Held(item, _state(item, place), place))
    return held


def _state(record: Record, place: Place | None) -> State:
    if place is None:
        return State.UNKNOWN
    if place.location != record.location:
        return State.ELSEWHERE
    if place.evicted:
        return State.EVICTED
    return State.LIVE if place.live or place.removed else State.CONFLICT
