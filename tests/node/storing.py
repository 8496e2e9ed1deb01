"""A server over a real archive for the tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from archive.archive import Archive, ArchiveSettings
from archive.database import sqlite_url
from archive.ledger import Ledger
from archive.model import StoredInstance, Totals
from node.commitment import StorageCommitment
from node.destinations import Destinations
from node.dimse.association import Limits
from node.dimse.contexts import STORAGE_CLASSES, Offer, ServiceName
from node.dimse.exchange import Service
from node.dimse.messages import Field
from node.dimse.payloads import Payloads
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from node.dimse.services.echo import Echo
from node.dimse.services.find import Find
from node.dimse.services.get import Get
from node.dimse.services.move import Move
from node.dimse.services.mpps import PerformedSteps
from node.dimse.services.retrieval import Selection
from node.dimse.services.store import Store
from node.dimse.services.suboperations import Turns
from node.dimse.services.worklist import WorklistFind
from node.dimse.tls import Listener
from node.forwarding import Forwarder
from node.settings import CommitmentSettings, TlsSettings
from tests.datasets import Instance
from tests.node.serving import AE_TITLE, QUICK, Serving, serving

WARD = "san-martino/radiology"
ISSUER = "SANMARTINO"


@dataclass(frozen=True)
class Storing(Serving):
    """A running server whose services are a node's."""

    archive: Archive
    find: Find

    def stored(self, instance: Instance) -> list[StoredInstance]:
        self.archive.wait_indexed()
        return self.archive.instances(instance.study_uid, instance.series_uid, instance.sop_instance_uid)

    def totals(self) -> Totals:
        self.archive.wait_indexed()
        return self.archive.index.totals()

    def dataset(self, stored: StoredInstance) -> bytes:
        return b"".join(self.archive.dataset_chunks(stored.location))

    def send(self, *instances: Instance, calling_ae: str = "CT1") -> list[int]:
        """C-STORE each over one association: the statuses."""
        pairs = dict.fromkeys((one.sop_class_uid, one.transfer_syntax_uid) for one in instances)
        proposed = [ProposedContext(2 * n + 1, pair[0], (pair[1],)) for n, pair in enumerate(pairs)]
        with Requestor.connect(self.peer, calling_ae, proposed, limits=QUICK) as requestor:
            return [store(requestor, one) for one in instances]


def store(requestor: Requestor, instance: Instance, chunks: Sequence[bytes] | None = None) -> int:
    context = requestor.context(instance.sop_class_uid, instance.transfer_syntax_uid)
    assert context is not None, "the context was refused"
    return requestor.store(context, instance.sop_instance_uid, chunks or [instance.dataset])


def retrieving(archive: Archive, folder: Path, turns: Turns) -> dict[tuple[ServiceName, int], Service]:
    """C-MOVE and C-GET, as a node composes them."""
    selection = Selection(archive, WARD, ISSUER)
    payloads = Payloads(archive)
    destinations = Destinations(Ledger.open(sqlite_url(folder / "ledger.db")), TlsSettings())
    forwarder = Forwarder(archive, destinations, AE_TITLE, ward=WARD, payloads=payloads, limits=QUICK)
    return {(ServiceName.RETRIEVE, Field.C_MOVE): Move(selection, forwarder, turns),
            (ServiceName.RETRIEVE, Field.C_GET): Get(selection, payloads, turns)}


@contextmanager
def scheduling_and_committing(served: Serving, archive: Archive,
                              limits: Limits) -> Iterator[dict[tuple[ServiceName, int], Service]]:
    """Worklist, performed steps and storage commitment, as a node composes them."""
    commitment = StorageCommitment(
        archive, served.ledger, Destinations(served.ledger, TlsSettings()),
        CommitmentSettings(same_association_s=0.1), limits, ae_title=AE_TITLE, ward=WARD, by_region=False,
        takes_class=STORAGE_CLASSES.__contains__)
    steps = PerformedSteps(served.ledger, lambda studies: None)
    commitment.start()
    try:
        yield {**commitment.services,
               (ServiceName.WORKLIST, Field.C_FIND): WorklistFind(served.ledger, WARD, 100),
               **{(ServiceName.MPPS, field): steps for field in (Field.N_CREATE, Field.N_SET, Field.N_GET)}}
    finally:
        served.server.stop(2.0)
        commitment.stop()


@contextmanager
def storing(folder: Path, *, limits: Limits = QUICK, private: bool = False, responses_max: int = 1000,
            tls: Listener | None = None, region: str = "", turns: Turns | None = None,
            all_services: bool = False, **archive_settings: float | str) -> Iterator[Storing]:
    """Store, query and retrieve; with `all_services` what else a node serves."""
    settings = replace(ArchiveSettings(state=folder / "state", free_bytes_min=0), **archive_settings)  # type: ignore[arg-type]
    with Archive.open(settings, outbox=True) as archive:
        find = Find(archive, WARD, AE_TITLE, responses_max)
        table: dict[tuple[ServiceName, int], Service] = {
            (ServiceName.ECHO, Field.C_ECHO): Echo(),
            (ServiceName.STORE, Field.C_STORE): Store(archive.intake, WARD, ISSUER),
            (ServiceName.FIND, Field.C_FIND): find,
            **retrieving(archive, folder, turns or Turns(8, 8, 5.0)),
        }
        offer = Offer(private, frozenset({ServiceName.STORE, ServiceName.COMMIT}))
        with (serving(folder, table=table, limits=limits, offer=offer, tls=tls, region=region) as served,
              ExitStack() as stack):
            if all_services:
                table.update(stack.enter_context(scheduling_and_committing(served, archive, limits)))
            yield Storing(served.server, served.ledger, served.admission, archive, find)
