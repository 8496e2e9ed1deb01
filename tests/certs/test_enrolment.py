"""Enrolment over real TLS: who gets in, what of a request counts, and what an impostor gets to hear."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from archive.errors import Forbidden, InvalidInput, NotAuthenticated, SettingsError, Unavailable
from certs import identity as identities
from certs import registry
from certs.authority import Authority, hub_identity
from certs.certificate import new_key, read_pem
from certs.enrolment import BODY_BYTES_MAX, CONNECTIONS_MAX, FAILURES_PER_MINUTE, Failures
from certs.identity import Identity
from certs.invites import InviteText
from certs.joining import enrol
from certs.profiles import Profile
from certs.requests import make_request
from tests.certs.region import RunningHub
from tests.waiting import wait_for


def request_pem(key: Any = None, **extensions: Any) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "asked-for")]))
    for extension in extensions.values():
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key or new_key(), hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def post(hub: RunningHub, body: Any, *, path: str = "/enrol", method: str = "POST") -> tuple[int, Any]:
    """A request to the enrolment port as anybody could send it."""
    context = ssl.create_default_context(cadata=hub.authority.bundle.roots_pem.decode())
    plain = socket.create_connection(("127.0.0.1", hub.enrolment.port), 10)
    with context.wrap_socket(plain, server_hostname="hub.liguria.miss.internal") as connection:
        assert connection.version() == "TLSv1.3"
        client = http.client.HTTPConnection("127.0.0.1", hub.enrolment.port)
        client.sock = connection
        client.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
        response = client.getresponse()
        raw = response.read()
    return response.status, json.loads(raw) if raw.startswith(b"{") else raw


def ask(hub: RunningHub, text: InviteText, csr: str, secret: str | None = None) -> tuple[int, Any]:
    return post(hub, {"id": text.id, "secret": secret or text.secret, "csr": csr})


def audited(hub: RunningHub) -> list[tuple[str, str]]:
    return [(row.act, row.outcome) for row in hub.ledger.audit_rows()]


def test_an_invite_makes_a_member_with_the_invite_s_names(hub: RunningHub, tmp_path: Path) -> None:
    identity = enrol(hub.invite(), tmp_path / "node")
    assert identity == Identity.load(tmp_path / "node")
    assert (identity.uri, identity.profile) == ("spiffe://liguria/node/san-martino/radiology", Profile.NODE)
    assert (identity.hospital, identity.ward_name, identity.issuer) == ("San Martino", "Radiology", "HSM")
    assert identity.hub_address == hub.address
    row = hub.ledger.certificate(identity.fingerprint)
    assert row is not None and row.der == identity.certificate.der
    assert (row.identity, row.ward, row.state) == (identity.uri, "san-martino/radiology", "active")
    assert audited(hub) == [("enrol", "success"), ("invite", "success")]
    portal = enrol(hub.invite("main", profile=Profile.PORTAL), tmp_path / "portal")
    assert (portal.uri, portal.ward) == ("spiffe://liguria/portal/main", "")


def test_the_key_is_on_the_member_s_disk_alone(hub: RunningHub, tmp_path: Path) -> None:
    identity = enrol(hub.invite(), tmp_path / "elsewhere" / "node")
    secret_line = identity.key_pem.split(b"\n")[1]
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and secret_line in path.read_bytes()]
    assert holders == [identity.key_path]


def test_the_same_invite_and_key_give_the_same_certificate_again(hub: RunningHub, tmp_path: Path) -> None:
    text, csr = InviteText.parse(hub.invite()), request_pem()
    first, again = ask(hub, text, csr), ask(hub, text, csr)
    assert first[0] == 200 and again == first
    assert len(hub.ledger.certificates()) == 1


def test_many_at_once_with_one_invite_and_key_get_one_certificate(hub: RunningHub) -> None:
    text, csr = InviteText.parse(hub.invite()), request_pem()
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: ask(hub, text, csr), range(8)))
    assert [status for status, _ in replies] == [200] * 8
    assert len({reply["chain"] for _, reply in replies}) == 1
    assert len(hub.ledger.certificates()) == 1


def test_a_lost_reply_is_asked_for_again_with_the_same_key(hub: RunningHub, tmp_path: Path) -> None:
    line = hub.invite()
    text = InviteText.parse(line)
    with losing_the_reply_to_enrol(hub) as relay:
        moved = str(InviteText(f"127.0.0.1:{relay.port}", text.id, text.secret, text.pins))
        with pytest.raises(Unavailable):
            enrol(moved, tmp_path / "node")
    given = hub.ledger.certificates()
    assert len(given) == 1 and not identities.exists(tmp_path / "node")
    assert enrol(line, tmp_path / "node").certificate.der == given[0].der
    assert len(hub.ledger.certificates()) == 1


class losing_the_reply_to_enrol:
    """A relay that lets the first connection (the bundle) through and cuts the second before its reply."""

    def __init__(self, hub: RunningHub) -> None:
        self._target = ("127.0.0.1", hub.enrolment.port)
        self._ledger = hub.ledger

    def __enter__(self) -> losing_the_reply_to_enrol:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _run(self) -> None:
        for number in (1, 2):
            member, _ = self._listener.accept()
            hub = socket.create_connection(self._target)
            threading.Thread(target=self._pump, args=(member, hub), daemon=True).start()
            self._pump(hub, member, cut=number == 2)

    def _pump(self, source: socket.socket, sink: socket.socket, cut: bool = False) -> None:
        try:
            while data := source.recv(65536):
                if cut and self._ledger.certificates():
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_another_key_burns_the_invite_and_alarms(hub: RunningHub, tmp_path: Path) -> None:
    line = hub.invite()
    member = enrol(line, tmp_path / "first")
    with pytest.raises(Forbidden, match=r"other-key.*burnt"):
        enrol(line, tmp_path / "second")
    assert not identities.exists(tmp_path / "second")
    assert audited(hub)[0] == (registry.SECURITY_ALERT, "other-key")
    with pytest.raises(Forbidden, match="burnt"):
        enrol(line, tmp_path / "third")
    assert [row.fingerprint for row in hub.ledger.certificates()] == [member.fingerprint]


def test_wrong_secrets_cost_tries_and_then_the_invite_is_locked(hub: RunningHub) -> None:
    text, csr = InviteText.parse(hub.invite()), request_pem()
    for left in (4, 3, 2, 1, 0):
        status, reply = ask(hub, text, csr, "A" * 43)
        assert (status, reply["code"]) == (403, "wrong-secret")
        assert f"{left} tries left" in reply["message"]
    assert ask(hub, text, csr)[1]["code"] == "burnt"  # the right secret comes too late
    assert audited(hub).count(("enrol", "wrong-secret")) == 5
    assert hub.ledger.certificates() == []


def test_an_expired_invite_is_refused_and_audited(hub: RunningHub, tmp_path: Path) -> None:
    line = hub.invite(life_s=-1)
    with pytest.raises(Forbidden, match=r"expired.*ask for a new one"):
        enrol(line, tmp_path / "node")
    assert audited(hub)[0] == ("enrol", "expired")
    assert hub.ledger.certificates() == []


def test_an_unknown_invite_is_refused_and_leaves_the_audit_log_alone(hub: RunningHub) -> None:
    text = InviteText.parse(hub.invite())
    status, reply = post(hub, {"id": "0" * 16, "secret": text.secret, "csr": request_pem()})
    assert (status, reply["code"]) == (403, "unknown-invite")
    assert audited(hub) == [("invite", "success")]


def test_an_address_that_fails_often_is_held_off_and_one_that_succeeds_is_not(hub: RunningHub) -> None:
    for _ in range(FAILURES_PER_MINUTE + 2):
        assert ask(hub, InviteText.parse(hub.invite()), request_pem())[0] == 200
    text = InviteText.parse(hub.invite())
    statuses = [post(hub, {"id": "0" * 16, "secret": "x", "csr": request_pem()})[0]
                for _ in range(FAILURES_PER_MINUTE + 1)]
    assert statuses == [403] * FAILURES_PER_MINUTE + [429]
    assert ask(hub, text, request_pem())[0] == 429
    row = hub.ledger.invite(text.id)
    assert row is not None and (row.state, row.tries_left) == ("open", 5)


def test_failures_are_forgotten_after_a_minute_and_bounded() -> None:
    now_s = [1000.0]
    failures = Failures(2, lambda: now_s[0])
    failures.add("a")
    failures.add("a")
    assert failures.too_many("a") and not failures.too_many("b")
    now_s[0] += 61
    assert not failures.too_many("a")
    for number in range(5000):
        failures.add(str(number))
    assert len(failures._times) <= 1024


def test_what_a_request_says_of_names_and_usages_is_not_honoured(hub: RunningHub) -> None:
    csr = request_pem(
        names=x509.SubjectAlternativeName([
            x509.UniformResourceIdentifier("spiffe://liguria/node/san-martino/cardiology"),
            x509.DNSName("hub.liguria.miss.internal")]),
        ca=x509.BasicConstraints(ca=True, path_length=None),
        usage=x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CODE_SIGNING]))
    status, reply = ask(hub, InviteText.parse(hub.invite()), csr)
    assert status == 200
    assert read_pem(reply["chain"].encode()).member.ward == "san-martino/radiology"
    text = subprocess.run(["openssl", "x509", "-noout", "-text"], input=reply["chain"].encode(),
                          capture_output=True, check=True).stdout.decode()
    for refused in ("cardiology", "hub.liguria", "CA:TRUE", "Server", "Code Signing", "asked-for"):
        assert refused not in text


def bad_signature() -> str:
    der = bytearray(make_request(new_key()))
    der[-1] ^= 1
    try:
        return x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()
    except ValueError:  # the flip made the signature's DER itself unreadable
        return bad_signature()


def test_weak_keys_and_unsigned_requests_are_refused_and_cost_no_try(hub: RunningHub) -> None:
    text = InviteText.parse(hub.invite())
    for csr in (request_pem(rsa.generate_private_key(65537, 2048)),
                request_pem(ec.generate_private_key(ec.SECP384R1())), bad_signature()):
        status, reply = ask(hub, text, csr)
        assert (status, reply["code"]) == (400, "bad-key")
    row = hub.ledger.invite(text.id)
    assert row is not None and (row.tries_left, row.spki) == (5, None)


def test_a_key_that_belongs_to_another_member_is_refused(hub: RunningHub) -> None:
    csr = request_pem()
    assert ask(hub, InviteText.parse(hub.invite("Radiology")), csr)[0] == 200
    status, reply = ask(hub, InviteText.parse(hub.invite("Cardiology")), csr)
    assert (status, reply["code"]) == (403, "key-in-use")
    assert audited(hub)[0] == (registry.SECURITY_ALERT, "key-in-use")
    status, reply = ask(hub, InviteText.parse(hub.invite("Radiology")), csr)  # its own, by another invite
    assert (status, reply["code"]) == (403, "key-in-use")


def test_a_revoked_member_gets_nothing_from_its_old_invite_and_enters_by_a_new_one(
    hub: RunningHub, tmp_path: Path
) -> None:
    line = hub.invite()
    text, csr = InviteText.parse(line), request_pem()
    assert ask(hub, text, csr)[0] == 200
    registry.revoke(hub.ledger, "san-martino/radiology", reason="stolen", who="it")
    assert ask(hub, text, csr)[0] == 403
    assert enrol(hub.invite(), tmp_path / "node").ward == "san-martino/radiology"


@pytest.mark.parametrize("body", [
    b"", b"{}", b"[]", b"\xff\xfe", b'{"id": 1, "secret": "x", "csr": "y"}',
    b'{"id": "x", "secret": "x", "csr": "y"}',
    b"[" * 5000, b'{"id": "x", "secret": null, "csr": null}',
])
def test_a_request_of_another_shape_is_refused(hub: RunningHub, body: bytes) -> None:
    status, reply = post(hub, body)
    assert (status, reply["code"]) == (400, "bad-request")


def test_a_large_request_is_refused(hub: RunningHub) -> None:
    status, reply = post(hub, b"x" * (BODY_BYTES_MAX + 1))
    assert (status, reply["code"]) == (413, "too-large")
    assert post(hub, {}, path="/admin")[0] == 404
    assert post(hub, {}, method="GET")[0] == 405


def test_the_bundle_is_public_and_holds_no_key(hub: RunningHub) -> None:
    status, bundle = post(hub, {}, path="/bundle", method="GET")
    assert status == 200 and bundle["version"] == 1
    assert bundle["roots"].encode() == hub.authority.bundle.roots_pem
    assert "PRIVATE" not in json.dumps(bundle)


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1", "-tls1_2"])
def test_the_enrolment_port_speaks_tls_1_3_alone(hub: RunningHub, version: str) -> None:
    def shown(*flags: str) -> str:
        ran = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{hub.enrolment.port}", "-brief", *flags],
            stdin=subprocess.DEVNULL, capture_output=True)
        return (ran.stdout + ran.stderr).decode(errors="replace")

    assert "Protocol version: TLSv1.3" in shown("-tls1_3")
    assert "CONNECTION ESTABLISHED" not in shown(version)


def test_the_enrolment_port_takes_up_a_renewed_certificate(hub: RunningHub, tmp_path: Path) -> None:
    def serial() -> str:
        context = ssl.create_default_context(cadata=hub.authority.bundle.roots_pem.decode())
        plain = socket.create_connection(("127.0.0.1", hub.enrolment.port), 10)
        with context.wrap_socket(plain, server_hostname="hub.liguria.miss.internal") as connection:
            shown = connection.getpeercert()
        assert shown is not None
        return str(shown["serialNumber"]).lower()

    first = serial()
    renewed = hub_identity(hub.folder / "ca", hub.folder / "hub", renew=True)
    assert serial() == renewed.certificate.serial != first
    assert enrol(hub.invite(), tmp_path / "node")


def test_who_connects_and_asks_for_nothing_keeps_nobody_out(hub: RunningHub) -> None:
    context = ssl.create_default_context(cadata=hub.authority.bundle.roots_pem.decode())
    with contextlib.ExitStack() as opened:
        for _ in range(CONNECTIONS_MAX + 8):
            plain = opened.enter_context(socket.create_connection(("127.0.0.1", hub.enrolment.port), 10))
            silent = context.wrap_socket(plain, server_hostname="hub.liguria.miss.internal")
            opened.enter_context(silent).sendall(b"POST /enrol HTTP/1.1\r\n")
        status, answer = post(hub, b"", path="/bundle", method="GET")
        assert status == 200 and answer["roots"]


def test_a_folder_with_an_identity_is_not_enrolled_again_by_mistake(hub: RunningHub, tmp_path: Path) -> None:
    first = enrol(hub.invite(), tmp_path / "node")
    with pytest.raises(SettingsError, match="holds the identity"):
        enrol(hub.invite(), tmp_path / "node")
    second = enrol(hub.invite(), tmp_path / "node", replace=True)
    assert second.fingerprint != first.fingerprint and Identity.load(tmp_path / "node") == second


def test_nobody_there_is_unavailable(hub: RunningHub, tmp_path: Path) -> None:
    text = InviteText.parse(hub.invite())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    with pytest.raises(Unavailable, match="does not answer"):
        enrol(str(InviteText(f"127.0.0.1:{free}", text.id, text.secret, text.pins)), tmp_path / "node")
    with pytest.raises(InvalidInput, match="not an invite"):
        enrol("hello", tmp_path / "node")


class FakeHub:
    """An impostor at the enrolment address. It notes all that it is sent once TLS has been taken off."""

    def __init__(self, folder: Path, bundle: dict[str, Any], region: str = "Liguria") -> None:
        Authority.init(folder / "ca", region)
        self._identity = hub_identity(folder / "ca", folder / "hub")
        self._bundle = json.dumps(bundle or self.own_bundle(folder)).encode()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self._identity.chain_path, self._identity.key_path)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.heard = bytearray()
        threading.Thread(target=self._run, daemon=True).start()

    @staticmethod
    def own_bundle(folder: Path) -> dict[str, Any]:
        held = Authority.open(folder / "ca").bundle
        return {"version": 1, "roots": held.roots_pem.decode(), "issuing": held.issuing_pem.decode()}

    def _run(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                with self._context.wrap_socket(plain, server_side=True) as connection:
                    while data := connection.recv(65536):
                        self.heard += data
                        if b"\r\n\r\n" in self.heard:
                            connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: "
                                               + str(len(self._bundle)).encode() + b"\r\n\r\n" + self._bundle)
                            break
            except OSError:
                pass

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[list[FakeHub]]:
    made: list[FakeHub] = []
    yield made
    for fake in made:
        fake.close()


@pytest.mark.parametrize("shows", ["its own root", "the region's root", "both", "nothing", "rubbish"])
def test_an_impostor_never_hears_the_secret(
    hub: RunningHub, tmp_path: Path, fakes: list[FakeHub], shows: str
) -> None:
    real = hub.authority.bundle.roots_pem.decode()
    own_folder = tmp_path / "impostor"
    own_folder.mkdir()
    bundle: dict[str, dict[str, Any]] = {
        "its own root": {}, "the region's root": {"roots": real}, "nothing": {"x": 1},
        "rubbish": {"roots": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
        "both": {"roots": real + real}}
    fake = FakeHub(own_folder, bundle[shows])
    fakes.append(fake)
    text = InviteText.parse(hub.invite())
    line = str(InviteText(f"127.0.0.1:{fake.port}", text.id, text.secret, text.pins))
    with pytest.raises(NotAuthenticated):
        enrol(line, tmp_path / "node")
    knows_root = shows in ("the region's root", "both")
    wait_for(lambda: fake.connections == (2 if knows_root else 1), "the connections")
    heard = bytes(fake.heard)
    assert heard.startswith(b"GET /bundle")  # the public question, and nothing after it
    assert text.secret.encode() not in heard and text.id.encode() not in heard and b"POST" not in heard
    assert not identities.exists(tmp_path / "node")
    assert enrol(str(text), tmp_path / "node")  # and the invite is still good at the real hub


def test_a_node_of_the_region_can_not_pose_as_its_hub(hub: RunningHub, tmp_path: Path) -> None:
    node = enrol(hub.invite(), tmp_path / "node")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(node.chain_path, node.key_path)
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            bundle = json.dumps({"roots": hub.authority.bundle.roots_pem.decode()}).encode()
            for _ in range(2):
                plain, _address = listener.accept()
                try:
                    with context.wrap_socket(plain, server_side=True) as connection:
                        heard.extend(connection.recv(65536))
                        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (
                            len(bundle), bundle))
                except OSError:
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        text = InviteText.parse(hub.invite("Cardiology"))
        with pytest.raises(NotAuthenticated):
            enrol(str(InviteText(f"127.0.0.1:{port}", text.id, text.secret, text.pins)), tmp_path / "other")
        thread.join(10)
    assert text.secret.encode() not in heard


def test_an_audit_log_that_can_not_be_written_stops_enrolment(hub: RunningHub, tmp_path: Path) -> None:
    line = hub.invite()

    def full(row: object) -> None:
        raise OSError("no space left on device")

    hub.ledger.audit = full  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="can't enrol now"):
        enrol(line, tmp_path / "node")
    assert not identities.exists(tmp_path / "node")
    del hub.ledger.audit
    assert enrol(line, tmp_path / "node")
    assert len(hub.ledger.certificates()) == 1


def test_the_folder_s_leftovers_do_not_grow(hub: RunningHub, tmp_path: Path) -> None:
    enrol(hub.invite(), tmp_path / "node")
    assert sorted(os.listdir(tmp_path / "node")) == ["current", "generations"]
