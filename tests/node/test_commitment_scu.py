"""Storage commitment SCU (PS3.4 J.3.2): what this node asks a destination to commit, and the reports on it,
with pynetdicom as the SCP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from archive.errors import InvalidInput, NotFound
from archive.ledger import Device
from archive.ledger.commitments import ANSWERING, DONE, GIVEN_UP
from archive.model import StoredInstance
from miss.processes import free_ports
from node.commitment import CommitmentResult
from tests.datasets import CT, make_study
from tests.node.committing import EAGER, WELL_KNOWN, Committing, committing, request_of
from tests.node.serving import AE_TITLE
from tests.waiting import wait_for


class Archive:
    """Another archive, an SCP by pynetdicom. `report` is what it makes of a request."""

    def __init__(self) -> None:
        self.port = free_ports(1, "127.0.0.1")[0]
        self.status = 0x0000
        self.requests: SimpleQueue[tuple[Any, Dataset]] = SimpleQueue()
        self.answers: SimpleQueue[int] = SimpleQueue()
        self.at_once: Callable[[Dataset], Dataset] | None = None
        self._server: Any = None

    def listen(self) -> None:
        ae = AE("PACS")
        ae.add_supported_context(StorageCommitmentPushModel)
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=[
            (evt.EVT_N_ACTION, self._asked)])

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()

    def _asked(self, event: Any) -> tuple[int, None]:
        request = event.action_information
        self.requests.put((event.assoc, request))
        if self.status == 0 and self.at_once is not None:
            report = self.at_once(request)
            threading.Thread(target=self._send, args=(event.assoc, report), daemon=True).start()
        return self.status, None

    def _send(self, association: Any, report: Dataset, event_type: int | None = None) -> None:
        kind = event_type or (2 if "FailedSOPSequence" in report else 1)
        status, _ = association.send_n_event_report(report, kind, StorageCommitmentPushModel, WELL_KNOWN)
        self.answers.put(int(status.Status) if "Status" in status else -1)

    def call(self, port: int, report: Dataset, *, ae_title: str = "PACS",
             event_type: int | None = None) -> int:
        """Report over an association of its own, with the SCP's role; what it was answered."""
        ae = AE(ae_title)
        ae.add_requested_context(StorageCommitmentPushModel)
        association = ae.associate("127.0.0.1", port, ae_title=AE_TITLE,
                                   ext_neg=[build_role(StorageCommitmentPushModel, scp_role=True)])
        assert association.is_established
        try:
            self._send(association, report, event_type)
        finally:
            association.release()
        return self.answers.get(timeout=10)


@pytest.fixture
def pacs() -> Iterator[Archive]:
    made = Archive()
    yield made
    made.close()


@pytest.fixture
def node(tmp_path: Path, pacs: Archive) -> Iterator[Committing]:
    with committing(tmp_path) as running:
        running.ledger.add_device(Device("PACS", "127.0.0.1", "PACS", port=pacs.port))
        running.ledger.add_device(Device("OTHER", "127.0.0.1"))
        yield running


def forwarded(node: Committing, count: int = 3) -> list[StoredInstance]:
    study = make_study(count)
    node.send(*study)
    return node.archive.instances(study[0].study_uid)


def committed(request: Dataset) -> Dataset:
    """The report that all of a request is committed."""
    references = [(item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID)
                  for item in request.ReferencedSOPSequence]
    return request_of(references, uid=request.TransactionUID)


def first_failed(request: Dataset) -> Dataset:
    report = committed(request)
    failed = report.ReferencedSOPSequence.pop(0)
    failed.FailureReason = 0x0112
    report.FailedSOPSequence = [failed]
    return report


def result(node: Committing, uid: str) -> CommitmentResult:
    wait_for(lambda: node.commitment.scu.result(uid).is_over, "a result")
    return node.commitment.scu.result(uid)


