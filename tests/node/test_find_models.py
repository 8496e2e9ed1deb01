"""C-FIND by each information model, at all levels, and its keys (PS3.4 C.6)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE

from archive.model import Fact, FactKind
from archive.space.eviction import EvictionRequest
from node.dimse.contexts import PATIENT_ROOT_FIND, PATIENT_STUDY_ONLY_FIND, STUDY_ROOT_FIND
from tests.datasets import make_instance
from tests.node.finding import find, identifier, study
from tests.node.serving import AE_TITLE
from tests.node.storing import ISSUER, Storing, storing
from tests.peers import dcmtk

MODELS = {"-P": PATIENT_ROOT_FIND, "-S": STUDY_ROOT_FIND, "-O": PATIENT_STUDY_ONLY_FIND}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storing]:
    """Three studies of two patients, one of them of two modalities."""
    with storing(tmp_path_factory.mktemp("find")) as running:
        ct = make_instance(patient_id="P1", study_uid="1.2.1", series_uid="1.2.1.1", sop_uid="1.2.1.1.1",
                           StudyDescription="Thorax", BodyPartExamined="CHEST", InstitutionName="San Martino",
                           ReferringPhysicianName="Verdi^Ada", AccessionNumber="ACC1", StudyDate="20260101",
                           StudyTime="101530", PatientComments="none", SeriesDescription="axial",
                           PerformedProcedureStepStartDate="20260101", PerformedProcedureStepStartTime="1010")
        pet = make_instance(patient_id="P1", study_uid="1.2.1", series_uid="1.2.1.2", sop_uid="1.2.1.2.1",
                            modality="PT", sop_class="1.2.840.10008.5.1.4.1.1.128")
        others = [make_instance(patient_id="P1", study_uid="1.2.2", series_uid="1.2.2.1", number=n)
                  for n in (1, 2)]
        other = make_instance(patient_id="P2", patient_name="Bianchi^Luca", study_uid="1.2.3")
        assert running.send(ct, pet, *others, other) == [0] * 5
        yield running


def findscu(served: Storing, folder: Path, model: str, *keys: str) -> list[Dataset]:
    """What DCMTK's findscu gets."""
    asked = [word for key in keys for word in ("-k", key)]
    folder.mkdir(exist_ok=True)
    done = subprocess.run([dcmtk("findscu"), "-v", model, "-X", "-od", str(folder), "-aet", "CT1",
                           "-aec", AE_TITLE, *asked, "127.0.0.1", str(served.port)],
                          timeout=20, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return [dcmread(path, force=True) for path in sorted(folder.glob("rsp*.dcm"))]


@pytest.mark.parametrize(("issuer", "studies"), [(ISSUER, 2), ("ELSEWHERE", 0)])
def test_the_issuer_goes_with_a_patient_id(served: Storing, issuer: str, studies: int) -> None:
    """Below the patient too: it says which patient of that ID is meant (PS3.4 C.6.1.1.2)."""
    query = identifier("STUDY", PatientID="P1", IssuerOfPatientID=issuer, StudyInstanceUID="")
    statuses, found = find(served, query, root=PATIENT_ROOT_FIND)
    assert statuses == [0xFF00] * studies + [0]
    assert {one.IssuerOfPatientID for one in found} <= {ISSUER}


@pytest.mark.parametrize(
    ("model", "keys", "expected"),
    [
        ("-P", ["PATIENT", "PatientID", "PatientName=rossi*"], [("PatientID", "P1")]),
        ("-P", ["STUDY", "PatientID=P1", "StudyInstanceUID"],
         [("StudyInstanceUID", "1.2.1"), ("StudyInstanceUID", "1.2.2")]),
        ("-P", ["SERIES", "PatientID=P1", "StudyInstanceUID=1.2.1", "SeriesInstanceUID", "Modality=PT"],
         [("SeriesInstanceUID", "1.2.1.2")]),
        ("-P", ["IMAGE", "PatientID=P1", "StudyInstanceUID=1.2.1", "SeriesInstanceUID=1.2.1.1",
                "SOPInstanceUID"], [("SOPInstanceUID", "1.2.1.1.1")]),
        ("-S", ["STUDY", "AccessionNumber=ACC1", "StudyInstanceUID"], [("StudyInstanceUID", "1.2.1")]),
        ("-S", ["SERIES", "StudyInstanceUID=1.2.1", "SeriesInstanceUID", "SeriesDescription=ax*"],
         [("SeriesInstanceUID", "1.2.1.1")]),
        ("-S", ["IMAGE", "StudyInstanceUID=1.2.2", "SeriesInstanceUID=1.2.2.1", "SOPInstanceUID",
                "InstanceNumber=2"], [("InstanceNumber", 2)]),
        ("-O", ["PATIENT", "PatientID", "PatientName=bianchi*"], [("PatientID", "P2")]),
        ("-O", ["STUDY", "PatientID=P2", "StudyInstanceUID"], [("StudyInstanceUID", "1.2.3")]),
    ],
)  # fmt: skip
def test_findscu_at_all_levels(served: Storing, tmp_path: Path, model: str, keys: list[str],
                               expected: list[tuple[str, object]]) -> None:
    found = findscu(served, tmp_path, model, f"QueryRetrieveLevel={keys[0]}", *keys[1:])
    told = [(keyword, one[keyword].value) for one in found for keyword, _ in expected[:1]]
    assert sorted(told) == expected
    assert {one.QueryRetrieveLevel for one in found} == {keys[0]}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_pynetdicom_by_each_model(served: Storing, model: str) -> None:
    ae = AE("CT1")
    ae.add_requested_context(model)
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE)
    assert association.is_established
    answers = list(association.send_c_find(identifier("STUDY", PatientID="P1", StudyInstanceUID=""), model))
    association.release()
    assert [status.Status for status, _ in answers] == [0xFF00, 0xFF00, 0]
    assert {one.StudyInstanceUID for _, one in answers if one is not None} == {"1.2.1", "1.2.2"}


