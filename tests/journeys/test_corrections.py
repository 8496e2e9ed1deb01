"""A study came under another patient: a technician corrects it, and every reader, at the ward and in the
region, sees the right one, and in what is retrieved what stood there before."""

from __future__ import annotations

import json
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest

from miss.local import HOST
from miss.processes import wait_until
from tests.cluster import CALLING, RADIOLOGY, Cluster, dataset_of, qido, retrieve, value
from tests.commands import miss
from tests.datasets import IMPLICIT, Instance, make_instance
from tests.peers import dcmtk

NAME, ID, ORIGINAL = "00100010", "00100020", "04000561"


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def storescu(cluster: Cluster, instance: Instance, folder: Path) -> None:
    (folder / "one.dcm").write_bytes(instance.part10)
    peer = cluster.peer()
    syntax = ["-xi"] if instance.transfer_syntax_uid == IMPLICIT else ["-xe"]
    run(dcmtk("storescu"), *syntax, "-aet", CALLING, "-aec", peer.called_ae, HOST, str(peer.port), "one.dcm",
        folder=folder)  # fmt: skip


def findscu(cluster: Cluster, folder: Path, *keys: str) -> str:
    peer = cluster.peer()
    asked = [part for key in ("QueryRetrieveLevel=STUDY", *keys) for part in ("-k", key)]
    return run(dcmtk("findscu"), "-S", "-aet", CALLING, "-aec", peer.called_ae, *asked, HOST, str(peer.port),
               folder=folder)  # fmt: skip


def getscu(cluster: Cluster, study_uid: str, folder: Path) -> list[Path]:
    folder.mkdir()
    peer = cluster.peer()
    run(dcmtk("getscu"), "-S", "-aet", CALLING, "-aec", peer.called_ae, "-k", "QueryRetrieveLevel=STUDY",
        "-k", f"StudyInstanceUID={study_uid}", "-od", str(folder), HOST, str(peer.port),
        folder=folder)  # fmt: skip
    return sorted(folder.iterdir())


def of_study(browser: httpx.Client, uid: str) -> dict[str, Any]:
    (study,) = qido(browser, "/studies", StudyInstanceUID=uid)
    return study


@pytest.mark.timeout(200)
def test_a_study_of_the_wrong_patient_is_the_right_one_s_for_every_reader(tmp_path: Path) -> None:
    with Cluster(tmp_path / "region", [RADIOLOGY], ward_portal=True) as cluster:
        state, region_state = str(cluster.ward().state), str(cluster.region.folder)
        one = make_instance(patient_id="C1", patient_name="Rossi^Mario", study_uid="1.2.3")
        other = make_instance(patient_id="C1", patient_name="Rossi^Mario", study_uid="1.2.3", number=2,
                              series_uid=one.series_uid, transfer_syntax=IMPLICIT, modality="CT")  # fmt: skip
        storescu(cluster, one, tmp_path)
        done = miss("correct", "study", one.study_uid, "--set", "PatientID=C2", "--set",
                    "PatientName=Verdi^Añña", "--reason", "wrong worklist", "--state", state)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "PatientID, PatientName corrected" in done.stderr and "Verdi" not in done.stderr
        storescu(cluster, other, tmp_path)  # what comes later is corrected too

        said = findscu(cluster, tmp_path, "PatientID=C2", "PatientName", "StudyInstanceUID")
        assert one.study_uid in said and "Rossi" not in said
        assert one.study_uid not in findscu(cluster, tmp_path, "PatientID=C1", "StudyInstanceUID")
        files = getscu(cluster, one.study_uid, tmp_path / "got")
        assert len(files) == 2
        for file in files:
            shown = run(dcmtk("dcmdump"), "+U8", str(file), folder=tmp_path)
            top, _, beside = shown.partition("(0400,0561)")
            assert "[C2]" in top and "Verdi^Añña" in top and "Rossi" not in top
            assert "(0400,0550)" in beside and "[C1]" in beside and "[Rossi^Mario]" in beside
            assert "[CORRECT]" in beside and "[MISS san-martino/radiology]" in beside

        cluster.settle()
        with cluster.browser() as browser:
            wait_until("the region knows",
                       lambda: value(of_study(browser, one.study_uid), ID) == "C2", timeout_s=30)  # fmt: skip
            assert value(of_study(browser, one.study_uid), NAME)["Alphabetic"] == "Verdi^Añña"
            assert qido(browser, "/studies", PatientID="C1") == []
            for part in retrieve(browser, f"/studies/{one.study_uid}"):
                got = pydicom.dcmread(BytesIO(part))
                assert (got.PatientID, got.PatientName) == ("C2", "Verdi^Añña")
                assert got.OriginalAttributesSequence[0].ModifiedAttributesSequence[0].PatientID == "C1"
            place = f"/dicom-web/studies/{one.study_uid}/metadata"
            answer = browser.get(place)
            assert {value(entry, ID) for entry in answer.json()} == {"C2"}
            assert all(ORIGINAL in entry for entry in answer.json())
            tag = answer.headers["etag"]

            (row,) = json.loads(miss("correct", "ls", "--json", "--state", region_state).stdout)
            assert (row["ward"], row["set"]["PatientID"]) == ("san-martino/radiology", "C2")
            undone = miss("correct", "undo", row["id"][:8], "--reason", "it was right", "--state",
                          region_state)  # fmt: skip
            assert undone.returncode == 0, undone.stderr
            assert browser.get(place, headers={"if-none-match": tag}).status_code == 200
            parts = retrieve(browser, f"/studies/{one.study_uid}")
            assert {dataset_of(part) for part in parts} == {one.dataset, other.dataset}
        wait_until("the ward knows", lambda: one.study_uid in findscu(
            cluster, tmp_path, "PatientID=C1", "StudyInstanceUID"), timeout_s=30)  # fmt: skip
        (row,) = json.loads(miss("correct", "ls", "--json", "--state", state).stdout)
        assert row["undone"] and "region" in row["stands"]
        with cluster.ward().ledger() as ledger:
            (act,) = ledger.audit_rows(act="correct")
            assert act.outcome == "success" and one.study_uid in act.subject
        log = cluster.ward().node.log.read_text()
        assert "Verdi" not in log and "Rossi" not in log

        wrong = miss("correct", "study", one.study_uid, "--set", "StudyInstanceUID=1.2", "--reason", "x",
                     "--state", state)  # fmt: skip
        assert wrong.returncode == 1 and "can't be corrected" in wrong.stderr
