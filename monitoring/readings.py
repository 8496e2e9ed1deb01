"""A reading that costs something (a question to the index, to the ledger): made anew at most every so often,
by one thread at a time; who comes meanwhile, or when it can't be made, is given the last one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class Cached(Generic[T]):
    """See the module's docstring. `failed` says whether the last try came to nothing."""

    def __init__(self, make: Callable[[], T], every_s: float) -> None:
        self._make = make
        self._every_s = every_s
        self._making = threading.Lock()
        self._made: T | None = None
        self._made_s: float | None = None
        self.failed = False

    def now(self) -> T | None:
        """The reading; None when there never was one."""
        due = self._made_s is None or time.monotonic() - self._made_s >= self._every_s
        if due and self._making.acquire(blocking=self._made is None):
            try:
                self._read()
            finally:
                self._making.release()
        return self._made

    def _read(self) -> None:
        if self._made_s is not None and time.monotonic() - self._made_s < self._every_s:
            return  # another thread made it while this one waited
        self._made_s = time.monotonic()
        try:
            self._made, self.failed = self._make(), False
        except Exception as error:  # a scrape says what it can
            log.info("a reading for the metrics can't be made: %s", type(error).__name__)
            self.failed = True
