"""A ward gives up what the region protects, by itself; a device gets it back by C-GET and the ward's own
portal opens it, and then it is kept at the ward again. With the WAN down both are told why not, and nothing
is lost."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from miss.cache import cache_standing
from miss.processes import wait_until
from tests.cluster import RADIOLOGY, Cluster, dataset_of, retrieve
from tests.commands import miss
from tests.datasets import Instance, make_study
from tests.peers import dcmtk


def get(cluster: Cluster, folder: Path, study: str) -> tuple[list[bytes], str]:
    """What DCMTK's getscu writes, as data sets, and what it says."""
    folder.mkdir()
    peer = cluster.peer()
    done = subprocess.run(
        [dcmtk("getscu"), "-d", "-S", "-B", "+B", "-od", str(folder), "-aet", "MODALITY", "-aec",
         peer.called_ae, "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}", peer.host,
         str(peer.port)], capture_output=True, text=True, timeout=60, check=False)
    return sorted(dataset_of(path.read_bytes()) for path in folder.iterdir()), done.stdout + done.stderr


def sent(instances: list[Instance]) -> list[bytes]:
    return sorted(one.dataset for one in instances)


def evicted(cluster: Cluster) -> int | None:
    """Instances that the ward gave up, as its node says."""
    return cache_standing(cluster.ward().state).get("evicted")


def get_all(cluster: Cluster, folder: Path, study: list[Instance]) -> list[bytes] | None:
    """As a device does that asks again until it is answered."""
    files, _ = get(cluster, folder / f"got-{len(list(folder.iterdir()))}", study[0].study_uid)
    return files or None


def set_in(toml: Path, **values: str) -> None:
    """Other values than those that were written."""
    lines = toml.read_text().splitlines()
    for name, value in values.items():
        (at,) = [number for number, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[at] = f"{name} = {value}"
    toml.write_text("\n".join(lines) + "\n")


def restart_node_with(cluster: Cluster, **values: str) -> None:
    cluster.ward().node.stop()
    set_in(cluster.ward().settings, **values)
    cluster.restart_node()


def test_what_was_evicted_comes_back_and_is_kept_again(tmp_path: Path) -> None:
    first, second = make_study(4, patient_id="FIRST"), make_study(3, patient_id="SECOND")
    with Cluster(tmp_path / "region", (RADIOLOGY,), portal=True, ward_portal=True) as cluster:
        cluster.region.hub.stop()
        set_in(cluster.region.hub_toml, hours="0.0")
        cluster.restart_hub()
        cluster.send(first)
        cluster.send(second)
        cluster.settle()
        state = str(cluster.ward().state)
        assert miss("cache", "pin", second[0].study_uid, "--state", state).returncode == 0

        # by age, here: whatever is older than a moment; the disk of this machine is nobody's to fill
        restart_node_with(cluster, unused_days="1e-07", free_percent_low="0.0", free_percent_high="0.0",
                          look_s="0.1")
        wait_until("the first study's going", lambda: evicted(cluster) == len(first) or None,
                   timeout_s=90)
        shown = miss("node", "status", "--state", state).stdout
        assert "4 instances" in shown and "given up" in shown
        pins = json.loads(miss("cache", "ls", "--json", "--state", state).stdout)
        assert [(row["study_uid"], row["kind"], row["evicted"]) for row in pins] == [
            (second[0].study_uid, "person", 0)]

        # the WAN is down: a clear failure, and nothing is lost
        cluster.region.hub.stop()
        files, said = get(cluster, tmp_path / "down", first[0].study_uid)
        assert files == [] and "0x0000" not in said.splitlines()[-1]
        assert "0xa702" in said or "0xb000" in said or "0xa700" in said
        files, _ = get(cluster, tmp_path / "pinned", second[0].study_uid)
        assert files == sent(second)
        with cluster.browser(ward_portal=True) as browser:
            answer = browser.get(f"/dicom-web/studies/{first[0].study_uid}",
                                 headers={"accept": 'multipart/related; type="application/dicom"'})
            assert answer.status_code == 503 and "region can't be reached" in answer.text
        refused = miss("cache", "fetch", first[0].study_uid, "--state", state)
        assert refused.returncode != 0 and "region can't be reached" in refused.stderr

        # it is back: a device gets all of it, and it is kept here again
        cluster.restart_hub()
        files = wait_until("the ward's attach", lambda: get_all(cluster, tmp_path, first), timeout_s=60)
        assert files == sent(first)
        wait_until("its being kept again", lambda: evicted(cluster) == 0 or None, timeout_s=90)
        cluster.region.hub.stop()
        files, _ = get(cluster, tmp_path / "again", first[0].study_uid)
        assert files == sent(first)  # from the ward's own disk
        cluster.restart_hub()

        # the ward's own portal has it brought back
        restart_node_with(cluster, unused_days="2e-07")
        wait_until("its going again", lambda: evicted(cluster) == len(first) or None, timeout_s=90)
        with cluster.browser(ward_portal=True) as browser:
            found = retrieve(browser, f"/studies/{first[0].study_uid}")
            assert sorted(map(dataset_of, found)) == sent(first)
