"""An archive: what a ward and the region both are. Composes packs, facts, index, indexer and intake of one
state folder, and is the one door through which the rest of MISS stores, finds and reads instances.

One process opens it to write; others (a portal) open it to read, and wait by the watermark for what the
writer has acknowledged.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from archive.budget import ByteBudget
from archive.conflicts.sorting import Sorter
from archive.database import sqlite_url
from archive.dataset import corrected
from archive.dataset.corrected import ReadableDataset
from archive.errors import EVICTED, Evicted, MissError, NotFound, Unavailable
from archive.index.index import Index
from archive.indexer import Indexer
from archive.intake import Intake, IntakeLimits
from archive.model import (
    EVERYTHING,
    START,
    Fact,
    IndexEntry,
    Location,
    Match,
    Position,
    Query,
    Scope,
    StoredInstance,
)
from archive.notes import RejectionNotes
from archive.packs.facts import FactLog
from archive.packs.logfiles import LogLimits
from archive.packs.packs import LAYOUT, Packs
from archive.packs.storage import FileStorage, Storage
from archive.packs.watermark import Watermark, read_watermark
from archive.partials import PartialLimits, Partials, read_notes
from archive.recent import Recent
from archive.retention import RemovalSettings, RetentionSettings
from archive.space.compaction import Compaction
from archive.space.eviction import Eviction
from archive.space.purging import Purging
from archive.space.upkeep import Upkeep

log = logging.getLogger(__name__)

T = TypeVar("T")

INDEX_FILE = "index.db"
_WATERMARK_FILE = "watermark"
_LOCK_FILE = "writer.lock"
_INDEX_WAIT_S = 10.0
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class ArchiveSettings:
    """Where an archive lies and what bounds it. An empty `index_url` is an SQLite file in `state`."""

    state: Path
    index_url: str = ""
    pack_bytes_max: int = 1 << 30
    pack_age_s_max: float = 24 * 3600.0
    small_object_bytes_max: int = 1 << 20
    object_bytes_max: int = 1 << 40
    memory_budget_bytes: int = 256 << 20
    free_bytes_min: int = 1 << 30
    index_lag_records_max: int = 10_000
    index_lag_s_max: float = 30.0
    drop_delay_s: float = 3600.0
    upkeep_bytes_per_s: float = 100e6
    set_aside_bytes_max: int = 10 << 30
    set_aside_age_s_max: float = 30 * 86_400.0
    retention: RetentionSettings = RetentionSettings()
    removal: RemovalSettings = RemovalSettings()
    partial_bytes_max: int = 64 << 30
    partial_ward_bytes_max: int = 16 << 30
    partial_age_s_max: float = 24 * 3600.0

    @property
    def database_url(self) -> str:
        return self.index_url or sqlite_url(self.state / INDEX_FILE)

    @property
    def intake_limits(self) -> IntakeLimits:
        return IntakeLimits(
            small_object_bytes_max=self.small_object_bytes_max,
            object_bytes_max=self.object_bytes_max,
            free_bytes_min=self.free_bytes_min,
            index_lag_records_max=self.index_lag_records_max,
            index_lag_s_max=self.index_lag_s_max,
        )

    @property
    def partial_limits(self) -> PartialLimits:
        return PartialLimits(
            bytes_max=self.partial_bytes_max,
            ward_bytes_max=self.partial_ward_bytes_max,
            age_s_max=self.partial_age_s_max,
        )

    @property
    def log_limits(self) -> LogLimits:
        return LogLimits(file_bytes_max=self.pack_bytes_max, file_age_s_max=self.pack_age_s_max)


class Writing:
    """The parts of an archive that only its one writer has, and the lock that says who that is."""

    def __init__(self, settings: ArchiveSettings, storage: Storage, index: Index, *, outbox: bool) -> None:
        self._lock = lock_state(settings.state)
        try:
            self._open(settings, storage, index, outbox)
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, settings: ArchiveSettings, storage: Storage, index: Index, outbox: bool) -> None:
        packs_read, facts_read = index.positions()
        partials = read_notes(storage)
        self.packs, self.facts, self.watermark = open_logs(
            settings, storage, packs_read, facts_read, resumable=partials
        )
        self.recent = Recent()
        notes = RejectionNotes(
            self.packs, index, settings.removal, settings.retention, region=not outbox
        )
        self.indexer = Indexer(
            index, self.packs, self.facts, self.recent, outbox=outbox, on_idle=self._idle, notes=notes.facts
        )
        try:
            self.indexer.start()
        except BaseException:
            self._close_logs()
            raise
        self._publish()
        self.partials = Partials(storage, settings.partial_limits)
        self.partials.adopt(partials)
        self.packs.on_durable(self._durable)
        self.intake = Intake(
            self.packs,
            index,
            self.indexer,
            self.recent,
            ByteBudget(settings.memory_budget_bytes),
            storage,
            settings.intake_limits,
            self.partials,
        )
        self.upkeep = self._begin_upkeep(settings, index)
        self.sorter = Sorter(
            index, self.packs, self.indexer.record_facts, pressed=self.intake.is_pressed
        )
        self.sorter.start()

    def _begin_upkeep(self, settings: ArchiveSettings, index: Index) -> Upkeep:
        eviction = Eviction(self.packs, index, self.indexer.record_facts)
        compaction = Compaction(
            self.packs, index, self.indexer, self.intake, self.facts, drop_delay_s=settings.drop_delay_s
        )
        purging = Purging(self.packs, index, self.indexer.record_facts, eviction)
        upkeep = Upkeep(
            self.packs, index, eviction, compaction, purging,
            pressed=self.intake.is_pressed,
            bytes_per_s=settings.upkeep_bytes_per_s,
            set_aside_bytes_max=settings.set_aside_bytes_max,
            set_aside_age_s_max=settings.set_aside_age_s_max,
        )  # fmt: skip
        upkeep.start()
        return upkeep

    def _durable(self) -> None:
        self._publish()
        self.indexer.wake()

    def _publish(self) -> None:
        self.watermark.publish(self.packs.log.acknowledged)

    def _idle(self) -> None:
        """Nothing came for a moment: promise the last group too, so that no crash can take it for a torn
        tail."""
        try:
            self.packs.log.seal_aged()
            self.packs.log.mark()
            self.facts.mark()
        except MissError as error:
            log.warning("no mark in the log: %s", error)

    def close(self) -> None:
        self.sorter.stop()
        self.upkeep.close()
        self.indexer.close()
        self._close_logs()
        os.close(self._lock)

    def _close_logs(self) -> None:
        self.packs.close()
        self.facts.close()
        self.watermark.close()


class Archive:
    """See the module's docstring. Safe to use from any thread."""

    def __init__(
        self, settings: ArchiveSettings, storage: Storage, index: Index, packs: Packs, writing: Writing | None
    ) -> None:
        self.settings = settings
        self.index = index
        self.packs = packs
        self._storage = storage
        self._writing = writing

    @classmethod
    def open(
        cls,
        settings: ArchiveSettings,
        *,
        outbox: bool,
        read_only: bool = False,
        storage: Storage | None = None,
    ) -> Archive:
        """Open an archive; `outbox` on a node, whose instances wait for receipts.

        A writer brings the index up to the logs before this returns. Raises Unavailable when the database
        does not answer or another process writes, SchemaTooNew when a newer release wrote the state.
        """
        if not read_only:
            settings.state.mkdir(mode=0o750, parents=True, exist_ok=True)
        storage = storage if storage is not None else FileStorage(settings.state)
        index = Index.open(settings.database_url, read_only=read_only)
        if read_only:
            return cls(settings, storage, index, Packs.open_to_read(storage), None)
        try:
            writing = Writing(settings, storage, index, outbox=outbox)
        except BaseException:
            index.close()
            raise
        return cls(settings, storage, index, writing.packs, writing)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Everything durable is in the index and promised by a mark, then all is let go."""
        if self._writing is not None:
            self._writing.close()
        self.index.close()
        self._storage.close()

    @property
    def intake(self) -> Intake:
        return self._writer().intake

    @property
    def facts(self) -> FactLog:
        return self._writer().facts

    @property
    def upkeep(self) -> Upkeep:
        """Evictions, compactions, and the space that they give back."""
        return self._writer().upkeep

    @property
    def epoch(self) -> bytes:
        """Stands for this disk: random, made with the first pack, gone with it. Empty before that."""
        return self.packs.writer

    def _writer(self) -> Writing:
        if self._writing is None:
            raise Unavailable("this archive is open to read")
        return self._writing

    # Finding

    def search(self, query: Query) -> list[Match]:
        """The matches, in the order that `Query` states; whatever was acknowledged before is among them."""
        self.wait_indexed()
        return self.index.search(query)

    def listed(self, query: Query) -> list[tuple[str | int, ...]]:
        """What orders each match, its UID among it (`archive/index/queries.py`): the matches unread."""
        self.wait_indexed()
        return self.index.listed(query)

    def count(self, query: Query) -> int:
        """How many matches there are in all."""
        self.wait_indexed()
        return self.index.count(query)

    def instances(
        self,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
        *,
        scope: Scope = EVERYTHING,
    ) -> list[StoredInstance]:
        """The live instances of a study, a series, or one of them."""
        self.wait_indexed()
        return self.index.instances(study_uid, series_uid, sop_instance_uid, scope=scope)

    def watch(self, watcher: Callable[[Sequence[IndexEntry]], None]) -> None:
        """Have `watcher` told what came into the index, in the indexer's own thread: it never waits and never
        raises."""
        self._writer().indexer.watchers.append(watcher)

    def watch_facts(self, watcher: Callable[[Sequence[Fact]], None]) -> Callable[[], None]:
        """Have `watcher` told which facts were recorded, perhaps before the index has them, in the thread
        that records them: it never waits and never raises. What is returned ends that."""
        watchers = self._writer().indexer.fact_watchers
        watchers.append(watcher)
        return lambda: watchers.remove(watcher)

    def wait_indexed(self, timeout_s: float = _INDEX_WAIT_S) -> None:
        """Return when everything acknowledged so far is in the index; Unavailable when that takes too
        long."""
        if self._writing is not None:
            self._writing.indexer.wait(self._writing.packs.log.acknowledged, timeout_s)
            return
        target = read_watermark(self.settings.state / _WATERMARK_FILE)
        if target == START:
            return
        deadline = time.monotonic() + timeout_s
        while self.index.positions()[0] < target:
            if time.monotonic() > deadline:
                raise Unavailable("the index has not caught up yet")
            time.sleep(_POLL_S)

    # Reading

    def open_payload(self, location: Location) -> BinaryIO:
        """A seekable reader over exactly one Part 10 stream, as it came. Raises NotFound, Corrupt,
        Evicted."""
        return self.packs.open_payload(location)

    def open_instance(self, instance: StoredInstance) -> BinaryIO:
        """The same of an instance that was found here, with what people corrected of its study: so the stream
        may be longer than its location says, though its data set begins at the same place. When its pack went
        since, its place is asked once more. Raises Evicted when its bytes were given up, CannotUnderstand
        when it can't hold what was corrected."""
        payload = self._open_at(self.packs.open_payload, instance)
        overlay = instance.corrections
        if overlay is None:
            return payload
        offset, syntax = instance.location.dataset_offset, instance.head.transfer_syntax_uid
        return corrected.corrected_file(payload, offset, syntax, overlay)

    def open_dataset(self, instance: StoredInstance) -> ReadableDataset:
        """Its data set alone, to be read into the reader's own memory; corrected, found again and refused as
        by `open_instance`."""
        plain = self._open_at(self.packs.open_dataset, instance)
        overlay = instance.corrections
        if overlay is None:
            return plain
        offset, syntax = instance.location.dataset_offset, instance.head.transfer_syntax_uid
        with self._open_at(self.packs.open_payload, instance) as payload:
            return corrected.corrected_dataset(plain, payload, offset, syntax, overlay)

    def _open_at(self, opened: Callable[[Location], T], instance: StoredInstance) -> T:
        if instance.evicted:
            raise Evicted(EVICTED)
        try:
            return opened(instance.location)
        except (NotFound, Evicted):
            uid = instance.head.sop_instance_uid
            for now in self.index.instances(instance.study_uid, instance.series_uid, uid):
                if now.evicted:
                    raise Evicted(EVICTED) from None
                if now.digest == instance.digest and now.location != instance.location:
                    return opened(now.location)
            raise

    def dataset_chunks(
        self, location: Location, *, offset: int = 0, chunk_bytes: int = 1 << 20
    ) -> Iterator[bytes]:
        """The data set without group 2, from `offset` on. Raises NotFound, Corrupt."""
        return self.packs.dataset_chunks(location, offset=offset, chunk_bytes=chunk_bytes)

    def verify(self, instance: StoredInstance) -> None:
        """Raises Corrupt unless the stored bytes are those that came."""
        self.packs.verify(instance.head, instance.digest, instance.location)

    # Facts and room

    def record_facts(self, facts: Sequence[Fact]) -> None:
        """Synced and applied to the index when this returns. Raises SyncFailed or OutOfResources when they
        are not recorded; Unavailable when they are, and the index will have them later."""
        if facts:
            self._writer().indexer.record_facts(facts)

    def free_bytes(self) -> int:
        return self._storage.free_bytes()

    # How it stands, for those who watch over it

    @property
    def partials(self) -> Partials:
        """What is kept of objects whose sender was cut off."""
        return self._writer().partials

    def index_lag(self) -> tuple[int, float]:
        """How many records wait for the index, and for how long the oldest does, in seconds."""
        recent = self._writer().recent
        return len(recent), recent.oldest_age_s()

    def check_alive(self) -> None:
        """Raises Unavailable when the thread is gone that brings records into the index."""
        if not self._writer().indexer.alive:
            raise Unavailable("the indexer has ended")

    def check_takes(self) -> None:
        """Raises OutOfResources, Unavailable or OSError when instances would not be taken now: the disk is
        full, or can't be written, or the index is behind its bound."""
        writing = self._writer()
        writing.intake.require_space(0)
        with tempfile.TemporaryFile(dir=self.settings.state) as file:
            file.write(b"0")
        if writing.intake.is_pressed():
            raise Unavailable("the index is behind its bound")
        if writing.indexer.failing:
            raise Unavailable("the index takes nothing")


