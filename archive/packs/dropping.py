"""What facts say of packs that are gone on purpose, and of records that are no longer whole where they were
written. Reads facts; drops nothing.

An eviction, and the dropping of a pack, leave in the fact log what stood there: the record, and what the
index keeps of it. A reader of the packs gives it in the record's place, so that an index made anew equals the
one it replaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from archive.errors import Corrupt
from archive.model import START, Fact, FactKind, IndexEntry, Position, Record
from archive.packs.facts import FactReader
from archive.packs.packs import LAYOUT, Packs
from archive.packs.recovery import Damage

_RECENT_BATCHES = 8  # of entries that were asked for one by one

ABSENCE_KINDS = frozenset({FactKind.EVICTED, FactKind.MOVED, FactKind.DROPPED})


@dataclass(frozen=True, slots=True)
class Drop:
    """A pack that goes: everything below `end` is told by facts, and the file may be removed at `due_us`."""

    end: Position
    due_us: int

    @property
    def pack(self) -> str:
        return LAYOUT.name_of(self.end.file)


def drop_fact(drop: Drop, at_us: int) -> Fact:
    detail = json.dumps({"file": drop.end.file, "end": drop.end.offset, "due_us": drop.due_us})
    return Fact(FactKind.DROPPED, "", b"", "", at_us, detail)


def drop_of(fact: Fact) -> Drop:
    try:
        body = json.loads(fact.detail)
        return Drop(Position(body["file"], body["end"]), body["due_us"])
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt("a fact about a dropped pack can't be read") from error


@dataclass(slots=True)
class Absences:
    """What facts say of the packs from some place on. Holds which batches speak of which pack; the entries
    are read again one pack at a time."""

    _facts: FactReader
    _batches: dict[int, list[Position]] = field(default_factory=dict)
    dropped: dict[int, Drop] = field(default_factory=dict)
    _contents: dict[bytes, Position] | None = None
    _recent: dict[Position, dict[tuple[str, bytes], IndexEntry]] = field(default_factory=dict)

    @classmethod
    def read(cls, facts: FactReader, start: Position = START) -> Absences:
        """From the facts behind `start`. Who has read the packs up to a place needs only those behind the
        facts that it had read by then: what came later alone speaks of later records."""
        self = cls(facts)
        for batch in facts.read(start, kinds=ABSENCE_KINDS):
            files = set()
            for fact in batch.facts:
                if fact.kind is FactKind.DROPPED:
                    drop = drop_of(fact)
                    self.dropped[drop.end.file] = drop
                elif fact.kind in ABSENCE_KINDS and fact.entry is not None:
                    files.add(fact.entry.record.end.file)
            for number in files:
                self._batches.setdefault(number, []).append(batch.start)
        return self

    def files(self, start: Position, stop: Position) -> list[int]:
        """The packs between two places of which facts speak."""
        found = self._batches.keys() | self.dropped.keys()
        return sorted(number for number in found if start.file <= number <= stop.file)

    def entries(self, number: int) -> dict[int, IndexEntry]:
        """What stood in a pack and is told by facts, by where each record ended, in that order."""
        return {offset: fact.entry for offset, fact in self.facts(number).items() if fact.entry is not None}

    def facts(self, number: int) -> dict[int, Fact]:
        """The same as facts; where two speak of one record, that it was evicted counts."""
        found: dict[int, Fact] = {}
        for start in self._batches.get(number, ()):
            for fact in self._batch(start):
                if fact.kind not in ABSENCE_KINDS or fact.entry is None:
                    continue
                end = fact.entry.record.end
                known = found.get(end.offset)
                if end.file == number and (known is None or known.kind is not FactKind.EVICTED):
                    found[end.offset] = fact
        return dict(sorted(found.items()))

    def entry_of(self, sop_instance_uid: str, digest: bytes) -> IndexEntry | None:
        """The last that facts tell of a content; its first call looks through all of them."""
        if self._contents is None:
            self._contents = {}
            for start in sorted({start for starts in self._batches.values() for start in starts}):
                for fact in self._batch(start):
                    if fact.entry is not None:
                        self._contents[fact.digest[:16]] = start
        start = self._contents.get(digest[:16], START)
        entries = self._recent.pop(start, None)  # many that are asked for lie in few batches
        if entries is None:
            entries = {(f.sop_instance_uid, f.digest): f.entry for f in self._batch(start) if f.entry}
        self._recent[start] = entries
        if len(self._recent) > _RECENT_BATCHES:
            del self._recent[next(iter(self._recent))]
        return entries.get((sop_instance_uid, digest))

    def _batch(self, start: Position) -> tuple[Fact, ...]:
        batch = next(self._facts.read(start, kinds=ABSENCE_KINDS), None)
        return batch.facts if batch is not None and batch.start == start else ()


def read_with_absences(
    packs: Packs, absences: Absences, start: Position, stop: Position
) -> Iterator[Record | IndexEntry | Damage]:
    """The records between two places, in their order; what facts tell of a record stands in its place."""
    place = start
    for number in absences.files(start, stop):
        first = Position(number, 0)
        if place < first:
            yield from packs.read(place, first)
        place = max(place, first)
        yield from _read_file(packs, absences, place, min(Position(number + 1, 0), stop))
        place = Position(number + 1, 0)
    if place < stop:
        yield from packs.read(place, stop)


def _read_file(
    packs: Packs, absences: Absences, start: Position, stop: Position
) -> Iterator[Record | IndexEntry | Damage]:
    last = stop.offset if stop.file == start.file else None
    told = {
        end: entry
        for end, entry in absences.entries(start.file).items()
        if end > start.offset and (last is None or end <= last)
    }
    if start.file in absences.dropped:
        yield from told.values()
        return
    waiting = list(told)[::-1]
    for item in packs.read(start, stop, gone=told.keys()):
        end = item.end if isinstance(item, Damage) else item.end.offset
        while waiting and waiting[-1] < end:  # its own header is damaged too
            yield told[waiting.pop()]
        if waiting and waiting[-1] == end:
            yield told[waiting.pop()]
            if not isinstance(item, Damage) or item.head is not None:
                continue
        yield item
    yield from (told[end] for end in reversed(waiting))
