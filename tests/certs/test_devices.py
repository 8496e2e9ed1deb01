"""Certificates of machines that speak DICOM: what they hold, whom they can't pass for, and what becomes of
them."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from archive.database import sqlite_url
from archive.errors import InvalidInput, SettingsError
from archive.ledger import Ledger
from certs import registry
from certs.authority import Authority
from certs.certificate import read_certificate
from certs.devices import DeviceName, issue_device, spki_of_file
from certs.profiles import device_uri, hub_dns_name
from tests.certs.region import RunningHub, code_of, offer

FOREVER_S = 10 * 365 * 86_400


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(sqlite_url(tmp_path / "ledger.db"))


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    Authority.init(tmp_path / "ca", "liguria")
    return tmp_path / "ca"


def leaf(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates((folder / "certificate.pem").read_bytes())[0]


def verified(folder: Path, *flags: str) -> str:
    """What openssl says of the chain that was handed over."""
    ran = subprocess.run(
        ["openssl", "verify", "-CAfile", folder / "trust.pem", "-untrusted", folder / "certificate.pem",
         *flags, folder / "certificate.pem"], capture_output=True, text=True)
    return ran.stdout + ran.stderr


def test_a_modalitys_certificate(authority: Path, ledger: Ledger, tmp_path: Path) -> None:
    out = tmp_path / "ct1"
    row = issue_device(authority, ledger, DeviceName("CT 1", ip=("10.1.2.3",)), out, who="anna")
    made = leaf(out)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:miss:liguria:aet:CT%201"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3"]
    usages = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    limits = made.extensions.get_extension_for_class(x509.BasicConstraints)
    assert limits.critical and not limits.value.ca
    assert stat.S_IMODE((out / "key.pem").stat().st_mode) == 0o600
    for purpose in ("sslclient", "sslserver"):
        assert verified(out, "-purpose", purpose).endswith("OK\n")
    assert ledger.certificate(row.fingerprint) == row
    assert (row.identity, row.profile, row.ward) == ("urn:miss:liguria:aet:CT%201", "device", None)
    assert row.spki == spki_of_file(out / "certificate.pem")
    assert ledger.audit_rows()[0].act == "issue" and ledger.audit_rows()[0].who == "anna"


def test_rsa_for_old_machines(authority: Path, ledger: Ledger, tmp_path: Path) -> None:
    issue_device(authority, ledger, DeviceName("OLDMR", ward="san-martino/radiology"), tmp_path / "mr",
                 use_rsa=True)
    made = leaf(tmp_path / "mr")
    key = made.public_key()
    assert isinstance(key, rsa.RSAPublicKey) and key.key_size == 2048
    assert made.extensions.get_extension_for_class(x509.KeyUsage).value.key_encipherment
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        device_uri("liguria", "OLDMR", "san-martino/radiology")]


def test_a_key_is_never_overwritten(authority: Path, ledger: Ledger, tmp_path: Path) -> None:
    issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out")
    with pytest.raises(InvalidInput, match="holds key.pem already"):
        issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out")


@pytest.mark.parametrize("name", [
    DeviceName("X", dns=("hub.liguria.miss.internal",)), DeviceName("X", dns=("LIGURIA.miss.internal",)),
    DeviceName("X", dns=("a b",)), DeviceName("X", dns=("-a.example",)), DeviceName("X", dns=("",)),
    DeviceName("X", ip=("10.0.0.0/8",)), DeviceName("X", dns=("a.example",) * 21),
])
def test_names_that_no_device_has(authority: Path, ledger: Ledger, tmp_path: Path, name: DeviceName) -> None:
    with pytest.raises(InvalidInput):
        issue_device(authority, ledger, name, tmp_path / "out")
    assert not (tmp_path / "out").exists() and ledger.certificates() == []


@pytest.mark.parametrize("life_s", [0, -1, FOREVER_S])
def test_a_life_has_an_end(authority: Path, ledger: Ledger, tmp_path: Path, life_s: int) -> None:
    with pytest.raises(InvalidInput, match="730 days"):
        issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out", life_s=life_s)


def test_the_devices_authority_can_sign_for_no_hub(authority: Path, ledger: Ledger, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only this program refuses: the constraint is in the CA's certificate."""
    monkeypatch.setattr("certs.devices.region_domain", lambda region: "nowhere.invalid")
    issue_device(authority, ledger, DeviceName("EVIL", dns=(hub_dns_name("liguria"),)), tmp_path / "out")
    assert "excluded subtree violation" in verified(tmp_path / "out")


