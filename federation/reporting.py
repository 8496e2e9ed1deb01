"""What a node says of itself: made for each of its hubs every few seconds, and whenever its backlog begins or
ends. A report is made only after the index has what was acknowledged before it: "nothing pending" is a
promise about coverage, not a guess. What has to be counted row by row is counted once a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from archive.archive import Archive
from archive.model import Copies
from certs.identity import Identity
from federation.coverage import Report

COUNT_EVERY_S = 60.0
RATE_OVER_S = 0.5


@dataclass(slots=True)
class Sent:
    """What went over the line so far: bytes of data sets, and what they took on it."""

    bytes: int = 0
    wire_bytes: int = 0


class Reporter:
    """Makes reports; blocking, one thread at a time. `identity` is the one in use now, `sent` how much was
    sent since the start, `hub_clock` the region's time as it is known here."""

    def __init__(
        self,
        archive: Archive,
        identity: Callable[[], Identity],
        sent: Callable[[], Sent],
        clock: Callable[[], int],
        hub_clock: Callable[[], int],
        *,
        ae_title: str,
        hold: bool,
    ) -> None:
        self._archive = archive
        self._identity = identity
        self._sent = sent
        self._clock = clock
        self._hub_clock = hub_clock
        self._ae_title = ae_title
        self._hold = hold
        self._rate = Rate()
        self._copies = Copies()
        self._counted_s: float | None = None

    @property
    def bytes_per_s(self) -> float:
        return self._rate.bytes_per_s

    def make(self) -> Report:
        archive, as_of_us = self._archive, self._hub_clock()
        archive.wait_indexed()
        summary, totals = archive.index.pending_summary(), archive.index.totals()
        sent = self._sent()
        self._rate.measure(sent)
        copies = self._count()
        return Report(
            pending=summary.count - summary.set_aside,
            pending_bytes=summary.bytes,
            oldest_pending_us=summary.oldest_us,
            set_aside=summary.set_aside,
            conflicts=totals.conflicts,
            instances=totals.instances,
            free_bytes=archive.free_bytes(),
            clock_us=self._clock(),
            certificate_not_after_us=self._identity().not_after_us,
            rate_bytes_per_s=self._rate.bytes_per_s,
            ae_title=self._ae_title,
            hold=self._hold,
            evicted=copies.evicted,
            damaged=copies.damaged,
            bytes=totals.bytes,
            wire_ratio=self._rate.wire_ratio,
            as_of_us=as_of_us,
        )

    def _count(self) -> Copies:
        now_s = time.monotonic()
        if self._counted_s is None or now_s - self._counted_s >= COUNT_EVERY_S:
            self._copies, self._counted_s = self._archive.index.copies(), now_s
        return self._copies


class Rate:
    """Bytes of data sets a second since the last measure, and how many each byte on the line carried the last
    time that any went."""

    def __init__(self) -> None:
        self._at_s = time.monotonic()
        self._sent = Sent()
        self.bytes_per_s = 0.0
        self.wire_ratio = 0.0

    def measure(self, sent: Sent) -> None:
        now_s = time.monotonic()
        if now_s - self._at_s < RATE_OVER_S:
            return
        data, wire = sent.bytes - self._sent.bytes, sent.wire_bytes - self._sent.wire_bytes
        self.bytes_per_s = max(data, 0) / (now_s - self._at_s)
        if data > 0 and wire > 0:
            self.wire_ratio = data / wire
        self._at_s, self._sent = now_s, sent