@pytest.mark.parametrize("level", ["SERIES", "IMAGE"])
def test_patients_and_studies_only(served: Storing, level: str) -> None:
    query = identifier(level, PatientID="P1", StudyInstanceUID="1.2.1", SeriesInstanceUID="1.2.1.1")
    assert find(served, query, root=PATIENT_STUDY_ONLY_FIND) == ([0xA900], [])
    hierarchical = identifier("STUDY", StudyInstanceUID="1.2.1")
    assert find(served, hierarchical, root=PATIENT_STUDY_ONLY_FIND) == ([0xA900], [])


def test_optional_keys_of_a_study(served: Storing) -> None:
    keys = {
        "ModalitiesInStudy": "", "SOPClassesInStudy": "", "NumberOfStudyRelatedSeries": None,
        "NumberOfStudyRelatedInstances": None, "StudyDescription": "Tho*", "ReferringPhysicianName": "verdi*",
        "PatientComments": "", "OtherPatientIDs": "", "InstanceAvailability": "", "RetrieveAETitle": "",
    }
    statuses, (one,) = find(served, identifier("STUDY", **keys))
    assert statuses == [0xFF00, 0]
    assert list(one.ModalitiesInStudy) == ["CT", "PT"] and len(one.SOPClassesInStudy) == 2
    assert (one.NumberOfStudyRelatedSeries, one.NumberOfStudyRelatedInstances) == (2, 2)
    assert (one.InstanceAvailability, one.RetrieveAETitle) == ("ONLINE", AE_TITLE)
    assert one.PatientComments == "none"
    assert {element.keyword for element in one} == {*keys, "QueryRetrieveLevel"}


def test_optional_keys_of_a_patient_and_of_a_series(served: Storing) -> None:
    counts = dict.fromkeys(("NumberOfPatientRelatedStudies", "NumberOfPatientRelatedSeries",
                            "NumberOfPatientRelatedInstances"))
    _, (patient,) = find(served, identifier("PATIENT", PatientID="P1", **counts), root=PATIENT_ROOT_FIND)
    assert [patient[keyword].value for keyword in counts] == [2, 3, 4]
    assert "InstanceAvailability" not in patient
    keys = {"BodyPartExamined": "CHEST", "InstitutionName": "San*",
            "PerformedProcedureStepStartDate": "20260101-", "PerformedProcedureStepStartTime": "10",
            "NumberOfSeriesRelatedInstances": None}
    statuses, (one,) = find(served, identifier("SERIES", StudyInstanceUID="1.2.1", **keys))
    assert statuses == [0xFF00, 0]
    assert (one.InstitutionName, one.NumberOfSeriesRelatedInstances) == ("San Martino", 1)