def test_a_report_over_the_association_that_asked(node: Committing, pacs: Archive) -> None:
    pacs.at_once = first_failed
    pacs.listen()
    instances = forwarded(node)
    uid = node.commitment.scu.request("PACS", instances)
    _, request = pacs.requests.get(timeout=10)
    assert request.TransactionUID == uid
    uids = [item.ReferencedSOPInstanceUID for item in request.ReferencedSOPSequence]
    assert set(uids) == {one.head.sop_instance_uid for one in instances}
    assert {item.ReferencedSOPClassUID for item in request.ReferencedSOPSequence} == {CT}
    found = result(node, uid)
    assert (found.committed, found.failed, found.error) == (frozenset(uids[1:]), {uids[0]: 0x0112}, "")
    assert pacs.answers.get(timeout=10) == 0


def test_a_report_over_an_association_that_the_other_opens(node: Committing, pacs: Archive) -> None:
    pacs.listen()
    uid = node.commitment.scu.request("PACS", forwarded(node))
    _, request = pacs.requests.get(timeout=10)
    assert not node.commitment.scu.result(uid).is_over
    report = committed(request)
    assert pacs.call(node.port, report, event_type=3) == 0x0113
    assert pacs.call(node.port, report, ae_title="OTHER") == 0x0115  # it was not asked
    assert pacs.call(node.port, request_of([(CT, "1.2")])) == 0x0115
    assert not node.commitment.scu.result(uid).is_over
    assert pacs.call(node.port, report) == 0
    assert len(result(node, uid).committed) == 3
    assert pacs.call(node.port, first_failed(request)) == 0  # again: the first answer stays
    assert not result(node, uid).failed


def test_instances_that_a_report_leaves_out_are_not_committed(node: Committing, pacs: Archive) -> None:
    pacs.listen()
    uid = node.commitment.scu.request("PACS", forwarded(node))
    _, request = pacs.requests.get(timeout=10)
    report = committed(request)
    left_out = report.ReferencedSOPSequence.pop(1).ReferencedSOPInstanceUID
    assert pacs.call(node.port, report) == 0
    assert result(node, uid).failed == {left_out: 0x0110}


def test_nobody_listens_for_a_while_and_the_node_restarts(tmp_path: Path, pacs: Archive) -> None:
    with committing(tmp_path) as node:
        node.ledger.add_device(Device("PACS", "127.0.0.1", port=pacs.port))
        uid = node.commitment.scu.request("PACS", forwarded(node))
        wait_for(lambda: "no connection" in node.commitment.scu.result(uid).error, "a try that failed")
    pacs.at_once = committed
    with committing(tmp_path) as node:
        pacs.status = 0x0213
        pacs.listen()
        wait_for(lambda: "0213" in node.commitment.scu.result(uid).error, "a try that was refused")
        pacs.status = 0
        assert len(result(node, uid).committed) == 3


def test_a_report_that_never_comes(tmp_path: Path, pacs: Archive) -> None:
    pacs.listen()
    with committing(tmp_path, replace(EAGER, answer_timeout_s=1.0)) as node:
        node.ledger.add_device(Device("PACS", "127.0.0.1", port=pacs.port))
        uid = node.commitment.scu.request("PACS", forwarded(node, 1))
        association, request = pacs.requests.get(timeout=10)
        node.await_state(ANSWERING)
        association.abort()
        found = result(node, uid)
        assert found.error and not found.committed and not found.failed
        node.await_state(GIVEN_UP)
        assert pacs.call(node.port, committed(request)) == 0  # late, and welcome
        node.await_state(DONE)
        assert len(node.commitment.scu.result(uid).committed) == 1


def test_what_cannot_be_asked(node: Committing) -> None:
    scu = node.commitment.scu
    with pytest.raises(NotFound):
        scu.request("NOBODY", forwarded(node))
    with pytest.raises(InvalidInput):
        scu.request("PACS", [])
    with pytest.raises(NotFound):
        scu.result(str(generate_uid()))


def test_a_device_that_may_not_commit_may_not_report(node: Committing, pacs: Archive) -> None:
    node.ledger.add_device(Device("PACS", "127.0.0.1", port=pacs.port, services=frozenset({"store"})))
    ae = AE("PACS")
    ae.add_requested_context(StorageCommitmentPushModel)
    association = ae.associate("127.0.0.1", node.port, ae_title=AE_TITLE,
                               ext_neg=[build_role(StorageCommitmentPushModel, scp_role=True)])
    assert not association.accepted_contexts
    association.abort()
