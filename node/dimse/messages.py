"""Owns command sets (PS3.7 6.3.1, Annex E): parsed and built as octets in Implicit VR Little Endian, without
a data set object, as every C-STORE takes two of them. It never looks at the data set that follows a
command."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from node.dimse.errors import Violation
from node.dimse.pdu import AbortSource

NO_DATASET = 0x0101  # Command Data Set Type; any other value announces a data set (PS3.7 E.1)
COMMENT_LENGTH_MAX = 64  # Error Comment is LO

_ELEMENT = struct.Struct("<HHI")
_SHORT = struct.Struct("<H")
_LONG = struct.Struct("<I")


class Field(IntEnum):
    """Command Field (0000,0100) of the requests; a response has bit 15 set (PS3.7 E.1)."""

    C_STORE = 0x0001
    C_GET = 0x0010
    C_FIND = 0x0020
    C_MOVE = 0x0021
    C_ECHO = 0x0030
    N_EVENT_REPORT = 0x0100
    N_GET = 0x0110
    N_SET = 0x0120
    N_ACTION = 0x0130
    N_CREATE = 0x0140
    N_DELETE = 0x0150
    C_CANCEL = 0x0FFF


RESPONSE = 0x8000
_NAMES = {field.value: field.name.replace("_", "-") for field in Field}

AFFECTED_SOP_CLASS_UID = 0x0002
REQUESTED_SOP_CLASS_UID = 0x0003
COMMAND_FIELD = 0x0100
MESSAGE_ID = 0x0110
MESSAGE_ID_RESPONDED_TO = 0x0120
MOVE_DESTINATION = 0x0600
PRIORITY = 0x0700
DATASET_TYPE = 0x0800
STATUS = 0x0900
OFFENDING_ELEMENT = 0x0901
ERROR_COMMENT = 0x0902
ERROR_ID = 0x0903
AFFECTED_SOP_INSTANCE_UID = 0x1000
REQUESTED_SOP_INSTANCE_UID = 0x1001
EVENT_TYPE_ID = 0x1002
ATTRIBUTE_IDENTIFIER_LIST = 0x1005
ACTION_TYPE_ID = 0x1008
REMAINING_SUBOPERATIONS = 0x1020
COMPLETED_SUBOPERATIONS = 0x1021
FAILED_SUBOPERATIONS = 0x1022
WARNING_SUBOPERATIONS = 0x1023
MOVE_ORIGINATOR_AE = 0x1030
MOVE_ORIGINATOR_MESSAGE_ID = 0x1031


@dataclass(slots=True)
class Command:
    """A command set as received: the elements of group 0000 by element number, values as they came."""

    elements: dict[int, bytes]
    field: int
    message_id: int
    has_dataset: bool

    @property
    def is_response(self) -> bool:
        return bool(self.field & RESPONSE)

    @property
    def status(self) -> int:
        return self.short(STATUS, 0)

    @property
    def affected_sop_class_uid(self) -> str:
        return self.text(AFFECTED_SOP_CLASS_UID)

    @property
    def affected_sop_instance_uid(self) -> str:
        return self.text(AFFECTED_SOP_INSTANCE_UID)

    @property
    def requested_sop_instance_uid(self) -> str:
        return self.text(REQUESTED_SOP_INSTANCE_UID)

    @property
    def name(self) -> str:
        """The field as a word for logs: an unknown one is a number."""
        return _NAMES.get(self.field) or f"{self.field:04X}"

    def text(self, element: int) -> str:
        return self.elements.get(element, b"").decode("ascii", "replace").strip(" \0")

    def short(self, element: int, default: int) -> int:
        value = self.elements.get(element, b"")
        return int.from_bytes(value[:2], "little") if len(value) >= 2 else default


def parse(octets: bytes) -> Command:
    """Read a command set. Missing group lengths, odd padding, repeated, unordered and unknown elements pass;
    Explicit VR, which a few old senders use against PS3.7 6.3.1, too."""
    explicit = octets[4:6] == b"UL"
    elements = _explicit_elements(octets) if explicit else _implicit_elements(octets)
    field = elements.get(COMMAND_FIELD, b"")
    if len(field) < 2:
        raise Violation("a command set without a Command Field", 0, AbortSource.SERVICE_USER)
    has_dataset = elements.get(DATASET_TYPE, b"")[:2] not in (b"", b"\x01\x01")
    command = Command(elements, int.from_bytes(field[:2], "little"), 0, has_dataset)
    command.message_id = command.short(MESSAGE_ID, 0)
    return command


def _implicit_elements(octets: bytes) -> dict[int, bytes]:
    elements: dict[int, bytes] = {}
    at, end = 0, len(octets)
    while at < end:
        if end - at < 8:
            raise Violation("a command set is cut short")
        group, element, length = _ELEMENT.unpack_from(octets, at)
        at += 8
        if length > end - at:
            raise Violation("a value runs past its command set's end")
        if group == 0:
            elements[element] = octets[at:at + length]
        at += length
    return elements


def _explicit_elements(octets: bytes) -> dict[int, bytes]:
    elements: dict[int, bytes] = {}
    at, end = 0, len(octets)
    while at < end:
        if end - at < 8:
            raise Violation("a command set is cut short")
        group, element, length = struct.unpack_from("<HH2xH", octets, at)
        at += 8
        if length > end - at:
            raise Violation("a value runs past its command set's end")
        if group == 0:
            elements[element] = octets[at:at + length]
        at += length
    return elements


def element(number: int, value: bytes) -> bytes:
    """One element of group 0000, its value padded to even length with NUL (UIDs) as PS3.5 9.1 has it."""
    if len(value) & 1:
        value += b"\0"
    return _ELEMENT.pack(0, number, len(value)) + value


def short(number: int, value: int) -> bytes:
    return _ELEMENT.pack(0, number, 2) + _SHORT.pack(value)


def build(*elements: bytes) -> bytes:
    """A command set of elements in ascending order, its group length before them."""
    body = b"".join(elements)
    return _ELEMENT.pack(0, 0, 4) + _LONG.pack(len(body)) + body


def response(request: Command, status: int, *, comment: str = "", has_dataset: bool = False,
             more: bytes = b"", sop_instance_uid: str = "", error_id: int = 0, offending: int = 0) -> bytes:
    """The response to `request`: the SOP UIDs that it named are sent back as they came (PS3.7 9.1, 10.1),
    what was requested as what is affected. `more` are further elements, in order, above (0000,1000);
    `offending` is the tag of the element that was found wrong."""
    named = request.elements
    sop_class = named.get(AFFECTED_SOP_CLASS_UID) or named.get(REQUESTED_SOP_CLASS_UID)
    before = _response_head(sop_class or b"", request.field)
    after = _response_tail(status, has_dataset)
    if offending:
        after += element(OFFENDING_ELEMENT, struct.pack("<HH", offending >> 16, offending & 0xFFFF))
    if comment:
        after += element(ERROR_COMMENT, _comment(comment))
    if error_id:
        after += short(ERROR_ID, error_id)
    sop_instance = (named.get(AFFECTED_SOP_INSTANCE_UID) or named.get(REQUESTED_SOP_INSTANCE_UID)
                    or _uid(sop_instance_uid))
    if sop_instance:
        after += element(AFFECTED_SOP_INSTANCE_UID, sop_instance)
    for number in (EVENT_TYPE_ID, ACTION_TYPE_ID):
        if number in named:
            after += element(number, named[number])
    return build(before, short(MESSAGE_ID_RESPONDED_TO, request.message_id), after, more)


@lru_cache(maxsize=256)  # of a few classes, thousands of times each
def _response_head(sop_class: bytes, field: int) -> bytes:
    named = element(AFFECTED_SOP_CLASS_UID, sop_class) if sop_class else b""
    return named + short(COMMAND_FIELD, field & 0x7FFF | RESPONSE)


@lru_cache(maxsize=256)
def _response_tail(status: int, has_dataset: bool) -> bytes:
    return short(DATASET_TYPE, 0x0001 if has_dataset else NO_DATASET) + short(STATUS, status)


def _uid(text: str) -> bytes:
    """What is no ASCII is no UID either: it is for the peer to refuse it."""
    return text.encode("ascii", "replace")


def _comment(text: str) -> bytes:
    """LO: one value, no control characters, at most 64 (PS3.5 6.2)."""
    printable = "".join(char if " " <= char <= "~" and char != "\\" else "?" for char in text)
    octets = printable[:COMMENT_LENGTH_MAX].encode("ascii")
    return octets + b" " if len(octets) & 1 else octets


def echo_request(message_id: int) -> bytes:
    return build(element(AFFECTED_SOP_CLASS_UID, b"1.2.840.10008.1.1"), short(COMMAND_FIELD, Field.C_ECHO),
                 short(MESSAGE_ID, message_id), short(DATASET_TYPE, NO_DATASET))


def store_request(message_id: int, sop_class_uid: str, sop_instance_uid: str, *, priority: int = 0,
                  originator: tuple[str, int] | None = None) -> bytes:
    """C-STORE-RQ; `originator` is the AE title and message ID of the C-MOVE that it serves (PS3.7
    9.1.1.1)."""
    parts = [element(AFFECTED_SOP_CLASS_UID, _uid(sop_class_uid)),
             short(COMMAND_FIELD, Field.C_STORE), short(MESSAGE_ID, message_id), short(PRIORITY, priority),
             short(DATASET_TYPE, 0x0001),
             element(AFFECTED_SOP_INSTANCE_UID, _uid(sop_instance_uid))]
    if originator is not None:
        title, move_message_id = originator
        parts += [element(MOVE_ORIGINATOR_AE, title.encode("ascii", "replace").ljust(16)),
                  short(MOVE_ORIGINATOR_MESSAGE_ID, move_message_id)]
    return build(*parts)


def query_request(field: Field, message_id: int, sop_class_uid: str, *, priority: int = 0,
                  move_destination: str = "") -> bytes:
    """C-FIND-RQ, C-GET-RQ or C-MOVE-RQ, whose identifier follows (PS3.7 9.1.2 to 9.1.4)."""
    destination = [element(MOVE_DESTINATION, move_destination.encode("ascii", "replace").ljust(16))]
    return build(element(AFFECTED_SOP_CLASS_UID, _uid(sop_class_uid)), short(COMMAND_FIELD, field),
                 short(MESSAGE_ID, message_id), *(destination if field is Field.C_MOVE else ()),
                 short(PRIORITY, priority), short(DATASET_TYPE, 0x0001))


def normalized_request(field: Field, message_id: int, sop_class_uid: str, sop_instance_uid: str, *,
                       has_dataset: bool, more: bytes = b"") -> bytes:
    """A request of a normalized service (PS3.7 10.3): events and new instances are of an affected SOP
    instance, all else is asked of a requested one. `more` are further elements, as an action's type."""
    affected = field in (Field.N_EVENT_REPORT, Field.N_CREATE)
    sop_class = AFFECTED_SOP_CLASS_UID if affected else REQUESTED_SOP_CLASS_UID
    sop_instance = AFFECTED_SOP_INSTANCE_UID if affected else REQUESTED_SOP_INSTANCE_UID
    named = element(sop_instance, _uid(sop_instance_uid)) if sop_instance_uid else b""
    return build(element(sop_class, _uid(sop_class_uid)), short(COMMAND_FIELD, field),
                 short(MESSAGE_ID, message_id),
                 short(DATASET_TYPE, 0x0001 if has_dataset else NO_DATASET), named, more)


def cancel_request(message_id: int) -> bytes:
    return build(short(COMMAND_FIELD, Field.C_CANCEL), short(MESSAGE_ID_RESPONDED_TO, message_id),
                 short(DATASET_TYPE, NO_DATASET))
