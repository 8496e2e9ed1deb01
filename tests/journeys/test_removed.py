"""A ward removes a study: nobody finds it any more, at the ward and in the region, also when it is sent
again, until the ward takes that back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miss.processes import wait_until
from tests.cluster import RADIOLOGY, Cluster, qido, retrieve
from tests.commands import miss
from tests.datasets import make_instance
from tests.rejections import note_about

STUDY = "1.2.826.7.9"


@pytest.mark.timeout(200)
def test_removed_at_the_ward_hidden_in_the_region_and_back(tmp_path: Path) -> None:
    with Cluster(tmp_path / "region", [RADIOLOGY], ward_portal=True) as cluster:
        state = cluster.ward().state
        images = [make_instance(study_uid=STUDY, series_uid=f"{STUDY}.1", sop_uid=f"{STUDY}.1.{n}", number=n)
                  for n in range(1, 4)]  # fmt: skip
        cluster.send(images)
        cluster.settle()

        def found(*, ward_portal: bool = False) -> int:
            with cluster.browser(ward_portal=ward_portal) as browser:
                return len(qido(browser, "/instances", StudyInstanceUID=STUDY))

        assert found() == 3
        cluster.send([note_about(images[:1], "113037")])
        cluster.settle()
        assert found(ward_portal=True) == 2 and found() == 2, "a rejection travels with the images"

        refused = miss("remove", "study", STUDY, "--reason", "sent twice", "--state", state)
        assert refused.returncode != 0 and "inside retention" in refused.stderr
        done = miss("remove", "study", STUDY, "--reason", "wrong", "--code", "113038", "--state", state)
        assert done.returncode == 0, done.stderr
        assert found(ward_portal=True) == 0
        wait_until("the region hides it", lambda: found() == 0 or None, timeout_s=30)
        with cluster.browser() as browser:
            answer = browser.get(f"/dicom-web/studies/{STUDY}", headers={"accept": "multipart/related"})
            assert answer.status_code == 404
        cluster.send(images)
        cluster.settle()
        assert found(ward_portal=True) == 0 and found() == 0, "answered as stored, and not resurrected"

        rows = json.loads(miss("remove", "ls", "--json", "--state", state).stdout)
        (order,) = [row["id"] for row in rows if row["level"] == "STUDY"]
        assert miss("remove", "undo", order, "--state", state).returncode == 0
        assert found(ward_portal=True) == 2
        wait_until("the region shows it again", lambda: found() == 2 or None, timeout_s=30)
        with cluster.browser() as browser:
            assert len(retrieve(browser, f"/studies/{STUDY}")) == 2
        assert "Rossi" not in cluster.ward().node.log.read_text()
