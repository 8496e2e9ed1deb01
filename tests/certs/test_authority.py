"""The authority's certificates as openssl, gRPC and our own verifier see them."""

from __future__ import annotations

import stat
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from archive.errors import InvalidInput, SettingsError
from certs.authority import Authority, clock_us, hub_identity, pin_of
from certs.certificate import Certificate, new_key, read_certificate, verify_chain
from certs.identity import Identity
from certs.profiles import Member, Profile, slug

WARD = Member.node("liguria", "san-martino/radiology")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.init(tmp_path_factory.mktemp("region") / "ca", "Liguria")


def text_of(pem: bytes) -> str:
    return subprocess.run(
        ["openssl", "x509", "-noout", "-text"], input=pem, capture_output=True, check=True).stdout.decode()


def text_of_certificate(certificate: x509.Certificate) -> str:
    return text_of(certificate.public_bytes(Encoding.PEM))


def verify(authority: Authority, certificate: Certificate, now_us: int | None = None) -> None:
    verify_chain([x509.load_der_x509_certificate(certificate.der), authority.issuing], [authority.root],
                 now_us or clock_us())


def test_a_node_s_certificate_has_the_node_s_profile(authority: Authority) -> None:
    before_s = time.time()
    text = text_of(authority.issue(WARD, new_key().public_key()).pem)
    assert "URI:spiffe://liguria/node/san-martino/radiology, " in text
    assert text.count("URI:") == 1
    assert "DNS:radiology.san-martino.node.liguria.miss.internal" in text
    assert "CA:FALSE" in text and "CA:TRUE" not in text
    assert "Digital Signature\n" in text
    assert "TLS Web Client Authentication" in text and "TLS Web Server Authentication" not in text
    assert "X509v3 Authority Key Identifier" in text and "X509v3 Subject Key Identifier" in text
    assert "ASN1 OID: prime256v1" in text

    held = authority.issue(WARD, new_key().public_key(), life_s=3600)
    assert held.not_after_us / 1e6 - before_s <= 3601
    assert -302 <= held.not_before_us / 1e6 - before_s <= -298
    assert (held.member, held.member.ward) == (WARD, "san-martino/radiology")


def test_a_hub_s_certificate_is_a_server_s_and_names_no_address(tmp_path: Path) -> None:
    Authority.init(tmp_path / "ca", "Liguria")
    text = text_of(hub_identity(tmp_path / "ca", tmp_path / "hub").chain_pem)
    assert "URI:spiffe://liguria/hub/hub, DNS:hub.liguria.miss.internal\n" in text
    assert "TLS Web Server Authentication" in text and "TLS Web Client Authentication" not in text


def test_the_ca_certificates_are_constrained(authority: Authority) -> None:
    root, issuing = text_of_certificate(authority.root), text_of_certificate(authority.issuing)
    assert "CA:TRUE, pathlen:1" in root and "secp384r1" in root
    assert "CA:TRUE, pathlen:0" in issuing
    assert "X509v3 Name Constraints: critical\n                Permitted:\n" in issuing
    assert "DNS:liguria.miss.internal\n" in issuing
    assert "Certificate Sign, CRL Sign\n" in issuing and "Digital Signature" not in issuing
    years = (authority.issuing.not_valid_after_utc - datetime.now(UTC)).days / 365
    assert 4.9 < years < 5.1


def test_openssl_verifies_the_chain_for_its_purpose_alone(authority: Authority, tmp_path: Path) -> None:
    bundle = authority.bundle
    (tmp_path / "root.pem").write_bytes(bundle.roots_pem)
    (tmp_path / "issuing.pem").write_bytes(bundle.issuing_pem)
    (tmp_path / "leaf.pem").write_bytes(authority.issue(WARD, new_key().public_key()).pem)

    def verified(purpose: str) -> bool:
        return subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", "root.pem", "-untrusted", "issuing.pem",
             "-purpose", purpose, "leaf.pem"], cwd=tmp_path, capture_output=True).returncode == 0

    assert verified("sslclient")
    assert not verified("sslserver")


def test_serials_are_random_and_of_159_bits(authority: Authority) -> None:
    serials = [int(authority.issue(WARD, new_key().public_key()).serial, 16) for _ in range(64)]
    assert len(set(serials)) == 64
    assert 150 <= max(serial.bit_length() for serial in serials) <= 159


def test_a_certificate_outside_the_constraints_does_not_verify(authority: Authority) -> None:
    good = authority.issue(WARD, new_key().public_key())
    verify(authority, good)
    foreign = sign_outside(authority, new_key(), "radiology.other.example")
    with pytest.raises(InvalidInput, match="does not lead to the region's root"):
        verify(authority, foreign)
    with pytest.raises(InvalidInput):
        verify(authority, good, good.not_after_us + 1_000_000)


