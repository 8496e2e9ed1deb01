"""The `miss` command as people type it: a region set up step by step, errors in one line, settings that are
checked."""

from __future__ import annotations

import logging
import socket
import threading
import tomllib
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from archive.database import sqlite_url
from archive.errors import InvalidInput, SettingsError
from archive.ledger import Connection, Ledger
from miss.ca import duration_s
from miss.console import OneLine, table
from miss.device import make_device
from miss.local import HOST
from miss.processes import Child, free_ports, listening, wait_until
from tests.commands import miss


@pytest.mark.timeout(200)
def test_a_region_is_set_up_by_hand(tmp_path: Path) -> None:
    region, ward = tmp_path / "region", tmp_path / "ward"
    grpc_port, enrol_port, dicom_port = free_ports(3)
    made = miss("ca", "init", str(region), "--region", "Liguria", "--port", str(grpc_port),
                "--enrol-port", str(enrol_port))
    assert made.returncode == 0, made.stderr
    settings = tomllib.loads((region / "hub.toml").read_text())
    assert settings["port"] == grpc_port and settings["enrolment"]["port"] == enrol_port
    again = miss("ca", "init", str(region), "--region", "Liguria")
    assert again.returncode == 2 and "never overwritten" in again.stderr

    hub = Child("hub", ["hub", "run", "--settings", str(region / "hub.toml")], tmp_path / "hub.log")
    hub.start()
    node = Child("node", ["node", "run", "--settings", str(ward / "node.toml")], tmp_path / "node.log")
    try:
        wait_until("the hub", lambda: listening(HOST, enrol_port), timeout_s=30, children=[hub])
        invited = miss("ca", "invite", "--hospital", "San Martino", "--ward", "Radiology",
                       "--issuer", "SAN-MARTINO", "--state", str(region))
        assert invited.returncode == 0, invited.stderr
        line = invited.stdout.strip()
        assert line.startswith("miss1.") and "\n" not in line and "miss node enrol" in invited.stderr

        enrolled = miss("node", "enrol", line, "--state", str(ward), "--host", HOST,
                        "--port", str(dicom_port))
        assert enrolled.returncode == 0, enrolled.stderr
        assert "spiffe://liguria/node/san-martino/radiology" in enrolled.stderr
        stolen = miss("node", "enrol", line, "--state", str(tmp_path / "thief"))
        assert stolen.returncode == 1 and "Traceback" not in stolen.stderr
        assert not (tmp_path / "thief" / "node.toml").exists()

        listed = miss("ca", "list", "--state", str(region))
        assert "spiffe://liguria/node/san-martino/radiology" in listed.stdout
        assert "pin of the root" in miss("ca", "show", "--state", str(region)).stdout

        node.start()
        wait_until("the node", lambda: listening(HOST, dicom_port), timeout_s=30, children=[node])
        check_devices(ward, f"SM-RADIOLOGY@{HOST}:{dicom_port}")
        taken = miss("portal", "run", "--node", str(ward), "--set", f"listen.port={dicom_port}")
        assert taken.returncode == 2 and f"{HOST}:{dicom_port} can't be had" in taken.stderr
        assert "Traceback" not in taken.stderr
        wait_until("the ward's attaching", lambda: "attached" in miss(
            "status", "--state", str(region)).stdout or None, timeout_s=20)
        assert miss("ca", "revoke", "san-martino/radiology", "--reason", "a test", "--state",
                    str(region)).returncode == 0
        wait_until("the ward's going", lambda: "away, revoked" in miss(
            "status", "--state", str(region)).stdout or None, timeout_s=20)
        shown = miss("ca", "show", "san-martino/radiology", "--state", str(region))
        assert "revoked (a test)" in shown.stdout
    finally:
        node.stop()
        hub.stop()


def check_devices(ward: Path, peer: str) -> None:
    """A stranger is refused, the log says why and what would admit it, and that line does, at once."""
    refused = miss("device", "echo", peer, "--calling", "CT1", "--state", str(ward))
    assert refused.returncode == 1 and "calling AE title" in refused.stderr
    log = miss("node", "log", "--refused", "--state", str(ward))
    assert "CT1" in log.stdout and "refused" in log.stdout
    [line] = [line.removeprefix("to admit: ") for line in log.stderr.splitlines() if "to admit" in line]
    import shlex

    program, *arguments = shlex.split(line)
    assert program == "miss" and miss(*arguments).returncode == 0
    echoed = miss("device", "echo", peer, "--calling", "CT1", "--state", str(ward))
    assert echoed.returncode == 0 and "answered in" in echoed.stdout, echoed.stderr
    assert "CT1" in miss("device", "ls", "--state", str(ward)).stdout
    assert miss("device", "rm", "CT1", "--state", str(ward)).returncode == 0
    assert miss("device", "echo", peer, "--calling", "CT1", "--state", str(ward)).returncode == 1


