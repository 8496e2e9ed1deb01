"""The worklist, as foreign programs ask for it, and beside DCMTK's own server of the same worklist file."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from bench.servers import Orthanc
from tests.commands import miss
from tests.interop.running import (
    AE_TITLE,
    HOST,
    MODALITY,
    RunningNode,
    free_port,
    identifiers,
    program,
    pynetdicom,
    run,
    serving,
)
from tests.interop.test_orthanc import Beside

STATION = "CT9"
WORKLIST_SERVER = "WLSERVER"
STEP = "ScheduledProcedureStepSequence[0]."
RETURNED = ("PatientName", "AccessionNumber", "StudyInstanceUID", f"{STEP}ScheduledProcedureStepStartDate",
            f"{STEP}ScheduledProcedureStepDescription", "RequestedProcedureID")


@pytest.fixture(scope="module")
def scheduled(node: RunningNode, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A step that the node's worklist has, from a worklist file as DCMTK's server reads them."""
    step = Dataset()
    step.ScheduledStationAETitle, step.Modality = STATION, "CT"
    step.ScheduledProcedureStepStartDate, step.ScheduledProcedureStepStartTime = "20261123", "0915"
    step.ScheduledProcedureStepDescription, step.ScheduledProcedureStepID = "CT head", "S1"
    step.ScheduledPerformingPhysicianName = "Bianchi^Luca"
    item = Dataset()
    item.SpecificCharacterSet = "ISO_IR 100"
    item.PatientName, item.PatientID = "Müller^Käthe", "WL-1"
    item.PatientBirthDate, item.PatientSex = "19500412", "F"
    item.AccessionNumber, item.StudyInstanceUID = "WL1", generate_uid()
    item.RequestedProcedureID, item.RequestedProcedureDescription = "P1", "Head"
    item.ScheduledProcedureStepSequence = [step]
    item.file_meta = FileMetaDataset()
    item.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.31")
    item.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    folder = tmp_path_factory.mktemp("worklists")
    item.save_as(folder / "step.wl", enforce_file_format=True)
    done = miss("worklist", "import", folder / "step.wl", "--state", node.place.state)
    assert done.returncode == 0, done.stderr
    item.filename = str(folder / "step.wl")
    return item


def findscu(port: str, called_ae: str, folder: Path, *keys: str) -> list[Dataset]:
    folder.mkdir(exist_ok=True)
    options = [part for key in (*RETURNED, *keys) for part in ("-k", key)]
    run([program("findscu"), "-W", "-X", "-od", folder, "-aet", MODALITY, "-aec", called_ae, *options, HOST,
         port])
    return identifiers(folder)


@pytest.mark.parametrize(("keys", "count"), [
    ((f"{STEP}ScheduledStationAETitle={STATION}", f"{STEP}Modality=CT"), 1),
    ((f"{STEP}ScheduledProcedureStepStartDate=20261123-20261124",), 1),
    (("PatientName=M*", "PatientID=WL-1"), 1),
    (("AccessionNumber=WL1",), 1),
    ((f"{STEP}ScheduledStationAETitle={STATION}", f"{STEP}Modality=MR"), 0),
    ((f"{STEP}ScheduledProcedureStepStartDate=20261124-", f"{STEP}ScheduledStationAETitle={STATION}"), 0),
])
def test_findscu_gets_what_dcmtks_own_server_gives(
        node: RunningNode, scheduled: Dataset, tmp_path: Path, keys: tuple[str, ...], count: int) -> None:
    ours = findscu(str(node.place.port), AE_TITLE, tmp_path / "ours", *keys)
    assert [answer.AccessionNumber for answer in ours] == ["WL1"] * count
    port = free_port()
    lists = tmp_path / "lists" / WORKLIST_SERVER
    lists.mkdir(parents=True)
    (lists / "lockfile").touch()
    (lists / "step.wl").write_bytes(Path(str(scheduled.filename)).read_bytes())
    with serving([program("wlmscpfs"), "-dfp", tmp_path / "lists", str(port)], port, tmp_path):
        theirs = findscu(str(port), WORKLIST_SERVER, tmp_path / "theirs", *keys)
    assert len(theirs) == count
    for our, their in zip(ours, theirs, strict=True):
        assert our.PatientName == their.PatientName == "Müller^Käthe"
        assert our.StudyInstanceUID == their.StudyInstanceUID == scheduled.StudyInstanceUID
        [step], [other] = our.ScheduledProcedureStepSequence, their.ScheduledProcedureStepSequence
        assert step.ScheduledProcedureStepDescription == other.ScheduledProcedureStepDescription == "CT head"
        assert step.ScheduledProcedureStepStartDate == other.ScheduledProcedureStepStartDate


def test_pynetdicoms_findscu(node: RunningNode, scheduled: Dataset) -> None:
    said = run([*pynetdicom("findscu"), *node.address, "-W", "-v", "-aet", MODALITY, "-aec", AE_TITLE,
                "-k", "PatientID", "-k", f"{STEP}ScheduledStationAETitle={STATION}"])
    assert "WL-1" in said, said


def test_ctns_mwl_query(node: RunningNode, scheduled: Dataset) -> None:
    """It asks for no attribute, and gets every step without one."""
    said = run([program("mwlQuery"), "-a", MODALITY, "-c", AE_TITLE, *node.address])
    assert said.count("ff00") == 1 and "Successful operation" in said, said


def test_orthancs_find_worklist(node: RunningNode, scheduled: Dataset, tmp_path: Path) -> None:
    if why := Orthanc.missing(tls=False):
        pytest.skip(why)
    with Orthanc(tmp_path / "orthanc", destinations={AE_TITLE: node.place.port}) as server:
        node.allow(server.called_ae, server.target.port)
        orthanc = Beside(server)
        [found] = orthanc.post(f"/modalities/{AE_TITLE}/find-worklist", {
            "PatientID": "", "AccessionNumber": "",
            "ScheduledProcedureStepSequence": [{"ScheduledStationAETitle": STATION}]})
        orthanc.close()
    assert found["PatientID"] == "WL-1" and found["AccessionNumber"] == "WL1", found


