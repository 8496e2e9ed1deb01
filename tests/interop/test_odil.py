"""odil's program, and its classes in Debian's Python, against a node."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.datasets import Instance, make_study
from tests.interop.running import (
    AE_TITLE,
    HOST,
    MODALITY,
    RunningNode,
    data_sets,
    free_port,
    program,
    run,
    same_instances,
    script,
    serving,
    written,
)

# It has no command for C-MOVE, so its class is called; the destination is DCMTK's.
MOVE = """
import sys, odil
host, port, study_uid, destination = sys.argv[1:]
association = odil.Association()
association.set_peer_host(host)
association.set_peer_port(int(port))
parameters = association.update_parameters()
parameters.set_calling_ae_title("MODALITY").set_called_ae_title("MISS-LOADED")
model = odil.registry.StudyRootQueryRetrieveInformationModelMove
parameters.set_presentation_contexts([odil.AssociationParameters.PresentationContext(
    model, [odil.registry.ImplicitVRLittleEndian], odil.AssociationParameters.PresentationContext.Role.SCU)])
association.associate()
scu = odil.MoveSCU(association)
scu.set_affected_sop_class(model)
scu.set_move_destination(destination)
query = odil.DataSet()
query.add("QueryRetrieveLevel", ["STUDY"])
query.add("StudyInstanceUID", [study_uid])
scu.move(query)
association.release()
"""


def odil(command: str, node: RunningNode, *arguments: str | Path) -> str:
    options = [one for one in arguments if str(one).startswith("-")]
    rest = [one for one in arguments if not str(one).startswith("-")]
    return run([script("odil"), command, *options, *node.address, MODALITY, AE_TITLE, *rest])


@pytest.fixture(scope="module")
def sent(node: RunningNode, tmp_path_factory: pytest.TempPathFactory) -> list[Instance]:
    """A study that `odil store` sent."""
    instances = make_study(3, series=2, patient_id="ODIL-1", patient_name="Blu^Rosa")
    odil("store", node, *written(tmp_path_factory.mktemp("sent"), instances))
    return instances


def test_echo(node: RunningNode) -> None:
    odil("echo", node)


def test_store(node: RunningNode, sent: list[Instance]) -> None:
    same_instances(node, sent)


@pytest.mark.parametrize(("root", "keys"), [
    ("study", ("QueryRetrieveLevel=STUDY", "PatientID=ODIL-1", "StudyInstanceUID")),
    ("study", ("QueryRetrieveLevel=STUDY", "PatientName=Blu^R*", "PatientID")),
    ("patient", ("QueryRetrieveLevel=PATIENT", "PatientID=ODIL-1")),
])
def test_find(node: RunningNode, sent: list[Instance], root: str, keys: tuple[str, ...]) -> None:
    said = odil("find", node, root, *keys)
    assert said.startswith("1 answer") and "ODIL-1" in said


def test_find_nobody(node: RunningNode) -> None:
    assert "ODIL" not in odil("find", node, "study", "QueryRetrieveLevel=STUDY", "PatientID=ODILNOBODY")


def test_get(node: RunningNode, sent: list[Instance], tmp_path: Path) -> None:
    odil("get", node, f"--directory={tmp_path}", "study", "QueryRetrieveLevel=STUDY",
         f"StudyInstanceUID={sent[0].study_uid}")
    assert set(data_sets(tmp_path)) == {one.sop_instance_uid for one in sent}


def test_move(node: RunningNode, sent: list[Instance], tmp_path: Path) -> None:
    script("odil")
    code = run(["/usr/bin/python3", "-c", "import importlib.util as u; print(u.find_spec('odil') is None)"])
    if "True" in code:
        pytest.skip("python3-odil is not installed")
    port = free_port()
    node.allow("ODILDEST", port)
    receiving = tmp_path / "receiving"
    receiving.mkdir()
    server = [program("storescp"), "+B", "-aet", "ODILDEST", "-od", str(receiving), str(port)]
    with serving(server, port, tmp_path):
        run(["/usr/bin/python3", "-c", MOVE, HOST, str(node.place.port), sent[0].study_uid, "ODILDEST"])
    assert data_sets(receiving) == {one.sop_instance_uid: one.dataset for one in sent}
