"""pynetdicom's applications against a node, and as its destination."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.asking import Asker, retrieve_identifier
from miss.load.sender import Target
from node.dimse import contexts
from tests.commands import miss
from tests.datasets import Instance, make_study
from tests.interop.running import (
    AE_TITLE,
    HOST,
    MODALITY,
    RunningNode,
    data_sets,
    free_port,
    pynetdicom,
    run,
    same_instances,
    serving,
    written,
)

STORESCP, QRSCP = "PYSTORE", "QRSCP"


def scu(name: str, node: RunningNode, *options: str | Path) -> list[str | Path]:
    return [*pynetdicom(name), *node.address, *options, "-aet", MODALITY, "-aec", AE_TITLE]


def keys(level: str, **values: str) -> list[str]:
    pairs = {"QueryRetrieveLevel": level, **values}
    return [part for keyword, value in pairs.items() for part in ("-k", f"{keyword}={value}")]


@pytest.fixture(scope="module")
def sent(node: RunningNode, tmp_path_factory: pytest.TempPathFactory) -> list[Instance]:
    """A study that its storescu sent."""
    instances = make_study(3, series=2, patient_id="PYNET-1", patient_name="Gialli^Ida")
    folder = tmp_path_factory.mktemp("sent")
    written(folder, instances)
    run(scu("storescu", node, folder, "-r", "-cx"))
    return instances


def test_echoscu(node: RunningNode) -> None:
    run(scu("echoscu", node))


def test_storescu(node: RunningNode, sent: list[Instance]) -> None:
    same_instances(node, sent)


@pytest.mark.parametrize(("root", "level", "values"), [
    ("-S", "STUDY", {"PatientID": "PYNET-1", "StudyInstanceUID": ""}),
    ("-P", "PATIENT", {"PatientName": "gialli*", "PatientID": "PYNET-1"}),
    ("-O", "PATIENT", {"PatientID": "PYNET-1"}),
])
def test_findscu(node: RunningNode, sent: list[Instance], root: str, level: str,
                 values: dict[str, str]) -> None:
    said = run(scu("findscu", node, root, "-v", *keys(level, **values)))
    assert said.count("PYNET-1") >= 2 and "0x0000" in said, said  # what was asked, and the answer


def test_getscu(node: RunningNode, sent: list[Instance], tmp_path: Path) -> None:
    run(scu("getscu", node, "-S", "-od", tmp_path, *keys("STUDY", StudyInstanceUID=sent[0].study_uid)))
    assert set(data_sets(tmp_path)) == {one.sop_instance_uid for one in sent}


def test_movescu_to_itself(node: RunningNode, sent: list[Instance], tmp_path: Path) -> None:
    port = free_port()
    node.allow(STORESCP, port)
    run(scu("movescu", node, "-S", "--store", "--store-port", str(port), "--store-aet", STORESCP, "-aem",
            STORESCP, "-od", tmp_path, *keys("STUDY", StudyInstanceUID=sent[0].study_uid)))
    assert set(data_sets(tmp_path)) == {one.sop_instance_uid for one in sent}


def test_movescu_to_storescp(node: RunningNode, sent: list[Instance], tmp_path: Path) -> None:
    port = free_port()
    node.allow(STORESCP, port)
    receiving = tmp_path / "receiving"
    with serving([*pynetdicom("storescp"), str(port), "-aet", STORESCP, "-od", receiving], port, tmp_path):
        run(scu("movescu", node, "-S", "-aem", STORESCP, *keys("STUDY", StudyInstanceUID=sent[0].study_uid)))
        done = miss("send", written(tmp_path / "more", make_study(1))[0], "--to", f"{STORESCP}@{HOST}:{port}")
        assert done.returncode == 0, done.stderr
    assert {one.sop_instance_uid for one in sent} < set(data_sets(receiving))
    assert len(data_sets(receiving)) == 4


def test_qrscp_moves_to_a_node(node: RunningNode, tmp_path: Path) -> None:
    """As another ward's archive: it is sent to, and asked to move to a node that lacks the study."""
    port = free_port()
    instances = make_study(2, patient_id="PYNET-2")
    (tmp_path / "instances").mkdir()
    settings = tmp_path / "qrscp.ini"
    settings.write_text(f"""[DEFAULT]
ae_title: {QRSCP}
port: {port}
max_pdu: 16382
acse_timeout: 30
dimse_timeout: 30
network_timeout: 30
bind_address: {HOST}
instance_location: {tmp_path / "instances"}
database_location: {tmp_path / "instances.sqlite"}

[{AE_TITLE}]
address: {HOST}
port: {node.place.port}
""")
    node.allow(QRSCP, port)
    written(tmp_path / "sending", instances)
    with serving([*pynetdicom("qrscp"), "-c", settings], port, tmp_path):
        done = miss("send", tmp_path / "sending", "--to", f"{QRSCP}@{HOST}:{port}")
        assert done.returncode == 0, done.stderr
        asker = Asker(Target(port, QRSCP), contexts.STUDY_ROOT_MOVE)
        assert asker.move(retrieve_identifier(instances[0].study_uid), AE_TITLE) == 2
        asker.release()
    held = {one.head.sop_instance_uid for one, _ in node.stored(instances[0].study_uid, 2)}
    assert held == {one.sop_instance_uid for one in instances}