def test_a_device_is_no_member(authority: Path, ledger: Ledger, tmp_path: Path) -> None:
    issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out")
    with pytest.raises(InvalidInput):
        read_certificate(leaf(tmp_path / "out"))


def test_the_hubs_gate_has_no_call_for_it(hub: RunningHub, tmp_path: Path) -> None:
    """22."""
    issue_device(hub.folder / "ca", hub.ledger, DeviceName("CT1"), tmp_path / "out")
    out = tmp_path / "out"
    credentials = grpc.ssl_channel_credentials(*((out / name).read_bytes() for name in (
        "trust.pem", "key.pem", "certificate.pem")))
    target = [("grpc.ssl_target_name_override", hub_dns_name(hub.authority.region))]
    with grpc.secure_channel(hub.address, credentials, options=target) as channel:
        assert code_of(lambda: offer(channel)) is grpc.StatusCode.UNAUTHENTICATED
    assert [why for why in hub.gate.refusals if "not a member's" in why]


def test_revoked(authority: Path, ledger: Ledger, tmp_path: Path) -> None:
    row = issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out")
    other = issue_device(authority, ledger, DeviceName("MR1"), tmp_path / "mr")
    revoked = registry.revoke(ledger, row.identity, reason="stolen", who="anna")
    assert [one.serial for one in revoked] == [row.serial]
    states = {one.identity: one.state for one in ledger.certificates()}
    assert states == {row.identity: "revoked", other.identity: "active"}


def older(authority: Path) -> None:
    """As a release without DICOM TLS made it."""
    for name in ("devices.key", "devices.pem"):
        (authority / name).unlink()


def test_an_older_region_gets_its_devices_authority(authority: Path, ledger: Ledger, tmp_path: Path) -> None:
    older(authority)
    Authority.open(authority)
    issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out")
    assert verified(tmp_path / "out").endswith("OK\n")
    first = (authority / "devices.pem").read_bytes()
    (authority / "root.key").unlink()  # offline from now on
    issue_device(authority, ledger, DeviceName("MR1"), tmp_path / "mr")
    assert (authority / "devices.pem").read_bytes() == first


def test_killed_between_key_and_certificate(authority: Path, ledger: Ledger, tmp_path: Path) -> None:
    (authority / "devices.pem").unlink()
    issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out")
    assert verified(tmp_path / "out").endswith("OK\n")


def test_the_root_key_is_asked_for(tmp_path: Path, ledger: Ledger) -> None:
    authority = tmp_path / "ca"
    Authority.init(authority, "liguria", "open sesame")
    older(authority)
    for passphrase in (None, "wrong"):
        with pytest.raises(SettingsError, match="--passphrase"):
            issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out", passphrase=passphrase)
    issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out", passphrase="open sesame")
    older(authority)
    (authority / "root.key").unlink()
    with pytest.raises(SettingsError, match="bring the root key"):
        issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "other")


def test_a_pin_of_pem_and_of_der(authority: Path, ledger: Ledger, tmp_path: Path) -> None:
    row = issue_device(authority, ledger, DeviceName("CT1"), tmp_path / "out")
    der = tmp_path / "ct1.der"
    der.write_bytes(row.der)
    assert spki_of_file(der) == spki_of_file(tmp_path / "out" / "certificate.pem") == row.spki
    for path in (tmp_path / "nothing", tmp_path / "out" / "key.pem"):
        with pytest.raises(InvalidInput):
            spki_of_file(path)
