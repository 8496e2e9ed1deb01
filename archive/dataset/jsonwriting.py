"""Small data sets from the DICOM JSON model into octets (PS3.5 7): worklist answers, performed steps. Text
goes out in the character set that is asked for where all of it fits, since many a modality knows no other;
else in UTF-8."""

from __future__ import annotations

import struct
from base64 import b64decode
from collections.abc import Iterator, Mapping
from typing import Any

from archive.dataset.dicomjson import swapped
from archive.dataset.encoding import EXPLICIT_BIG, IMPLICIT_LITTLE, LONG_VRS
from archive.dataset.jsonsets import Attributes, items_of, value_text
from archive.dataset.textencoding import UNICODE, TextEncoder, encoder
from archive.dataset.values import DEFAULT_CHARSET_VRS

_CHARACTER_SET = "00080005"
_ITEM = (0xFFFE, 0xE000)
_SHORT_BYTES_MAX = 0xFFFE
_CODES = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "UV": "Q", "SV": "q", "FL": "f", "FD": "d"}
_WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}


def encoded(attributes: Attributes, transfer_syntax_uid: str, character_set: bytes = b"") -> bytes:
    """The data set, without file meta information. Values were kept as they came: one that its VR can't hold
    goes out empty rather than failing the answer. `character_set` is the raw value of (0008,0005) that the
    peer is known to read."""
    beyond = [text for text in _texts(attributes) if not text.isascii()]
    encode: TextEncoder | None = None
    if beyond:
        asked = encoder(character_set)
        encode = asked if all(asked(text) is not None for text in beyond) else UNICODE
        term = {"vr": "CS", "Value": encode.term.split("\\")}
        attributes = {**attributes, _CHARACTER_SET: term}
    return _Writer(transfer_syntax_uid, encode).dataset(attributes)


def _texts(attributes: Attributes) -> Iterator[str]:
    """The texts that are written in the character set."""
    for tag, element in attributes.items():
        if element["vr"] == "SQ":
            for item in items_of(attributes, tag):
                yield from _texts(item)
        elif element["vr"] not in DEFAULT_CHARSET_VRS and element["vr"] not in _CODES:
            yield from map(value_text, element.get("Value", ()))


class _Writer:
    __slots__ = ("_big", "_encode", "_implicit", "_order")

    def __init__(self, transfer_syntax_uid: str, encode: TextEncoder | None) -> None:
        self._implicit = transfer_syntax_uid == IMPLICIT_LITTLE
        self._big = transfer_syntax_uid == EXPLICIT_BIG
        self._order = ">" if self._big else "<"
        self._encode = encode

    def dataset(self, attributes: Attributes) -> bytes:
        return b"".join(self._element(tag, attributes) for tag in sorted(attributes))

    def _element(self, tag: str, attributes: Attributes) -> bytes:
        element = attributes[tag]
        vr: str = element["vr"]
        if vr == "SQ":
            value = b"".join(map(self._item, items_of(attributes, tag)))
        else:
            value = self._value(vr, element)
        long = vr.encode() in LONG_VRS
        if len(value) & 1:
            value += b"\0" if vr in ("UI", "OB", "UN") else b" "
        if len(value) > _SHORT_BYTES_MAX and not (long or self._implicit):
            value = b""
        head = struct.pack(f"{self._order}HH", int(tag[:4], 16), int(tag[4:], 16))
        if self._implicit:
            return head + struct.pack(f"{self._order}I", len(value)) + value
        length = struct.pack(f"{self._order}2xI" if long else f"{self._order}H", len(value))
        return head + vr.encode() + length + value

    def _item(self, item: Attributes) -> bytes:
        body = self.dataset(item)
        return struct.pack(f"{self._order}HHI", *_ITEM, len(body)) + body

    def _value(self, vr: str, element: Mapping[str, Any]) -> bytes:
        values = element.get("Value", ())
        try:
            if "InlineBinary" in element:
                octets = b64decode(element["InlineBinary"])
                return swapped(octets, _WORD_BYTES.get(vr, 1)) if self._big else octets
            if vr in _CODES:
                whole = float if vr in ("FL", "FD") else int
                return struct.pack(f"{self._order}{len(values)}{_CODES[vr]}", *map(whole, values))
            if vr == "AT":
                words = [int(part[at:at + 4], 16) for part in values for at in (0, 4)]
                return struct.pack(f"{self._order}{len(words)}H", *words)
        except (ValueError, TypeError, OverflowError, struct.error):
            return b""
        return b"\\".join(self._text(vr, value_text(value)) for value in values)

    def _text(self, vr: str, text: str) -> bytes:
        if text.isascii():
            return text.encode("ascii")
        if vr in DEFAULT_CHARSET_VRS:
            return text.encode("latin-1", "replace")
        octets = self._encode(text) if self._encode is not None else None
        return text.encode("utf-8", "replace") if octets is None else octets
