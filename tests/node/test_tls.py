"""DICOM over TLS: who is let in by which certificate, what is not agreed on, that nobody holds anybody up."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from cryptography import x509
from pydicom import dcmread

from archive.errors import SettingsError
from archive.ledger import Device
from certs.devices import spki_of_file
from node.dimse import pdu
from node.dimse.association import Limits
from node.dimse.contexts import IMPLICIT_LITTLE, VERIFICATION
from node.dimse.errors import AssociationEnded, ConnectionLost, Rejected, TimedOut
from node.dimse.requestor import ECHO_CONTEXT, Peer, Requestor, echo
from node.dimse.tls import ClientCertificates, Dialling, HandshakeFailed, Listener, TlsFiles, TlsWire
from tests.datasets import make_instance
from tests.node.certificates import REGION, WARD, Papers, Region
from tests.node.serving import AE_TITLE, QUICK, Serving, echo_request, serving
from tests.node.storing import store, storing
from tests.peers import dcmtk
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> Region:
    return Region(tmp_path_factory.mktemp("region"))


@pytest.fixture(scope="module")
def ct1(region: Region) -> Papers:
    return region.issue("CT1")


@pytest.fixture(scope="module")
def listening(region: Region) -> Papers:
    return region.issue("MISS", into="listener")


@contextmanager
def tls_serving(folder: Path, papers: Papers, clients: ClientCertificates = ClientCertificates.REQUIRE,
                trust: Path | None = None, limits: Limits = QUICK) -> Iterator[Serving]:
    listener = Listener(TlsFiles(papers.certificate, papers.key, trust or papers.trust), clients)
    with serving(folder, tls=listener, region=REGION, ward=WARD, limits=limits,
                 certificates_required=clients is ClientCertificates.REQUIRE) as running:
        yield running


@pytest.fixture
def served(tmp_path: Path, listening: Papers) -> Iterator[Serving]:
    with tls_serving(tmp_path, listening) as running:
        yield running


def peer(served: Serving, tls: Dialling | None) -> Peer:
    return Peer("127.0.0.1", served.tls_port, AE_TITLE, tls)


def rejection(peer: Peer, calling_ae: str) -> str:
    with pytest.raises(Rejected) as caught:
        echo(peer, calling_ae)
    return caught.value.rejection.triple


def context_of(papers: Papers | None, trust: Path) -> ssl.SSLContext:
    """A client's context of plain Python."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(trust)
    if papers is not None:
        context.load_cert_chain(papers.certificate, papers.key)
    return context


