"""Eviction: gives up the bytes of instances that the region has. What is evicted stays listed.

Order. (1) An instance is chosen: live, with a receipt that is not younger than `protected_to`, in a pack that
is sealed. (2) The EVICTED fact, with all that an index needs of it, is synced, and with it the index says so.
(3) Only then, and only what the index says, its space is given back: a large object's own pack is removed, a
payload in a pack is punched, block by block; the record's header, the beginning of its payload and its
trailer stay. A crash leaves what is left to give back in the index, or in the facts from which it is made.
Where the file system can't punch, the space comes back by `compaction.py`.
"""

from __future__ import annotations

import errno
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from archive.errors import Corrupt, InvalidInput
from archive.index.index import Index
from archive.index.space import Place, Reclaim
from archive.model import Fact, FactKind, IndexEntry, Record
from archive.packs import holes, large
from archive.packs.packs import LAYOUT, Packs
from archive.packs.recovery import Damage
from archive.rereading import read_attributes
from archive.space.holdings import State, holdings, record_at
from archive.space.pace import Pace

log = logging.getLogger(__name__)

BATCH_FACTS_MAX = 500
STUDIES_MAX = 1_000
_PUNCHED_BYTES = 64 << 10  # what an eviction costs the disk, whatever the size of what goes
_ATTRIBUTES_CHARS_MAX = 4 << 20
_RECLAIM_BATCH = 500
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class EvictionRequest:
    """What to give up: of one study or several, or what was received before a time, or the oldest until so
    much disk is free. `protected_to_us`: a receipt of a later time is not enough, since the region may still
    lose it."""

    protected_to_us: int
    study_uid: str = ""
    received_before_us: int = 0
    free_bytes: int = 0
    dry_run: bool = False
    study_uids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.protected_to_us <= 0:
            raise InvalidInput("say up to when the region's receipts are protected")
        if len(self.study_uids) > STUDIES_MAX:
            raise InvalidInput(f"more than {STUDIES_MAX} studies at once")
        if not (self.studies or self.received_before_us or self.free_bytes):
            raise InvalidInput("say what to evict: a study, an age, or how much disk is to be free")

    @property
    def studies(self) -> tuple[str, ...]:
        return (self.study_uid, *self.study_uids) if self.study_uid else self.study_uids


@dataclass(slots=True)
class EvictionReport:
    """What was evicted, or would be. `kept` counts what has no receipt that is old enough, `unreadable` what
    could not be read and stays as it is."""

    instances: int = 0
    bytes: int = 0
    kept: int = 0
    unreadable: int = 0
    packs: set[int] = field(default_factory=set)


