"""Makes room on a node's disk: looks how much is free, and has studies given up when it is too little, or
when nobody wanted them for long. It says why when it can't: that is what a person has to know before the disk
is full and intake refuses."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace

from archive.archive import Archive
from archive.errors import MissError, Unavailable
from archive.index.cached import PAGE_MAX
from archive.ledger import Ledger
from archive.space.eviction import EvictionReport, EvictionRequest
from archive.uses import Uses
from node.cache.policy import DAY_US, Candidate, Marks, Room, Survey, Surveying, unused
from node.cache.rules import RulesFile
from node.settings import CacheSettings

log = logging.getLogger(__name__)

BATCH_STUDIES = 32
BATCH_BYTES = 1 << 30
EVICT_S_MAX = 600.0
SURVEY_AGAIN_S = 60.0  # after one that found nothing that may go
AGE_EVERY_S = 3600.0

NOTHING_LAID_DOWN = "the region has not said yet what is protected"
NOTHING_PROTECTED = "the region protects nothing yet: no backup was declared, or it is too young"
HELD = "it is held until the node has been compared with the region's store"
ALL_PINNED = "what the region has is pinned, or kept by a rule"
NO_RECEIPTS = "nothing here has a receipt that is old enough"


@dataclass(frozen=True, slots=True)
class Made:
    """The last room that was made, and why no more was: an empty reason is none."""

    at_us: int = 0
    instances: int = 0
    bytes: int = 0
    why_not: str = ""


class RoomMaker:
    """See the module's docstring. Used by one thread. `protected_to_us` is the region's word, None as long as
    it has not said anything; `held` says that nothing may go now."""

    def __init__(
        self,
        archive: Archive,
        ledger: Ledger,
        settings: CacheSettings,
        rules: RulesFile,
        uses: Uses,
        *,
        protected_to_us: Callable[[], int | None],
        held: Callable[[], bool],
        room: Callable[[], Room],
        clock: Callable[[], int],
        stopping: Callable[[], bool],
    ) -> None:
        self._archive = archive
        self._ledger = ledger
        self._settings = settings
        self._rules = rules
        self._uses = uses
        self._protected_to_us = protected_to_us
        self._held = held
        self._room = room
        self._clock = clock
        self._stopping = stopping
        self._left: list[Candidate] = []
        self._next_survey_s = 0.0
        self._aged_s = -AGE_EVERY_S
        self.made = Made()
        self.survey: Survey | None = None

    def marks(self, room: Room) -> Marks:
        settings = self._settings
        return Marks.of(
            room, low_percent=settings.free_percent_low, high_percent=settings.free_percent_high,
            low_bytes=settings.free_bytes_low, intake_bytes=self._archive.settings.free_bytes_min,
        )  # fmt: skip

    def has_room_for(self, size: int) -> bool:
        """Whether so much can be brought back without anything having to go for it soon."""
        room = self._room()
        return room.free_bytes - size >= self.marks(room).high

    def look(self) -> None:
        """Makes room if there is too little, and gives up what nobody wanted for long."""
        room = self._room()
        marks = self.marks(room)
        if room.free_bytes < marks.low:
            self._make(marks)
        elif self._settings.unused_days and time.monotonic() - self._aged_s >= AGE_EVERY_S:
            if self.why_not() is None:
                self._aged_s = time.monotonic()
                self._age()
        elif self.made.why_not:
            self.made = replace(self.made, why_not="")

    def _make(self, marks: Marks) -> None:
        before = self._room().free_bytes
        evicted = EvictionReport()
        while (free := self._room().free_bytes) < marks.high and not self._stopping():
            if (why_not := self.why_not()) is not None:
                self._note(evicted, why_not)
                return
            if not self._left:
                if time.monotonic() < self._next_survey_s:
                    return
                self._left = list(reversed(self.take_survey().candidates))
                if not self._left:
                    self._next_survey_s = time.monotonic() + SURVEY_AGAIN_S
                    self._note(evicted, self._why_nothing_goes())
                    return
            # Where the file system gives nothing back at once, what was evicted counts as if it had.
            expected = max(free, before + evicted.bytes) if not self._gives_back_at_once() else free
            if expected >= marks.high:
                break
            self._evict(self._next_batch(marks.high - expected), evicted)
        self._note(evicted, "")

    def _age(self) -> None:
        before_us = self._clock() - int(self._settings.unused_days * DAY_US)
        evicted = EvictionReport()
        old = unused(self.take_survey().candidates, before_us)
        while (batch := list(itertools.islice(old, BATCH_STUDIES))) and not self._stopping():
            self._evict(batch, evicted)
            if self.why_not() is not None:
                break
        self._note(evicted, "")

    def why_not(self) -> str | None:
        """Why nothing at all may go now."""
        protected_to_us = self._protected_to_us()
        if protected_to_us is None:
            return NOTHING_LAID_DOWN
        if self._held():
            return HELD
        return None if protected_to_us > 0 else NOTHING_PROTECTED

    def take_survey(self) -> Survey:
        """A look at all studies."""
        self._archive.wait_indexed()
        self._uses.flush()
        protected_to_us = self._protected_to_us() or 0
        surveying = Surveying(self._ledger.pins(), self._rules.look().keep, self._clock())
        after = ""
        while page := self._archive.index.cached.studies(protected_to_us, after):
            surveying.look(page, self._ledger.uses_of([study.study_uid for study in page]))
            after = page[-1].study_uid
            if len(page) < PAGE_MAX or self._stopping():
                break
        self.survey = surveying.done()
        return self.survey

    def _next_batch(self, needed: int) -> list[Candidate]:
        batch: list[Candidate] = []
        while self._left and len(batch) < BATCH_STUDIES and sum(one.bytes for one in batch) < BATCH_BYTES:
            batch.append(self._left.pop())
            if sum(one.bytes for one in batch) >= needed:
                break
        return batch

    def _evict(self, batch: Iterable[Candidate], evicted: EvictionReport) -> None:
        protected_to_us = self._protected_to_us()
        if not protected_to_us or self._held():
            return
        pinned = {pin.study_uid for pin in self._ledger.pins() if pin.holds(self._clock())}
        uids = tuple(one.study_uid for one in batch if one.study_uid not in pinned)  # since it was looked at
        if not uids:
            return
        future = self._archive.upkeep.evict(EvictionRequest(protected_to_us, study_uids=uids))
        try:
            done = future.result(EVICT_S_MAX)
        except FutureTimeout:
            raise Unavailable("an eviction takes long: it goes on") from None
        evicted.instances += done.instances
        evicted.bytes += done.bytes

    def _gives_back_at_once(self) -> bool:
        return self._archive.packs.storage.capabilities.punch_holes

    def _why_nothing_goes(self) -> str:
        survey = self.survey
        if survey is not None and survey.pinned_bytes:
            return ALL_PINNED
        return NO_RECEIPTS

    def _note(self, evicted: EvictionReport, why_not: str) -> None:
        if evicted.instances:
            self.made = Made(self._clock(), evicted.instances, evicted.bytes, why_not)
            log.info("%d instances, %d bytes were given up here: the region has them", evicted.instances,
                     evicted.bytes)  # fmt: skip
        if why_not and why_not != self.made.why_not:
            log.warning("the disk gets short, and nothing is given up: %s", why_not)
        self.made = replace(self.made, why_not=why_not)
        if evicted.instances:
            try:
                self._ledger.forget_pins(self._clock() - 30 * DAY_US)
            except MissError as error:
                log.warning("pins that ended can't be forgotten: %s", error)
