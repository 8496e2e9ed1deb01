"""The indexer: brings what is durable in packs and facts into the index, in order, each in transactions of
its own that also store how far it got. It writes nothing else and decides nothing: the kind of a record is
the decision.

It works in batches, a short moment after the sync: many records share a transaction when nobody waits for
them, and whoever does wait cuts the moment short, but for a gap between two batches. What records say of
others (rejection notes) is recorded as facts before they are indexed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from archive.errors import MissError, Unavailable
from archive.index.index import Index
from archive.model import Fact, IndexEntry, Position
from archive.packs.facts import FactLog
from archive.packs.packs import Packs
from archive.poison import apply_around_poison
from archive.recent import Recent
from archive.replay import BATCH_RECORDS_MAX, Replay, damage_fact, damage_of
from archive.rereading import read_attributes

log = logging.getLogger(__name__)

# 500 in a transaction cost 42 us each, 50 cost 87; where many come, more are waited for. A search that waits
# cuts it short.
_GATHER_S = (0.08, 0.17)
# The least between two batches: 2.3 ms of each are its transaction's, however few it brings, and fifty
# searches a second beside a busy modality would make fifty.
_GAP_S = 0.06
# In the region, whose receipts wait for it: short where little comes; where much does, thrice what the last
# batch took, since 30 instances in each of 130 batches cost half as much again as 100 in each of 40.
_GAP_BEFORE_RECEIPTS_S = (0.03, 0.12)
_REST = 3.0
_MANY = 100
_IDLE_S = 0.2
_NOTES_AT_ONCE = 5_000
_RETRY_S_MAX = 2.0
_CLOSE_S_MAX = 30.0


class Indexer:
    """The one thread that writes an archive's index."""

    def __init__(
        self,
        index: Index,
        packs: Packs,
        facts: FactLog,
        recent: Recent,
        *,
        outbox: bool,
        on_idle: Callable[[], None],
        notes: Callable[[Sequence[IndexEntry]], Sequence[Fact]] = lambda entries: (),
    ) -> None:
        self._index = index
        self._packs = packs
        self._facts = facts
        self._recent = recent
        self._outbox = outbox
        self._gap_s = (_GAP_S, _GAP_S) if outbox else _GAP_BEFORE_RECEIPTS_S
        self._on_idle = on_idle
        self._notes = notes  # what records say of others, as facts: recorded before they are indexed
        self._writing = threading.Lock()  # of the index: records and facts keep one order
        self._position, self._facts_position = index.positions()
        self._moved = threading.Condition()
        self._ready = threading.Event()
        self._urgent = threading.Event()
        self._batched_s = self._took_s = 0.0
        self._closing = False
        self._failing = False
        self._facts_behind = False  # facts are in their log and not in the index
        self.watchers: list[Callable[[Sequence[IndexEntry]], None]] = []  # told what came in; they never wait
        self.fact_watchers: list[Callable[[Sequence[Fact]], None]] = []  # told what was recorded, as above
        self._thread = threading.Thread(target=self._run, name="indexer", daemon=True)

    @property
    def position(self) -> Position:
        """Everything below is in the index."""
        return self._position

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

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
        for watcher in self.fact_watchers:
            watcher(facts)
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
        least_s, most_s = self._gap_s
        left_s = self._batched_s + min(max(least_s, _REST * self._took_s), most_s) - time.monotonic()
        if left_s > 0 and len(entries) < BATCH_RECORDS_MAX and not self._closing:
            time.sleep(left_s)
            entries = self._recent.durable(BATCH_RECORDS_MAX)
        self._urgent.clear()
        position = entries[-1].written.record.end
        found: list[IndexEntry] = []
        damages: list[Fact] = []
        for entry in entries:
            record = entry.written.record
            attributes = entry.attributes or read_attributes(self._packs, record)
            if attributes is None:
                damages.append(damage_fact(damage_of(record)))
            else:
                found.append(IndexEntry(record, attributes))
        told = self._notes(found)
        begun_s = time.monotonic()
        with self._writing:
            if self._facts_behind:
                self._apply_missed_facts()  # what was decided before these records came
            for start in range(0, len(told), _NOTES_AT_ONCE):
                self._record_facts(told[start : start + _NOTES_AT_ONCE])
            damages += self._apply(found, position)
            if damages:
                self._record_facts(damages)
        self._batched_s = time.monotonic()
        self._took_s = self._batched_s - begun_s
        for watcher in self.watchers:
            watcher(found)
        return True

    def _apply(self, entries: Sequence[IndexEntry], position: Position) -> list[Fact]:
        """Bring records in; what is to be said of those that the index can't take."""
        poison = apply_around_poison(self._index, entries, position, outbox=self._outbox)
        self._position = max(self._position, position)
        self._recent.retire(position)
        with self._moved:
            self._moved.notify_all()
        return [damage_fact(damage_of(entry.record)) for entry in poison]

    def _catch_up(self) -> None:
        def note(entries: Sequence[IndexEntry]) -> None:
            told = self._notes(entries)
            for start in range(0, len(told), _NOTES_AT_ONCE):
                self._facts.record(told[start : start + _NOTES_AT_ONCE], after=replay.position)

        replay = Replay(self._index, self._packs, self._facts, outbox=self._outbox, before=note)
        replay.run(self._position, self._facts_position)
        self._position, self._facts_position = replay.position, replay.facts_position
        self._apply_missed_facts()  # what was noted on the way
        if replay.damages:
            self._record_facts(replay.damages)
