"""Replication is held back: what only a ward holds is found all the same, with counts; reading brings it."""

from __future__ import annotations

import time
from pathlib import Path

from tests.cluster import RADIOLOGY, Cluster, coverage, dataset_of, qido, retrieve, technician, value
from tests.datasets import make_study
from tests.federation.thin import ThinLine
from tests.waiting import wait_for

STORED_FRAMES = 'multipart/related; type="application/octet-stream"; transfer-syntax=*'


def test_a_study_that_only_a_ward_holds_is_found_and_opens(tmp_path: Path) -> None:
    study, other = make_study(4, series=2, patient_id="HELD"), make_study(2, patient_id="HELD-TOO")
    with Cluster(tmp_path, hold=True) as cluster:
        cluster.send(study + other)
        assert cluster.backlog().pending == 6
        with cluster.browser() as browser:
            answer = browser.get("/dicom-web/studies", params={"PatientID": "HELD"})
            assert [value(entry, "00201208") for entry in answer.json()] == [4]
            assert coverage(answer)["wards"][RADIOLOGY.id]["state"] == "answered"
            series = qido(browser, f"/studies/{study[0].study_uid}/series")
            assert sorted(value(entry, "00201209") for entry in series) == [2, 2]
            assert cluster.backlog().pending == 6  # a search moves nothing

            got = retrieve(browser, f"/studies/{study[0].study_uid}")
            assert sorted(map(dataset_of, got)) == sorted(instance.dataset for instance in study)
            assert cluster.backlog().pending == 2  # reading promoted this study alone
            found = qido(browser, "/studies", PatientID="HELD")
            assert [value(entry, "00201208") for entry in found] == [4]  # a union: nothing is counted twice
        with cluster.browser(technician(cluster.region.wards[1].plan)) as browser:
            assert qido(browser, "/studies", PatientID="HELD-TOO") == []
            assert browser.get(f"/dicom-web/studies/{other[0].study_uid}/metadata").status_code == 404
        assert cluster.backlog().pending == 2  # who may not see it can't make it move


def test_it_is_seen_while_it_arrives(tmp_path: Path) -> None:
    """A thin line to the ward: the study takes about three seconds."""
    study = make_study(24, patient_id="FAR", padding=1 << 20)
    cluster = Cluster(tmp_path, hold=True)
    with ThinLine(cluster.region.ports.hub, 8 << 20) as line:
        node = cluster.ward().node
        node.arguments = [*node.arguments, "--set", f"uplink.hub_address=127.0.0.1:{line.port}"]
        with cluster, cluster.browser() as browser:
            cluster.send(study)
            wait_for(lambda: cluster.ward_state().pending == 24, "the ward has reported")
            path, begun_s = f"/dicom-web/studies/{study[0].study_uid}", time.monotonic()
            accept = {"accept": "application/dicom+json", "accept-encoding": "identity"}
            with browser.stream("GET", f"{path}/metadata", headers=accept) as told:
                body = b""
                for piece in told.iter_raw():
                    body += piece
                    if b'"00080018"' in body:
                        break
                told_s = time.monotonic() - begun_s
                first = study[0]
                frame = browser.get(
                    f"{path}/series/{first.series_uid}/instances/{first.sop_instance_uid}/frames/1",
                    headers={"accept": STORED_FRAMES})
                seen_s = time.monotonic() - begun_s
            assert frame.status_code == 200 and told.status_code == 200
            got = retrieve(browser, f"/studies/{first.study_uid}")
            whole_s = time.monotonic() - begun_s
            assert sorted(map(dataset_of, got)) == sorted(one.dataset for one in study)
            assert told_s < whole_s / 2 and seen_s < whole_s / 2, (told_s, seen_s, whole_s)
            metadata = browser.get(f"{path}/metadata", headers=accept).json()
            assert len(metadata) == 24
            print(f"metadata {told_s:.2f} s, frame {seen_s:.2f} s, study {whole_s:.2f} s")
