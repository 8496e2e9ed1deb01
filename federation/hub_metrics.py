"""What a hub shows to those who watch over it: each ward as the ledger has it, the region's store, calls and
pushes, whether it lives and is ready. Labels are wards, methods and reasons of refusals, and never more.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from archive.errors import Unavailable
from archive.ledger import Ledger
from archive.model import Totals
from certs.gate import Gate
from federation.coverage import CoverageState, WardStatus, status_of
from federation.hub_writer import HubWriter
from federation.methods import STANDS_BY
from federation.version import software_version
from federation.watched_calls import WatchedCalls
from monitoring.checks import Check
from monitoring.gauges import Gauge, gauges, gauges_by
from monitoring.measures import counter, histogram
from monitoring.readings import Cached

LOOP_S = 1.5


@dataclass(frozen=True, slots=True)
class HubWatched:
    """The parts of a hub that say how it stands. `writer` gives None while another hub writes the store."""

    loop: asyncio.AbstractEventLoop
    ledger: Ledger
    writer: Callable[[], HubWriter | None]
    calls: WatchedCalls
    gate: Gate
    certificate_until_us: Callable[[], int]
    clock: Callable[[], int]


@dataclass(frozen=True, slots=True)
class OneWard:
    """A ward, and the hub's time when it was looked up."""

    status: WardStatus
    now_us: int


def _s(us: int | None) -> float | None:
    return us / 1e6 if us else None


def _oldest_s(ward: OneWard) -> float:
    report = ward.status.report
    if report is None or not report.oldest_pending_us:
        return 0.0
    return max(0.0, (ward.now_us + ward.status.skew_us - report.oldest_pending_us) / 1e6)


def _reported(name: str) -> Callable[[OneWard], float | None]:
    return lambda ward: None if ward.status.report is None else float(getattr(ward.status.report, name))


def _certificate_s(ward: OneWard) -> float | None:
    report = ward.status.report
    until_us = report.certificate_not_after_us if report is not None else 0
    return (until_us - ward.now_us) / 1e6 if until_us else None


WARDS: tuple[Gauge[OneWard], ...] = (
    Gauge("miss_ward_attached", "Whether the ward's node is attached.", lambda w: w.status.attached),
    Gauge("miss_ward_attached_since_timestamp_seconds", "Since when.",
          lambda w: _s(w.status.attached_since_us)),
    Gauge("miss_ward_seen_timestamp_seconds", "When its last report came.",
          lambda w: _s(w.status.coverage.seen_at_us)),
    Gauge("miss_ward_complete_to_timestamp_seconds", "Up to when everything of it was in the region.",
          lambda w: _s(w.status.coverage.complete_to_us)),
    Gauge("miss_ward_incomplete", "Whether something of it is known to be missing, or nothing is known.",
          lambda w: w.status.coverage.state in (CoverageState.INCOMPLETE, CoverageState.UNKNOWN)),
    Gauge("miss_ward_last_receipt_timestamp_seconds", "When it was given its last receipt.",
          lambda w: _s(w.status.last_receipt_us)),
    Gauge("miss_ward_clock_skew_seconds", "How far its clock is ahead of the hub's.",
          lambda w: w.status.skew_us / 1e6),
    Gauge("miss_ward_pending_instances", "Instances that have no receipt yet.",
          lambda w: w.status.coverage.pending),
    Gauge("miss_ward_pending_bytes", "Their bytes.", _reported("pending_bytes")),
    Gauge("miss_ward_oldest_pending_seconds", "How long the oldest of them has waited.", _oldest_s),
    Gauge("miss_ward_set_aside_instances", "Instances that its replication gave up on.",
          lambda w: w.status.coverage.set_aside),
    Gauge("miss_ward_push_bytes_per_second", "What it pushed of late.", _reported("rate_bytes_per_s")),
    Gauge("miss_ward_wire_ratio", "Bytes of data sets for each byte on its line, of late; 0: unknown.",
          _reported("wire_ratio")),
    Gauge("miss_ward_conflicts", "Other contents that wait for a person there.", _reported("conflicts")),
    Gauge("miss_ward_instances", "Instances that are listed there.", _reported("instances")),
    Gauge("miss_ward_evicted_instances", "Of those, how many lie in the region alone.",
          _reported("evicted")),
    Gauge("miss_ward_damaged_instances", "Of those, how many are damaged there.", _reported("damaged")),
    Gauge("miss_ward_free_bytes", "Free space of its disk.", _reported("free_bytes")),
    Gauge("miss_ward_certificate_seconds_left", "Until its certificate expires.", _certificate_s),
)  # fmt: skip

TOTALS: tuple[Gauge[Totals], ...] = (
    Gauge("miss_studies", "Studies in the region's store.", lambda t: t.studies),
    Gauge("miss_instances", "Instances in it.", lambda t: t.instances),
    Gauge("miss_instance_bytes", "Their bytes.", lambda t: t.bytes),
    Gauge("miss_conflicts", "Other contents that wait for a person.", lambda t: t.conflicts),
)  # fmt: skip

