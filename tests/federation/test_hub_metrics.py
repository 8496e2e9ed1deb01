"""A hub and a node as Prometheus sees them: the wards by name, pushes, readiness of a hub that stands by."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from federation.hub import Hub
from monitoring.settings import MonitoringSettings
from tests.datasets import make_study
from tests.federation.regions import Region
from tests.federation.wards import hub_settings, node_of
from tests.waiting import wait_for

WATCHED = MonitoringSettings(enabled=True, port=0, read_every_s=0.1)


def scraped(port: int) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
    }  # fmt: skip


def test_a_hub_shows_its_wards_and_what_they_push(region: Region) -> None:
    settings = hub_settings(region, monitoring=WATCHED)
    with Hub(settings) as hub:
        node = node_of(region, hub, "San Martino", "Radiology", "SM")
        node.take(make_study(3, patient_name="Secret^Person"))
        node.start()
        ward = node.ward.id
        try:
            wait_for(lambda: node.pending == 0, "everything has a receipt")
            wait_for(lambda: scraped(hub.monitoring_port).get(("miss_ward_pending_instances", ward)) == 0,
                     "the ward has reported")
            now = scraped(hub.monitoring_port)
            assert now["miss_ward_attached", ward] == 1
            assert now["miss_ward_instances", ward] == 3 == now["miss_instances",]
            assert now["miss_pushed_instances_total", ward] == 3 == now["miss_push_seconds_count",]
            assert now["miss_pushed_bytes_total", ward] > 0
            assert abs(now["miss_ward_clock_skew_seconds", ward]) < 60
            assert now["miss_ward_last_receipt_timestamp_seconds", ward] > 1.7e9
            assert now["miss_ward_certificate_seconds_left", ward] > 0 < now["miss_certificate_seconds_left",]
            assert now["miss_call_seconds_count", "Uplink/Offer"] >= 1
            assert now["miss_standing_by",] == 0
            text = httpx.get(f"http://127.0.0.1:{hub.monitoring_port}/metrics", timeout=20).text
            assert "Secret" not in text and "1.2." not in text
            for path in ("healthz", "readyz"):
                answer = httpx.get(f"http://127.0.0.1:{hub.monitoring_port}/{path}", timeout=20)
                assert answer.status_code == 200, answer.text
        finally:
            node.stop()
        wait_for(lambda: scraped(hub.monitoring_port)["miss_ward_attached", ward] == 0, "it is away")


def test_a_hub_that_stands_by_lives_and_is_not_ready(region: Region) -> None:
    settings = hub_settings(region, monitoring=WATCHED, standby=True)
    with Hub(settings), Hub(replace(hub_settings(region, monitoring=WATCHED, standby=True), name="b")) as b:
        assert b.standing_by and scraped(b.monitoring_port)["miss_standing_by",] == 1

        def ask(path: str) -> Any:
            return httpx.get(f"http://127.0.0.1:{b.monitoring_port}/{path}", timeout=20)

        assert ask("healthz").status_code == 200 and ask("readyz").status_code == 503
        assert [json.loads(line)["check"] for line in ask("readyz").text.splitlines()] == ["store"]
