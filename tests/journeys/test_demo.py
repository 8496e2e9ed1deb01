"""`miss demo`: ready, loaded and told in demo.json; found again by a second start; nothing left behind
however it ends."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from miss.ledgers import open_ledger
from miss.processes import free_ports, wait_until
from tests.cluster import qido, value
from tests.commands import miss
from tests.datasets import make_study

PORTS = 24  # what a demo of few wards takes, from its base on


def start(state: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "miss", "demo", "--state", str(state), "--json", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_ready(demo: subprocess.Popen[str], timeout_s: float = 120) -> dict[str, Any]:
    """What it prints when it is ready: demo.json."""
    assert demo.stdout is not None
    signal.signal(signal.SIGALRM, lambda *_: demo.kill())
    signal.alarm(int(timeout_s))
    try:
        text = ""
        for line in demo.stdout:
            text += line
            if line == "}\n":
                return dict(json.loads(text))
    finally:
        signal.alarm(0)
    raise AssertionError(f"the demo ended: {demo.stderr.read() if demo.stderr else ''}")


def free_base() -> int:
    for base in free_ports(20):
        if base < 60_000 and not any(taken(base + offset) for offset in range(PORTS)):
            return base
    raise AssertionError("no free range of ports")


def taken(port: int) -> bool:
    return any(connection.laddr and connection.laddr.port == port
               for connection in psutil.net_connections("tcp"))


def gone(pids: list[int]) -> bool | None:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
                   for pid in pids) or None


@pytest.mark.timeout(280)
def test_the_demo_keeps_its_word(tmp_path: Path) -> None:
    state, images = tmp_path / "state", tmp_path / "images"
    (images / "deep" / "er").mkdir(parents=True)
    studies = [make_study(3, patient_id=f"D{number}", StudyDescription="A second opinion")
               for number in range(4)]
    for number, instance in enumerate(one for study in studies for one in study):
        (images / "deep" / "er" / f"{number}").write_bytes(instance.part10)
    (images / "notes.txt").write_text("no image")
    (images / "empty").touch()

    demo = start(state, "--port-base", str(free_base()), "--wards", "2", "--load", str(images))
    try:
        said = until_ready(demo)
        assert said == json.loads((state / "demo.json").read_text())
        assert stat.S_IMODE((state / "demo.json").stat().st_mode) == 0o600
        assert {key: said["loaded"][key] for key in ("sent", "failed", "skipped")} == {
            "sent": 12, "failed": 0, "skipped": 2}
        assert sum(said["loaded"]["skipped_by_reason"].values()) == 2
        check_contract(said, state)
        check_images(said, [study[0].study_uid for study in studies])
        check_work(said)
        check_death(said, state)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
        assert gone(list(said["pids"].values()))
        assert demo.stderr is not None
        assert "ended with code -9" in demo.stderr.read()
        assert not any(json.loads((state / "demo.json").read_text())["pids"].values())

        # A ward that the region lets in no more keeps nobody waiting.
        subprocess.run([sys.executable, "-P", "-m", "miss", "ca", "revoke", said["wards"][1]["id"],
                        "--reason", "a test", "--state", str(state / "region")], check=True, timeout=30)
        started = time.monotonic()
        demo = start(state)
        again = until_ready(demo)
        seconds = time.monotonic() - started
        assert again["portal"] == said["portal"] and again["loaded"] == said["loaded"]
        assert ([ward["dicom_port"] for ward in again["wards"]]
                == [ward["dicom_port"] for ward in said["wards"]])
        check_images(again, [study[0].study_uid for study in studies])
        if os.getloadavg()[0] < 4:  # on a machine that does other things too, the time says nothing
            assert seconds < 10

        demo.kill()  # outright: the children notice
        demo.wait(10)
        pids = [pid for name, pid in again["pids"].items() if name != "demo"]
        wait_until("the children's end", lambda: gone(pids), timeout_s=30)
    finally:
        demo.kill()
        demo.communicate()


def check_death(said: dict[str, Any], state: Path) -> None:
    """A node that ends is told in demo.json; the others go on."""
    os.kill(said["wards"][1]["pid"], signal.SIGKILL)
    wait_until("the node's end being told", lambda: json.loads(
        (state / "demo.json").read_text())["wards"][1]["pid"] is None or None, timeout_s=10)
    assert json.loads((state / "demo.json").read_text())["wards"][0]["pid"] == said["wards"][0]["pid"]


def check_work(said: dict[str, Any]) -> None:
    """The first ward has a step to do, and hands its two studies to the second by a rule."""
    first, second = said["wards"]
    listed = miss("worklist", "ls", "--state", first["state"])
    assert "Synthetic^Dario" in listed.stdout and "SCHEDULED" in listed.stdout
    assert Path(first["rules"]).is_file() and second["rules"] is None
    with open_ledger(Path(said["hub"]["state"])) as ledger:
        wait_until("the first ward's studies at the second",
                   lambda: [one.delivered for one in ledger.delivery_standings(0)] == [6] or None,
                   timeout_s=60)


def check_contract(said: dict[str, Any], state: Path) -> None:
    assert {user["role"] for user in said["portal"]["users"]} == {
        "ward technician", "regional physician", "regional IT"}
    assert len({user["password"] for user in said["portal"]["users"]}) == 4
    assert [ward["hospital"] for ward in said["wards"]] == ["San Martino", "Galliera"]
    technicians = [user for user in said["portal"]["users"] if user["role"] == "ward technician"]
    assert [user["ward"] for user in technicians] == [ward["name"] for ward in said["wards"]]
    for ward in said["wards"]:
        assert {"RAWSCU", "MOVESCU", "STORESCU", "FINDSCU", "ECHOSCU"} <= set(ward["devices"])
        assert Path(ward["settings"]).is_file() and Path(ward["state"]).is_dir()
        assert psutil.pid_exists(ward["pid"]) and ward["pid"] in said["pids"].values()
        assert ward["issuer"] and ward["name"] and ward["host"] == "127.0.0.1"
        assert len(ward["ae_title"]) <= 16
    assert said["hub"]["address"].startswith("127.0.0.1:")


def check_images(said: dict[str, Any], studies: list[str]) -> None:
    [physician] = [user for user in said["portal"]["users"] if user["role"] == "regional physician"]
    login = (physician["name"], physician["password"])
    with httpx.Client(base_url=said["portal"]["url"], auth=login, timeout=30) as client:
        found = qido(client, "/studies", limit="100")
        assert sorted(value(entry, "0020000D") for entry in found) == sorted(studies)
        assert {value(entry, "00201208") for entry in found} == {3}


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        demo = start(tmp_path / "state", "--port-base", str(port))
        _, err = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert f"port {port} is taken" in err and "Traceback" not in err
