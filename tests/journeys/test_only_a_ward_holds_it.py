"""Replication is held back: what only a ward holds is found all the same, with counts; reading brings it."""

from __future__ import annotations

from pathlib import Path

from tests.cluster import RADIOLOGY, Cluster, coverage, dataset_of, qido, retrieve, technician, value
from tests.datasets import make_study


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
