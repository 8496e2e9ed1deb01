"""The indexer: brings what is durable in packs and facts into the index, in order, each in transactions of
its own that also store how far it got. It writes nothing else and decides nothing: the kind of a record is
the decision.

It works in batches, a short moment after the sync: many records share a transaction when nobody waits for
them, and whoever does wait cuts the moment short.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from archive.dataset.header import scan
from archive.errors import Corrupt, Evicted, InvalidInput, MissError, NotFound, TooLarge, Unavailable
from archive.index.index import Index
from archive.model import Attributes, Fact, FactKind, IndexEntry, Position, Record
from archive.packs.dropping import Absences, read_with_absences
from archive.packs.facts import FactLog
from archive.packs.packs import Packs
from archive.packs.recovery import Damage
from archive.poison import apply_around_poison
from archive.recent import Recent

log = logging.getLogger(__name__)

BATCH_RECORDS_MAX = 1000
# 500 in a transaction cost 42 us each, 50 cost 87; where many come, more are waited for. A search that waits
# cuts it short.
_GATHER_S = (0.08, 0.17)
_MANY = 100
_IDLE_S = 0.2
_RETRY_S_MAX = 2.0
_CLOSE_S_MAX = 30.0


class Indexer:
    """The one thread that writes an archive's index. `retry_s` is how long a failed transaction waits at
    first."""

    def __init__(
        self,
        index: Index,
        packs: Packs,
        facts: FactLog,
        recent: Recent,
        *,
        outbox: bool,
        on_idle: Callable[[], None],
    ) -> None:
        self._index = index
        self._packs = packs
        self._facts = facts
        self._recent = recent
        self._outbox = outbox
        self._on_idle = on_idle
        self._writing = threading.Lock()  # of the index: records and facts keep one order
        self._position, self._facts_position = index.positions()
        index.read_attributes_with(lambda record: read_or_told(packs, record, lambda: Absences.read(facts)))
        self._moved = threading.Condition()
        self._ready = threading.Event()
        self._urgent = threading.Event()
        self._closing = False
        self._failing = False
        self._facts_behind = False  # facts are in their log and not in the index
        self._thread = threading.Thread(target=self._run, name="indexer", daemon=True)

    @property
    def position(self) -> Position:
        """Everything below is in the index."""
        return self._position

    @property
    def failing(self) -> bool:
        """Whether the index refused the last transaction."""
        return self._failing

    def start(self) -> None:
        """Catch up with the logs, then go on in a thread of its own."""
        with self._writing:
            self._catch_up()
        self._thread.start()

    def close(self) -> None:
        """Bring in what is durable, if the index lets us, and end."""
        self._closing = True
        self._urgent.set()
        self._ready.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S_MAX)

    def wake(self) -> None:
        """Something became durable."""
        if not self._ready.is_set():
            self._ready.set()

    def wait(self, target: Position, timeout_s: float) -> None:
        """Return when everything below `target` is in the index; Unavailable when that takes too long."""
        if self._position >= target:
            return
        deadline = time.monotonic() + timeout_s
        with self._moved:
            while self._position < target:
                self._urgent.set()
                left = deadline - time.monotonic()
                if left <= 0 or self._closing:
                    raise Unavailable("the index has not caught up yet")
                self._moved.wait(min(left, 0.5))

    def wait_for_room(self, records_max: int, timeout_s: float) -> bool:
        """Whether fewer than `records_max` wait for the index, at once or within `timeout_s` of its work."""
        deadline = time.monotonic() + timeout_s
        with self._moved:
            while len(self._recent) >= records_max:
                left = deadline - time.monotonic()
                if left <= 0 or self._failing or self._closing:
                    return False
                self._urgent.set()
                self._moved.wait(min(left, 0.5))
        return True

    def record_facts(self, facts: Sequence[Fact]) -> None:
        """Sync facts and apply them. When the index does not answer they are in the log all the same, and are
        applied when it does: then this raises Unavailable."""
        with self._writing:
            try:
                self._record_facts(facts)
            except Unavailable:
                self.wake()
                raise

    def _record_facts(self, facts: Sequence[Fact]) -> None:
        end = self._facts.record(facts, after=self._position)
        try:
            if self._facts_behind:
                self._apply_missed_facts()
            else:
                self._facts_behind = True
                self._index.apply_facts(facts, end, outbox=self._outbox)
                self._facts_position, self._facts_behind = end, False
        except MissError as error:
            raise Unavailable("the index does not answer; the facts are kept and will be applied") from error

    def _apply_missed_facts(self) -> None:
        for batch in self._facts.read(self._facts_position):
            self._index.apply_facts(batch.facts, batch.end, outbox=self._outbox)
            self._facts_position = batch.end
        self._facts_behind = False

    # The thread

    def _run(self) -> None:
        retry_s = 0.05
        while True:
            try:
                busy = self._step()
                retry_s = 0.05
                self._failing = False
                if self._closing and not busy:
                    return
            except MissError as error:
                self._failing = True
                with self._moved:
                    self._moved.notify_all()
                if self._closing:
                    log.warning("closed before the index had caught up: %s", error)
                    return
                log.warning("the index does not take records, next try in %.2f s: %s", retry_s, error)
                time.sleep(retry_s)
                retry_s = min(retry_s * 2, _RETRY_S_MAX)
            except Exception:
                log.exception("the indexer met an error it does not know")
                self._failing = True
                if self._closing:
                    return
                time.sleep(_RETRY_S_MAX)

    def _step(self) -> bool:
        """One batch; waits for work when there is none. False when there was none."""
        with self._writing:
            if self._facts_behind:
                self._apply_missed_facts()
        entries = self._recent.durable(BATCH_RECORDS_MAX)
        if not entries:
            self._urgent.clear()
            if not self._ready.wait(_IDLE_S) and not self._closing:
                self._on_idle()
            self._ready.clear()
            return bool(len(self._recent.durable(1)))
        for pause_s in _GATHER_S:
            if len(entries) >= BATCH_RECORDS_MAX or self._closing or self._urgent.wait(pause_s):
                break
            entries = self._recent.durable(BATCH_RECORDS_MAX)
            if len(entries) < _MANY:
                break
        self._urgent.clear()
        position = entries[-1].written.record.end
        found: list[IndexEntry] = []
        damages: list[Fact] = []
        for entry in entries:
            record = entry.written.record
            attributes = entry.attributes or read_attributes(self._packs, record)
            if attributes is None:
                damages.append(_damage_fact(_whole(record)))
            else:
                found.append(IndexEntry(record, attributes))
        with self._writing:
            if self._facts_behind:
                self._apply_missed_facts()  # what was decided before these records came
            damages += self._apply(found, position)
            if damages:
                self._record_facts(damages)
        return True

    def _apply(self, entries: Sequence[IndexEntry], position: Position) -> list[Fact]:
        """Bring records in; what is to be said of those that the index can't take."""
        poison = apply_around_poison(self._index, entries, position, outbox=self._outbox)
        self._position = max(self._position, position)
        self._recent.retire(position)
        with self._moved:
            self._moved.notify_all()
        return [_damage_fact(_whole(entry.record)) for entry in poison]

    def _catch_up(self) -> None:
        replay = Replay(self._index, self._packs, self._facts, outbox=self._outbox)
        replay.run(self._position, self._facts_position)
        self._position, self._facts_position = replay.position, replay.facts_position
        if replay.damages:
            self._record_facts(replay.damages)


