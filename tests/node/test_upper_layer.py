"""PS3.8 as acceptor, against peers that behave and peers that do not."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from node.admission import Admission
from node.dimse import messages, pdu
from node.dimse.association import Association, Context, Limits
from node.dimse.closing import ABORTS_MAX
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE, VERIFICATION
from node.dimse.errors import PeerAborted, TimedOut, Violation
from node.dimse.pdu import PduType, ProposedContext
from node.dimse.requestor import ECHO_CONTEXT, Peer, Requestor, echo
from node.dimse.wire import Wire
from tests.node.serving import AE_TITLE, QUICK, Raw, Serving, data, echo_request, serving
from tests.waiting import wait_for

ECHO_RQ = messages.echo_request(7)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path) as running:
        yield running


def test_echo_and_release(served: Serving) -> None:
    with Raw(served.port) as raw:
        accept = raw.associate()
        assert accept.contexts == (pdu.AnsweredContext(1, 0, IMPLICIT_LITTLE),)
        assert (accept.called_ae, accept.calling_ae) == (AE_TITLE, "CT1")
        assert accept.implementation_class_uid.startswith("2.25.")
        raw.send(data(1, 3, ECHO_RQ))
        kind, body = raw.receive()
        answer = messages.parse(body[6:])
        assert (kind, answer.field, answer.status) == (4, 0x8030, 0)
        assert answer.short(messages.MESSAGE_ID_RESPONDED_TO, 0) == 7
        raw.send(pdu.RELEASE_RQ_OCTETS)
        assert raw.receive() == (PduType.RELEASE_RP, bytes(4))
    entry = served.log(1)[0]
    assert (entry.outcome, entry.ended, entry.device) == ("accepted", "released", "CT, room 1")
    assert entry.operations == '{"C-ECHO 0000": 1}'
    assert entry.bytes_in > 200 and entry.bytes_out > 100


@pytest.mark.parametrize("step", [1, 3, 5, 7, 11])
def test_a_message_in_crumbs(served: Serving, step: int) -> None:
    """TCP keeps no boundaries: PDUs arrive cut anywhere, several at once, a command in many fragments."""
    with Raw(served.port) as raw:
        raw.associate()
        fragments = [ECHO_RQ[at:at + 9] for at in range(0, len(ECHO_RQ), 9)]
        octets = b"".join(data(1, 3 if n == len(fragments) - 1 else 1, f) for n, f in enumerate(fragments))
        octets *= 2
        for at in range(0, len(octets), step):
            raw.send(octets[at:at + step])
        assert [raw.receive()[0], raw.receive()[0]] == [4, 4]


def test_several_values_in_one_pdu(served: Serving) -> None:
    with Raw(served.port) as raw:
        raw.associate()
        half = len(ECHO_RQ) // 2
        items = b"".join(struct.pack(">IBB", len(part) + 2, 1, control) + part
                         for part, control in ((ECHO_RQ[:half], 1), (b"", 1), (ECHO_RQ[half:], 3)))
        raw.send(struct.pack(">BxI", 4, len(items)) + items)
        assert raw.receive()[0] == 4


def test_the_receive_buffer_grows_and_shrinks_between_messages(tmp_path: Path) -> None:
    """It grows when a peer sends fast and shrinks while it is silent: the next header is read from the new
    one."""
    limits = Limits(artim_s=1.0, idle_timeout_s=30.0, message_timeout_s=0.2, max_pdu_bytes=0)
    odd = messages.build(messages.short(0x0100, 0x0777), messages.short(0x0110, 9), messages.short(0x0800, 1))
    with serving(tmp_path, limits=limits) as served, Raw(served.port) as raw:
        raw.associate()
        for size in (16_384, 100_000, 600_001, 1_000_000):
            raw.send(data(1, 3, odd) + data(1, 2, bytes(size)) + data(1, 3, ECHO_RQ))
            assert messages.parse(raw.receive()[1][6:]).status == 0x0211
            assert messages.parse(raw.receive()[1][6:]).status == 0
            time.sleep(0.3)  # beyond one look at the limits


@pytest.mark.parametrize("size", range(16_300, 16_420, 7))
def test_a_header_at_the_buffers_edge(served: Serving, size: int) -> None:
    odd = messages.build(messages.short(0x0100, 0x0777), messages.short(0x0110, 9), messages.short(0x0800, 1))
    with Raw(served.port) as raw:
        raw.associate()
        raw.send(data(1, 3, odd) + data(1, 0, bytes(size)) + data(1, 2, bytes(40_000)) + data(1, 3, ECHO_RQ))
        assert messages.parse(raw.receive()[1][6:]).status == 0x0211
        assert messages.parse(raw.receive()[1][6:]).status == 0


def test_what_we_do_not_negotiate_is_passed_over(served: Serving) -> None:
    """User identity and extended negotiation of what has none: no answer, so none of them (PS3.7 D.3.3)."""
    request = pdu.AssociateRequest(
        AE_TITLE, "CT1", (ProposedContext(1, VERIFICATION, (IMPLICIT_LITTLE,)),), 16384,
        user_identity=pdu.UserIdentity(2, True, b"user", b"secret"), extended=((VERIFICATION, b"\1"),),
        common_extended=(pdu.CommonExtended(VERIFICATION, "1.2.840.10008.4.2", ("1.2.3",)),))
    with Raw(served.port) as raw:
        raw.send(pdu.encode_request(request))
        kind, body = raw.receive()
        information = body.index(b"\x50\x00")
        kinds = {item for item, _ in pdu._items(memoryview(body)[information + 4:])}
        assert (kind, kinds) == (PduType.ASSOCIATE_AC, {0x51, 0x52, 0x55})
    assert "secret" not in repr(served.log(1))


def test_a_peer_that_does_not_read_is_left() -> None:
    ours, theirs = _pair()
    wire = Wire(ours, send_timeout_s=0.2)
    with pytest.raises(TimedOut, match="does not read"):
        wire.send(bytes(64 << 20))
    with pytest.raises(TimedOut, match="does not read"):
        wire.send_vector([bytes(1 << 20)] * 64)
    wire.close()
    theirs.close()


# --- PS3.8 Tables 9-6 to 9-10, state by state, with one PDU of each kind

PDUS = {
    "A-ASSOCIATE-RQ": pdu.encode_request(echo_request()),
    "A-ASSOCIATE-AC": pdu.encode_accept(pdu.AssociateAccept("A", "B", ())),
    "A-ASSOCIATE-RJ": pdu.encode_rejection(pdu.Rejection(1, 1, 1)),
    "P-DATA-TF": data(1, 3, ECHO_RQ),
    "A-RELEASE-RQ": pdu.RELEASE_RQ_OCTETS,
    "A-RELEASE-RP": pdu.RELEASE_RP_OCTETS,
    "A-ABORT": pdu.encode_abort(0, 0),
    "of no known type": struct.pack(">BxI", 9, 4) + bytes(4),
    "A-RELEASE-RQ of 5 octets": struct.pack(">BxI", 5, 5) + bytes(5),
    "A-RELEASE-RP of 3 octets": struct.pack(">BxI", 6, 3) + bytes(3),
    "A-ASSOCIATE-RJ of 9 octets": struct.pack(">BxI", 3, 9) + bytes(9),
}
USER_ABORT = (int(PduType.ABORT), bytes(4))
CLOSED = (0, b"")
UNEXPECTED, UNRECOGNIZED, INVALID = 2, 1, 6


def provider_abort(reason: int) -> tuple[int, bytes]:
    return int(PduType.ABORT), bytes((0, 0, 2, reason))


def _reason(kind: str) -> int:
    return UNRECOGNIZED if "type" in kind else INVALID if "octets" in kind else UNEXPECTED


MORE_IN_STA2 = {
    "an A-ASSOCIATE-RQ of 70 KB": struct.pack(">BxI", 1, 70 << 10),
    "an empty A-ASSOCIATE-RQ": struct.pack(">BxI", 1, 0),
    "no DICOM": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("kind", [*PDUS, *MORE_IN_STA2])
def test_sta2(served: Serving, kind: str) -> None:
    """AE-6 for A-ASSOCIATE-RQ, AA-2 for A-ABORT, AA-1 (source service-user) for all else."""
    with Raw(served.port) as raw:
        raw.send((PDUS | MORE_IN_STA2)[kind])
        answer = raw.receive()
        if kind == "A-ASSOCIATE-RQ":
            assert answer[0] == PduType.ASSOCIATE_AC
        else:
            assert answer == (CLOSED if kind == "A-ABORT" else USER_ABORT)


def test_sta2_ends_with_artim_in_silence(served: Serving) -> None:
    """AA-2: closed without a word."""
    with Raw(served.port) as raw:
        assert raw.closed()
    with Raw(served.port) as raw:  # AA-5
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.closed()
    wait_for(lambda: served.server.connections == 0, "none is left")


def held_admission(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Admission says by the first event that it was asked, and thinks until the second."""
    entered, go = threading.Event(), threading.Event()
    admit = Admission.admit

    def slow(self: Admission, *args: Any) -> Any:
        entered.set()
        go.wait(10)
        return admit(self, *args)

    monkeypatch.setattr(Admission, "admit", slow)
    return entered, go


