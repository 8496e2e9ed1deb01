"""A search through portal, hub and node is one trace: in the spans that they keep, with the right parents, in
the logs of all three, and in their audit logs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.cluster import RADIOLOGY, Cluster
from tests.datasets import make_study
from tests.waiting import wait_for

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
SEARCH = ("GET /dicom-web/studies", "Region/Search", "search")


def spans(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def traces(log: str) -> set[str]:
    return set(re.findall(r" trace=([0-9a-f]{32}) ", log))


def test_a_search_is_one_trace(tmp_path: Path) -> None:
    file = tmp_path / "spans.jsonl"
    study = make_study(3, patient_id="TRACED", patient_name="Secret^Person")
    cluster = Cluster(tmp_path / "region", (RADIOLOGY,), hold=True, log_level="DEBUG")
    for child in cluster.region.children:
        child.arguments = [*child.arguments, "--set", f"tracing.file={file}"]
    with cluster, cluster.browser() as browser:
        cluster.send(study)
        wait_for(lambda: cluster.ward_state().pending == 3, "the ward has reported")
        answer = browser.get("/dicom-web/studies", params={"PatientName": "Secret*"},
                             headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
        assert answer.status_code == 200 and answer.headers["miss-trace"] == TRACE

        def named() -> dict[str, dict[str, Any]]:
            return {one["name"]: one for one in spans(file) if one["trace"] == TRACE}

        wait_for(lambda: set(SEARCH) <= set(named()), "the spans are written")
        portal, hub, ward = (named()[name] for name in SEARCH)
        assert [one["service"] for one in (portal, hub, ward)] == ["miss-portal", "miss-hub", "miss-node"]
        assert [one["parent"] for one in (portal, hub, ward)] == [CALLER, portal["span"], hub["span"]]
        assert named()["Uplink/Answer"]["parent"] == ward["span"]

        logs = tmp_path / "region" / "logs"
        told = {path.stem: path.read_text() for path in logs.glob("*.log")}
        assert sum(TRACE in traces(text) for text in told.values()) == 3, sorted(told)
        assert not any("Secret" in text for text in (*told.values(), file.read_text()))
        with cluster.region.ledger() as ledger:
            assert [row.act for row in ledger.audit_rows(correlation=TRACE)] == ["search by DICOMweb"]

        invalid = browser.get("/dicom-web/studies", headers={"traceparent": f"00-{'0' * 32}-{CALLER}-01"})
        assert re.fullmatch("[0-9a-f]{32}", invalid.headers["miss-trace"])
        assert invalid.headers["miss-trace"] not in ("0" * 32, TRACE)
