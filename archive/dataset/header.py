"""The header scanner: reads from an encoded data set (without group 2) what the index keeps of it, and stops.

It runs for every instance that arrives, so the usual data set takes one loop over `struct` and one dictionary
look-up for each element. Nothing in a data set makes it recurse; time and memory have stated bounds. It is
lenient on values (a bad date is text) and strict on identity: without valid UIDs of study, series and
instance there is no instance. `archive/dataset/elements.py` reads the same encodings, more slowly and from
files.

There is no second opinion: of 4,000 mutated real data sets pydicom read none that is refused here but such as
are cut or broken, which it takes for whole; and two readers might differ on who an instance is.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from mmap import mmap
from struct import Struct

from archive.catalog import CATALOG, Indexed
from archive.dataset.charsets import DEFAULT_DECODER, decoder
from archive.dataset.encoding import (
    DEFLATED_SYNTAXES,
    EXPLICIT_LITTLE,
    FLOAT_PIXEL_DATA,
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
from archive.dataset.values import VALUE_BYTES_MAX, RawValue, text_of
from archive.errors import CannotUnderstand, DatasetMismatch, TooLarge
from archive.model import Attributes, Level, is_uid

Buffer = bytes | bytearray | memoryview | mmap


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """How much of a data set the scanner will look at.

    The bounds are past what real objects hold: references to 20,000 instances take 80,000 elements, reports
    nest about 20 deep.
    """

    nesting_max: int = 100
    elements_max: int = 250_000
    items_max: int = 64  # of an indexed sequence
    inflated_bytes_max: int = 4 << 20  # of a deflated data set
    tail_elements_max: int = 2_000  # looked at behind the last wanted one, to see that the structure holds


DEFAULT_LIMITS = HeaderLimits()


class _Truncated(CannotUnderstand):
    """The data set, or the part of it that was inflated so far, ends before it should."""


def scan(dataset: Buffer, transfer_syntax_uid: str, *, limits: HeaderLimits = DEFAULT_LIMITS) -> Attributes:
    """What the index keeps of `dataset`.

    Raises CannotUnderstand when it can't be read, DatasetMismatch when its identity is missing or is no
    UID, and TooLarge past `limits`.
    """
    if not is_uid(transfer_syntax_uid):
        raise CannotUnderstand("the transfer syntax is not a UID")
    if type(dataset) is bytes and transfer_syntax_uid not in DEFLATED_SYNTAXES:
        return _scan(dataset, transfer_syntax_uid, limits)  # slices of bytes are cheaper than of views
    with memoryview(dataset) as view:
        if transfer_syntax_uid in DEFLATED_SYNTAXES:
            return _scan_deflated(view, limits)
        return _scan(view, transfer_syntax_uid, limits)


def _scan(
    view: memoryview | bytes, transfer_syntax_uid: str, limits: HeaderLimits, *, whole: bool = True
) -> Attributes:
    encoding = encoding_of(transfer_syntax_uid, bytes(view[:8]))
    scanner = _Scanner(view, encoding, limits)
    tail = scanner.run(_LAST_WANTED)
    if not scanner.has_identity():
        # Elements out of order (against PS3.5 7.1) may hide it: look again, up to the pixel data.
        scanner = _Scanner(view, encoding, limits)
        tail = scanner.run(FLOAT_PIXEL_DATA - 1)
    if whole:
        scanner.check_tail(tail)
    return scanner.attributes()


def _scan_deflated(view: memoryview, limits: HeaderLimits) -> Attributes:
    """Inflates no more than is needed: a first part that nearly always suffices, then up to the bound."""
    for bytes_max in (_FIRST_INFLATED_BYTES, limits.inflated_bytes_max):
        inflated, whole = _inflate(view, bytes_max)
        try:
            with memoryview(inflated) as part:
                return _scan(part, EXPLICIT_LITTLE, limits, whole=whole)
        except (_Truncated, DatasetMismatch):
            if whole:
                raise
    raise TooLarge(f"no identity in the first {limits.inflated_bytes_max} bytes of the inflated data set")


_FIRST_INFLATED_BYTES = 64 << 10
_DEFLATED_CHUNK_BYTES = 64 << 10


def _inflate(view: memoryview, bytes_max: int) -> tuple[bytes, bool]:
    """The first `bytes_max` bytes, and whether that is all. Raw deflate is the rule (PS3.5 A.5), zlib
    tolerated."""
    for wbits in (-zlib.MAX_WBITS, zlib.MAX_WBITS):
        inflate = zlib.decompressobj(wbits)
        out = bytearray()
        try:
            for start in range(0, len(view), _DEFLATED_CHUNK_BYTES):
                out += inflate.decompress(view[start : start + _DEFLATED_CHUNK_BYTES], bytes_max - len(out))
                if len(out) >= bytes_max or inflate.eof:
                    break
        except zlib.error:
            if not out:
                continue
        return bytes(out), len(out) < bytes_max
    raise CannotUnderstand("the deflated data set does not inflate")


_SPECIFIC_CHARACTER_SET = 0x00080005


def _plan() -> dict[int, dict[int, Indexed] | None]:
    """Wanted tags; a sequence has the wanted tags of its items."""
    plan: dict[int, dict[int, Indexed] | None] = {_SPECIFIC_CHARACTER_SET: None}
    for entry in CATALOG:
        if len(entry.tags) == 1:
            plan[entry.tags[0]] = None
        elif len(entry.tags) == 2:
            children = plan.setdefault(entry.tags[0], {})
            assert children is not None
            children[entry.tags[1]] = entry
        else:
            raise AssertionError(f"{entry.keyword}: the scanner enters one sequence, not more")
    return plan


_PLAN = _plan()
_LAST_WANTED = max(_PLAN)
_IDENTITY = {
    entry.tags[0]: entry.keyword
    for entry in CATALOG
    if entry.keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
}
_UNAMBIGUOUS = {*_IDENTITY, 0x00100020, 0x00100021}

# What is wanted and no sequence, by its tag's four bytes read as one number.
_USUAL = {(tag & 0xFFFF) << 16 | tag >> 16: tag for tag, children in _PLAN.items() if children is None}
_USUAL_HEAD = Struct("<I2sH")
_EXPLICIT_HEAD = {False: Struct("<HH2sH"), True: Struct(">HH2sH")}
_TAG_AND_LENGTH = {False: Struct("<HHI"), True: Struct(">HHI")}
_LONG_LENGTH = {False: Struct("<I"), True: Struct(">I")}


class _Scanner:
    """One pass over one data set. `found` holds the raw values; an element in a sequence has one for each
    item."""

    def __init__(self, view: memoryview | bytes, encoding: Encoding, limits: HeaderLimits) -> None:
        self.found: dict[int, RawValue] = {}
        self.in_items: dict[str, list[RawValue | None]] = {}
        self._view = view
        self._size = len(view)
        self._encoding = encoding
        self._limits = limits
        self._elements = 0
        self._elements_max = limits.elements_max
        self._left = limits.elements_max
        self._decoder = DEFAULT_DECODER

    def has_identity(self) -> bool:
        return _IDENTITY.keys() <= self.found.keys()

    def run(self, last: int) -> int:
        """Reads the data set's own elements up to the tag `last`, in the order in which they stand; where it
        stopped."""
        view, size, found, plan = self._view, self._size, self.found, _PLAN
        implicit, big = self._encoding
        unpack, unpack_length = _EXPLICIT_HEAD[big].unpack_from, _LONG_LENGTH[big].unpack_from
        unpack_implicit = _TAG_AND_LENGTH[big].unpack_from
        at = 0
        self._left = self._limits.elements_max
        usual = not implicit and not big
        while True:
            if usual:
                at = self._run_usual(at, last >> 16)
            if at + 8 > size:
                return at
            self._count(1)
            vr = b""
            value = at + 8
            if implicit:
                group, number, length = unpack_implicit(view, at)
            else:
                group, number, vr, length = unpack(view, at)
                if vr in LONG_VRS:
                    value = at + 12
                    if value > size:
                        raise _Truncated("the data set ends inside an element")
                    length = unpack_length(view, at + 8)[0]
                elif vr not in SHORT_VRS and is_no_vr(vr):
                    vr, length = b"", unpack_length(view, at + 4)[0]
            tag = group << 16 | number
            if tag > last:
                if group == 0xFFFE:
                    at = self._step_over_stray(at, tag)
                    continue
                return at
            if tag in plan:
                children = plan[tag]
                if children is not None and (vr in (b"SQ", b"UN", b"")):
                    at = self._enter(value, length, vr, children)
                    continue
                if length != UNDEFINED:
                    end = value + length
                    if end > size:
                        raise _Truncated("the data set ends inside a value")
                    kept = bytes(view[value : min(end, value + VALUE_BYTES_MAX)])
                    self._keep(found, tag, (vr, big, kept, self._decoder))
                    at = end
                    continue
            if length == UNDEFINED:
                at = self._skip(value, vr)
            else:
                at = value + length
                if at > size:
                    raise _Truncated("the data set ends inside a value")

    def _run_usual(self, at: int, last_group: int) -> int:
        """Explicit VR little endian, 16-bit lengths, groups below the last: nearly all that there is, with as
        little as can be done for each. Stops before the first element that is anything else."""
        view, size, found, plan, decode = self._view, self._size, self.found, _USUAL, self._decoder
        unpack, short_vrs = _USUAL_HEAD.unpack_from, SHORT_VRS
        count, room = 0, size - 8
        while at <= room:
            word, vr, length = unpack(view, at)
            if vr not in short_vrs or word & 0xFFFF >= last_group:
                break
            end = at + 8 + length
            if end > size:
                raise _Truncated("the data set ends inside a value")
            if word in plan:
                tag = plan[word]
                if tag == _SPECIFIC_CHARACTER_SET:
                    break
                raw = (vr, False, bytes(view[at + 8 : end]), decode)
                if tag in found:
                    self._keep(found, tag, raw)
                else:
                    found[tag] = raw
            at = end
            count += 1
        self._count(count)
        return at

    def _count(self, elements: int) -> None:
        self._left -= elements
        if self._left < 0:
            raise TooLarge(f"more than {self._limits.elements_max} elements")

    def check_tail(self, at: int) -> None:
        """Steps over what follows the wanted elements, so that a broken data set is refused while its
        sender can still be told. Only pixel data may be cut short: such images are met and are kept as they
        came."""
        self._elements, self._elements_max = 0, self._limits.tail_elements_max
        tag, encoding = 1, self._encoding
        try:
            while at + 8 <= self._size:
                tag, vr, length, value = self._inner(at, encoding)
                if tag == 0:
                    break  # zeros behind the last element, as some writers pad
                if tag >> 16 == 0xFFFE:
                    at = self._step_over_stray(at, tag)
                elif length == UNDEFINED:
                    at = self._skip(value, vr)
                else:
                    at = value + length
                    if at > self._size:
                        raise _Truncated("the data set ends inside a value")
            if tag and at < self._size:
                raise _Truncated("the data set ends inside an element")
        except TooLarge:
            return
        except _Truncated:
            if tag >> 16 != 0x7FE0:
                raise

    def _step_over_stray(self, at: int, tag: int) -> int:
        """An item whose sequence has no head is met in the field; DCMTK refuses it, pydicom steps over it."""
        length = _LONG_LENGTH[self._encoding.big_endian].unpack_from(self._view, at + 4)[0]
        if tag == ITEM_END or length > self._size - at - 8:
            raise CannotUnderstand("a delimiter where none belongs")
        return at + 8 + int(length)

    def _keep(self, found: dict[int, RawValue], tag: int, raw: RawValue) -> None:
        if tag == _SPECIFIC_CHARACTER_SET:
            self._decoder = decoder(raw[2][:256])
        elif tag in found:
            # PS3.5 7.1: an element occurs at most once. Readers differ on which of two they take.
            if tag in _UNAMBIGUOUS and found[tag][2] != raw[2]:
                raise CannotUnderstand("an identifier occurs twice with different values")
        else:
            found[tag] = raw

    def _inner(self, at: int, encoding: Encoding) -> tuple[int, bytes, int, int]:
        """(tag, VR, length, where the value begins) of an element inside a sequence."""
        self._elements += 1
        if self._elements > self._elements_max:
            raise TooLarge(f"more than {self._elements_max} elements in sequences")
        implicit, big = encoding
        if at + 8 > self._size:
            raise _Truncated("the data set ends inside a sequence")
        group, number, length = _TAG_AND_LENGTH[big].unpack_from(self._view, at)
        tag = group << 16 | number
        if implicit or group == 0xFFFE:
            return tag, b"", length, at + 8
        vr = bytes(self._view[at + 4 : at + 6])
        if vr in LONG_VRS:
            if at + 12 > self._size:
                raise _Truncated("the data set ends inside a sequence")
            return tag, vr, _LONG_LENGTH[big].unpack_from(self._view, at + 8)[0], at + 12
        if vr in SHORT_VRS or not is_no_vr(vr):
            return tag, vr, _EXPLICIT_HEAD[big].unpack_from(self._view, at)[3], at + 8
        return tag, b"", length, at + 8

    def _item_encoding(self, at: int, encoding: Encoding) -> Encoding:
        """Some writers switch to implicit VR inside a sequence, or to explicit inside UN; the first element
        shows."""
        start = bytes(self._view[at : at + 8])
        if encoding.big_endian or start.startswith(b"\xfe\xff"):
            return encoding
        return encoding_of(EXPLICIT_LITTLE, start)

    def _skip(self, at: int, vr: bytes) -> int:
        """The place after a value of undefined length: a sequence of any depth, or encapsulated pixel data.

        What has a defined length is jumped over, so only undefined ones nest here.
        """
        if vr not in _UNDEFINED_VRS:
            raise CannotUnderstand("undefined length where none is allowed (PS3.5 7.1.1)")
        encoding = IMPLICIT if vr in (b"UN", b"") else self._encoding
        open_encodings = [encoding]  # sequences at even depth, items at odd
        while open_encodings:
            encoding = open_encodings[-1]
            tag, inner_vr, length, value = self._inner(at, encoding)
            in_sequence = len(open_encodings) % 2 == 1
            at = value
            if in_sequence:
                if tag == SEQUENCE_END:
                    open_encodings.pop()
                elif tag != ITEM:
                    raise CannotUnderstand("a sequence holds something that is not an item")
                elif length == UNDEFINED:
                    open_encodings.append(self._item_encoding(at, encoding))
                else:
                    at += length
            elif tag == ITEM_END:
                open_encodings.pop()
            elif tag >> 16 == 0xFFFE:
                raise CannotUnderstand("a delimiter where none belongs")
            elif length == UNDEFINED:
                if inner_vr not in _UNDEFINED_VRS:
                    raise CannotUnderstand("undefined length where none is allowed (PS3.5 7.1.1)")
                open_encodings.append(IMPLICIT if inner_vr == b"UN" else encoding)
                if len(open_encodings) > 2 * self._limits.nesting_max:
                    raise CannotUnderstand(f"sequences nest deeper than {self._limits.nesting_max}")
            else:
                at += length
            if at > self._size:
                raise _Truncated("the data set ends inside a sequence")
        return at

    def _enter(self, at: int, length: int, vr: bytes, children: dict[int, Indexed]) -> int:
        """Reads the wanted elements of a sequence's items; the place after the sequence."""
        encoding = IMPLICIT if vr == b"UN" else self._encoding
        end = None if length == UNDEFINED else at + length
        if end is not None and end > self._size:
            raise _Truncated("the data set ends inside a sequence")
        while end is None or at < end:
            tag, _, item_length, at = self._inner(at, encoding)
            if tag == SEQUENCE_END and end is None:
                return at
            if tag != ITEM and end is not None:
                return end  # met in the field: a value of another VR under the tag of a sequence
            if tag != ITEM:
                raise CannotUnderstand("a sequence holds something that is not an item")
            item_end = None if item_length == UNDEFINED else at + item_length
            if item_end is not None and item_end > (self._size if end is None else end):
                raise CannotUnderstand("an item reaches beyond its sequence")
            at = self._enter_item(at, item_end, self._item_encoding(at, encoding), children)
        return at

    def _enter_item(self, at: int, end: int | None, encoding: Encoding, children: dict[int, Indexed]) -> int:
        item: dict[int, RawValue] = {}
        text = self._decoder
        outer = self._encoding
        while end is None or at < end:
            tag, vr, length, value = self._inner(at, encoding)
            if tag == ITEM_END and end is None:
                at = value
                break
            if tag >> 16 == 0xFFFE:
                raise CannotUnderstand("a delimiter where none belongs")
            if length == UNDEFINED:
                self._encoding = encoding
                at = self._skip(value, vr)
                self._encoding = outer
                continue
            at = value + length
            if at > (self._size if end is None else end):
                raise CannotUnderstand("an element reaches beyond its item")
            if tag == _SPECIFIC_CHARACTER_SET:
                text = decoder(bytes(self._view[value : min(at, value + 256)]))
            elif tag in children and tag not in item:
                kept = bytes(self._view[value : min(at, value + VALUE_BYTES_MAX)])
                item[tag] = (vr, encoding.big_endian, kept, text)
        for tag, entry in children.items():
            values = self.in_items.setdefault(entry.keyword, [])
            if len(values) < self._limits.items_max:
                values.append(item.get(tag))
        return at

    def attributes(self) -> Attributes:
        """The index's view of what was found."""
        raw = self.found.get
        patient = _shared(_PATIENT, tuple(map(raw, _PATIENT.tags)))
        study = _shared(_STUDY, tuple(map(raw, _STUDY.tags)))
        series = _shared(_SERIES, tuple(map(raw, _SERIES.tags)))
        instance = _fields(_INSTANCE, tuple(map(raw, _INSTANCE.tags)))
        if self.in_items:
            patient, study, series = dict(patient), dict(study), dict(series)
        by_level = (patient, study, series, instance)
        for keyword, values in self.in_items.items():
            level, vr = _IN_ITEMS[keyword]
            joined = "\\".join("" if raw is None else text_of(raw, vr) for raw in values)
            if joined.strip("\\"):
                by_level[level][keyword] = joined
        _require_uid(study, "StudyInstanceUID")
        _require_uid(series, "SeriesInstanceUID")
        _require_uid(instance, "SOPInstanceUID")
        _require_uid(instance, "SOPClassUID")
        return Attributes(patient, study, series, instance)


