"""Whether two encoded instances are the same content (PS3.5): compared element by element, whatever the
transfer syntax, the lengths of sequences, group lengths and padding. A pure function of two Part 10 streams:
it knows no index and decides nothing.

Both are walked side by side, so that neither need fit in memory. Where the walk finds no order (elements that
do not ascend) it reports a difference: two contents are called equal only when nothing speaks against it.
Differences name elements; values are looked up only for a person who asks (`show`).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from io import BytesIO
from itertools import chain
from typing import BinaryIO

from archive.conflicts.pixels import (
    PHOTOMETRIC,
    PLANAR,
    PixelDifference,
    PixelLimits,
    compare_pixels,
    is_lossless,
    may_stand_for,
)
from archive.dataset.charsets import DEFAULT_DECODER, TextDecoder, decoder
from archive.dataset.dicomjson import swapped
from archive.dataset.elements import Element, Kind, WalkLimits, fragments, walk
from archive.dataset.encoding import (
    DOUBLE_PIXEL_DATA,
    FLOAT_PIXEL_DATA,
    IMPLICIT,
    NATIVE_SYNTAXES,
    PIXEL_DATA,
    SEQUENCE_END,
    UNDEFINED,
    known_vr,
)
from archive.dataset.part10 import Payload
from archive.dataset.sources import FileSource, Window
from archive.dataset.values import DEFAULT_CHARSET_VRS, VALUE_BYTES_MAX, text_of
from archive.errors import CannotUnderstand, MissError, TooLarge

_TEXT = DEFAULT_CHARSET_VRS | {"IS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"}
_WORD_BYTES = {"US": 2, "SS": 2, "OW": 2, "AT": 2, "UL": 4, "SL": 4, "FL": 4, "OF": 4, "OL": 4,
               "FD": 8, "OD": 8, "SV": 8, "UV": 8, "OV": 8}  # fmt: skip
_BYTES = frozenset({"OB", "OW"})
_PIXELS = frozenset({PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA})
_OF_ENCODING = frozenset({0x7FE00001, 0x7FE00002, 0x7FE00003})  # Extended Offset Table and the like
_CHARACTER_SET, _TRAILING_PADDING = 0x00080005, 0xFFFCFFFC
_CHUNK_BYTES = 1 << 20
_SEQUENCE_BYTES_MAX = 16 << 20
_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class CompareLimits:
    """How far a comparison goes: past any of these it is undecided, and the two stay two."""

    differences_max: int = 100
    seconds_max: float = 60.0
    walk: WalkLimits = WalkLimits()
    pixels: PixelLimits = PixelLimits()


class What(Enum):
    """How an element differs."""

    CHANGED = "changed"
    FIRST_ONLY = "only in the live one"
    SECOND_ONLY = "only in the other"


@dataclass(frozen=True, slots=True)
class Difference:
    """One element that differs: its path, (gggg,eeee) with items as [n]. The values are filled when they
    are to be shown, and are patient data."""

    path: str
    tag: int
    what: What
    first: str = ""
    second: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found. `undecided` says why it could not come to an end."""

    differences: tuple[Difference, ...] = ()
    truncated: bool = False
    pixels: PixelDifference | None = None
    undecided: str = ""

    @property
    def equal(self) -> bool:
        """Whether both are one content in two encodings."""
        return not (self.differences or self.pixels or self.undecided)


