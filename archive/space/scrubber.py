"""The scrubber: reads everything that lies in the packs again, at a rate, and flags what no longer is what
came. It mends nothing itself and deletes nothing: whoever is told of what it found (`found`) has it brought
from the other copy.

A pass goes pack by pack in the order in which they were written. Of each record its header and trailer are
checked, and its bytes against its digest; where a stretch can't be read, and where a pack is gone, the index
says what lay there. What fails is read once more before it counts: then it is a DAMAGE fact. Where a pass
stands is kept after each pack, so that a process that is killed goes on there.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from archive.archive import Archive
from archive.errors import Corrupt, Evicted, NotFound, Unavailable
from archive.index.inventory import Lying
from archive.model import Fact, FactKind
from archive.packs import large
from archive.packs.packs import LAYOUT
from archive.packs.records import FILE_HEADER_BYTES
from archive.packs.recovery import Damage
from archive.rounds import Rounds
from archive.settings import setting
from archive.space.holdings import State, holdings
from archive.space.pace import Pace

log = logging.getLogger(__name__)

FILE = "scrub.json"
BYTES_PER_S_MIN = 1e6  # a small store is read in minutes, and then again after the interval
RETRY_S = 60.0
LOOK_S = 5.0
FIRST_S = 600.0  # after a start there is other work to do
FACTS_MAX = 500

Content = tuple[str, bytes]
Found = Callable[[Sequence[Content]], None]


@dataclass(frozen=True, slots=True)
class ScrubNote:
    """How scrubbing stands, as it is kept. `pack` is the last that was read in the pass that began at
    `began_us`, 0 when none is under way; `full_us` is when the last whole pass ended, what it `read` and
    `damaged` are of that pass; `ever` counts what was ever found here."""

    pack: int = 0
    began_us: int = 0
    bytes: int = 0
    found: int = 0
    full_us: int = 0
    full_bytes: int = 0
    full_found: int = 0
    ever: int = 0


def read_note(state: Path) -> ScrubNote:
    """How it stands in this folder; any process may ask."""
    try:
        return ScrubNote(**json.loads((state / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return ScrubNote()


@dataclass(frozen=True)
class ScrubSettings:
    """Reading everything in the packs again."""

    enabled: bool = setting(True, "Whether what lies on the disk is read again at all.")
    interval_days: float = setting(
        30.0, "In how many days everything is read once; at least 1 MB/s are read.", "days",
        minimum=0.01, maximum=3650.0,
    )
    bytes_per_s_max: float = setting(
        50e6, "Never more is read than so much, and never while intake is slowed down.", "bytes/s",
        minimum=1e5,
    )


class Scrubber:
    """See the module's docstring. `start` and `stop` make and end its thread; `now` begins a pass at once, as
    fast as it may."""

    def __init__(
        self,
        archive: Archive,
        *,
        interval_s: float = 30 * 86_400.0,
        bytes_per_s_max: float = 50e6,
        found: Found = lambda contents: None,
        clock: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._archive = archive
        self._interval_s = interval_s
        self._bytes_per_s_max = bytes_per_s_max
        self._found = found
        self._clock = clock
        self._state = archive.settings.state
        self._asked = False
        self.note = read_note(self._state)
        self._rounds = Rounds("scrubber", self._round, log, retry_s=RETRY_S, first_s=FIRST_S)

    def start(self) -> None:
        self._rounds.start()

    def stop(self) -> None:
        self._rounds.stop()

    def now(self) -> None:
        """Any thread."""
        self._asked = True
        self._rounds.wake()

    def _round(self) -> float:
        due_us = self.note.full_us + int(self._interval_s * 1e6)
        if not self._asked and not self.note.began_us and self._clock() < due_us:
            return LOOK_S
        if self._asked:
            self._keep(replace(self.note, pack=0, began_us=0))
        asked, self._asked = self._asked, False
        try:
            self.run_pass(fast=asked)
        except Unavailable:
            if not self._rounds.stopping.is_set():
                raise
        return LOOK_S

    def run_pass(self, *, fast: bool = False) -> ScrubNote:
        """One pass, or the rest of the one that was under way. Raises Unavailable when it is to stop, or the
        index does not answer; asked again it goes on with the pack that it was in."""
        archive = self._archive
        archive.wait_indexed()
        if not self.note.began_us:
            self._keep(replace(self.note, pack=0, began_us=self._clock(), bytes=0, found=0))
            self._look_for_missing()
        durable = archive.packs.log.durable
        ends = {**archive.packs.log.sealed(), durable.file: durable.offset}
        pace = self._pace(sum(ends.values()), fast)
        for number, end in sorted(ends.items()):
            if number > self.note.pack:
                self._read_pack(number, end, pace)
                self._keep(replace(self.note, pack=number))
        note = self.note
        self._keep(ScrubNote(
            full_us=self._clock(), full_bytes=note.bytes, full_found=note.found, ever=note.ever
        ))  # fmt: skip
        level = logging.ERROR if note.found else logging.INFO
        log.log(level, "everything was read again: %d bytes, %d damaged", note.bytes, note.found)
        return self.note

    def _pace(self, total: int, fast: bool) -> Pace:
        wanted = max(total / max(self._interval_s * 0.9, 1.0), BYTES_PER_S_MIN)
        rate = self._bytes_per_s_max if fast else min(wanted, self._bytes_per_s_max)
        intake = self._archive.intake
        return Pace(rate, pressed=intake.is_pressed, stopping=self._rounds.stopping)

    def _read_pack(self, number: int, end: int, pace: Pace) -> None:
        packs, index = self._archive.packs, self._archive.index
        bad: list[Content] = []
        torn: list[tuple[int, int]] = []
        try:
            for chunk in holdings(packs, index, number, end):
                for item in chunk:
                    if isinstance(item, Damage):
                        torn.append((item.offset, item.end))
                    elif item.state in (State.LIVE, State.CONFLICT):
                        record = item.record
                        content = (record.head.sop_instance_uid, record.digest)
                        lying = Lying(record.head, record.digest, record.location)
                        if not self._is_whole(lying):
                            bad.append(content)
                        self.note = replace(self.note, bytes=self.note.bytes + record.location.length)
                        pace.took(record.location.length)
        except Corrupt:
            torn.append((FILE_HEADER_BYTES, end))  # it has no header left
        except FileNotFoundError:
            return  # it was let go meanwhile, or is missing: the next pass looks
        if torn:
            name = LAYOUT.name_of(number)
            for lying in index.inventories.lying_in([name]):
                if any(start <= lying.location.offset < stop for start, stop in torn):
                    bad.append((lying.head.sop_instance_uid, lying.digest))
        self._flag(bad)

    def _look_for_missing(self) -> None:
        """What lay in packs that are gone. A descriptor that is still open reads them until the process ends,
        and does not make them whole. What moved while this looks lies elsewhere by the last question."""
        inventories, storage = self._archive.index.inventories, self._archive.packs.storage
        named = [pack for pack in inventories.packs() if pack]
        there = {name for folder in (LAYOUT.folder, large.FOLDER) for name in storage.list(folder)}
        gone = [pack for pack in named if pack not in there and large.part_name(pack) not in there]
        if gone:
            log.error("%d packs are gone that nobody let go", len(gone))
            lost = inventories.lying_in(gone)
            self._flag([(lying.head.sop_instance_uid, lying.digest) for lying in lost])

    def _is_whole(self, lying: Lying) -> bool:
        for _ in range(2):  # a fault that passes is none
            try:
                self._archive.packs.verify(lying.head, lying.digest, lying.location)
                return True
            except (Corrupt, NotFound, Evicted, OSError):
                continue
        return False

    def _flag(self, contents: Iterable[Content]) -> None:
        wanted = list(dict.fromkeys(contents))
        for start in range(0, len(wanted), FACTS_MAX):
            page = wanted[start : start + FACTS_MAX]
            standings = self._archive.index.inventories.standings(page)
            # What was evicted meanwhile, or is known to be damaged, is nothing new.
            fresh = [content for content in page if content in standings and standings[content].whole]
            if fresh:
                log.error("%d instances here no longer are what came", len(fresh))
                now_us = self._clock()
                self._archive.record_facts([
                    Fact(FactKind.DAMAGE, *content, standings[content].ward, now_us, "found by the scrubber")
                    for content in fresh
                ])  # fmt: skip
                count = len(fresh)
                self.note = replace(self.note, found=self.note.found + count, ever=self.note.ever + count)
                self._found(fresh)

    def _keep(self, note: ScrubNote) -> None:
        self.note = note
        beside = self._state / f"{FILE}.new"
        with beside.open("w") as file:
            json.dump(asdict(note), file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._state / FILE)

