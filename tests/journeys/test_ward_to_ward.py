"""Images go from ward to ward by rule: what a modality stores in one hospital is found, byte by byte, at the
other's node and on the workstation there, whatever is killed on the way."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom import dcmread

from archive.archive import Archive
from miss import configuration
from miss.device import make_device
from miss.local import HOST, WardPlan
from miss.processes import free_ports, listening, wait_until
from tests.cluster import CALLING, GALLIERA, RADIOLOGY, Cluster, dataset_of
from tests.commands import miss
from tests.datasets import MR, Instance, make_study
from tests.peers import dcmtk
from tests.waiting import wait_for

TO_GALLIERA = f"""
[[rule]]
name = "CT to Galliera"
ward = "{GALLIERA.id}"
[rule.match]
Modality = "CT"
"""
TO_WORKSTATION = f"""
[[rule]]
name = "what Radiology hands over"
to = "WORKSTATION"
[rule.match]
device = "ward:{RADIOLOGY.id}"
"""
BACK = f"""
[[rule]]
name = "everything back"
ward = "{RADIOLOGY.id}"
"""
INSTANCES, KILLS = 240, 4


def rule(cluster: Cluster, plan: WardPlan, text: str) -> None:
    """Gives a ward's node these rules; returns when they hold."""
    ward = cluster.ward(plan)
    (ward.state / "routes.toml").write_text(text)
    with ward.ledger() as ledger:
        wait_for(lambda: len(ledger.rule_marks()) == text.count("[[rule]]"), "the rules hold")


@contextmanager
def workstation(cluster: Cluster, plan: WardPlan, folder: Path) -> Iterator[Path]:
    """DCMTK's storescp, as a device of the ward; it keeps data sets bit by bit."""
    folder.mkdir()
    (port,) = free_ports(1, HOST)
    with cluster.ward(plan).ledger() as ledger:
        ledger.add_device(make_device("WORKSTATION", HOST, port=port))
    with subprocess.Popen(
        [dcmtk("storescp"), "-aet", "WORKSTATION", "+B", "-od", str(folder), str(port)]
    ) as running:
        try:
            wait_until("storescp", lambda: listening(HOST, port), timeout_s=20)
            yield folder
        finally:
            running.kill()


def found_by_findscu(cluster: Cluster, plan: WardPlan, study: str, folder: Path) -> list[str]:
    """How many instances its node says a study has; nothing of one that it does not know."""
    folder.mkdir()
    peer = cluster.peer(plan)
    subprocess.run(
        [dcmtk("findscu"), "-S", "-X", "-aet", CALLING, "-aec", peer.called_ae,
         "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}",
         "-k", "NumberOfStudyRelatedInstances", HOST, str(peer.port)],
        capture_output=True, text=True, timeout=60, check=True, cwd=folder,
    )  # fmt: skip
    return [str(dcmread(path).NumberOfStudyRelatedInstances) for path in folder.glob("rsp*.dcm")]


def delivered(cluster: Cluster) -> int:
    with cluster.region.ledger() as ledger:
        return sum(one.delivered for one in ledger.delivery_standings(0))


def check_each_once(cluster: Cluster, plan: WardPlan | None, instances: Sequence[Instance]) -> None:
    """What a ward's disk, or the region's, holds is exactly these, each once, whole."""
    settings = (configuration.hub(cluster.region.hub_toml) if plan is None
                else configuration.node(cluster.ward(plan).settings)).archive_settings()  # fmt: skip
    with Archive.open(settings, outbox=plan is not None, read_only=True) as archive:
        studies = dict.fromkeys(one.study_uid for one in instances)
        held = [one for study in studies for one in archive.instances(study)]
        expected = {one.sop_instance_uid: one.digest for one in instances}
        assert len(held) == len(expected)
        assert {one.head.sop_instance_uid: one.digest for one in held} == expected
        totals = archive.index.totals()
        assert (totals.instances, totals.conflicts) == (len(expected), 0)
        for one in held:
            archive.verify(one)


@pytest.mark.timeout(200)
def test_a_ct_of_one_ward_reaches_the_other_and_its_workstation(tmp_path: Path) -> None:
    ct = make_study(8, patient_id="77")
    mr = make_study(2, sop_class=MR, modality="MR")
    with (Cluster(tmp_path / "region", portal=False) as cluster,
          workstation(cluster, GALLIERA, tmp_path / "came") as came):  # fmt: skip
        rule(cluster, RADIOLOGY, TO_GALLIERA)
        rule(cluster, GALLIERA, TO_WORKSTATION + BACK)
        cluster.send(ct + mr)
        wait_for(lambda: len(list(came.iterdir())) == len(ct), "the workstation has it", 60)
        datasets = sorted(dataset_of(path.read_bytes()) for path in came.iterdir())
        assert datasets == sorted(one.dataset for one in ct)
        assert found_by_findscu(cluster, GALLIERA, ct[0].study_uid, tmp_path / "ct") == ["8"]
        assert found_by_findscu(cluster, GALLIERA, mr[0].study_uid, tmp_path / "mr") == []
        cluster.settle()
        assert delivered(cluster) == len(ct)
        check_each_once(cluster, GALLIERA, ct)
        check_each_once(cluster, RADIOLOGY, ct + mr)
        check_each_once(cluster, None, ct + mr)
        with cluster.region.ledger() as ledger:
            (pair,) = ledger.delivery_standings(0)  # nothing went back, though a rule says so
        assert (pair.from_ward, pair.to_ward, pair.waiting, pair.failed) == (RADIOLOGY.id, GALLIERA.id, 0, 0)
        for state in (cluster.region.folder, cluster.ward(RADIOLOGY).state, cluster.ward(GALLIERA).state):
            def shown(state: Path = state) -> bool:
                answer = json.loads(miss("status", "--state", str(state), "--json").stdout)
                return [(one["from_ward"], one["to_ward"], one["delivered"])
                        for one in answer["deliveries"]] == [(RADIOLOGY.id, GALLIERA.id, len(ct))]

            wait_for(shown, "miss status says so", 40)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["sender", "taker", "hub"])
def test_whatever_is_killed_everything_arrives_once(tmp_path: Path, victim: str) -> None:
    chance = random.Random(victim)
    instances = [one for _ in range(INSTANCES // 20) for one in make_study(20, padding=8_000)]
    share = len(instances) // KILLS
    with Cluster(tmp_path / "region", portal=False) as cluster:
        rule(cluster, RADIOLOGY, TO_GALLIERA)
        for kill in range(KILLS):
            cluster.send(instances[kill * share : (kill + 1) * share])
            time.sleep(chance.uniform(0, 0.4))  # anywhere between a rule, an order, a fetch and its answer
            if victim == "hub":
                cluster.region.hub.kill()
                cluster.restart_hub()
            else:
                plan = RADIOLOGY if victim == "sender" else GALLIERA
                cluster.ward(plan).node.kill()
                cluster.restart_node(plan)
        wait_for(lambda: delivered(cluster) == len(instances), "everything is delivered", 120)
        cluster.settle(60)
        cluster.region.stop()
        for holder in (RADIOLOGY, GALLIERA, None):
            check_each_once(cluster, holder, instances)
