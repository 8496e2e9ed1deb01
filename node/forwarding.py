"""Owns forwarding: instances go by C-STORE to a device of the list, for a C-MOVE that somebody asked for and
for the routes. It never chooses what goes where, and keeps nothing: who wants it tried again asks again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from archive.archive import Archive
from archive.model import StoredInstance
from federation.policy import Principal, Role
from node.destinations import Destinations
from node.dimse.association import Limits
from node.dimse.outbox import Source
from node.dimse.payloads import Payloads, Supply, why_not
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.dimse.shipping import Shipment

WINDOW = 8  # operations that a device is asked to let be open at once

OnOutcome = Callable[[StoredInstance, int, str], None]


class Forwarding:
    """Instances that are on their way to one device. `stop` and `cut` are for other threads."""

    def __init__(self, shipment: Shipment, payloads: Payloads, principal: Principal,
                 instances: Sequence[StoredInstance], on_outcome: OnOutcome) -> None:
        self._shipment = shipment
        self._payloads = payloads
        self._principal = principal
        self._instances = instances
        self._on_outcome = on_outcome

    def run(self) -> None:
        """Send them; returns when each has its outcome or, stopped, when those have that were under way.
        Raises AssociationEnded when not one association could be had."""
        with self._payloads.supply(self._principal) as supply:
            self._shipment.send([
                _Parcel(each, self._payloads.syntaxes(each), supply, self._on_outcome)
                for each in self._instances])

    def stop(self) -> None:
        """Begin no further instance."""
        self._shipment.stop()

    def cut(self) -> None:
        """End what is under way at once: those instances have failed."""
        self._shipment.cut()


class Forwarder:
    """Sends instances of this node to its devices. Safe to use from any thread."""

    def __init__(self, archive: Archive, destinations: Destinations, calling_ae: str, *, ward: str = "",
                 payloads: Payloads | None = None, limits: Limits | None = None,
                 window: int = WINDOW, associations: int = 1) -> None:
        """`window` is asked of every device (PS3.7 D.3.3.3); `associations` go to one device at once.
        `payloads` are the archive's where not given: without what only the region has."""
        self._payloads = payloads or Payloads(archive)
        self._destinations = destinations
        self._calling_ae = calling_ae
        self._principal = Principal(calling_ae, Role.DEVICE, ward)
        self._limits = limits or Limits()
        self._window = window
        self._associations = associations

    def send(self, ae_title: str, instances: Sequence[StoredInstance], on_outcome: OnOutcome, *,
             originator: tuple[str, int] | None = None,
             stopping: Callable[[], bool] = lambda: False) -> None:
        """Send each instance once to a device: as many associations and contexts as it takes, a window where
        it grants one, recoded where it does not take what is stored. `on_outcome` gets every instance once,
        with the device's C-STORE status and comment, or ours where it was not asked: 0122 when it takes
        neither class nor syntax, 0110 when the association ended before it answered, A7xx and Cxxx when the
        instance can't be had or recoded. It is called by the threads that send, one at a time for each
        association. When `stopping` says so, those that were not begun hear nothing.

        Raises NotFound for an unknown destination, AssociationEnded when no association can be had."""
        self.forwarding(self._destinations.peer(ae_title), instances, on_outcome, originator=originator,
                        stopping=stopping).run()

    def peer(self, ae_title: str) -> Peer:
        """A device that can be called; NotFound when there is none such."""
        return self._destinations.peer(ae_title)

    def forwarding(self, peer: Peer, instances: Sequence[StoredInstance], on_outcome: OnOutcome, *,
                   principal: Principal | None = None, originator: tuple[str, int] | None = None,
                   stopping: Callable[[], bool] = lambda: False) -> Forwarding:
        """The same, to be run, stopped and cut by who holds it; `principal` is in whose name what is not here
        is fetched, the node's own by default."""

        def connect(proposed: Sequence[ProposedContext]) -> Requestor:
            return Requestor.connect(peer, self._calling_ae, proposed, limits=self._limits,
                                     window=self._window)

        shipment = Shipment(connect, associations=self._associations, originator=originator,
                            stopping=stopping)
        return Forwarding(shipment, self._payloads, principal or self._principal, instances, on_outcome)


@dataclass(frozen=True, slots=True)
class _Parcel:
    """An instance on its way."""

    instance: StoredInstance
    syntaxes: tuple[str, ...]
    supply: Supply
    on_outcome: OnOutcome

    @property
    def sop_class_uid(self) -> str:
        return self.instance.head.sop_class_uid

    @property
    def sop_instance_uid(self) -> str:
        return self.instance.head.sop_instance_uid

    def expect(self) -> None:
        self.supply.expect(self.instance)

    def open(self, transfer_syntax_uid: str) -> Source:
        return self.supply.open(self.instance, transfer_syntax_uid)

    def done(self, status: int, comment: str, size: int) -> None:
        self.on_outcome(self.instance, status, comment)

    def unreadable(self, error: Exception) -> None:
        self.on_outcome(self.instance, *why_not(self.instance, error))