def connected(served: Serving, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(socket.create_connection(("127.0.0.1", served.tls_port), 10),
                               server_hostname="127.0.0.1", suppress_ragged_eofs=False)


# Who comes in


def test_a_device_with_its_certificate(served: Serving, ct1: Papers) -> None:
    assert echo(peer(served, ct1.dialling()), "CT1") == 0
    entry = served.log(1)[0]
    assert (entry.outcome, entry.transport, entry.ended) == ("accepted", "TLSv1.3", "released")
    fingerprint = subprocess.run(
        ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", ct1.certificate],
        capture_output=True, text=True).stdout
    assert fingerprint.strip().rpartition("=")[2].replace(":", "").lower() in entry.certificate
    assert entry.certificate.startswith("CN=device/CT1")


def test_tls_1_2_is_enough(served: Serving, ct1: Papers) -> None:
    dialling = ct1.dialling()
    dialling.context.maximum_version = ssl.TLSVersion.TLSv1_2
    for _ in range(3):
        assert echo(peer(served, dialling), "CT1") == 0
    assert {entry.transport for entry in served.log(3)} == {"TLSv1.2"}


def test_dcmtk_echoes(served: Serving, ct1: Papers, region: Region) -> None:
    old = region.issue("OLDMR", ward=WARD, use_rsa=True)
    served.ledger.add_device(Device("OLDMR", "127.0.0.1"))
    for papers, ae_title in ((ct1, "CT1"), (old, "OLDMR")):
        ran = subprocess.run(
            [dcmtk("echoscu"), "+tls", papers.key, papers.certificate, "+cf", papers.trust, "-aet", ae_title,
             "-aec", AE_TITLE, "127.0.0.1", str(served.tls_port)], capture_output=True, text=True, timeout=30)
        assert ran.returncode == 0, ran.stderr


def test_dcmtk_stores(tmp_path: Path, listening: Papers, ct1: Papers) -> None:
    instances = [make_instance(number=n, rows=rows, columns=512) for n, rows in enumerate((16, 400, 3000))]
    files = [tmp_path / f"{n}.dcm" for n in range(3)]
    for file, instance in zip(files, instances, strict=True):
        file.write_bytes(instance.part10)
    listener = Listener(TlsFiles(listening.certificate, listening.key, listening.trust))
    with storing(tmp_path, tls=listener, region=REGION) as served:
        ran = subprocess.run(
            [dcmtk("storescu"), "-xe", "+tls", ct1.key, ct1.certificate, "+cf", ct1.trust, "-aet", "CT1",
             "-aec", AE_TITLE, "127.0.0.1", str(served.tls_port), *files],
            capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        for instance in instances:
            stored, = served.stored(instance)
            pixels = dcmread(BytesIO(instance.part10)).PixelData
            assert pixels in served.dataset(stored)
        entry = served.log(1)[0]
        assert entry.bytes_in > 3_300_000 and entry.operations == '{"C-STORE 0000": 3}'


def test_a_certificate_of_another_ae_title(served: Serving, ct1: Papers) -> None:
    """30: told the same as a stranger; the log says which check failed, and whose certificate it was."""
    served.ledger.add_device(Device("MR1", "127.0.0.1"))
    assert rejection(peer(served, ct1.dialling()), "MR1") == "1/1/3"
    entry = served.log(1)[0]
    assert entry.reason == "the certificate it showed is of another AE title or another ward"
    assert entry.certificate.startswith("CN=device/CT1") and entry.calling_ae == "MR1"


def test_a_certificate_of_another_ward(served: Serving, region: Region) -> None:
    here, there = region.issue("CT1", ward=WARD, into="here"), region.issue("CT1", ward="a/b", into="there")
    assert echo(peer(served, here.dialling()), "CT1") == 0
    assert rejection(peer(served, there.dialling()), "CT1") == "1/1/3"


def test_a_member_of_the_region_is_no_device(served: Serving, region: Region) -> None:
    """A node's own certificate leads to the same root, and names no AE title."""
    from certs import identity as identities
    from certs.authority import Authority
    from certs.profiles import Member

    folder = region.folder / "identity"
    key = identities.pending_key(folder)
    authority = Authority.open(region.folder / "ca")
    made = authority.issue(Member.node(REGION, WARD), key.public_key())
    identity = identities.install(folder, identities.Issued(
        made.pem + authority.bundle.issuing_pem, authority.bundle.roots_pem, 1))
    dialling = Dialling.by(trust=identity.current_roots_path, certificate=identity.chain_path,
                           key=identity.key_path)
    assert rejection(peer(served, dialling), "CT1") == "1/1/3"
    assert served.log(1)[0].reason.startswith("the certificate it showed names no AE title")


def test_a_pinned_certificate(served: Serving, region: Region, ct1: Papers) -> None:
    other = region.issue("CT1", into="other")
    served.ledger.add_device(Device("CT1", "127.0.0.1", certificate=spki_of_file(ct1.certificate)))
    assert echo(peer(served, ct1.dialling()), "CT1") == 0
    assert rejection(peer(served, other.dialling()), "CT1") == "1/1/3"
    assert served.log(2)[0].reason == "the certificate it showed is not the one that is pinned"
    assert rejection(served.peer, "CT1") == "1/1/3"
    assert served.log(3)[0].reason == "the device has a pinned certificate, and showed none"


def self_signed(folder: Path) -> Papers:
    """A hospital's own authority, and a certificate of it: no AE title, none of the region's business."""
    folder.mkdir()
    for arguments in (
        ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "trust.pem", "-days",
         "30", "-subj", "/CN=Hospital CA"],
        ["req", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "request.pem", "-subj",
         "/O=Hospital/CN=ct1.hospital.example"],
        ["x509", "-req", "-in", "request.pem", "-CA", "trust.pem", "-CAkey", "ca.key", "-CAcreateserial",
         "-days", "30", "-out", "certificate.pem"],
    ):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
    return Papers(folder)


def test_another_authority_is_trusted_by_pin_alone(tmp_path: Path, listening: Papers) -> None:
    hospital = self_signed(tmp_path / "hospital")
    dialling = hospital.dialling(listening.trust)
    with tls_serving(tmp_path, listening, trust=hospital.trust) as served:
        assert rejection(peer(served, dialling), "CT1") == "1/1/3"
        assert served.log(1)[0].reason.startswith("the certificate it showed names no AE title")
        assert "ct1.hospital.example" in served.log(1)[0].certificate
        served.ledger.add_device(Device("CT1", "*", certificate=spki_of_file(hospital.certificate)))
        assert echo(peer(served, dialling), "CT1") == 0


@pytest.mark.parametrize(("transport", "plain", "tls"), [
    ("any", "", ""), ("plain", "", "the device may come over the plain port alone"),
    ("tls", "the device may come over TLS alone", ""),
])
def test_a_transport_of_its_own(served: Serving, ct1: Papers, transport: str, plain: str, tls: str) -> None:
    served.ledger.add_device(Device("CT1", "127.0.0.1", transport=transport))
    for count, (whom, reason) in enumerate(((served.peer, plain), (peer(served, ct1.dialling()), tls)), 1):
        if reason:
            assert rejection(whom, "CT1") == "1/1/3"
        else:
            assert echo(whom, "CT1") == 0
        assert served.log(count)[0].reason == reason


@pytest.mark.parametrize("clients", [ClientCertificates.ASK, ClientCertificates.NONE])
def test_certificates_that_are_not_required(tmp_path: Path, listening: Papers, ct1: Papers,
                                            clients: ClientCertificates) -> None:
    with tls_serving(tmp_path, listening, clients) as served:
        bare = Dialling.by(trust=listening.trust)
        assert echo(peer(served, bare), "CT1") == 0
        served.ledger.add_device(Device("MR1", "127.0.0.1"))
        if clients is ClientCertificates.ASK:  # one that is shown is looked at all the same
            assert rejection(peer(served, ct1.dialling()), "MR1") == "1/1/3"
        served.ledger.add_device(Device("CT1", "*", certificate=spki_of_file(ct1.certificate)))
        assert rejection(peer(served, bare), "CT1") == "1/1/3"


# What is not agreed on


def test_no_certificate_or_one_of_another_region(served: Serving, listening: Papers, tmp_path: Path) -> None:
    """29: the handshake fails, and the log says so without a row for each."""
    stranger = Region(tmp_path / "elsewhere").issue("CT1")
    for dialling in (Dialling.by(trust=listening.trust), stranger.dialling(listening.trust)):
        for _ in range(3):
            with pytest.raises(AssociationEnded):
                echo(peer(served, dialling), "CT1")
    wait_for(lambda: sum(one.times for one in served.ledger.connections()) == 6, "all are counted")
    rows = served.ledger.connections(refused_only=True)
    assert {(row.outcome, row.transport, row.times) for row in rows} == {("failed", "TLS", 3)}
    assert sorted(row.ended for row in rows) == [
        "its certificate is not accepted: unable to get local issuer certificate",
        "peer did not return a certificate"]


def test_the_listener_has_to_be_trusted_too(served: Serving, ct1: Papers, tmp_path: Path) -> None:
    stranger = Region(tmp_path / "elsewhere").issue("CT1")
    with pytest.raises(HandshakeFailed, match="not accepted"):
        echo(peer(served, ct1.dialling(stranger.trust)), "CT1")
    with pytest.raises(HandshakeFailed, match="[Hh]ostname mismatch"):
        echo(peer(served, replace(ct1.dialling(), server_name="elsewhere.example")), "CT1")


@pytest.mark.parametrize("flags", [
    ["-tls1"], ["-tls1_1"], ["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
    ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA256:AES128-SHA:AES128-GCM-SHA256:@SECLEVEL=0"],
    ["-tls1_2", "-cipher", "DHE-RSA-AES128-GCM-SHA256"],
])
def test_old_protocols_and_suites(served: Serving, ct1: Papers, flags: list[str]) -> None:
    """24."""
    assert "CONNECTION ESTABLISHED" not in shown(served, ct1, *flags)


def test_what_openssl_sees(served: Serving, ct1: Papers) -> None:
    said = shown(served, ct1, "-tls1_2")
    assert "CONNECTION ESTABLISHED" in said and "AES128-GCM-SHA256" in said
    assert "CONNECTION ESTABLISHED" in shown(served, ct1, "-tls1_3")


def shown(served: Serving, papers: Papers, *flags: str) -> str:
    ran = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{served.tls_port}", "-brief", "-cert",
         papers.certificate, "-cert_chain", papers.certificate, "-key", papers.key, *flags],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    return (ran.stdout + ran.stderr).decode(errors="replace")


def test_no_renegotiation(served: Serving, ct1: Papers) -> None:
    ran = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{served.tls_port}", "-tls1_2", "-cert",
         ct1.certificate, "-cert_chain", ct1.certificate, "-key", ct1.key],
        input=b"R\n", capture_output=True, timeout=30)
    assert b"RENEGOTIATING" in ran.stdout + ran.stderr
    assert b"no renegotiation" in ran.stdout + ran.stderr


