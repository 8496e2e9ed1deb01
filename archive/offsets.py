"""Offsets from UTC (PS3.3 C.12.1, (0008,0201)) and what they make of dates and times: the moment that a date
and time name, said in another zone. It never guesses an offset that is not known."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

_OFFSET = re.compile(r"[+-](0\d|1[0-4])[0-5]\d", re.ASCII)
_MINUTES_MIN, _MINUTES_MAX = -12 * 60, 14 * 60  # PS3.5 6.2, DT

# Every offset that a clock may have: quarters of an hour.
OFFSETS = tuple(
    f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}{abs(minutes) % 60:02}"
    for minutes in range(_MINUTES_MIN, _MINUTES_MAX + 1, 15)
)


def is_offset(text: str) -> bool:
    """Whether `text` is an offset from UTC as DICOM writes it: a sign, hours and minutes."""
    return _OFFSET.fullmatch(text) is not None and _MINUTES_MIN <= minutes_of(text) <= _MINUTES_MAX


def minutes_of(offset: str) -> int:
    minutes = int(offset[1:3]) * 60 + int(offset[3:5])
    return -minutes if offset[0] == "-" else minutes


def moved(date: str, time: str, minutes: int) -> tuple[str, str]:
    """A date (YYYYMMDD) and a time of at least hours, `minutes` later, in the precision that they had: hours
    alone become hours and minutes where it takes them. ValueError for what is no date or time, or leaves the
    calendar."""
    hours, rest = time[:2], time[2:]
    exact = datetime.strptime(date + hours + (rest[:2] or "00"), "%Y%m%d%H%M")
    try:
        exact += timedelta(minutes=minutes)
    except OverflowError:
        raise ValueError("past the calendar") from None
    there = f"{exact:%H%M}" if rest or minutes % 60 else f"{exact:%H}"
    return f"{exact.year:04}{exact:%m%d}", there + rest[2:]
