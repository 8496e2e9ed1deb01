"""The check on every call, over real mutually authenticated gRPC."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from google.protobuf.descriptor import FileDescriptor

from archive.ledger import Ledger
from certs import gate, registry
from certs import identity as identities
from certs.authority import Authority, hub_identity
from certs.certificate import key_pem, new_key
from certs.credentials import channel_sync
from certs.identity import Assignment, Identity, Issued
from certs.profiles import Member, Profile, hub_dns_name
from protos import (
    common_pb2,
    delivery_pb2,
    facts_pb2,
    inventory_pb2,
    region_pb2,
    restore_pb2,
    uplink_pb2,
    uplink_pb2_grpc,
    window_pb2,
)
from tests.certs.region import RunningHub, code_of, offer, wards
from tests.certs.test_authority import sign_outside
from tests.waiting import wait_for

REVOCATION_S_MAX = 5.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def node(hub: RunningHub) -> Identity:
    return hub.enrol()


def every_rpc() -> set[str]:
    """Every call of every service in the .proto files."""
    modules = (
        common_pb2, uplink_pb2, region_pb2, delivery_pb2, window_pb2, facts_pb2, inventory_pb2, restore_pb2,
    )  # fmt: skip
    files: list[FileDescriptor] = [module.DESCRIPTOR for module in modules]
    protos = {path.stem for path in (ROOT / "protos").glob("*.proto")}
    assert {Path(str(file.name)).stem for file in files} == protos, "a .proto file that is new here"
    return {f"/{service.full_name}/{method.name}" for file in files
            for service in file.services_by_name.values() for method in service.methods}


def test_the_table_says_of_every_call_who_may_make_it() -> None:
    assert set(gate.RPCS) == every_rpc()
    assert all(gate.RPCS.values())
    assert not any(Profile.HUB in profiles for profiles in gate.RPCS.values())


@pytest.mark.parametrize("profile", [Profile.NODE, Profile.PORTAL])
def test_each_profile_may_make_its_own_calls_and_no_other(hub: RunningHub, profile: Profile) -> None:
    with channel_sync(hub.enrol(profile=profile), hub.address) as channel:
        for method, profiles in gate.RPCS.items():
            call: Callable[..., Any] = channel.stream_stream(method)
            try:
                list(call(iter([b""]), timeout=0.5))
                refused = False
            except grpc.RpcError as error:
                refused = error.details() == gate.NOT_ALLOWED.reason
            assert refused == (profile not in profiles), method


def test_a_call_that_is_in_no_table_is_nobody_s(hub: RunningHub, node: Identity) -> None:
    with channel_sync(node, hub.address) as channel:
        call: Callable[..., Any] = channel.stream_unary("/test/Count")
        assert code_of(lambda: call(iter([b"1"]), timeout=5)) == grpc.StatusCode.PERMISSION_DENIED
        missing: Callable[..., Any] = channel.unary_unary("/miss.v1.Uplink/Nothing")
        assert code_of(lambda: missing(b"", timeout=5)) == grpc.StatusCode.UNIMPLEMENTED
    assert hub.gate.refusals["not a call for this kind of member"] == 1


def test_the_peer_is_who_its_certificate_says(hub: RunningHub, node: Identity) -> None:
    with channel_sync(node, hub.address) as channel:
        stub = uplink_pb2_grpc.UplinkStub(channel)
        assert next(stub.Attach(iter([]))).welcome.version == "san-martino/radiology"
        sent = iter([uplink_pb2.PushRequest(), uplink_pb2.PushRequest()])
        assert [reply.receipt.outcome for reply in stub.Push(sent, timeout=5)] == [node.uri] * 2
        items = uplink_pb2.OfferRequest(items=[uplink_pb2.OfferItem(size=7)])
        assert stub.Offer(items, timeout=5).verdicts[0].have_bytes == 7


def test_all_four_kinds_of_call_pass_and_can_be_ended(
    hub: RunningHub, node: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = frozenset({Profile.NODE})
    monkeypatch.setattr(gate, "RPCS", {**gate.RPCS, "/test/Count": nodes, "/test/Tick": nodes})
    with channel_sync(node, hub.address) as channel:
        count: Callable[..., Any] = channel.stream_unary("/test/Count")
        assert count(iter([b"1", b"2", b"3"]), timeout=5) == b"3"
        tick: Callable[..., Any] = channel.unary_stream("/test/Tick")
        ticks = tick(b"")
        assert next(ticks) == b"tick"
        upload: Any = channel.stream_unary("/test/Count")
        open_upload = upload.future(until_released(released := threading.Event()))
        attached = uplink_pb2_grpc.UplinkStub(channel).Attach(iter([]))
        next(attached)
        wait_for(lambda: hub.gate.live_calls == 3, "three calls are live")
        began_s = time.monotonic()
        registry.revoke(hub.ledger, "san-martino/radiology", reason="stolen", who="it")
        for call in (lambda: list(ticks), open_upload.result, lambda: next(attached)):
            assert code_of(call) == grpc.StatusCode.PERMISSION_DENIED
        assert time.monotonic() - began_s < REVOCATION_S_MAX
        released.set()
    assert hub.uplink.cancelled == ["Attach"]
    wait_for(lambda: hub.gate.live_calls == 0, "no call is live")


def until_released(released: threading.Event) -> Iterator[bytes]:
    yield b"1"
    released.wait(60)


def test_a_revoked_member_is_refused_on_old_and_new_channels_and_others_are_not(
    hub: RunningHub, node: Identity
) -> None:
    other = hub.enrol("Cardiology")
    with channel_sync(node, hub.address) as channel, channel_sync(other, hub.address) as other_channel:
        offer(channel)
        offer(other_channel)
        began_s = time.monotonic()
        revoked = registry.revoke(hub.ledger, node.certificate.serial, reason="stolen", who="it")
        assert [row.identity for row in revoked] == [node.uri]
        wait_for(lambda: refused(channel), "it is refused", REVOCATION_S_MAX)
        assert time.monotonic() - began_s < REVOCATION_S_MAX
        with channel_sync(node, hub.address) as fresh:
            assert code_of(lambda: offer(fresh)) == grpc.StatusCode.PERMISSION_DENIED
        offer(other_channel)
    assert hub.gate.refusals["certificate revoked"] >= 2
    assert hub.ledger.audit_rows(1)[0].act == "revoke"


def refused(channel: grpc.Channel) -> bool:
    try:
        offer(channel)
    except grpc.RpcError as error:
        return bool(error.code() == grpc.StatusCode.PERMISSION_DENIED)
    return False


def test_a_revocation_by_another_process_is_seen_and_outlives_a_restart(tmp_path: Path) -> None:
    hub = RunningHub(tmp_path)
    hub.start()
    node = hub.enrol()
    with channel_sync(node, hub.address) as channel:
        attached = uplink_pb2_grpc.UplinkStub(channel).Attach(iter([]))
        next(attached)
        program = ("import sys; from archive.ledger import Ledger; from certs.registry import revoke; "
                   "revoke(Ledger.open(sys.argv[1]), 'san-martino/radiology', reason='lost', who='it')")
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        subprocess.run([sys.executable, "-c", program, url], check=True, cwd=ROOT)
        assert code_of(lambda: next(attached)) == grpc.StatusCode.PERMISSION_DENIED
    hub.stop()
    again = RunningHub(tmp_path)
    again.start()
    try:
        with channel_sync(node, again.address) as channel:
            assert code_of(lambda: offer(channel)) == grpc.StatusCode.PERMISSION_DENIED
    finally:
        again.stop()


def test_expiry_ends_open_calls_and_refuses_new_ones_on_an_open_channel(
    hub: RunningHub, node: Identity
) -> None:
    with channel_sync(node, hub.address) as channel:
        attached = uplink_pb2_grpc.UplinkStub(channel).Attach(iter([]))
        next(attached)
        began_s = time.monotonic()
        hub.clock.ahead_s = 31 * 86400
        assert code_of(lambda: next(attached)) == grpc.StatusCode.UNAUTHENTICATED
        assert time.monotonic() - began_s < REVOCATION_S_MAX
        assert code_of(lambda: offer(channel)) == grpc.StatusCode.UNAUTHENTICATED
    assert hub.gate.refusals["certificate expired"] == 2


def test_an_expired_certificate_does_not_get_through_the_handshake(hub: RunningHub, tmp_path: Path) -> None:
    expired = stranger(hub.authority, tmp_path / "x", life_s=-10)
    with channel_sync(expired, hub.address) as channel:
        assert code_of(lambda: offer(channel)) == grpc.StatusCode.UNAVAILABLE


def test_a_certificate_that_the_registry_does_not_know_is_refused(hub: RunningHub, tmp_path: Path) -> None:
    unknown = stranger(hub.authority, tmp_path / "x")
    with channel_sync(unknown, hub.address) as channel:
        assert code_of(lambda: offer(channel)) == grpc.StatusCode.PERMISSION_DENIED
        hub.ledger.add_certificate(registry.row_of(unknown.certificate))  # then it is let in at once
        offer(channel)
    assert hub.gate.refusals["certificate not in the region's registry"] == 1


def stranger(
    authority: Authority, folder: Path, *, life_s: int = 3600, trusting: Authority | None = None
) -> Identity:
    """An identity that no registry holds, of `authority`, which trusts another one if told to."""
    key = identities.pending_key(folder)
    member = Member.node("liguria", "san-martino/unknown")
    certificate = authority.issue(member, key.public_key(), life_s=life_s)
    roots = (trusting or authority).bundle.roots_pem
    return identities.install(folder, Issued(
        certificate.pem + authority.bundle.issuing_pem, roots, 1, Assignment()))


def test_another_authority_s_certificate_is_refused_in_the_handshake(
    hub: RunningHub, tmp_path: Path
) -> None:
    other = Authority.init(tmp_path / "other" / "ca", "Liguria")
    foreign = stranger(other, tmp_path / "x", trusting=hub.authority)
    with channel_sync(foreign, hub.address) as channel:
        assert code_of(lambda: offer(channel)) == grpc.StatusCode.UNAVAILABLE
    assert hub.gate.refusals.total() == 0  # no call came as far as the gate


def handshake(hub: RunningHub, certificate: bytes | None, key: bytes | None) -> grpc.StatusCode | None:
    """A call with these and the right root; its status, None when it was let through."""
    credentials = grpc.ssl_channel_credentials(hub.authority.bundle.roots_pem, key, certificate)
    options = [("grpc.ssl_target_name_override", hub_dns_name("liguria"))]
    with grpc.secure_channel(hub.address, credentials, options) as channel:
        try:
            offer(channel)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return None


def test_the_handshake_wants_a_client_s_certificate_within_the_constraints(hub: RunningHub) -> None:
    issuing = hub.authority.bundle.issuing_pem
    key = new_key()
    inside = sign_outside(hub.authority, key, "radiology.node.liguria.miss.internal")
    hub.ledger.add_certificate(registry.row_of(inside))
    assert handshake(hub, inside.pem + issuing, key_pem(key)) is None
    outside = sign_outside(hub.authority, other_key := new_key(), "radiology.other.example")
    hub.ledger.add_certificate(registry.row_of(outside))
    assert handshake(hub, outside.pem + issuing, key_pem(other_key)) == grpc.StatusCode.UNAVAILABLE

    assert handshake(hub, None, None) == grpc.StatusCode.UNAVAILABLE
    server_only = hub.authority.issue(Member("liguria", Profile.HUB, ("rogue",)), key.public_key())
    assert handshake(hub, server_only.pem + issuing, key_pem(key)) == grpc.StatusCode.UNAVAILABLE
    assert handshake(hub, self_signed(key), key_pem(key)) == grpc.StatusCode.UNAVAILABLE


def self_signed(key: ec.EllipticCurvePrivateKey) -> bytes:
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self")])
    uri = x509.UniformResourceIdentifier("spiffe://liguria/node/san-martino/radiology")
    builder = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_a_member_does_not_take_another_region_s_hub_for_its_own(hub: RunningHub, tmp_path: Path) -> None:
    there = stranger(Authority.init(tmp_path / "other" / "ca", "Liguria"), tmp_path / "x")
    with channel_sync(there, hub.address) as channel:
        assert code_of(lambda: offer(channel)) == grpc.StatusCode.UNAVAILABLE


def test_the_server_takes_up_a_renewed_certificate_and_old_streams_live(
    hub: RunningHub, node: Identity
) -> None:
    def serial() -> str:
        ran = subprocess.run(
            ["openssl", "s_client", "-connect", hub.address, "-alpn", "h2", "-cert", str(node.chain_path),
             "-key", str(node.key_path)], stdin=subprocess.DEVNULL, capture_output=True)
        parsed = subprocess.run(
            ["openssl", "x509", "-noout", "-serial"], input=ran.stdout, capture_output=True)
        return parsed.stdout.decode().strip().removeprefix("serial=").lower()

    with channel_sync(node, hub.address) as channel:
        attached = uplink_pb2_grpc.UplinkStub(channel).Attach(iter([]))
        next(attached)
        assert int(serial(), 16) == int(hub.identity.certificate.serial, 16)
        renewed = hub_identity(hub.folder / "ca", hub.folder / "hub", renew=True)
        assert int(serial(), 16) == int(renewed.certificate.serial, 16)
        with channel_sync(node, hub.address) as fresh:
            offer(fresh)
        assert hub.gate.live_calls == 1 and attached.is_active()
        attached.cancel()


class Broken:
    """A ledger whose database can be taken away."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.away = False

    def revocation_version(self) -> int:
        return self._ledger.revocation_version() if not self.away else self._fail()

    def certificate(self, fingerprint: str) -> Any:
        return self._ledger.certificate(fingerprint) if not self.away else self._fail()

    def _fail(self) -> int:
        raise OSError("the database is away")