@pytest.mark.parametrize("kind", PDUS)
def test_sta3(served: Serving, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """While admission thinks, the peer has to wait: AA-3 for A-ABORT, AA-8 for all else."""
    entered, go = held_admission(monkeypatch)
    with Raw(served.port) as raw:
        raw.send(PDUS["A-ASSOCIATE-RQ"])
        assert entered.wait(10)
        raw.send(PDUS[kind])
        go.set()
        assert raw.receive() == (CLOSED if kind == "A-ABORT" else provider_abort(_reason(kind)))
    wait_for(lambda: served.admission.associations == {}, "the place is free")


def test_sta3_a_peer_that_closes(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """AA-4."""
    entered, go = held_admission(monkeypatch)
    with Raw(served.port) as raw:
        raw.send(PDUS["A-ASSOCIATE-RQ"])
        assert entered.wait(10)
    go.set()
    assert served.log(1)[0].ended == "the peer closed the connection"
    wait_for(lambda: served.admission.associations == {}, "the place is free")


UNEXPECTED_IN_STA6 = {
    **{kind: (octets, _reason(kind)) for kind, octets in PDUS.items()
       if kind not in ("P-DATA-TF", "A-RELEASE-RQ", "A-ABORT")},
    "P-DATA-TF beyond the maximum": (struct.pack(">BxI", 4, (256 << 10) + 1), 6),
    "P-DATA-TF of 4 GB": (struct.pack(">BxI", 4, 0xFFFFFFF0), 6),
    "an empty P-DATA-TF": (struct.pack(">BxI", 4, 0), 6),
    "a value longer than its PDU": (struct.pack(">BxIIBB", 4, 8, 90, 1, 3) + b"xy", 6),
    "a value shorter than its header": (struct.pack(">BxIIBB", 4, 8, 1, 1, 3) + b"xy", 6),
    "a header cut by the PDU's end": (struct.pack(">BxI", 4, 8) + struct.pack(">IBB", 2, 1, 1) + b"xy", 6),
    "a context that was not accepted": (data(3, 3, ECHO_RQ), 6),
    "a data set without a command": (data(1, 2, b"xx"), 5),
    "an element past the command's end": (data(1, 3, ECHO_RQ[:-1]), 6),
    "an A-ABORT of 4 GB": (struct.pack(">BxI", 7, 0xFFFFFFF0), 6),
}


@pytest.mark.parametrize(("octets", "reason"), UNEXPECTED_IN_STA6.values(), ids=UNEXPECTED_IN_STA6.keys())
def test_sta6_aborts_with_the_reason(served: Serving, octets: bytes, reason: int) -> None:
    """AA-8: A-ABORT, source service-provider, with the reason of Table 9-26."""
    with Raw(served.port) as raw:
        raw.associate()
        raw.send(octets)
        assert raw.receive() == provider_abort(reason)
    assert served.log(1)[0].ended.startswith("aborted by us: ")


def test_sta6_a_peer_that_closes(served: Serving) -> None:
    """AA-4."""
    with Raw(served.port) as raw:
        raw.associate()
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.closed()
    assert served.log(1)[0].ended == "the peer closed the connection"


@pytest.mark.parametrize("kind", PDUS)
@pytest.mark.parametrize("requestor", [True, False], ids=["requestor", "acceptor"])
def test_sta7(kind: str, requestor: bool) -> None:
    """We asked to release: AR-3, AR-6, AR-8, AA-3, and AA-8 for all else."""
    with releasing(requestor=requestor) as raw:
        raw.send(PDUS[kind])
        if kind == "P-DATA-TF":
            raw.send(PDUS["A-RELEASE-RP"])
        if kind == "A-RELEASE-RQ" and requestor:
            assert raw.receive() == (PduType.RELEASE_RP, bytes(4))
        elif kind == "A-RELEASE-RQ":
            raw.send(PDUS["A-RELEASE-RP"])
            assert raw.receive() == (PduType.RELEASE_RP, bytes(4))
        else:
            ends = kind in ("P-DATA-TF", "A-RELEASE-RP", "A-ABORT")
            assert raw.receive() == (CLOSED if ends else provider_abort(_reason(kind)))


def test_sta7_a_peer_that_does_not_answer() -> None:
    """AA-1 when the time is over."""
    with releasing(requestor=True) as raw:
        assert raw.receive() == USER_ABORT
        assert raw.closed()


@pytest.mark.parametrize("kind", PDUS)
def test_sta8(served: Serving, kind: str) -> None:
    """The peer asked to release and said more: AA-3 for A-ABORT, AA-8 for all else."""
    with Raw(served.port) as raw:
        raw.associate()
        raw.send(PDUS["A-RELEASE-RQ"] + PDUS[kind])
        assert raw.receive() == (CLOSED if kind == "A-ABORT" else provider_abort(_reason(kind)))


def test_sta8_a_peer_that_does_not_wait(served: Serving) -> None:
    """AR-4 all the same: it said what it had to say."""
    with Raw(served.port) as raw:
        raw.associate()
        raw.send(PDUS["A-RELEASE-RQ"])
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.receive() == (PduType.RELEASE_RP, bytes(4))
        assert raw.closed()
    assert served.log(1)[0].ended == "released"


@pytest.mark.parametrize("kind", PDUS)
@pytest.mark.parametrize("requestor", [True, False], ids=["Sta11", "Sta10"])
def test_a_release_collision(kind: str, requestor: bool) -> None:
    """Both asked: AR-9 and AR-3 as requestor, AR-10 and AR-4 as acceptor; AA-3; AA-8 for all else."""
    with releasing(requestor=requestor) as raw:
        raw.send(PDUS["A-RELEASE-RQ"])
        if requestor:
            assert raw.receive() == (PduType.RELEASE_RP, bytes(4))
        raw.send(PDUS[kind])
        if kind == "A-RELEASE-RP" and not requestor:
            assert raw.receive() == (PduType.RELEASE_RP, bytes(4))
        elif kind in ("A-RELEASE-RP", "A-ABORT"):
            assert raw.closed()
        else:
            assert raw.receive() == provider_abort(_reason(kind))


TO_STA13 = {
    "after A-RELEASE-RP": (True, PDUS["A-RELEASE-RQ"], (int(PduType.RELEASE_RP), bytes(4))),
    "after our A-ABORT": (True, PDUS["of no known type"], provider_abort(UNRECOGNIZED)),
    "inside a PDU that was refused": (True, struct.pack(">BxI", 4, 0), provider_abort(INVALID)),
    "after A-ASSOCIATE-RJ": (False, pdu.encode_request(echo_request("NOBODY")),
                             (int(PduType.ASSOCIATE_RJ), bytes((0, 1, 1, 3)))),
    "after AA-1": (False, PDUS["A-RELEASE-RP"], USER_ABORT),
}


@pytest.mark.parametrize("way", TO_STA13)
@pytest.mark.parametrize("kind", PDUS)
def test_sta13(served: Serving, way: str, kind: str) -> None:
    """AA-7 for A-ASSOCIATE-RQ and for what is no PDU, AA-2 for A-ABORT, AA-6 (passed over) for all else."""
    associated, octets, answer = TO_STA13[way]
    with Raw(served.port) as raw:
        if associated:
            raw.associate()
        raw.send(octets)
        assert raw.receive() == answer
        raw.send(PDUS[kind])
        if kind == "A-ABORT":
            assert raw.closed()
        elif kind == "A-ASSOCIATE-RQ" or _reason(kind) != UNEXPECTED:
            assert raw.receive() == provider_abort(_reason(kind))
        raw.send(PDUS["A-ASSOCIATE-RQ"])
        assert raw.receive() == provider_abort(UNEXPECTED) or kind == "A-ABORT"


def test_sta13_is_bounded(served: Serving) -> None:
    """By ARTIM in silence (AA-2), by what may still come, and by the aborts that are sent."""
    with Raw(served.port) as raw:
        raw.send(PDUS["A-RELEASE-RP"])
        assert raw.receive() == USER_ABORT
        started = time.monotonic()
        assert raw.closed()
        assert time.monotonic() - started < 5
    with Raw(served.port) as raw:
        raw.send(PDUS["A-RELEASE-RP"] + struct.pack(">BxI", 4, 100 << 20))
        with pytest.raises(OSError):
            for _ in range(100):
                raw.send(bytes(1 << 20))
            raise AssertionError("100 MiB were taken")
    with Raw(served.port) as raw:
        raw.send(PDUS["A-RELEASE-RP"] + PDUS["of no known type"] * 20)
        answers = [raw.receive() for _ in range(10)]
        assert answers == [USER_ABORT] + [provider_abort(UNRECOGNIZED)] * ABORTS_MAX + [CLOSED]


def test_a_peers_abort_ends_it(served: Serving) -> None:
    with Raw(served.port) as raw:
        raw.associate()
        raw.send(pdu.encode_abort(0, 0))
        assert raw.closed()
    assert served.log(1)[0].ended == "the peer aborted (source 0, reason 0)"
    wait_for(lambda: served.admission.associations == {}, "the place is free")


def test_a_message_that_stops_is_cut(served: Serving) -> None:
    with Raw(served.port) as raw:
        raw.associate()
        started = time.monotonic()
        raw.send(data(1, 1, ECHO_RQ[:20]))
        assert raw.receive() == (PduType.ABORT, bytes(4))
        assert 1.5 < time.monotonic() - started < 6


def test_idle_association_is_cut(tmp_path: Path) -> None:
    limits = Limits(artim_s=1.0, idle_timeout_s=0.5, message_timeout_s=5.0)
    with serving(tmp_path, limits=limits) as served, Raw(served.port) as raw:
        raw.associate()
        assert raw.receive() == (PduType.ABORT, bytes(4))


def test_artim_cuts_a_slow_association_request(served: Serving) -> None:
    """35: one octet at a time keeps no connection beyond ARTIM."""
    octets = pdu.encode_request(echo_request())
    with Raw(served.port) as raw:
        started = time.monotonic()
        with pytest.raises(OSError):
            for octet in octets:
                raw.send(bytes((octet,)))
                time.sleep(0.05)
            raise AssertionError("the whole request was taken")
        assert time.monotonic() - started < 5


def test_a_browser_is_shown_the_door(served: Serving) -> None:
    """46."""
    with Raw(served.port) as raw:
        raw.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.receive() == (PduType.ABORT, bytes(4))
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.closed()
    wait_for(lambda: served.server.connections == 0, "no connection left")
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "dimse"], "no thread left")