@pytest.mark.parametrize(
    ("keys", "status"),
    [
        ({"ModalitiesInStudy": "PT"}, 0xFF00),
        ({"Modality": "PT"}, 0xFF00),  # of a study, what its series have
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.128"}, 0xFF00),
        ({"ModalitiesInStudy": "PT", "SeriesDescription": "axial"}, 0xFF01),
        ({"ModalitiesInStudy": "PT", "NumberOfStudyRelatedSeries": "17"}, 0xFF01),
        ({"ModalitiesInStudy": "PT", "InstanceAvailability": "OFFLINE"}, 0xFF01),
        ({"ModalitiesInStudy": "PT", "RetrieveAETitle": "OTHER"}, 0xFF01),
        ({"ModalitiesInStudy": "PT", "ProcedureCodeSequence": []}, 0xFF01),
    ],
)
def test_keys_that_are_matched_on_and_keys_that_are_told(
    served: Storing, keys: dict[str, str], status: int
) -> None:
    statuses, (one,) = find(served, identifier("STUDY", StudyInstanceUID="", **keys))
    assert statuses == [status, 0]
    assert one.StudyInstanceUID == "1.2.1"
    assert "SeriesDescription" not in one and "ProcedureCodeSequence" not in one


def test_sequence_matching(tmp_path: Path) -> None:
    item, other = Dataset(), Dataset()
    item.ScheduledProcedureStepID, item.RequestedProcedureID = "S1", "R1"
    other.ScheduledProcedureStepID, other.RequestedProcedureID = "S2", "R2"
    with storing(tmp_path) as served:
        uid = study(served, RequestAttributesSequence=[item, other])
        for step, procedure, expected in (("S1", "R*", ["S1"]), ("S1", "R2", []), ("", "", ["S1", "S2"])):
            asked = Dataset()
            asked.ScheduledProcedureStepID, asked.RequestedProcedureID = step, procedure
            _, found = find(served, identifier("SERIES", StudyInstanceUID=uid, SeriesInstanceUID="",
                                               RequestAttributesSequence=[asked]))
            items = [one for match in found for one in match.RequestAttributesSequence]
            assert [one.ScheduledProcedureStepID for one in items] == expected


def test_what_was_evicted_is_nearline(tmp_path: Path) -> None:
    """The least available wins, and each copy's own title can retrieve it."""
    with storing(tmp_path, region="region") as served:
        uid = study(served, 2)
        here = study(served)
        served.archive.wait_indexed()
        stored = served.archive.instances(uid)
        now_us = 1 << 50
        served.archive.record_facts([
            Fact(FactKind.RECEIPT, one.head.sop_instance_uid, one.digest, "", now_us) for one in stored])
        served.archive.wait_indexed()
        report = served.archive.upkeep.evict(EvictionRequest(now_us + 1, study_uid=uid)).result(20)
        assert report.instances == 2
        _, found = find(served, identifier("STUDY", StudyInstanceUID="", InstanceAvailability=""))
        told = {one.StudyInstanceUID: one.InstanceAvailability for one in found}
        assert told == {uid: "NEARLINE", here: "ONLINE"}
        _, series = find(served, identifier("SERIES", StudyInstanceUID=uid, SeriesInstanceUID=""))
        _, images = find(served, identifier("IMAGE", StudyInstanceUID=uid, SOPInstanceUID="",
                                            SeriesInstanceUID=series[0].SeriesInstanceUID))
        assert [one.InstanceAvailability for one in [*series, *images]] == ["NEARLINE"] * 3
        assert {one.RetrieveAETitle for one in images} == {AE_TITLE}