def test_while_the_registry_is_away_known_members_go_on_for_a_while(
    hub: RunningHub, node: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(hub.ledger)
    hub.gate._ledger = broken  # type: ignore[assignment]
    other = hub.enrol("Cardiology")
    with channel_sync(node, hub.address) as channel, channel_sync(other, hub.address) as other_channel:
        offer(channel)
        broken.away = True
        wait_for(lambda: hub.gate._version == -1, "the gate has no list")
        offer(channel)  # known, and not long ago
        assert code_of(lambda: offer(other_channel)) == grpc.StatusCode.UNAVAILABLE  # never asked about
        monkeypatch.setattr(gate, "REGISTRY_STALE_S_MAX", 0.0)
        assert code_of(lambda: offer(channel)) == grpc.StatusCode.UNAVAILABLE
        monkeypatch.undo()
        # Revoked while it was away: known as soon as it is back.
        registry.revoke(hub.ledger, node.uri, reason="stolen", who="it")
        offer(channel)
        broken.away = False
        wait_for(lambda: refused(channel), "it is refused", REVOCATION_S_MAX)
        offer(other_channel)


def test_a_caller_that_leaves_leaves_nothing_behind(hub: RunningHub, node: Identity) -> None:
    with channel_sync(node, hub.address) as channel:
        attached = uplink_pb2_grpc.UplinkStub(channel).Attach(iter([]))
        next(attached)
        assert hub.gate.live_calls == 1
        attached.cancel()
        wait_for(lambda: hub.uplink.cancelled == ["Attach"], "the call is cancelled")
        wait_for(lambda: hub.gate.live_calls == 0, "no call is live")
    portal = hub.enrol("main", Profile.PORTAL)
    with channel_sync(portal, hub.address) as channel:
        assert wards(channel)
    wait_for(lambda: hub.gate.live_calls == 0, "no call is live")
