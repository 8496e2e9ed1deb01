"""Frames of an image as they are stored (PS3.5 8 and A.4): where each lies, and its bytes. It decodes
nothing; of native pixel data it makes the octets of Explicit VR Little Endian (PS3.18 8.7.3), of
encapsulated ones it leaves out the item tags. It reads what a frame needs and no more, so that one frame of
a large object costs one frame."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import BinaryIO

from archive.dataset.dicomjson import swapped
from archive.dataset.elements import Element, Kind, WalkLimits, fragments, walk
from archive.dataset.encoding import (
    DOUBLE_PIXEL_DATA,
    EXPLICIT_LITTLE,
    FLOAT_PIXEL_DATA,
    GE_IMPLICIT_LITTLE,
    PIXEL_DATA,
    UNDEFINED,
)
from archive.dataset.part10 import Payload
from archive.errors import CannotUnderstand, NotFound, TooLarge

FRAME_BYTES_MAX = 1 << 30  # of the frames of one call together
LIMITS = WalkLimits(inflated_bytes_max=1 << 30)

OCTETS = "application/octet-stream"

# PS3.18 Table 8.7.3-5, and the retired ones by their family.
_MEDIA_TYPES = {
    "1.2.840.10008.1.2.5": "image/dicom-rle",
    **dict.fromkeys(
        [f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, *range(52, 67), 70)],
        "image/jpeg",
    ),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{n}" for n in (80, 81)], "image/jls"),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{n}" for n in (90, 91)], "image/jp2"),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{n}" for n in (92, 93)], "image/jpx"),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{n}" for n in (110, 111, 112)], "image/jxl"),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203)], "image/jphc"),
}
_MPEG_2 = ("1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.101")
_VIDEO = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.(10[0-8])(\.1)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class FrameSet:
    """Frames in the order in which they were asked for, and what their bytes are."""

    transfer_syntax_uid: str
    media_type: str
    frames: list[bytes]


@dataclass(frozen=True, slots=True)
class Layout:
    """What an object says of its pixel data. A caller that reads many frames of one object may keep it."""

    transfer_syntax_uid: str
    element: Element
    rows: int
    columns: int
    samples: int
    bits: int
    number_of_frames: int
    subsampled: bool
    frame_offsets: tuple[int, ...] = ()  # Extended Offset Table (PS3.3 C.7.6.3.1.8)
    frame_lengths: tuple[int, ...] = ()

    @property
    def is_video(self) -> bool:
        return _VIDEO.fullmatch(self.transfer_syntax_uid) is not None

    @property
    def media_type(self) -> str:
        """PS3.18 Table 8.7.3-5."""
        if self.element.length != UNDEFINED:
            return OCTETS
        if self.is_video:
            return "video/mpeg" if self.transfer_syntax_uid.startswith(_MPEG_2) else "video/mp4"
        return _MEDIA_TYPES.get(self.transfer_syntax_uid, OCTETS)


def layout(payload: BinaryIO, *, limits: WalkLimits = LIMITS) -> Layout:
    """Where the pixel data of a Part 10 stream lie. Raises NotFound when it has none, CannotUnderstand."""
    return _layout(Payload(payload, limits), limits)


def read(
    payload: BinaryIO,
    frame_numbers: Sequence[int],
    *,
    limits: WalkLimits = LIMITS,
    known: Layout | None = None,
    bytes_max: int = FRAME_BYTES_MAX,
) -> FrameSet:
    """The frames with these numbers, from 1. A video is one stream and counts as frame 1.

    Raises NotFound for a frame that is not there, CannotUnderstand where the object contradicts itself,
    TooLarge.
    """
    opened = Payload(payload, limits)
    where = known or _layout(opened, limits)
    for number in frame_numbers:
        if not 1 <= number <= (1 if where.is_video else where.number_of_frames):
            raise NotFound("no such frame")
    if where.element.length != UNDEFINED:
        frames = _Native(opened, where).read(frame_numbers, bytes_max)
        return FrameSet(EXPLICIT_LITTLE, OCTETS, frames)
    frames = _Encapsulated(opened, where, limits).read(frame_numbers, bytes_max)
    if where.transfer_syntax_uid == _ENCAPSULATED_UNCOMPRESSED:
        return FrameSet(EXPLICIT_LITTLE, OCTETS, frames)
    return FrameSet(where.transfer_syntax_uid, where.media_type, frames)


# PS3.5 A.4.11: native frames that were too long for a defined length; their octets are those of explicit VR.
_ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"

_SAMPLES, _PHOTOMETRIC, _FRAMES = 0x00280002, 0x00280004, 0x00280008
_ROWS, _COLUMNS, _BITS = 0x00280010, 0x00280011, 0x00280100
_OFFSETS, _LENGTHS = 0x7FE00001, 0x7FE00002
_WANTED = frozenset({_SAMPLES, _PHOTOMETRIC, _FRAMES, _ROWS, _COLUMNS, _BITS})
_PIXELS = frozenset({PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA})


def _layout(opened: Payload, limits: WalkLimits) -> Layout:
    values: dict[int, int] = {}
    photometric = ""
    tables: dict[int, tuple[int, ...]] = {}
    for kind, element in walk(opened.window, opened.encoding, limits, lambda tag: False):
        if kind is not Kind.ELEMENT or element is None:
            continue
        tag = element.tag
        if tag in _PIXELS:
            return Layout(
                transfer_syntax_uid=opened.head.transfer_syntax_uid,
                element=element,
                rows=values.get(_ROWS, 0),
                columns=values.get(_COLUMNS, 0),
                samples=values.get(_SAMPLES, 1),
                bits=values.get(_BITS, 0),
                number_of_frames=max(1, values.get(_FRAMES, 1)),
                subsampled=photometric == "YBR_FULL_422",
                frame_offsets=tables.get(_OFFSETS, ()),
                frame_lengths=tables.get(_LENGTHS, ()),
            )
        if tag in (_OFFSETS, _LENGTHS):
            tables[tag] = _table(opened, element, limits)
        elif tag in _WANTED and tag not in values:
            value = opened.window.at(element.offset, min(element.length, 64))
            if tag == _PHOTOMETRIC:
                photometric = value.decode("ascii", "replace").strip(" \0")
            else:
                values[tag] = _number(value, element)
    raise NotFound("the object has no pixel data")


def _number(value: bytes, element: Element) -> int:
    if element.tag != _FRAMES and element.vr != "IS":
        if len(value) < 2:
            return 0
        return int.from_bytes(value[:2], "big" if element.encoding.big_endian else "little")
    try:
        return int(value.strip(b" \0") or b"1")
    except ValueError as error:
        raise CannotUnderstand("the Number of Frames is not a number") from error


def _table(opened: Payload, element: Element, limits: WalkLimits) -> tuple[int, ...]:
    count = element.length // 8
    if count > limits.elements_max:
        raise TooLarge(f"an offset table of more than {limits.elements_max} frames")
    data = opened.window.at(element.offset, count * 8)
    if len(data) < count * 8:
        raise CannotUnderstand("the data set ends inside an offset table")
    order = ">" if element.encoding.big_endian else "<"
    return Struct(f"{order}{count}Q").unpack(data)


def _read_exactly(opened: Payload, offset: int, length: int) -> bytes:
    data = opened.source.read(offset, length) if length else b""
    if len(data) < length:
        raise CannotUnderstand("the pixel data end before the frame does")
    return data


class _Native:
    """Pixel data as they are: frames of equal size, one after the other, without padding between (PS3.5
    8.1.1)."""

    def __init__(self, opened: Payload, where: Layout) -> None:
        self._opened = opened
        self._where = where
        bits = where.bits
        if where.element.tag == FLOAT_PIXEL_DATA:
            bits = 32
        elif where.element.tag == DOUBLE_PIXEL_DATA:
            bits = 64
        if bits not in (1, 8, 16, 32, 64) or not where.rows or not where.columns or not where.samples:
            raise CannotUnderstand("rows, columns, samples or bits of the pixels make no image")
        # PS3.3 C.7.6.3.1.2: YBR_FULL_422 halves both chrominances, three samples take the room of two.
        samples = 2 if where.subsampled and where.samples == 3 and bits == 8 else where.samples
        self._frame_bits = where.rows * where.columns * samples * bits
        self._word = 1
        if where.transfer_syntax_uid == GE_IMPLICIT_LITTLE:
            self._word = 2 if bits == 16 else 1
        elif where.element.encoding.big_endian:
            vr = where.element.vr
            self._word = {FLOAT_PIXEL_DATA: 4, DOUBLE_PIXEL_DATA: 8}.get(
                where.element.tag, 1 if vr == "OB" or bits == 1 and vr != "OW" else max(2, bits // 8)
            )

    def read(self, frame_numbers: Sequence[int], bytes_max: int) -> list[bytes]:
        if len(frame_numbers) * (self._frame_bits // 8) > bytes_max:
            raise TooLarge(f"frames of more than {bytes_max} bytes")
        return [self._frame(number) for number in frame_numbers]

    def _frame(self, number: int) -> bytes:
        first_bit = (number - 1) * self._frame_bits
        end_bit = first_bit + self._frame_bits
        first, end = first_bit // 8, (end_bit + 7) // 8
        # Words are swapped whole, so those that the frame shares with its neighbours are read too.
        start = first - first % self._word
        stop = end + -end % self._word
        if end > self._where.element.length:
            raise CannotUnderstand("the pixel data end before the frame does")
        stop = min(stop, self._where.element.length)
        data = _read_exactly(self._opened, self._where.element.offset + start, stop - start)
        if self._word > 1:
            data = swapped(data, self._word)
        data = data[first - start : end - start]
        if self._frame_bits % 8:
            return _bits(data, first_bit % 8, self._frame_bits)
        return data


def _bits(data: bytes, shift: int, count: int) -> bytes:
    """`count` bits from bit `shift` on, byte aligned: the first pixel is the lowest bit (PS3.5 8.1.1)."""
    value = int.from_bytes(data, "little") >> shift & ((1 << count) - 1)
    return value.to_bytes((count + 7) // 8, "little")


# (offset, length) of a fragment's bytes, counted from the data set's beginning.
_Fragment = tuple[int, int]


class _Encapsulated:
    """Frames in fragments (PS3.5 A.4). Which fragments make a frame is said by the Extended Offset Table,
    else by the Basic Offset Table, else by their number; what none of these settles, by how each fragment
    begins."""

    def __init__(self, opened: Payload, where: Layout, limits: WalkLimits) -> None:
        self._opened = opened
        self._where = where
        self._limits = limits

    def read(self, frame_numbers: Sequence[int], bytes_max: int) -> list[bytes]:
        by_frame = self._from_extended_table(frame_numbers)
        if by_frame is None:
            by_frame = self._from_fragments(frame_numbers)
        if sum(length for pieces in by_frame for _, length in pieces) > bytes_max:
            raise TooLarge(f"frames of more than {bytes_max} bytes")
        return [
            b"".join(_read_exactly(self._opened, offset, length) for offset, length in pieces)
            for pieces in by_frame
        ]

    def _from_extended_table(self, frame_numbers: Sequence[int]) -> list[list[_Fragment]] | None:
        """One fragment for each frame, found without a walk over the others."""
        offsets, lengths = self._where.frame_offsets, self._where.frame_lengths
        frames = self._where.number_of_frames
        if self._where.is_video or len(offsets) != frames or len(lengths) != frames:
            return None
        bot = self._opened.window.at(self._where.element.offset, 8)
        if len(bot) < 8 or not bot.startswith(_ITEM_HEAD):
            return None
        first = self._where.element.offset + 8 + _LENGTH.unpack_from(bot, 4)[0]
        found = []
        for number in frame_numbers:
            at = first + offsets[number - 1]
            head = self._opened.window.at(at, 8)
            if len(head) < 8 or not head.startswith(_ITEM_HEAD):
                return None  # a table that does not fit: the fragments themselves are asked
            length = lengths[number - 1]
            if length > _LENGTH.unpack_from(head, 4)[0]:
                return None
            found.append([(at + 8, length)])
        return found

    def _from_fragments(self, frame_numbers: Sequence[int]) -> list[list[_Fragment]]:
        items = list(fragments(self._opened.window, self._where.element, self._limits))
        if len(items) < 2:
            raise CannotUnderstand("encapsulated pixel data without fragments")
        table, pieces = items[0], items[1:]
        frames = self._where.number_of_frames
        if self._where.is_video or frames == 1:
            return [pieces for _ in frame_numbers]
        starts = self._starts_of_table(table, pieces, frames)
        if starts is None and len(pieces) == frames:
            starts = list(range(frames))
        if starts is None:
            starts = self._starts_of_codestreams(pieces, frames)
        ends = [*starts[1:], len(pieces)]
        return [pieces[starts[number - 1] : ends[number - 1]] for number in frame_numbers]

    def _starts_of_table(self, table: _Fragment, pieces: list[_Fragment], frames: int) -> list[int] | None:
        """For each frame its first fragment by the Basic Offset Table; None when that is empty or does not
        fit."""
        offset, length = table
        if length != 4 * frames or not pieces:
            return None
        data = self._opened.window.at(offset, length)
        if len(data) < length:
            return None
        origin = offset + length
        heads = [piece - 8 - origin for piece, _ in pieces]
        starts: list[int] = []
        for wanted in Struct(f"<{frames}I").unpack(data):
            index = bisect_left(heads, wanted)
            if index == len(heads) or heads[index] != wanted or (starts and index <= starts[-1]):
                return None
            starts.append(index)
        return starts if starts[0] == 0 else None

    def _starts_of_codestreams(self, pieces: list[_Fragment], frames: int) -> list[int]:
        if len(pieces) > frames:
            starts = [i for i, piece in enumerate(pieces) if self._begins_codestream(piece)]
            if len(starts) == frames and starts[0] == 0:
                return starts
        raise CannotUnderstand("nothing tells which fragments make which frame")

    def _begins_codestream(self, piece: _Fragment) -> bool:
        start = self._opened.source.read(piece[0], min(piece[1], 64))
        if self._where.transfer_syntax_uid == "1.2.840.10008.1.2.5":
            # PS3.5 G.5: 1 to 15 segments, the first right behind the head of 64 bytes.
            return len(start) == 64 and 1 <= start[0] <= 15 and start[1:8] == b"\0\0\0\x40\0\0\0"
        return start.startswith(_CODESTREAM_STARTS)


_ITEM_HEAD = b"\xfe\xff\x00\xe0"
_LENGTH = Struct("<I")
# SOI of JPEG and JPEG-LS with the marker that follows; SOC and SIZ of JPEG 2000 and HTJ2K; the JP2
# signature box; a JPEG XL codestream and its container.
_CODESTREAM_STARTS = (
    b"\xff\xd8\xff",
    b"\xff\x4f\xff\x51",
    b"\x00\x00\x00\x0cjP  ",
    b"\xff\x0a",
    b"\x00\x00\x00\x0cJXL ",
)
