"""How many push streams run at once. Each has a connection of its own, and on a line that loses packets or is
long a connection alone carries little, while on a fast one many only cost. So few begin, and they double
after each period in which they mostly waited, for the line or for verdicts, and together stayed below what
such lines carry. Told what was written, decides, and does nothing else."""

from __future__ import annotations

FIRST = 2
PERIOD_S = 1.0
WAIT_SHARE = 0.5
THIN_BYTES_PER_S = 60e6


class Flows:
    """`running` is how many of at most `most` may run."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.running = min(FIRST, most)
        self.is_fast = False  # as of the last period
        self._begun_s: float | None = None
        self._bytes = 0
        self._waited_s = self._worked_s = 0.0

    def begin(self) -> None:
        """Another line: what was learnt of the last does not count."""
        self.running = min(FIRST, self._most)
        self.is_fast = False
        self._begun_s = None

    def wrote(self, size: int, waited_s: float, worked_s: float, now_s: float) -> bool:
        """A message went; the line and what was on its way kept it waiting so long, making it and waiting for
        its turn took so long. Whether more streams may run."""
        if self._begun_s is None:
            self._begun_s, self._bytes = now_s - waited_s - worked_s, 0
            self._waited_s = self._worked_s = 0.0
        self._bytes += size
        self._waited_s += waited_s
        self._worked_s += worked_s
        took_s = now_s - self._begun_s
        if took_s < PERIOD_S:
            return False
        self._begun_s = None
        self.is_fast = self._bytes / took_s >= THIN_BYTES_PER_S
        busy = self._waited_s >= WAIT_SHARE * (self._waited_s + self._worked_s)
        if not busy or self.is_fast or self.running >= self._most:
            return False
        self.running = min(2 * self.running, self._most)
        return True
