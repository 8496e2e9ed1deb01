"""A whole data set in the DICOM JSON model (PS3.18 Annex F), for WADO-RS metadata: built in one walk
without pydicom's `Dataset`, so that a hostile one costs what its bounds say and pixel data are never read.
Large values are named by URI; `bulk` returns exactly the bytes that such a URI stands for."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any, BinaryIO

from archive.dataset.charsets import DEFAULT_DECODER, TextDecoder, decoder
from archive.dataset.elements import Element, Kind, WalkLimits, fragments, walk
from archive.dataset.encoding import BINARY_VRS, DOUBLE_PIXEL_DATA, FLOAT_PIXEL_DATA, PIXEL_DATA, UNDEFINED
from archive.dataset.jsonvalues import DECIMAL_VRS, SINGLE_VALUED_VRS, json_value
from archive.dataset.part10 import Payload
from archive.dataset.values import DEFAULT_CHARSET_VRS
from archive.errors import CannotUnderstand, MissError, NotFound, TooLarge

BulkUri = Callable[[tuple[str, ...]], str]


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """What is held in memory at once. Values past the bounds are named by URI, which PS3.18 10.4.1.1.2
    allows for the VRs of `_BULK_VRS` alone; what is past `inline_bytes_max` and of another VR is refused."""

    binary_bytes_max: int = 1 << 10
    value_bytes_max: int = 256 << 10
    inline_bytes_max: int = 64 << 20
    walk: WalkLimits = WalkLimits(inflated_bytes_max=64 << 20)


DEFAULT_LIMITS = JsonLimits()
BULK_LIMITS = WalkLimits(inflated_bytes_max=1 << 30)
BULK_CHUNK_BYTES = 1 << 20

_BULK_VRS = BINARY_VRS | {
    "DS", "FD", "FL", "IS", "LT", "SL", "SS", "ST", "SV", "UC", "UL", "US", "UT", "UV",
}  # fmt: skip
_SPECIFIC_CHARACTER_SET = 0x00080005
_PIXEL_REPRESENTATION = 0x00280103
_GROUP_LENGTH = 0
_PIXELS = frozenset({FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA, PIXEL_DATA})

_NUMBER_CODES = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "UV": "Q", "SV": "q", "FL": "f", "FD": "d"}
# The words that a big endian value is made of (PS3.5 7.3).
_WORD_BYTES = {
    "US": 2, "SS": 2, "OW": 2, "AT": 2,
    "UL": 4, "SL": 4, "FL": 4, "OF": 4, "OL": 4,
    "FD": 8, "OD": 8, "OV": 8, "SV": 8, "UV": 8,
}  # fmt: skip


def metadata(
    payload: BinaryIO, *, bulk_uri: BulkUri, issuer: str = "", limits: JsonLimits = DEFAULT_LIMITS
) -> dict[str, Any]:
    """The data set of a Part 10 stream as DICOM JSON, without group 2. `bulk_uri` makes the URI of a large
    value from its path: tags and item numbers from 1, as in ("52009229", "1", "00480105"). `issuer` is
    shown as Issuer of Patient ID when the data set names none.

    Raises CannotUnderstand, or TooLarge past `limits`.
    """
    opened = Payload(payload, limits.walk)
    builder = _Builder(opened, bulk_uri, limits)
    for kind, element in walk(opened.window, opened.encoding, limits.walk):
        builder.take(kind, element)
    result = builder.result()
    if issuer and not result.get("00100021", {}).get("Value"):
        result["00100021"] = {"vr": "LO", "Value": [issuer]}
        result = dict(sorted(result.items()))
    return result


def bulk(payload: BinaryIO, path: str, *, limits: WalkLimits = BULK_LIMITS) -> Iterator[bytes]:
    """The bytes of the value at `path` ("7FE00010", "52009229/1/00480105"), little endian, in pieces; of
    encapsulated pixel data the fragments without their item tags (PS3.18 8.7.3.3.2).

    Raises NotFound when no value stands there.
    """
    if len(path) > _PATH_CHARS_MAX or not _PATH.fullmatch(path):
        raise NotFound("no such bulk data")
    opened = Payload(payload, limits)
    element, vr = _find(opened, tuple(path.split("/")), limits)
    if element.length == UNDEFINED:
        for number, (offset, length) in enumerate(fragments(opened.window, element, limits)):
            if number:  # the first is the Basic Offset Table
                yield from _pieces(opened, offset, length)
        return
    word = _WORD_BYTES.get(vr, 1) if element.encoding.big_endian else 1
    for piece in _pieces(opened, element.offset, element.length):
        yield swapped(piece, word)


_PATH = re.compile(r"[0-9A-F]{8}(/[1-9][0-9]{0,6}/[0-9A-F]{8})*", re.ASCII)
_PATH_CHARS_MAX = 2000


def swapped(value: bytes, word: int) -> bytes:
    """The words of a value in the other byte order; an odd rest stays as it is."""
    if word == 1:
        return value
    whole = len(value) - len(value) % word
    out = bytearray(value)
    for i in range(word):
        out[i:whole:word] = value[word - 1 - i : whole : word]
    return bytes(out)


def _pieces(opened: Payload, offset: int, length: int) -> Iterator[bytes]:
    end = offset + length
    while offset < end:
        piece = opened.source.read(offset, min(BULK_CHUNK_BYTES, end - offset))
        if not piece:
            raise CannotUnderstand("the data set ends inside a value")
        yield piece
        offset += len(piece)


def _find(opened: Payload, path: tuple[str, ...], limits: WalkLimits) -> tuple[Element, str]:
    """Walks only into the sequences and items that are on the path."""
    finder = _Builder(opened, lambda path: "", DEFAULT_LIMITS, wanted=path)
    wanted_tags = {int(tag, 16) for tag in path[:-1:2]}
    try:
        for kind, element in walk(opened.window, opened.encoding, limits, lambda tag: tag in wanted_tags):
            finder.take(kind, element)
            if finder.found is not None:
                return finder.found
    except TooLarge:
        raise
    except MissError as error:
        raise NotFound("no such bulk data") from error
    raise NotFound("no such bulk data")


class _Item:
    """A data set or an item while it is being read."""

    __slots__ = ("decode", "number", "path", "pixel_vr", "sequence", "values")

    def __init__(self, path: tuple[str, ...], decode: TextDecoder, pixel_vr: str) -> None:
        self.path = path
        self.decode = decode
        self.pixel_vr = pixel_vr  # what "US or SS" means here, by Pixel Representation
        self.values: dict[str, Any] = {}
        self.sequence: list[Any] = []  # of the sequence that is open in it
        self.number = 0


class _Builder:
    """Turns a walk into JSON; or, with `wanted`, finds the one element at that path."""

    def __init__(
        self,
        opened: Payload,
        bulk_uri: BulkUri,
        limits: JsonLimits,
        wanted: tuple[str, ...] | None = None,
    ) -> None:
        self.found: tuple[Element, str] | None = None
        self._window = opened.window
        self._bulk_uri = bulk_uri
        self._limits = limits
        self._wanted = wanted
        self._inline_left = limits.inline_bytes_max
        self._items = [_Item((), DEFAULT_DECODER, "US")]
        self._tags: list[str] = []

    def result(self) -> dict[str, Any]:
        return self._items[0].values

    def take(self, kind: Kind, element: Element | None) -> None:
        item = self._items[-1]
        if kind is Kind.ELEMENT and element is not None:
            self._take_element(item, element)
        elif kind is Kind.SEQUENCE_BEGIN and element is not None:
            tag = f"{element.tag:08X}"
            self._tags.append(tag)
            item.sequence = []
            item.number = 0
            if self._wanted is None:
                item.values.setdefault(tag, {"vr": "SQ", "Value": item.sequence})
        elif kind is Kind.SEQUENCE_END:
            tag = self._tags.pop()
            if not item.sequence and self._wanted is None:
                item.values[tag].pop("Value", None)
        elif kind is Kind.ITEM_BEGIN:
            item.number += 1
            self._items.append(
                _Item((*item.path, self._tags[-1], str(item.number)), item.decode, item.pixel_vr)
            )
        elif kind is Kind.ITEM_END:
            self._items.pop()
            if self._wanted is None:
                self._items[-1].sequence.append(item.values)

    def _take_element(self, item: _Item, element: Element) -> None:
        tag = element.tag
        vr = self._vr(item, element)
        if tag in (_SPECIFIC_CHARACTER_SET, _PIXEL_REPRESENTATION):
            self._note(item, element)
        if self._wanted is not None:
            if (*item.path, f"{tag:08X}") == self._wanted:
                self.found = (element, vr)
            return
        if tag & 0xFFFF == _GROUP_LENGTH or tag >> 16 == 2:
            return  # neither belongs into the model (PS3.18 F.2.2, 10.4.1.1.2)
        key = f"{tag:08X}"
        if key not in item.values:  # the first of two, as the header scanner takes it
            item.values[key] = self._json(item, element, vr, key)

    def _note(self, item: _Item, element: Element) -> None:
        value = self._window.at(element.offset, min(element.length, 256))
        if element.tag == _SPECIFIC_CHARACTER_SET:
            item.decode = decoder(value)
        elif len(value) >= 2:
            item.pixel_vr = "SS" if value[:2] in (b"\1\0", b"\0\1") else "US"

    def _vr(self, item: _Item, element: Element) -> str:
        vr = element.vr
        if " " not in vr:
            return vr
        # The dictionary leaves a choice (PS3.5 Annex A.1 for implicit VR).
        if vr == "US or SS":
            return item.pixel_vr
        if vr == "US or SS or OW":
            return item.pixel_vr if element.length <= 8 else "OW"
        if vr == "US or OW":
            return "US" if element.length == 2 else "OW"
        return "OW"

    def _json(self, item: _Item, element: Element, vr: str, key: str) -> dict[str, Any]:
        length = element.length
        if length == UNDEFINED or (length and not item.path and element.tag in _PIXELS):
            return {"vr": vr if vr in BINARY_VRS else "OB", "BulkDataURI": self._uri(item, key)}
        if not length:
            return {"vr": vr}
        binary = vr in BINARY_VRS
        too_long = length > (self._limits.binary_bytes_max if binary else self._limits.value_bytes_max)
        if too_long and vr in _BULK_VRS:
            return {"vr": vr, "BulkDataURI": self._uri(item, key)}
        self._inline_left -= length
        if self._inline_left < 0:
            raise TooLarge(f"values of more than {self._limits.inline_bytes_max} bytes")
        value = self._window.at(element.offset, length)
        if len(value) < length:
            raise CannotUnderstand("the data set ends inside a value")
        if element.encoding.big_endian:
            value = swapped(value, _WORD_BYTES.get(vr, 1))
        if binary:
            return {"vr": vr, "InlineBinary": b64encode(value).decode("ascii")}
        return _element(vr, value, item.decode)

    def _uri(self, item: _Item, key: str) -> str:
        return self._bulk_uri((*item.path, key))


def _element(vr: str, value: bytes, decode: TextDecoder) -> dict[str, Any]:
    """An element from its little endian bytes."""
    if vr in _NUMBER_CODES:
        values = _numbers(vr, value)
    elif vr == "AT":
        words = Struct(f"<{len(value) // 4 * 2}H").unpack_from(value)
        values = [f"{words[i]:04X}{words[i + 1]:04X}" for i in range(0, len(words), 2)]
    else:
        text = value.decode("latin-1") if vr in DEFAULT_CHARSET_VRS else decode(value)
        if vr in SINGLE_VALUED_VRS:
            values = [text.rstrip(" \0")]
        else:
            values = [json_value(vr, part.strip(" \0")) for part in text.split("\\")]
    if all(part is None or part == "" for part in values):
        return {"vr": vr}
    return {"vr": vr, "Value": values}


def _numbers(vr: str, value: bytes) -> list[Any]:
    code = _NUMBER_CODES[vr]
    size = Struct(f"<{code}").size
    numbers = Struct(f"<{len(value) // size}{code}").unpack_from(value)
    if vr in DECIMAL_VRS:
        # JSON has no infinity and no NaN; their names are what every reader's parser of numbers takes.
        return [number if number - number == 0 else _NAMES.get(number, "NaN") for number in numbers]
    if vr in ("SV", "UV"):
        return [number if abs(number) <= 2**53 else str(number) for number in numbers]
    return list(numbers)


_NAMES = {float("inf"): "Infinity", float("-inf"): "-Infinity"}