# An element of undefined length is a sequence or encapsulated (PS3.5 7.1.1); b"" is implicit VR.
_UNDEFINED_VRS = frozenset({b"SQ", b"UN", b"OB", b"OW", b""})

_LEVELS = [Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE]


class _Part:
    """What the index keeps of one level, but for what stands in sequences."""

    def __init__(self, level: Level) -> None:
        wanted = [entry for entry in CATALOG if entry.level is level and len(entry.tags) == 1]
        self.tags = [entry.tags[0] for entry in wanted]
        self.words = [(entry.keyword, entry.vr) for entry in wanted]


_PATIENT, _STUDY, _SERIES, _INSTANCE = (_Part(level) for level in _LEVELS)


def _fields(part: _Part, values: tuple[RawValue | None, ...]) -> dict[str, str]:
    """The fields of a level from their raw values, empty ones left out."""
    fields = {}
    for (keyword, vr), raw in zip(part.words, values, strict=True):
        if raw is None:
            continue
        text = _text_of(raw, vr) if len(raw[2]) <= _REMEMBERED_BYTES_MAX else text_of(raw, vr)
        if text:
            fields[keyword] = text
    return fields


_REMEMBERED_BYTES_MAX = 16
_text_of = lru_cache(maxsize=4096)(text_of)  # rows, columns, bits, numbers: the same ones again and again