def test_plain_at_the_tls_port_and_tls_at_the_plain_port(served: Serving, ct1: Papers) -> None:
    with pytest.raises(AssociationEnded):
        echo(Peer("127.0.0.1", served.tls_port, AE_TITLE), "CT1")
    with pytest.raises(AssociationEnded):
        echo(replace(served.peer, tls=ct1.dialling()), "CT1")
    reasons = {entry.ended for entry in served.log(2)}
    assert "it speaks TLS, and this is the plain port" in reasons and len(reasons) == 2


# Nobody holds anybody up


@pytest.mark.parametrize("silent", [1, 50])
def test_silent_connections_delay_nobody(served: Serving, ct1: Papers, silent: int) -> None:
    """34."""
    with ExitStack() as held:
        for _ in range(silent):
            held.enter_context(socket.create_connection(("127.0.0.1", served.tls_port)))
        for whom in (peer(served, ct1.dialling()), served.peer):
            started = time.monotonic()
            assert echo(whom, "CT1") == 0
            assert time.monotonic() - started < 1
    wait_for(lambda: served.server.connections == 0, "their threads are gone")


def test_a_silent_handshake_ends_at_artim(served: Serving) -> None:
    with socket.create_connection(("127.0.0.1", served.tls_port), timeout=10) as sock:
        started = time.monotonic()
        assert sock.recv(1) == b""
        assert 0.8 < time.monotonic() - started < 5
    assert served.log(1)[0].ended == "the TLS handshake was not done in time"


