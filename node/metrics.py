"""What a node shows to those who watch over it: its measures, how it stands, whether it lives and is ready.
What costs a question to the index is asked at most every few seconds, however often it is scraped. No label
holds anything of patients, and none a UID or the name of a caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from archive.archive import Archive
from archive.errors import Unavailable
from archive.ledger import Ledger
from archive.model import Copies, PendingSummary, Totals
from archive.space.scrubber import Scrubber, ScrubNote
from federation.line import RegionPolicy
from federation.reconcile_notes import Noted
from federation.reconciling import Reconciling
from federation.uplink import Uplink
from federation.version import software_version
from monitoring.checks import Check
from monitoring.gauges import Gauge, gauges
from monitoring.measures import Distribution, counter, histogram
from monitoring.readings import Cached
from node.dimse.server import DimseServer
from node.dimse.services.store import StoreMeasures

COPIES_EVERY_S = 60.0  # counted row by row
LOOP_S = 1.5


@dataclass(frozen=True, slots=True)
class Standing:
    """How the node's archive stands: one reading."""

    now_us: int
    pending: PendingSummary
    totals: Totals
    scrub: ScrubNote
    reconciled: Noted


@dataclass(frozen=True, slots=True)
class Watched:
    """The parts of a node that say how it stands."""

    archive: Archive
    ledger: Ledger
    uplink: Uplink | None
    server: DimseServer
    scrubber: Scrubber
    reconciling: Reconciling
    stores: StoreMeasures
    finds: Distribution
    certificate_until_us: Callable[[], int]


def _age_s(at_us: int | None, now_us: int) -> float | None:
    return None if not at_us else max(0.0, (now_us - at_us) / 1e6)


def _at_s(at_us: int | None) -> float | None:
    return at_us / 1e6 if at_us else None


STANDING: tuple[Gauge[Standing], ...] = (
    Gauge("miss_pending_instances", "Instances that the region has no receipt for yet.",
          lambda s: s.pending.count - s.pending.set_aside),
    Gauge("miss_pending_bytes", "Their bytes.", lambda s: s.pending.bytes),
    Gauge("miss_oldest_pending_seconds", "How long the oldest of them has waited; 0 when there is none.",
          lambda s: _age_s(s.pending.oldest_us, s.now_us) or 0.0),
    Gauge("miss_set_aside_instances", "Instances that replication gave up on.",
          lambda s: s.pending.set_aside),
    Gauge("miss_conflicts", "Other contents under a UID that wait for a person.",
          lambda s: s.totals.conflicts),
    Gauge("miss_studies", "Studies that are listed here.", lambda s: s.totals.studies),
    Gauge("miss_instances", "Instances that are listed here.", lambda s: s.totals.instances),
    Gauge("miss_instance_bytes", "The bytes of all instances that are listed here.",
          lambda s: s.totals.bytes),
    Gauge("miss_scrub_last_timestamp_seconds", "When the scrubber had read everything again, the last time.",
          lambda s: _at_s(s.scrub.full_us)),
    Gauge("miss_scrub_found", "Damaged instances that scrubbing ever found here.", lambda s: s.scrub.ever),
    Gauge("miss_reconciliation_last_timestamp_seconds", "When the last comparison with the region ended.",
          lambda s: _at_s(s.reconciled.last.ended_us) if s.reconciled.last else None),
    Gauge("miss_reconciliation_failed", "Whether the last comparison did not end.",
          lambda s: bool(s.reconciled.last.failure) if s.reconciled.last else None),
    Gauge("miss_reconciliation_alarms", "What the last comparison found that needs a person.",
          lambda s: s.reconciled.last.alarms if s.reconciled.last else None),
)  # fmt: skip

COPIES: tuple[Gauge[Copies], ...] = (
    Gauge("miss_evicted_instances", "Instances whose bytes are the region's alone.", lambda c: c.evicted),
    Gauge("miss_damaged_instances", "Instances whose bytes here are no longer those of their digest.",
          lambda c: c.damaged),
)  # fmt: skip

