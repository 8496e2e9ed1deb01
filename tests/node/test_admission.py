"""Who gets in, what the others are told, and what the connection log says."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import pytest

from archive.ledger import Connection, Device
from node.admission import UNKNOWN, listed_at, remedy
from node.dimse import pdu
from node.dimse.association import Limits
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE, STUDY_ROOT_FIND, VERIFICATION
from node.dimse.errors import Rejected
from node.dimse.requestor import ECHO_CONTEXT, Peer, Requestor, echo
from tests.node.serving import AE_TITLE, Raw, Serving, echo_request, serving
from tests.waiting import wait_for


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path) as running:
        yield running


def rejection(port: int, calling_ae: str, called_ae: str = AE_TITLE) -> str:
    with pytest.raises(Rejected) as caught:
        echo(Peer("127.0.0.1", port, called_ae), calling_ae)
    return caught.value.rejection.triple


def test_unknown_calling_ae(served: Serving) -> None:
    """26."""
    assert rejection(served.port, "CT9") == "1/1/3"
    entry = served.log(1)[0]
    assert (entry.outcome, entry.ended, entry.calling_ae) == ("refused", "rejected 1/1/3", "CT9")
    assert entry.reason == "no device has this AE title"
    assert remedy(entry) == "miss device add CT9 127.0.0.1"


@pytest.mark.parametrize("title", [b"C\0T1", b"CT1\0X", b"ct1", b"CT1\xc2\xa0", b"\tCT1", b"CT 1"])
def test_a_title_that_only_looks_like_a_device_is_none(served: Serving, title: bytes) -> None:
    request = bytearray(pdu.encode_request(echo_request()))
    request[26:42] = title.ljust(16)
    with Raw(served.port) as raw:
        raw.send(bytes(request))
        assert raw.receive() == (pdu.PduType.ASSOCIATE_RJ, b"\0\1\1\3")
    assert served.log(1)[0].device == ""


def test_wrong_called_ae(served: Serving) -> None:
    """27."""
    assert rejection(served.port, "CT1", "ARCHIVE") == "1/1/7"
    entry = served.log(1)[0]
    assert entry.reason == "it called another AE title; this node is MISS"
    assert entry.called_ae == "ARCHIVE" and remedy(entry) == ""


def test_another_address(served: Serving) -> None:
    """28: told the same as a stranger; the log says which check failed."""
    with socket.create_connection(("127.0.0.1", served.port), source_address=("127.0.0.2", 0)) as sock:
        sock.sendall(pdu.encode_request(echo_request()))
        assert sock.recv(10) == pdu.encode_rejection(pdu.Rejection(1, 1, 3))
    entry = served.log(1)[0]
    assert entry.address == "127.0.0.2"
    assert entry.reason == "the device is not listed at this address, but at 127.0.0.1"
    assert remedy(entry) == "miss device add CT1 127.0.0.2"


def test_disabled_and_added_live(served: Serving) -> None:
    served.ledger.add_device(Device("CT1", "127.0.0.1", enabled=False))
    assert rejection(served.port, "CT1") == "1/1/3"
    assert served.log(1)[0].reason == "the device is disabled"
    served.ledger.add_device(Device("CT1", "127.0.0.0/8"))
    assert echo(served.peer, "CT1") == 0
    served.ledger.remove_device("CT1")
    assert rejection(served.port, "CT1") == "1/1/3"


def test_limit_per_device_and_another_is_still_served(tmp_path: Path) -> None:
    """38."""
    with serving(tmp_path, associations_per_device_max=2) as served:
        served.ledger.add_device(Device("MR1", "*"))
        held = [Requestor.connect(served.peer, "CT1", [ECHO_CONTEXT]) for _ in range(2)]
        assert rejection(served.port, "CT1") == "2/3/2"
        assert "associations_per_device_max" in served.log(1)[0].reason
        assert echo(served.peer, "MR1") == 0
        held[0].release()
        assert echo(served.peer, "CT1") == 0
        held[1].abort()
        wait_for(lambda: served.admission.associations == {}, "every place is free")


def test_limit_in_all(tmp_path: Path) -> None:
    with serving(tmp_path, associations_max=1) as served:
        served.ledger.add_device(Device("MR1", "*"))
        with Requestor.connect(served.peer, "CT1", [ECHO_CONTEXT]):
            assert rejection(served.port, "MR1") == "2/3/2"
        assert echo(served.peer, "MR1") == 0


def test_release_frees_the_place_before_it_is_answered(tmp_path: Path) -> None:
    with serving(tmp_path, associations_per_device_max=1) as served:
        for _ in range(50):
            assert echo(served.peer, "CT1") == 0


def test_a_protocol_that_is_not_ours(served: Serving) -> None:
    contexts = (pdu.ProposedContext(1, VERIFICATION, (IMPLICIT_LITTLE,)),)
    for request, triple in (
        (pdu.AssociateRequest(AE_TITLE, "CT1", contexts, application_context="1.2.3"),
         pdu.Rejection(1, 1, 2)),
        (pdu.AssociateRequest(AE_TITLE, "CT1", contexts, protocol_version=2), pdu.Rejection(1, 2, 2)),
    ):
        with Raw(served.port) as raw:
            raw.send(pdu.encode_request(request))
            assert raw.receive() == (3, pdu.encode_rejection(triple)[6:])


def test_a_ledger_that_fails_refuses_for_now(served: Serving) -> None:
    served.ledger.close()
    assert rejection(served.port, "CT1") == "2/3/1"


def test_a_ledger_that_hangs_refuses_for_now(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.admission.LEDGER_S_MAX", 0.2)
    free = Event()
    with monkeypatch.context() as patch:
        patch.setattr(served.ledger, "device", lambda _: free.wait(20))
        assert [rejection(served.port, "CT1") for _ in range(3)] == ["2/3/1"] * 3
    free.set()
    wait_for(lambda: echo_answers(served), "it is back")


def echo_answers(served: Serving) -> bool:
    try:
        return echo(served.peer, "CT1") == 0
    except Rejected:
        return False


def test_contexts_are_logged(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.ledger.add_device(Device("CT1", "*", services=frozenset({"store"})))
        proposed = (pdu.ProposedContext(1, VERIFICATION, (IMPLICIT_LITTLE,)),
                    pdu.ProposedContext(3, STUDY_ROOT_FIND, (IMPLICIT_LITTLE,)))
        with Requestor.connect(served.peer, "CT1", proposed) as requestor:
            assert requestor.context_of(STUDY_ROOT_FIND) is None
        assert json.loads(served.log(1)[0].contexts) == [f"{VERIFICATION} {IMPLICIT_LITTLE}",
                                                         f"{STUDY_ROOT_FIND} refused 1"]


def test_sop_classes_and_transfer_syntaxes_of_a_device(tmp_path: Path) -> None:
    """32: counts for the next association."""
    ct, mr = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
    proposed = (pdu.ProposedContext(1, ct, (IMPLICIT_LITTLE,)),
                pdu.ProposedContext(3, mr, (IMPLICIT_LITTLE,)),
                pdu.ProposedContext(5, ct, (EXPLICIT_LITTLE,)))
    with serving(tmp_path) as served:
        served.ledger.add_device(Device("CT1", "*", sop_classes=frozenset((ct,)),
                                        transfer_syntaxes=frozenset((EXPLICIT_LITTLE,))))
        with Raw(served.port) as raw:
            accept = raw.associate(pdu.AssociateRequest(AE_TITLE, "CT1", proposed, 16384))
        assert [context.result for context in accept.contexts] == [4, 3, 0]
        served.ledger.add_device(Device("CT1", "*"))
        with Raw(served.port) as raw:
            accept = raw.associate(pdu.AssociateRequest(AE_TITLE, "CT1", proposed, 16384))
        assert [context.result for context in accept.contexts] == [0, 0, 0]


def connect_from(address: str, port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10, source_address=(address, 0))


def test_one_address_takes_nobody_elses_room(tmp_path: Path) -> None:
    """Past its own bound its oldest gives way; others keep theirs."""
    limits = Limits(artim_s=20.0)
    with serving(tmp_path, limits=limits, pending_per_address_max=5) as served, ExitStack() as held:
        others = [held.enter_context(connect_from(f"127.0.0.{n}", served.port)) for n in range(3, 8)]
        silent = [held.enter_context(connect_from("127.0.0.2", served.port)) for _ in range(20)]
        wait_for(lambda: served.server.connections == 10, "five of each kind")
        assert silent[0].recv(1) == b""
        assert echo(served.peer, "CT1") == 0
        for sock in others:
            sock.sendall(pdu.encode_request(echo_request("NOBODY")))
            assert sock.recv(1) == bytes((pdu.PduType.ASSOCIATE_RJ,))


def test_whoever_has_most_gives_way_when_all_room_is_taken(tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.dimse.server.PENDING_MAX", 20)
    with serving(tmp_path, limits=Limits(artim_s=20.0)) as served, ExitStack() as held:
        first = held.enter_context(connect_from("127.0.0.3", served.port))
        for _ in range(60):
            held.enter_context(connect_from("127.0.0.2", served.port))
        wait_for(lambda: served.server.connections == 20, "as many as there is room for")
        first.sendall(pdu.encode_request(echo_request("NOBODY")))
        assert first.recv(1) == bytes((pdu.PduType.ASSOCIATE_RJ,)), "it was the oldest, and had but one"


def test_what_never_became_an_association_is_counted(served: Serving) -> None:
    """46, and a million scans: one row for one address and cause."""
    for octets in (b"GET / HTTP/1.1\r\n\r\n", b"", bytes.fromhex("0700000000040000")):
        for _ in range(4):
            with Raw(served.port) as raw:
                raw.send(octets)
    wait_for(lambda: sum(row.times for row in served.ledger.connections()) == 12, "all are counted")
    rows = {row.ended: row for row in served.ledger.connections()}
    assert {cause: row.times for cause, row in rows.items()} == {
        "it does not speak DICOM": 4, "the peer closed the connection": 4,
        "it aborted before an association": 4}
    assert {row.outcome for row in rows.values()} == {"failed"}
    assert remedy(rows["it does not speak DICOM"]) == ""


def test_many_devices_at_once(tmp_path: Path) -> None:
    """Two hundred that open together are all let in; each is looked up in the ledger as it is now."""
    room = {"associations_max": 300, "associations_per_device_max": 300}
    with serving(tmp_path, limits=Limits(), **room) as served, ExitStack() as held:  # type: ignore[arg-type]
        raws = [held.enter_context(Raw(served.port)) for _ in range(200)]
        for raw in raws:
            raw.send(pdu.encode_request(echo_request()))
        assert {raw.receive()[0] for raw in raws} == {pdu.PduType.ASSOCIATE_AC}
        assert served.admission.associations == {"CT1": 200}


@pytest.mark.parametrize(("address", "listed", "came_from"), [
    ("10.0.0.5", True, "10.0.0.5"), ("10.0.0.5", False, "10.0.0.6"), ("10.0.0.0/24", True, "10.0.0.99"),
    ("10.0.0.0/24", False, "10.0.1.1"), ("*", True, "2001:db8::1"), ("10.0.0.5", True, "::ffff:10.0.0.5"),
    ("2001:db8::/32", True, "2001:db8::7"), ("not an address", False, "10.0.0.5"), ("", False, "10.0.0.5"),
    ("10.0.0.5", False, "fe80::1%eth0"),
])
def test_addresses(address: str, listed: bool, came_from: str) -> None:
    assert listed_at(Device("X", address), came_from) is listed


@pytest.mark.parametrize("title", ["CT1; rm -rf /", "$(reboot)", "CT 1", "a'b"])
def test_the_remedy_can_be_pasted(title: str) -> None:
    row = Connection(0, "10.0.0.5", title, "MISS", outcome="refused", reason=UNKNOWN)
    assert shlex.split(remedy(row)) == ["miss", "device", "add", title, "10.0.0.5"]


def test_no_remedy_for_what_cannot_be_typed() -> None:
    for title in ("", "CT\x07", "C\ufffd"):
        row = Connection(0, "10.0.0.5", title, "MISS", outcome="refused", reason=UNKNOWN)
        assert remedy(row) == ""
