"""What people corrected, applied to a data set while it is read: the few elements concerned are written anew,
and the values that were there go into the Original Attributes Sequence (PS3.3 C.12.1.1.9). Everything else,
pixel data above all, passes through untouched and is never held: what is known of the data set is where its
top-level elements stand, up to (0400,0561).

A value is written in the data set's own character set. Where that has no code for it, the set is extended by
one more (PS3.5 6.1.2.5.3), which leaves every text that is there as it was; a data set of ASCII alone becomes
one of UTF-8 where no set of one byte has the value. What can't be written so is refused. Readers get it by
`corrected.py`; no digest is of what this gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from struct import Struct

from archive.corrections import CORRECTABLE
from archive.dataset.charsets import STAND_ALONE, UTF_8, terms_of
from archive.dataset.encoding import (
    EXPLICIT_LITTLE,
    IMPLICIT,
    ITEM,
    ITEM_END,
    LONG_VRS,
    SEQUENCE_END,
    SHORT_VRS,
    UNDEFINED,
    Encoding,
    encoding_of,
    is_no_vr,
)
from archive.dataset.sources import Source, Window
from archive.dataset.textencoding import TextEncoder, encoder
from archive.errors import CannotUnderstand, TooLarge
from archive.model import Overlay

CHARACTER_SET = 0x00080005
ORIGINAL_ATTRIBUTES = 0x04000561
MODIFIED_ATTRIBUTES = 0x04000550
MODIFICATION_TIME = 0x04000562
MODIFYING_SYSTEM = 0x04000563
PREVIOUS_SOURCE = 0x04000564
MODIFICATION_REASON = 0x04000565

ELEMENTS_MAX = 1_000_000
NESTING_MAX = 100
REPLACED_BYTES_MAX = 1 << 20   # of the values that are put aside
SYSTEM = "MISS"
_SYSTEM_CHARS_MAX = 64
_IN_CHARACTER_SET = frozenset({"LO", "LT", "PN", "SH"})
# What a set is extended by, the first that has every character: those of one byte, then those of two.
_FURTHER = tuple(f"ISO 2022 IR {number}" for number in
                 (100, 101, 109, 110, 203, 148, 144, 126, 127, 138, 166, 13))  # fmt: skip
_FURTHER_OF_TWO = tuple(f"ISO 2022 IR {number}" for number in (87, 159, 149, 58))

_TAG = {False: Struct("<HH"), True: Struct(">HH")}
_LONG = {False: Struct("<I"), True: Struct(">I")}
_SHORT = {False: Struct("<H"), True: Struct(">H")}


@dataclass(frozen=True, slots=True)
class Edit:
    """The bytes from `start` to `stop` of a data set are `octets` instead."""

    start: int
    stop: int
    octets: bytes


@dataclass(frozen=True, slots=True)
class _Standing:
    """An element at the top of a data set, from the first byte of its tag to the last of its value."""

    tag: int
    vr: bytes
    length: int
    start: int
    value: int
    stop: int


def edits_of(source: Source, transfer_syntax_uid: str, overlay: Overlay) -> list[Edit]:
    """What `overlay` changes of a data set that is not deflated, in the order of its bytes; nothing where it
    says what the data set says. Raises CannotUnderstand where the data set can't be read so far, or can't
    hold a value."""
    window = Window(source)
    encoding = encoding_of(transfer_syntax_uid, window.at(0, 8))
    values = {CORRECTABLE[keyword].tags[0]: (CORRECTABLE[keyword].vr, value)
              for keyword, value in overlay.values if keyword in CORRECTABLE}  # fmt: skip
    wanted = {*values, CHARACTER_SET, ORIGINAL_ATTRIBUTES}
    found: dict[int, _Standing] = {}
    places: dict[int, int] = {}  # where an element that is not there belongs
    missing = sorted(wanted)
    end = 0
    for one in _elements(window, encoding):
        while missing and missing[0] < one.tag:
            places[missing.pop(0)] = one.start
        if one.tag > ORIGINAL_ATTRIBUTES:
            break
        if one.tag in wanted:
            found.setdefault(one.tag, one)
            if missing and missing[0] == one.tag:
                missing.pop(0)
        end = one.stop
    places.update(dict.fromkeys(missing, end))
    return _edits(window, encoding, values, found, places, overlay)


def _edits(
    window: Window, encoding: Encoding, values: dict[int, tuple[str, str]], found: dict[int, _Standing],
    places: dict[int, int], overlay: Overlay,
) -> list[Edit]:  # fmt: skip
    character_set = found.get(CHARACTER_SET)
    raw_set = b"" if character_set is None else _value(window, character_set)
    texts = [text for vr, text in values.values() if vr in _IN_CHARACTER_SET]
    encode = _encoder_for(raw_set, texts)
    edits, before = [], []
    for tag, (vr, text) in sorted(values.items()):
        octets = _octets(vr, text, encode)
        standing = found.get(tag)
        if standing is not None:
            was = _value(window, standing)
            if was.rstrip(b" \0") == octets.rstrip(b" \0"):
                continue
            before.append(window.at(standing.start, standing.stop - standing.start))
        elif not octets:
            continue
        else:
            before.append(_element(tag, vr, b"", encoding))
        place = places.get(tag, 0)
        start, stop = (place, place) if standing is None else (standing.start, standing.stop)
        edits.append(Edit(start, stop, _element(tag, vr, octets, encoding)))
    if not edits:
        return []
    if sum(map(len, before)) > REPLACED_BYTES_MAX:
        raise TooLarge(f"the values that were corrected take more than {REPLACED_BYTES_MAX} bytes")
    if encode.term != encoder(raw_set).term:
        octets = _element(CHARACTER_SET, "CS", padded(encode.term.encode("ascii"), b" "), encoding)
        if character_set is None:
            edits.append(Edit(places[CHARACTER_SET], places[CHARACTER_SET], octets))
        else:
            edits.append(Edit(character_set.start, character_set.stop, octets))
            before.insert(0, window.at(character_set.start, character_set.stop - character_set.start))
    item = _original(b"".join(before), overlay, encode, encoding)
    standing = found.get(ORIGINAL_ATTRIBUTES)
    if standing is None:
        place = places[ORIGINAL_ATTRIBUTES]
        edits.append(Edit(place, place, _element(ORIGINAL_ATTRIBUTES, "SQ", item, encoding)))
    else:
        edits += _appended(standing, item, encoding)
    # Of several that go to one place, the one with the lowest tag comes first: the sort keeps their order.
    return sorted(edits, key=lambda edit: (edit.start, edit.stop, _tag_of(edit, encoding)))


def _tag_of(edit: Edit, encoding: Encoding) -> int:
    group, number = _TAG[encoding.big_endian].unpack_from(edit.octets) if len(edit.octets) >= 4 else (0, 0)
    return int(group) << 16 | int(number)


def _appended(standing: _Standing, item: bytes, encoding: Encoding) -> list[Edit]:
    """One more item in the sequence that is there."""
    if standing.length == UNDEFINED:
        at = standing.stop - 8
        return [Edit(at, at, item)]
    length = _LONG[encoding.big_endian].pack(standing.length + len(item))
    return [Edit(standing.value - 4, standing.value, length), Edit(standing.stop, standing.stop, item)]


def _original(before: bytes, overlay: Overlay, encode: TextEncoder, encoding: Encoding) -> bytes:
    """The item that says what the values were, when, where and why they were changed (C.12.1.1.9)."""
    at = datetime.fromtimestamp(overlay.at_us / 1e6, UTC).strftime("%Y%m%d%H%M%S.%f+0000").encode()
    system = f"{SYSTEM} {overlay.ward or 'region'}"[:_SYSTEM_CHARS_MAX].encode("ascii", "replace")
    return _item(b"".join((
        _element(MODIFIED_ATTRIBUTES, "SQ", _item(before, encoding), encoding),
        _element(MODIFICATION_TIME, "DT", padded(at, b" "), encoding),
        _element(MODIFYING_SYSTEM, "LO", padded(system, b" "), encoding),
        _element(PREVIOUS_SOURCE, "LO", b"", encoding),
        _element(MODIFICATION_REASON, "CS", padded(b"CORRECT", b" "), encoding),
    )), encoding)  # fmt: skip


def _element(tag: int, vr: str, value: bytes, encoding: Encoding) -> bytes:
    big = encoding.big_endian
    head = _TAG[big].pack(tag >> 16, tag & 0xFFFF)
    code = vr.encode("ascii")
    if encoding.implicit:
        return head + _LONG[big].pack(len(value)) + value
    if code in LONG_VRS:
        return head + code + b"\0\0" + _LONG[big].pack(len(value)) + value
    if len(value) > 0xFFFE:
        raise CannotUnderstand("a corrected value is too long for its element")
    return head + code + _SHORT[big].pack(len(value)) + value


def _item(content: bytes, encoding: Encoding) -> bytes:
    big = encoding.big_endian
    return _TAG[big].pack(ITEM >> 16, ITEM & 0xFFFF) + _LONG[big].pack(len(content)) + content


def padded(octets: bytes, by: bytes) -> bytes:
    return octets + by * (len(octets) % 2)


def _octets(vr: str, text: str, encode: TextEncoder) -> bytes:
    octets = encode(text) if vr in _IN_CHARACTER_SET else text.encode("ascii", "replace")
    assert octets is not None  # it was chosen so
    return padded(octets, b" ")


@lru_cache(maxsize=1024)
def _encoder_of(raw_set: bytes, texts: tuple[str, ...]) -> TextEncoder | None:
    def holds(candidate: TextEncoder) -> bool:
        return all(candidate(text) is not None for text in texts)

    own = encoder(raw_set)
    if holds(own):
        return own
    terms = terms_of(raw_set)
    if terms[0] in STAND_ALONE:
        return None
    first = re.sub(r"^ISO_IR (\d+)$", r"ISO 2022 IR \1", terms[0])
    first = "" if first == "ISO 2022 IR 6" else first
    kept = [first, *terms[1:]]
    for further in (*_FURTHER, *(() if kept == [""] else _FURTHER_OF_TWO)):
        if further not in kept:
            candidate = encoder("\\".join([*kept, further]).encode("ascii", "replace"))
            if holds(candidate):
                return candidate
    return encoder(UTF_8.encode()) if kept == [""] else None


def _encoder_for(raw_set: bytes, texts: Sequence[str]) -> TextEncoder:
    chosen = _encoder_of(raw_set, tuple(texts))
    if chosen is None:
        raise CannotUnderstand("its character set has no code for what was corrected")
    return chosen


def _value(window: Window, one: _Standing) -> bytes:
    if one.length == UNDEFINED or one.length > REPLACED_BYTES_MAX:
        raise CannotUnderstand("an element that was corrected holds no plain value")
    return window.at(one.value, one.length)


# The walk over the top of a data set. `elements.py` walks into sequences; here they are stepped over.


def _elements(window: Window, encoding: Encoding) -> Iterator[_Standing]:
    at = 0
    for _ in range(ELEMENTS_MAX):
        head = window.at(at, 12)
        if len(head) < 8:
            return
        tag, vr, length, size = _head(head, encoding)
        if tag == 0:
            return  # zeros after the last element, as some writers pad
        value = at + size
        if tag >> 16 == 0xFFFE:  # an item whose sequence has no head is met in the field
            if tag != ITEM or length == UNDEFINED:
                raise CannotUnderstand("a delimiter where none belongs")
            at = value + length
            continue
        if length == UNDEFINED:
            stop = _end_of_undefined(window, value, IMPLICIT if vr in (b"UN", b"") else encoding)
        else:
            stop = value + length
        yield _Standing(tag, vr, length, at, value, stop)
        at = stop
    raise TooLarge(f"more than {ELEMENTS_MAX} elements")


def _head(head: bytes, encoding: Encoding) -> tuple[int, bytes, int, int]:
    """Tag, VR (empty when it is not there), length, and the size of the element's head."""
    big = encoding.big_endian
    group, number = _TAG[big].unpack_from(head)
    tag = group << 16 | number
    if encoding.implicit or group == 0xFFFE:
        return tag, b"", _LONG[big].unpack_from(head, 4)[0], 8
    vr = head[4:6]
    if vr in LONG_VRS:
        if len(head) < 12:
            raise CannotUnderstand("the data set ends inside an element")
        return tag, vr, _LONG[big].unpack_from(head, 8)[0], 12
    if vr in SHORT_VRS or not is_no_vr(vr):
        return tag, vr, _SHORT[big].unpack_from(head, 6)[0], 8
    return tag, b"", _LONG[big].unpack_from(head, 4)[0], 8


