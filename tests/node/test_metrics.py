"""A node as those who watch over it see it: what it stored, what waits, and when it is not ready."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from federation.settings import StoreSettings
from monitoring.settings import MonitoringSettings
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.service import Node
from tests.datasets import CT, EXPLICIT, make_instance
from tests.federation.regions import make_region
from tests.federation.wards import free_port
from tests.node.processes import enrolled
from tests.node.storing import store


def test_a_node_shows_what_it_stored_and_when_it_is_not_ready(tmp_path: Path) -> None:
    region, port = make_region(tmp_path / "region"), free_port()
    watched = MonitoringSettings(enabled=True, port=port, read_every_s=0.1)
    settings = replace(enrolled(region, tmp_path, "127.0.0.1:1"), monitoring=watched)
    region.ledger.close()

    def get(path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{port}/{path}", timeout=20)

    instance = make_instance(patient_name="Secret^Person")
    with Node(settings) as node:
        peer = Peer("127.0.0.1", node.dicom_port, "MISS")
        with Requestor.connect(peer, "CT1", [ProposedContext(1, CT, (EXPLICIT,))]) as requestor:
            assert [store(requestor, instance) for _ in range(2)] == [0, 0]
        node.archive.wait_indexed()
        text = get("metrics").text
        now = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples
        }  # fmt: skip
        assert now["miss_store_seconds_count", "stored"] == 1 == now["miss_store_seconds_count", "duplicate"]
        assert now["miss_pending_instances",] == 1 == now["miss_instances",]
        assert now["miss_pending_bytes",] > 0 and now["miss_free_bytes",] > now["miss_free_bytes_min",]
        assert now["miss_attached",] == 0 == now["miss_reading_failed",]
        assert now["miss_certificate_seconds_left",] > 0
        assert "Secret" not in text and "CT1" not in text and instance.sop_instance_uid not in text
        assert (get("healthz").status_code, get("readyz").status_code) == (200, 200)

    full = replace(settings, archive=StoreSettings(free_bytes_min=1 << 60))
    with Node(full):
        assert get("healthz").status_code == 200
        answer = get("readyz")
        assert answer.status_code == 503
        [line] = map(json.loads, answer.text.splitlines())
        assert line == {"check": "store", "reason": "not enough room on the disk for instances"}
