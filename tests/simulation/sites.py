"""An archive over a simulated disk, with no thread and no clock of its own: the product's packs, facts, index
and intake, driven by hand. A site crashes and comes back with what its disk kept."""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from archive.archive import Archive, ArchiveSettings, Writing
from archive.budget import ByteBudget
from archive.database import sqlite_url
from archive.errors import MissError, Unavailable
from archive.index.index import Index
from archive.indexer import Indexer
from archive.intake import Intake, IntakeLimits
from archive.model import START, InstanceHead, Outcome, Position
from archive.packs.facts import FactLog
from archive.packs.logfiles import LogLimits
from archive.packs.packs import Packs
from archive.partials import PartialLimits, Partials
from archive.recent import Recent
from archive.space.eviction import Eviction, EvictionRequest
from archive.space.pace import Pace
from federation.reading import find_content, read_chunks
from tests.archive.faulty_storage import FaultyStorage

PACK_BYTES = 40 << 10
LIMITS = LogLimits(file_bytes_max=PACK_BYTES, ahead_bytes=16 << 10, ahead_by_thread=False)
_numbers = itertools.count()


class Crash(BaseException):
    """The process ends here: nothing after this line is carried out."""


class SteppedIndexer(Indexer):
    """Brings in what is durable when somebody waits for it, and at no other time."""

    def start(self) -> None:
        with self._writing:
            self._catch_up()

    def wait(self, target: Position, timeout_s: float) -> None:
        while self._position < target:
            if not self.step():
                raise Unavailable("the index has not caught up yet")

    def wait_for_room(self, records_max: int, timeout_s: float) -> bool:
        while len(self._recent) >= records_max:
            if not self.step():
                return False
        return True

    def step(self) -> bool:
        """One batch; False when nothing is durable that is not in the index."""
        if not self._recent.durable(1):
            return False
        self._urgent.set()
        self._batched_s = -1e9  # no gap between batches: there is nobody to spare
        self._step()
        return True


@dataclass
class Parts:
    """What an archive's one writer has: as `archive.Writing`, without its threads."""

    packs: Packs
    facts: FactLog
    recent: Recent
    indexer: SteppedIndexer
    intake: Intake


class Site:
    """A ward's or the region's archive. `outbox` at a ward."""

    def __init__(self, name: str, folder: Path, *, outbox: bool, template: Path) -> None:
        self.name = name
        self.disk = FaultyStorage(punch_holes=True)
        self._folder = folder
        self._outbox = outbox
        self._template = template
        self._promised = START
        self._database = self._fresh_database()
        self.archive = self._open()

    def _fresh_database(self) -> Path:
        path = self._folder / f"{self.name}-{next(_numbers)}.db"
        shutil.copyfile(self._template, path)
        return path

    def _open(self) -> Archive:
        index = Index.open(sqlite_url(self._database))
        packs_read, facts_read = index.positions()
        packs = Packs.open(self.disk, promised=max(packs_read, self._promised), limits=LIMITS)
        facts = FactLog.open(self.disk, promised=facts_read, writer=packs.writer, limits=LIMITS)
        recent = Recent()
        indexer = SteppedIndexer(index, packs, facts, recent, outbox=self._outbox, on_idle=lambda: None)
        indexer.start()
        intake = Intake(packs, index, indexer, recent, ByteBudget(1 << 30), self.disk,
                        IntakeLimits(free_bytes_min=0), Partials(self.disk, PartialLimits()))
        self.parts = Parts(packs, facts, recent, indexer, intake)
        self.eviction = Eviction(packs, index, indexer.record_facts)
        return Archive(ArchiveSettings(self._folder), self.disk, index, packs, cast(Writing, self.parts))

    # What is done with it.

    def take(self, head: InstanceHead, dataset: bytes) -> tuple[bytes, Outcome]:
        """Stores as for a modality: durable when this returns, with the digest and what was decided."""
        reception = self.archive.intake.begin(head)
        reception.write(dataset)
        ticket = reception.commit()
        ticket.wait_durable()
        return ticket.digest, ticket.outcome

    def evict(self, now_us: int) -> int:
        """Gives up whatever may be given up."""
        request = EvictionRequest(protected_to_us=now_us, received_before_us=now_us)
        return self.eviction.evict(request, Pace(1e15, share=1.0)).instances

    def idle(self) -> None:
        """A moment in which nothing comes: what is durable is indexed, and promised by marks."""
        while self.parts.indexer.step():
            pass
        self.parts.packs.log.mark()
        self.parts.facts.mark()

    def evicted(self, uid: str, digest: bytes) -> bool:
        place = self.archive.index.places([uid]).get((uid, digest))
        return place is not None and place.evicted

    def problem(self, uid: str, digest: bytes) -> str:
        """Why a content can't be read here, by its very bytes; empty when it can."""
        self.archive.wait_indexed()
        content = find_content(self.archive, uid, digest)
        if content is None:
            return "is not here"
        try:
            dataset = b"".join(read_chunks(self.archive, uid, digest, content.location))
        except (MissError, OSError) as error:
            return f"can't be read: {error}"
        return "" if hashlib.sha256(dataset).digest() == digest else "has other bytes"

    # What happens to it.

    def crash(self, chance: random.Random, *, power: bool) -> None:
        """It ends, and its disk with the power or not; the index's database is as it was, or gone."""
        self._promised = self.parts.packs.log.acknowledged if not power else START
        self.disk.before_sync = None
        self.disk = self.disk.power_loss(chance) if power else self.disk.kill()
        self.archive.index.close()
        if chance.random() < 0.25:
            self._database.unlink()
            self._database = self._fresh_database()

    def reopen(self) -> None:
        self.archive = self._open()

    def crash_at_sync(self, number: int) -> None:
        """It ends before the sync of this number from now, whatever that is of."""
        left = itertools.count(1)

        def before(_: str) -> None:
            if next(left) >= number:
                raise Crash

        self.disk.before_sync = before

    def close(self) -> None:
        self.archive.index.close()
        self._database.unlink(missing_ok=True)


def make_template(path: Path) -> Path:
    """An empty index, to be copied: making one takes longer than a crash."""
    Index.open(sqlite_url(path)).close()
    return path


Hook = Callable[[], None]
