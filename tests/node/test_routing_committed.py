"""Rules that ask the destination to commit what it was sent (PS3.4 Annex J, as SCU), with pynetdicom as the
archive at the other end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from archive.ledger import RouteState
from node.commitment import CommitmentScu
from node.destinations import Destinations
from node.dimse.association import Limits
from node.settings import TlsSettings
from tests.datasets import CT, make_instance
from tests.node.committing import EAGER, WELL_KNOWN, request_of
from tests.node.routed import device, routing
from tests.node.storing import Storing, storing
from tests.waiting import wait_for

RULE = '[[rule]]\nname = "all"\nto = "PACS"\ncommit = true\n'


@dataclass
class Pacs:
    """An archive that stores and commits; of `lost` it says once that it does not have them."""

    port: int = 0
    lost: set[str] = field(default_factory=set)
    commits: bool = True
    received: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def store(self, event: Any) -> int:
        self.received[str(event.request.AffectedSOPInstanceUID)] += 1
        return 0

    def ask(self, event: Any) -> tuple[int, None]:
        request: Dataset = event.action_information
        references = [(item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID)
                      for item in request.ReferencedSOPSequence]
        self.asked.update(str(uid) for _, uid in references)
        report = request_of([one for one in references if one[1] not in self.lost],
                            uid=request.TransactionUID)
        failed = request_of([one for one in references if one[1] in self.lost]).ReferencedSOPSequence
        for item in failed:
            item.FailureReason = 0x0112
        self.lost -= {str(item.ReferencedSOPInstanceUID) for item in failed}
        if failed:
            report.FailedSOPSequence = failed
        if self.commits:
            threading.Thread(target=event.assoc.send_n_event_report, daemon=True, args=(
                report, 2 if failed else 1, StorageCommitmentPushModel, WELL_KNOWN)).start()
        return 0, None


@contextmanager
def pacs() -> Iterator[Pacs]:
    running = Pacs()
    ae = AE("PACS")
    ae.add_supported_context(CT, ExplicitVRLittleEndian)
    ae.add_supported_context(StorageCommitmentPushModel)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[
        (evt.EVT_C_STORE, running.store), (evt.EVT_N_ACTION, running.ask)])
    assert server is not None and server.socket is not None
    running.port = server.socket.getsockname()[1]
    try:
        yield running
    finally:
        server.shutdown()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


@contextmanager
def asking(served: Storing) -> Iterator[CommitmentScu]:
    scu = CommitmentScu(served.ledger, Destinations(served.ledger, TlsSettings()), EAGER, "MISS", Limits())
    scu.start()
    try:
        yield scu
    finally:
        scu.stop()


def test_a_row_leaves_when_it_is_committed_and_goes_again_when_it_is_not(served: Storing) -> None:
    sent = [make_instance(number=n) for n in range(5)]
    with pacs() as peer, asking(served) as scu:
        peer.lost = {sent[2].sop_instance_uid}
        device(served, "PACS", peer.port)
        with routing(served, RULE, commitment=scu) as running:
            served.send(*sent)
            wait_for(lambda: len(peer.received) == 5 and not running.queue(), "everything committed")
    assert peer.received == {one.sop_instance_uid: 1 + (one is sent[2]) for one in sent}
    assert peer.asked == peer.received


def test_what_is_not_answered_stays_to_be_committed_over_a_restart(served: Storing) -> None:
    one = make_instance()
    with pacs() as peer, asking(served) as scu:
        peer.commits = False
        device(served, "PACS", peer.port)
        with routing(served, RULE, commitment=scu) as running:
            served.send(one)
            wait_for(lambda: peer.asked and running.queue()[0].transaction_uid, "the question")
            row, = running.queue()
            assert row.state is RouteState.COMMITTING
        with routing(served, RULE, commitment=scu) as running:
            summary = running.summary("PACS")
            assert (summary.waiting, summary.committing, summary.set_aside) == (0, 1, 0)
            found = scu.result(row.transaction_uid)
            assert not found.is_over
            items = {one.sop_instance_uid: 0}
            served.ledger.answer_commitment(
                served.ledger.asked_commitment(row.transaction_uid).id, items, 0x0110)  # type: ignore[union-attr]
            wait_for(lambda: not running.queue(), "an empty queue")
    assert peer.received[one.sop_instance_uid] == 1
