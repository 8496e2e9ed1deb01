"""A device of one ward that only speaks DIMSE searches the whole region through its node and retrieves what
other wards hold; three wards, DCMTK's tools. Where a ward is missing its search says so as the device's
settings want it, and devices that were not let see nothing of any other ward."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydicom import dcmread

from miss.device import make_device
from miss.local import HOST, WardPlan
from miss.processes import free_ports, listening, wait_until
from tests.cluster import GALLIERA, RADIOLOGY, Cluster, dataset_of
from tests.commands import miss
from tests.datasets import Instance, make_study
from tests.peers import dcmtk
from tests.waiting import wait_for

CARDIOLOGY = WardPlan("San Martino", "Cardiology", "SAN-MARTINO")
STRICT, LENIENT, WARD_ONLY, STORES = "STRICT", "LENIENT", "WARDONLY", "STORES"


@contextmanager
def region(folder: Path, *, hold: bool = False) -> Iterator[Cluster]:
    """Radiology's devices may see the region, Galliera's may not; the destination listens nowhere yet."""
    with Cluster(folder, (RADIOLOGY, GALLIERA, CARDIOLOGY), portal=False, hold=hold,
                 devices_see_region=[RADIOLOGY.id]) as cluster:
        for plan in (RADIOLOGY, GALLIERA):
            ward = cluster.ward(plan)
            ward.allow([STRICT], reach="region", on_incomplete="fail")
            ward.allow([LENIENT], reach="region")
            ward.allow([WARD_ONLY])
            ward.allow([STORES], services=("store",))
        yield cluster


def find(cluster: Cluster, as_ae: str, folder: Path, plan: WardPlan = RADIOLOGY
         ) -> tuple[list[dict[str, str]], str]:
    """What findscu finds at study level, and what it says."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("rsp*.dcm"):
        old.unlink()
    peer = cluster.peer(plan)
    asked = [part for key in ("QueryRetrieveLevel=STUDY", "StudyInstanceUID", "PatientID",
                              "NumberOfStudyRelatedInstances", "RetrieveAETitle")
             for part in ("-k", key)]
    done = subprocess.run(
        [dcmtk("findscu"), "-d", "-S", "-X", "-od", str(folder), "-aet", as_ae, "-aec", peer.called_ae,
         *asked, peer.host, str(peer.port)], capture_output=True, text=True, timeout=60, check=False)
    answers = [dcmread(path) for path in sorted(folder.glob("rsp*.dcm"))]
    rows = [{element.keyword: str(element.value) for element in answer} for answer in answers]
    return rows, done.stdout + done.stderr


def get(cluster: Cluster, as_ae: str, folder: Path, study: str) -> tuple[list[Path], str]:
    folder.mkdir()
    peer = cluster.peer()
    done = subprocess.run(
        [dcmtk("getscu"), "-d", "-S", "-B", "+B", "-od", str(folder), "-aet", as_ae, "-aec", peer.called_ae,
         "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}", peer.host, str(peer.port)],
        capture_output=True, text=True, timeout=60, check=False)
    return sorted(folder.iterdir()), done.stdout + done.stderr


@contextmanager
def destination(cluster: Cluster, ae_title: str, folder: Path) -> Iterator[None]:
    """DCMTK's storescp, listed at Radiology's node; it keeps data sets bit by bit."""
    folder.mkdir()
    (port,) = free_ports(1, HOST)
    with cluster.ward().ledger() as ledger:
        ledger.add_device(make_device(ae_title, HOST, port=port))
    process = subprocess.Popen([dcmtk("storescp"), "-B", "-od", str(folder), "-aet", ae_title, str(port)])
    try:
        wait_until("storescp", lambda: listening(HOST, port), timeout_s=20)
        yield
    finally:
        process.terminate()
        process.wait(20)


