"""Small data sets in the DICOM JSON model: identifiers, worklist items, performed steps. Owns their way from
octets and files into JSON, text decoded, and what their values are in words; `jsonwriting.py` is the way
back. It reads nothing that is stored as an image."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from archive.dataset.dicomjson import JsonLimits, metadata
from archive.dataset.elements import WalkLimits
from archive.dataset.encoding import EXPLICIT_LITTLE, IMPLICIT_LITTLE, known_vr
from archive.dataset.jsonvalues import json_element
from archive.dataset.part10 import PREAMBLE_BYTES, PREFIX
from archive.errors import CannotUnderstand

Attributes = Mapping[str, Any]  # DICOM JSON: eight hexadecimal digits -> {"vr", "Value" or "InlineBinary"}

BYTES_MAX = 8 << 20
_LIMITS = JsonLimits(
    binary_bytes_max=BYTES_MAX, value_bytes_max=BYTES_MAX, inline_bytes_max=BYTES_MAX,
    walk=WalkLimits(inflated_bytes_max=BYTES_MAX),
)  # fmt: skip
_CHARACTER_SET = "00080005"
_DS_CHARS_MAX = 16


def from_octets(octets: bytes, transfer_syntax_uid: str) -> dict[str, Any]:
    """A data set without file meta information, as messages carry it. Raises CannotUnderstand."""
    return with_character_set(octets, transfer_syntax_uid)[0]


def with_character_set(octets: bytes, transfer_syntax_uid: str) -> tuple[dict[str, Any], bytes]:
    """The same, and the raw value of its Specific Character Set."""
    uid = transfer_syntax_uid.encode("ascii")
    uid += b"\0" * (len(uid) & 1)
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid
    return _read(meta + octets)


def from_file(octets: bytes) -> dict[str, Any]:
    """What a whole file holds: Part 10 (PS3.10 7.1), or a data set alone, as older worklist files are. Raises
    CannotUnderstand."""
    if len(octets) > BYTES_MAX:
        raise CannotUnderstand(f"more than {BYTES_MAX:,} bytes")
    is_part10 = octets[PREAMBLE_BYTES : PREAMBLE_BYTES + len(PREFIX)] == PREFIX
    if is_part10 or octets.startswith((PREFIX, b"\2\0")):
        return _read(octets)[0]
    explicit = len(octets) >= 6 and octets[4:6].isalpha() and octets[4:6].isupper()
    return from_octets(octets, EXPLICIT_LITTLE if explicit else IMPLICIT_LITTLE)


def _read(octets: bytes) -> tuple[dict[str, Any], bytes]:
    attributes = metadata(BytesIO(octets), bulk_uri=lambda path: "", limits=_LIMITS)
    character_set = text_of(attributes, _CHARACTER_SET).encode("ascii", "replace")
    return _decoded(attributes), character_set


def _decoded(attributes: dict[str, Any]) -> dict[str, Any]:
    """Its text is no longer in a character set of DICOM's."""
    attributes.pop(_CHARACTER_SET, None)
    for element in attributes.values():
        if element["vr"] == "SQ":
            for item in element.get("Value", ()):
                _decoded(item)
    return attributes


def vr_of(tag: str, element: Mapping[str, Any]) -> str:
    """The VR of an element: its own, else the dictionary's where it is unknown."""
    vr: str = element["vr"]
    if vr != "UN":
        return vr
    return known_vr(int(tag, 16)) or vr


def text_of(attributes: Attributes, tag: str) -> str:
    """The value's string form, several values joined by backslashes; "" when there is none, of a sequence
    and of bytes."""
    element = attributes.get(tag)
    if not element or element["vr"] == "SQ":
        return ""
    return "\\".join(value_text(value) for value in element.get("Value", ()))


def first_of(attributes: Attributes, tag: str) -> Attributes:
    """The first item of a sequence; empty when there is none."""
    items = items_of(attributes, tag)
    return items[0] if items else {}


def items_of(attributes: Attributes, tag: str) -> list[dict[str, Any]]:
    element = attributes.get(tag)
    if not element or element["vr"] != "SQ":
        return []
    return [item for item in element.get("Value", ()) if isinstance(item, dict)]


def put(attributes: dict[str, Any], tag: str, vr: str, text: str) -> None:
    """Give an element the value that DICOM's string form says."""
    attributes[tag] = json_element(vr, text)


def value_text(value: Any) -> str:
    """One value in DICOM's string form."""
    if value is None:
        return ""
    if isinstance(value, dict):  # a person's name (PS3.18 F.2.2)
        groups = [str(value.get(name) or "") for name in ("Alphabetic", "Ideographic", "Phonetic")]
        return "=".join(groups).rstrip("=")
    if isinstance(value, float):
        text = str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
        return text if len(text) <= _DS_CHARS_MAX else f"{value:.9g}"
    return str(value)
