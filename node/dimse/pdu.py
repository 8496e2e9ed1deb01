"""Owns the octets of the upper layer's PDUs (PS3.8 9.3): A-ASSOCIATE-RQ, -AC, -RJ, A-RELEASE, A-ABORT and the
headers of P-DATA-TF, decoded from and encoded to frozen dataclasses. It never reads a socket and never
decides what to answer: what breaks the grammar raises InvalidPdu, with the reason an A-ABORT would give."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
ASSOCIATE_BYTES_MAX = 64 << 10  # 128 contexts with twenty transfer syntaxes each stay below it
CONTEXTS_MAX = 128              # odd IDs from 1 to 255 (PS3.8 9.3.2.2)
KNOWN_BYTES_MAX = 512            # of a presentation context item that is kept when it was read
MAX_PDU_BYTES_UNSAID = 16 << 10  # what a peer gets that leaves its maximum out against PS3.8 D.1.1
HEADER_BYTES = 6                # of a PDU: type, reserved, length
PDV_HEADER_BYTES = 6            # of a presentation data value: length, context ID, message control header
DATA_HEADER_BYTES = HEADER_BYTES + PDV_HEADER_BYTES
IMPLEMENTATION_CLASS_UID = "2.25.322689067499482637133746055194812954208"  # MISS, made once; never changes
IMPLEMENTATION_VERSION = "MISS_0_1"

COMMAND_FRAGMENT = 1  # bits of the message control header (PS3.8 Annex E.2)
LAST_FRAGMENT = 2

_ITEM = struct.Struct(">BxH")
_HEADER = struct.Struct(">BxI")
_FIXED = struct.Struct(">HH16s16s32x")
_P_DATA = struct.Struct(">BxIIBB")


class PduType(IntEnum):
    """The seven PDUs of PS3.8 Table 9-11."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    P_DATA_TF = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class AbortSource(IntEnum):
    """Who ended the association (PS3.8 9.3.8)."""

    SERVICE_USER = 0
    SERVICE_PROVIDER = 2


class AbortReason(IntEnum):
    """Why the service provider ended it (PS3.8 Table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNIZED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER_VALUE = 6


class ContextResult(IntEnum):
    """The answer to one presentation context (PS3.8 Table 9-18)."""

    ACCEPTANCE = 0
    USER_REJECTION = 1
    NO_REASON = 2
    ABSTRACT_SYNTAX_NOT_SUPPORTED = 3
    TRANSFER_SYNTAXES_NOT_SUPPORTED = 4


class InvalidPdu(Exception):
    """Octets that are no PDU by PS3.8 9.3; `reason` is what the A-ABORT says."""

    def __init__(self, what: str, reason: AbortReason = AbortReason.INVALID_PARAMETER_VALUE) -> None:
        super().__init__(what)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ProposedContext:
    """A presentation context as the requestor proposes it."""

    id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnsweredContext:
    """A presentation context as the acceptor answers it; the transfer syntax counts only on acceptance."""

    id: int
    result: int
    transfer_syntax: str


@dataclass(frozen=True, slots=True)
class Role:
    """SCP/SCU role selection for one SOP class (PS3.7 D.3.3.4)."""

    sop_class_uid: str
    scu: bool
    scp: bool


@dataclass(frozen=True, slots=True)
class UserIdentity:
    """What the requestor says of its user (PS3.7 D.3.3.7): kept out of every text form, as it may be a
    password."""

    kind: int
    wants_answer: bool
    primary: bytes = field(repr=False)
    secondary: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CommonExtended:
    """SOP class common extended negotiation (PS3.7 D.3.3.6): of which service a class is, and which general
    classes it may be handled as. It is never answered."""

    sop_class_uid: str
    service_class_uid: str
    related_classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AssociateRequest:
    """A-ASSOCIATE-RQ. `max_pdu_bytes` is what the sender can receive; 0 is no limit (PS3.8 D.1). The window
    is of operations that the requestor may invoke, and of those that it may perform (PS3.7 D.3.3.3).
    `as_received` are the AE titles and reserved octets, which an A-ASSOCIATE-AC sends back untested."""

    called_ae: str
    calling_ae: str
    contexts: tuple[ProposedContext, ...]
    max_pdu_bytes: int = 0
    implementation_class_uid: str = IMPLEMENTATION_CLASS_UID
    implementation_version: str = IMPLEMENTATION_VERSION
    roles: tuple[Role, ...] = ()
    extended: tuple[tuple[str, bytes], ...] = ()
    asynchronous_window: tuple[int, int] | None = None
    user_identity: UserIdentity | None = None
    application_context: str = APPLICATION_CONTEXT
    protocol_version: int = 1
    common_extended: tuple[CommonExtended, ...] = ()
    as_received: bytes = field(default=b"", repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class AssociateAccept:
    """A-ASSOCIATE-AC; the AE titles are the request's, sent back as they came (PS3.8 9.3.3). The window
    counts as in the request: what the requestor may invoke, and perform. `identity_answer` is the server
    response of a user identity that was verified."""

    called_ae: str
    calling_ae: str
    contexts: tuple[AnsweredContext, ...]
    max_pdu_bytes: int = 0
    implementation_class_uid: str = IMPLEMENTATION_CLASS_UID
    implementation_version: str = IMPLEMENTATION_VERSION
    roles: tuple[Role, ...] = ()
    extended: tuple[tuple[str, bytes], ...] = ()
    asynchronous_window: tuple[int, int] | None = None
    identity_answer: bytes | None = field(default=None, repr=False)
    as_received: bytes = field(default=b"", repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A-ASSOCIATE-RJ (PS3.8 Table 9-21)."""

    result: int
    source: int
    reason: int

    @property
    def triple(self) -> str:
        return f"{self.result}/{self.source}/{self.reason}"


