"""Purging: gives back the bytes of what was removed for good. The index keeps which contents they were, so
that none of them comes back.

Order. (1) The PURGED fact says so; who records it has asked about retention. (2) An EVICTED fact for each
content is synced, and with it the index says so. Where the region decided, it tells nothing of the instance
but its UIDs; what a ward purged alone the region may still restore, so there it tells all. (3) Only then is
the space given back. A crash leaves the rest to be found by the index: what is purged and still has bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from archive.index.index import Index
from archive.index.removed import RemovedContent, Tombstone
from archive.model import Attributes, Fact, FactKind, IndexEntry
from archive.packs.packs import LAYOUT, Packs
from archive.removals import GIVEN_UP
from archive.rereading import read_attributes
from archive.space.eviction import Eviction
from archive.space.holdings import record_at
from archive.space.pace import Pace

log = logging.getLogger(__name__)

BATCH = 500


@dataclass(slots=True)
class Purged:
    """What was given back; `unreadable` could not be found where the index says that it lies."""

    contents: int = 0
    bytes: int = 0
    unreadable: int = 0


class Purging:
    """The purging of one archive, in its writer's process."""

    def __init__(
        self, packs: Packs, index: Index, record_facts: Callable[[Sequence[Fact]], None], eviction: Eviction
    ) -> None:
        self._packs = packs
        self._index = index
        self._record_facts = record_facts
        self._eviction = eviction

    def purge(self, tombstone: Tombstone, pace: Pace) -> Purged:
        """Give back what a purged removal covers here. Safe to repeat."""
        done = Purged()
        while True:
            found = self._index.removed_under(tombstone.removal, BATCH, kept=True)
            facts = self._facts(found, tombstone, done)
            if not facts:
                return done
            self._record_facts(facts)
            self._eviction.give_back()
            size = sum(fact.entry.record.location.length for fact in facts if fact.entry is not None)
            done.contents += len(facts)
            done.bytes += size
            pace.took(size)

    def _facts(self, found: Sequence[RemovedContent], tombstone: Tombstone, done: Purged) -> list[Fact]:
        current = LAYOUT.name_of(self._packs.log.end.file)
        if any(one.record.location.pack == current for one in found):
            self._packs.log.seal()
        now_us = time.time_ns() // 1000
        facts: list[Fact] = []
        done.unreadable = 0
        for one in found:
            uid, digest = one.record.head.sop_instance_uid, one.record.digest
            record = record_at(self._packs, uid, digest, one.record.location)
            attributes = None
            if record is not None:
                attributes = _bare(one) if tombstone.final else read_attributes(self._packs, record)
            if record is None or attributes is None:
                done.unreadable += 1
                log.error("what was purged is not found where it should lie: record in %s",
                          one.record.location.pack)  # fmt: skip
                continue
            entry = IndexEntry(record, attributes)
            facts.append(Fact(FactKind.EVICTED, uid, digest, "", now_us, GIVEN_UP, entry))
        return facts


def _bare(one: RemovedContent) -> Attributes:
    head = one.record.head
    return Attributes(
        patient={}, study={"StudyInstanceUID": one.study_uid}, series={"SeriesInstanceUID": one.series_uid},
        instance={"SOPClassUID": head.sop_class_uid, "SOPInstanceUID": head.sop_instance_uid},
    )  # fmt: skip
