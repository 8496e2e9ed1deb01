"""Owns the thread of a part that has something to do again and again: it goes round until it is stopped,
rests between two rounds or until it is woken, and outlives whatever a round raises. What a round does, its
part says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from archive.errors import MissError

STOP_S_MAX = 30.0


class Rounds:
    """See the module's docstring. `start` and `stop` make and end its thread, any thread may `wake` it;
    `stopping` is set when it is to end: a long round looks at it."""

    def __init__(self, name: str, go_round: Callable[[], float], log: logging.Logger, *, retry_s: float,
                 first_s: float = 0.0) -> None:
        """`go_round` says how many seconds to rest at the most, `retry_s` is that after a round that failed,
        `first_s` before the first. `name` is the thread's, and in the log of what failed."""
        self._name = name
        self._go_round = go_round
        self._log = log
        self._retry_s = retry_s
        self._rest_s = first_s
        self._awake = threading.Event()
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, wait_s: float = STOP_S_MAX) -> None:
        """The round under way is finished, if that does not take longer; one that never started is none."""
        self.stopping.set()
        self._awake.set()
        if self._thread.ident is not None:
            self._thread.join(wait_s)

    def wake(self) -> None:
        """Go round now, and once more if a round is under way."""
        self._awake.set()

    def _run(self) -> None:
        while True:
            self._awake.wait(self._rest_s)
            self._awake.clear()
            if self.stopping.is_set():
                return
            self._rest_s = self._retry_s
            try:
                self._rest_s = self._go_round()
            except MissError as error:
                if not self.stopping.is_set():
                    self._log.warning("%s: again in %g s: %s", self._name, self._retry_s, error)
            except Exception:
                self._log.exception("%s met an error that it does not know", self._name)
