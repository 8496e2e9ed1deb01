"""Users that a requestor names (PS3.7 D.3.3.7), against the node's own."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.pdu_primitives import UserIdentityNegotiation

from archive.ledger import User
from federation.guessing import PAIR_FREE
from federation.passwords import hash_password
from node.dimse import pdu
from node.dimse.errors import Rejected
from node.dimse.pdu import PduType, UserIdentity
from node.dimse.requestor import ECHO_CONTEXT, Requestor
from node.settings import DimseSettings
from node.users import UserPolicy
from tests.datasets import make_instance
from tests.node.serving import AE_TITLE, QUICK, Raw, Serving, echo_request, serving
from tests.peers import dcmtk
from tests.waiting import wait_for

PASSWORD = "a long and quiet song"
REFUSED = "1/2/1"  # rejected-permanent, service-provider (ACSE), no reason given


@pytest.fixture(scope="module")
def hashed() -> str:
    return hash_password(PASSWORD)


def running(folder: Path, policy: UserPolicy, hashed: str) -> Iterator[Serving]:
    with serving(folder, users=policy) as served:
        served.ledger.add_user(User("rossi", "Rossi", "ward technician", "a/b"), hashed)
        served.ledger.add_user(User("verdi", "Verdi", "ward technician", "a/b", enabled=False), hashed)
        yield served


@pytest.fixture
def checking(tmp_path: Path, hashed: str) -> Iterator[Serving]:
    yield from running(tmp_path, UserPolicy.CHECK, hashed)


@pytest.fixture
def requiring(tmp_path: Path, hashed: str) -> Iterator[Serving]:
    yield from running(tmp_path, UserPolicy.REQUIRE, hashed)


def named(name: str, passcode: str | None = None, *, wants_answer: bool = True) -> UserIdentity:
    return UserIdentity(1 if passcode is None else 2, wants_answer, name.encode(), (passcode or "").encode())


def outcome(served: Serving, identity: UserIdentity | None) -> str:
    """"answered" or "silent" (about the user) when let in, else the rejection."""
    try:
        with Requestor.connect(served.peer, "CT1", [ECHO_CONTEXT], limits=QUICK,
                               user_identity=identity) as requestor:
            assert requestor.echo() == 0
            return "silent" if requestor.accept.identity_answer is None else "answered"
    except Rejected as rejected:
        return rejected.rejection.triple


def test_right_ones_are_let_in_and_said_so(checking: Serving) -> None:
    assert outcome(checking, named("rossi", PASSWORD)) == "answered"
    assert outcome(checking, named("rossi", PASSWORD, wants_answer=False)) == "silent"
    assert outcome(checking, named("rossi")) == "answered"
    assert outcome(checking, None) == "silent"
    wait_for(lambda: len(checking.ledger.connections()) == 4, "the connection log")
    assert [row.user_name for row in checking.ledger.connections()] == ["", "rossi", "rossi", "rossi"]


@pytest.mark.parametrize("identity", [
    named("rossi", "wrong"), named("rossi", ""), named("nobody", PASSWORD), named("nobody"),
    named("verdi", PASSWORD), named("verdi"), named("", PASSWORD), named("rossi\0x", PASSWORD),
    named("rossi", "x" * 60_000),
    UserIdentity(2, True, b"\xff\xfe", b"\xff"),
], ids=range(10))
def test_wrong_ones_are_refused(checking: Serving, identity: UserIdentity) -> None:
    assert outcome(checking, identity) == REFUSED
    entry = checking.log(1)[0]
    assert (entry.outcome, entry.ended) == ("refused", f"rejected {REFUSED}")
    assert entry.reason.startswith("the user or the passcode is wrong")
    assert checking.admission.associations == {}


def test_required_of_everybody(requiring: Serving) -> None:
    assert outcome(requiring, None) == REFUSED
    assert outcome(requiring, named("rossi", PASSWORD)) == "answered"
    reasons = [row.reason for row in requiring.log(2)]
    assert "it names no user, and dimse.user_identity requires one" in reasons


@pytest.mark.parametrize("kind", [3, 4, 5, 99])
def test_kinds_that_are_not_checked(kind: int, checking: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """Kerberos, SAML, JWT, and what comes next: passed over, with a line in the log."""
    identity = UserIdentity(kind, True, b"ticket-of-a-person", b"")
    with caplog.at_level(logging.WARNING):
        assert outcome(checking, identity) == "silent"
    assert "passed over" in caplog.text and "ticket-of" not in caplog.text


@pytest.mark.parametrize(("kind", "word"),
                         [(3, "Kerberos"), (4, "SAML"), (5, "JSON web token"), (99, "type 99")])
def test_kinds_that_are_not_checked_where_one_is_required(kind: int, word: str, requiring: Serving,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert outcome(requiring, UserIdentity(kind, True, b"ticket-of-a-person", b"")) == REFUSED
    assert word in caplog.text and "refused" in caplog.text and "ticket-of" not in caplog.text
    assert word in requiring.log(1)[0].reason


def test_ignored_by_default(tmp_path: Path) -> None:
    assert DimseSettings().user_identity == "ignore"
    with serving(tmp_path) as served:
        assert outcome(served, named("nobody", "nothing")) == "silent"
        assert served.log(1)[0].user_name == ""


def test_guessing_is_slowed_down(checking: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a sign-in: after some wrong ones the right one waits, too; other names do not."""
    for _ in range(PAIR_FREE + 2):
        assert outcome(checking, named("rossi", "wrong")) == REFUSED
    assert outcome(checking, named("rossi", PASSWORD)) == REFUSED
    assert "too many wrong passcodes" in checking.log(PAIR_FREE + 3)[0].reason
    assert outcome(checking, None) == "silent"


