"""Waiting in tests: a condition is polled within a bound, and nothing sleeps for luck."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.005
WAIT_S_MAX = 20.0


def wait_for(condition: Callable[[], T], what: str, timeout_s: float = WAIT_S_MAX) -> T:
    """The first true answer; AssertionError, which says `what` did not come, when there is none in time."""
    until_s = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < until_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)
    return answer
