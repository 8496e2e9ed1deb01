"""The structure of an encoded data set (PS3.5 7): element by element, from a file that need not fit in
memory, with stated bounds and without recursion. Owns the walk; knows no attribute's meaning.

`archive/dataset/header.py` has a faster loop of its own for what intake needs; both take the same liberties
with the same encodings, so that an instance that was understood when it came is understood when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from struct import Struct
from typing import NamedTuple

from archive.dataset.encoding import (
    EXPLICIT_LITTLE,
    FLOAT_PIXEL_DATA,
    IMPLICIT,
    ITEM,
    ITEM_END,
    LONG_VRS,
    PIXEL_DATA,
    SEQUENCE_END,
    SHORT_VRS,
    UNDEFINED,
    Encoding,
    encoding_of,
    is_no_vr,
    known_vr,
    private_vr,
)
from archive.dataset.sources import Window
from archive.errors import CannotUnderstand, MissError, TooLarge


@dataclass(frozen=True, slots=True)
class WalkLimits:
    """How far a walk goes: real structured reports nest about 20 deep, real functional groups of 10,000
    frames hold some 600,000 elements."""

    nesting_max: int = 100
    elements_max: int = 1_000_000
    inflated_bytes_max: int = 256 << 20


class Kind(Enum):
    """What a walk meets. BEGIN and END come in pairs, for sequences and for their items."""

    ELEMENT = auto()
    SEQUENCE_BEGIN = auto()
    SEQUENCE_END = auto()
    ITEM_BEGIN = auto()
    ITEM_END = auto()


class Element(NamedTuple):
    """One element. `length` is UNDEFINED for encapsulated values alone, whose `offset` is that of their
    first item. `vr` is the dictionary's where the data set does not say it, so it may be "US or SS"."""

    tag: int
    vr: str
    offset: int
    length: int
    encoding: Encoding


Event = tuple[Kind, Element | None]

_ITEM_BEGIN: Event = (Kind.ITEM_BEGIN, None)
_ITEM_END: Event = (Kind.ITEM_END, None)
_SEQUENCE_END: Event = (Kind.SEQUENCE_END, None)


class _Level:
    """An open sequence or item, or the data set itself."""

    __slots__ = ("creators", "encoding", "end", "is_sequence", "visible")

    def __init__(self, is_sequence: bool, end: int | None, encoding: Encoding, visible: bool) -> None:
        self.is_sequence = is_sequence
        self.end = end
        self.encoding = encoding
        self.visible = visible
        self.creators: dict[int, str] = {}


_PADDING_BYTES_MAX = 64 << 10

_TAG = {False: Struct("<HH"), True: Struct(">HH")}
_LENGTH = {False: Struct("<I"), True: Struct(">I")}
_SHORT_LENGTH = {False: Struct("<H"), True: Struct(">H")}


def walk(
    window: Window,
    encoding: Encoding,
    limits: WalkLimits,
    descend: Callable[[int], bool] = lambda tag: True,
    *,
    strict: bool = False,
) -> Iterator[Event]:
    """Everything in a data set, in its order. Sequences for which `descend` says no are stepped over in
    silence.

    Raises CannotUnderstand where the structure breaks, but for what comes after the pixel data: there the
    walk ends. A `strict` walk passes over nothing, there or elsewhere: it raises.
    """
    walker = _Walker(window, encoding, limits, descend, strict)
    try:
        yield from walker.run()
    except MissError:
        if strict or not walker.past_pixels:
            raise