def compare(
    first: BinaryIO,
    second: BinaryIO,
    *,
    limits: CompareLimits | None = None,
    show: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Compare two Part 10 streams. It never raises for what they contain."""
    limits = limits or CompareLimits()
    run = _Run(limits, show, is_stopping)
    try:
        run.compare(_Side(first, limits), _Side(second, limits))
    except MissError as error:
        run.undecided = str(error)
    except (ValueError, ArithmeticError, LookupError, TypeError, EOFError, struct.error) as error:
        run.undecided = f"one of them can't be read ({type(error).__name__})"
    return Comparison(tuple(run.differences), run.truncated, run.pixels, run.undecided)


@dataclass(slots=True)
class _Token:
    """A place in a data set: an element, a sequence's beginning, or an item's. Paths ascend as tuples do."""

    path: tuple[int, ...]
    element: Element | None
    is_sequence: bool
    window: Window


class _Side:
    """One of the two data sets."""

    def __init__(self, file: BinaryIO, limits: CompareLimits) -> None:
        self.file = file
        self.payload = Payload(file, limits.walk)
        self.limits = limits.walk
        self.decode: TextDecoder = DEFAULT_DECODER
        self.image: dict[int, bytes] = {}  # the short values of group 0028, little endian

    @property
    def transfer_syntax_uid(self) -> str:
        return self.payload.head.transfer_syntax_uid

    def tokens(self) -> Iterator[_Token]:
        events = walk(self.payload.window, self.payload.encoding, self.limits, strict=True)
        for token in _tokens(events, self.payload.window, ()):
            if len(token.path) == 1 and token.element is not None:
                self._note(token.element)
            yield token

    def _note(self, element: Element) -> None:
        if element.tag >> 16 == 0x0028 and element.length <= 64:
            self.image[element.tag] = value_of(self.payload.window, element, 64)
        elif element.tag == _CHARACTER_SET and element.length <= 1024:
            self.decode = decoder(self.payload.window.at(element.offset, element.length))


def _tokens(events: Iterator[tuple[Kind, Element | None]], window: Window, path: tuple[int, ...]
            ) -> Iterator[_Token]:  # fmt: skip
    items: list[int] = []
    for kind, element in events:
        if kind is Kind.ELEMENT:
            assert element is not None
            if _counts(element, len(path)):
                yield _Token((*path, element.tag), element, False, window)
        elif kind is Kind.SEQUENCE_BEGIN:
            assert element is not None
            path = (*path, element.tag)
            items.append(0)
            yield _Token(path, element, True, window)
        elif kind is Kind.ITEM_BEGIN:
            items[-1] += 1
            path = (*path, items[-1])
            yield _Token(path, None, False, window)
        elif kind is Kind.ITEM_END:
            path = path[:-1]
        else:
            path = path[:-1]
            items.pop()


def _counts(element: Element, depth: int) -> bool:
    """Group lengths, trailing padding and offset tables are of the encoding, not of the content. What does
    not have the four octets of a length is none."""
    is_group_length = element.tag & 0xFFFF == 0 and element.length == 4
    return not is_group_length and not (
        depth == 0 and (element.tag == _TRAILING_PADDING or element.tag in _OF_ENCODING)
    )


def value_of(window: Window, element: Element, length: int, at: int = 0) -> bytes:
    """Bytes of a value in little endian order."""
    data = window.at(element.offset + at, min(length, element.length - at))
    return swapped(data, _word(element)) if element.encoding.big_endian else data


def _word(element: Element) -> int:
    return _WORD_BYTES.get(element.vr, 1) if element.encoding.big_endian else 1


@dataclass(slots=True)
class _Run:
    limits: CompareLimits
    show: bool
    is_stopping: Callable[[], bool]
    differences: list[Difference] = field(default_factory=list)
    truncated: bool = False
    pixels: PixelDifference | None = None
    undecided: str = ""
    _deadline_s: float = 0.0
    _decoded: bool = False  # pixel data of two encodings: what describes them may differ too
    _one_syntax: bool = True
    _pixels_seen: bool = False

    def compare(self, a: _Side, b: _Side) -> None:
        self._deadline_s = time.monotonic() + self.limits.seconds_max
        syntaxes = (a.transfer_syntax_uid, b.transfer_syntax_uid)
        self._one_syntax = syntaxes[0] == syntaxes[1]
        compressed = any(uid not in NATIVE_SYNTAXES for uid in syntaxes)
        self._decoded = compressed and not self._one_syntax and all(map(is_lossless, syntaxes))
        left, right = a.tokens(), b.tokens()
        x, y = next(left, None), next(right, None)
        count = 0
        while x is not None or y is not None:
            count += 1
            if count % 256 == 0:
                self.check_time()
            if y is None or (x is not None and x.path < y.path):
                assert x is not None
                self._differ(x, What.FIRST_ONLY, a, b, x, None)
                x = _behind(x, left)
            elif x is None or y.path < x.path:
                self._differ(y, What.SECOND_ONLY, a, b, None, y)
                y = _behind(y, right)
            elif x.is_sequence and not y.is_sequence and y.element is not None and _may_be_items(y.element):
                right = chain(_items(y, self.limits.walk), right)
                x, y = next(left, None), next(right, None)
            elif y.is_sequence and not x.is_sequence and x.element is not None and _may_be_items(x.element):
                left = chain(_items(x, self.limits.walk), left)
                x, y = next(left, None), next(right, None)
            elif x.is_sequence or x.element is None or y.is_sequence or y.element is None:
                if (x.is_sequence, x.element is None) == (y.is_sequence, y.element is None):
                    x, y = next(left, None), next(right, None)
                else:
                    self._differ(x, What.CHANGED, a, b, x, y)
                    x, y = _behind(x, left), _behind(y, right)
            else:
                if len(x.path) == 1 and x.element.tag in _PIXELS:
                    if self._pixels_seen:
                        raise CannotUnderstand("not compared: pixel data stand there more than once")
                    self._pixels_seen = True
                    self.pixels = compare_pixels(
                        (a.file, a.payload, x.element, a.image), (b.file, b.payload, y.element, b.image),
                        self.limits.pixels, self.check_time,
                    )  # fmt: skip
                elif not self._same(x, y):
                    self._differ(x, What.CHANGED, a, b, x, y)
                x, y = next(left, None), next(right, None)
            if self.truncated:
                return

    def check_time(self) -> None:
        if self.is_stopping():
            raise TooLarge("not compared to the end: stopped")
        if time.monotonic() > self._deadline_s:
            raise TooLarge(f"not compared to the end within {self.limits.seconds_max:.0f} s")

    def _differ(
        self, at: _Token, what: What, a: _Side, b: _Side, x: _Token | None, y: _Token | None
    ) -> None:
        if len(self.differences) >= self.limits.differences_max:
            self.truncated = True
            return
        tag = next((part for part in reversed(at.path) if part > 0xFFFF), 0)
        values = (_shown(x, a.decode), _shown(y, b.decode)) if self.show else ("", "")
        self.differences.append(Difference(_path_text(at.path), tag, what, *values))

    def _same(self, x: _Token, y: _Token) -> bool:
        one, other = x.element, y.element
        assert one is not None and other is not None
        if UNDEFINED in (one.length, other.length):  # encoded as the transfer syntax says
            return self._one_syntax and _same_fragments(x, y, self.limits)
        stated = not (one.encoding.implicit or other.encoding.implicit)
        vrs = {one.vr, other.vr}
        if stated and len(vrs) > 1 and "UN" not in vrs and not vrs <= _BYTES:
            return False
        if self._decoded and len(x.path) == 1 and one.tag in (PHOTOMETRIC, PLANAR):
            return may_stand_for(one.tag, _stripped(x), _stripped(y))
        text = bool(vrs & _TEXT)
        if abs(one.length - other.length) > (64 << 10 if text else 1):
            return False
        if max(one.length, other.length) <= _CHUNK_BYTES:
            first, second = (value_of(t.window, e, e.length) for t, e in ((x, one), (y, other)))
            return _same_value(first, second, text)
        padding = False  # text differs in its padding already: nothing else may follow
        for start in range(0, max(one.length, other.length), _CHUNK_BYTES):
            self.check_time()
            first = value_of(x.window, one, _CHUNK_BYTES, start) if start < one.length else b""
            second = value_of(y.window, other, _CHUNK_BYTES, start) if start < other.length else b""
            if padding and (first + second).strip(b" \0"):
                return False
            if first != second:
                if not _same_value(first, second, text):
                    return False
                padding = text
        return True


def _same_value(first: bytes, second: bytes, text: bool) -> bool:
    if first == second:
        return True
    if text:
        return first.rstrip(b" \0") == second.rstrip(b" \0")
    short, long = sorted((first, second), key=len)
    return len(short) % 2 == 1 and long == short + b"\0"  # a writer that forgot to make it even


def _stripped(token: _Token) -> bytes:
    assert token.element is not None
    return value_of(token.window, token.element, 64).strip(b" \0")


def _same_fragments(x: _Token, y: _Token, limits: CompareLimits) -> bool:
    """Encapsulated values that are no pixel data of the image itself: fragment by fragment."""
    one, other = x.element, y.element
    assert one is not None and other is not None
    if one.length != other.length:
        return False
    pairs = (list(fragments(t.window, e, limits.walk)) for t, e in ((x, one), (y, other)))
    left, right = pairs
    if [length for _, length in left] != [length for _, length in right]:
        return False
    if sum(length for _, length in left) > _SEQUENCE_BYTES_MAX:
        raise TooLarge("encapsulated values inside a sequence are too large to be compared")
    return all(
        x.window.at(p, length) == y.window.at(q, length)
        for (p, length), (q, _) in zip(left, right, strict=True)
    )


def _behind(token: _Token, tokens: Iterator[_Token]) -> _Token | None:
    """The next token that does not lie inside this one."""
    depth = len(token.path)
    for found in tokens:
        if found.path[:depth] != token.path:
            return found
    return None


def _may_be_items(element: Element) -> bool:
    """A sequence of which a writer in implicit VR did not know that it is one stays as its bytes (PS3.5
    6.2.2)."""
    return element.length == 0 or element.vr == "UN"


def _items(token: _Token, limits: WalkLimits) -> Iterator[_Token]:
    """The items in a value of unknown VR."""
    element = token.element
    assert element is not None
    if element.length > _SEQUENCE_BYTES_MAX:
        raise TooLarge("a value of unknown VR is too large to be read as a sequence")
    head = struct.pack("<HHI", element.tag >> 16, element.tag & 0xFFFF, UNDEFINED)
    end = struct.pack("<HHI", SEQUENCE_END >> 16, SEQUENCE_END & 0xFFFF, 0)
    value = token.window.at(element.offset, element.length)
    window = Window(FileSource(BytesIO(head + value + end), 0))
    events = walk(window, IMPLICIT, limits, strict=True)
    try:
        for found in _tokens(events, window, token.path[:-1]):
            if found.path != token.path:
                yield found
    except CannotUnderstand:
        yield _Token((*token.path, 1), element, False, token.window)  # no items: it differs from any


def _path_text(path: tuple[int, ...]) -> str:
    text = ""
    for part in path:
        if part <= 0xFFFF:
            text += f"[{part}]"
        else:
            text += f"{'.' if text else ''}({part >> 16:04X},{part & 0xFFFF:04X})"
    return text


def _shown(token: _Token | None, decode: TextDecoder) -> str:
    if token is None:
        return ""
    element = token.element
    if token.is_sequence:
        return "a sequence"
    if element is None:
        return "an item"
    vr = (known_vr(element.tag) or "UN") if element.vr == "UN" else element.vr
    vr = vr.split(" or ")[0]
    if vr in ("OB", "OW", "OF", "OD", "OL", "OV", "UN") or element.length == UNDEFINED:
        return f"{element.length:,} bytes" if element.length != UNDEFINED else "fragments"
    value = token.window.at(element.offset, min(element.length, VALUE_BYTES_MAX))
    raw = (vr.encode("ascii"), element.encoding.big_endian, value, decode)
    return text_of(raw, vr, chars_max=_SHOWN_CHARS)
