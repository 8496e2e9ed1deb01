"""Frames: every way in which their places are told, judged by pydicom and by the bytes that went in."""

from __future__ import annotations

import contextlib
import struct
import time
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.uid import UID

from archive.dataset.elements import WalkLimits
from archive.dataset.frames import layout, read
from archive.errors import CannotUnderstand, MissError, NotFound, TooLarge
from tests.archive.corpora import REFUSED, hostile, needs_hostile, needs_public, storable
from tests.datasets import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    NATIVE,
    RLE,
    Instance,
    instance_of,
    make_dataset,
    make_instance,
    native_pixels,
    shipped_files,
)

JPEG = "1.2.840.10008.1.2.4.50"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
SOI = b"\xff\xd8\xff\xe0"
SOC = b"\xff\x4f\xff\x51"


def of(instance: Instance) -> BytesIO:
    return BytesIO(instance.part10)


def image(pixels: bytes, vr: str, bits: int, *, syntax: str = EXPLICIT, **elements: Any) -> BytesIO:
    """An image with exactly these bytes as pixel data."""
    values = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": 3, "Columns": 5}
    dataset = make_dataset(**{**values, "BitsAllocated": bits, **elements})
    dataset.add_new(0x7FE00010, vr, pixels)
    return of(instance_of(dataset, syntax))


def items(*fragments: bytes, table: bytes = b"") -> bytes:
    """Encapsulated pixel data as they stand behind the head of (7FE0,0010)."""
    out = b""
    for fragment in (table, *fragments):
        out += struct.pack("<HHI", 0xFFFE, 0xE000, len(fragment)) + fragment
    return out + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def encapsulated(value: bytes, frames: int, syntax: str = JPEG, **elements: Any) -> BytesIO:
    """An image with this encapsulated value, whatever it is."""
    dataset = make_dataset(
        SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", Rows=8, Columns=8, BitsAllocated=8,
        NumberOfFrames=frames, **elements,
    )  # fmt: skip
    instance = instance_of(dataset, syntax)
    head = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    return BytesIO(instance.part10 + head + value)


# ---------------------------------------------------------------- native


@pytest.mark.parametrize("transfer_syntax", NATIVE)
def test_native_frames_are_explicit_little_endian_octets(transfer_syntax: str) -> None:
    instance = make_instance(transfer_syntax=transfer_syntax, frames=4, rows=7, columns=9)
    expected = native_pixels(7, 9, 4, 1)
    size = 7 * 9 * 2
    found = read(of(instance), [3, 1, 4])
    assert found.transfer_syntax_uid == EXPLICIT
    assert found.media_type == "application/octet-stream"
    assert found.frames == [expected[(n - 1) * size : n * size] for n in (3, 1, 4)]


@pytest.mark.parametrize("number", [0, -1, 5, 2_000_000_000])
def test_a_frame_that_is_not_there_is_not_found(number: int) -> None:
    for instance in (make_instance(frames=4), make_instance(frames=4, transfer_syntax=RLE)):
        with pytest.raises(NotFound):
            read(of(instance), [1, number])


def test_an_object_without_pixel_data_has_no_frames() -> None:
    with pytest.raises(NotFound):
        read(of(make_instance(rows=0)), [1])


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("frames", [1, 2, 7, 16])
def test_one_bit_frames_are_byte_aligned(frames: int, syntax: str) -> None:
    pixels = np.random.default_rng(frames).integers(0, 2, (frames, 3 * 5), dtype=np.uint8)
    packed = np.packbits(pixels.ravel(), bitorder="little").tobytes()
    packed += b"\0" * (len(packed) % 2)
    vr = "OB"
    file = image(packed, vr, 1, syntax=syntax, NumberOfFrames=frames)
    found = read(file, list(range(1, frames + 1))).frames
    assert found == [np.packbits(frame, bitorder="little").tobytes() for frame in pixels]


def test_odd_frames_in_big_endian_words() -> None:
    # 3 x 5 pixels of 8 bits in OW: frames begin in the middle of words (PS3.5 8.1.1).
    pixels = bytes(range(45)) + b"\0"
    words = np.frombuffer(pixels, "<u2").astype(">u2").tobytes()
    file = image(words, "OW", 8, syntax=BIG_ENDIAN, NumberOfFrames=3)
    assert read(file, [1, 2, 3]).frames == [bytes(range(15)), bytes(range(15, 30)), bytes(range(30, 45))]


