"""How fast work in the background may go beside intake: a rate, and never more than half of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from archive.errors import Unavailable

_PIECE_S = 0.25
_PRESSED_S_MAX = 30.0


class Pace:
    """Bytes per second over a job, and a pause as long as the work between two. `pressed` says that intake
    slows down already: then the work waits for it, within a bound."""

    def __init__(
        self,
        bytes_per_s: float,
        *,
        pressed: Callable[[], bool] = lambda: False,
        stopping: threading.Event | None = None,
        share: float = 0.5,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._pressed = pressed
        self._stopping = stopping or threading.Event()
        self._share = share
        self._began_s = self._worked_from_s = time.monotonic()
        self._bytes = 0

    def took(self, count: int) -> None:
        """So many bytes were read or written: pause. Raises Unavailable when the work is to end."""
        now = time.monotonic()
        self._bytes += count
        worked_s = now - self._worked_from_s
        pause_s = max(
            worked_s * (1 - self._share) / self._share,
            self._bytes / self._bytes_per_s - (now - self._began_s),
        )
        until_s = now + pause_s
        pressed_until_s = now + _PRESSED_S_MAX
        while not self._stopping.is_set():
            now = time.monotonic()
            if now < until_s:
                self._stopping.wait(min(until_s - now, _PIECE_S))
            elif self._pressed() and now < pressed_until_s:
                self._stopping.wait(_PIECE_S)
            else:
                break
        if self._stopping.is_set():
            raise Unavailable("it was stopped: what is done stays done, and asked again it goes on")
        self._worked_from_s = time.monotonic()