def move(cluster: Cluster, as_ae: str, to: str, study: str) -> str:
    peer = cluster.peer()
    done = subprocess.run(
        [dcmtk("movescu"), "-d", "-S", "-aet", as_ae, "-aec", peer.called_ae, "-aem", to, "-k",
         "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}", peer.host, str(peer.port)],
        capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def evict(state: Path, study: str) -> None:
    done = miss("packs", "evict", "--study", study, "--protected-to", "now", "--state", str(state))
    assert done.returncode == 0, done.stderr


def datasets(files: list[Path]) -> list[bytes]:
    return sorted(dataset_of(path.read_bytes()) for path in files)


def sent(instances: list[Instance]) -> list[bytes]:
    return sorted(instance.dataset for instance in instances)


def studies(rows: list[dict[str, str]]) -> set[str]:
    return {row["StudyInstanceUID"] for row in rows}


def test_what_another_ward_holds_is_found_and_retrieved_byte_for_byte(tmp_path: Path) -> None:
    here, theirs = make_study(2, patient_id="HERE"), make_study(3, series=2, patient_id="THERE")
    with region(tmp_path / "region") as cluster:
        cluster.send(here)
        cluster.send(theirs, GALLIERA)
        cluster.settle()
        rows, said = find(cluster, STRICT, tmp_path / "found")
        assert "DIMSE Status                  : 0x0000" in said
        by_study = {row["StudyInstanceUID"]: row for row in rows}
        assert {uid: row["NumberOfStudyRelatedInstances"] for uid, row in by_study.items()} == {
            here[0].study_uid: "2", theirs[0].study_uid: "3"}
        assert by_study[here[0].study_uid]["InstanceAvailability"] == "ONLINE"
        assert by_study[theirs[0].study_uid]["InstanceAvailability"] == "NEARLINE"
        assert {row["RetrieveAETitle"] for row in rows} == {cluster.ward().ae_title}

        files, _ = get(cluster, STRICT, tmp_path / "got", theirs[0].study_uid)
        assert datasets(files) == sent(theirs)
        with destination(cluster, "DESTINATION", tmp_path / "moved"):
            said = move(cluster, STRICT, "DESTINATION", theirs[0].study_uid)
            assert "DIMSE Status                  : 0x0000" in said
            assert datasets(sorted((tmp_path / "moved").iterdir())) == sent(theirs)

        # who was not let sees nothing of another ward, and hears nothing of it
        for plan, device in ((RADIOLOGY, WARD_ONLY), (GALLIERA, STRICT), (GALLIERA, LENIENT)):
            rows, said = find(cluster, device, tmp_path / "found", plan)
            own = here if plan == RADIOLOGY else theirs
            assert studies(rows) == {own[0].study_uid}
            assert "DIMSE Status                  : 0x0000" in said and "missing" not in said
        files, _ = get(cluster, WARD_ONLY, tmp_path / "nothing", theirs[0].study_uid)
        assert files == []
        rows, said = find(cluster, STORES, tmp_path / "found")
        assert rows == [] and "No Acceptable Presentation Contexts" in said

        # its own ward's evicted bytes come back for any device of it, M10
        evict(cluster.ward().state, here[0].study_uid)
        rows, _ = find(cluster, WARD_ONLY, tmp_path / "found")
        assert [row["InstanceAvailability"] for row in rows] == ["NEARLINE"]
        files, _ = get(cluster, WARD_ONLY, tmp_path / "back", here[0].study_uid)
        assert datasets(files) == sent(here)

        # AU3: one question, one id, at the node and at the hub
        with cluster.region.ledger() as ledger:
            hub = {row.correlation: row for row in ledger.audit_rows(who=STRICT)}
        with cluster.ward().ledger() as ledger:
            node = {row.correlation: row for row in ledger.audit_rows(who=STRICT)}
        assert node and node.keys() <= hub.keys()
        assert {row.act for row in node.values()} == {"search", "retrieve"}


def test_what_only_another_ward_holds_is_brought_and_a_ward_that_is_away_is_said(tmp_path: Path) -> None:
    kept = make_study(3, patient_id="KEPT")
    with region(tmp_path / "region", hold=True) as cluster:
        cluster.send(kept, GALLIERA)
        assert cluster.backlog(GALLIERA).pending == 3
        wait_for(lambda: cluster.ward_state(GALLIERA).pending == 3, "the hub knows of them")
        rows, said = find(cluster, STRICT, tmp_path / "found")
        assert [row["NumberOfStudyRelatedInstances"] for row in rows] == ["3"]
        assert "DIMSE Status                  : 0x0000" in said
        assert cluster.backlog(GALLIERA).pending == 3  # a search moves nothing
        files, _ = get(cluster, STRICT, tmp_path / "got", kept[0].study_uid)
        assert datasets(files) == sent(kept)
        assert cluster.backlog(GALLIERA).pending == 0  # reading promoted it
        with cluster.ward(GALLIERA).ledger() as ledger:
            answered = {(row.act, row.correlation) for row in ledger.audit_rows(who=STRICT)}
        with cluster.ward().ledger() as ledger:
            asked = {row.correlation for row in ledger.audit_rows(who=STRICT)}
        assert {act for act, _ in answered} == {"search", "read"}
        assert {correlation for _, correlation in answered} <= asked

        more = make_study(1, patient_id="MORE")
        cluster.send(more, GALLIERA)
        wait_for(lambda: cluster.ward_state(GALLIERA).pending == 1, "the hub knows of one more")
        cluster.ward(GALLIERA).node.stop()
        wait_for(lambda: not cluster.ward_state(GALLIERA).attached, "the ward is away")
        rows, said = find(cluster, STRICT, tmp_path / "found")
        assert studies(rows) == {kept[0].study_uid}
        assert "0xa700" in said and "1 ward missing: Galliera Radiology" in said
        rows, said = find(cluster, LENIENT, tmp_path / "found")
        assert studies(rows) == {kept[0].study_uid}
        assert "DIMSE Status                  : 0x0000" in said
        assert "Galliera Radiology" in cluster.ward().node.log.read_text()
        rows, said = find(cluster, WARD_ONLY, tmp_path / "found")
        assert rows == [] and "DIMSE Status                  : 0x0000" in said  # it asks for its ward alone


def test_without_the_hub_the_ward_is_served_and_the_region_is_said_to_be_missing(tmp_path: Path) -> None:
    here = make_study(2, patient_id="HERE")
    with region(tmp_path / "region") as cluster:
        cluster.send(here)
        cluster.settle()
        cluster.region.hub.stop()
        wait_for(lambda: "no hub at" in cluster.ward().node.log.read_text(), "the node noticed")
        rows, said = find(cluster, STRICT, tmp_path / "found")
        assert studies(rows) == {here[0].study_uid}
        assert "0xa700" in said and "the region does not answer" in said
        rows, said = find(cluster, LENIENT, tmp_path / "found")
        assert studies(rows) == {here[0].study_uid} and "DIMSE Status                  : 0x0000" in said
        files, _ = get(cluster, LENIENT, tmp_path / "got", here[0].study_uid)
        assert datasets(files) == sent(here)
