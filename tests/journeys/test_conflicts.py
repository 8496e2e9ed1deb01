"""A technician corrects a name and sends again: shown, compared, accepted, and found by everybody."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from archive.archive import Archive, ArchiveSettings
from archive.index.index import Index
from archive.ledger import Device
from archive.model import ConflictPolicy
from miss import configuration
from miss.local import HOST
from miss.processes import wait_until
from node.dimse import contexts
from node.dimse.requestor import Requestor
from tests.cluster import (
    CALLING,
    EXPLICIT_CT,
    PASSWORD,
    RADIOLOGY,
    Cluster,
    dataset_of,
    qido,
    retrieve,
    technician,
    value,
)
from tests.commands import miss
from tests.datasets import Instance, make_instance
from tests.peers import dcmtk
from tests.portal.portals import form_token

PATIENT_NAME = "00100010"


def listed(state: str, *options: str) -> list[dict[str, Any]]:
    done = miss("conflicts", "ls", *options, "--json", "--state", state)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def corrected(first: Instance, name: str) -> Instance:
    return make_instance(sop_uid=first.sop_instance_uid, study_uid=first.study_uid,
                         series_uid=first.series_uid, patient_id="C1", patient_name=name)  # fmt: skip


def store(cluster: Cluster, instance: Instance) -> int:
    proposed = contexts.plan([EXPLICIT_CT])[0]
    with Requestor.connect(cluster.peer(), CALLING, proposed) as requestor:
        context = requestor.context(*EXPLICIT_CT)
        assert context is not None
        return requestor.store(context, instance.sop_instance_uid, [instance.dataset])


def found_by_findscu(cluster: Cluster, study_uid: str, folder: Path) -> str:
    folder.mkdir()
    peer = cluster.peer()
    done = subprocess.run(
        [dcmtk("findscu"), "-S", "-aet", CALLING, "-aec", peer.called_ae, "-k", "QueryRetrieveLevel=STUDY",
         "-k", f"StudyInstanceUID={study_uid}", "-k", "PatientName", HOST, str(peer.port)],
        capture_output=True, text=True, timeout=60, check=True, cwd=folder,
    )  # fmt: skip
    return str(done.stdout + done.stderr)


def wards_page(cluster: Cluster) -> str:
    """What a technician sees at the ward's own portal."""
    port = cluster.region.ports.ward_portal
    with httpx.Client(base_url=f"http://{HOST}:{port}", timeout=60, follow_redirects=True) as client:
        form = {"csrf": form_token(client.get("/login").text), "name": technician(RADIOLOGY),
                "password": PASSWORD, "next": "/wards"}  # fmt: skip
        page = client.post("/login", data=form)
        assert page.status_code == 200 and page.url.path == "/wards"
        return page.text


def settings_of(cluster: Cluster) -> ArchiveSettings:
    return configuration.node(cluster.ward().settings).archive_settings()


@pytest.mark.timeout(200)
def test_a_corrected_name_from_the_modality_to_the_region(tmp_path: Path) -> None:
    with Cluster(tmp_path / "region", [RADIOLOGY], ward_portal=True) as cluster:
        state = str(cluster.ward().state)
        first = make_instance(patient_id="C1", patient_name="Rossi^Mario")
        second = corrected(first, "Rossi^Maria")
        assert store(cluster, first) == 0 and store(cluster, second) == 0
        (row,) = listed(state)
        assert row["digest"] == second.digest.hex() and row["state"] == "open"
        shown = miss("conflicts", "diff", first.sop_instance_uid, "--state", state)
        assert shown.returncode == 0, shown.stderr
        for words in ("(0010,0010)", "Rossi^Mario", "Rossi^Maria"):
            assert words in shown.stdout
        assert "1 open" in miss("node", "status", "--state", state).stdout
        cluster.settle()
        page = wards_page(cluster)
        assert first.sop_instance_uid in page and "Rossi" not in page

        done = miss("conflicts", "accept", first.sop_instance_uid, "--state", state)
        assert done.returncode == 0, done.stderr
        with cluster.browser(ward_portal=True) as browser:
            (study,) = qido(browser, "/studies", PatientID="C1")
            assert value(study, PATIENT_NAME)["Alphabetic"] == "Rossi^Maria"
            parts = retrieve(browser, f"/studies/{first.study_uid}")
            assert [dataset_of(part) for part in parts] == [second.dataset]
        assert first.sop_instance_uid not in wards_page(cluster)
        assert "Rossi^Maria" in found_by_findscu(cluster, first.study_uid, tmp_path / "found")
        cluster.settle()
        with cluster.browser() as browser:
            (study,) = qido(browser, "/studies", PatientID="C1")
            assert value(study, PATIENT_NAME)["Alphabetic"] == "Rossi^Maria"
            parts = retrieve(browser, f"/studies/{first.study_uid}")
            assert [dataset_of(part) for part in parts] == [second.dataset]
        with cluster.ward().ledger() as ledger:
            (act,) = ledger.audit_rows(act="conflict-accept")
            assert act.outcome == "success" and first.sop_instance_uid in act.subject
        assert "Rossi" not in cluster.ward().node.log.read_text()

        cluster.region.stop()
        digits = first.digest.hex()[:10]
        undone = miss("conflicts", "accept", first.sop_instance_uid, digits, "--state", state)
        assert undone.returncode == 0, undone.stderr  # nothing runs: the command does it itself
        assert [row["digest"] for row in listed(state, "--show", "decided")] == [second.digest.hex()]
        settings = settings_of(cluster)
        before = _dump(settings)
        assert miss("rebuild", "--state", state).returncode == 0
        assert _dump(settings) == before
        with Archive.open(settings, outbox=True, read_only=True) as archive:
            assert [one.digest for one in archive.instances(first.study_uid)] == [first.digest]