@dataclass(slots=True)
class Replay:
    """Reads packs and facts into an index, in the order in which they were applied when they were new."""

    index: Index
    packs: Packs
    facts: FactLog
    outbox: bool
    position: Position = field(init=False)
    facts_position: Position = field(init=False)
    records: int = 0
    fact_count: int = 0
    damages: list[Fact] = field(default_factory=list)
    _absences: Absences = field(init=False)

    def run(self, position: Position, facts_position: Position) -> None:
        self.position, self.facts_position = position, facts_position
        self._absences = Absences.read(self.facts, facts_position)
        self.index.read_attributes_with(
            lambda record: read_or_told(self.packs, record, lambda: Absences.read(self.facts))
        )
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
            poison = apply_around_poison(self.index, entries, position, outbox=self.outbox)
            self.damages += [_damage_fact(_whole(entry.record)) for entry in poison]
            self.records += len(entries)
            if self.records // 10_000 > (self.records - len(entries)) // 10_000:
                log.info("%d records read from the packs", self.records)
        self.index.apply((), stop, outbox=self.outbox)
        self.position = stop

    def _entries(self, stop: Position) -> Iterator[IndexEntry]:
        for item in read_with_absences(self.packs, self._absences, self.position, stop):
            if isinstance(item, Damage):
                self.damages.append(_damage_fact(item))
                continue
            if isinstance(item, IndexEntry):
                yield item
                continue
            attributes = read_or_told(self.packs, item, lambda: self._absences)
            if attributes is None:
                self.damages.append(_damage_fact(_whole(item)))
            else:
                yield IndexEntry(item, attributes)


def _damage_fact(damage: Damage) -> Fact:
    """A fact about a stretch that can't be read. It names no digest: a good copy may come again, and this
    must not be held against it."""
    uid = damage.head.sop_instance_uid if damage.head is not None else ""
    ward = damage.head.provenance.ward if damage.head is not None else ""
    place = f"pack {damage.number} from {damage.offset} to {damage.end}"
    log.error("damaged: %s", place)
    return Fact(FactKind.DAMAGE, uid, b"", ward, time.time_ns() // 1000, place)


def _whole(record: Record) -> Damage:
    """A record whose bytes are as they were written and can't be read all the same, or whose own pack is
    gone."""
    return Damage(record.end.file, record.location.offset, record.end.offset, record.head, record.digest)


def read_attributes(packs: Packs, record: Record) -> Attributes | None:
    """What the index keeps of a record, read from its pack; None when its data set can't be read there."""
    try:
        with packs.dataset(record.location) as dataset:
            return scan(dataset, record.head.transfer_syntax_uid)
    except (InvalidInput, TooLarge, Corrupt, NotFound, Evicted) as error:
        log.error("record %d can't be read from its pack: %s", record.sequence, error)
        return None
    except (MissError, OSError, MemoryError):
        raise
    except Exception as error:
        # Whatever it is, one record's header may not keep the index from all that follow it.
        log.error("record %d can't be read from its pack: %s", record.sequence, type(error).__name__)
        return None


def read_or_told(packs: Packs, record: Record, absences: Callable[[], Absences]) -> Attributes | None:
    """The same, also of a content whose bytes were given up: facts tell it."""
    found = read_attributes(packs, record)
    if found is None:
        told = absences().entry_of(record.head.sop_instance_uid, record.digest)
        found = None if told is None else told.attributes
    return found


def _batches(entries: Iterable[IndexEntry]) -> Iterator[tuple[list[IndexEntry], Position]]:
    batch: list[IndexEntry] = []
    for entry in entries:
        batch.append(entry)
        if len(batch) >= BATCH_RECORDS_MAX:
            yield batch, batch[-1].record.end
            batch = []
    if batch:
        yield batch, batch[-1].record.end
