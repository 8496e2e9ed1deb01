"""How much of its line a node may take for pushes, by the hour of the week: entries say when they hold and
how many bytes a second go then. Where several hold the lowest counts, where none does there is no cap. The
hours are the node's local time; one that ends before it begins runs into the next day.

`Bucket` obeys it, as a token bucket over what goes on the wire: a message goes when nothing is owed, and what
it takes is owed from then on. So a message may be larger than what a moment allows, and the sum over a minute
is right all the same, also when the rate changes inside it. What readers wait for is capped with the rest,
and goes first; where the rate is 0 it alone goes, and without a cap, since nobody is served by an answer that
never comes.

Both are told the time, and wait for nothing themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo

from archive.hours import Hours

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MESSAGE_BYTES_MIN = 16 << 10
MESSAGE_BYTES_MAX = 1 << 20
_MESSAGE_S = 0.25  # a message of a capped line takes no longer, so that what is urgent gets in between
_BURST_S = 0.25    # what may go at once after a pause
_LOOK_S = 0.5      # the rate may change: it is looked at again so soon


@dataclass(frozen=True, slots=True)
class BudgetEntry:
    """On these days, in these hours, at most so many bytes a second. Without hours the whole day."""

    days: frozenset[int]
    hours: Hours | None
    bytes_per_s: float

    def holds(self, local: datetime) -> bool:
        if self.hours is None:
            return local.weekday() in self.days
        minute = local.hour * 60 + local.minute
        begin, end = self.hours.begin_min, self.hours.end_min
        if begin < end:
            return local.weekday() in self.days and begin <= minute < end
        if minute >= begin:
            return local.weekday() in self.days
        return minute < end and (local - timedelta(days=1)).weekday() in self.days


def parse_days(text: str) -> frozenset[int]:
    """`mon-fri, sun`; "" is every day. ValueError for anything else."""
    days: set[int] = set()
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(f"days are {', '.join(DAYS)}, or from one to another: mon-fri")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        days |= {day % 7 for day in range(begin, end + 1 if end >= begin else end + 8)}
    return frozenset(days or range(7))


class Budget:
    """The entries of a node. `zone` is the machine's own when it is None."""

    def __init__(self, entries: Sequence[BudgetEntry], zone: tzinfo | None = None) -> None:
        self._entries = tuple(entries)
        self._zone = zone

    def rate(self, at_us: int) -> float | None:
        """Bytes a second at a moment; None is no cap."""
        if not self._entries:
            return None
        local = datetime.fromtimestamp(at_us / 1e6, self._zone)
        return min((entry.bytes_per_s for entry in self._entries if entry.holds(local)), default=None)


class Bucket:
    """What may go when. `now_s` is a clock that is never set, `now_us` that of the day."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._owed = 0.0
        self._at_s: float | None = None
        self._rate: float | None = None

    def wait_s(self, now_s: float, now_us: int, *, urgent: bool) -> float:
        """How long to wait before asking again; 0 when a message may go now."""
        rate = self._pay(now_s, now_us)
        if rate is None or (urgent and rate == 0.0):
            return 0.0
        if rate == 0.0:
            return _LOOK_S
        return min(_LOOK_S, self._owed / rate) if self._owed >= 1 else 0.0

    def took(self, size: int, now_s: float, now_us: int) -> None:
        """So many bytes go on the wire."""
        if self._pay(now_s, now_us):
            self._owed += size

    def is_shut(self, now_us: int) -> bool:
        """Whether only what is urgent goes."""
        return self._budget.rate(now_us) == 0.0

    def message_bytes_max(self, now_us: int) -> int:
        """How large a message should be, so that it holds up no other for long."""
        rate = self._budget.rate(now_us)
        if not rate:
            return MESSAGE_BYTES_MAX
        return int(min(max(rate * _MESSAGE_S, MESSAGE_BYTES_MIN), MESSAGE_BYTES_MAX))

    def _pay(self, now_s: float, now_us: int) -> float | None:
        """Takes the time since the last call off what is owed; the rate from now on."""
        before_s, before = self._at_s, self._rate
        self._at_s, self._rate = now_s, self._budget.rate(now_us)
        if self._rate is None or before is None or before_s is None:
            self._owed = 0.0
        else:
            rate = (before + self._rate) / 2  # it changed somewhere in between: that is half a second at most
            self._owed = max(self._owed - (now_s - before_s) * rate, -self._rate * _BURST_S)
        return self._rate
