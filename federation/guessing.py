"""Slows the guessing of passwords down: wrong ones make the next try wait, long for this name from this
address, short for the name from elsewhere, so that nobody can lock another person out. It counts in the
ledger, so that a restart forgives nothing, and checks no password itself."""

from __future__ import annotations

from collections.abc import Callable

from archive.ledger import Ledger

NAME_LENGTH_MAX = 128
MEMORY_US = 3_600 * 1_000_000  # failures older than an hour are forgotten

# (failures that cost nothing, longest wait): doubling from one second in between. A pair's wait refuses the
# try; the name's own is slept through, since a stranger can cause it and the owner must get in.
PAIR_FREE, PAIR_WAIT_S_MAX = 3, 300
ADDRESS_FREE, ADDRESS_WAIT_S_MAX = 20, 60
NAME_FREE, NAME_WAIT_S_MAX = 5, 4
SLEEPERS_MAX = 100


class Guessing:
    """Failed sign-ins over one ledger; `clock` gives microseconds since 1970. Every call is a question to the
    ledger."""

    def __init__(self, ledger: Ledger, clock: Callable[[], int]) -> None:
        self._ledger = ledger
        self._clock = clock

    def waits(self, name: str, address: str) -> tuple[float, float]:
        """Seconds until a try is looked at (0: now), and seconds that it is slept through."""
        refuse = max(
            self._wait(_pair(name, address), PAIR_FREE, PAIR_WAIT_S_MAX),
            self._wait(f"address:{address}", ADDRESS_FREE, ADDRESS_WAIT_S_MAX),
        )
        return refuse, self._wait(f"name:{name}", NAME_FREE, NAME_WAIT_S_MAX)

    def note_failure(self, name: str, address: str) -> None:
        now_us = self._clock()
        for subject in (_pair(name, address), f"name:{name}", f"address:{address}"):
            self._ledger.note_failure(subject, now_us, forget_before_us=now_us - MEMORY_US)

    def note_success(self, name: str, address: str) -> None:
        for subject in (_pair(name, address), f"name:{name}"):
            if self._ledger.throttle(subject).failures:
                self._ledger.clear_failures(subject)

    def _wait(self, subject: str, free: int, wait_s_max: int) -> float:
        throttle = self._ledger.throttle(subject)
        now_us = self._clock()
        if throttle.failures <= free or throttle.last_us < now_us - MEMORY_US:
            return 0.0
        wait_s: int = min(1 << min(throttle.failures - free - 1, 16), wait_s_max)
        return max(0.0, throttle.last_us / 1e6 + wait_s - now_us / 1e6)


def _pair(name: str, address: str) -> str:
    return f"pair:{address}:{name}"
