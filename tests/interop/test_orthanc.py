"""Orthanc and a node as each other's remote modality: echo, query, retrieve, store, storage commitment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.asking import Asker, retrieve_identifier
from bench.servers import Orthanc
from miss.load.sender import Target
from node.dimse import contexts
from node.dimse.requestor import Peer, Requestor, echo
from tests.cluster import dataset_of
from tests.commands import miss
from tests.datasets import CT, EXPLICIT, Instance, make_study
from tests.interop.running import AE_TITLE, HOST, MODALITY, RunningNode, same_instances, written
from tests.waiting import wait_for

MODALITIES = f"/modalities/{AE_TITLE}"


class Beside:
    """An Orthanc that knows the node, and is known to it."""

    def __init__(self, server: Orthanc) -> None:
        self.server = server
        self._http = httpx.Client(base_url=server.url, timeout=60)

    @property
    def peer(self) -> Peer:
        return Peer(HOST, self.server.target.port, self.server.called_ae)

    def post(self, path: str, body: object) -> Any:
        answer = self._http.post(path, json=body)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}"
        return answer.json()

    def get(self, path: str) -> Any:
        answer = self._http.get(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}"
        return answer.json()

    def upload(self, instances: list[Instance]) -> str:
        """Stores them by its REST API; its own name of their study."""
        for instance in instances:
            answer = self._http.post("/instances", content=instance.part10)
            assert answer.status_code == 200, answer.text
            study: str = answer.json()["ParentStudy"]
        return study

    def held(self, study_uid: str) -> dict[str, bytes]:
        """The data sets that it has of a study, by SOP Instance UID."""
        found = self.post("/tools/find", {"Level": "Instance", "Query": {"StudyInstanceUID": study_uid},
                                          "Expand": True})
        return {one["MainDicomTags"]["SOPInstanceUID"]:
                dataset_of(self._http.get(f"/instances/{one['ID']}/file").content) for one in found}

    def close(self) -> None:
        self._http.close()


@pytest.fixture(scope="module")
def orthanc(node: RunningNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    if why := Orthanc.missing(tls=False):
        pytest.skip(why)
    with Orthanc(tmp_path_factory.mktemp("orthanc"), destinations={AE_TITLE: node.place.port}) as server:
        node.allow(server.called_ae, server.target.port)
        beside = Beside(server)
        try:
            yield beside
        finally:
            beside.close()


@pytest.fixture(scope="module")
def in_node(node: RunningNode) -> list[Instance]:
    """A study of two series that the node holds."""
    instances = make_study(4, series=2, patient_id="ORTHANC-1", patient_name="Neri^Ugo",
                           AccessionNumber="OR1")
    with Requestor.connect(Peer(HOST, node.place.port, AE_TITLE), MODALITY,
                           contexts.plan([(CT, EXPLICIT)])[0]) as requestor:
        context = requestor.context(CT, EXPLICIT)
        assert context is not None
        for one in instances:
            assert requestor.store(context, one.sop_instance_uid, [one.dataset]) == 0
    return instances


def data_sets(instances: list[Instance]) -> dict[str, bytes]:
    return {one.sop_instance_uid: one.dataset for one in instances}


def query(orthanc: Beside, level: str, **keys: str) -> tuple[str, list[dict[str, str]]]:
    """A query of Orthanc's to the node, and the answers."""
    path = orthanc.post(f"{MODALITIES}/query", {"Level": level, "Query": keys})["Path"]
    return path, orthanc.get(f"{path}/answers?expand&simplify")


# --- Orthanc uses the node

def test_it_echoes(orthanc: Beside) -> None:
    orthanc.post(f"{MODALITIES}/echo", {})


@pytest.mark.parametrize(("level", "keys"), [
    ("Patient", {"PatientName": "neri*", "PatientID": "ORTHANC-1"}),
    ("Study", {"PatientID": "ORTHANC-1", "StudyDescription": "*", "NumberOfStudyRelatedInstances": ""}),
    ("Study", {"AccessionNumber": "OR1", "StudyDate": "20260101-20261231", "ModalitiesInStudy": "CT\\MR"}),
])
def test_it_queries(orthanc: Beside, in_node: list[Instance], level: str, keys: dict[str, str]) -> None:
    _, [answer] = query(orthanc, level, **{"PatientID": "", **keys})
    assert answer["PatientID"] == "ORTHANC-1"
    if "NumberOfStudyRelatedInstances" in keys:
        assert answer["NumberOfStudyRelatedInstances"] == "4"


def test_it_looks_below_an_answer(orthanc: Beside, in_node: list[Instance]) -> None:
    path, _ = query(orthanc, "Study", PatientID="ORTHANC-1")
    series = orthanc.post(f"{path}/answers/0/query-series", {"Query": {"Modality": "CT"}})["Path"]
    found = orthanc.get(f"{series}/answers?expand&simplify")
    assert {one["SeriesInstanceUID"] for one in found} == {one.series_uid for one in in_node}
    images = orthanc.post(f"{series}/answers/0/query-instances", {"Query": {}})["Path"]
    assert len(orthanc.get(f"{images}/answers?expand&simplify")) == 2


def test_it_finds_nobody(orthanc: Beside) -> None:
    assert query(orthanc, "Study", PatientID="ORTHANC-NOBODY")[1] == []


