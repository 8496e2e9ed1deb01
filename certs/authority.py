"""The region's certificate authority: a root that sleeps and an issuing CA that works, in one folder.

The root (P-384, 20 years, pathlen 1) signs issuing CAs and nothing else, and its key may be moved offline:
day to day only `issuing.key` is read. The issuing CA (5 years, pathlen 0) may by its critical name constraint
sign for the region's own domain alone; the devices' CA, for DICOM over TLS, for every name but those. What a
certificate holds comes from `certs/profiles.py` and the member's name, never from a request. Registers
nothing: `certs/registry.py` does.

    root.key  root.pem  issuing.key  issuing.pem  devices.key  devices.pem
    (keys 0600; root.key encrypted if a passphrase is given)
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from archive.errors import InvalidInput, SettingsError
from certs import identity as identities
from certs import keyfiles
from certs.certificate import (
    Certificate,
    key_pem,
    new_key,
    read_certificate,
    trust_domain,
)
from certs.identity import Identity
from certs.profiles import (
    BACKDATE_S,
    ISSUING_LIFE_S,
    LEAF_LIFE_S,
    ROOT_LIFE_S,
    RULES,
    Member,
    Profile,
    region_domain,
    slug,
)

FIRST_BUNDLE_VERSION = 1
HUB_RENEWAL_LEFT = 0.4  # of life: never later than `certs/renewal.py` asks for it
Clock = Callable[[], int]
_US = 1_000_000


def clock_us() -> int:
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """What a member trusts, and what leads to it. `version` only grows; several roots during a change."""

    version: int
    region: str
    roots_pem: bytes
    issuing_pem: bytes


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority of one region, opened for daily work."""

    region: str
    root: x509.Certificate
    issuing: x509.Certificate
    _key: ec.EllipticCurvePrivateKey = field(repr=False)
    _clock: Clock = clock_us

    @classmethod
    def init(
        cls, folder: Path, region: str, passphrase: str | None = None, *, clock: Clock = clock_us
    ) -> Authority:
        """Makes a region's authority in `folder`, which must be empty or not exist: whole or not at all."""
        if folder.exists() and any(folder.iterdir()):
            raise SettingsError(f"{folder} is not empty: an authority is never overwritten")
        keyfiles.make_private_folder(folder)
        staging = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
        staging.mkdir(mode=0o700)
        region = slug(region)
        root_key, issuing_key = ec.generate_private_key(ec.SECP384R1()), new_key()
        now_s = clock() // _US
        root = _sign_root(region, root_key, now_s)
        issuing = _sign_intermediate(region, "issuing", issuing_key, root, root_key, now_s)
        keyfiles.write_new(staging / "root.key", _root_key_pem(root_key, passphrase), keyfiles.PRIVATE)
        keyfiles.write_new(staging / "root.pem", root.public_bytes(Encoding.PEM))
        keyfiles.write_new(staging / "issuing.key", key_pem(issuing_key), keyfiles.PRIVATE)
        keyfiles.write_new(staging / "issuing.pem", issuing.public_bytes(Encoding.PEM))
        _make_devices(staging, region, root, root_key, now_s)
        keyfiles.sync_directory(staging)
        os.rename(staging, folder)  # takes the place of an empty folder only
        keyfiles.sync_directory(folder.parent)
        return cls.open(folder, clock=clock)

    @classmethod
    def open(cls, folder: Path, *, clock: Clock = clock_us) -> Authority:
        """Opens the authority in `folder` with its issuing key; SettingsError when its parts do not fit."""
        try:
            root = x509.load_pem_x509_certificate(keyfiles.read(folder / "root.pem"))
            issuing = x509.load_pem_x509_certificate(keyfiles.read(folder / "issuing.pem"))
            key = load_pem_private_key(keyfiles.read_private(folder / "issuing.key"), None)
            issuing.verify_directly_issued_by(root)
        except FileNotFoundError as error:
            raise SettingsError(f"{folder} holds no authority (no {Path(error.filename).name})") from error
        except Exception as error:
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(f"the authority in {folder} can't be used: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != issuing.public_key():
            raise SettingsError(f"issuing.key in {folder} is not the key of issuing.pem")
        return cls(trust_domain(root), root, issuing, key, clock)

    @property
    def pin(self) -> str:
        """What an invite pins: SHA-256 of the root's public key, base64url."""
        return pin_of(self.root)

    @property
    def bundle(self) -> TrustBundle:
        return TrustBundle(
            version=FIRST_BUNDLE_VERSION,
            region=self.region,
            roots_pem=self.root.public_bytes(Encoding.PEM),
            issuing_pem=self.issuing.public_bytes(Encoding.PEM),
        )

    def issue(
        self, member: Member, public_key: ec.EllipticCurvePublicKey, *, life_s: int = LEAF_LIFE_S
    ) -> Certificate:
        """A certificate for `member` with `public_key`; it never outlives the issuing CA."""
        if member.region != self.region:
            raise InvalidInput(f"this authority signs for the region {self.region}, not {member.region}")
        if not isinstance(public_key.curve, ec.SECP256R1):
            raise InvalidInput("a member's key is on the curve P-256")
        now_s = self._clock() // _US
        until = min(time_of(now_s + life_s), self.issuing.not_valid_after_utc)
        authority_key = self.issuing.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            begin_certificate(
                certificate_name(self.region, "/".join((member.profile.value, *member.path))),
                self.issuing.subject, public_key, time_of(now_s - BACKDATE_S), until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(RULES[member.profile].usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(member.uri), x509.DNSName(member.dns_name)]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_key),
                           critical=False)
        )
        return read_certificate(builder.sign(self._key, hashes.SHA256()))


