"""The replay of packs and facts into an index that is behind them, when an archive is opened, or into a new
one. What can't be read on the way becomes damage facts, which are for others to record.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from archive.index.index import Index
from archive.model import Fact, FactKind, IndexEntry, Position, Record
from archive.packs.dropping import Absences, read_with_absences
from archive.packs.facts import FactLog
from archive.packs.packs import Packs
from archive.packs.recovery import Damage
from archive.poison import apply_around_poison
from archive.rereading import Rereader, read_or_told

log = logging.getLogger(__name__)

BATCH_RECORDS_MAX = 1000


@dataclass(slots=True)
class Replay:
    """Reads packs and facts into an index, in the order in which they were applied when they were new."""

    index: Index
    packs: Packs
    facts: FactLog
    outbox: bool
    before: Callable[[Sequence[IndexEntry]], None] = lambda entries: None  # told of records not yet indexed
    position: Position = field(init=False)
    facts_position: Position = field(init=False)
    records: int = 0
    fact_count: int = 0
    damages: list[Fact] = field(default_factory=list)
    _absences: Absences = field(init=False)

    def run(self, position: Position, facts_position: Position) -> None:
        self.position, self.facts_position = position, facts_position
        self._absences = Absences.read(self.facts, facts_position)
        # The index outlives this, and what it remembers of facts.
        rereader = Rereader(self.packs, self.facts)
        self.index.read_attributes_with(rereader, rereader.forget)
        for batch in self.facts.read(facts_position):
            if batch.after > self.position:
                self._read_packs(batch.after)
            self.index.apply_facts(batch.facts, batch.end, outbox=self.outbox)
            self.facts_position = batch.end
            self.fact_count += len(batch.facts)
        self._read_packs(self.packs.log.durable)

    def _read_packs(self, stop: Position) -> None:
        if stop <= self.position:
            return
        for entries, position in _batches(self._entries(stop)):
            self.before(entries)
            poison = apply_around_poison(self.index, entries, position, outbox=self.outbox)
            self.damages += [damage_fact(damage_of(entry.record)) for entry in poison]
            self.records += len(entries)
            if self.records // 10_000 > (self.records - len(entries)) // 10_000:
                log.info("%d records read from the packs", self.records)
        self.index.apply((), stop, outbox=self.outbox)
        self.position = stop

    def _entries(self, stop: Position) -> Iterator[IndexEntry]:
        for item in read_with_absences(self.packs, self._absences, self.position, stop):
            if isinstance(item, Damage):
                self.damages.append(damage_fact(item))
                continue
            if isinstance(item, IndexEntry):
                yield item
                continue
            attributes = read_or_told(self.packs, item, lambda: self._absences)
            if attributes is None:
                self.damages.append(damage_fact(damage_of(item)))
            else:
                yield IndexEntry(item, attributes)


def damage_fact(damage: Damage) -> Fact:
    """A fact about a stretch that can't be read. It names no digest: a good copy may come again, and this
    must not be held against it."""
    uid = damage.head.sop_instance_uid if damage.head is not None else ""
    ward = damage.head.provenance.ward if damage.head is not None else ""
    place = f"pack {damage.number} from {damage.offset} to {damage.end}"
    log.error("damaged: %s", place)
    return Fact(FactKind.DAMAGE, uid, b"", ward, time.time_ns() // 1000, place)


def damage_of(record: Record) -> Damage:
    """A record whose bytes are as they were written and can't be read all the same, or whose own pack is
    gone."""
    return Damage(record.end.file, record.location.offset, record.end.offset, record.head, record.digest)


def _batches(entries: Iterable[IndexEntry]) -> Iterator[tuple[list[IndexEntry], Position]]:
    batch: list[IndexEntry] = []
    for entry in entries:
        batch.append(entry)
        if len(batch) >= BATCH_RECORDS_MAX:
            yield batch, batch[-1].record.end
            batch = []
    if batch:
        yield batch, batch[-1].record.end
