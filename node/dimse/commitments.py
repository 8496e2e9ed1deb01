"""Owns the data sets of storage commitment: what an action asks for and what an event reports (PS3.4 Tables
J.3-1 and J.3-2), between octets and plain objects. They may name 100,000 instances, so no data set object is
made of them. It never judges whether an instance is committed."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO

from archive.dataset.elements import Element, Kind, WalkLimits, walk
from archive.dataset.encoding import EXPLICIT_BIG, IMPLICIT_LITTLE, encoding_of
from archive.dataset.sources import FileSource, Window
from archive.errors import CannotUnderstand, InvalidInput, MissError, TooLarge
from archive.model import is_uid

INSTANCE = "1.2.840.10008.1.20.1.1"  # the well-known SOP instance of the push model
REQUEST = 1                          # the action type (PS3.4 J.3.2.1.1)
ALL_COMMITTED, SOME_FAILED = 1, 2    # event types (J.3.3.1.1)

ITEMS_MAX = 100_000
INFORMATION_BYTES_MAX = 24 << 20

# Failure Reason (0008,1197), PS3.3 C.14.1.1.
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
CLASS_CONFLICT = 0x0119
CLASS_NOT_SUPPORTED = 0x0122
DUPLICATE_TRANSACTION = 0x0131
RESOURCE_LIMITATION = 0x0213
REASONS: Mapping[int, str] = {
    PROCESSING_FAILURE: "processing failure",
    NO_SUCH_INSTANCE: "no such instance",
    CLASS_CONFLICT: "of another SOP class",
    CLASS_NOT_SUPPORTED: "SOP class not supported",
    DUPLICATE_TRANSACTION: "duplicate transaction UID",
    RESOURCE_LIMITATION: "resource limitation",
}

_RETRIEVE_AE = 0x00080054
_SOP_CLASS = 0x00081150
_SOP_INSTANCE = 0x00081155
_TRANSACTION = 0x00081195
_REASON = 0x00081197
_FAILED = 0x00081198
_REFERENCED = 0x00081199
_ITEM = 0xFFFEE000
_SEQUENCES = (_FAILED, _REFERENCED)
_LIMITS = WalkLimits(nesting_max=10, elements_max=10 * ITEMS_MAX)
_VALUE_BYTES_MAX = 128
_LONG = b"SQ"


@dataclass(frozen=True, slots=True)
class Information:
    """Action or event information. `referenced` are SOP classes by SOP instance UID; `failed`, of an event,
    SOP class and Failure Reason by SOP instance UID."""

    transaction_uid: str
    referenced: Mapping[str, str]
    failed: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    retrieve_ae: str = ""

    @property
    def event_type(self) -> int:
        return SOME_FAILED if self.failed else ALL_COMMITTED


def decode(octets: bytes, transfer_syntax_uid: str) -> Information:
    """Read it. Raises InvalidInput: a UID that is missing or is none, an instance that is listed twice;
    TooLarge past ITEMS_MAX instances."""
    try:
        return _read(octets, transfer_syntax_uid)
    except CannotUnderstand as error:
        raise InvalidInput(f"the information can't be read: {error}") from None
    except MissError:
        raise
    except Exception as error:  # whatever hostile octets may lead to
        raise InvalidInput(f"the information can't be read ({type(error).__name__})") from None


def _read(octets: bytes, transfer_syntax_uid: str) -> Information:
    window = Window(FileSource(BytesIO(octets), 0))
    transaction_uid = retrieve_ae = ""
    referenced: dict[str, str] = {}
    failed: dict[str, tuple[str, int]] = {}
    within: list[int] = []  # the sequences that are open; what nests in an item is none of ours
    item: dict[int, bytes] = {}
    for kind, element in walk(window, encoding_of(transfer_syntax_uid, octets[:8]), _LIMITS,
                              _SEQUENCES.__contains__):
        if kind is Kind.SEQUENCE_BEGIN and element is not None:
            within.append(element.tag)
        elif kind is Kind.SEQUENCE_END:
            within.pop()
        elif len(within) > 1:
            continue
        elif kind is Kind.ITEM_BEGIN:
            item = {}
        elif kind is Kind.ITEM_END:
            _take(item, within[0], referenced, failed, big_endian=transfer_syntax_uid == EXPLICIT_BIG)
        elif element is not None:
            value = _value(window, element)
            if within:
                item[element.tag] = value
            elif element.tag == _TRANSACTION:
                transaction_uid = _uid(value, "Transaction UID (0008,1195)")
            elif element.tag == _RETRIEVE_AE:
                retrieve_ae = value.decode("ascii", "replace").strip(" \0")
    if not transaction_uid:
        raise InvalidInput("the Transaction UID (0008,1195) is missing")
    return Information(transaction_uid, referenced, failed, retrieve_ae)


def _take(item: Mapping[int, bytes], sequence: int, referenced: dict[str, str],
          failed: dict[str, tuple[str, int]], *, big_endian: bool) -> None:
    sop_class = _uid(item.get(_SOP_CLASS, b""), "a Referenced SOP Class UID (0008,1150)")
    sop_instance = _uid(item.get(_SOP_INSTANCE, b""), "a Referenced SOP Instance UID (0008,1155)")
    if sop_instance in referenced or sop_instance in failed:
        raise InvalidInput("an instance is listed more than once")
    if len(referenced) + len(failed) >= ITEMS_MAX:
        raise TooLarge(f"more than {ITEMS_MAX:,} instances in one request")
    if sequence == _REFERENCED:
        referenced[sop_instance] = sop_class
    else:
        reason = int.from_bytes(item.get(_REASON, b"")[:2], "big" if big_endian else "little")
        failed[sop_instance] = sop_class, reason or PROCESSING_FAILURE


def _value(window: Window, element: Element) -> bytes:
    """Values that are longer are none of ours."""
    return window.at(element.offset, element.length) if element.length <= _VALUE_BYTES_MAX else b""


def _uid(value: bytes, what: str) -> str:
    text = value.decode("ascii", "replace").strip(" \0")
    if not text:
        raise InvalidInput(f"{what} is missing")
    if not is_uid(text):
        raise InvalidInput(f"{what} is not a UID")
    return text


def encode(information: Information, transfer_syntax_uid: str) -> bytes:
    """Write it. A Retrieve AE Title stands outside the sequence (SC5), where anything was committed."""
    writer = _Writer(transfer_syntax_uid)
    parts: list[bytes] = []
    if information.retrieve_ae and information.referenced:
        parts.append(writer.text(_RETRIEVE_AE, b"AE", information.retrieve_ae, b" "))
    parts.append(writer.text(_TRANSACTION, b"UI", information.transaction_uid, b"\0"))
    if information.failed:
        parts.append(writer.sequence(_FAILED, (
            writer.reference(sop_class, uid) + writer.short(_REASON, reason)
            for uid, (sop_class, reason) in information.failed.items())))
    if information.referenced:
        parts.append(writer.sequence(_REFERENCED, (
            writer.reference(sop_class, uid) for uid, sop_class in information.referenced.items())))
    return b"".join(parts)


class _Writer:
    """Elements in one of the three transfer syntaxes that need no codec (PS3.5 Annex A.1 to A.3)."""

    def __init__(self, transfer_syntax_uid: str) -> None:
        self._implicit = transfer_syntax_uid == IMPLICIT_LITTLE
        self._order = ">" if transfer_syntax_uid == EXPLICIT_BIG else "<"

    def text(self, tag: int, vr: bytes, value: str, padding: bytes) -> bytes:
        octets = value.encode("ascii", "replace")
        return self._element(tag, vr, octets + padding if len(octets) & 1 else octets)

    def short(self, tag: int, value: int) -> bytes:
        return self._element(tag, b"US", struct.pack(f"{self._order}H", value))

    def reference(self, sop_class: str, sop_instance: str) -> bytes:
        return (self.text(_SOP_CLASS, b"UI", sop_class, b"\0")
                + self.text(_SOP_INSTANCE, b"UI", sop_instance, b"\0"))

    def sequence(self, tag: int, items: Iterable[bytes]) -> bytes:
        parts: list[bytes] = []
        for item in items:
            parts += (self._tag(_ITEM) + struct.pack(f"{self._order}I", len(item)), item)
        return self._element(tag, _LONG, b"".join(parts))

    def _tag(self, tag: int) -> bytes:
        return struct.pack(f"{self._order}HH", tag >> 16, tag & 0xFFFF)

    def _element(self, tag: int, vr: bytes, value: bytes) -> bytes:
        if self._implicit:
            head = struct.pack(f"{self._order}I", len(value))
        elif vr == _LONG:
            head = vr + b"\0\0" + struct.pack(f"{self._order}I", len(value))
        else:
            head = vr + struct.pack(f"{self._order}H", len(value))
        return self._tag(tag) + head + value


def outcome(transaction_uid: str, items: Sequence[tuple[str, str, int]], retrieve_ae: str) -> Information:
    """The report on instances: SOP class, SOP instance UID and reason (0: committed) of each."""
    return Information(
        transaction_uid, {uid: sop_class for sop_class, uid, reason in items if not reason},
        {uid: (sop_class, reason) for sop_class, uid, reason in items if reason}, retrieve_ae)
