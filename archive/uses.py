"""When each study was last wanted: retrieved by a device, opened in the ward's portal, brought back. Kept in
memory and written in batches, so that a retrieve of a thousand instances costs one row once a minute. What a
crash takes is a minute of it: then a study may go a little early, and comes back when it is wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from archive.ledger import Ledger

STUDIES_MAX = 100_000  # in memory; what is past them is not noted
FLUSH_S = 60.0
KEPT_US = 400 * 86_400 * 1_000_000


class Uses:
    """Safe to use from any thread."""

    def __init__(self, ledger: Ledger, clock: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        self._ledger = ledger
        self._clock = clock
        self._lock = threading.Lock()
        self._noted: dict[str, int] = {}
        self._flushed_s = time.monotonic()

    def note(self, study_uid: str) -> None:
        """It is wanted now. Waits for no disk."""
        now_us = self._clock()
        with self._lock:
            if study_uid in self._noted or len(self._noted) < STUDIES_MAX:
                self._noted[study_uid] = now_us

    def flush_if_due(self, every_s: float = FLUSH_S) -> None:
        """Write what was noted, if it was not just done."""
        if time.monotonic() - self._flushed_s >= every_s:
            self.flush()

    def flush(self) -> None:
        """Write what was noted; what can't be written is tried with the next batch."""
        with self._lock:
            self._flushed_s = time.monotonic()
            noted, self._noted = self._noted, {}
        try:
            self._ledger.note_uses(noted)
        except BaseException:
            with self._lock:
                self._noted = noted | self._noted
            raise

    def forget(self) -> None:
        """What nobody wanted for more than a year."""
        self._ledger.forget_uses(self._clock() - KEPT_US)
