"""What a node holds and what the region lacks of it, read from the node's own disk: it needs neither the node
nor the network. Writes nothing."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from archive.archive import Archive
from archive.errors import Unavailable
from archive.ledger import DeliveryStanding, RouteSummary
from archive.ledger.commitments import SCP, CommitmentCounts
from archive.ledger.performed import IN_PROGRESS
from archive.ledger.worklist import OVER
from certs.identity import Identity
from miss import configuration
from miss.configuration import Process
from miss.console import size
from miss.ledgers import open_ledger
from miss.processes import listening

INDEX_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Backlog:
    """A node as its disk shows it."""

    ward: str
    ae_title: str
    port: int
    listening: bool
    patients: int
    studies: int
    instances: int
    bytes: int
    conflicts: int
    proposed: int
    equivalents: int
    pending: int
    pending_bytes: int
    oldest_pending_us: int | None
    set_aside: int
    certificate_until_us: int
    routes: tuple[RouteSummary, ...] = ()
    commitments: CommitmentCounts = CommitmentCounts()
    deliveries: tuple[DeliveryStanding, ...] = ()
    scheduled_steps: int = 0
    steps_in_progress: int = 0

    @property
    def words(self) -> str:
        """The backlog as a person says it."""
        if not self.pending:
            return "nothing: the region has everything"
        age = ""
        if self.oldest_pending_us is not None:
            age = f", the oldest for {duration(time.time() - self.oldest_pending_us / 1e6)}"
        return f"{self.pending} instances ({size(self.pending_bytes)}){age}"

    def as_dict(self) -> dict[str, object]:
        from miss.routes import summary_dict

        return asdict(self) | {"routes": [summary_dict(one) for one in self.routes]}


def node_backlog(state: Path) -> Backlog:
    """Reads the node whose folder is `state`."""
    settings = configuration.node(state / Process.NODE.file)
    identity = Identity.load(settings.identity)
    host = "127.0.0.1" if settings.dimse.host in ("0.0.0.0", "::") else settings.dimse.host
    running = listening(host, settings.dimse.port) is not None
    archive = Archive.open(settings.archive_settings(), outbox=True, read_only=True)
    try:
        with contextlib.suppress(Unavailable):  # a node that does not run indexes at its next start
            archive.wait_indexed(INDEX_WAIT_S if running else 0)
        totals, pending = archive.index.totals(), archive.index.pending_summary()
    finally:
        archive.close()
    with open_ledger(state) as ledger:
        routes = tuple(ledger.route_summaries())
        commitments = ledger.commitment_counts(SCP)
        deliveries = tuple(ledger.told_standings())
        scheduled, performed = ledger.scheduled_counts(), ledger.performed_counts()
    return Backlog(
        scheduled_steps=sum(count for status, count in scheduled.items() if status not in OVER),
        steps_in_progress=performed.get(IN_PROGRESS, 0),
        ward=identity.ward, ae_title=settings.dimse.ae_title, port=settings.dimse.port, listening=running,
        patients=totals.patients, studies=totals.studies, instances=totals.instances, bytes=totals.bytes,
        conflicts=totals.conflicts, proposed=totals.proposed, equivalents=totals.equivalents,
        pending=pending.count, pending_bytes=pending.bytes,
        oldest_pending_us=pending.oldest_us, set_aside=pending.set_aside,
        certificate_until_us=identity.not_after_us, routes=routes, commitments=commitments,
        deliveries=deliveries)


def duration(seconds: float) -> str:
    """A span in the unit that people would use: 40 s, 12 min, 5 h, 3 d."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