# The instances of a series come one after the other, and share all but the lowest level.
_SHARED_MAX = 256
_SHARED_BYTES_MAX = 4096
_seen: dict[_Part, dict[tuple[RawValue | None, ...], dict[str, str]]] = {
    part: {} for part in (_PATIENT, _STUDY, _SERIES)
}


def _shared(part: _Part, values: tuple[RawValue | None, ...]) -> dict[str, str]:
    """Like `_fields`, and the same object for the same values while they are recent; not to be changed."""
    seen = _seen[part]
    fields = seen.get(values)
    if fields is None:
        fields = _fields(part, values)
        if sum(len(raw[2]) for raw in values if raw is not None) <= _SHARED_BYTES_MAX:
            if len(seen) >= _SHARED_MAX:
                seen.clear()
            seen[values] = fields
    return fields
_IN_ITEMS = {
    entry.keyword: (_LEVELS.index(entry.level), entry.vr) for entry in CATALOG if len(entry.tags) == 2
}


def _require_uid(fields: dict[str, str], keyword: str) -> None:
    value = fields.get(keyword)
    if value is None:
        raise DatasetMismatch(f"the data set has no {keyword}")
    if not is_uid(value):
        raise DatasetMismatch(f"the data set's {keyword} is not a UID (PS3.5 9.1)")