def test_people_are_added_without_a_password_in_the_arguments(tmp_path: Path) -> None:
    region = tmp_path / "region"
    miss("ca", "init", str(region), "--region", "r")
    added = miss("user", "add", "rossi", "--role", "regional physician", "--password-stdin", "--state",
                 str(region), stdin="correct horse battery\n")
    assert added.returncode == 0, added.stderr
    short = miss("user", "add", "verdi", "--role", "regional IT", "--password-stdin", "--state", str(region),
                 stdin="short\n")
    assert short.returncode == 1 and "12" in short.stderr
    nowhere = miss("user", "add", "neri", "--role", "ward technician", "--ward", "no/where", "--generate",
                   "--state", str(region))
    assert nowhere.returncode == 1 and "no ward" in nowhere.stderr
    generated = miss("user", "add", "it", "--role", "regional IT", "--generate", "--state", str(region))
    assert len(generated.stdout.strip()) == 16
    listed = miss("user", "ls", "--state", str(region)).stdout
    assert "rossi" in listed and "verdi" not in listed and generated.stdout.strip() not in listed
    assert miss("user", "disable", "rossi", "--state", str(region)).returncode == 0
    with_hash = Ledger.open(sqlite_url(region / "ledger.db"))
    found = with_hash.user("rossi")
    with_hash.close()
    assert found is not None and not found[0].enabled and found[1].startswith("$argon2id$")


def test_an_unknown_setting_refuses_to_start_and_is_named(tmp_path: Path) -> None:
    region = tmp_path / "region"
    miss("ca", "init", str(region), "--region", "r")
    good = miss("settings", "check", "hub", "--settings", str(region / "hub.toml"))
    assert good.returncode == 0 and "good" in good.stderr
    with (region / "hub.toml").open("a") as file:
        file.write("\nquality = 11\n")
    for command in (("hub", "run"), ("settings", "check", "hub"), ("settings", "show", "hub")):
        wrong = miss(*command, "--settings", str(region / "hub.toml"))
        assert wrong.returncode == 2 and "quality" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(("given", "named"), [
    ("retention.by_modality=MG", "MODALITY=YEARS"),
    ("addresses=hub1.example:7443,hub2", "'hub2'"),
])  # fmt: skip
def test_a_hub_refuses_settings_that_it_could_not_obey(tmp_path: Path, given: str, named: str) -> None:
    region = tmp_path / "region"
    miss("ca", "init", str(region), "--region", "r")
    for command in (("settings", "check", "hub"), ("hub", "run")):
        wrong = miss(*command, "--settings", str(region / "hub.toml"), "--set", given)
        assert wrong.returncode == 2 and named in wrong.stderr and "Traceback" not in wrong.stderr


def test_file_environment_and_flags_override_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("[dimse]\nport = 1001\nae_title = 'FILE'\n")
    shown = tomllib.loads(miss(
        "settings", "show", "node", "--settings", str(file), "--set", "dimse.port=1003",
        environment={"MISS_DIMSE_PORT": "1002", "MISS_DIMSE_AE_TITLE": "ENV"}).stdout)
    assert shown["dimse"]["port"] == 1003 and shown["dimse"]["ae_title"] == "ENV"


def test_sending_nowhere_is_one_line(tmp_path: Path) -> None:
    from tests.datasets import make_instance

    (tmp_path / "one.dcm").write_bytes(make_instance().part10)
    [port] = free_ports(1)
    sent = miss("send", str(tmp_path), "--to", f"NOBODY@{HOST}:{port}")
    assert sent.returncode == 1 and "no connection" in sent.stderr and "Traceback" not in sent.stderr
    nothing = miss("send", str(Path(__file__)), "--to", f"NOBODY@{HOST}:{port}")
    assert nothing.returncode == 1 and "nothing to send" in nothing.stderr


