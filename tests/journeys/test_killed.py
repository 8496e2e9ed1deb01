"""kill -9 of node or hub while a modality sends: what was acknowledged is there, once, digest and all.

2,000 instances and ten kills take some 25 s on two idle cores.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.model import StoredInstance
from miss import configuration
from node.dimse import contexts
from node.dimse.errors import AssociationEnded
from node.dimse.requestor import Requestor
from tests.cluster import CALLING, EXPLICIT_CT, RADIOLOGY, Cluster
from tests.datasets import Instance, make_study

INSTANCES, KILLS = 2_000, 10
STUDY = 20


class Modality(threading.Thread):
    """Sends until everything is acknowledged: an instance whose answer never came is sent again, as
    modalities do. Every status other than 0000 fails the test."""

    def __init__(self, cluster: Cluster, instances: list[Instance]) -> None:
        super().__init__(name="modality", daemon=True)
        self.acknowledged: list[Instance] = []
        self.wrong: list[int] = []
        self._cluster = cluster
        self._waiting = list(reversed(instances))
        self.given_up = threading.Event()

    def run(self) -> None:
        while self._waiting and not self.given_up.is_set():
            try:
                proposed = contexts.plan([EXPLICIT_CT])[0]
                with Requestor.connect(self._cluster.peer(), CALLING, proposed) as requestor:
                    self._send_over(requestor)
            except AssociationEnded:
                time.sleep(0.02)  # nobody listens yet

    def _send_over(self, requestor: Requestor) -> None:
        context = requestor.context(*EXPLICIT_CT)
        assert context is not None
        while self._waiting:
            instance = self._waiting[-1]
            status = requestor.store(context, instance.sop_instance_uid, [instance.dataset])
            if status != 0:
                self.wrong.append(status)
            self.acknowledged.append(instance)
            self._waiting.pop()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["node", "hub"])
def test_nothing_acknowledged_is_lost_and_nothing_is_twice(tmp_path: Path, victim: str) -> None:
    chance = random.Random(victim)
    instances = [instance for _ in range(INSTANCES // STUDY) for instance in make_study(STUDY, padding=8_000)]
    with Cluster(tmp_path, [RADIOLOGY], portal=False) as cluster:
        modality = Modality(cluster, instances)
        modality.start()
        try:
            for kill in range(1, KILLS + 1):
                await_sent(modality, INSTANCES * kill // (KILLS + 1))
                time.sleep(chance.uniform(0, 0.05))  # anywhere inside a message, a group, a push
                if victim == "node":
                    cluster.ward().node.kill()
                    cluster.restart_node()
                else:
                    cluster.region.hub.kill()
                    cluster.restart_hub()
            modality.join(120)
            assert not modality.is_alive()
        finally:
            modality.given_up.set()
        assert modality.wrong == [] and len(modality.acknowledged) == INSTANCES
        cluster.settle(120)
        cluster.region.stop()
        expected = {instance.sop_instance_uid: instance.digest for instance in instances}
        node = configuration.node(cluster.ward().settings).archive_settings()
        hub = configuration.hub(cluster.region.hub_toml).archive_settings()
        for settings in (node, hub):
            with Archive.open(settings, outbox=settings is node, read_only=True) as archive:
                held = list(instances_of(archive, instances))
                assert len(held) == INSTANCES  # each once
                assert {one.head.sop_instance_uid: one.digest for one in held} == expected
                assert archive.index.totals().instances == INSTANCES
                assert archive.index.totals().conflicts == 0
                for one in held:
                    archive.verify(one)


def await_sent(modality: Modality, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(modality.acknowledged) < count:
        assert modality.is_alive(), "the modality ended early"
        assert time.monotonic() < deadline, f"only {len(modality.acknowledged)} acknowledged"
        time.sleep(0.002)


def instances_of(archive: Archive, instances: list[Instance]) -> Iterator[StoredInstance]:
    for study in dict.fromkeys(instance.study_uid for instance in instances):
        yield from archive.instances(study)
