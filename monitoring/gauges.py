"""Gauges from a table: each a name, what it means, and how a reading says it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gauge(Generic[T]):
    """`value` gives None where there is nothing to say: then nothing is said."""

    name: str
    words: str
    value: Callable[[T], float | None]


def gauges(table: Iterable[Gauge[T]], reading: T) -> Iterator[Metric]:
    for gauge in table:
        if (value := gauge.value(reading)) is not None:
            yield GaugeMetricFamily(gauge.name, gauge.words, value=value)


def gauges_by(label: str, table: Iterable[Gauge[T]], readings: Mapping[str, T]) -> Iterator[Metric]:
    """The same of several, told apart by `label`."""
    for gauge in table:
        family = GaugeMetricFamily(gauge.name, gauge.words, labels=[label])
        for name, reading in readings.items():
            if (value := gauge.value(reading)) is not None:
                family.add_metric([name], value)
        yield family