def test_a_port_without_tls_and_a_name_without_an_address_are_called_so(tmp_path: Path) -> None:
    from tests.datasets import make_instance

    (tmp_path / "one.dcm").write_bytes(make_instance().part10)
    with socket.create_server((HOST, 0)) as listener:
        def answer() -> None:
            with listener.accept()[0] as plain:
                plain.recv(4096)
                plain.sendall(bytes.fromhex("07000000000400000200"))  # an A-ABORT in the clear

        thread = threading.Thread(target=answer)
        thread.start()
        sent = miss("send", str(tmp_path), "--to", f"MISS@{HOST}:{listener.getsockname()[1]}", "--tls")
        thread.join()
    assert sent.returncode == 1 and f"no TLS with {HOST}: it does not speak TLS" in sent.stderr
    sent = miss("send", str(tmp_path), "--to", "MISS@no-host.invalid:104")
    assert sent.returncode == 1 and "no connection to no-host.invalid:104: " in sent.stderr
    assert "Unknown error" not in sent.stderr


def test_what_the_disk_refuses_is_one_line_and_registers_nothing(tmp_path: Path) -> None:
    region, file = tmp_path / "region", tmp_path / "file"
    miss("ca", "init", str(region), "--region", "r")
    file.touch()
    made = miss("ca", "device", "CT1", "--out", str(file / "ct1"), "--state", str(region))
    assert made.returncode == 1 and made.stderr.startswith(f"miss: {file}")
    assert made.stderr.count("\n") == 1
    assert "CT1" not in miss("ca", "list", "--state", str(region)).stdout


@pytest.mark.parametrize("command", [
    ("conflicts", "ls"), ("conflicts", "accept", "1.2"), ("ca", "device", "CT1", "--out", "x")])
def test_a_wrong_folder_is_said_with_what_to_give(tmp_path: Path, command: tuple[str, ...]) -> None:
    said = miss(*command, "--state", str(tmp_path))
    assert said.returncode == 2 and "give --state DIR" in said.stderr and "Traceback" not in said.stderr


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5m", 300), ("24h", 86_400), ("7d", 604_800)])
def test_durations(text: str, seconds: int) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "0h", "-1h", "1w", "1.5h", "1h30m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(SettingsError):
        duration_s(text)


@pytest.mark.parametrize(("ae_title", "address"), [
    ("", HOST), ("SEVENTEEN-LETTERS", HOST), ("A\\B", HOST), ("A\tB", HOST), ("CT1", "ct1.example"),
    ("CT1", "10.0.0.0/33"), ("CT1", ""), ("CT\N{LATIN SMALL LETTER E WITH ACUTE}", HOST)])
def test_what_is_no_device(ae_title: str, address: str) -> None:
    with pytest.raises(InvalidInput):
        make_device(ae_title, address)


def test_how_far_a_device_looks_is_said_when_it_is_added(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="reach"):
        make_device("CT1", HOST, reach="world")
    with pytest.raises(InvalidInput, match="on-incomplete"):
        make_device("CT1", HOST, on_incomplete="guess")
    made = make_device("PACS", HOST, reach="region", on_incomplete="fail", max_age_s=60)
    assert (made.reach, made.on_incomplete, made.max_age_s) == ("region", "fail", 60)
    plain = make_device("CT1", HOST)
    assert (plain.reach, plain.on_incomplete, plain.max_age_s) == ("ward", "succeed", 43_200)


def test_a_log_that_a_stranger_wrote_into_offers_no_command(tmp_path: Path) -> None:
    from node.admission import UNKNOWN, remedy

    entry = Connection(0, HOST, "CT1; rm -rf /", "MISS", outcome="refused", reason=UNKNOWN)
    assert "'CT1; rm -rf /'" in remedy(entry)
    assert remedy(Connection(0, HOST, "CT\x1b[2J", "MISS", outcome="refused", reason=UNKNOWN)) == ""


def test_what_a_stranger_calls_itself_is_shown_and_does_nothing() -> None:
    grid = table("calling", "version")
    grid.add_row("[/x]", "[red]\x1b[2J\r\nCT1")
    screen = Console(width=200, file=StringIO(), highlight=False)
    screen.print(grid)
    assert isinstance(screen.file, StringIO)
    assert screen.file.getvalue().splitlines()[1].split() == ["[/x]", r"[red]\x1b[2J\r\nCT1"]


def test_a_stranger_cannot_steer_whoever_reads_the_log() -> None:
    said = logging.LogRecord("a", logging.INFO, "", 0, "from %s", ("\x1b[2J\nCT1\x9b",), None)
    assert OneLine().format(said).endswith(r"from \x1b[2J\nCT1\x9b")
