"""DCMTK's programs against a node, over real sockets and with real files (PS3.4 annexes A, B, C and K)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import generate_uid

from tests.datasets import CT, EXPLICIT, IMPLICIT, MR, RLE, US, Instance, make_instance, make_study
from tests.interop.running import (
    AE_TITLE,
    MODALITY,
    RunningNode,
    data_sets,
    free_port,
    identifiers,
    program,
    run,
    same_instances,
    serving,
    written,
)

STUDY_ROOT, PATIENT_ROOT, PATIENT_STUDY_ONLY = "-S", "-P", "-O"
WAIT_OPTIONS = ("-to", "30", "-ta", "30", "-td", "30")


def scu(name: str, node: RunningNode, *options: str | Path, calling_ae: str = MODALITY,
        called_ae: str = AE_TITLE) -> list[str]:
    """A command line of an SCU; what comes last in `options` comes last."""
    files = [one for one in options if isinstance(one, Path)]
    flags = [one for one in options if not isinstance(one, Path)]
    return [program(name), *WAIT_OPTIONS, "-aet", calling_ae, "-aec", called_ae, *flags, *node.address,
            *map(str, files)]


def keys(level: str, **values: str) -> list[str]:
    pairs = {"QueryRetrieveLevel": level, **values}
    return [part for keyword, value in pairs.items() for part in ("-k", f"{keyword}={value}")]


def study(patient_id: str, count: int = 3, **rest: Any) -> list[Instance]:
    return make_study(count, patient_id=patient_id, **rest)


@pytest.fixture(scope="module")
def sent(node: RunningNode, tmp_path_factory: pytest.TempPathFactory) -> list[Instance]:
    """A study of two series, stored by storescu."""
    instances = study("DCMTK-1", 4, series=2, patient_name="Verdi^Anna", AccessionNumber="DK1")
    folder = tmp_path_factory.mktemp("sent")
    written(folder, instances)
    run(scu("storescu", node, "+sd", "+r", folder))
    return instances


def test_echoscu(node: RunningNode) -> None:
    run(scu("echoscu", node))
    assert "Called AE Title Not Recognized" in run(scu("echoscu", node, called_ae="OTHER"), code=None)


def test_storescu_stores_what_it_has(node: RunningNode, sent: list[Instance]) -> None:
    same_instances(node, sent)


def test_storescu_stores_compressed_files_as_they_are(node: RunningNode, tmp_path: Path) -> None:
    instances = study("DCMTK-RLE", 2, transfer_syntax=RLE)
    written(tmp_path, instances)
    run(scu("storescu", node, "-xr", "+sd", tmp_path))
    same_instances(node, instances)


@pytest.mark.parametrize(("root", "level", "values", "count"), [
    (STUDY_ROOT, "STUDY", {"PatientID": "DCMTK-1", "StudyInstanceUID": "", "AccessionNumber": "DK1"}, 1),
    (PATIENT_ROOT, "PATIENT", {"PatientName": "verdi^a*", "PatientID": "DCMTK-1"}, 1),
    (PATIENT_STUDY_ONLY, "STUDY", {"PatientID": "DCMTK-1", "StudyInstanceUID": ""}, 1),
    (STUDY_ROOT, "STUDY", {"PatientID": "DCMTK-1", "StudyDate": "20260101-20260131"}, 1),
    (STUDY_ROOT, "STUDY", {"PatientID": "DCMTK-1", "ModalitiesInStudy": "CT"}, 1),
    (STUDY_ROOT, "STUDY", {"PatientID": "DCMTK-NOBODY"}, 0),
])
def test_findscu(node: RunningNode, sent: list[Instance], tmp_path: Path, root: str, level: str,
                 values: dict[str, str], count: int) -> None:
    run(scu("findscu", node, root, "-X", "-od", str(tmp_path), *keys(level, **values)))
    found = identifiers(tmp_path)
    assert len(found) == count
    for answer in found:
        assert answer.PatientID == "DCMTK-1" and answer.QueryRetrieveLevel == level


def test_findscu_below_the_study(node: RunningNode, sent: list[Instance], tmp_path: Path) -> None:
    above = {"StudyInstanceUID": sent[0].study_uid}
    run(scu("findscu", node, STUDY_ROOT, "-X", "-od", str(tmp_path),
            *keys("SERIES", **above, SeriesInstanceUID="", SeriesNumber="", Modality="CT",
                  NumberOfSeriesRelatedInstances="")))
    series = identifiers(tmp_path)
    assert {answer.SeriesInstanceUID for answer in series} == {one.series_uid for one in sent}
    assert [int(answer.NumberOfSeriesRelatedInstances) for answer in series] == [2, 2]
    below = tmp_path / "images"
    below.mkdir()
    run(scu("findscu", node, STUDY_ROOT, "-X", "-od", str(below),
            *keys("IMAGE", **above, SeriesInstanceUID=sent[0].series_uid, SOPInstanceUID="")))
    assert {answer.SOPInstanceUID for answer in identifiers(below)} == {
        one.sop_instance_uid for one in sent if one.series_uid == sent[0].series_uid}


@pytest.mark.parametrize(("root", "level", "picked"), [
    (STUDY_ROOT, "STUDY", lambda one, first: True),
    (PATIENT_ROOT, "STUDY", lambda one, first: True),
    (STUDY_ROOT, "SERIES", lambda one, first: one.series_uid == first.series_uid),
    (STUDY_ROOT, "IMAGE", lambda one, first: one is first),
])
@pytest.mark.parametrize("service", ["getscu", "movescu"])
def test_retrieving(node: RunningNode, sent: list[Instance], tmp_path: Path, service: str, root: str,
                    level: str, picked: Callable[[Instance, Instance], bool]) -> None:
    first = sent[0]
    values = {"StudyInstanceUID": first.study_uid}
    if root == PATIENT_ROOT:
        values["PatientID"] = "DCMTK-1"
    if level != "STUDY":
        values["SeriesInstanceUID"] = first.series_uid
    if level == "IMAGE":
        values["SOPInstanceUID"] = first.sop_instance_uid
    options = [root, "+B", "-od", str(tmp_path), *keys(level, **values)]
    if service == "movescu":
        port = free_port()
        node.allow("MOVESCU", port)
        options += ["-aem", "MOVESCU", "+P", str(port)]
    run(scu(service, node, *options), folder=tmp_path)  # movescu +B writes there, whatever -od says
    assert data_sets(tmp_path) == {one.sop_instance_uid: one.dataset for one in sent if picked(one, first)}


def test_movescu_to_a_storescp(node: RunningNode, sent: list[Instance], tmp_path: Path) -> None:
    port = free_port()
    node.allow("STORESCP", port)
    with serving([program("storescp"), "+B", "-aet", "STORESCP", "-od", tmp_path, str(port)], port, tmp_path):
        run(scu("movescu", node, STUDY_ROOT, "-aem", "STORESCP",
                *keys("STUDY", StudyInstanceUID=sent[0].study_uid)))
    assert data_sets(tmp_path) == {one.sop_instance_uid: one.dataset for one in sent}


def test_movescu_to_nobody(node: RunningNode, sent: list[Instance]) -> None:
    said = run(scu("movescu", node, "-v", STUDY_ROOT, "-aem", "NOBODY",
                   *keys("STUDY", StudyInstanceUID=sent[0].study_uid)), code=None)
    assert "MoveDestinationUnknown" in said or "0xa801" in said.lower(), said


def test_getscu_of_what_is_compressed(node: RunningNode, tmp_path: Path) -> None:
    """getscu takes one syntax for a whole class: the pixels are the same in whichever it gets."""
    instances = study("DCMTK-RLE-GET", 2, transfer_syntax=RLE)
    sending = tmp_path / "sending"
    written(sending, instances)
    run(scu("storescu", node, "-xr", "+sd", sending))
    pixels = {one.sop_instance_uid: one.read().pixel_array.tobytes() for one in instances}
    for syntax in ("+xe", "+xr"):
        folder = tmp_path / syntax
        folder.mkdir()
        run(scu("getscu", node, STUDY_ROOT, syntax, "+B", "-od", str(folder),
                *keys("STUDY", StudyInstanceUID=instances[0].study_uid)))
        got = map(pydicom.dcmread, folder.iterdir())
        assert {one.SOPInstanceUID: one.pixel_array.tobytes() for one in got} == pixels, syntax


def test_many_classes_and_syntaxes_in_one_study(node: RunningNode, tmp_path: Path) -> None:
    study_uid = str(generate_uid())
    instances = [make_instance(study_uid=study_uid, patient_id="DCMTK-MIX", sop_class=sop_class,
                               transfer_syntax=syntax, number=number)
                 for number, (sop_class, syntax) in enumerate(
                     ((MR, IMPLICIT), (MR, EXPLICIT), (CT, IMPLICIT), (US, EXPLICIT)))]
    receiving = tmp_path / "receiving"
    receiving.mkdir()
    for instance in instances:
        run(scu("storescu", node, "-xi" if instance.transfer_syntax_uid == IMPLICIT else "-xe",
                written(tmp_path / instance.sop_instance_uid, [instance])[0]))
    same_instances(node, instances)
    run(scu("getscu", node, STUDY_ROOT, "+B", "-od", str(receiving),
            *keys("STUDY", StudyInstanceUID=study_uid)))
    assert set(data_sets(receiving)) == {one.sop_instance_uid for one in instances}


def test_termscu_ends_nothing(node: RunningNode) -> None:
    """It asks servers of DCMTK to end (by a private SOP class); a node refuses that and lives on."""
    run([program("termscu"), "-aet", MODALITY, "-aec", AE_TITLE, *node.address], code=None)
    run(scu("echoscu", node))


def test_findscu_over_the_worklist(node: RunningNode, tmp_path: Path) -> None:
    """Nothing is scheduled for this station: no match, and success."""
    said = run(scu("findscu", node, "-v", "-W", "-X", "-od", str(tmp_path), "-k", "PatientName", "-k",
                   "ScheduledProcedureStepSequence[0].ScheduledStationAETitle=NOSTATION"))
    assert identifiers(tmp_path) == [] and "Success" in said, said


