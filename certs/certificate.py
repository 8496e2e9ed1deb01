"""Certificates of members as this package reads them: bytes in, facts out. Signs nothing, owns no file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from archive.errors import InvalidInput
from certs.profiles import BACKDATE_S, RULES, Member, Profile

KEYS_READ_MAX = 4096  # certificates kept parsed: one for every member of a large region

_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Certificate:
    """A member's certificate. `serial`, `fingerprint` (SHA-256 of the DER) and `spki` (of the key) in hex."""

    der: bytes
    member: Member
    serial: str
    fingerprint: str
    spki: str
    not_before_us: int
    not_after_us: int

    @property
    def pem(self) -> bytes:
        return x509.load_der_x509_certificate(self.der).public_bytes(Encoding.PEM)

    @property
    def issued_us(self) -> int:
        """When it was signed: its life is counted from here, not from the backdated notBefore."""
        return self.not_before_us + BACKDATE_S * _US


@lru_cache(maxsize=KEYS_READ_MAX)
def read_pem(pem: bytes) -> Certificate:
    """The member's certificate that `pem` begins with; cached, as every call asks it of its peer."""
    try:
        return read_certificate(x509.load_pem_x509_certificate(pem))
    except ValueError as error:
        raise InvalidInput("not a certificate") from error


def read_der(der: bytes) -> Certificate:
    try:
        return read_certificate(x509.load_der_x509_certificate(der))
    except ValueError as error:
        raise InvalidInput("not a certificate") from error


def read_certificate(certificate: x509.Certificate) -> Certificate:
    """InvalidInput unless it names exactly one member, with the key usages of that member's profile."""
    member = _member(certificate)
    der = certificate.public_bytes(Encoding.DER)
    return Certificate(
        der=der,
        member=member,
        serial=f"{certificate.serial_number:040x}",
        fingerprint=hashlib.sha256(der).hexdigest(),
        spki=spki_fingerprint(certificate.public_key()),
        not_before_us=int(certificate.not_valid_before_utc.timestamp()) * _US,
        not_after_us=int(certificate.not_valid_after_utc.timestamp()) * _US,
    )


def trust_domain(certificate: x509.Certificate) -> str:
    """The region a CA certificate speaks for: its only URI, `spiffe://<region>`."""
    uris = _uris(certificate)
    if len(uris) != 1 or not uris[0].startswith("spiffe://") or "/" in uris[0][len("spiffe://"):]:
        raise InvalidInput("a CA certificate of a region holds one URI, spiffe://<region>")
    return uris[0][len("spiffe://"):]


def spki_fingerprint(key: CertificatePublicKeyTypes) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def new_key() -> ec.EllipticCurvePrivateKey:
    """A member's key: P-256, the curve that every TLS stack has its fastest code for."""
    return ec.generate_private_key(ec.SECP256R1())


def verify_chain(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now_us: int) -> None:
    """InvalidInput unless `chain` (leaf first) leads to one of `roots`, valid now, within the constraints."""
    builder = PolicyBuilder().store(Store(list(roots))).time(datetime.fromtimestamp(now_us / _US, UTC))
    member = read_certificate(chain[0]).member
    try:
        if member.profile is Profile.HUB:
            builder.build_server_verifier(x509.DNSName(member.dns_name)).verify(chain[0], list(chain[1:]))
        else:
            builder.build_client_verifier().verify(chain[0], list(chain[1:]))
    except VerificationError as error:
        raise InvalidInput(f"the certificate does not lead to the region's root: {error}") from error


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _member(certificate: x509.Certificate) -> Member:
    uris = _uris(certificate)
    if len(uris) != 1:
        raise InvalidInput("a member's certificate holds exactly one URI")
    member = Member.parse(uris[0])
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound as error:
        raise InvalidInput("a member's certificate states its usages and that it is no CA") from error
    if limits.ca or set(usages) != set(RULES[member.profile].usages):
        raise InvalidInput(f"not a certificate of the profile {member.profile.value}")
    return member


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)