def sign_outside(authority: Authority, key: ec.EllipticCurvePrivateKey, dns_name: str) -> Certificate:
    """A node's certificate with a name the issuing CA may not sign for, signed with its real key."""
    issuing_key = authority._key
    identifier = authority.issuing.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    now = datetime.now(UTC)
    return read_certificate(
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
        .issuer_name(authority.issuing.subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(WARD.uri), x509.DNSName(dns_name)]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(issuing_key, hashes.SHA256()))


def test_keys_are_private_and_the_root_s_is_locked_by_the_passphrase(tmp_path: Path) -> None:
    Authority.init(tmp_path / "ca", "Liguria", "correct horse")
    for name in ("root.key", "issuing.key"):
        assert stat.S_IMODE((tmp_path / "ca" / name).stat().st_mode) == 0o600
    root_key = (tmp_path / "ca" / "root.key").read_bytes()
    with pytest.raises(TypeError):
        load_pem_private_key(root_key, None)
    assert load_pem_private_key(root_key, b"correct horse")
    (tmp_path / "ca" / "root.key").unlink()  # moved offline: daily work goes on
    assert Authority.open(tmp_path / "ca").issue(WARD, new_key().public_key())


def test_an_authority_is_never_overwritten_and_opens_only_whole(tmp_path: Path) -> None:
    made = Authority.init(tmp_path / "ca", "Liguria")
    with pytest.raises(SettingsError, match="never overwritten"):
        Authority.init(tmp_path / "ca", "Liguria")
    assert Authority.open(tmp_path / "ca").pin == made.pin == pin_of(made.root)

    (tmp_path / "ca" / "issuing.key").chmod(0o644)
    with pytest.raises(SettingsError, match="read by others"):
        Authority.open(tmp_path / "ca")
    Authority.init(tmp_path / "other", "Liguria")
    (tmp_path / "ca" / "issuing.key").unlink()
    (tmp_path / "other" / "issuing.key").rename(tmp_path / "ca" / "issuing.key")
    with pytest.raises(SettingsError, match="not the key of"):
        Authority.open(tmp_path / "ca")
    with pytest.raises(SettingsError, match="holds no authority"):
        Authority.open(tmp_path / "nothing")


def test_the_authority_signs_for_its_own_region_and_for_p256_alone(authority: Authority) -> None:
    with pytest.raises(InvalidInput, match="signs for the region liguria"):
        authority.issue(Member.node("toscana", "careggi/radiology"), new_key().public_key())
    with pytest.raises(InvalidInput, match="P-256"):
        authority.issue(WARD, ec.generate_private_key(ec.SECP384R1()).public_key())


def test_a_hub_s_identity_is_kept_until_it_is_due(tmp_path: Path) -> None:
    Authority.init(tmp_path / "ca", "Liguria")

    def identity(ahead_s: int, renew: bool = False) -> Identity:
        return hub_identity(tmp_path / "ca", tmp_path / "hub", life_s=3000, renew=renew,
                            clock=lambda: clock_us() + ahead_s * 1_000_000)

    first = identity(0)
    assert identity(1700).fingerprint == first.fingerprint
    renewed = identity(1801)
    assert renewed.fingerprint != first.fingerprint and renewed.key_pem != first.key_pem
    assert identity(0, renew=True).fingerprint != renewed.fingerprint


@pytest.mark.parametrize("uri", [
    "spiffe://liguria/node/a", "spiffe://liguria/node/a/b/c", "spiffe://liguria/admin/a",
    "https://liguria/node/a/b",
    "spiffe://liguria/node/A/b", "spiffe://liguria/node/a/../b", "spiffe:///node/a/b", "spiffe://liguria", "",
    "spiffe://liguria/node/a/" + "b" * 41, "spiffe://liguria/node/a/-b",
])
def test_what_is_no_identity_is_not_read_as_one(uri: str) -> None:
    with pytest.raises(InvalidInput):
        Member.parse(uri)


def test_members_are_read_as_they_are_written() -> None:
    portal, hub = Member("liguria", Profile.PORTAL, ("main",)), Member("liguria", Profile.HUB, ("h2",))
    for member in (WARD, portal, hub):
        assert Member.parse(member.uri) == member
    assert slug("  Ospedale San Martino – Pediatria à ") == "ospedale-san-martino-pediatria-a"
    with pytest.raises(InvalidInput):
        slug("…")
