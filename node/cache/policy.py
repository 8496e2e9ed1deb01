"""Which studies a node gives up, and in which order: least recently wanted first, whole ones before parts,
and what was fetched for an appointment that is over before everything else. Pure: it asks neither clock nor
disk.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from archive.index.cached import CachedStudy
from archive.ledger import Pin
from archive.ledger.keeping import PRIOR
from node.cache.rules import KeepRule

DAY_US = 86_400 * 1_000_000
CANDIDATES_MAX = 10_000  # of one look at the index: more are found by the next


@dataclass(frozen=True, slots=True)
class Room:
    """The disk: what is free, and how large it is."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Marks:
    """With less than `low` free bytes room is made until `high` are free; both never below what intake needs
    to go on."""

    low: int
    high: int

    @classmethod
    def of(cls, room: Room, *, low_percent: float, high_percent: float, low_bytes: int, intake_bytes: int
           ) -> Marks:
        low = max(int(room.total_bytes * low_percent / 100), low_bytes, intake_bytes + intake_bytes // 2)
        high = max(int(room.total_bytes * high_percent / 100), low + low // 4)
        # A disk that is small for these marks is emptied to three quarters, never to the last study.
        most = room.total_bytes * 3 // 4
        return cls(min(low, most), min(high, most))


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A study that may go. The order is that in which they do."""

    rank: int  # 0: its appointment is over; 1: all of it may go; 2: a part may
    wanted_us: int
    study_uid: str
    bytes: int
    instances: int


@dataclass(frozen=True, slots=True)
class Survey:
    """What a look at all studies found: what may go, in order, and why the rest stays, in bytes."""

    candidates: tuple[Candidate, ...]
    evictable_bytes: int
    pinned_bytes: int
    unprotected_bytes: int


class Surveying:
    """Takes studies page by page, and keeps the CANDIDATES_MAX that go first."""

    def __init__(self, pins: Iterable[Pin], rules: Sequence[KeepRule], now_us: int) -> None:
        self._rules = rules
        self._now_us = now_us
        self._pinned, self._over = set[str](), set[str]()
        for pin in pins:
            if pin.holds(now_us):
                self._pinned.add(pin.study_uid)
            elif pin.kind == PRIOR:
                self._over.add(pin.study_uid)
        self._heap: list[tuple[int, int, Candidate]] = []  # the last to go on top
        self._evictable = self._held = self._unprotected = 0

    def look(self, page: Sequence[CachedStudy], uses: Mapping[str, int]) -> None:
        """`uses` says when studies of the page were last wanted, of those that were."""
        for study in page:
            self._unprotected += study.bytes - study.evictable_bytes
            if not study.evictable:
                continue
            wanted_us = max(study.received_us, uses.get(study.study_uid, 0))
            if self._stays(study, wanted_us):
                self._held += study.evictable_bytes
                continue
            self._evictable += study.evictable_bytes
            rank = 2 if study.held_back else 0 if study.study_uid in self._over else 1
            found = Candidate(rank, wanted_us, study.study_uid, study.evictable_bytes, study.evictable)
            item = (-rank, -wanted_us, found)
            if len(self._heap) < CANDIDATES_MAX:
                heapq.heappush(self._heap, item)
            else:
                heapq.heappushpop(self._heap, item)

    def _stays(self, study: CachedStudy, wanted_us: int) -> bool:
        if study.study_uid in self._pinned:
            return True
        return any(rule.keeps(study, wanted_us, self._now_us) for rule in self._rules)

    def done(self) -> Survey:
        found = tuple(sorted(candidate for _, _, candidate in self._heap))
        return Survey(found, self._evictable, self._held, self._unprotected)


def unused(candidates: Iterable[Candidate], before_us: int) -> Iterator[Candidate]:
    """Those that nobody wanted since `before_us`."""
    return (one for one in candidates if one.wanted_us < before_us)