def read_acknowledged(state: Path) -> Position:
    """How far the writer of the archive in `state` has acknowledged; START when nobody says."""
    return read_watermark(state / _WATERMARK_FILE)


def lock_state(state: Path) -> int:
    """The lock of an archive's one writer; it goes with the process."""
    fd = os.open(state / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Unavailable("another process writes to this archive") from error
    return fd


def open_logs(
    settings: ArchiveSettings,
    storage: Storage,
    packs_read: Position,
    facts_read: Position,
    *,
    resumable: Container[str] = (),
) -> tuple[Packs, FactLog, Watermark]:
    """Packs and facts as the last crash left them; what an index has read of them was promised."""
    writer = LAYOUT.writer_of(storage)
    watermark = Watermark.open(settings.state / _WATERMARK_FILE, writer)
    try:
        promised = max(packs_read, watermark.position)
        packs = Packs.open(
            storage,
            promised=promised,
            limits=settings.log_limits,
            image_bytes_max=settings.small_object_bytes_max,
            resumable=resumable,
        )
        try:
            facts = FactLog.open(storage, promised=facts_read, writer=packs.writer)
        except BaseException:
            packs.close()
            raise
    except BaseException:
        watermark.close()
        raise
    watermark.writer = packs.writer
    return packs, facts, watermark
