"""Owns storage commitment as one part of a node: it makes desk, verifier, couriers and SCU of a node's own
archive, ledger and settings, starts and stops them, and has their services for the listener."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from archive.archive import Archive
from archive.ledger import Ledger
from node.commitment.couriers import Couriers
from node.commitment.desk import CommitmentDesk, OnRequest
from node.commitment.reporter import Reporter
from node.commitment.scu import CommitmentScu
from node.commitment.verifier import Verifier
from node.destinations import Destinations
from node.dimse.association import Limits
from node.dimse.contexts import ServiceName
from node.dimse.exchange import Service
from node.dimse.messages import Field
from node.dimse.services.commitment import CommitmentReports, CommitmentRequests
from node.settings import CommitmentSettings


class StorageCommitment:
    """See the module's docstring. `by_region`: committed means the region has it; `takes_class` says which
    SOP classes are stored here at all; `on_request` is told which instances a device asked about."""

    def __init__(self, archive: Archive, ledger: Ledger, destinations: Destinations,
                 settings: CommitmentSettings, limits: Limits, *, ae_title: str, ward: str, by_region: bool,
                 takes_class: Callable[[str], bool], on_request: OnRequest | None = None) -> None:
        self.scu = CommitmentScu(ledger, destinations, settings, ae_title, limits)
        self.desk = CommitmentDesk(ledger, destinations, settings, retrieve_ae=ae_title,
                                   idle_timeout_s=limits.idle_timeout_s, on_request=on_request)
        self._verifier = Verifier(archive, ledger, by_region=by_region, timeout_s=settings.timeout_s,
                                  takes_class=takes_class, ward=ward, keep_days=settings.report_days,
                                  bytes_per_s=settings.verify_bytes_per_s, settled=self.desk.settled)
        reporter = Reporter(self.desk, destinations, ae_title, limits)
        self._couriers = Couriers("reports", self.desk.due_reports, reporter.carry)
        self.desk.asked, self.desk.due = self._verifier.wake, self._couriers.wake
        self.services: Mapping[tuple[ServiceName, int], Service] = {
            (ServiceName.COMMIT, Field.N_ACTION): CommitmentRequests(self.desk),
            (ServiceName.COMMIT, Field.N_EVENT_REPORT): CommitmentReports(self.scu.take),
        }

    def start(self) -> None:
        """Go on with what is open."""
        self._verifier.start()
        self._couriers.start()
        self.scu.start()

    def stop(self) -> None:
        """All that is open stays in the ledger."""
        self._verifier.stop()
        self._couriers.stop()
        self.scu.stop()
