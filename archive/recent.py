"""What was written and is not in the index yet: by UID for intake's decision, in order for the indexer.

Only intake adds (one at a time, in the order of the log) and only the indexer retires, after the index has
committed: an instance is in here, in the index, or for a moment in both, but never in neither.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from archive.model import Attributes, Position
from archive.packs.packs import Written


@dataclass(slots=True)
class Unindexed:
    """One written instance. `attributes` are handed over from memory, or None when too many wait: then the
    indexer reads them from the pack again."""

    written: Written
    study_uid: str
    attributes: Attributes | None
    at_s: float

    @property
    def failed(self) -> bool:
        """Whether its sync failed: it was promised to nobody and is not there."""
        return self.written.appended.failed


class Recent:
    """See the module's docstring. Bounded by intake's lag bound; attributes are kept for `attributes_max`."""

    def __init__(self, attributes_max: int = 2000) -> None:
        self._attributes_max = attributes_max
        self._lock = threading.Lock()
        self._by_uid: dict[str, list[Unindexed]] = {}
        self._order: deque[Unindexed] = deque()

    def __len__(self) -> int:
        return len(self._order)

    def oldest_age_s(self) -> float:
        """How long the oldest of it has waited."""
        try:
            return time.monotonic() - self._order[0].at_s
        except IndexError:
            return 0.0

    def add(self, written: Written, study_uid: str, attributes: Attributes) -> Unindexed:
        kept = attributes if len(self._order) < self._attributes_max else None
        entry = Unindexed(written, study_uid, kept, time.monotonic())
        with self._lock:
            self._by_uid.setdefault(written.record.head.sop_instance_uid, []).append(entry)
            self._order.append(entry)
        return entry

    def of(self, sop_instance_uid: str) -> list[Unindexed]:
        """What was written under this UID and not given up."""
        with self._lock:
            found = self._by_uid.get(sop_instance_uid)
            return [entry for entry in found if not entry.failed] if found else []

    def durable(self, limit: int) -> list[Unindexed]:
        """The oldest that are synced, in order; what failed to sync is dropped on the way."""
        batch: list[Unindexed] = []
        failed: list[Unindexed] = []
        with self._lock:
            for entry in self._order:
                appended = entry.written.appended
                if appended.durable:
                    batch.append(entry)
                elif appended.failed:
                    failed.append(entry)
                else:
                    break
                if len(batch) >= limit:
                    break
            for entry in failed:
                self._order.remove(entry)
                self._forget(entry)
        return batch

    def retire(self, position: Position) -> None:
        """The index has committed everything below `position`."""
        with self._lock:
            while self._order and self._order[0].written.record.end <= position:
                self._forget(self._order.popleft())

    def _forget(self, entry: Unindexed) -> None:
        uid = entry.written.record.head.sop_instance_uid
        entries = self._by_uid[uid]
        entries.remove(entry)
        if not entries:
            del self._by_uid[uid]
