"""What else is negotiated in the user information item (PS3.7 D.3.3): roles, extended negotiation, and what a
peer may leave out, repeat or put in another order."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom import build_role as their_role
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from node.dimse import contexts, messages, pdu
from node.dimse.association import Context
from node.dimse.contexts import (
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    STUDY_ROOT_FIND,
    VERIFICATION,
    Offer,
    ServiceName,
)
from node.dimse.contexts import Permitted as Permitted
from node.dimse.pdu import PduType, ProposedContext, Role
from tests.node.serving import AE_TITLE, Raw, Serving, data, echo_request, serving
from tests.node.storing import storing

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
EVERYTHING = Permitted(frozenset(ServiceName))
UNSERVED = "1.2.840.10008.5.1.4.34.6.1"  # a procedure step, which nobody serves here


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path) as running:
        yield running


def negotiated(*roles: Role, offer: Offer | None = None, classes: tuple[str, ...] = (CT,),
               permitted: Permitted = EVERYTHING) -> tuple[pdu.AssociateAccept, dict[int, Context]]:
    proposed = tuple(ProposedContext(2 * n + 1, uid, (EXPLICIT_LITTLE,)) for n, uid in enumerate(classes))
    return contexts.negotiate(pdu.AssociateRequest("A", "B", proposed, roles=roles), offer or Offer(),
                              permitted, 16384)


@pytest.mark.parametrize(("asked", "given", "result"), [
    ((True, False), (True, False), 0), ((True, True), (True, False), 0),
    ((False, True), None, 1), ((False, False), None, 1),
])
def test_a_requestor_is_scu_of_storage_and_no_more(asked: tuple[bool, bool], given: tuple[bool, bool] | None,
                                                   result: int) -> None:
    """Who gets neither role gets no context (it could do nothing in it)."""
    accept, agreed = negotiated(Role(CT, *asked))
    assert [context.result for context in accept.contexts] == [result]
    assert accept.roles == (() if given is None else (Role(CT, *given),))
    if given is not None:
        assert (agreed[1].requestor_is_scu, agreed[1].requestor_is_scp) == given


@pytest.mark.parametrize(("asked", "given"), [
    ((True, False), (True, False)), ((True, True), (True, True)), ((False, True), (False, True)),
])
def test_a_requestor_may_serve_where_the_node_asks(asked: tuple[bool, bool],
                                                   given: tuple[bool, bool]) -> None:
    """As C-GET needs it: never more than is proposed."""
    offer = Offer(requestor_serves=frozenset((ServiceName.STORE,)))
    accept, agreed = negotiated(Role(CT, *asked), offer=offer)
    assert accept.roles == (Role(CT, *given),)
    assert (agreed[1].requestor_is_scu, agreed[1].requestor_is_scp) == given


def test_roles_are_answered_for_what_was_proposed_alone() -> None:
    """None for classes without a role item, with a refused context, of no service; one for each class."""
    accept, agreed = negotiated(Role(CT, True, True), Role(CT, False, True), Role(UNSERVED, True, True),
                                Role(STUDY_ROOT_FIND, True, False), Role("1.2.3", True, True),
                                classes=(CT, MR, UNSERVED))
    assert accept.roles == (Role(CT, True, False),)
    assert agreed[3].requestor_is_scu and not agreed[3].requestor_is_scp  # the default
    may_not_store = Permitted(frozenset((ServiceName.ECHO,)))
    assert negotiated(Role(CT, True, False), permitted=may_not_store)[0].roles == ()


def test_a_requestor_that_is_no_scu_may_not_ask(tmp_path: Path) -> None:
    """A command against the agreed role is an unrecognised operation."""
    offer = Offer(requestor_serves=frozenset((ServiceName.ECHO,)))
    request = pdu.AssociateRequest(AE_TITLE, "CT1", echo_request().contexts,
                                   roles=(Role(VERIFICATION, False, True),))
    with serving(tmp_path, offer=offer) as served, Raw(served.port) as raw:
        assert raw.associate(request).roles == (Role(VERIFICATION, False, True),)
        raw.send(data(1, 3, messages.echo_request(1)))
        assert messages.parse(raw.receive()[1][6:]).status == 0x0211


def test_a_peer_of_another_make_agrees(served: Serving) -> None:
    ae = AE("CT1")
    ae.add_requested_context(VERIFICATION)
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE,
                               ext_neg=[their_role(VERIFICATION, scu_role=True, scp_role=True)])
    assert association.is_established
    context, = association.accepted_contexts
    assert (context.as_scu, context.as_scp) == (True, False)
    assert association.send_c_echo().Status == 0
    association.release()


# --- extended negotiation

def test_storage_says_what_it_keeps() -> None:
    """Level 2, signatures preserved, nothing coerced (PS3.4 B.3.1); of queries what was asked for and is
    there; nothing of a class that is not."""
    asked = ((CT, bytes(6)), (CT, b"\1"), (MR, bytes(6)), (STUDY_ROOT_FIND, b"\1\1\1"), (UNSERVED, b"\1"))
    proposed = (ProposedContext(1, CT, (EXPLICIT_LITTLE,)),
                ProposedContext(3, STUDY_ROOT_FIND, (IMPLICIT_LITTLE,)))
    request = pdu.AssociateRequest("A", "B", proposed, extended=asked)
    accept, _ = contexts.negotiate(request, Offer(), EVERYTHING, 16384)
    assert accept.extended == ((CT, bytes((2, 0, 3, 0, 0, 0))), (STUDY_ROOT_FIND, b"\1\1\1"))


def test_a_peer_of_another_make_reads_what_storage_says(tmp_path: Path) -> None:
    item = SOPClassExtendedNegotiation()
    item.sop_class_uid = CT
    item.service_class_application_information = bytes((2, 0, 0, 0, 1, 0))
    ae = AE("CT1")
    ae.add_requested_context(CT)
    with storing(tmp_path) as served:
        association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE, ext_neg=[item])
        assert association.acceptor.sop_class_extended == {CT: bytes((2, 0, 3, 0, 0, 0))}
        association.release()


# --- what peers do with the items of an A-ASSOCIATE-RQ

def request_with(information: bytes, *, before: bytes = b"", after: bytes = b"",
                 fixed: bytes | None = None) -> bytes:
    """An A-ASSOCIATE-RQ by hand: items before and after the usual ones, and a user information item."""
    octets = pdu.encode_request(echo_request())[6:]
    head, context = octets[:68] if fixed is None else fixed, octets[68:octets.index(b"\x50\x00", 68)]
    body = head + before + context + pdu._item(0x50, information) + after
    return pdu.header(PduType.ASSOCIATE_RQ, len(body)) + body


LENGTH, CLASS = pdu._item(0x51, struct.pack(">I", 16384)), pdu._item(0x52, b"1.2.3.4")
VERSION = pdu._item(0x55, b"SOMEONE_1")
UNKNOWN = pdu._item(0x5F, b"what is this")
WINDOW = pdu._item(0x53, struct.pack(">HH", 2, 2))

TAKEN = {
    "as usual": request_with(LENGTH + CLASS + VERSION),
    "in another order": request_with(VERSION + WINDOW + CLASS + LENGTH),
    "no maximum length": request_with(CLASS + VERSION),
    "no implementation class UID": request_with(LENGTH),
    "nothing at all": request_with(b""),
    "unknown sub-items": request_with(UNKNOWN + LENGTH + UNKNOWN + CLASS + UNKNOWN),
    "unknown items": request_with(LENGTH + CLASS, before=pdu._item(0x77, b"x" * 300),
                                  after=pdu._item(0x99, b"")),
    "a version name of 40 octets": request_with(LENGTH + CLASS + pdu._item(0x55, b"V" * 40)),
    "a class UID of 90 octets": request_with(LENGTH + pdu._item(0x52, b"1." * 45)),
    "an odd class UID": request_with(LENGTH + pdu._item(0x52, b"not a uid\0")),
    "spaces around the AE titles": request_with(
        LENGTH + CLASS,
        fixed=struct.pack(">HH16s16s32x", 1, 0, b"  MISS          ", b"   CT1\0\0".ljust(16))),
    "more versions than one": request_with(
        LENGTH + CLASS, fixed=struct.pack(">HH16s16s32x", 0xFFFF, 0, b"MISS".ljust(16), b"CT1".ljust(16))),
    "reserved fields that are not zero": request_with(
        LENGTH + CLASS, fixed=struct.pack(">HH16s16s32s", 1, 0xABCD, b"MISS".ljust(16), b"CT1".ljust(16),
                                          b"\xff" * 32)),
}


@pytest.mark.parametrize("octets", TAKEN.values(), ids=TAKEN.keys())
def test_what_is_odd_and_taken(served: Serving, octets: bytes) -> None:
    with Raw(served.port) as raw:
        raw.send(octets)
        kind, body = raw.receive()
        assert kind == PduType.ASSOCIATE_AC, body
        assert body[4:68] == octets[10:74], "AE titles and reserved octets are sent back as they came"
        raw.send(data(1, 3, messages.echo_request(1)))
        assert messages.parse(raw.receive()[1][6:]).status == 0


def test_a_missing_maximum_is_a_small_one() -> None:
    """Nobody who leaves it out gets PDUs of any length; 0 is no limit (PS3.8 D.1.1)."""
    assert pdu.decode_request(memoryview(TAKEN["no maximum length"])[6:]).max_pdu_bytes == 16 << 10
    unlimited = request_with(pdu._item(0x51, bytes(4)) + CLASS)
    assert pdu.decode_request(memoryview(unlimited)[6:]).max_pdu_bytes == 0


def _context(context_id: int, *subitems: bytes) -> bytes:
    return pdu._item(0x20, bytes((context_id, 0, 0, 0)) + b"".join(subitems))


ABSTRACT, TRANSFER = pdu._item(0x30, VERIFICATION.encode()), pdu._item(0x40, IMPLICIT_LITTLE.encode())
BROKEN = {
    "a context ID twice": request_with(LENGTH, after=_context(1, ABSTRACT, TRANSFER)),
    "an even context ID": request_with(LENGTH, after=_context(2, ABSTRACT, TRANSFER)),
    "context ID 0": request_with(LENGTH, after=_context(0, ABSTRACT, TRANSFER)),
    "129 contexts": request_with(LENGTH, after=b"".join(
        _context(n % 256, ABSTRACT, TRANSFER) for n in range(3, 260, 2))),
    "no context": pdu.encode_request(pdu.AssociateRequest(AE_TITLE, "CT1", ())),
    "an item longer than the PDU": request_with(LENGTH, after=b"\x77\0\xff\xffabc"),
    "a sub-item longer than its item": request_with(b"\x51\0\0\x09\0\0\x40\0"),
    "a sub-item cut short": request_with(LENGTH + b"\x52\0\0"),
    "a maximum length of 2 octets": request_with(pdu._item(0x51, b"\x40\0")),
    "a window of 3 octets": request_with(pdu._item(0x53, b"\0\1\0")),
    "a role item whose UID runs over": request_with(pdu._item(0x54, b"\0\x50abc")),
    "a common item whose classes run over": request_with(pdu._item(0x57, b"\0\1a\0\1b\0\4\0\x09ab")),
    "an identity that is cut short": request_with(pdu._item(0x58, b"\2\0\0\x09abc")),
    "a context item of 3 octets": request_with(LENGTH, after=pdu._item(0x20, b"\1\0\0")),
}


@pytest.mark.parametrize("octets", BROKEN.values(), ids=BROKEN.keys())
def test_what_lies_is_aborted(served: Serving, octets: bytes) -> None:
    """AA-1, and the next one is served."""
    with Raw(served.port) as raw:
        raw.send(octets)
        assert raw.receive() == (PduType.ABORT, bytes(4))
    with Raw(served.port) as raw:
        raw.associate()


def test_128_contexts_are_answered(served: Serving) -> None:
    proposed = tuple(ProposedContext(n, VERIFICATION, (IMPLICIT_LITTLE,)) for n in range(1, 256, 2))
    with Raw(served.port) as raw:
        accept = raw.associate(pdu.AssociateRequest(AE_TITLE, "CT1", proposed))
        assert [context.id for context in accept.contexts] == list(range(1, 256, 2))
        raw.send(data(255, 3, messages.echo_request(1)))
        assert messages.parse(raw.receive()[1][6:]).status == 0
