"""Whether a process lives and whether it is ready, by checks that may hang: each runs in a thread of a small
pool and has two seconds; one that has not come back from last time is waited for, and not begun again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

from archive.errors import MissError

log = logging.getLogger(__name__)

CHECK_S = 2.0

Check = Callable[[], object]
"""Returns when all is well, whatever; raises MissError, in words without patient data, when not."""


class Checks:
    """Runs checks by their names."""

    def __init__(self, checks: Mapping[str, Check], *, wait_s: float = CHECK_S) -> None:
        self._checks = dict(checks)
        self._wait_s = wait_s
        self._pool = ThreadPoolExecutor(max(len(self._checks), 1), "check")
        self._running: dict[str, Future[object]] = {}
        self._lock = threading.Lock()

    def failed(self) -> dict[str, str]:
        """The checks that fail, and why; nothing when all is well."""
        with self._lock:
            begun = {name: self._begin(name, check) for name, check in self._checks.items()}
        return {name: words for name, check in begun.items() if (words := self._words(name, check))}

    def _begin(self, name: str, check: Check) -> Future[object]:
        before = self._running.get(name)
        if before is not None and not before.done():
            return before
        self._running[name] = self._pool.submit(check)
        return self._running[name]

    def _words(self, name: str, check: Future[object]) -> str:
        try:
            check.result(self._wait_s)
        except FutureTimeout:
            return f"no answer within {self._wait_s:g} s"
        except MissError as error:
            return str(error) or type(error).__name__
        except OSError as error:
            return error.strerror or type(error).__name__
        except Exception as error:
            log.warning("the check of %s failed unexpectedly: %s", name, type(error).__name__)
            return type(error).__name__
        return ""

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
