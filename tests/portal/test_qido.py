"""QIDO-RS over a real archive (dicom-rules Q1 to Q10, OH1 to OH6), and the viewer's priors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from starlette.testclient import TestClient

from archive.archive import Archive
from archive.ledger import Ledger
from federation.coverage import CoverageState
from tests.datasets import make_instance, make_study
from tests.portal.portals import (
    NOW_US,
    AppMaker,
    ArchiveSource,
    EmptySource,
    provenance,
    signed_in,
    take_in,
)

JSON = {"Accept": "application/dicom+json"}
ROOT = "/dicom-web"
GASLINI = "gaslini/paediatrics"


def value(result: dict[str, Any], tag: str) -> Any:
    return result[tag]["Value"][0]


@pytest.fixture
def client(make_app: AppMaker, archive: Archive) -> TestClient:
    return signed_in(make_app(ArchiveSource(archive)), "doc")


def uids(client: TestClient, url: str) -> list[str]:
    response = client.get(ROOT + url, headers=JSON)
    assert response.status_code in (200, 204), response.text
    return [value(r, "0020000D") for r in response.json()] if response.status_code == 200 else []


def test_levels_and_what_they_always_return(client: TestClient, archive: Archive) -> None:
    study = make_study(4, series=2)
    take_in(archive, study)
    uid, series = study[0].study_uid, study[0].series_uid
    (found,) = client.get(f"{ROOT}/studies", headers=JSON).json()
    assert value(found, "0020000D") == uid
    assert (value(found, "00201206"), value(found, "00201208")) == (2, 4)
    assert found["00080061"]["Value"] == ["CT"]
    assert value(found, "00081190") == f"http://127.0.0.1{ROOT}/studies/{uid}"
    both = client.get(f"{ROOT}/studies/{uid}/series", headers=JSON).json()
    assert len(both) == 2 and {value(s, "00201209") for s in both} == {2}
    assert "00100020" not in both[0]
    everywhere = client.get(f"{ROOT}/series", headers=JSON).json()
    assert "00100020" in everywhere[0] and len(everywhere) == 2
    of_study = client.get(f"{ROOT}/studies/{uid}/instances", headers=JSON).json()
    assert len(of_study) == 4 and "00080060" in of_study[0] and "00100020" not in of_study[0]
    of_series = client.get(f"{ROOT}/studies/{uid}/series/{series}/instances", headers=JSON).json()
    assert len(of_series) == 2 and value(of_series[0], "00280010") == 16
    ct = client.get(f"{ROOT}/instances?SOPClassUID=1.2.840.10008.5.1.4.1.1.2", headers=JSON)
    assert len(ct.json()) == 4


def test_the_viewers_study_list_is_answered(client: TestClient, archive: Archive) -> None:
    take_in(archive, [make_instance(patient_name="Synth^One", patient_id="XP001X")])
    take_in(archive, [make_instance(patient_name="Other^Two", patient_id="77")])
    include = "includefield=00081030%2C00080060%2C00080090%2C00100030"
    every = client.get(f"{ROOT}/studies?limit=101&offset=0&fuzzymatching=true&{include}", headers=JSON)
    assert len(every.json()) == 2 and "warning" not in every.headers
    assert value(every.json()[0], "00081030") == "Thorax" and "00080060" not in every.json()[0]
    for query in (
        "PatientName=*Synth*", "PatientName=%2Asynth%2A", "00100020=*P001*",
        "00100010=Synth*&ModalitiesInStudy=CT",
        "PatientID=XP001X&StudyDate=20260101-20261231",
        "StudyDescription=*hora*&PatientID=XP%3F01X",
    ):  # fmt: skip
        (found,) = client.get(f"{ROOT}/studies?{query}&limit=101&{include}", headers=JSON).json()
        assert value(found, "00100020") == "XP001X", query
    assert uids(client, "/studies?PatientName=*Synth*&ModalitiesInStudy=MR") == []
    assert uids(client, "/studies?StudyDate=20270101-") == []


def test_names_by_their_words_empty_and_several_values(client: TestClient, archive: Archive) -> None:
    """PS3.18 8.3.4.2, 8.3.4.5 and 8.3.4.6: the engine is that of C-FIND."""
    muller = make_instance(patient_name="Müller^Anna Maria", SpecificCharacterSet="ISO_IR 192", StudyID="7")
    pet = make_instance(study_uid=muller.study_uid, modality="PT", SpecificCharacterSet="ISO_IR 192")
    rossi = make_instance(patient_name="Rossi^Luca", StudyID="")
    for instance in (muller, pet, rossi):
        take_in(archive, [instance])
    for name, expected in (("maria muller", [muller]), ("ross", [rossi]), ("ulle", [])):
        found = uids(client, f"/studies?PatientName={name}&fuzzymatching=true")
        assert found == [one.study_uid for one in expected]
    assert uids(client, "/studies?PatientName=ross") == []
    assert uids(client, "/studies?StudyID=%22%22&emptyvaluematching=true") == [rossi.study_uid]
    both = "/studies?ModalitiesInStudy=CT%5CPT"
    assert uids(client, f"{both}&multiplevaluematching=true") == [muller.study_uid]
    assert len(uids(client, both)) == 2


def test_uid_lists(client: TestClient, archive: Archive) -> None:
    studies = [make_instance() for _ in range(3)]
    take_in(archive, studies)
    first, second = studies[0].study_uid, studies[1].study_uid
    for separator in (",", "\\", "%5C", "%2C"):
        found = uids(client, f"/studies?StudyInstanceUID={first}{separator}{second}")
        assert sorted(found) == sorted([first, second])


def test_paging_is_stable_and_says_what_remains(client: TestClient, archive: Archive) -> None:
    take_in(archive, [make_instance(StudyDate=f"2026010{i}") for i in range(1, 6)])
    everything = uids(client, "/studies")
    first = client.get(f"{ROOT}/studies?limit=2", headers=JSON)
    assert "There are 3 additional results that can be requested" in first.headers["warning"]
    assert first.headers["warning"].startswith("299 http://127.0.0.1/dicom-web: ")
    paged = [uid for offset in (0, 2, 4, 6) for uid in uids(client, f"/studies?limit=2&offset={offset}")]
    assert paged == everything and len(everything) == 5
    for nothing in ("limit=0", "offset=5", "limit=2&offset=100"):
        response = client.get(f"{ROOT}/studies?{nothing}", headers=JSON)
        assert (response.status_code, response.content) == (204, b"")


def test_accept(client: TestClient, archive: Archive) -> None:
    take_in(archive, [make_instance(patient_name="Müller^Jörg")])
    for accept, kind in (
        ("application/dicom+json", "application/dicom+json"),
        ("*/*", "application/dicom+json"),
        ("application/json", "application/dicom+json"),
        ("text/html, application/dicom+json;q=0.1", "application/dicom+json"),
        ('multipart/related; type="application/dicom+xml"', "multipart/related"),
    ):
        response = client.get(f"{ROOT}/studies", headers={"Accept": accept})
        assert response.status_code == 200 and response.headers["content-type"].startswith(kind), accept
    xml = response.content.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
    names = ElementTree.fromstring(xml).findall(".//DicomAttribute[@keyword='PatientName']//FamilyName")
    assert [name.text for name in names] == ["Müller"]
    for accept in ("text/html", "", "image/png"):
        assert client.get(f"{ROOT}/studies", headers={"Accept": accept}).status_code == 406
    mixed = client.get(f"{ROOT}/studies", headers={"Accept": "application/dicom+json, image/jpeg"})
    assert mixed.status_code == 400


def test_wrong_questions_are_400(client: TestClient) -> None:
    for url in ("/studies?Nonsense=1", "/studies?limit=x", "/studies/..%2f/series", "/studies/1.02/series"):
        response = client.get(ROOT + url, headers=JSON)
        assert response.status_code in (400, 404), url
        assert response.headers["content-type"] == "application/problem+json" or response.status_code == 404


def test_every_answer_says_what_it_covers(make_app: AppMaker, archive: Archive) -> None:
    here = EmptySource().wards[0]
    missing = replace(
        here, ward=GASLINI, hospital="Gaslini", name="Päd", state=CoverageState.INCOMPLETE, pending=3,
        complete_to_us=NOW_US, reason="3 instances are at the ward, which is away",
    )  # fmt: skip
    client = signed_in(make_app(ArchiveSource(archive, (here, missing))), "doc")
    response = client.get(f"{ROOT}/studies", headers=JSON)
    assert response.status_code == 204
    coverage = json.loads(response.headers["miss-coverage"])
    assert (coverage["covered"], coverage["of"]) == (1, 2)
    assert coverage["wards"][GASLINI] == {
        "state": "incomplete", "complete_to": "2026-09-21T14:13:20+00:00", "pending": 3,
    }  # fmt: skip
    assert "not complete: Gaslini P?d (3 instances" in response.headers["warning"]


def test_what_is_set_aside_at_a_ward_that_was_not_asked_is_warned_of(
    make_app: AppMaker, archive: Archive
) -> None:
    here = EmptySource().wards[0]
    away = replace(here, ward=GASLINI, hospital="Gaslini", state=CoverageState.AS_OF, set_aside=2)
    client = signed_in(make_app(ArchiveSource(archive, (here, away))), "doc")
    response = client.get(f"{ROOT}/studies", headers=JSON)
    assert response.status_code == 204
    assert "is not in this answer: Gaslini Radiology (2)" in response.headers["warning"]
    assert "No studies." not in client.get("/studies").text
    assert "No studies." in signed_in(make_app(ArchiveSource(archive, (here,))), "doc").get("/studies").text


def test_priors_are_bound_to_the_person_who_was_opened(client: TestClient, archive: Archive) -> None:
    """Two hospitals, both with a Patient ID 123: one never shows among the other's studies."""
    ours = [make_instance(patient_id="123", patient_name="Rossi^Maria") for _ in range(2)]
    theirs = make_instance(patient_id="123", patient_name="Bianchi^Luca")
    take_in(archive, ours)
    take_in(archive, [theirs], provenance(GASLINI, "GASLINI"))
    question = "/studies?00100020=123&limit=101&offset=0&fuzzymatching=true"
    assert len(uids(client, question)) == 3  # a bare ID is ambiguous
    opened = ours[0].study_uid
    assert sorted(uids(client, f"/for/{opened}{question}")) == sorted(i.study_uid for i in ours)
    assert uids(client, f"/for/{theirs.study_uid}{question}") == [theirs.study_uid]
    assert uids(client, f"/for/{opened}/studies?PatientName=*i*") == uids(client, f"/for/{opened}{question}")
    assert uids(client, f"/for/{opened}/series?00100020=123") != []
    assert len(uids(client, f"/for/{opened}/instances")) == 2
    # The study that is opened is asked for by its UID; so is a second one in the same link.
    assert uids(client, f"/for/{opened}/studies?StudyInstanceUID={opened}") == [opened]
    assert uids(client, f"/for/{opened}/studies?StudyInstanceUID={theirs.study_uid}") == [theirs.study_uid]
    assert uids(client, f"/for/1.2.3.4{question}") == []
    # A key that names no study lifts no bound.
    for nothing in ("", "*", "**", "%00", "%20", "%5C"):
        url = f"{ROOT}/for/{opened}{question}&StudyInstanceUID={nothing}"
        response = client.get(url, headers=JSON)
        found = {value(r, "0020000D") for r in response.json()} if response.status_code == 200 else set()
        assert theirs.study_uid not in found, nothing
    assert client.get(f"{ROOT}/for/no-uid{question}", headers=JSON).status_code == 400