@pytest.mark.parametrize(("keyword", "code"), [("FloatPixelData", "f"), ("DoubleFloatPixelData", "d")])
@pytest.mark.parametrize("syntax", [EXPLICIT, BIG_ENDIAN])
def test_floating_point_frames(keyword: str, code: str, syntax: str) -> None:
    order = ">" if syntax == BIG_ENDIAN else "<"
    numbers = [n / 3 for n in range(30)]
    dataset = make_dataset(SamplesPerPixel=1, Rows=3, Columns=5, BitsAllocated=32, NumberOfFrames=2)
    setattr(dataset, keyword, struct.pack(f"{order}30{code}", *numbers))
    found = read(of(instance_of(dataset, syntax)), [2])
    assert found.frames == [struct.pack(f"<15{code}", *numbers[15:])]


def test_subsampled_colour_takes_two_thirds() -> None:
    pixels = bytes(range(48))
    file = image(
        pixels, "OB", 8, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL_422", Rows=3, Columns=4,
        NumberOfFrames=2,
    )  # fmt: skip
    assert read(file, [1, 2]).frames == [pixels[:24], pixels[24:]]


@pytest.mark.parametrize(
    ("bits", "number", "elements"),
    [
        (7, 1, {}), (16, 1, {"Rows": 0}), (16, 1, {"Columns": None}), (16, 1, {"SamplesPerPixel": 65535}),
        (16, 1, {"Rows": 16}), (16, 2, {"NumberOfFrames": 2}),
    ],
)  # fmt: skip
def test_an_image_that_contradicts_itself_is_not_understood(
    bits: int, number: int, elements: dict[str, Any]
) -> None:
    with pytest.raises(CannotUnderstand):
        read(image(bytes(30), "OW", bits, **elements), [number])


def test_a_number_of_frames_that_is_no_number_is_not_understood() -> None:
    part10 = make_instance(frames=11).part10.replace(b"\x28\0\x08\0IS\x02\x0011", b"\x28\0\x08\0IS\x02\x00xx")
    with pytest.raises(CannotUnderstand):
        read(BytesIO(part10), [1])


def test_frames_have_a_bound() -> None:
    with pytest.raises(TooLarge):
        read(of(make_instance(frames=4)), [1, 2, 3], bytes_max=1024)
    with pytest.raises(TooLarge):
        read(of(make_instance(frames=4, transfer_syntax=RLE)), [1, 2, 3], bytes_max=1024)
    with pytest.raises(TooLarge):
        read(image(bytes(256), "OW", 16, Rows=65535, Columns=65535), [1])


class Counting(BytesIO):
    """A file that counts what is read of it."""

    bytes_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.bytes_read += len(data)
        return data


@pytest.mark.parametrize("offset_table", ["basic", "extended", "none"])
@pytest.mark.parametrize("syntax", [EXPLICIT, RLE])
def test_one_frame_costs_one_frame(syntax: str, offset_table: str) -> None:
    instance = make_instance(
        rows=256, columns=256, frames=40, transfer_syntax=syntax, offset_table=offset_table, seed=1
    )
    file = Counting(instance.part10)
    found = read(file, [30])
    assert len(found.frames) == 1
    assert file.bytes_read < 3 * len(found.frames[0]) + 100_000


# ---------------------------------------------------------------- encapsulated