def header(kind: PduType, length: int) -> bytes:
    """The six octets that open a PDU."""
    return _HEADER.pack(kind, length)


def parse_header(octets: memoryview) -> tuple[int, int]:
    """Type and length of the PDU whose first six octets these are."""
    kind, length = _HEADER.unpack_from(octets)
    return kind, length


def data_header(context_id: int, control: int, fragment_bytes: int) -> bytes:
    """The twelve octets before the fragment of a P-DATA-TF PDU that holds one presentation data value."""
    return _P_DATA.pack(PduType.P_DATA_TF, fragment_bytes + 6, fragment_bytes + 2, context_id, control)


def encode_rejection(rejection: Rejection) -> bytes:
    return header(PduType.ASSOCIATE_RJ, 4) + bytes((0, rejection.result, rejection.source, rejection.reason))


def encode_abort(source: int, reason: int) -> bytes:
    return header(PduType.ABORT, 4) + bytes((0, 0, source, reason))


RELEASE_RQ_OCTETS = header(PduType.RELEASE_RQ, 4) + bytes(4)
RELEASE_RP_OCTETS = header(PduType.RELEASE_RP, 4) + bytes(4)


def encode_request(request: AssociateRequest) -> bytes:
    body = _fixed_part(request.protocol_version, request.called_ae, request.calling_ae)
    body += _item(0x10, request.application_context.encode("ascii"))
    for context in request.contexts:
        syntaxes = b"".join(_item(0x40, uid.encode("ascii")) for uid in context.transfer_syntaxes)
        abstract = _item(0x30, context.abstract_syntax.encode("ascii"))
        body += _item(0x20, bytes((context.id, 0, 0, 0)) + abstract + syntaxes)
    information = _user_information(request)
    for common in request.common_extended:
        information += _common_extended(common)
    identity = request.user_identity
    if identity is not None:
        information += _item(0x58, bytes((identity.kind, identity.wants_answer))
                             + _count(identity.primary) + _count(identity.secondary))
    body += _item(0x50, information)
    return header(PduType.ASSOCIATE_RQ, len(body)) + body


def encode_accept(accept: AssociateAccept) -> bytes:
    body = _fixed_part(1, accept.called_ae, accept.calling_ae)
    if accept.as_received:
        body = body[:4] + accept.as_received
    body += _item(0x10, APPLICATION_CONTEXT.encode("ascii"))
    for context in accept.contexts:
        syntax = _item(0x40, context.transfer_syntax.encode("ascii"))
        body += _item(0x21, bytes((context.id, 0, context.result, 0)) + syntax)
    information = _user_information(accept)
    if accept.identity_answer is not None:
        information += _item(0x59, _count(accept.identity_answer))
    body += _item(0x50, information)
    return header(PduType.ASSOCIATE_AC, len(body)) + body


