"""Pairs that are easily taken for one content in two encodings and are not: each differs in something that a
reader may see."""

from __future__ import annotations

import struct
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO

import numpy
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from archive.conflicts.comparison import Comparison, compare
from tests.archive.test_comparison import as_syntax, compressed, rich, rle, with_pixels
from tests.datasets import EXPLICIT, RLE, Instance, instance_of

CHUNK = 1 << 20
ENCAPSULATED_UNCOMPRESSED, JPEG_LOSSLESS = "1.2.840.10008.1.2.1.98", "1.2.840.10008.1.2.4.70"


def compared(first: Instance, second: Instance) -> Comparison:
    """Which of them is the first makes no difference."""
    one, other = (compare(BytesIO(a.part10), BytesIO(b.part10))
                  for a, b in ((first, second), (second, first)))  # fmt: skip
    assert one.equal == other.equal
    return one


def raw(dataset: bytes, syntax: str = EXPLICIT) -> Instance:
    return Instance("1.2.840.10008.5.1.4.1.1.7", "1.2.3", syntax, "", "", dataset)


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr
    if vr in (b"OB", b"OW", b"OF", b"UT"):
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def image(pixels: bytes, columns: int = 10) -> bytes:
    numbers = ((0x00280010, 1), (0x00280011, columns), (0x00280100, 8), (0x00280101, 8))
    head = b"".join(element(tag, b"US", struct.pack("<H", number)) for tag, number in numbers)
    return head + element(0x7FE00010, b"OB", pixels)


def test_every_pixel_data_counts_not_the_last_alone() -> None:
    same = element(0x7FE00010, b"OW", bytes(8))
    first, second = (raw(element(0x7FE00008, b"OF", value * 8) + same) for value in (b"\1", b"\2"))
    assert not compared(first, second).equal
    twice = [raw(element(0x7FE00010, b"OW", value * 8) + same) for value in (b"\1", b"\2")]
    assert not compared(*twice).equal


def test_a_second_pixel_data_is_not_taken_for_the_first() -> None:
    def with_two(frame: bytes) -> Instance:
        packed = rle(with_pixels(rich(), frames=1))
        more = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + encapsulate([frame])
        return raw(packed.dataset + more + b"\xfe\xff\xdd\xe0\0\0\0\0", RLE)

    assert not compared(with_two(b"one."), with_two(b"two!")).equal


def test_what_stands_inside_a_long_text_is_no_padding() -> None:
    start = b"x" * (CHUNK - 4)
    spaces, nulls = (
        raw(element(0x0040A160, b"UT", start + fill * 4 + b"the end.")) for fill in (b" ", b"\0")
    )
    assert not compared(spaces, nulls).equal
    padded = raw(element(0x0040A160, b"UT", start + b" " * 4 + b"the end." + b" " * 100))
    assert compared(spaces, padded).equal, "padding at the end is none"
    short, long = (raw(element(0x0040A160, b"UT", start + fill)) for fill in (b"", b" " * 4))
    assert compared(short, long).equal


def test_a_group_length_is_a_length() -> None:
    rest = element(0x00080060, b"CS", b"CT")
    plain = raw(rest)
    assert compared(plain, raw(element(0x00080000, b"UL", bytes(4)) + rest)).equal
    assert not compared(plain, raw(element(0x00080000, b"LO", b"not a length") + rest)).equal


def test_the_last_pixel_is_no_padding() -> None:
    assert not compared(raw(image(b"123456789")), raw(image(b"123456789X"))).equal
    assert compared(raw(image(b"123456789")), raw(image(b"123456789\0"))).equal


def test_native_pixels_in_a_syntax_that_compresses_are_not_believed() -> None:
    packed = with_pixels(rich(), samples=3, bits=8, frames=1)
    planes = deepcopy(packed)
    planes.PlanarConfiguration = 1
    first, odd = as_syntax(packed, EXPLICIT), as_syntax(planes, EXPLICIT)
    second = Instance(odd.sop_class_uid, odd.sop_instance_uid, JPEG_LOSSLESS, "", "", odd.dataset)
    assert not compared(first, second).equal