@pytest.mark.parametrize("offset_table", ["basic", "extended", "none"])
def test_rle_frames_by_every_table(offset_table: str) -> None:
    instance = make_instance(transfer_syntax=RLE, frames=5, offset_table=offset_table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = list(generate_frames(instance.read().PixelData, number_of_frames=5))
    found = read(of(instance), [5, 2])
    assert found.frames == [expected[4], expected[1]]
    assert (found.transfer_syntax_uid, found.media_type) == (RLE, "image/dicom-rle")


def test_the_extended_table_gives_exact_lengths() -> None:
    frames = [SOI + bytes(91 + 2 * n) for n in range(3)]  # odd: padded in their fragments
    padded = [frame + b"\0" for frame in frames]
    file = encapsulated(
        items(*padded),
        3,
        ExtendedOffsetTable=struct.pack("<3Q", 0, 8 + len(padded[0]), 16 + len(padded[0]) + len(padded[1])),
        ExtendedOffsetTableLengths=struct.pack("<3Q", *map(len, frames)),
    )
    assert read(file, [1, 2, 3]).frames == frames


def test_encapsulated_uncompressed_frames_are_octets() -> None:
    found = read(encapsulated(items(b"abcd", b"efgh"), 2, "1.2.840.10008.1.2.1.98"), [2])
    assert (found.frames, found.transfer_syntax_uid) == ([b"efgh"], EXPLICIT)


def test_one_frame_in_many_fragments() -> None:
    parts = [SOI + b"11", b"2222", SOI + b"33"]  # what looks like a start belongs to the only frame
    assert read(encapsulated(items(*parts), 1), [1]).frames == [b"".join(parts)]


@pytest.mark.parametrize(
    ("syntax", "start"),
    [
        (JPEG, SOI), ("1.2.840.10008.1.2.4.80", b"\xff\xd8\xff\xf7"), (JPEG_2000, SOC),
        ("1.2.840.10008.1.2.4.201", SOC), ("1.2.840.10008.1.2.4.110", b"\xff\x0a"),
        (RLE, struct.pack("<16I", 1, 64, *[0] * 14)),
    ],
)  # fmt: skip
def test_fragments_are_told_apart_by_their_codestreams(syntax: str, start: bytes) -> None:
    parts = [start + b"aa", b"bbbb", start + b"cc", start + b"dd", b"ee", b"ff"]
    found = read(encapsulated(items(*parts), 3, syntax), [1, 2, 3]).frames
    assert found == [parts[0] + parts[1], parts[2], b"".join(parts[3:])]


def test_the_basic_table_joins_fragments() -> None:
    parts = [b"a" * 10, b"b" * 6, b"c" * 4, b"d" * 8]
    table = struct.pack("<2I", 0, 10 + 8 + 6 + 8)
    found = read(encapsulated(items(*parts, table=table), 2), [1, 2]).frames
    assert found == [b"a" * 10 + b"b" * 6, b"c" * 4 + b"d" * 8]


@pytest.mark.parametrize(
    "offsets", [(0, 1), (0, 0), (18, 0), (0, 1 << 31), (8, 26), (0,), (0, 18, 36), (1 << 32) - 1]
)
def test_a_wrong_table_is_not_believed(offsets: Any) -> None:
    offsets = offsets if isinstance(offsets, tuple) else (offsets, offsets)
    table = struct.pack(f"<{len(offsets)}I", *offsets)
    parts = [SOI + b"aaaaaa", SOI + b"bbbbbb"]
    assert read(encapsulated(items(*parts, table=table), 2), [1, 2]).frames == parts


def test_a_wrong_extended_table_is_not_believed() -> None:
    parts = [SOI + b"aaaaaa", SOI + b"bbbbbb"]
    for offsets, lengths in (((0, 5), (10, 10)), ((0, 18), (10, 1 << 40)), ((0, 1 << 60), (10, 10))):
        file = encapsulated(
            items(*parts),
            2,
            ExtendedOffsetTable=struct.pack("<2Q", *offsets),
            ExtendedOffsetTableLengths=struct.pack("<2Q", *lengths),
        )
        assert read(file, [1, 2]).frames == parts


@pytest.mark.parametrize(
    "value",
    [
        items(), b"", items()[:-8], items(b"ab"), items(b"ab", b"cd", b"ef"),
        items(SOI + b"ab", b"xx")[:-12],
        struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFF0), struct.pack("<HHI", 0x0008, 0x0018, 4) + b"1.2\0",
    ],
)  # fmt: skip
def test_broken_fragments_are_not_understood(value: bytes) -> None:
    with pytest.raises(CannotUnderstand):
        read(encapsulated(value, 2), [1])


def test_a_video_is_one_stream() -> None:
    for syntax, media_type in (("102", "video/mp4"), ("107", "video/mp4"), ("100", "video/mpeg")):
        file = encapsulated(items(b"stream 1", b"stream 2"), 300, f"1.2.840.10008.1.2.4.{syntax}")
        found = read(file, [1])
        assert (found.frames, found.media_type) == ([b"stream 1stream 2"], media_type)
        with pytest.raises(NotFound):
            read(file, [2])


@pytest.mark.parametrize(
    ("syntax", "media_type"),
    [
        ("4.50", "image/jpeg"), ("4.51", "image/jpeg"), ("4.57", "image/jpeg"), ("4.70", "image/jpeg"),
        ("4.80", "image/jls"), ("4.81", "image/jls"), ("4.90", "image/jp2"), ("4.91", "image/jp2"),
        ("4.92", "image/jpx"), ("5", "image/dicom-rle"), ("4.201", "image/jphc"), ("4.203", "image/jphc"),
        ("8.1", "application/octet-stream"),
    ],
)  # fmt: skip
def test_media_types(syntax: str, media_type: str) -> None:
    found = read(encapsulated(items(b"abcd"), 1, f"1.2.840.10008.1.2.{syntax}"), [1])
    assert (found.media_type, found.transfer_syntax_uid) == (media_type, f"1.2.840.10008.1.2.{syntax}")


def test_a_known_layout_is_used_again() -> None:
    instance = make_instance(frames=3, transfer_syntax=RLE)
    known = layout(of(instance))
    assert (known.rows, known.columns, known.number_of_frames) == (16, 16, 3)
    assert read(of(instance), [2], known=known).frames == read(of(instance), [2]).frames


# ---------------------------------------------------------------- deflated


