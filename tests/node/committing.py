"""A node that commits, and a modality (pynetdicom) that asks it to, for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from archive.archive import Archive, ArchiveSettings
from archive.ledger import Commitment, Device
from miss.processes import free_ports
from node.commitment import StorageCommitment
from node.destinations import Destinations
from node.dimse.association import Limits
from node.dimse.contexts import STORAGE_CLASSES, Offer, ServiceName
from node.dimse.exchange import Service
from node.dimse.messages import Field
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from node.dimse.services.echo import Echo
from node.dimse.services.store import Store
from node.settings import CommitmentSettings, TlsSettings
from tests.datasets import Instance
from tests.node.serving import AE_TITLE, QUICK, Serving, serving
from tests.node.storing import ISSUER, WARD, store
from tests.waiting import wait_for

WELL_KNOWN = "1.2.840.10008.1.20.1.1"
EAGER = CommitmentSettings(same_association_s=10.0, retry_first_s=0.02, retry_max_s=0.1)


@dataclass(frozen=True)
class Committing(Serving):
    """A running server that stores and commits."""

    archive: Archive
    commitment: StorageCommitment

    def send(self, *instances: Instance, calling_ae: str = "CT1") -> None:
        pairs = dict.fromkeys((one.sop_class_uid, one.transfer_syntax_uid) for one in instances)
        proposed = [ProposedContext(2 * n + 1, pair[0], (pair[1],)) for n, pair in enumerate(pairs)]
        with Requestor.connect(self.peer, calling_ae, proposed, limits=QUICK) as requestor:
            assert [store(requestor, one) for one in instances] == [0] * len(instances)

    def damage(self, instance: Instance) -> None:
        """Flip one byte of it on the disk."""
        self.archive.wait_indexed()
        found = self.archive.index.live(instance.sop_instance_uid)
        assert found is not None
        with (self.archive.settings.state / found.location.pack).open("r+b") as pack:
            pack.seek(found.location.offset + found.location.length - 3)
            byte = pack.read(1)
            pack.seek(-1, 1)
            pack.write(bytes([byte[0] ^ 1]))

    def only(self) -> Commitment:
        one, = self.ledger.commitments()
        return one

    def await_state(self, state: str, *, tries: int = 0) -> Commitment:
        found = wait_for(lambda: [one for one in self.ledger.commitments()
                                  if one.state == state and one.tries >= tries], state)
        return found[0]


@contextmanager
def committing(folder: Path, settings: CommitmentSettings = EAGER, *, by_region: bool = False,
               limits: Limits = QUICK, port: int | None = None,
               on_request: Callable[[Sequence[str]], None] | None = None) -> Iterator[Committing]:
    """A node with the device CT1, which listens at `port`."""
    archive_settings = replace(ArchiveSettings(state=folder / "state"), free_bytes_min=0)
    with Archive.open(archive_settings, outbox=True) as archive:
        table: dict[tuple[ServiceName, int], Service] = {
            (ServiceName.ECHO, Field.C_ECHO): Echo(),
            (ServiceName.STORE, Field.C_STORE): Store(archive.intake, WARD, ISSUER),
        }
        offer = Offer(requestor_serves=frozenset((ServiceName.COMMIT,)))
        with serving(folder, table=table, offer=offer, limits=limits) as served:
            served.ledger.add_device(Device("CT1", "127.0.0.1", "CT", port=port))
            commitment = StorageCommitment(
                archive, served.ledger, Destinations(served.ledger, TlsSettings()), settings, limits,
                ae_title=AE_TITLE, ward=WARD, by_region=by_region, on_request=on_request,
                takes_class=STORAGE_CLASSES.__contains__)
            table.update(commitment.services)
            commitment.start()
            try:
                yield Committing(served.server, served.ledger, served.admission, archive, commitment)
            finally:
                served.server.stop(2.0)
                commitment.stop()


@dataclass(frozen=True)
class Event:
    """A report as the modality heard it. `over` says whether it came over an association of the modality's
    own."""

    kind: int
    transaction_uid: str
    committed: frozenset[str]
    failed: dict[str, int]
    retrieve_ae: str
    over_own: bool


class Modality:
    """A storage commitment SCU by pynetdicom, which listens for reports where it is told to."""

    def __init__(self, ae_title: str = "CT1", port: int | None = None) -> None:
        self.ae_title = ae_title
        self.port = free_ports(1, "127.0.0.1")[0] if port is None else port
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.status = 0x0000  # what reports are answered
        self.on_event: Callable[[], None] = lambda: None  # before a report is answered
        self._server: Any = None

    def listen(self, *, takes_role: bool = True) -> None:
        ae = AE(self.ae_title)
        if takes_role:
            ae.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
        else:
            ae.add_supported_context(StorageCommitmentPushModel)
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=[
            (evt.EVT_N_EVENT_REPORT, self._hear)])

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    @contextmanager
    def associated(self, port: int) -> Iterator[Any]:
        ae = AE(self.ae_title)
        ae.add_requested_context(StorageCommitmentPushModel)
        association = ae.associate("127.0.0.1", port, ae_title=AE_TITLE, evt_handlers=[
            (evt.EVT_N_EVENT_REPORT, self._hear)])
        assert association.is_established
        try:
            yield association
        finally:
            if association.is_established:
                association.release()

    def ask(self, association: Any, instances: Sequence[Instance], *, uid: str | None = None) -> int:
        """N-ACTION; the status."""
        return ask(association, request_of([(one.sop_class_uid, one.sop_instance_uid) for one in instances],
                                           uid=uid))

    def event(self, timeout_s: float = 20.0) -> Event:
        return self.events.get(timeout=timeout_s)

    def _hear(self, event: Any) -> tuple[int, None]:
        information = event.event_information
        heard = Event(
            event.request.EventTypeID, str(information.TransactionUID),
            frozenset(str(item.ReferencedSOPInstanceUID)
                      for item in information.get("ReferencedSOPSequence", ())),
            {str(item.ReferencedSOPInstanceUID): item.FailureReason
             for item in information.get("FailedSOPSequence", ())},
            str(information.get("RetrieveAETitle", "")), event.assoc.is_requestor)
        self.on_event()
        self.events.put(heard if self.status == 0 else replace(heard, kind=-heard.kind))
        return self.status, None


def request_of(references: Sequence[tuple[str, str]], *, uid: str | None = None) -> Dataset:
    """The action information that names these (SOP class, SOP instance)."""
    request = Dataset()
    request.TransactionUID = uid or generate_uid()
    request.ReferencedSOPSequence = []
    for sop_class, sop_instance in references:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_instance
        request.ReferencedSOPSequence.append(item)
    return request


def ask(association: Any, request: Dataset, *, action: int = 1, instance: str = WELL_KNOWN) -> int:
    status, _ = association.send_n_action(request, action, StorageCommitmentPushModel, instance)
    return int(status.Status) if "Status" in status else -1