@pytest.mark.timeout(200)
def test_policies_of_devices_and_twenty_at_once(tmp_path: Path) -> None:
    with Cluster(tmp_path / "region", [RADIOLOGY], portal=False) as cluster:
        state = str(cluster.ward().state)
        first = make_instance(patient_id="C1", patient_name="A")
        many = [first, corrected(first, "B")] * 10
        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(lambda one: store(cluster, one), many)) == [0] * 20
        _policy(cluster, ConflictPolicy.REFUSE)
        third = corrected(first, "C")
        with ThreadPoolExecutor(20) as pool:
            assert set(pool.map(lambda one: store(cluster, one), [third] * 20)) == {0x0111}
        assert store(cluster, first) == 0
        _policy(cluster, ConflictPolicy.PROPOSE)
        fourth = corrected(first, "D")
        with ThreadPoolExecutor(20) as pool:
            assert set(pool.map(lambda one: store(cluster, one), [fourth] * 20)) == {0}
        backlog = cluster.backlog()
        assert (backlog.instances, backlog.conflicts, backlog.proposed) == (1, 1, 1)
        (refused,) = listed(state, "--show", "refused")
        assert refused["digest"] == third.digest.hex() and refused["device"] == CALLING
        rows = listed(state)
        (kept,) = {row["digest"] for row in rows} - {fourth.digest.hex()}
        assert kept in {one.digest.hex() for one in many}
        states = {row["digest"]: row["state"] for row in rows}
        assert states == {fourth.digest.hex(): "proposed", kept: "open"}
        ambiguous = miss("conflicts", "accept", first.sop_instance_uid, "--state", state)
        assert ambiguous.returncode != 0 and "2 contents" in ambiguous.stderr
        rejected = miss("conflicts", "reject", first.sop_instance_uid, fourth.digest.hex()[:12],
                        "--state", state)  # fmt: skip
        assert rejected.returncode == 0, rejected.stderr
        assert cluster.backlog().proposed == 0


@pytest.mark.timeout(200)
def test_an_order_waits_for_a_node_that_was_killed(tmp_path: Path) -> None:
    with Cluster(tmp_path / "region", [RADIOLOGY], portal=False) as cluster:
        first = make_instance(patient_id="C1", patient_name="A")
        second = corrected(first, "B")
        assert store(cluster, first) == 0 and store(cluster, second) == 0
        cluster.ward().node.kill()
        with cluster.ward().ledger() as ledger:
            detail = {"uid": first.sop_instance_uid, "digest": second.digest.hex()}
            order = ledger.place_order("conflict-accept", detail, "anna")
            cluster.restart_node()
            assert store(cluster, second) == 0
            assert wait_until("the order", lambda: ledger.order_answer(order), timeout_s=20)[0]
        with Archive.open(settings_of(cluster), outbox=True, read_only=True) as archive:
            assert [one.digest for one in archive.instances(first.study_uid)] == [second.digest]


def _policy(cluster: Cluster, policy: ConflictPolicy) -> None:
    with cluster.ward().ledger() as ledger:
        device = ledger.device(CALLING)
        assert isinstance(device, Device)
        ledger.add_device(replace(device, on_conflict=policy.value))


def _dump(settings: ArchiveSettings) -> dict[str, list[tuple[object, ...]]]:
    index = Index.open(settings.database_url, read_only=True)
    try:
        return index.dump()
    finally:
        index.close()
