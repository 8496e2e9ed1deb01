"""Compaction: writes what counts of a mostly evicted pack once more, behind the others, and lets the pack go.

Order. (1) The pack is looked at: one that is damaged, or that holds what the index does not know, is left
alone. (2) What is live or a conflict is appended again, as it came, its digest checked, and synced; the
index follows. (3) The index is asked again: nothing may lie in the pack any more. (4) MOVED facts keep what
stood there and no fact tells yet, and the last batch says DROPPED. (5) The file is removed by
`eviction.py`, not sooner than an hour later when something was moved: who has read a place from the
index before still finds it there. A crash leaves a pack that is compacted again, or one that is still to be
removed.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass

from archive.errors import Corrupt
from archive.index.index import Index
from archive.indexer import Indexer
from archive.intake import Intake
from archive.model import Fact, FactKind, IndexEntry, Position
from archive.packs import large
from archive.packs.dropping import Absences, Drop, drop_fact
from archive.packs.facts import FactLog
from archive.packs.packs import LAYOUT, Packs, Written
from archive.packs.records import FILE_HEADER_BYTES
from archive.packs.recovery import Damage
from archive.rereading import read_attributes, read_or_told
from archive.space.holdings import Held, State, holdings
from archive.space.pace import Pace

log = logging.getLogger(__name__)

LIVE_SHARE_MAX = 0.5  # of what a pack takes of the disk: below it, compaction gives back more than it writes
_BATCH_FACTS_MAX = 500
_INDEX_WAIT_S = 60.0


class _LeftAlone(Exception):
    """Why a pack is not compacted."""


@dataclass(frozen=True, slots=True)
class PackContents:
    """What a sealed pack holds, by the index. `damages` and `unknown` keep it from being compacted."""

    number: int
    end: int
    live: int
    live_bytes: int
    evicted: int
    elsewhere: int
    unknown: int
    damages: int
    allocated: int

    @property
    def is_worth_it(self) -> bool:
        return self.live_bytes < LIVE_SHARE_MAX * max(self.allocated - FILE_HEADER_BYTES, 1)


@dataclass(frozen=True, slots=True)
class Compacted:
    """What became of a pack; `reason` says why it was left alone, and is empty when it goes."""

    number: int
    moved: int
    bytes_given_back: int
    reason: str = ""


class Compaction:
    """The compaction of one archive, in its writer's process."""

    def __init__(
        self,
        packs: Packs,
        index: Index,
        indexer: Indexer,
        intake: Intake,
        facts: FactLog,
        *,
        drop_delay_s: float,
    ) -> None:
        self._packs = packs
        self._index = index
        self._indexer = indexer
        self._intake = intake
        self._facts = facts
        self._drop_delay_s = drop_delay_s

    def contents(self, number: int) -> PackContents | None:
        """What a sealed pack holds; None when there is none of that number, or it goes already."""
        end = self._packs.log.sealed().get(number)
        if end is None:
            return None
        counts = dict.fromkeys(State, 0)
        live_bytes = damages = 0
        for chunk in holdings(self._packs, self._index, number, end):
            for item in chunk:
                if isinstance(item, Damage):
                    damages += 1
                    continue
                counts[item.state] += 1
                if item.state in (State.LIVE, State.CONFLICT) and not _has_own_pack(item):
                    live_bytes += item.record.location.length
        allocated = self._packs.storage.allocated(LAYOUT.name_of(number))
        return PackContents(
            number, end, counts[State.LIVE] + counts[State.CONFLICT], live_bytes, counts[State.EVICTED],
            counts[State.ELSEWHERE], counts[State.UNKNOWN], damages, allocated,
        )  # fmt: skip

    def compact(self, number: int, pace: Pace, *, only_empty: bool = False) -> Compacted:
        """Let a sealed pack go if that gives back more than it writes; with `only_empty`, only when nothing
        is to be written."""
        try:
            found = self.contents(number)
            if found is None:
                raise _LeftAlone("it is not sealed, or there is none")
            if found.damages or found.unknown:
                raise _LeftAlone(f"{found.damages} damages, {found.unknown} records that the index lacks")
            if number in Absences.read(self._facts).dropped:
                raise _LeftAlone("it goes already")
            if found.live and (only_empty or not found.is_worth_it):
                raise _LeftAlone("most of it counts")
            self._require_tail_of_predecessor(number)
            moved = self._write_again(number, found.end, pace) if found.live else set()
            self._drop(number, found, moved)
        except (_LeftAlone, Corrupt) as error:
            return Compacted(number, 0, 0, str(error))
        log.info("pack %d goes: %d records were moved out of it", number, len(moved))
        return Compacted(number, len(moved), max(found.allocated - found.live_bytes, 0))

    def candidates(self) -> list[int]:
        """The sealed packs whose compaction gives back more than it writes."""
        dropped = Absences.read(self._facts).dropped
        found = (self.contents(number) for number in self._packs.log.sealed() if number not in dropped)
        return [each.number for each in found if each is not None and each.is_worth_it]

    def _require_tail_of_predecessor(self, number: int) -> None:
        """Where the pack before was abandoned after a failed sync, this one's header is what says where."""
        header = LAYOUT.header_of(self._packs.storage, number)
        if header is None:
            raise _LeftAlone("its header is damaged")
        name = LAYOUT.name_of(header.previous.file)
        try:
            size = self._packs.storage.size(name)
        except FileNotFoundError:
            return
        if size > header.previous.offset:
            raise _LeftAlone(f"its header says where {name} ends")

    def _write_again(self, number: int, end: int, pace: Pace) -> set[tuple[str, bytes]]:
        moved: set[tuple[str, bytes]] = set()
        last: Written | None = None
        for chunk in holdings(self._packs, self._index, number, end):
            written: list[Written] = []
            size = 0
            for item in chunk:
                if isinstance(item, Damage) or item.state not in (State.LIVE, State.CONFLICT):
                    continue
                written.append(self._append(item))
                size += 2 * item.record.location.length
                moved.add((item.record.head.sop_instance_uid, item.record.digest))
            for each in written:
                self._packs.wait_durable(each)
                last = each
            pace.took(size)
        if last is not None:
            self._indexer.wait(last.record.end, _INDEX_WAIT_S)
        return moved

    def _append(self, item: Held) -> Written:
        record = item.record
        dataset = b""
        if not _has_own_pack(item):
            self._intake.require_space(record.location.length)
            with self._packs.dataset(record.location) as found:
                dataset = bytes(found)
            if hashlib.sha256(dataset).digest() != record.digest:
                raise _LeftAlone("a record of it does not match its digest")
        attributes = read_attributes(self._packs, record)
        if attributes is None:
            raise _LeftAlone("a record of it can't be read")
        return self._intake.write_again(record, attributes, dataset, live=item.state is State.LIVE)

    def _drop(self, number: int, found: PackContents, moved: set[tuple[str, bytes]]) -> None:
        """The facts, once nothing lies there any more."""
        absences = Absences.read(self._facts)
        told = absences.facts(number)
        now_us = time.time_ns() // 1000
        facts: list[Fact] = []
        for chunk in holdings(self._packs, self._index, number, found.end):
            for item in chunk:
                if isinstance(item, Damage) or not self._is_free(item, moved):
                    raise _LeftAlone("the index still refers to it")
                if item.record.end.offset in told:
                    continue
                head = item.record.head
                attributes = read_or_told(self._packs, item.record, lambda: absences)
                if attributes is None:
                    raise _LeftAlone("a record of it can't be read")
                entry = IndexEntry(item.record, attributes)
                facts.append(
                    Fact(FactKind.MOVED, head.sop_instance_uid, item.record.digest, "", now_us, entry=entry)
                )
                if len(facts) >= _BATCH_FACTS_MAX:
                    self._indexer.record_facts(facts)
                    facts = []
        waits = bool(moved or found.elsewhere)
        due_us = now_us + int(self._drop_delay_s * 1e6 if waits else 0)
        drop = Drop(Position(number, found.end), due_us)
        self._indexer.record_facts([*facts, drop_fact(drop, now_us)])

    def _is_free(self, item: Held, moved: set[tuple[str, bytes]]) -> bool:
        if item.state in (State.EVICTED, State.ELSEWHERE):
            return True
        content = (item.record.head.sop_instance_uid, item.record.digest)
        return _has_own_pack(item) and content in moved  # its place is the same; another record names it now


def _has_own_pack(item: Held) -> bool:
    return item.record.location.pack.startswith(large.FOLDER)
