"""The main path: a modality of one hospital stores, a physician elsewhere finds it and gets its bytes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pydicom

from miss.local import HOST
from miss.processes import wait_until
from tests.cluster import (
    GALLIERA,
    RADIOLOGY,
    Cluster,
    coverage,
    dataset_of,
    qido,
    retrieve,
    technician,
    value,
)
from tests.datasets import instance_from_file, make_study, shipped_files
from tests.peers import dcmtk

STUDY_UID, SERIES_UID, SOP_UID = "0020000D", "0020000E", "00080018"
NAMED = ("CT_small.dcm", "MR_small_RLE.dcm", "J2K_pixelrep_mismatch.dcm", "JPEG2000.dcm",
         "SC_rgb_jpeg_dcmtk.dcm", "examples_ybr_color.dcm", "examples_rgb_color.dcm", "rtplan.dcm",
         "waveform_ecg.dcm", "image_dfl.dcm", "ExplVR_BigEnd.dcm", "SC_rgb_rle_2frame.dcm", "test-SR.dcm")


def test_what_storescu_sends_is_found_and_read_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    study = make_study(6, series=2, patient_id="STORESCU-1", patient_name="Bianchi^Carla")
    for number, instance in enumerate(study):
        (tmp_path / f"{number}.dcm").write_bytes(instance.part10)
    ward = cluster.ward(RADIOLOGY)
    sent = subprocess.run(
        [dcmtk("storescu"), "-v", "-aet", "STORESCU", "-aec", ward.ae_title, "+sd", HOST, str(ward.port),
         str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False)
    assert sent.returncode == 0, sent.stderr
    assert (sent.stdout + sent.stderr).count("Received Store Response (Success)") == 6

    client = cluster.dicomweb()
    # At once or with the ward's next word: it reports when its backlog begins, and is asked from then on.
    found = wait_until("the study's being found", lambda: client.search_for_studies(
        search_filters={"PatientName": "bianchi*"}) or None, timeout_s=3)
    assert [value(entry, STUDY_UID) for entry in found] == [study[0].study_uid]
    assert value(found[0], "00201206") == 2 and value(found[0], "00201208") == 6
    cluster.settle()
    with cluster.browser() as browser:
        got = retrieve(browser, f"/studies/{study[0].study_uid}")
        assert sorted(map(dataset_of, got)) == sorted(instance.dataset for instance in study)


def test_real_files_of_many_kinds_come_back_byte_for_byte(cluster: Cluster) -> None:
    files = [path for path in shipped_files() if path.name in NAMED]
    instances = [instance_from_file(path) for path in files]
    assert len({instance.sop_instance_uid for instance in instances}) == len(NAMED)
    cluster.send(instances, GALLIERA)
    cluster.settle()
    client = cluster.dicomweb()
    with cluster.browser() as browser:
        for path, instance in zip(files, instances, strict=True):
            where = f"/studies/{instance.study_uid}/series/{instance.series_uid}"
            assert [value(entry, SOP_UID) for entry in qido(
                browser, f"{where}/instances", SOPInstanceUID=instance.sop_instance_uid)
            ] == [instance.sop_instance_uid], path.name
            assert [value(entry, SERIES_UID) for entry in qido(
                browser, f"/studies/{instance.study_uid}/series", SeriesInstanceUID=instance.series_uid)
            ] == [instance.series_uid], path.name
            assert [value(entry, STUDY_UID) for entry in qido(
                browser, "/studies", StudyInstanceUID=instance.study_uid)] == [instance.study_uid], path.name
            got = retrieve(browser, f"{where}/instances/{instance.sop_instance_uid}")
            assert [dataset_of(part) for part in got] == [instance.dataset], path.name
    ct = instances[files.index(next(path for path in files if path.name == "CT_small.dcm"))]
    read = client.retrieve_instance(ct.study_uid, ct.series_uid, ct.sop_instance_uid)
    assert read.pixel_array.tobytes() == pydicom.dcmread(
        next(path for path in files if path.name == "CT_small.dcm")).pixel_array.tobytes()
    metadata = client.retrieve_series_metadata(ct.study_uid, ct.series_uid)
    assert value(metadata[0], SOP_UID) == ct.sop_instance_uid
    frame = client.retrieve_instance_frames(ct.study_uid, ct.series_uid, ct.sop_instance_uid, [1])
    assert frame[0] == read.PixelData


def test_each_role_sees_what_the_policy_says(cluster: Cluster) -> None:
    study = make_study(1, patient_id="ROLES-1")[0]
    cluster.send([study], RADIOLOGY)
    cluster.settle()
    seen = {}
    for user in ("physician", technician(RADIOLOGY), technician(GALLIERA)):
        with cluster.browser(user) as browser:
            seen[user] = [value(entry, STUDY_UID) for entry in qido(browser, "/studies", PatientID="ROLES-1")]
            read = browser.get(f"/dicom-web/studies/{study.study_uid}/metadata")
            assert read.status_code == (404 if user == technician(GALLIERA) else 200)
    assert seen == {"physician": [study.study_uid], technician(RADIOLOGY): [study.study_uid],
                    technician(GALLIERA): []}
    with cluster.browser("it") as browser:
        assert browser.get("/dicom-web/studies").status_code == 403
        assert browser.get(f"/dicom-web/studies/{study.study_uid}/metadata").status_code in (403, 404)


def test_the_answer_says_what_it_covers(cluster: Cluster) -> None:
    with cluster.browser() as browser:
        cluster.settle()
        answer = browser.get("/dicom-web/studies", params={"limit": "1"})
        covered = coverage(answer)
    assert covered["of"] == 2 and covered["covered"] == 2
    assert set(covered["wards"]) == {RADIOLOGY.id, GALLIERA.id}


def test_nobody_gets_in_without_a_name(cluster: Cluster) -> None:
    with httpx.Client(base_url=cluster.region.url) as browser:
        assert browser.get("/dicom-web/studies").status_code == 401
        assert browser.get("/dicom-web/studies", auth=("physician", "guess guess guess")).status_code == 401
