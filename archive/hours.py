"""Owns windows of hours, by the clock on the wall of this machine: whether one is open, and when it opens
next."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)\s*-\s*(?:([01]\d|2[0-3]):([0-5]\d)|24:00)", re.ASCII)
_DAY_MIN = 24 * 60


@dataclass(frozen=True, slots=True)
class Hours:
    """From one minute of the day up to another, which is not in it; over midnight where the first is later.
    `zone` is the machine's own when it is None."""

    begin_min: int
    end_min: int
    zone: tzinfo | None = None

    @classmethod
    def parse(cls, text: str, zone: tzinfo | None = None) -> Hours:
        """`22:00-06:00`. ValueError for anything else, and for a window without a minute."""
        found = _HOURS.fullmatch(text.strip())
        if found is None:
            raise ValueError("a window of hours is HH:MM-HH:MM, for example 22:00-06:00")
        begin = int(found[1]) * 60 + int(found[2])
        end = int(found[3]) * 60 + int(found[4]) if found[3] is not None else _DAY_MIN
        if begin == end:
            raise ValueError("a window of hours that ends when it begins is never open")
        return cls(begin, end, zone)

    def holds(self, at_us: int) -> bool:
        """Whether the window is open at a moment."""
        local = self._local(at_us)
        minute = local.hour * 60 + local.minute
        if self.begin_min < self.end_min:
            return self.begin_min <= minute < self.end_min
        return minute >= self.begin_min or minute < self.end_min

    def opens_us(self, at_us: int) -> int:
        """`at_us` where the window is open then, else when it opens next."""
        if self.holds(at_us):
            return at_us
        local = self._local(at_us)
        hour, minute = divmod(self.begin_min, 60)
        opens = local.replace(hour=hour, minute=minute, second=0, microsecond=0)
        if opens <= local:
            opens += timedelta(days=1)
        if self.zone is None:  # the same clock time of another day may have another offset
            opens = opens.replace(tzinfo=None).astimezone()
        return int(opens.timestamp() * 1e6)

    def _local(self, at_us: int) -> datetime:
        return datetime.fromtimestamp(at_us / 1e6, self.zone or datetime.now().astimezone().tzinfo)

    def __str__(self) -> str:
        return "-".join(f"{at // 60:02d}:{at % 60:02d}" for at in (self.begin_min, self.end_min))
