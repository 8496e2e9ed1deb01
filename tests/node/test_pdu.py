"""PDU octets: judged by pynetdicom's codecs both ways, and by random input."""

from __future__ import annotations

import contextlib
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom import pdu as peer_pdu
from pynetdicom.pdu_primitives import A_ASSOCIATE

from node.dimse import pdu
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE, VERIFICATION

REQUEST = pdu.AssociateRequest(
    "CALLED", "CALLING",
    (pdu.ProposedContext(1, VERIFICATION, (IMPLICIT_LITTLE, EXPLICIT_LITTLE)),
     pdu.ProposedContext(255, "1.2.840.10008.5.1.4.1.1.2", (EXPLICIT_LITTLE,))),
    65536, roles=(pdu.Role("1.2.840.10008.5.1.4.1.1.2", True, True),),
    extended=(("1.2.840.10008.5.1.4.1.2.2.1", b"\x01\x01"),), asynchronous_window=(5, 1),
    user_identity=pdu.UserIdentity(2, True, b"user", b"pass"),
)
ACCEPT = pdu.AssociateAccept(
    "CALLED", "CALLING",
    (pdu.AnsweredContext(1, 0, IMPLICIT_LITTLE), pdu.AnsweredContext(255, 3, EXPLICIT_LITTLE)), 16382,
    roles=(pdu.Role("1.2.840.10008.5.1.4.1.1.2", True, False),),
)


def test_request_round_trip() -> None:
    octets = pdu.encode_request(REQUEST)
    assert struct.unpack(">BxI", octets[:6]) == (1, len(octets) - 6)
    assert pdu.decode_request(memoryview(octets)[6:]) == REQUEST


def test_accept_round_trip() -> None:
    octets = pdu.encode_accept(ACCEPT)
    assert pdu.decode_accept(memoryview(octets)[6:]) == ACCEPT


def test_a_peer_reads_our_request() -> None:
    theirs = peer_pdu.A_ASSOCIATE_RQ()
    theirs.decode(pdu.encode_request(REQUEST))
    assert (theirs.called_ae_title, theirs.calling_ae_title) == ("CALLED", "CALLING")
    assert [c.context_id for c in theirs.presentation_context] == [1, 255]
    primitive: A_ASSOCIATE = theirs.to_primitive()
    assert primitive.maximum_length_received == 65536
    assert primitive.implementation_class_uid == pdu.IMPLEMENTATION_CLASS_UID
    kinds = {type(item).__name__ for item in primitive.user_information}
    assert {"UserIdentityNegotiation", "AsynchronousOperationsWindowNegotiation",
            "SOPClassExtendedNegotiation", "SCP_SCU_RoleSelectionNegotiation"} <= kinds


def test_a_peer_reads_our_answers() -> None:
    accept = peer_pdu.A_ASSOCIATE_AC()
    accept.decode(pdu.encode_accept(ACCEPT))
    assert [(c.context_id, c.result) for c in accept.presentation_context] == [(1, 0), (255, 3)]
    rejection = peer_pdu.A_ASSOCIATE_RJ()
    rejection.decode(pdu.encode_rejection(pdu.Rejection(2, 3, 2)))
    assert (rejection.result, rejection.source, rejection.reason_diagnostic) == (2, 3, 2)
    abort = peer_pdu.A_ABORT_RQ()
    abort.decode(pdu.encode_abort(2, 6))
    assert (abort.source, abort.reason_diagnostic) == (2, 6)
    assert peer_pdu.A_RELEASE_RQ().encode() == pdu.RELEASE_RQ_OCTETS
    assert peer_pdu.A_RELEASE_RP().encode() == pdu.RELEASE_RP_OCTETS


def test_passwords_stay_out_of_text() -> None:
    assert "pass" not in repr(REQUEST) and "user=" not in repr(REQUEST)


@pytest.mark.parametrize(("octets", "what"), [
    (b"\x20\x00\x00\x04\x02\x00\x00\x00", "even"),
    (b"\x20\x00\x00\x04\x01\x00\x00\x00" * 2, "twice"),
    (b"\x20\x00\x00\xff\x01", "past the PDU's end"),
    (b"\x20\x00\x00", "cut short"),
    (b"", "no presentation context"),
    (b"\x50\x00\x00\x06\x51\x00\x00\x02\x00\x00", "wrong length"),
])
def test_broken_requests_are_named(octets: bytes, what: str) -> None:
    with pytest.raises(pdu.InvalidPdu, match=what):
        pdu.decode_request(memoryview(pdu.encode_request(REQUEST)[6:74] + octets))