def test_silent_connections_do_not_hurt_an_echo(tmp_path: Path) -> None:
    """33: 200 of them."""
    limits = Limits(artim_s=20.0)
    with serving(tmp_path, limits=limits) as served:
        silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(200)]
        wait_for(lambda: served.server.connections == 200, "all are there")
        started = time.monotonic()
        assert echo(served.peer, "CT1") == 0
        assert time.monotonic() - started < 1.0
        for sock in silent:
            sock.close()


def test_silent_connections_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound the oldest gives way."""
    monkeypatch.setattr("node.dimse.server.PENDING_MAX", 20)
    with serving(tmp_path, limits=Limits(artim_s=20.0)) as served:
        silent = [Raw(served.port) for _ in range(60)]
        wait_for(lambda: served.server.connections <= 20, "no more than the bound")
        assert silent[0].closed()
        assert echo(served.peer, "CT1") == 0
        for raw in silent:
            raw.sock.close()


def test_a_huge_length_before_association_costs_nothing(served: Serving) -> None:
    """36: PDU length FFFFFFF0, then 200 MiB."""
    before = psutil.Process().memory_info().rss
    with Raw(served.port) as raw:
        raw.send(struct.pack(">BxI", 1, 0xFFFFFFF0))
        block = bytes(1 << 20)
        with pytest.raises(OSError):
            for _ in range(200):
                raw.send(block)
            raise AssertionError("200 MiB were taken")
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_a_release_before_the_last_fragment_is_honoured(served: Serving) -> None:
    with Raw(served.port) as raw:
        raw.associate()
        raw.send(data(1, 1, ECHO_RQ[:20]) + pdu.RELEASE_RQ_OCTETS)
        assert raw.receive() == (PduType.RELEASE_RP, bytes(4))


def test_unknown_operations_are_answered_0211(served: Serving) -> None:
    with Raw(served.port) as raw:
        raw.associate()
        odd = messages.build(messages.element(0x0002, VERIFICATION.encode()), messages.short(0x0100, 0x0777),
                             messages.short(0x0110, 9), messages.short(0x0800, 1))
        raw.send(data(1, 3, odd) + data(1, 0, b"12") + data(1, 2, b"34"))  # with a data set, which is drained
        answer = messages.parse(raw.receive()[1][6:])
        assert (answer.status, answer.field, answer.short(0x0120, 0)) == (0x0211, 0x8777, 9)
        raw.send(data(1, 3, messages.cancel_request(9)))  # of nothing: passed over
        raw.send(data(1, 3, ECHO_RQ))
        assert messages.parse(raw.receive()[1][6:]).status == 0


def test_a_response_to_nothing_aborts(served: Serving) -> None:
    with Raw(served.port) as raw:
        raw.associate()
        raw.send(data(1, 3, messages.response(messages.parse(ECHO_RQ), 0)))
        assert raw.receive() == (PduType.ABORT, bytes(4))


def test_command_sets_are_bounded(served: Serving) -> None:
    with Raw(served.port) as raw:
        raw.associate()
        raw.send(b"".join(data(1, 1, bytes(4000)) for _ in range(5)))
        assert raw.receive() == (PduType.ABORT, bytes(4))


def test_empty_fragments_are_bounded(served: Serving) -> None:
    with Raw(served.port) as raw:
        raw.associate()
        raw.send(data(1, 1, b"") * 1002)
        assert raw.receive() == (PduType.ABORT, bytes(4))


def test_both_release_at_once_as_requestor() -> None:
    """AR-8: the requestor answers the peer's request and waits for its own answer (Sta9, Sta11)."""
    with _scripted(pdu.RELEASE_RQ_OCTETS, wait_for_answer=True) as (peer_port, seen):
        requestor = _connect(peer_port)
        requestor.release()
    assert seen == [PduType.RELEASE_RQ, PduType.RELEASE_RP]


