"""What is counted and timed on the way: cheap enough for every instance (a lock, a bisection, two sums), and
read when somebody scrapes. Each belongs to the object that measures, so that two nodes in one process have
their own."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Distribution:
    """How often something took how long."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, times: int = 1) -> None:
        place = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[place] += times
            self._sum += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative, as Prometheus wants them, and the sum."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found, below = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), counts, strict=True):
            below += count
            found.append((bound, float(below)))
        return found, total


class Tally:
    """Counts by a label whose values are few: an outcome, a ward."""

    __slots__ = ("_counts", "_lock")

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, label: str, count: int = 1) -> None:
        with self._lock:
            self._counts[label] += count

    def now(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


def histogram(name: str, words: str, *, label: str = "", of: dict[str, Distribution]) -> Any:
    """A family of distributions, by the values of `label`."""
    family = HistogramMetricFamily(name, words, labels=[label] if label else [])
    for value, distribution in of.items():
        buckets, total = distribution.buckets()
        family.add_metric([value] if label else [], buckets, total)
    return family


def counter(name: str, words: str, *, label: str = "", of: dict[str, float] | dict[str, int]) -> Any:
    family = CounterMetricFamily(name, words, labels=[label] if label else [])
    for value, count in of.items():
        family.add_metric([value] if label else [], count)
    return family
