"""Certificates for one run of the bench: an authority, a server on loopback, a sender. Made anew each time;
the keys live in the folder of the run."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.profiles import device_uri
from miss.load.sender import CALLING_AE
from miss.load.temporary_node import REGION
from node.dimse.tls import TlsFiles

LIFE = datetime.timedelta(days=2)
KEY_BITS = 2048  # RSA: every peer takes it, and a handshake is once for each association


@dataclass(frozen=True, slots=True)
class Certificates:
    """What a server and its sender show and trust."""

    trust: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path

    @property
    def sender(self) -> TlsFiles:
        return TlsFiles(self.client, self.client_key, self.trust)


def make_certificates(folder: Path) -> Certificates:
    """Writes them into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificates(*(folder / name for name in (
        "trust.pem", "server.pem", "server.key", "client.pem", "client.key")))
    authority_key = rsa.generate_private_key(65537, KEY_BITS)
    authority = (_begin("bench authority", "bench authority", authority_key)
                 .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                 .add_extension(_usage(signs_certificates=True), critical=True)
                 .sign(authority_key, hashes.SHA256()))
    made.trust.write_bytes(authority.public_bytes(Encoding.PEM))
    # What ties a certificate to an AE title for a node; the peers do not look at it.
    device = x509.UniformResourceIdentifier(device_uri(REGION, CALLING_AE))
    here: list[x509.GeneralName] = [
        x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    for name, usage, names, certificate, key_file in (
        ("server", ExtendedKeyUsageOID.SERVER_AUTH, here, made.server, made.server_key),
        ("client", ExtendedKeyUsageOID.CLIENT_AUTH, [*here, device], made.client, made.client_key),
    ):
        key = rsa.generate_private_key(65537, KEY_BITS)
        signed = (_begin(f"bench {name}", "bench authority", key)
                  .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                  .add_extension(_usage(signs_certificates=False), critical=True)
                  .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
                  .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
                                 critical=False)
                  .add_extension(x509.SubjectAlternativeName(names), critical=False)
                  .sign(authority_key, hashes.SHA256()))
        certificate.write_bytes(signed.public_bytes(Encoding.PEM))
        key_file.touch(mode=0o600)
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return made


def _begin(subject: str, issuer: str, key: rsa.RSAPrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (x509.CertificateBuilder().subject_name(_name(subject)).issuer_name(_name(issuer))
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + LIFE)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False,
        key_encipherment=not signs_certificates, data_encipherment=False, key_agreement=False,
        key_cert_sign=signs_certificates, crl_sign=signs_certificates, encipher_only=False,
        decipher_only=False)