def test_release_passes_over_data_under_way() -> None:
    """AR-6: P-DATA-TF in Sta7."""
    with _scripted(data(1, 3, ECHO_RQ) + pdu.RELEASE_RP_OCTETS) as (peer_port, seen):
        _connect(peer_port).release()
    assert seen == [PduType.RELEASE_RQ]


def test_what_is_no_answer_to_a_release_is_aborted() -> None:
    with _scripted(pdu.encode_rejection(pdu.Rejection(1, 1, 1)), wait_for_answer=True) as (peer_port, seen):
        _connect(peer_port).release()
    assert seen == [PduType.RELEASE_RQ, PduType.ABORT]


def test_stop_lets_a_message_finish_and_ends_idle_ones(tmp_path: Path) -> None:
    with serving(tmp_path) as served, Raw(served.port) as busy, Raw(served.port) as idle:
        busy.associate()
        idle.associate()
        half = data(1, 3, ECHO_RQ)
        busy.send(half[:30])
        entered = threading.Thread(target=served.server.stop)
        wait_for(lambda: any(c.wire.busy for c in served.server._open()), "the first half is received")
        entered.start()
        assert idle.receive() == (PduType.ABORT, bytes(4))
        busy.send(half[30:])
        assert busy.receive()[0] == PduType.P_DATA_TF
        assert busy.receive()[0] == PduType.ABORT
        busy.sock.close()
        idle.sock.close()
        entered.join(10)
        assert not entered.is_alive()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", served.port), 1)


