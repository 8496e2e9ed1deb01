"""Renewal: when it is due, over real mutually authenticated gRPC, under load, refused, killed on the way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from archive.errors import Forbidden, NotAuthenticated, Unavailable
from archive.ledger import CertificateRow
from certs import identity as identities
from certs import registry, renewal
from certs.authority import Authority, clock_us, hub_identity
from certs.certificate import new_key, spki_fingerprint
from certs.credentials import channel_sync, server_credentials
from certs.identity import Assignment, Identity, Issued
from certs.profiles import Member, Profile
from certs.reissue import ACTIVE_MAX
from certs.renewal import Health, Renewal, RenewalThread, health, renew
from certs.requests import make_request
from protos import uplink_pb2, uplink_pb2_grpc
from tests.certs.region import RunningHub, code_of, offer, running_hub
from tests.certs.test_enrolment import request_pem
from tests.waiting import wait_for

KILLS = 20
ROOT = Path(__file__).parents[2]


@pytest.fixture
def node(hub: RunningHub) -> Identity:
    return hub.enrol()


@pytest.fixture
def month(tmp_path: Path) -> Identity:
    """An identity of 30 days, of nobody's hub."""
    authority = Authority.init(tmp_path / "ca", "Liguria")
    key = identities.pending_key(tmp_path / "month")
    certificate = authority.issue(Member.node("liguria", "a/b"), key.public_key())
    return identities.install(tmp_path / "month", Issued(
        certificate.pem + authority.bundle.issuing_pem, authority.bundle.roots_pem, 1,
        Assignment(hub_addresses=("127.0.0.1:1",))))


