"""Part 10 streams (PS3.10 7.1): where the data set begins and what the file meta information says of it. Owns
the reading of group 2, from files of any origin and from our own payloads; `archive/packs/records.py` writes
ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from struct import Struct
from typing import BinaryIO

from archive.dataset.elements import Element, Kind, WalkLimits, walk
from archive.dataset.encoding import (
    DEFLATED_SYNTAXES,
    EXPLICIT_LITTLE,
    LONG_VRS,
    Encoding,
    encoding_of,
)
from archive.dataset.sources import FileSource, InflatedSource, Source, Window
from archive.errors import CannotUnderstand, TooLarge
from archive.model import is_uid, require_uid

PREAMBLE_BYTES = 128
PREFIX = b"DICM"

META_BYTES_MAX = 1 << 20
_META_ELEMENTS_MAX = 256
_IDENTITY_INFLATED_BYTES = 1 << 20

_SOP_CLASS, _SOP_INSTANCE, _TRANSFER_SYNTAX = 0x00020002, 0x00020003, 0x00020010
_EXPLICIT_HEAD = Struct("<HH2sH")
_LENGTH = Struct("<I")


@dataclass(frozen=True, slots=True)
class Part10Head:
    """What the file meta information says, and where the data set begins."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    dataset_offset: int


def read_head(file: BinaryIO) -> Part10Head:
    """The head of a Part 10 file of any origin, as lenient as readers in the field are: the preamble and
    the group length may be missing and the latter is never trusted. The SOP UIDs are the data set's, since
    those of the file meta information are found to differ after anonymisers and copies, and a C-STORE must
    name the data set's.

    Raises CannotUnderstand when it is no Part 10 file, InvalidInstance when its UIDs are none.
    """
    head = read_meta(file)
    sop_class, instance = _read_identity(file, head)
    return replace(
        head,
        sop_class_uid=require_uid(sop_class or head.sop_class_uid, "the SOP Class UID"),
        sop_instance_uid=require_uid(instance or head.sop_instance_uid, "the SOP Instance UID"),
    )


def read_meta(file: BinaryIO) -> Part10Head:
    """The file meta information as it stands, without a look into the data set."""
    window = Window(FileSource(file, 0))
    meta, end = _read_meta(window, _meta_offset(window))
    syntax = meta.get(_TRANSFER_SYNTAX, "")
    if not syntax:
        raise CannotUnderstand("the file meta information has no Transfer Syntax UID")
    if not is_uid(syntax):
        raise CannotUnderstand("the Transfer Syntax UID is not a UID")
    return Part10Head(meta.get(_SOP_CLASS, ""), meta.get(_SOP_INSTANCE, ""), syntax, end)


class Payload:
    """An open Part 10 stream: its head, its data set behind a window, and how that is encoded."""

    __slots__ = ("encoding", "head", "limits", "source", "window")

    def __init__(self, file: BinaryIO, limits: WalkLimits) -> None:
        self.head = read_meta(file)
        self.limits = limits
        self.source = _source(file, self.head.transfer_syntax_uid, self.head.dataset_offset, limits)
        self.window = Window(self.source)
        self.encoding = _encoding(self.head.transfer_syntax_uid, self.window)


def _source(file: BinaryIO, transfer_syntax_uid: str, offset: int, limits: WalkLimits) -> Source:
    if transfer_syntax_uid in DEFLATED_SYNTAXES:
        return InflatedSource(file, offset, bytes_max=limits.inflated_bytes_max)
    return FileSource(file, offset)


def _encoding(transfer_syntax_uid: str, window: Window) -> Encoding:
    declared = EXPLICIT_LITTLE if transfer_syntax_uid in DEFLATED_SYNTAXES else transfer_syntax_uid
    return encoding_of(declared, window.at(0, 8))


def _meta_offset(window: Window) -> int:
    start = window.at(0, PREAMBLE_BYTES + len(PREFIX))
    if start[PREAMBLE_BYTES:] == PREFIX:
        return PREAMBLE_BYTES + len(PREFIX)
    if start.startswith(PREFIX):
        return len(PREFIX)
    if start.startswith(b"\x02\x00"):
        return 0
    raise CannotUnderstand("not a DICOM Part 10 file: neither DICM nor file meta information at its start")


def _read_meta(window: Window, at: int) -> tuple[dict[int, str], int]:
    found: dict[int, str] = {}
    for _ in range(_META_ELEMENTS_MAX):
        head = window.at(at, 12)
        if len(head) < 8:
            return found, at
        group, number, vr, length = _EXPLICIT_HEAD.unpack_from(head)
        if group != 2:
            return found, at
        value = at + 8
        if vr in LONG_VRS:
            if len(head) < 12:
                raise CannotUnderstand("the file meta information is cut short")
            length, value = _LENGTH.unpack_from(head, 8)[0], at + 12
        elif not vr.isalpha():  # implicit VR, against PS3.10 7.1
            length = _LENGTH.unpack_from(head, 4)[0]
        at = value + length
        if at > META_BYTES_MAX:
            raise CannotUnderstand(f"the file meta information takes more than {META_BYTES_MAX} bytes")
        content = window.at(value, length)
        if len(content) < length:
            raise CannotUnderstand("the file meta information is cut short")
        if length <= 256:
            found[group << 16 | number] = content.rstrip(b"\0 ").decode("ascii", "replace")
    raise CannotUnderstand(f"the file meta information has more than {_META_ELEMENTS_MAX} elements")


def _read_identity(file: BinaryIO, head: Part10Head) -> tuple[str, str]:
    """SOP Class and Instance UID of the data set, "" where there is none."""
    limits = WalkLimits(inflated_bytes_max=_IDENTITY_INFLATED_BYTES)
    window = Window(_source(file, head.transfer_syntax_uid, head.dataset_offset, limits))
    found = {0x00080016: "", 0x00080018: ""}
    try:
        encoding = _encoding(head.transfer_syntax_uid, window)
        for kind, element in walk(window, encoding, limits, lambda tag: False):
            if kind is not Kind.ELEMENT or element is None:
                continue
            if element.tag > 0x00080018:
                break
            if element.tag in found:
                found[element.tag] = _uid(window, element)
    except (CannotUnderstand, TooLarge):
        pass  # the file meta information stands in; whoever takes the data set judges it
    return found[0x00080016], found[0x00080018]


def _uid(window: Window, element: Element) -> str:
    return window.at(element.offset, min(element.length, 256)).rstrip(b"\0 ").decode("ascii", "replace")