def decode_request(body: memoryview) -> AssociateRequest:
    """The A-ASSOCIATE-RQ after its header. Unknown items are passed over, as PS3.8 9.3.1 asks."""
    version, called, calling = _parse_fixed_part(body)
    contexts: dict[int, ProposedContext] = {}
    application_context = ""
    information = _Information()
    for kind, value in _items(body[68:]):
        if kind == 0x10:
            application_context = _uid(value)
        elif kind == 0x20:
            context = _known(bytes(value)) if len(value) <= KNOWN_BYTES_MAX else _parse_proposed(value)
            if context.id in contexts:
                raise InvalidPdu("a presentation context ID is used twice")
            contexts[context.id] = context
        elif kind == 0x50:
            information.read(value)
    if not contexts:
        raise InvalidPdu("no presentation context")
    return AssociateRequest(
        called, calling, tuple(contexts.values()), information.max_pdu_bytes, information.class_uid,
        information.version, tuple(information.roles), tuple(information.extended), information.window,
        information.identity, application_context, version, tuple(information.common),
        bytes(body[4:68]),
    )


def decode_accept(body: memoryview) -> AssociateAccept:
    """The A-ASSOCIATE-AC after its header."""
    _, called, calling = _parse_fixed_part(body)
    contexts: list[AnsweredContext] = []
    information = _Information()
    for kind, value in _items(body[68:]):
        if kind == 0x21:
            contexts.append(_parse_answered(value))
        elif kind == 0x50:
            information.read(value)
    if len(contexts) > CONTEXTS_MAX:
        raise InvalidPdu("more answers than there can be presentation contexts")
    return AssociateAccept(called, calling, tuple(contexts), information.max_pdu_bytes, information.class_uid,
                           information.version, tuple(information.roles), tuple(information.extended),
                           information.window, information.answer)


def decode_rejection(body: memoryview) -> Rejection:
    if len(body) != 4:
        raise InvalidPdu("an A-ASSOCIATE-RJ has four octets after its header")
    return Rejection(body[1], body[2], body[3])


def decode_abort(body: memoryview) -> tuple[int, int]:
    """Source and reason of an A-ABORT; a wrong length is no cause to doubt that the peer is leaving."""
    return (body[2], body[3]) if len(body) >= 4 else (AbortSource.SERVICE_USER, 0)


def _fixed_part(version: int, called_ae: str, calling_ae: str) -> bytes:
    return _FIXED.pack(version, 0, _title(called_ae), _title(calling_ae))


def _title(ae_title: str) -> bytes:
    return ae_title.encode("ascii", "replace")[:16].ljust(16)


def _parse_fixed_part(body: memoryview) -> tuple[int, str, str]:
    if len(body) < 68:
        raise InvalidPdu("an A-ASSOCIATE PDU is shorter than its fixed part")
    version, _, called, calling = _FIXED.unpack_from(body)
    return version, _ae_title(called), _ae_title(calling)


def _ae_title(octets: bytes) -> str:
    """Leading and trailing spaces do not count (PS3.5 6.2 AE); some senders pad with NUL."""
    return octets.decode("ascii", "replace").strip(" \0")


def _item(kind: int, value: bytes) -> bytes:
    return _ITEM.pack(kind, len(value)) + value


def _items(octets: memoryview) -> Iterator[tuple[int, memoryview]]:
    at, end = 0, len(octets)
    while at < end:
        if end - at < 4:
            raise InvalidPdu("an item is cut short")
        kind, length = _ITEM.unpack_from(octets, at)
        at += 4
        if length > end - at:
            raise InvalidPdu("an item runs past the PDU's end")
        yield kind, octets[at:at + length]
        at += length


def _uid(octets: memoryview) -> str:
    """A UID as sent, without padding. Whether it is one is for who uses it: an odd one is merely unknown."""
    return bytes(octets[:128]).decode("ascii", "replace").strip(" \0")


def _parse_proposed(value: memoryview) -> ProposedContext:
    if len(value) < 4:
        raise InvalidPdu("a presentation context item is cut short")
    context_id = value[0]
    if not context_id & 1:
        raise InvalidPdu("a presentation context ID is even")
    abstract = ""
    syntaxes: list[str] = []
    for kind, uid in _items(value[4:]):
        if kind == 0x30:
            abstract = _uid(uid)
        elif kind == 0x40:
            syntaxes.append(_uid(uid))
    return ProposedContext(context_id, abstract, tuple(syntaxes))


@lru_cache(maxsize=2048)  # a device proposes the same each time, getscu more than a hundred contexts
def _known(octets: bytes) -> ProposedContext:
    return _parse_proposed(memoryview(octets))


