"""The WAN or the hub is down: the ward goes on, its own pages show its studies, everybody says as of when,
and what is owed drains by itself when the hub is back."""

from __future__ import annotations

import json
from pathlib import Path

from miss.processes import wait_until
from tests.cluster import GALLIERA, RADIOLOGY, Cluster, coverage, qido, value
from tests.commands import miss
from tests.datasets import make_study


def test_a_ward_goes_on_without_the_hub(tmp_path: Path) -> None:
    before, during = make_study(2, patient_id="BEFORE"), make_study(3, patient_id="DURING")
    with Cluster(tmp_path, ward_portal=True) as cluster:
        cluster.send(before)
        cluster.settle()
        complete = wait_until("a report with nothing pending",
                              lambda: cluster.ward_state().complete_to_us or None, timeout_s=20)
        cluster.region.hub.stop()

        cluster.send(during)  # every C-STORE answered 0000
        assert cluster.backlog().pending == 3
        with cluster.browser(ward_portal=True) as browser:
            for study in (before, during):
                found = qido(browser, "/studies", StudyInstanceUID=study[0].study_uid)
                assert [value(entry, "00201208") for entry in found] == [len(study)]
                assert browser.get(f"/dicom-web/studies/{study[0].study_uid}/metadata").status_code == 200

        with cluster.browser() as browser:  # the regional page: what it has, and as of when
            assert qido(browser, "/studies", PatientID="DURING") == []
            answer = browser.get("/dicom-web/studies", params={"PatientID": "DURING"})
            said = coverage(answer)["wards"][RADIOLOGY.id]
            assert "complete_to" in said
            assert complete <= cluster.ward_state().complete_to_us
            assert qido(browser, "/studies", PatientID="BEFORE") != []

        told = miss("status", "--state", str(cluster.region.folder), "--json")
        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout)["hub"]["answers"] is False
        node = miss("node", "status", "--state", str(cluster.ward().state), "--json")
        assert json.loads(node.stdout)["pending"] == 3
        shown = miss("node", "status", "--state", str(cluster.ward().state))
        assert "3 instances" in shown.stdout

        cluster.restart_hub()
        cluster.settle()
        with cluster.browser() as browser:
            found = qido(browser, "/studies", PatientID="DURING")
            assert [value(entry, "00201208") for entry in found] == [3]
        assert cluster.backlog(GALLIERA).pending == 0