POLICY: tuple[Gauge[RegionPolicy], ...] = (
    Gauge("miss_protected_to_timestamp_seconds", "What has a receipt of before this may be evicted.",
          lambda p: _at_s(p.protected_to_us)),
)  # fmt: skip


class NodeMetrics:
    """A node, as `monitoring/server.py` shows it."""

    def __init__(self, watched: Watched, read_every_s: float) -> None:
        self._watched = watched
        self._standing = Cached(self._read, read_every_s)
        self._copies = Cached(watched.archive.index.copies, max(COPIES_EVERY_S, read_every_s))

    def families(self) -> Iterator[Metric]:
        watched, version = self._watched, software_version()
        build = GaugeMetricFamily("miss_build_info", "The release that runs.", labels=["version", "process"])
        build.add_metric([version, "node"], 1)
        yield build
        yield histogram(
            "miss_store_seconds", "C-STOREs, from the command to the disk, by what became of the instance.",
            label="outcome", of={outcome.value: one for outcome, one in watched.stores.seconds.items()},
        )  # fmt: skip
        yield histogram("miss_find_seconds", "C-FINDs, until the matches were found.", of={"": watched.finds})
        yield from self._now()
        standing, copies = self._standing.now(), self._copies.now()
        if standing is not None:
            yield from gauges(STANDING, standing)
        if copies is not None:
            yield from gauges(COPIES, copies)
        failed = self._standing.failed or self._copies.failed
        yield GaugeMetricFamily(
            "miss_reading_failed", "Whether the index did not answer the last time.", value=failed
        )

    def _now(self) -> Iterator[Metric]:
        """What costs nothing to say."""
        watched, archive, uplink = self._watched, self._watched.archive, self._watched.uplink
        records, lag_s = archive.index_lag()
        yield from (
            GaugeMetricFamily(name, words, value=value)
            for name, words, value in (
                ("miss_free_bytes", "Free space of the archive's disk.", archive.free_bytes()),
                ("miss_free_bytes_min", "With less nothing is taken.", archive.settings.free_bytes_min),
                ("miss_index_lag_records", "Instances that wait for the index.", records),
                ("miss_index_lag_seconds", "How long the oldest of them has waited.", lag_s),
                ("miss_dimse_connections", "Connections of devices now.", watched.server.connections),
                ("miss_certificate_seconds_left", "Until the node's certificate expires.",
                 watched.certificate_until_us() / 1e6 - time.time()),
                ("miss_eviction_held", "Whether eviction waits for a comparison with the region.",
                 watched.reconciling.held()),
            )
        )  # fmt: skip
        if uplink is None:
            return
        status, sent = uplink.status(), uplink.sent()
        yield GaugeMetricFamily("miss_attached", "Whether a hub is reached.", value=status.attached)
        if status.since_us is not None:
            yield GaugeMetricFamily(
                "miss_attached_since_timestamp_seconds", "Since when, without a break.",
                value=status.since_us / 1e6,
            )  # fmt: skip
        yield counter("miss_sent_bytes", "Bytes of data sets that were pushed.", of={"": sent.bytes})
        yield counter("miss_wire_bytes", "What they took on the line.", of={"": sent.wire_bytes})
        if uplink.policy is not None:
            yield from gauges(POLICY, uplink.policy)

    def _read(self) -> Standing:
        watched, archive = self._watched, self._watched.archive
        return Standing(
            time.time_ns() // 1_000, archive.index.pending_summary(), archive.index.totals(),
            watched.scrubber.note, watched.reconciling.notes.now,
        )  # fmt: skip

    @property
    def alive(self) -> Mapping[str, Check]:
        watched, uplink = self._watched, self._watched.uplink
        checks: dict[str, Check] = {"indexer": watched.archive.check_alive}
        if uplink is not None:
            checks["uplink"] = lambda: _require_responding(uplink)
        return checks

    @property
    def ready(self) -> Mapping[str, Check]:
        """A region that is away is no reason: a ward works without it."""
        watched = self._watched
        return {"store": watched.archive.check_takes, "ledger": watched.ledger.revocation_version}


def _require_responding(uplink: Uplink) -> None:
    if not uplink.responds(LOOP_S):
        raise Unavailable("the uplink's event loop does not answer")