def _parse_answered(value: memoryview) -> AnsweredContext:
    if len(value) < 4:
        raise InvalidPdu("a presentation context item is cut short")
    syntax = ""
    for kind, uid in _items(value[4:]):
        if kind == 0x40:
            syntax = _uid(uid)
    return AnsweredContext(value[0], value[2], syntax)


def _user_information(source: AssociateRequest | AssociateAccept) -> bytes:
    """What request and answer have in common, in the order of the item types."""
    octets = _item(0x51, struct.pack(">I", source.max_pdu_bytes))
    octets += _item(0x52, source.implementation_class_uid.encode("ascii"))
    if source.asynchronous_window is not None:
        octets += _item(0x53, struct.pack(">HH", *source.asynchronous_window))
    for role in source.roles:
        octets += _item(0x54, _count(role.sop_class_uid.encode("ascii")) + bytes((role.scu, role.scp)))
    octets += _item(0x55, source.implementation_version.encode("ascii")[:16])
    for sop_class, application_information in source.extended:
        octets += _item(0x56, _count(sop_class.encode("ascii")) + application_information)
    return octets


def _common_extended(common: CommonExtended) -> bytes:
    related = b"".join(_count(uid.encode("ascii")) for uid in common.related_classes)
    return _item(0x57, _count(common.sop_class_uid.encode("ascii"))
                 + _count(common.service_class_uid.encode("ascii")) + _count(related))


def _count(octets: bytes) -> bytes:
    """A value after its two-octet length."""
    return struct.pack(">H", len(octets)) + octets


class _Information:
    """The user information item (PS3.7 Annex D.3.3) while it is read; sub-items are bounded by the PDU's own
    bound."""

    def __init__(self) -> None:
        self.max_pdu_bytes = MAX_PDU_BYTES_UNSAID
        self.class_uid = ""
        self.version = ""
        self.roles: list[Role] = []
        self.extended: list[tuple[str, bytes]] = []
        self.common: list[CommonExtended] = []
        self.answer: bytes | None = None
        self.window: tuple[int, int] | None = None
        self.identity: UserIdentity | None = None

    def read(self, value: memoryview) -> None:
        for kind, octets in _items(value):
            if kind == 0x51:
                self.max_pdu_bytes = struct.unpack(">I", _exactly(octets, 4))[0]
            elif kind == 0x52:
                self.class_uid = _uid(octets)
            elif kind == 0x53:
                self.window = struct.unpack(">HH", _exactly(octets, 4))
            elif kind == 0x54:
                uid, rest = _counted(octets)
                self.roles.append(Role(_uid(uid), *(bool(octet) for octet in _exactly(rest, 2))))
            elif kind == 0x55:
                self.version = _ae_title(bytes(octets[:16]))
            elif kind == 0x56:
                uid, rest = _counted(octets)
                self.extended.append((_uid(uid), bytes(rest)))
            elif kind == 0x57:
                self.common.append(_parse_common(octets))
            elif kind == 0x58:
                self.identity = _parse_identity(octets)
            elif kind == 0x59:
                self.answer = bytes(_counted(octets)[0])


def _parse_common(octets: memoryview) -> CommonExtended:
    sop_class, rest = _counted(octets)
    service_class, rest = _counted(rest)
    related, _ = _counted(rest)
    classes: list[str] = []
    while related:
        uid, related = _counted(related)
        classes.append(_uid(uid))
    return CommonExtended(_uid(sop_class), _uid(service_class), tuple(classes))


def _parse_identity(octets: memoryview) -> UserIdentity:
    if len(octets) < 2:
        raise InvalidPdu("a user identity item is cut short")
    primary, rest = _counted(octets[2:])
    secondary, _ = _counted(rest)
    return UserIdentity(octets[0], bool(octets[1]), bytes(primary), bytes(secondary))


def _exactly(octets: memoryview, length: int) -> memoryview:
    if len(octets) != length:
        raise InvalidPdu("a sub-item has a wrong length")
    return octets


def _counted(octets: memoryview) -> tuple[memoryview, memoryview]:
    """A value after its two-octet length, and what follows it."""
    if len(octets) < 2:
        raise InvalidPdu("a sub-item is cut short")
    length = octets[0] << 8 | octets[1]
    if length > len(octets) - 2:
        raise InvalidPdu("a value runs past its sub-item's end")
    return octets[2:2 + length], octets[2 + length:]
