"""Owns what is known of the other end of a connection before it has said a word of DICOM: its address, the
transport it came by, and the certificate that it proved to hold. It judges none of it; admission does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PLAIN = "plain"
TLS = "TLS"  # of no version yet
SUBJECT_SHOWN_MAX = 200


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """A certificate whose chain was verified and whose key the peer holds. `fingerprint` (SHA-256 of the DER)
    and `spki` (of the key) in hex; `uris` are those of its subject alternative names."""

    subject: str
    fingerprint: str
    spki: str
    uris: tuple[str, ...]
    issuer: str
    serial: int
    not_after_s: float

    def __str__(self) -> str:
        return f"{self.subject} (SHA-256 {self.fingerprint})"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection comes from. `transport` is "plain" or the version of TLS ("TLSv1.3")."""

    address: str
    transport: str = PLAIN
    certificate: PeerCertificate | None = None

    @property
    def is_tls(self) -> bool:
        return self.transport != PLAIN


def read_certificate(der: bytes) -> PeerCertificate:
    """What a certificate says. ValueError when it can't be read."""
    certificate = x509.load_der_x509_certificate(der)
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return PeerCertificate(
        subject=_shown(certificate.subject), fingerprint=hashlib.sha256(der).hexdigest(),
        spki=hashlib.sha256(key).hexdigest(), uris=_uris(certificate), issuer=_shown(certificate.issuer),
        serial=certificate.serial_number, not_after_s=certificate.not_valid_after_utc.timestamp(),
    )


def _shown(name: x509.Name) -> str:
    """A name for people: what can't be printed is not, and it has an end."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name.rfc4514_string())
    return text[:SUBJECT_SHOWN_MAX] or "(no subject)"


def _uris(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(names.get_values_for_type(x509.UniformResourceIdentifier))