def test_mutated_pdus_neither_crash_nor_hang(tmp_path: Path) -> None:
    """44 (a sample): seeded mutations of a good conversation; afterwards an echo is answered, memory is
    flat."""
    chance = random.Random(44)
    good = pdu.encode_request(echo_request()) + data(1, 3, ECHO_RQ) + pdu.RELEASE_RQ_OCTETS
    limits = Limits(artim_s=0.2, idle_timeout_s=0.2, message_timeout_s=0.2)
    with serving(tmp_path, limits=limits) as served:
        echo(served.peer, "CT1")
        before = psutil.Process().memory_info().rss
        for _ in range(300):
            octets = bytearray(good)
            for _ in range(chance.randint(1, 8)):
                octets[chance.randrange(len(octets))] = chance.randrange(256)
            with Raw(served.port) as raw:
                raw.send(bytes(octets)[:chance.randint(1, len(octets))])
                raw.sock.shutdown(socket.SHUT_WR)
                while raw.sock.recv(65536):
                    pass
        assert echo(served.peer, "CT1") == 0
        assert psutil.Process().memory_info().rss - before < 16 << 20
        wait_for(lambda: served.admission.associations == {}, "no place is leaked")


def test_the_requestor_hears_an_abort(served: Serving) -> None:
    requestor = Requestor.connect(served.peer, "CT1", [ECHO_CONTEXT], limits=QUICK)
    context = requestor.context_of(VERIFICATION)
    assert context is not None
    requestor.association.wire.send(struct.pack(">BxI", 9, 4) + bytes(4))
    with pytest.raises(PeerAborted) as caught:
        requestor.echo()
    assert (caught.value.source, caught.value.reason) == (2, 1)
    requestor.abort()