def _end_of_undefined(window: Window, at: int, encoding: Encoding) -> int:
    """Where a sequence of undefined length ends, whatever is in it."""
    levels: list[tuple[bool, Encoding]] = [(True, encoding)]  # whether it is a sequence, how it is written
    for _ in range(ELEMENTS_MAX):
        in_sequence, within = levels[-1]
        head = window.at(at, 12)
        if len(head) < 8:
            raise CannotUnderstand("the data set ends inside a sequence")
        tag, vr, length, size = _head(head, within)
        at += size
        if tag in (SEQUENCE_END, ITEM_END):
            if (tag == SEQUENCE_END) != in_sequence:
                raise CannotUnderstand("a delimiter where none belongs")
            levels.pop()
            if not levels:
                return at
        elif in_sequence and tag != ITEM:
            raise CannotUnderstand("a sequence holds something that is no item")
        elif length == UNDEFINED:
            if len(levels) > 2 * NESTING_MAX:
                raise CannotUnderstand(f"sequences nest deeper than {NESTING_MAX}")
            if in_sequence:
                levels.append((False, _of_item(window.at(at, 8), within)))
            else:
                levels.append((True, IMPLICIT if vr in (b"UN", b"") else within))
        else:
            at += length
    raise TooLarge(f"more than {ELEMENTS_MAX} elements in a sequence")


def _of_item(start: bytes, encoding: Encoding) -> Encoding:
    """Some writers switch between implicit and explicit VR inside a sequence: the first element shows it."""
    if encoding.big_endian or start.startswith(b"\xfe\xff"):
        return encoding
    return encoding_of(EXPLICIT_LITTLE, start)
