"""Silent, half-spoken and foreign connections on the TLS port: a handshake blocks nobody else, and those that
never end are cut by ARTIM."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from node.dimse import messages
from node.dimse.association import Limits
from node.dimse.requestor import echo
from node.dimse.tls import ClientCertificates, Listener, TlsFiles
from tests.node.serving import Raw, Serving, data, serving
from tests.waiting import wait_for

ARTIM_S = 3.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """A certificate that nobody vouches for: who the node is, is not what this is about."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    (folder / "key.pem").chmod(0o600)
    return TlsFiles(folder / "certificate.pem", folder / "key.pem")


def connected(served: Serving) -> socket.socket:
    port = served.server.tls_port
    assert port is not None
    return socket.create_connection(("127.0.0.1", port), 10)


def over_tls(sock: socket.socket) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(sock)


def echo_over_tls(served: Serving) -> None:
    with Raw.of(over_tls(connected(served))) as raw:
        raw.associate()
        raw.send(data(1, 3, messages.echo_request(1)))
        _, body = raw.receive()
        assert messages.parse(body[6:]).status == 0


def test_silent_handshakes_do_not_hurt_an_echo(tmp_path: Path, files: TlsFiles) -> None:
    """34: 50 that say nothing, 20 that stop inside their first record, 20 after the handshake, 10 that speak
    something else."""
    listener = Listener(files, ClientCertificates.NONE)
    with (
        serving(tmp_path, limits=Limits(artim_s=ARTIM_S), tls=listener,
                certificates_required=False) as served,
        ExitStack() as sockets,
    ):
        echo_over_tls(served)
        began = time.monotonic()
        held = [sockets.enter_context(connected(served)) for _ in range(80)]
        for sock in held[50:70]:
            sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        for sock in held[70:]:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        held += [sockets.enter_context(over_tls(connected(served))) for _ in range(20)]
        for _ in range(5):
            asked = time.monotonic()
            echo_over_tls(served)
            assert time.monotonic() - asked < 1.0
            asked = time.monotonic()
            assert echo(served.peer, "CT1") == 0
            assert time.monotonic() - asked < 1.0
        assert time.monotonic() - began < ARTIM_S, "the connections were no longer there"
        for sock in held:
            sock.settimeout(10)
            with suppress(ConnectionResetError, ssl.SSLError):
                while sock.recv(1000):
                    pass
        assert time.monotonic() - began < ARTIM_S + 5
        wait_for(lambda: served.server.connections == 0, "no connection left")
        wait_for(lambda: not [t for t in threading.enumerate() if t.name == "dimse"], "no thread left")