uids = st.integers(0, 10**60).map(lambda number: f"2.25.{number}")
titles = st.sampled_from(["MISS", "A", "CT 1, ROOM 2", "0123456789ABCDEF", "#$%&*+-/~"])
octet_strings = st.binary(max_size=60)
shorts = st.integers(0, 0xFFFF)
windows = st.none() | st.tuples(shorts, shorts)
all_roles = st.lists(st.builds(pdu.Role, uids, st.booleans(), st.booleans()), max_size=4).map(tuple)
all_extended = st.lists(st.tuples(uids, octet_strings), max_size=4).map(tuple)
requests = st.builds(
    pdu.AssociateRequest, titles, titles,
    st.lists(st.tuples(uids, st.lists(uids, max_size=3).map(tuple)), min_size=1, max_size=9).map(
        lambda pairs: tuple(pdu.ProposedContext(2 * n + 1, *pair) for n, pair in enumerate(pairs))),
    st.integers(0, 0xFFFFFFFF), uids, titles, all_roles, all_extended, windows,
    st.none() | st.builds(pdu.UserIdentity, st.integers(0, 255), st.booleans(), octet_strings, octet_strings),
    uids, shorts,
    st.lists(st.builds(pdu.CommonExtended, uids, uids, st.lists(uids, max_size=3).map(tuple)),
             max_size=3).map(tuple),
)
accepts = st.builds(
    pdu.AssociateAccept, titles, titles,
    st.lists(st.builds(pdu.AnsweredContext, st.integers(0, 255), st.integers(0, 255), uids),
             max_size=9).map(tuple),
    st.integers(0, 0xFFFFFFFF), uids, titles, all_roles, all_extended, windows, st.none() | octet_strings,
)


@settings(max_examples=150, deadline=None)
@given(requests)
def test_every_request_comes_back(request: pdu.AssociateRequest) -> None:
    octets = pdu.encode_request(request)
    assert struct.unpack(">BxI", octets[:6]) == (1, len(octets) - 6)
    decoded = pdu.decode_request(memoryview(octets)[6:])
    assert decoded == request
    assert decoded.as_received == octets[10:74]


@settings(max_examples=150, deadline=None)
@given(accepts)
def test_every_accept_comes_back(accept: pdu.AssociateAccept) -> None:
    assert pdu.decode_accept(memoryview(pdu.encode_accept(accept))[6:]) == accept


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), octet_strings)
def test_short_pdus(first: int, second: int, third: int, octets: bytes) -> None:
    rejection = pdu.Rejection(first, second, third)
    assert pdu.decode_rejection(memoryview(pdu.encode_rejection(rejection))[6:]) == rejection
    assert pdu.decode_abort(memoryview(pdu.encode_abort(first, second))[6:]) == (first, second)
    pdu.decode_abort(memoryview(octets))
    with contextlib.suppress(pdu.InvalidPdu):
        pdu.decode_rejection(memoryview(octets))


@settings(max_examples=200, deadline=None)
@given(requests, st.data())
def test_mutated_requests_raise_nothing_else(request: pdu.AssociateRequest, chosen: st.DataObject) -> None:
    """Octets changed, cut out and put in anywhere in a good one."""
    body = bytearray(pdu.encode_request(request)[6:])
    for _ in range(chosen.draw(st.integers(1, 6))):
        at = chosen.draw(st.integers(0, max(len(body) - 1, 0)))
        body[at:at + chosen.draw(st.integers(0, 4))] = chosen.draw(st.binary(max_size=4))
    for decode in (pdu.decode_request, pdu.decode_accept):
        with contextlib.suppress(pdu.InvalidPdu):
            decode(memoryview(body))


@pytest.mark.parametrize("octets", [
    b"\x20\0\0\4\1\0\0\0" + b"\x77\0\0\0" * 16_000,           # empty unknown items
    b"\x50\0\xff\xfc" + b"\x51\0\0\4\0\0\0\0" * 8_190 + b"\x5f\0\0\0" * 3,
    b"\x50\0\xff\xfc" + b"\x54\0\0\4\0\0\1\1" * 8_191 + b"\0" * 4,
    b"\x50\0\xff\xf0" + b"\x57\0\xff\xec\0\0\0\0\xff\xe6" + b"\0\0" * 32_755,
    b"\x20\0\xff\xf8\1\0\0\0" + b"\x40\0\0\0" * 16_381,
])
def test_the_largest_requests_take_little_time(octets: bytes) -> None:
    """64 KiB of the smallest items: the work is linear in the octets."""
    body = memoryview(pdu.encode_request(REQUEST)[6:74] + octets)
    started = time.process_time()
    with contextlib.suppress(pdu.InvalidPdu):
        pdu.decode_request(body)
    assert time.process_time() - started < 0.5


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 400))
def test_random_octets_raise_nothing_else(octets: bytes, at: int) -> None:
    good = pdu.encode_request(REQUEST)[6:]
    for body in (octets, good[:at] + octets, good[:at] + octets + good[at + len(octets):]):
        for decode in (pdu.decode_request, pdu.decode_accept):
            with contextlib.suppress(pdu.InvalidPdu):
                decode(memoryview(body))
