"""Owns the thread that keeps the worklist: it has the watched folder followed, and takes off what is past. It
answers no query and reads no file itself."""

from __future__ import annotations

import logging
import time
from datetime import datetime, timedelta

from archive.ledger import Ledger
from archive.rounds import Rounds
from node.worklistfolder import WorklistFolder

log = logging.getLogger(__name__)

PRUNE_EVERY_S = 3600.0
_RETRY_S = 5.0
_DAY_US = 86_400 * 1_000_000


class WorklistKeeper:
    """See the module's docstring. `start` and `stop` make and end its thread."""

    def __init__(self, ledger: Ledger, folder: WorklistFolder | None, *, poll_s: float, keep_days: float,
                 performed_keep_days: float) -> None:
        """Scheduled steps go `keep_days` after the day they were to begin, performed ones after
        `performed_keep_days` without a change."""
        self._ledger = ledger
        self._folder = folder
        self._poll_s = poll_s
        self._keep_days = keep_days
        self._performed_keep_days = performed_keep_days
        self._pruned_s = -PRUNE_EVERY_S
        self._rounds = Rounds("worklist", self._look, log, retry_s=max(_RETRY_S, poll_s))

    def start(self) -> None:
        self._rounds.start()

    def stop(self) -> None:
        self._rounds.stop()

    def prune(self) -> None:
        """Take off what is past."""
        now_us = time.time_ns() // 1000
        oldest = datetime.now() - timedelta(days=self._keep_days)
        steps = self._ledger.prune_scheduled(f"{oldest:%Y%m%d}", now_us - int(self._keep_days * _DAY_US))
        performed = self._ledger.prune_performed(now_us - int(self._performed_keep_days * _DAY_US))
        if steps or performed:
            log.info("%d scheduled and %d performed steps are past, and gone", steps, performed)

    def _look(self) -> float:
        if self._folder is not None:
            self._folder.look()
        if time.monotonic() - self._pruned_s >= PRUNE_EVERY_S:
            self.prune()
            self._pruned_s = time.monotonic()
        return self._poll_s