def test_a_server_is_given_another_certificate_only_when_there_is_one(
    month: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given one for each of many handshakes at once, gRPC frees what another handshake still uses."""
    given: list[Any] = []
    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", lambda *args, **_: given.extend(args))
    server_credentials(month)
    first, renewed = given
    assert first is not None
    assert [renewed() for _ in range(3)] == [None] * 3
    key = identities.pending_key(month.folder)
    authority = Authority.open(tmp_path / "ca")
    certificate = authority.issue(Member.node("liguria", "a/b"), key.public_key())
    identities.install(month.folder, Issued(
        certificate.pem + authority.bundle.issuing_pem, authority.bundle.roots_pem, 1, month.assignment))
    assert renewed() is not None
    assert renewed() is None


class SetClock:
    def __init__(self, at_us: int) -> None:
        self.at_us = at_us

    def __call__(self) -> int:
        return self.at_us


def test_it_is_due_at_two_thirds_of_life_or_by_chance_a_little_sooner(month: Identity) -> None:
    clock = SetClock(month.issued_us)
    life_s = (month.not_after_us - month.issued_us) / 1e6
    assert life_s == 30 * 86400
    due = [Renewal(month, clock, random.Random(seed)).wait_s() / life_s for seed in range(200)]
    assert 0.6 <= min(due) < 0.61 and 0.66 < max(due) <= 2 / 3
    machine = Renewal(month, clock, random.Random(1))
    clock.at_us += int(machine.wait_s() * 1e6) - 1_000_000
    assert 0 < machine.wait_s() <= 1.1
    clock.at_us += 2_000_000
    assert machine.wait_s() == 0


def test_failures_wait_longer_each_time_up_to_a_bound(month: Identity) -> None:
    clock = SetClock(month.issued_us + (month.not_after_us - month.issued_us) * 7 // 10)
    machine = Renewal(month, clock, random.Random(1))
    assert machine.wait_s() == 0
    waits = []
    for _ in range(40):
        machine.failed()
        waits.append(machine.wait_s())
    assert waits[0] <= 1.0 and all(0.5 * 2**n <= waits[n] <= 2**n for n in range(11))
    assert all(1800 <= wait <= 3600 for wait in waits[12:])
    machine.renewed(month)
    assert machine.failures == 0


def test_health_is_never_green_when_it_should_not_be(month: Identity) -> None:
    life_us = month.not_after_us - month.issued_us
    expected = {0.0: Health.GREEN, 0.66: Health.GREEN, 0.67: Health.AMBER, 0.89: Health.AMBER,
                0.91: Health.RED, 1.0: Health.EXPIRED, 3.0: Health.EXPIRED}
    assert {part: health(month, month.issued_us + int(life_us * part)) for part in expected} == expected


def test_a_renewal_gives_a_new_key_and_the_same_identity(hub: RunningHub, node: Identity) -> None:
    renewed = renew(node)
    assert renewed == Identity.load(node.folder)
    assert renewed.uri == node.uri and renewed.assignment == node.assignment
    assert renewed.certificate.serial != node.certificate.serial
    assert renewed.certificate.spki != node.certificate.spki and renewed.key_pem != node.key_pem
    states = {row.fingerprint: row.state for row in hub.ledger.certificates()}
    assert states == {node.fingerprint: "superseded", renewed.fingerprint: "active"}
    assert hub.ledger.audit_rows(1)[0].act == "renew"
    with channel_sync(renewed, hub.address) as channel, channel_sync(node, hub.address) as old:
        offer(channel)
        offer(old)  # calls on old channels go on until the certificate's own end


def test_a_portal_renews_too(hub: RunningHub) -> None:
    portal = hub.enrol("main", Profile.PORTAL)
    assert renew(portal).uri == "spiffe://liguria/portal/main"


def test_the_old_pair_stays_until_the_new_one_has_carried_a_call(hub: RunningHub, node: Identity) -> None:
    real_stub = uplink_pb2_grpc.CertificatesStub
    key = identities.pending_key(node.folder, f"renewal of {node.fingerprint}")
    # The hub hears nothing after its first answer: the new certificate is never tried.
    with channel_sync(node, hub.address) as channel:
        first = real_stub(channel).Renew(uplink_pb2.RenewRequest(csr_der=make_request(key)), timeout=5)
    hub.run(hub.server.stop(0))
    with pytest.raises(Unavailable):
        renew(node, timeout_s=1)
    assert Identity.load(node.folder) == node
    row = hub.ledger.certificates()[0]
    assert row.der == first.chain_der[0] and row.spki == spki_fingerprint(key.public_key())
    assert hub.ledger.certificates()[1].state == "active"


def test_the_same_key_asked_again_gives_the_same_certificate(hub: RunningHub, node: Identity) -> None:
    request = uplink_pb2.RenewRequest(csr_der=make_request(new_key()))
    with channel_sync(node, hub.address) as channel:
        stub = uplink_pb2_grpc.CertificatesStub(channel)
        assert stub.Renew(request, timeout=5) == stub.Renew(request, timeout=5)
    assert len(hub.ledger.certificates()) == 2


def test_identity_comes_from_the_certificate_and_never_from_the_request(
    hub: RunningHub, node: Identity
) -> None:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://liguria/node/a/b")])
    der = x509.load_pem_x509_csr(request_pem(names=names).encode()).public_bytes(Encoding.DER)
    with channel_sync(node, hub.address) as channel:
        uplink_pb2_grpc.CertificatesStub(channel).Renew(uplink_pb2.RenewRequest(csr_der=der), timeout=5)
    assert {row.identity for row in hub.ledger.certificates()} == {node.uri}


def test_a_key_of_another_member_and_rubbish_are_refused(hub: RunningHub, node: Identity) -> None:
    other = hub.enrol("Cardiology")
    foreign = make_request(load_pem_private_key(other.key_pem, None))  # type: ignore[arg-type]
    with channel_sync(node, hub.address) as channel:
        stub = uplink_pb2_grpc.CertificatesStub(channel)
        assert code_of(lambda: stub.Renew(uplink_pb2.RenewRequest(csr_der=foreign), timeout=5)) == \
            grpc.StatusCode.PERMISSION_DENIED
        for rubbish in (b"", b"x", b"0" * 10_000):
            assert code_of(lambda der=rubbish: stub.Renew(  # type: ignore[misc]
                uplink_pb2.RenewRequest(csr_der=der), timeout=5)) == grpc.StatusCode.INVALID_ARGUMENT
    assert len(hub.ledger.certificates()) == 2


def test_a_member_does_not_collect_certificates(hub: RunningHub, node: Identity) -> None:
    with channel_sync(node, hub.address) as channel:
        stub = uplink_pb2_grpc.CertificatesStub(channel)
        for _ in range(ACTIVE_MAX - 1):
            stub.Renew(uplink_pb2.RenewRequest(csr_der=make_request(new_key())), timeout=5)
        one_more = uplink_pb2.RenewRequest(csr_der=make_request(new_key()))
        assert code_of(lambda: stub.Renew(one_more, timeout=5)) == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_revoked_do_not_renew(hub: RunningHub, node: Identity) -> None:
    registry.revoke(hub.ledger, node.ward, reason="stolen", who="it")
    with pytest.raises(Forbidden, match="revoked"):
        renew(node)
    assert Identity.load(node.folder) == node
    assert len(hub.ledger.certificates()) == 1


def test_a_revocation_in_the_middle_of_a_renewal_takes_the_new_certificate_too(
    hub: RunningHub, node: Identity
) -> None:
    add = hub.ledger.add_certificate

    def revoked_meanwhile(row: object) -> None:
        hub.ledger.revoke_certificate(node.fingerprint, "stolen")  # as the first pass of `revoke`, elsewhere
        add(row)  # type: ignore[arg-type]

    hub.ledger.add_certificate = revoked_meanwhile  # type: ignore[method-assign]
    with pytest.raises(Forbidden):
        renew(node)
    # The gate cuts the call once it sees the revocation, while the servicer still signs and looks again.
    wait_for(lambda: [row.state for row in hub.ledger.certificates()] == ["revoked"] * 2, "both are revoked")


def test_no_hub_is_unavailable_and_the_next_address_is_tried(hub: RunningHub, node: Identity) -> None:
    nowhere = replace(node, assignment=replace(node.assignment, hub_addresses=("127.0.0.1:1",)))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        renew(nowhere, timeout_s=3)
    both = replace(node, assignment=replace(node.assignment, hub_addresses=("127.0.0.1:1", hub.address)))
    assert renew(both, timeout_s=3).fingerprint != node.fingerprint


def test_a_bundle_that_grows_older_is_refused(hub: RunningHub, tmp_path: Path) -> None:
    node = hub.enrol()
    with pytest.raises(NotAuthenticated, match="older"):
        renew(replace(node, bundle_version=2))
    assert Identity.load(node.folder) == node


def test_short_certificates_are_renewed_by_themselves_and_no_call_fails(tmp_path: Path) -> None:
    with running_hub(tmp_path, life_s=6) as hub:
        node = hub.enrol()
        serials, failures, stop = {node.certificate.serial}, [], threading.Event()
        current = [node]

        def load() -> None:
            while not stop.is_set():
                identity = current[0]
                try:
                    with channel_sync(identity, hub.address) as channel:
                        for _ in range(20):
                            offer(channel)
                except grpc.RpcError as error:
                    failures.append(str(error.code()))

        def renewed(identity: Identity) -> None:
            serials.add(identity.certificate.serial)
            current[0] = identity

        keeper = RenewalThread(node, on_renewed=renewed)
        caller = threading.Thread(target=load)
        keeper.start()
        caller.start()
        try:
            wait_for(lambda: len(serials) >= 4, "four certificates", 60)
        finally:
            stop.set()
            caller.join(20)
            keeper.stop()
        assert failures == []
        assert keeper.identity == Identity.load(node.folder)
        lived_s = [(later.issued_us - earlier.issued_us) / 1e6 for earlier, later in neighbours(hub)]
        # Two thirds of 6 s are 4, less the jitter, less the second that a certificate is cut to.
        assert all(2.6 <= seconds <= 5.5 for seconds in lived_s), lived_s
        row = hub.ledger.certificates()[0]
        assert row.state == "active"


def neighbours(hub: RunningHub) -> list[tuple[CertificateRow, CertificateRow]]:
    rows = sorted(hub.ledger.certificates(), key=lambda row: row.issued_us)
    return list(zip(rows, rows[1:], strict=False))


def test_a_hub_that_is_away_makes_it_amber_then_red_and_its_return_green(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "SLEEP_S_MAX", 0.05)
    hub = RunningHub(tmp_path, life_s=600)
    hub.start()
    node = hub.enrol()
    port, clock = hub.port, hub.clock
    hub.stop()
    keeper = RenewalThread(node, clock=clock)
    keeper.start()
    try:
        assert keeper.health is Health.GREEN
        for ahead_s, expected in ((410, Health.AMBER), (550, Health.RED), (601, Health.EXPIRED)):
            clock.ahead_s = ahead_s
            assert keeper.health is expected
            tries = keeper.failures

            def tried_in_vain(tries: int = tries) -> bool:
                return keeper.failures > tries

            wait_for(tried_in_vain, "a try in vain")
        back = RunningHub(tmp_path, life_s=3600)
        back.start(port)
        try:
            wait_for(lambda: keeper.health is Health.GREEN, "all is well")
            assert keeper.identity == Identity.load(node.folder) != node
        finally:
            back.stop()
    finally:
        keeper.stop()


def test_a_hub_keeps_its_own_certificate_renewed(tmp_path: Path) -> None:
    Authority.init(tmp_path / "ca", "Liguria")
    first = hub_identity(tmp_path / "ca", tmp_path / "hub", life_s=4)
    keeper = RenewalThread(first, renew=lambda held: hub_identity(
        tmp_path / "ca", tmp_path / "hub", life_s=4, renew=True))
    keeper.start()
    try:
        wait_for(lambda: keeper.identity.fingerprint != first.fingerprint, "it is renewed")
    finally:
        keeper.stop()
    assert Identity.load(tmp_path / "hub") == keeper.identity
    assert clock_us() < keeper.identity.not_after_us


def test_a_renewal_that_changes_nothing_is_not_tried_without_end(month: Identity) -> None:
    clock = SetClock(month.issued_us + (month.not_after_us - month.issued_us) * 7 // 10)
    tries: list[Identity] = []

    def unchanged(held: Identity) -> Identity:
        tries.append(held)
        return held

    keeper = RenewalThread(month, renew=unchanged, clock=clock)
    keeper.start()
    wait_for(lambda: keeper.failures == 1, "one failure")
    keeper.stop()
    assert len(tries) == 1


def test_killed_again_and_again_while_it_renews_a_node_always_has_a_pair_that_works(tmp_path: Path) -> None:
    """kill -9 at random moments of endless renewals; then key and certificate match and carry a call."""
    program = ("import sys; from pathlib import Path; from certs.identity import Identity; "
               "from certs.renewal import renew\n"
               "print('ready', flush=True)\n"
               "while True: renew(Identity.load(Path(sys.argv[1])))")
    chance = random.Random(7)
    with running_hub(tmp_path) as hub:
        node = hub.enrol()
        began_s = time.monotonic()
        seen = {renew(node).fingerprint}
        takes_s = time.monotonic() - began_s
        for _ in range(KILLS):
            child = subprocess.Popen([sys.executable, "-c", program, str(node.folder)], cwd=ROOT,
                                     stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.0, 3 * takes_s))  # the moment of the kill, not a wait for anything
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
            held = Identity.load(node.folder)
            seen.add(held.fingerprint)
            with channel_sync(held, hub.address) as channel:
                offer(channel)
        assert len(seen) > KILLS // 4, "the renewals were killed before they did anything"
        renew(Identity.load(node.folder))
        assert sorted(os.listdir(node.folder)) == ["current", "generations"]
        assert len(os.listdir(node.folder / "generations")) == 1