def test_bits_above_the_stored_ones_count_where_the_stored_ones_are_high() -> None:
    dataset = with_pixels(rich(), frames=1)
    dataset.BitsStored, dataset.HighBit = 12, 15
    dataset.PixelData = numpy.full(120, 0xF800, "<u2").tobytes()
    native, high, low = as_syntax(dataset, EXPLICIT), flat(dataset, b"\xf8"), flat(dataset, b"\x08")
    assert compared(native, high).equal
    assert not compared(native, low).equal
    dataset.HighBit = 11
    low = flat(dataset, b"\x08")
    assert compared(as_syntax(dataset, EXPLICIT), low).equal, "they repeat the sign and say nothing"
    overlay = flat(dataset, b"\x18")
    assert not compared(low, overlay).equal, "an overlay may lie there (PS3.3 C.9.2, retired)"


def flat(dataset: Dataset, high: bytes) -> Instance:
    """120 samples of two octets, the lower of them zero, in runs of RLE (PS3.5 G)."""
    return compressed(dataset, RLE, [struct.pack("<16I", 2, 64, 66, *[0] * 13) + b"\x89" + high + b"\x89\0"])


def test_pixels_behind_the_last_frame_are_content() -> None:
    dataset = with_pixels(rich(), frames=2)
    longer = deepcopy(dataset)
    longer.PixelData += b"\1\2" * 120
    assert not compared(as_syntax(longer, EXPLICIT), rle(dataset)).equal


def with_table(frames: list[bytes], offsets: list[int], lengths: list[int] | None = None) -> Instance:
    dataset = with_pixels(rich(), frames=len(offsets))
    dataset.ExtendedOffsetTable = struct.pack(f"<{len(offsets)}Q", *offsets)
    dataset.ExtendedOffsetTableLengths = struct.pack(
        f"<{len(offsets)}Q", *(lengths or [len(frame) for frame in frames])
    )
    dataset.PixelData = encapsulate(frames, has_bot=False)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return instance_of(dataset, JPEG_LOSSLESS)


def test_an_offset_table_hides_no_fragment() -> None:
    first = with_table([b"frame one.", b"frame two."], [0, 0])
    assert not compared(first, with_table([b"frame one.", b"another 2."], [0, 0])).equal
    right = with_table([b"frame one.", b"frame two."], [0, 18])
    assert compared(right, with_table([b"frame one.", b"frame two."], [0, 18], [10, 10])).equal
    assert not compared(right, first).equal, "who follows the table sees the first frame twice"
    assert not compared(right, with_table([b"frame one.", b"frame two."], [0, 18], [10, 4])).equal


@pytest.mark.parametrize("syntax", [RLE, ENCAPSULATED_UNCOMPRESSED])
def test_zeros_at_the_end_of_a_frame_may_be_pixels(syntax: str) -> None:
    dataset = with_pixels(rich(), frames=1, bits=8)
    dataset.PixelData = b"\1" * 118 + bytes(2)
    frame = dataset.PixelData
    if syntax == RLE:  # one segment: literal runs of one octet
        frame = struct.pack("<16I", 1, 64, *[0] * 14) + b"".join(b"\0" + bytes([v]) for v in frame)
    whole = compressed(dataset, syntax, [frame])
    assert not compared(whole, compressed(dataset, syntax, [frame[:-4]])).equal
    assert compared(whole, whole).equal


def icon(syntax: str, make: Callable[[Dataset], Instance]) -> Instance:
    dataset = with_pixels(rich(), frames=1, bits=8)
    small = with_pixels(Dataset(), frames=1, bits=8)
    small.PixelData = encapsulate([b"of some encoding"])
    small["PixelData"].VR = "OB"
    small["PixelData"].is_undefined_length = True
    dataset.IconImageSequence = [small]
    found = make(dataset)
    return Instance(found.sop_class_uid, found.sop_instance_uid, syntax, "", "", found.dataset)


def test_an_icons_stream_is_of_its_transfer_syntax() -> None:
    frame = b"\1" * 120
    uncompressed = icon(ENCAPSULATED_UNCOMPRESSED, lambda d: _with(d, frame, ENCAPSULATED_UNCOMPRESSED))
    runs = icon(RLE, lambda d: _with(d, struct.pack("<16I", 1, 64, *[0] * 14) + b"\x89\1", RLE))
    assert not compared(uncompressed, runs).equal
    assert compared(runs, runs).equal


def _with(dataset: Dataset, frame: bytes, syntax: str) -> Instance:
    dataset.PixelData = b"\1" * 120
    return compressed(dataset, syntax, [frame])
