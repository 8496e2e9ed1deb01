"""Certificates of machines that speak DICOM over TLS: modalities, workstations, and a node's own listener.

They are no members of the region: the devices' CA signs them, they name an AE title and no `spiffe` identity,
and the gate of the hub has no call for them. Keys are made here, as a modality can rarely ask for a
certificate by itself, and leave by the folder that is handed over.

    folder/key.pem (0600)  certificate.pem (with its chain)  trust.pem (the region's root)
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from archive.errors import InvalidInput
from archive.ledger import CertificateRow, Ledger
from certs import keyfiles, registry
from certs.authority import (
    Authority,
    Clock,
    begin_certificate,
    certificate_name,
    clock_us,
    device_issuer,
    key_usage,
    time_of,
)
from certs.certificate import new_key, spki_fingerprint
from certs.profiles import BACKDATE_S, DEVICE_LIFE_S, DEVICE_LIFE_S_MAX, device_uri, region_domain

PROFILE = "device"
RSA_BITS = 2048  # what the oldest machines can, and the least that RFC 9325 allows
KEY, CERTIFICATE, TRUST = "key.pem", "certificate.pem", "trust.pem"
NAMES_MAX = 20

_US = 1_000_000
_DNS_NAME = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*"
                       r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DeviceName:
    """What a device's certificate says of it: AE title, ward ("" for any of the region), and the names and
    addresses by which others dial it."""

    ae_title: str
    ward: str = ""
    dns: tuple[str, ...] = ()
    ip: tuple[str, ...] = ()


def issue_device(
    authority_folder: Path, ledger: Ledger, name: DeviceName, folder: Path, *, use_rsa: bool = False,
    life_s: int = DEVICE_LIFE_S, passphrase: str | None = None, who: str = "", clock: Clock = clock_us,
) -> CertificateRow:
    """Makes a key and its certificate in `folder`, which must not hold any, and registers the certificate;
    its row. `passphrase` is the root key's, asked for only where the devices' CA is not made yet."""
    if not 0 < life_s <= DEVICE_LIFE_S_MAX:
        raise InvalidInput(f"a device's certificate lives 1 to {DEVICE_LIFE_S_MAX // 86_400} days")
    if held := [file for file in (KEY, CERTIFICATE, TRUST) if (folder / file).exists()]:
        raise InvalidInput(f"{folder} holds {held[0]} already: nothing is overwritten, give another folder")
    authority = Authority.open(authority_folder, clock=clock)
    issuer, issuer_key = device_issuer(authority_folder, passphrase=passphrase, clock=clock)
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = (
        rsa.generate_private_key(65537, RSA_BITS) if use_rsa else new_key())
    uri = device_uri(authority.region, name.ae_title, name.ward)
    names = [x509.UniformResourceIdentifier(uri), *_names(authority.region, name)]
    now_s = clock() // _US
    issuer_key_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        begin_certificate(certificate_name(authority.region, f"{PROFILE}/{name.ae_title}"), issuer.subject,
                          key.public_key(), time_of(now_s - BACKDATE_S),
                          min(time_of(now_s + life_s), issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(signature=True, encipherment=use_rsa), critical=True)
        # Both: a modality that sends is called back too (C-MOVE, commitment), and a node that listens sends.
        .add_extension(x509.ExtendedKeyUsage(
            [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key_id),
                       critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    row = _row(certificate, uri, clock)
    keyfiles.make_private_folder(folder)  # what can't be handed over is not registered either
    # Registered before it exists anywhere else: one that was handed over can always be taken back.
    ledger.add_certificate(row)
    registry.audit(ledger, act="issue", subject=f"{uri} {row.serial}", who=who, clock=clock)
    keyfiles.write_new(folder / KEY, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
                       keyfiles.PRIVATE)
    keyfiles.write_new(folder / CERTIFICATE,
                       certificate.public_bytes(Encoding.PEM) + issuer.public_bytes(Encoding.PEM))
    keyfiles.write_new(folder / TRUST, authority.bundle.roots_pem)
    keyfiles.sync_directory(folder)
    return row


def spki_of_file(path: Path) -> str:
    """The pin of the first certificate in a file, PEM or DER: SHA-256 of its key, hex."""
    try:
        data = keyfiles.read(path)
        certificate = (x509.load_pem_x509_certificate(data) if b"-----BEGIN" in data
                       else x509.load_der_x509_certificate(data))
        return spki_fingerprint(certificate.public_key())
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None
    except ValueError:
        raise InvalidInput(f"{path} holds no certificate, in PEM or DER") from None


def _names(region: str, name: DeviceName) -> Sequence[x509.GeneralName]:
    if len(name.dns) + len(name.ip) > NAMES_MAX:
        raise InvalidInput(f"at most {NAMES_MAX} names and addresses")
    domain = region_domain(region)
    for dns in name.dns:
        if not _DNS_NAME.fullmatch(dns):
            raise InvalidInput(f"{dns!r} is no DNS name")
        if dns.lower() == domain or dns.lower().endswith(f".{domain}"):
            raise InvalidInput(f"names below {domain} are those of the region's own members")
    try:
        addresses = [x509.IPAddress(ipaddress.ip_address(ip)) for ip in name.ip]
    except ValueError as error:
        raise InvalidInput(f"{error}") from None  # it quotes the address
    return [*(x509.DNSName(dns.lower()) for dns in name.dns), *addresses]


def _row(certificate: x509.Certificate, uri: str, clock: Clock) -> CertificateRow:
    der = certificate.public_bytes(Encoding.DER)
    return CertificateRow(
        serial=f"{certificate.serial_number:040x}", fingerprint=hashlib.sha256(der).hexdigest(),
        spki=spki_fingerprint(certificate.public_key()), identity=uri, profile=PROFILE, ward=None,
        not_before_us=int(certificate.not_valid_before_utc.timestamp()) * _US,
        not_after_us=int(certificate.not_valid_after_utc.timestamp()) * _US,
        state=registry.ACTIVE, issued_us=clock(), der=der,
    )
