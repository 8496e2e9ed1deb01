"""Storage commitment with Orthanc, both ways."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from archive.ledger import Device
from miss.processes import free_ports
from tests.datasets import make_study
from tests.node.committing import EAGER, Committing, committing
from tests.waiting import wait_for

ORTHANC = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")

pytestmark = pytest.mark.skipif(ORTHANC is None, reason="Orthanc is not installed")


class Orthanc:
    """A running Orthanc, by its REST interface."""

    def __init__(self, http: int) -> None:
        self._http = http

    def ask(self, path: str, body: Any = None) -> Any:
        octets = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self._http}{path}", data=octets)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or b"null")

    def answers(self) -> bool:
        with suppress(OSError):
            return bool(self.ask("/system"))
        return False


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Committing]:
    with committing(tmp_path, EAGER) as running:
        yield running


@pytest.fixture
def orthanc(node: Committing, tmp_path: Path) -> Iterator[Orthanc]:
    dicom, http = free_ports(2, "127.0.0.1")
    node.ledger.add_device(Device("ORTHANC", "127.0.0.1", port=dicom))
    settings = tmp_path / "orthanc.json"
    settings.write_text(json.dumps({
        "StorageDirectory": str(tmp_path / "orthanc"), "IndexDirectory": str(tmp_path / "orthanc"),
        "HttpPort": http, "DicomPort": dicom, "DicomAet": "ORTHANC", "AuthenticationEnabled": False,
        "RemoteAccessAllowed": False, "DicomModalities": {"miss": ["MISS", "127.0.0.1", node.port]},
    }))
    process = subprocess.Popen([str(ORTHANC), str(settings)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    made = Orthanc(http)
    try:
        wait_for(made.answers, "Orthanc")
        yield made
    finally:
        process.terminate()
        process.wait(20)


def test_orthanc_asks_and_is_asked(node: Committing, orthanc: Orthanc) -> None:
    here, missing = make_study(2)
    for one in (here, missing):
        orthanc.ask("/instances", one.part10)
    node.send(here)
    asked = orthanc.ask("/modalities/miss/storage-commitment", {
        "DicomInstances": [[one.sop_class_uid, one.sop_instance_uid] for one in (here, missing)]})
    wait_for(lambda: orthanc.ask(f"/storage-commitment/{asked['ID']}")["Status"] != "Pending", "its report")
    report = orthanc.ask(f"/storage-commitment/{asked['ID']}")
    assert [one["SOPInstanceUID"] for one in report["Success"]] == [here.sop_instance_uid]
    assert [(one["SOPInstanceUID"], one["FailureReason"]) for one in report["Failures"]] == [
        (missing.sop_instance_uid, 0x0112)]

    instances = node.archive.instances(here.study_uid)
    uid = node.commitment.scu.request("ORTHANC", instances)
    wait_for(lambda: node.commitment.scu.result(uid).is_over, "a report")
    assert node.commitment.scu.result(uid).committed == {here.sop_instance_uid}
