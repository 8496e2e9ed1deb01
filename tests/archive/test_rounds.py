"""The thread that goes round: it outlives what a round raises, rests as it is told, and ends at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from archive.errors import Unavailable
from archive.rounds import Rounds
from tests.waiting import wait_for

NEVER_S = 1000.0
log = logging.getLogger(__name__)


@contextmanager
def going(go_round: Callable[[], float], *, retry_s: float = NEVER_S,
          first_s: float = 0.0) -> Iterator[Rounds]:
    rounds = Rounds("rounds", go_round, log, retry_s=retry_s, first_s=first_s)
    rounds.start()
    try:
        yield rounds
    finally:
        began_s = time.monotonic()
        rounds.stop()
        assert time.monotonic() - began_s < 5 and not rounds._thread.is_alive()


def test_a_round_that_fails_is_followed_by_others(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = [Unavailable("not now"), ValueError("whatever")]
    calls: list[int] = []

    def go_round() -> float:
        calls.append(1)
        if errors:
            raise errors.pop(0)
        return NEVER_S

    with going(go_round, retry_s=0.0):
        wait_for(lambda: len(calls) == 3, "three rounds")
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "not now" in caplog.text and len(calls) == 3


def test_who_rests_is_woken() -> None:
    calls: list[int] = []

    def go_round() -> float:
        calls.append(1)
        return NEVER_S

    with going(go_round, first_s=NEVER_S) as rounds:
        for count in (1, 2):
            rounds.wake()
            wait_for(lambda count=count: len(calls) == count, "a round")  # type: ignore[misc]
    assert len(calls) == 2


def test_woken_in_a_round_it_goes_round_once_more() -> None:
    begun, go_on, calls = threading.Event(), threading.Event(), list[int]()

    def go_round() -> float:
        calls.append(1)
        begun.set()
        assert go_on.wait(10)
        return NEVER_S

    with going(go_round) as rounds:
        assert begun.wait(10)
        rounds.wake()
        go_on.set()
        wait_for(lambda: len(calls) == 2, "a second round")


def test_a_long_round_sees_that_it_is_to_end() -> None:
    begun = threading.Event()

    def go_round() -> float:
        begun.set()
        assert rounds.stopping.wait(10)
        raise Unavailable("in the middle")

    with going(go_round) as rounds:
        assert begun.wait(10)


def test_what_never_started_is_stopped() -> None:
    Rounds("rounds", lambda: 0.0, log, retry_s=1.0).stop()