def test_a_changed_password_and_a_disabled_user_count_at_once(checking: Serving) -> None:
    """Though a passcode that was right is remembered for a minute."""
    assert outcome(checking, named("rossi", PASSWORD)) == "answered"
    checking.ledger.set_password("rossi", hash_password("another long song here"))
    assert outcome(checking, named("rossi", PASSWORD)) == REFUSED
    assert outcome(checking, named("rossi", "another long song here")) == "answered"
    checking.ledger.disable_user("rossi")
    assert outcome(checking, named("rossi", "another long song here")) == REFUSED


def test_the_passcode_is_nowhere(checking: Serving, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    secret = "wholly-secret-passcode"
    with caplog.at_level(logging.DEBUG):
        assert outcome(checking, named("rossi", secret)) == REFUSED
        assert outcome(checking, named("rossi", PASSWORD)) == "answered"
        request = pdu.AssociateRequest(AE_TITLE, "CT1", echo_request().contexts,
                                       user_identity=named("rossi", secret))
        broken = bytearray(pdu.encode_request(request))
        broken[broken.index(b"\x58\x00") + 7] = 0xFF  # the name's length lies
        with Raw(checking.port) as raw:
            raw.send(bytes(broken))
            assert raw.receive() == (PduType.ABORT, bytes(4))
    assert secret not in repr(request)
    rows = repr(checking.log(2))
    for text in (caplog.text, rows):
        assert secret not in text and PASSWORD not in text
    for path in tmp_path.rglob("ledger.db*"):
        octets = path.read_bytes()
        assert secret.encode() not in octets and PASSWORD.encode() not in octets


def test_a_peer_of_another_make_is_answered(checking: Serving) -> None:
    item = UserIdentityNegotiation()
    item.user_identity_type = 2
    item.positive_response_requested = True
    item.primary_field = b"rossi"
    item.secondary_field = PASSWORD.encode()
    ae = AE("CT1")
    ae.add_requested_context("1.2.840.10008.1.1")
    association = ae.associate("127.0.0.1", checking.port, ae_title=AE_TITLE, ext_neg=[item])
    assert association.is_established
    assert association.acceptor.user_identity is not None
    association.release()
    item.secondary_field = b"wrong"
    refused = ae.associate("127.0.0.1", checking.port, ae_title=AE_TITLE, ext_neg=[item])
    assert refused.is_rejected


def test_dcmtk_names_a_user(checking: Serving, tmp_path: Path) -> None:
    path = tmp_path / "one.dcm"
    path.write_bytes(make_instance().part10)
    for passcode in (PASSWORD, "wrong"):
        subprocess.run([dcmtk("storescu"), "-aet", "CT1", "-aec", AE_TITLE, "-usr", "rossi", "-pwd", passcode,
                        "-rsp", "127.0.0.1", str(checking.port), str(path)],
                       capture_output=True, timeout=20, check=False)
    wait_for(lambda: len(checking.ledger.connections()) == 2, "the connection log")
    refused, accepted = checking.ledger.connections()
    assert (accepted.outcome, accepted.user_name) == ("accepted", "rossi")
    assert refused.ended == f"rejected {REFUSED}"