def pin_of(certificate: x509.Certificate) -> str:
    digest = hashlib.sha256(
        certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()


def hub_identity(
    authority_folder: Path, folder: Path, *, name: str = "hub", life_s: int = LEAF_LIFE_S,
    renew: bool = False, clock: Clock = clock_us,
) -> Identity:
    """The hub's identity in `folder`, made by the authority on the same machine when there is none, when two
    fifths of its life are left, when the authority is another one, or when told to `renew`.

    Servers that got `server_credentials` take the new one up by themselves. A hub's certificate is not in the
    registry: it dials nobody, so no gate asks for it.
    """
    authority = Authority.open(authority_folder, clock=clock)
    member = Member(authority.region, Profile.HUB, (slug(name),))
    if identities.exists(folder):
        held = Identity.load(folder)
        left_us, life_us = held.not_after_us - clock(), held.not_after_us - held.issued_us
        fits = held.certificate.member == member and held.roots_pem == authority.bundle.roots_pem
        if fits and left_us > life_us * HUB_RENEWAL_LEFT and not renew:
            return held
    key = identities.pending_key(folder, "hub")
    certificate = authority.issue(member, key.public_key(), life_s=life_s)
    return identities.install(
        folder,
        identities.Issued(
            chain_pem=certificate.pem + authority.bundle.issuing_pem,
            roots_pem=authority.bundle.roots_pem,
            bundle_version=authority.bundle.version,
        ),
        drop_older=True,
    )


def device_issuer(
    folder: Path, *, passphrase: str | None = None, clock: Clock = clock_us
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The devices' CA of the authority in `folder`. An authority that was made before there was one gets it
    now, which needs its root key (SettingsError when that is offline, or wants another passphrase)."""
    authority = Authority.open(folder, clock=clock)
    if not (folder / "devices.pem").exists():
        root_key = _read_root_key(folder / "root.key", passphrase)
        _make_devices(folder, authority.region, authority.root, root_key, clock() // _US)
    try:
        certificate = x509.load_pem_x509_certificate(keyfiles.read(folder / "devices.pem"))
        key = load_pem_private_key(keyfiles.read_private(folder / "devices.key"), None)
        certificate.verify_directly_issued_by(authority.root)
    except Exception as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"the devices' authority in {folder} can't be used: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise SettingsError(f"devices.key in {folder} is not the key of devices.pem")
    return certificate, key


def _make_devices(
    folder: Path, region: str, root: x509.Certificate, root_key: ec.EllipticCurvePrivateKey, now_s: int
) -> None:
    """The certificate last: a key without one is of a run that was killed, and gets its certificate now."""
    if (folder / "devices.key").exists():
        key = load_pem_private_key(keyfiles.read_private(folder / "devices.key"), None)
    else:
        key = new_key()
        keyfiles.write_new(folder / "devices.key", key_pem(key), keyfiles.PRIVATE)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError(f"devices.key in {folder} is not a key of this program")
    certificate = _sign_intermediate(region, "devices", key, root, root_key, now_s)
    keyfiles.write_new(folder / "devices.pem", certificate.public_bytes(Encoding.PEM))
    keyfiles.sync_directory(folder)


def _read_root_key(path: Path, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(
            keyfiles.read_private(path), passphrase.encode() if passphrase else None)
    except FileNotFoundError:
        raise SettingsError(f"{path} is not here: bring the root key once, to make the devices' authority"
                            ) from None
    except (TypeError, ValueError):
        raise SettingsError(f"{path} can't be opened: its passphrase is needed (--passphrase)") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError(f"{path} is not a key of this program")
    return key


def _sign_root(region: str, key: ec.EllipticCurvePrivateKey, now_s: int) -> x509.Certificate:
    subject = certificate_name(region, "root")
    since, until = time_of(now_s - BACKDATE_S), time_of(now_s + ROOT_LIFE_S)
    builder = begin_certificate(subject, subject, key.public_key(), since, until)
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(key_usage(signature=False), critical=True)
        .add_extension(x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(f"spiffe://{region}")]), critical=False)
        .sign(key, hashes.SHA384())
    )


def _sign_intermediate(
    region: str, what: str, key: ec.EllipticCurvePrivateKey, root: x509.Certificate,
    root_key: ec.EllipticCurvePrivateKey, now_s: int,
) -> x509.Certificate:
    # DNS constraints only: with URI constraints the verifier of `cryptography` refuses every chain. The
    # region's own domain is the issuing CA's, and closed to the devices' CA: its certificates are good for
    # servers of whatever name, and must never pass for a hub.
    domain = [x509.DNSName(region_domain(region))]
    constraints = (x509.NameConstraints(permitted_subtrees=None, excluded_subtrees=domain)
                   if what == "devices" else
                   x509.NameConstraints(permitted_subtrees=domain, excluded_subtrees=None))
    root_key_id = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    until = min(time_of(now_s + ISSUING_LIFE_S), root.not_valid_after_utc)
    return (
        begin_certificate(
            certificate_name(region, f"{what} {secrets.token_hex(4)}"), root.subject, key.public_key(),
            time_of(now_s - BACKDATE_S), until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signature=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(
            [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(constraints, critical=True)
        .add_extension(x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(f"spiffe://{region}")]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(root_key_id),
                       critical=False)
        .sign(root_key, hashes.SHA384())
    )


def begin_certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    since: datetime, until: datetime,
) -> x509.CertificateBuilder:
    """What every certificate begins with."""
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
        .serial_number(x509.random_serial_number())  # 159 bits
        .not_valid_before(since).not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def certificate_name(region: str, what: str) -> x509.Name:
    return x509.Name([
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"MISS {region}"),
        x509.NameAttribute(NameOID.COMMON_NAME, what[:64]),  # X.520's upper bound; the identity is the URI
    ])


def key_usage(*, signature: bool, encipherment: bool = False) -> x509.KeyUsage:
    """A member signs handshakes, a CA signs certificates and lists of the revoked; nobody does both."""
    return x509.KeyUsage(
        digital_signature=signature, content_commitment=False, key_encipherment=encipherment,
        data_encipherment=False, key_agreement=False, key_cert_sign=not signature, crl_sign=not signature,
        encipher_only=False, decipher_only=False,
    )


def _root_key_pem(key: ec.EllipticCurvePrivateKey, passphrase: str | None) -> bytes:
    protection: KeySerializationEncryption = NoEncryption()
    if passphrase:
        protection = BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def time_of(seconds: int) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(seconds=seconds)
