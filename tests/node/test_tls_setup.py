"""DICOM over TLS as people set it up: `miss ca device`, node.toml, `miss device add`, `miss send --tls`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from archive.errors import InvalidInput, SettingsError
from archive.ledger import Ledger
from archive.settings import load, render_toml
from miss.device import make_device
from miss.processes import free_ports
from node.service import Node
from node.settings import DimseSettings, NodeSettings, TlsSettings
from tests.commands import miss
from tests.datasets import make_instance
from tests.federation.regions import make_region

CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[NodeSettings]:
    """An enrolled node; its region lies in region/."""
    region = make_region(tmp_path / "region")
    identity = region.node(region.add_ward("San Martino", "Radiology", "SANMARTINO"), "127.0.0.1:1")
    region.ledger.close()
    (tmp_path / "region" / "hub.toml").write_text('state = "."\nca = "ca"\n')
    state = tmp_path / "node"
    state.mkdir()
    made = NodeSettings(state=state, identity=identity.folder,
                        dimse=DimseSettings(host="127.0.0.1", port=0, stop_grace_s=2.0))
    yield replace(made, archive=replace(made.archive, free_bytes_min=0))


def with_tls(settings: NodeSettings, **tls: object) -> NodeSettings:
    made = replace(settings, dimse=replace(settings.dimse, tls=TlsSettings(port=0, **tls)))  # type: ignore[arg-type]
    (made.state / "node.toml").write_text(render_toml(made))
    return load(NodeSettings, made.state / "node.toml")


def test_from_the_first_key_to_an_image(settings: NodeSettings, tmp_path: Path) -> None:
    region, listener, ct1 = tmp_path / "region", settings.state / "tls", tmp_path / "ct1"
    made = miss("ca", "device", "MISS", "--listener", "--ip", "127.0.0.1", "--out", listener,
                "--state", region)
    assert made.returncode == 0 and "[dimse.tls]" in made.stderr, made.stderr
    made = miss("ca", "device", "CT1", "--out", ct1, "--ward", "san-martino/radiology", "--state", region)
    assert made.returncode == 0 and "miss device add CT1" in made.stderr, made.stderr
    listed = miss("ca", "list", "--state", region)
    assert "urn:miss:liguria:san-martino/radiology:aet:CT1" in listed.stdout.replace("\n", "")
    running = with_tls(settings, certificate=Path("tls/certificate.pem"), key=Path("tls/key.pem"))
    added = miss("device", "add", "CT1", "127.0.0.1", "--transport", "tls", "--certificate",
                 ct1 / "certificate.pem", "--sop-class", CT, "--on-conflict", "propose",
                 "--state", settings.state)
    assert added.returncode == 0, added.stderr
    shown = " ".join(miss("device", "ls", "--state", settings.state).stdout.split())
    assert "tls" in shown and "1 SOP class" in shown
    instance = make_instance()
    (tmp_path / "one.dcm").write_bytes(instance.part10)
    with Node(running) as node:
        to = f"MISS@127.0.0.1:{node.dicom_tls_port}"
        papers = ("--trust", ct1 / "trust.pem", "--certificate", ct1 / "certificate.pem",
                  "--key", ct1 / "key.pem")
        sent = miss("send", tmp_path / "one.dcm", "--to", to, "--calling", "CT1", "--tls", *papers)
        assert sent.returncode == 0, sent.stderr
        node.archive.wait_indexed()
        assert len(node.archive.instances(instance.study_uid)) == 1
        for arguments, why in (
            (("--to", to, "--calling", "MR1", "--tls", *papers), "1/1/3"),
            (("--to", f"MISS@127.0.0.1:{node.dicom_port}", "--calling", "CT1"), "1/1/3"),
            (("--to", to, "--calling", "CT1", "--tls", *papers, "--server-name", "x.example"),
             "ostname mismatch"),
            (("--to", to, "--calling", "CT1", *papers), "--tls"),
            (("--to", to, "--calling", "CT1", "--tls", "--key", tmp_path / "one.dcm"), "needs its key"),
        ):
            failed = miss("send", tmp_path / "one.dcm", *arguments)
            said = " ".join(failed.stderr.split())
            assert failed.returncode in (1, 2) and why in said and "Traceback" not in said, said
    log = " ".join(miss("node", "log", "--state", settings.state).stdout.split())
    assert "TLSv1.3" in log and "may come over TLS alone" in log


@pytest.mark.parametrize(("tls", "words"), [
    ({"certificate": Path("a.pem")}, "dimse.tls.certificate is set and dimse.tls.key is not"),
    ({"key": Path("a.pem")}, "dimse.tls.key is set and dimse.tls.certificate is not"),
    ({"certificate": Path("a.pem"), "key": Path("a.pem")}, "dimse.tls: the certificate .*a.pem can't be"),
])
def test_configured_by_half(settings: NodeSettings, tls: dict[str, Path], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Node(with_tls(settings, **tls)).start()


@pytest.mark.parametrize(("setting", "words"), [
    ("dimse.max_pdu_bytes=100", "dimse.max_pdu_bytes"), ("dimse.ae_title=SEVENTEEN-LETTERS", "ae_title"),
    ("dimse.tls.key=key.pem", "dimse.tls.certificate")])
def test_the_check_of_settings_finds_what_a_start_would(settings: NodeSettings, setting: str,
                                                        words: str) -> None:
    with_tls(settings)
    file = settings.state / "node.toml"
    assert miss("settings", "check", "node", "--settings", file).returncode == 0
    checked = miss("settings", "check", "node", "--settings", file, "--set", setting)
    assert checked.returncode == 2 and words in checked.stderr and "good" not in checked.stderr


def test_the_check_of_settings_reads_the_files_of_tls(settings: NodeSettings) -> None:
    with_tls(settings, certificate=Path("no.pem"), key=Path("no.key"))
    checked = miss("settings", "check", "node", "--settings", settings.state / "node.toml")
    assert checked.returncode == 2 and "no.pem" in checked.stderr


def test_without_a_certificate_there_is_no_second_port(settings: NodeSettings) -> None:
    with Node(settings) as node:
        assert node.dicom_tls_port is None


def test_one_port_for_both_is_named(settings: NodeSettings, tmp_path: Path) -> None:
    out = tmp_path / "listener"
    miss("ca", "device", "MISS", "--listener", "--ip", "127.0.0.1", "--out", out,
         "--state", tmp_path / "region")
    [port] = free_ports(1)
    tls = TlsSettings(port=port, certificate=out / "certificate.pem", key=out / "key.pem")
    busy = replace(settings, dimse=replace(settings.dimse, port=port, tls=tls))
    with pytest.raises(SettingsError, match=f"127.0.0.1:{port} can't be had"):
        Node(busy).start()
    with Node(settings):  # and nothing stays open
        pass


@pytest.mark.parametrize("options", [
    {"transport": "carrier pigeon"}, {"on_conflict": "panic"}, {"sop_classes": ["CT"]},
    {"transfer_syntaxes": ["1.2..3"]}, {"certificate": Path("/nothing")},
    {"certificate": Path(__file__)}, {"transport": "plain", "certificate": Path("/nothing")},
])
def test_what_is_no_device(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        make_device("CT1", "10.0.0.5", **options)  # type: ignore[arg-type]


def test_what_the_authority_is_not_asked_for(settings: NodeSettings, tmp_path: Path) -> None:
    region, out = tmp_path / "region", tmp_path / "out"
    for arguments, words in (
        (("MISS", "--listener"), "--dns, --ip"), (("A" * 17,), "AE title"),
        (("CT1", "--ward", "no/where"), "no ward"), (("CT1", "--days", "9999"), "730"),
        (("CT1", "--dns", "hub.liguria.miss.internal"), "own members"),
    ):
        refused = miss("ca", "device", *arguments, "--out", out, "--state", region)
        assert refused.returncode in (1, 2) and words in " ".join(refused.stderr.split()), refused.stderr
    assert not out.exists()
    ledger = Ledger.open(f"sqlite:///{region / 'ledger.db'}")
    assert not [row for row in ledger.certificates() if row.profile == "device"]
    ledger.close()