def test_it_retrieves_what_it_found(orthanc: Beside, in_node: list[Instance]) -> None:
    path, _ = query(orthanc, "Study", PatientID="ORTHANC-1")
    orthanc.post(f"{path}/retrieve", {"TargetAet": "ORTHANC", "Synchronous": True})
    assert orthanc.held(in_node[0].study_uid) == data_sets(in_node)


def test_it_stores(orthanc: Beside, node: RunningNode) -> None:
    instances = make_study(3, patient_id="ORTHANC-2")
    done = orthanc.post(f"{MODALITIES}/store",
                        {"Resources": [orthanc.upload(instances)], "Synchronous": True})
    assert done["FailedInstancesCount"] == 0 and done["InstancesCount"] == 3
    same_instances(node, instances)


def commitment(orthanc: Beside, instances: list[Instance]) -> dict[str, Any]:
    """Asks the node to commit; what its report, which comes on an association of its own, said."""
    asked = orthanc.post(f"{MODALITIES}/storage-commitment", {
        "DicomInstances": [[one.sop_class_uid, one.sop_instance_uid] for one in instances]})
    return reported(orthanc, asked["Path"])


def reported(orthanc: Beside, path: str) -> dict[str, Any]:
    wait_for(lambda: orthanc.get(path)["Status"] != "Pending", "the node's report")
    return dict(orthanc.get(path))


def test_it_is_told_what_is_committed(orthanc: Beside, in_node: list[Instance]) -> None:
    report = commitment(orthanc, in_node)
    assert report["Status"] == "Success", report
    assert {one["SOPInstanceUID"] for one in report["Success"]} == set(data_sets(in_node))
    assert report["Failures"] == []


def test_it_is_told_what_is_not(orthanc: Beside, in_node: list[Instance]) -> None:
    """No such object instance (0112): PS3.3 C.14.1.1."""
    other = make_study(1)
    report = commitment(orthanc, in_node[:1] + other)
    assert report["Status"] == "Failure", report
    assert [one["SOPInstanceUID"] for one in report["Success"]] == [in_node[0].sop_instance_uid]
    [failure] = report["Failures"]
    assert failure["SOPInstanceUID"] == other[0].sop_instance_uid
    assert failure["FailureReason"] == 0x0112, failure


def test_it_stores_and_has_it_committed_at_once(orthanc: Beside, node: RunningNode) -> None:
    instances = make_study(2, patient_id="ORTHANC-3")
    done = orthanc.post(f"{MODALITIES}/store", {"Resources": [orthanc.upload(instances)], "Synchronous": True,
                                                "StorageCommitment": True})
    report = reported(orthanc, f"/storage-commitment/{done['StorageCommitmentTransactionUID']}")
    assert report["Status"] == "Success" and len(report["Success"]) == 2, report


def test_it_asks_for_the_worklist(orthanc: Beside) -> None:
    """Nothing is scheduled for this station."""
    found = orthanc.post(f"{MODALITIES}/find-worklist", {
        "PatientName": "", "ScheduledProcedureStepSequence": [{"ScheduledStationAETitle": "NOSTATION"}]})
    assert found == []


# --- a node, and its command, use Orthanc

def test_a_node_echoes(orthanc: Beside) -> None:
    assert echo(orthanc.peer, MODALITY) == 0


def test_a_node_sends(orthanc: Beside, tmp_path: Path) -> None:
    instances = make_study(3, series=2, patient_id="ORTHANC-4")
    written(tmp_path, instances)
    peer = orthanc.peer
    done = miss("send", tmp_path, "--to", f"{peer.called_ae}@{peer.host}:{peer.port}")
    assert done.returncode == 0, done.stderr
    assert orthanc.held(instances[0].study_uid) == data_sets(instances)


def test_a_node_finds_and_gets_what_it_moves(orthanc: Beside, node: RunningNode) -> None:
    instances = make_study(3, patient_id="ORTHANC-5")
    orthanc.upload(instances)
    target = Target(orthanc.peer.port, orthanc.peer.called_ae)
    with Requestor.connect(orthanc.peer, MODALITY,
                           contexts.plan([(contexts.STUDY_ROOT_FIND, EXPLICIT)])[0]) as requestor:
        answers = list(requestor.find(retrieve_identifier(instances[0].study_uid)))
    assert [answer.status for answer, _ in answers] == [0xFF00, 0]
    asker = Asker(target, contexts.STUDY_ROOT_MOVE)
    assert asker.move(retrieve_identifier(instances[0].study_uid), AE_TITLE) == 3
    asker.release()
    same_instances(node, instances)


def test_a_node_moves_to_it(orthanc: Beside, node: RunningNode) -> None:
    """A C-MOVE that a third one asks for, by the name of the modality as Orthanc lists it, too."""
    instances = make_study(2, patient_id="ORTHANC-6")
    orthanc.post(f"{MODALITIES}/store", {"Resources": [orthanc.upload(instances)], "Synchronous": True})
    for study in orthanc.get("/studies?expand"):
        if study["MainDicomTags"]["StudyInstanceUID"] == instances[0].study_uid:
            assert httpx.delete(f"{orthanc.server.url}/studies/{study['ID']}").status_code == 200
    assert orthanc.held(instances[0].study_uid) == {}
    asker = Asker(Target(node.place.port, AE_TITLE), contexts.STUDY_ROOT_MOVE)
    assert asker.move(retrieve_identifier(instances[0].study_uid), "ORTHANC") == 2
    asker.release()
    assert orthanc.held(instances[0].study_uid) == data_sets(instances)