def test_without_a_patient_id_there_are_no_priors(client: TestClient, archive: Archive) -> None:
    nameless = [make_instance(patient_id="") for _ in range(2)]
    take_in(archive, nameless)
    opened = nameless[0].study_uid
    assert uids(client, f"/for/{opened}/studies?00100020=") == [opened]


def test_who_sees_one_ward_sees_the_coverage_of_one(make_app: AppMaker) -> None:
    other = replace(EmptySource().wards[0], ward=GASLINI, hospital="Gaslini")
    client = signed_in(make_app(EmptySource((*EmptySource().wards, other))), "tech")
    response = client.get(f"{ROOT}/studies?limit=0", headers=JSON)
    assert response.status_code == 204
    assert list(json.loads(response.headers["MISS-Coverage"])["wards"]) == ["san-martino/radiology"]


def test_several_accept_lines_are_one_list(client: TestClient, archive: Archive) -> None:
    take_in(archive, [make_instance()])
    lines = [("Accept", "text/html"), ("Accept", "application/dicom+json;q=0.5")]
    response = client.send(client.build_request("GET", f"{ROOT}/studies", headers=lines))
    assert response.status_code == 200 and len(response.json()) == 1


def test_roles(make_app: AppMaker, archive: Archive, ledger: Ledger) -> None:
    own, other = make_instance(), make_instance()
    take_in(archive, [own])
    take_in(archive, [other], provenance(GASLINI, "GASLINI"))
    app = make_app(ArchiveSource(archive))
    assert uids(signed_in(app, "tech"), "/studies") == [own.study_uid]
    assert len(uids(signed_in(app, "doc"), "/studies")) == 2
    denied = signed_in(app, "it").get(f"{ROOT}/studies", headers=JSON)
    assert denied.status_code == 403
    rows = {(row.who, row.outcome) for row in ledger.audit_rows(act="search by DICOMweb")}
    assert rows == {("it", "denied"), ("doc", "success"), ("tech", "success")}


def test_capabilities_name_every_resource(client: TestClient) -> None:
    response = client.options(f"{ROOT}/")
    assert response.headers["content-type"] == "application/vnd.sun.wadl+xml"
    namespace = "{http://wadl.dev.java.net/2009/02}"
    document = ElementTree.fromstring(response.content)
    paths = {resource.get("path") for resource in document.iter(f"{namespace}resource")}
    assert {"studies", "studies/{study}/series/{series}/metadata", "instances"} <= paths
    assert "studies/{study}/series/{series}/instances/{instance}/frames/{frames}" in paths
    base = document.find(f"{namespace}resources")
    assert base is not None and base.get("base") == "http://127.0.0.1/dicom-web"
    assert all(
        list(method.iter(f"{namespace}representation")) for method in document.iter(f"{namespace}method")
    )
    assert client.options(ROOT).content == response.content