def client_hello() -> bytes:
    out = ssl.MemoryBIO()
    hello = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="x")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    return out.read()


def trickle(sock: socket.socket, octets: bytes, limit_s: float) -> float:
    """Send octet by octet until the other side ends it; how long that took."""
    started = time.monotonic()
    sock.settimeout(0.02)
    for octet in octets:
        try:
            sock.send(bytes((octet,)))
            if sock.recv(1) == b"":
                break
        except TimeoutError:
            pass
        except OSError:
            break
        assert time.monotonic() - started < limit_s
    return time.monotonic() - started


def test_a_slow_handshake_is_cut_at_artim(served: Serving) -> None:
    with socket.create_connection(("127.0.0.1", served.tls_port)) as sock:
        assert 0.8 < trickle(sock, client_hello(), 5) < 5


def test_a_slow_request_after_the_handshake_is_cut_at_artim(served: Serving, ct1: Papers) -> None:
    """35, with each octet in a record of its own."""
    with connected(served, context_of(ct1, ct1.trust)) as sock:
        assert 0.8 < trickle(sock, pdu.encode_request(echo_request()), 5) < 5


def test_a_record_that_never_ends_is_cut_at_artim(served: Serving, ct1: Papers) -> None:
    """The receive's limit holds inside a record as well."""
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context_of(ct1, ct1.trust).wrap_bio(inward, outward, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", served.tls_port), 10) as sock:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outward.read())
                inward.write(sock.recv(65536))
        client.write(pdu.encode_request(echo_request()))
        assert 0.8 < trickle(sock, outward.read(), 5) < 5


# Certificates change


def replace_files(papers: Papers, newer: Papers) -> None:
    for name in ("key.pem", "certificate.pem"):
        os.replace(shutil.copy2(newer.folder / name, papers.folder / f".{name}"), papers.folder / name)


def serial(served: Serving, trust: Path, papers: Papers) -> int:
    with connected(served, context_of(papers, trust)) as sock:
        der = sock.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def test_renewal_under_load(tmp_path: Path, region: Region, ct1: Papers) -> None:
    """20, for the DICOM port: no connection fails, the next handshake shows the new one, and associations
    that were open go on."""
    papers, newer = region.issue("MISS", into="first"), region.issue("MISS", into="second")
    failures: list[AssociationEnded] = []
    done = threading.Event()
    with tls_serving(tmp_path, papers) as served:
        def load() -> None:
            dialling = ct1.dialling()
            while not done.is_set():
                try:
                    assert echo(peer(served, dialling), "CT1") == 0
                except AssociationEnded as error:
                    failures.append(error)

        threads = [threading.Thread(target=load) for _ in range(3)]
        with Requestor.connect(peer(served, ct1.dialling()), "CT1", [ECHO_CONTEXT], limits=QUICK) as held:
            before = serial(served, ct1.trust, ct1)
            for thread in threads:
                thread.start()
            wait_for(lambda: len(served.ledger.connections(1000)) > 20, "some went before")
            replace_files(papers, newer)
            wait_for(lambda: serial(served, ct1.trust, ct1) != before, "the new one is shown")
            known = len(served.ledger.connections(1000))
            wait_for(lambda: len(served.ledger.connections(1000)) > known + 20, "some went after")
            done.set()
            for thread in threads:
                thread.join(10)
            assert held.echo() == 0
    assert failures == []


def test_a_pair_that_does_not_fit_changes_nothing(tmp_path: Path, region: Region, ct1: Papers,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    papers = region.issue("MISS", into="fitting")
    whole = papers.certificate.read_bytes()
    with tls_serving(tmp_path, papers) as served:
        before = serial(served, ct1.trust, ct1)
        for broken in (b"", b"-----BEGIN CERTIFICATE-----\nnonsense\n", ct1.certificate.read_bytes()):
            papers.certificate.write_bytes(broken)
            assert serial(served, ct1.trust, ct1) == before
        papers.certificate.unlink()
        assert serial(served, ct1.trust, ct1) == before
        assert "stay in use" in caplog.text
        papers.certificate.write_bytes(whole)
        assert serial(served, ct1.trust, ct1) == before


def test_another_authority_counts_for_the_next_connection(tmp_path: Path, listening: Papers, ct1: Papers
                                                          ) -> None:
    trust = tmp_path / "trust.pem"
    shutil.copy(listening.trust, trust)
    with tls_serving(tmp_path, listening, trust=trust) as served:
        dialling = ct1.dialling()
        dialling.context.maximum_version = ssl.TLSVersion.TLSv1_2
        assert echo(peer(served, dialling), "CT1") == 0
        shutil.copy(Region(tmp_path / "elsewhere").issue("X").trust, trust)
        with pytest.raises(AssociationEnded):
            echo(peer(served, dialling), "CT1")


def test_an_expired_certificate(served: Serving, region: Region, tmp_path: Path) -> None:
    from certs.devices import DeviceName, issue_device

    out = tmp_path / "old"
    issue_device(region.folder / "ca", region.ledger, DeviceName("CT1"), out, life_s=1,
                 clock=lambda: int((time.time() - 3600) * 1e6))
    with pytest.raises(AssociationEnded):
        echo(peer(served, Papers(out).dialling()), "CT1")
    assert served.log(1)[0].ended == "its certificate is not accepted: certificate has expired"


# The wire


def test_large_objects_both_ways(tmp_path: Path, listening: Papers, ct1: Papers) -> None:
    instances = [make_instance(number=n, padding=padding)
                 for n, padding in enumerate((16_000, 16_384, 100_001, 7_000_000, 20_000_000))]
    listener = Listener(TlsFiles(listening.certificate, listening.key, listening.trust))
    with storing(tmp_path, tls=listener, region=REGION) as served:
        first = instances[0]
        proposed = [pdu.ProposedContext(1, first.sop_class_uid, (first.transfer_syntax_uid,))]
        with Requestor.connect(peer(served, ct1.dialling()), "CT1", proposed, limits=QUICK) as requestor:
            for instance in instances:
                assert store(requestor, instance) == 0
        for instance in instances:
            stored, = served.stored(instance)
            assert served.dataset(stored) == instance.dataset


def test_the_end_of_a_connection_is_told_from_a_cut(served: Serving, ct1: Papers) -> None:
    for clean in (True, False):
        sock = connected(served, context_of(ct1, ct1.trust))
        sock.sendall(pdu.encode_request(echo_request()))
        assert sock.recv(1) == bytes((pdu.PduType.ASSOCIATE_AC,))
        if clean:
            sock.settimeout(0)
            with pytest.raises(ssl.SSLError):
                sock.unwrap()  # sends close_notify, and does not wait
        socket.socket.shutdown(sock, socket.SHUT_WR)
        sock.close()
    entries = served.log(2)
    assert [entry.ended for entry in reversed(entries)] == [
        "the peer closed the connection", "the connection was cut: no close_notify"]


def test_we_close_with_close_notify(served: Serving, ct1: Papers) -> None:
    with connected(served, context_of(ct1, ct1.trust)) as sock:
        sock.sendall(pdu.encode_request(echo_request("UNKNOWN")))
        octets = b""
        while piece := sock.recv(100):  # raises at an end without close_notify
            octets += piece
        assert octets == pdu.encode_rejection(pdu.Rejection(1, 1, 3))


def test_reading_and_writing_by_two_threads(ct1: Papers, listening: Papers) -> None:
    """OpenSSL's state is touched by one at a time, and neither waits for the other's peer."""
    ours, theirs = tcp_pair()
    echoing = Listener(TlsFiles(listening.certificate, listening.key, listening.trust)).context().wrap_socket(
        theirs, server_side=True, do_handshake_on_connect=False)

    def answer() -> None:
        echoing.do_handshake()
        with echoing:
            while octets := echoing.recv(65536):
                echoing.sendall(octets)

    thread = threading.Thread(target=answer)
    thread.start()
    wire = ct1.dialling().wrap(ours, "127.0.0.1", timeout_s=10, buffer_bytes_max=1 << 18, send_timeout_s=10)
    pieces = [os.urandom(size) for size in (1, 5, 16_384, 70_000, 300_000)] * 10

    def write() -> None:
        for piece in pieces:
            wire.send_vector([piece[:3], piece[3:]])

    writer = threading.Thread(target=write)
    writer.start()
    for piece in pieces:
        assert wire.read(len(piece)) == piece
    writer.join(10)
    wire.close()
    thread.join(10)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


def test_a_peer_that_does_not_read(ct1: Papers, listening: Papers) -> None:
    ours, theirs = tcp_pair()
    context = Listener(TlsFiles(listening.certificate, listening.key, listening.trust)).context()
    wire = TlsWire(theirs, context, send_timeout_s=0.5)
    thread = threading.Thread(target=lambda: context_of(ct1, ct1.trust).wrap_socket(
        ours, server_hostname="127.0.0.1").detach())
    thread.start()
    wire.handshake(10)
    thread.join(10)
    started = time.monotonic()
    with pytest.raises(TimedOut, match="does not read"):
        for _ in range(10_000):
            wire.send(bytes(1 << 20))
    assert time.monotonic() - started < 10
    wire.cut()
    wire.close()


def test_we_dial_dcmtk(tmp_path: Path, listening: Papers, ct1: Papers) -> None:
    """As requestor, with our certificate, which DCMTK's storescp demands."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    received = tmp_path / "received"
    received.mkdir()
    peer = Peer("127.0.0.1", port, "STORESCP", ct1.dialling())
    instance = make_instance(rows=1500, columns=512)
    process = subprocess.Popen([dcmtk("storescp"), "+tls", listening.key, listening.certificate, "+cf",
                                listening.trust, "-od", received, "+B", str(port)])
    try:
        wait_for(lambda: answers(peer), "storescp answers")
        proposed = [pdu.ProposedContext(1, instance.sop_class_uid, (instance.transfer_syntax_uid,))]
        with Requestor.connect(peer, "CT1", proposed) as requestor:
            assert store(requestor, instance) == 0
        file, = received.iterdir()
        assert file.read_bytes().endswith(instance.dataset)
        with pytest.raises(AssociationEnded):
            echo(replace(peer, tls=Dialling.by(trust=ct1.trust)), "CT1", timeout_s=5)
    finally:
        process.kill()
        process.wait(10)


def answers(peer: Peer) -> bool:
    try:
        return echo(peer, "CT1", timeout_s=5) == 0
    except AssociationEnded:
        return False


def test_a_dialled_peer_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialling = Dialling(ssl.create_default_context())
        silent = Peer("127.0.0.1", listener.getsockname()[1], AE_TITLE, dialling)
        with pytest.raises(TimedOut):
            echo(silent, "CT1", timeout_s=0.5)


def test_stop_ends_what_is_open(tmp_path: Path, listening: Papers, ct1: Papers) -> None:
    with ExitStack() as held, tls_serving(tmp_path, listening) as served:
        requestors = [Requestor.connect(peer(served, ct1.dialling()), "CT1", [ECHO_CONTEXT], limits=QUICK)
                      for _ in range(3)]
        for requestor in requestors:
            held.callback(requestor.association.wire.close)
        silent = held.enter_context(socket.create_connection(("127.0.0.1", served.tls_port)))
        started = time.monotonic()
        served.server.stop(5)
        assert time.monotonic() - started < 4 and served.server.connections == 0
        for requestor in requestors:
            with pytest.raises(AssociationEnded):
                requestor.echo()
        silent.settimeout(5)
        while silent.recv(100):  # an alert, perhaps
            pass
    with pytest.raises(ConnectionLost):
        echo(Peer("127.0.0.1", served.tls_port, AE_TITLE, ct1.dialling()), "CT1")


def test_a_request_of_128_contexts(served: Serving, ct1: Papers) -> None:
    syntaxes = tuple(f"1.2.840.113619.{n}" for n in range(20))
    contexts = tuple(pdu.ProposedContext(2 * n + 1, VERIFICATION, (*syntaxes, IMPLICIT_LITTLE))
                     for n in range(128))
    with Requestor.connect(peer(served, ct1.dialling()), "CT1", contexts, limits=QUICK) as requestor:
        assert len(requestor.association.contexts) == 128


# The files


def test_files_that_do_not_fit(listening: Papers, ct1: Papers, tmp_path: Path) -> None:
    nothing, garbage, locked = tmp_path / "nothing", tmp_path / "garbage", tmp_path / "locked.pem"
    garbage.write_bytes(b"no PEM")
    subprocess.run(["openssl", "pkcs8", "-topk8", "-in", listening.key, "-out", locked, "-passout", "pass:x"],
                   check=True, capture_output=True)
    good = TlsFiles(listening.certificate, listening.key, listening.trust)
    for files, names in (
        (replace(good, certificate=nothing), "nothing"), (replace(good, key=nothing), "nothing"),
        (replace(good, trust=nothing), "nothing"), (replace(good, trust=garbage), "garbage"),
        (replace(good, certificate=garbage), "garbage"), (replace(good, key=ct1.key), "listener/certificate"),
        (replace(good, key=locked), "passphrase"), (replace(good, trust=None), "no authority"),
        (replace(good, trust=listening.key), "no certificate"),
    ):
        with pytest.raises(SettingsError, match=names):
            Listener(files)
    Listener(replace(good, trust=None), ClientCertificates.NONE)
    for certificate, key, trust in ((listening.certificate, None, None), (None, listening.key, None),
                                    (None, None, nothing)):
        with pytest.raises(SettingsError):
            Dialling.by(trust=trust, certificate=certificate, key=key)