def test_the_requestor_refuses_what_is_no_dicom() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    page = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    thread = threading.Thread(target=lambda: listener.accept()[0].sendall(page))
    thread.start()
    with pytest.raises(Violation, match="does not speak DICOM"):
        _connect(listener.getsockname()[1])
    thread.join()
    listener.close()


@contextmanager
def releasing(*, requestor: bool) -> Iterator[Raw]:
    """An association of ours that has just asked to release, and its peer."""
    ours, theirs = _pair()
    context = Context(1, VERIFICATION, IMPLICIT_LITTLE)
    association = Association(Wire(ours), {1: context}, 0, QUICK, requestor=requestor)
    thread = threading.Thread(target=association.release)
    thread.start()
    with Raw.of(theirs) as raw:
        assert raw.receive() == (PduType.RELEASE_RQ, bytes(4))
        yield raw
    thread.join(10)
    assert not thread.is_alive()


def _pair() -> tuple[socket.socket, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    listener.close()
    return ours, theirs


def _connect(port: int) -> Requestor:
    context = ProposedContext(1, VERIFICATION, (IMPLICIT_LITTLE, EXPLICIT_LITTLE))
    return Requestor.connect(Peer("127.0.0.1", port, "X"), "MISS", [context], limits=QUICK)


class _scripted:
    """An acceptor that takes every association and answers a release with given octets."""

    def __init__(self, answer: bytes, *, wait_for_answer: bool = False) -> None:
        self._answer = answer
        self._wait = wait_for_answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.seen: list[int] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> tuple[int, list[int]]:
        self._thread.start()
        return self._listener.getsockname()[1], self.seen

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._listener.close()

    def _run(self) -> None:
        with Raw.of(self._listener.accept()[0]) as raw:
            raw.receive()
            raw.send(pdu.encode_accept(pdu.AssociateAccept(
                "X", "MISS", (pdu.AnsweredContext(1, 0, IMPLICIT_LITTLE),), 16384)))
            self.seen.append(raw.receive()[0])
            raw.send(self._answer)
            if self._wait:
                kind, _ = raw.receive()
                self.seen.append(kind)
                if kind == PduType.RELEASE_RP:
                    raw.send(pdu.RELEASE_RP_OCTETS)
            raw.closed()