def test_a_deflated_bomb_costs_its_bound() -> None:
    instance = make_instance(transfer_syntax=DEFLATED, rows=0, Rows=65000, Columns=500, BitsAllocated=8)
    deflate = zlib.compressobj(wbits=-15)
    plain = zlib.decompress(instance.dataset, wbits=-15)
    bomb = deflate.compress(plain + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, 100 << 20))
    bomb += deflate.compress(bytes(100 << 20)) + deflate.flush()
    file = BytesIO(instance.part10[: -len(instance.dataset)] + bomb)
    assert read(file, [1]).frames == [bytes(65000 * 500)]
    with pytest.raises(TooLarge):
        read(file, [1], limits=WalkLimits(inflated_bytes_max=1 << 20))


# ---------------------------------------------------------------- real and hostile files


def assert_equal_to_pydicom(path: Path) -> bool:
    """Whether there was anything to compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dcmread(path)
        if "PixelData" not in dataset:
            return False
        with path.open("rb") as file:
            where = layout(file)
            count = where.number_of_frames
            found = read(file, list(range(1, count + 1)))
        if UID(where.transfer_syntax_uid).is_encapsulated:
            assert found.frames == list(generate_frames(dataset.PixelData, number_of_frames=count))
        else:
            expected = octets(dataset, big=where.element.encoding.big_endian, vr=where.element.vr)
            if where.bits == 1:
                bits = np.unpackbits(np.frombuffer(expected, np.uint8), bitorder="little")
                size = where.rows * where.columns
                frames = [bits[n * size : (n + 1) * size] for n in range(count)]
                assert found.frames == [np.packbits(frame, bitorder="little").tobytes() for frame in frames]
            else:
                assert b"".join(found.frames) == expected[: sum(map(len, found.frames))]
                assert len(expected) - sum(map(len, found.frames)) <= max(1, len(expected) // count - 1)
    return True


def octets(dataset: Dataset, *, big: bool, vr: str) -> bytes:
    pixels = bytes(dataset.PixelData)
    word = max(2 if vr == "OW" else 1, dataset.BitsAllocated // 8)
    if not big or word == 1:
        return pixels
    return np.frombuffer(pixels, f">u{word}").astype(f"<u{word}").tobytes()


# Their pixel data end early, or the number of frames is no number.
_WITHOUT_FRAMES = {"MR_truncated.dcm", "badVR.dcm", "GH1146.dcm", "3gb-bulk-data-truncated"}
# pydicom reads no pixel data of one that names a private transfer syntax.
_SHIPPED = [path for path in shipped_files() if path.name not in _WITHOUT_FRAMES]


@pytest.mark.parametrize("path", _SHIPPED, ids=lambda path: path.name)
def test_frames_of_real_files_are_what_pydicom_finds(path: Path) -> None:
    assert_equal_to_pydicom(path)


def test_the_same_dose_in_both_byte_orders() -> None:
    by_name = {path.name: path for path in shipped_files()}
    with by_name["rtdose.dcm"].open("rb") as little, by_name["rtdose_expb.dcm"].open("rb") as big:
        assert read(little, range(1, 16)).frames == read(big, range(1, 16)).frames


@needs_public
def test_frames_of_all_public_files_are_what_pydicom_finds() -> None:
    compared, failed = 0, {}
    for path, entry in storable():
        if entry["file"] in REFUSED or path.name in _WITHOUT_FRAMES or path.name == "liver_deflate.dcm":
            continue
        try:
            compared += assert_equal_to_pydicom(path)
        except (AssertionError, MissError) as error:
            failed[entry["file"]] = repr(error)[:300]
    assert not failed
    assert compared > 400


@needs_hostile
def test_the_hostile_set_costs_little() -> None:
    slow = {}
    for path, _ in hostile():
        started = time.thread_time()
        with path.open("rb") as file, contextlib.suppress(MissError):
            read(file, [1])
        if time.thread_time() - started > 0.5:
            slow[path.name] = time.thread_time() - started
    assert not slow


_SEEDS = [
    make_instance(transfer_syntax=RLE, frames=3, rows=4, columns=4, offset_table=table)
    for table in ("basic", "extended", "none")
] + [make_instance(transfer_syntax=syntax, frames=3, rows=4, columns=4) for syntax in NATIVE]


@given(
    st.sampled_from(_SEEDS),
    st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=4), st.integers(0, 6)), max_size=8),
)
@settings(max_examples=400, deadline=None)
def test_survives_mutated_data_sets(seed: Instance, changes: list[tuple[int, bytes, int]]) -> None:
    data = bytearray(seed.dataset)
    for at, new, old in changes:
        at %= len(data) + 1
        data[at : at + old] = new
    with contextlib.suppress(MissError):
        read(BytesIO(seed.part10[: -len(seed.dataset)] + bytes(data)), [1, 3])