class _Walker:
    def __init__(
        self,
        window: Window,
        encoding: Encoding,
        limits: WalkLimits,
        descend: Callable[[int], bool],
        strict: bool,
    ) -> None:
        self.past_pixels = False
        self._strict = strict
        self._window = window
        self._limits = limits
        self._descend = descend
        self._levels = [_Level(False, None, encoding, True)]
        self._at = 0
        self._elements = 0
        self._encapsulated: Element | None = None

    def run(self) -> Iterator[Event]:
        levels = self._levels
        while True:
            level = levels[-1]
            while level.end is not None and self._at >= level.end:
                levels.pop()
                if level.visible:
                    yield _SEQUENCE_END if level.is_sequence else _ITEM_END
                level = levels[-1]
            head = self._window.at(self._at, 12)
            if len(head) < 8:
                self._require_end(head)
                return
            self._elements += 1
            if self._elements > self._limits.elements_max:
                raise TooLarge(f"more than {self._limits.elements_max} elements")
            big = level.encoding.big_endian
            group, number = _TAG[big].unpack_from(head)
            tag = group << 16 | number
            if level.is_sequence:
                event = self._step_sequence(level, tag, head)
                if event is not None:
                    yield event
            elif group == 0xFFFE and len(levels) == 1:
                self._step_over_stray(tag, head)
            elif group == 0xFFFE:
                self._end_item(level, tag)
                if level.visible:
                    yield _ITEM_END
            elif tag == 0 and len(levels) == 1:
                self._require_zeros()
                return  # zeros after the last element, as some writers pad
            else:
                event = self._step_element(level, tag, head)
                if event is not None:
                    yield event
                if self._encapsulated is not None:
                    self._step_over(self._encapsulated)

    def _require_zeros(self) -> None:
        rest = self._window.at(self._at, _PADDING_BYTES_MAX + 1) if self._strict else b""
        if rest.strip(b"\0") or len(rest) > _PADDING_BYTES_MAX:
            raise CannotUnderstand("something stands behind the zeros at the end")

    def _require_end(self, rest: bytes) -> None:
        if len(self._levels) > 1:
            raise CannotUnderstand("the data set ends inside a sequence")
        if rest:
            raise CannotUnderstand("the data set ends inside an element")

    def _push(self, level: _Level) -> None:
        # Each depth of nesting is a sequence and an item.
        if len(self._levels) > 2 * self._limits.nesting_max:
            raise CannotUnderstand(f"sequences nest deeper than {self._limits.nesting_max}")
        self._levels.append(level)

    def _bounded(self, level: _Level, end: int) -> int:
        return end if level.end is None else min(end, level.end)

    def _step_sequence(self, level: _Level, tag: int, head: bytes) -> Event | None:
        length = _LENGTH[level.encoding.big_endian].unpack_from(head, 4)[0]
        self._at += 8
        if tag == ITEM:
            encoding = level.encoding
            if length and not encoding.big_endian:
                # Some writers switch to implicit VR inside a sequence, or to explicit inside UN.
                start = self._window.at(self._at, 8)
                if not start.startswith(b"\xfe\xff"):
                    encoding = encoding_of(EXPLICIT_LITTLE, start)
            end = None if length == UNDEFINED else self._bounded(level, self._at + length)
            self._push(_Level(False, end, encoding, level.visible))
            return _ITEM_BEGIN if level.visible else None
        if tag == SEQUENCE_END:
            # Within a defined length too: such is UN that was copied from a sequence of undefined length.
            if self._strict and level.end not in (None, self._at):
                raise CannotUnderstand("something stands behind the end of a sequence")
            self._at = self._at if level.end is None else level.end
            self._levels.pop()
            return _SEQUENCE_END if level.visible else None
        raise CannotUnderstand("a sequence holds something that is not an item")

    def _step_over_stray(self, tag: int, head: bytes) -> None:
        """An item whose sequence has no head, as in `archive/dataset/header.py`."""
        length = _LENGTH[self._levels[0].encoding.big_endian].unpack_from(head, 4)[0]
        if tag == ITEM_END or length == UNDEFINED or self._strict:
            raise CannotUnderstand("a delimiter where none belongs")
        self._at += 8 + length

    def _end_item(self, level: _Level, tag: int) -> None:
        if tag != ITEM_END or level.end is not None:
            raise CannotUnderstand("a delimiter where none belongs")
        self._at += 8
        self._levels.pop()

    def _step_element(self, level: _Level, tag: int, head: bytes) -> Event | None:
        vr, length, size = self._element_head(level, head)
        offset = self._at + size
        encoding = level.encoding
        if not vr or vr == "UN":
            known = self._vr_of(level, tag)
            if vr == "UN":
                encoding = IMPLICIT  # PS3.5 6.2.2
            if not vr or length < 0xFFFF or length == UNDEFINED:
                vr = known
        if length == UNDEFINED:
            return self._begin_undefined(level, tag, vr, offset, encoding)
        end = offset + length
        if level.end is not None and end > level.end:
            raise CannotUnderstand("an element reaches beyond its item")
        if vr == "SQ":
            if not length or self._is_item(offset, encoding):
                return self._begin(level, Element(tag, vr, offset, length, encoding), end)
            vr = "UN"  # met in the field: a value of another VR under the tag of a sequence
        if tag >> 16 & 1 and 0x10 <= tag & 0xFFFF <= 0xFF:
            creator = self._window.at(offset, min(length, 64)).decode("ascii", "replace").strip(" \0")
            level.creators[tag] = creator
        is_last = tag >= FLOAT_PIXEL_DATA and len(self._levels) == 1
        if is_last:
            self.past_pixels = True
        if (self._strict or not is_last) and length and len(self._window.at(end - 1, 1)) < 1:
            raise CannotUnderstand("the data set ends inside a value")
        self._at = end
        return (Kind.ELEMENT, Element(tag, vr, offset, length, encoding)) if level.visible else None

    def _is_item(self, offset: int, encoding: Encoding) -> bool:
        start = self._window.at(offset, 4)
        if len(start) < 4:
            return False
        group, number = _TAG[encoding.big_endian].unpack(start)
        return (group << 16 | number) in (ITEM, SEQUENCE_END)

    def _element_head(self, level: _Level, head: bytes) -> tuple[str, int, int]:
        """VR ("" when it is not there), length, and the size of the element's head."""
        big = level.encoding.big_endian
        if not level.encoding.implicit:
            vr = head[4:6]
            if vr in SHORT_VRS:
                return vr.decode("ascii"), _SHORT_LENGTH[big].unpack_from(head, 6)[0], 8
            if vr in LONG_VRS:
                if len(head) < 12:
                    raise CannotUnderstand("the data set ends inside an element")
                return vr.decode("ascii"), _LENGTH[big].unpack_from(head, 8)[0], 12
            if not is_no_vr(vr):
                return "UN", _SHORT_LENGTH[big].unpack_from(head, 6)[0], 8
        return "", _LENGTH[big].unpack_from(head, 4)[0], 8

    def _vr_of(self, level: _Level, tag: int) -> str:
        known = known_vr(tag)
        if known is not None:
            return known
        if tag & 0xFFFF == 0:
            return "UL"
        if tag >> 16 & 1:
            if 0x10 <= tag & 0xFFFF <= 0xFF:
                return "LO"
            creator = level.creators.get(tag & 0xFFFF0000 | tag >> 8 & 0xFF)
            if creator:
                return private_vr(tag, creator)
        return "UN"

    def _begin_undefined(
        self, level: _Level, tag: int, vr: str, offset: int, encoding: Encoding
    ) -> Event | None:
        if tag == PIXEL_DATA or (vr in ("OB", "OW") and not encoding.implicit):
            element = Element(tag, vr, offset, UNDEFINED, encoding)
            self.past_pixels = self.past_pixels or (tag == PIXEL_DATA and len(self._levels) == 1)
            self._encapsulated = element
            return (Kind.ELEMENT, element) if level.visible else None
        if vr in ("SQ", "UN") or encoding.implicit:
            return self._begin(level, Element(tag, "SQ", offset, UNDEFINED, encoding), None)
        raise CannotUnderstand("undefined length where none is allowed (PS3.5 7.1.1)")

    def _begin(self, level: _Level, element: Element, end: int | None) -> Event | None:
        visible = level.visible and self._descend(element.tag)
        if not visible and end is not None:
            self._at = end
            return None
        self._at = element.offset
        self._push(_Level(True, end, element.encoding, visible))
        return (Kind.SEQUENCE_BEGIN, element) if visible else None

    def _step_over(self, element: Element) -> None:
        self._encapsulated = None
        self._at = element.offset
        for offset, length in fragments(self._window, element, self._limits):
            self._at = offset + length
        self._at += 8  # the sequence delimiter


def fragments(window: Window, element: Element, limits: WalkLimits) -> Iterator[tuple[int, int]]:
    """(offset, length) of each item of an encapsulated value, the Basic Offset Table first (PS3.5 A.4)."""
    big = element.encoding.big_endian
    at = element.offset
    for _ in range(limits.elements_max):
        head = window.at(at, 8)
        if len(head) < 8:
            raise CannotUnderstand("the data set ends inside encapsulated pixel data")
        group, number = _TAG[big].unpack_from(head)
        length: int = _LENGTH[big].unpack_from(head, 4)[0]
        tag = group << 16 | number
        if tag == SEQUENCE_END:
            return
        if tag != ITEM or length == UNDEFINED:
            raise CannotUnderstand("encapsulated pixel data hold something that is not a fragment")
        yield at + 8, length
        at += 8 + length
    raise TooLarge(f"more than {limits.elements_max} fragments")