class Eviction:
    """The eviction of one archive, in its writer's process."""

    def __init__(
        self, packs: Packs, index: Index, record_facts: Callable[[Sequence[Fact]], None]
    ) -> None:
        self._packs = packs
        self._index = index
        self._record_facts = record_facts

    def evict(self, request: EvictionRequest, pace: Pace) -> EvictionReport:
        """Choose, record, give back. Raises Unavailable when the index does not answer, or when it is
        stopped; what was done by then stays done."""
        report = EvictionReport()
        chosen = self._of_studies(request, report) if request.studies else self._oldest(request, report)
        batch: list[IndexEntry] = []
        chars = 0
        for record in chosen:
            if request.dry_run:
                _count(report, record)
                continue
            attributes = read_attributes(self._packs, record)
            if attributes is None:
                report.unreadable += 1
                continue
            batch.append(IndexEntry(record, attributes))
            chars += sum(len(value) for level in _levels(batch[-1]) for value in level.values())
            if len(batch) >= BATCH_FACTS_MAX or chars > _ATTRIBUTES_CHARS_MAX:
                self._evict(batch, report, pace)
                batch, chars = [], 0
        if batch:
            self._evict(batch, report, pace)
        return report

    def _evict(self, batch: Sequence[IndexEntry], report: EvictionReport, pace: Pace) -> None:
        now_us = time.time_ns() // 1000
        self._record_facts([
            Fact(FactKind.EVICTED, entry.record.head.sop_instance_uid, entry.record.digest, "", now_us,
                 entry=entry)
            for entry in batch
        ])  # fmt: skip
        for entry in batch:
            _count(report, entry.record)
        self.give_back()
        pace.took(sum(min(entry.record.location.length, _PUNCHED_BYTES) for entry in batch))

    def _of_studies(self, request: EvictionRequest, report: EvictionReport) -> Iterator[Record]:
        for study_uid in request.studies:
            yield from self._of_study(study_uid, request, report)

    def _of_study(
        self, study_uid: str, request: EvictionRequest, report: EvictionReport
    ) -> Iterator[Record]:
        contents, damaged = self._index.contents_of(study_uid), self._index.cached.damaged_of(study_uid)
        current = LAYOUT.name_of(self._packs.log.end.file)
        if not request.dry_run and any(location.pack == current for _, _, location in contents):
            self._packs.log.seal()
        for start in range(0, len(contents), BATCH_FACTS_MAX):
            part = contents[start : start + BATCH_FACTS_MAX]
            places = self._index.places(uid for uid, _, _ in part)
            for uid, digest, location in part:
                place = places.get((uid, digest))
                if (uid, digest) in damaged:  # what is left of it may be the last there is
                    report.kept += 1
                    continue
                if place is None or place.location != location or not self._may_go(place, request, report):
                    continue
                record = record_at(self._packs, uid, digest, location)
                if record is None:
                    report.unreadable += 1
                else:
                    yield record

    def _oldest(self, request: EvictionRequest, report: EvictionReport) -> Iterator[Record]:
        """Pack by pack, in the order in which they were written."""
        free_bytes = self._packs.storage.free_bytes()
        for number, end in sorted(self._packs.log.sealed().items()):
            try:
                for chunk in holdings(self._packs, self._index, number, end):
                    for item in chunk:
                        if request.free_bytes and free_bytes >= request.free_bytes:
                            return
                        if isinstance(item, Damage) or item.place is None or item.state is not State.LIVE:
                            continue
                        if self._may_go(item.place, request, report):
                            free_bytes += item.record.location.length
                            yield item.record
            except Corrupt as error:
                log.warning("pack %d is not looked at: %s", number, error)

    def _may_go(self, place: Place, request: EvictionRequest, report: EvictionReport) -> bool:
        if place.evicted or not place.live:
            return False
        if request.received_before_us and place.received_at_us >= request.received_before_us:
            return False
        if not 0 < place.receipt_us <= request.protected_to_us:
            report.kept += 1
            return False
        return True

    # Giving back

    def give_back(self) -> int:
        """Give back everything that is due; how many payloads and packs that were. Safe to repeat."""
        count = 0
        while rows := self._index.due(time.time_ns() // 1000, _RECLAIM_BATCH):
            for pack, group in itertools.groupby(rows, key=lambda row: row.location.pack):
                self._give_back(pack, list(group))
            self._index.note_given_back(rows)
            count += len(rows)
        return count

    def _give_back(self, pack: str, rows: Sequence[Reclaim]) -> None:
        if pack.startswith(large.FOLDER):
            self._remove(pack, large.part_name(pack))
        elif any(row.is_pack for row in rows):
            self._remove_pack(pack)
        else:
            self._punch(pack, rows)

    def _remove(self, *names: str) -> None:
        for name in names:
            try:
                self._packs.storage.delete(name)
                log.info("%s is removed: its space was given back", name)
            except FileNotFoundError:
                continue
        self._packs.storage.sync_directory(names[0].partition("/")[0])

    def _remove_pack(self, pack: str) -> None:
        number = LAYOUT.number_of(pack)
        if number >= self._packs.log.end.file:
            log.error("%s is being written and is not removed", pack)
            return
        self._packs.log.forget(number)
        self._remove(pack)

    def _punch(self, pack: str, rows: Sequence[Reclaim]) -> None:
        if not self._packs.storage.capabilities.punch_holes:
            return
        try:
            file = self._packs.storage.open(pack, write=True)
        except FileNotFoundError:
            return
        try:
            for row in rows:
                if record_at(self._packs, row.sop_instance_uid, row.digest, row.location) is None:
                    log.error("%s: what was evicted does not lie at %d", pack, row.location.offset)
                    continue
                start, end = holes.span_of(row.location)
                if end > start:
                    file.punch(start, end - start)
            file.fdatasync()
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            log.warning("%s can't be punched (errno %s), and is compacted instead", pack, error.errno)
        finally:
            file.close()


def _count(report: EvictionReport, record: Record) -> None:
    report.instances += 1
    report.bytes += record.location.length
    report.packs.add(record.end.file)


def _levels(entry: IndexEntry) -> tuple[dict[str, str], ...]:
    found = entry.attributes
    return dict(found.patient), dict(found.study), dict(found.series), dict(found.instance)