STORE: tuple[Gauge[HubWriter], ...] = (
    Gauge("miss_free_bytes", "Free space of the store's disk.", lambda h: h.archive.free_bytes()),
    Gauge("miss_free_bytes_min", "With less nothing is taken.", lambda h: h.archive.settings.free_bytes_min),
    Gauge("miss_index_lag_records", "Instances that wait for the index.", lambda h: h.archive.index_lag()[0]),
    Gauge("miss_index_lag_seconds", "How long the oldest has waited.", lambda h: h.archive.index_lag()[1]),
    Gauge("miss_partial_objects", "Large objects whose sender was cut off, kept to go on.",
          lambda h: len(h.archive.partials)),
    Gauge("miss_partial_bytes", "What has come of them.", lambda h: h.archive.partials.bytes),
    Gauge("miss_scrub_last_timestamp_seconds", "When the scrubber had read everything again, the last time.",
          lambda h: _s(h.scrubber.note.full_us)),
    Gauge("miss_scrub_found", "Damaged instances that scrubbing ever found here.",
          lambda h: h.scrubber.note.ever),
)  # fmt: skip


class HubMetrics:
    """A hub, as `monitoring/server.py` shows it."""

    def __init__(self, watched: HubWatched, read_every_s: float) -> None:
        self._watched = watched
        self._wards = Cached(self._read_wards, read_every_s)
        self._totals = Cached(self._read_totals, read_every_s)

    def families(self) -> Iterator[Metric]:
        watched, writer = self._watched, self._watched.writer()
        build = GaugeMetricFamily("miss_build_info", "The release that runs.", labels=["version", "process"])
        build.add_metric([software_version(), "hub"], 1)
        yield build
        until_s = (watched.certificate_until_us() - watched.clock()) / 1e6
        yield GaugeMetricFamily(
            "miss_certificate_seconds_left", "Until the hub's certificate expires.", value=until_s
        )
        yield GaugeMetricFamily(
            "miss_standing_by", "Whether another hub writes the region's store.", value=writer is None
        )
        yield GaugeMetricFamily("miss_calls", "Calls that are open now.", value=watched.gate.live_calls)
        yield counter(
            "miss_refused_calls", "Calls that the gate refused.", label="reason",
            of=dict(watched.gate.refusals),
        )  # fmt: skip
        yield histogram(
            "miss_call_seconds", "How long calls took to be answered.", label="method",
            of=watched.calls.seconds,
        )  # fmt: skip
        if writer is not None:
            yield from _of_writer(writer)
        if (wards := self._wards.now()) is not None:
            yield from gauges_by("ward", WARDS, wards)
        if writer is not None and (totals := self._totals.now()) is not None:
            yield from gauges(TOTALS, totals)
        failed = self._wards.failed or self._totals.failed
        yield GaugeMetricFamily(
            "miss_reading_failed", "Whether index or ledger did not answer the last time.", value=failed
        )

    def _read_wards(self) -> dict[str, OneWard]:
        ledger, now_us = self._watched.ledger, self._watched.clock()
        states = ledger.ward_states()
        return {
            ward.id: OneWard(status_of(ward, states.get(ward.id), now_us), now_us) for ward in ledger.wards()
        }

    def _read_totals(self) -> Totals | None:
        writer = self._watched.writer()
        return None if writer is None else writer.archive.index.totals()

    @property
    def alive(self) -> Mapping[str, Check]:
        return {"loop": self._require_loop, "indexer": self._require_indexer}

    @property
    def ready(self) -> Mapping[str, Check]:
        return {"store": self._require_store, "ledger": self._watched.ledger.revocation_version}

    def _require_loop(self) -> None:
        came = threading.Event()
        try:
            self._watched.loop.call_soon_threadsafe(came.set)
        except RuntimeError:  # it has ended
            raise Unavailable("the event loop has ended") from None
        if not came.wait(LOOP_S):
            raise Unavailable("the event loop does not answer")

    def _require_indexer(self) -> None:
        if (writer := self._watched.writer()) is not None:
            writer.archive.check_alive()

    def _require_store(self) -> None:
        writer = self._watched.writer()
        if writer is None:
            raise Unavailable(STANDS_BY)
        writer.archive.check_takes()


def _of_writer(writer: HubWriter) -> Iterator[Metric]:
    pushes = writer.pushes
    yield from gauges(STORE, writer)
    yield histogram(
        "miss_push_seconds", "From the first byte of a pushed object to its receipt.", of={"": pushes.seconds}
    )
    yield counter(
        "miss_pushed_instances", "Objects that got a receipt.", label="ward", of=pushes.instances.now()
    )
    yield counter("miss_pushed_bytes", "Their bytes.", label="ward", of=pushes.bytes.now())
    last = writer.notes.now.wards
    reconciled = GaugeMetricFamily(
        "miss_ward_reconciliation_last_timestamp_seconds", "When its last comparison ended.", labels=["ward"]
    )
    alarms = GaugeMetricFamily(
        "miss_ward_reconciliation_alarms", "What that found which needs a person.", labels=["ward"]
    )
    for ward, outcome in last.items():
        reconciled.add_metric([ward], outcome.ended_us / 1e6)
        alarms.add_metric([ward], outcome.alarms)
    yield reconciled
    yield alarms
