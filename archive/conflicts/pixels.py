"""Whether the pixel data of two instances are the same samples. Native values are compared as bytes, frames
of two lossless encodings are decoded and compared one by one, in bounds of bytes and time. What was
compressed with loss is never equal to another encoding of itself: nothing says that both lost the same. It
knows pixel data alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from archive.dataset import frames
from archive.dataset.dicomjson import swapped
from archive.dataset.elements import Element
from archive.dataset.encoding import (
    EXPLICIT_LITTLE,
    GE_IMPLICIT_LITTLE,
    LOSSLESS_SYNTAXES,
    NATIVE_SYNTAXES,
    UNDEFINED,
)
from archive.dataset.part10 import Payload
from archive.errors import CannotUnderstand, MissError, TooLarge

SAMPLES, PHOTOMETRIC, PLANAR = 0x00280002, 0x00280004, 0x00280006
ROWS, COLUMNS, ALLOCATED, STORED = 0x00280010, 0x00280011, 0x00280100, 0x00280101
HIGH_BIT, REPRESENTATION = 0x00280102, 0x00280103

_CHUNK_BYTES = 1 << 20
_WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}

Image = tuple[BinaryIO, Payload, Element, dict[int, bytes]]


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """What is looked at: a frame of `frame_bytes_max` and some copies of it are in memory at once."""

    bytes_max: int = 4 << 30
    frame_bytes_max: int = 128 << 20
    batch_frames: int = 32


@dataclass(frozen=True, slots=True)
class PixelDifference:
    """How pixel data differ: in how many frames and samples' bytes, as far as that could be told."""

    frames: int = 0
    of_frames: int = 0
    bytes: int = 0
    of_bytes: int = 0
    reason: str = ""

    @property
    def words(self) -> str:
        if self.reason:
            return self.reason
        if self.of_bytes:
            return (f"differs in {self.frames:,} of {self.of_frames:,} frames, "
                    f"{self.bytes:,} of {self.of_bytes:,} bytes")  # fmt: skip
        return f"differs in {self.frames:,} of {self.of_frames:,} frames"


def is_lossless(transfer_syntax_uid: str) -> bool:
    return transfer_syntax_uid in NATIVE_SYNTAXES or transfer_syntax_uid in LOSSLESS_SYNTAXES


def may_stand_for(tag: int, first: bytes, second: bytes) -> bool:
    """Whether a description of pixel data may differ between two lossless encodings of them (PS3.5 8.2)."""
    if first == second or tag == PLANAR:
        return True
    return {first, second} <= {b"RGB", b"YBR_RCT"}


def compare_pixels(
    a: Image, b: Image, limits: PixelLimits, check_time: Callable[[], None]
) -> PixelDifference | None:
    """How they differ; None when they do not. Raises TooLarge past a bound."""
    syntaxes = (a[1].head.transfer_syntax_uid, b[1].head.transfer_syntax_uid)
    native = [image[2].length != UNDEFINED for image in (a, b)]
    if a[2].tag != b[2].tag:
        return PixelDifference(reason="pixel data of another kind")
    if syntaxes[0] != syntaxes[1] and any(
        is_native and uid not in NATIVE_SYNTAXES for is_native, uid in zip(native, syntaxes, strict=True)
    ):
        return PixelDifference(reason="native in a transfer syntax that compresses: not compared")
    if all(native) and GE_IMPLICIT_LITTLE not in syntaxes:
        return _compare_bytes(a, b, limits, check_time)
    if syntaxes[0] != syntaxes[1] and not all(is_lossless(uid) for uid in syntaxes):
        return PixelDifference(reason="compressed with loss: not compared with another encoding")
    return _compare_frames(a, b, limits, check_time)


def _compare_bytes(
    a: Image, b: Image, limits: PixelLimits, check_time: Callable[[], None]
) -> PixelDifference | None:
    lengths = (a[2].length, b[2].length)
    short, long = min(lengths), max(lengths)
    if long - short > 1 or (long != short and short % 2 == 0):
        return PixelDifference(reason=f"{lengths[0]:,} bytes beside {lengths[1]:,}")
    if long > limits.bytes_max:
        raise TooLarge(f"pixel data of more than {limits.bytes_max:,} bytes are not compared")
    frame_count, frame_bytes = _frames_of(a), 0
    if frame_count and short >= frame_count:
        frame_bytes = short // frame_count
    wrong, wrong_frames = 0, set[int]()
    for start in range(0, short, _CHUNK_BYTES):
        check_time()
        length = min(_CHUNK_BYTES, short - start)
        first, second = (_native_bytes(image, start, length) for image in (a, b))
        if first != second:
            if len(first) != length or len(second) != length:
                raise CannotUnderstand("the pixel data end too early")
            places = numpy.flatnonzero(
                numpy.frombuffer(first, numpy.uint8) != numpy.frombuffer(second, numpy.uint8)
            )
            wrong += len(places)
            if frame_bytes:
                wrong_frames.update(((places + start) // frame_bytes).tolist())
    if long != short:  # a writer that forgot to make it even; another octet than zero is a pixel
        longer = a if lengths[0] == long else b
        if longer[1].source.read(longer[2].offset + short, 1) != b"\0":
            return PixelDifference(reason=f"{lengths[0]:,} bytes beside {lengths[1]:,}")
    if not wrong:
        return None
    return PixelDifference(len(wrong_frames) or 1, max(frame_count, 1), wrong, short)


def _native_bytes(image: Image, start: int, length: int) -> bytes:
    _, payload, element, _ = image
    data = payload.source.read(element.offset + start, length)
    word = _WORD_BYTES.get(element.vr, 1) if element.encoding.big_endian else 1
    return swapped(data, word)


def _frames_of(image: Image) -> int:
    try:
        return frames.layout(image[0]).number_of_frames
    except MissError:
        return 0


def _compare_frames(
    a: Image, b: Image, limits: PixelLimits, check_time: Callable[[], None]
) -> PixelDifference | None:
    one, other = frames.layout(a[0]), frames.layout(b[0])
    count = one.number_of_frames
    if other.number_of_frames != count:
        return PixelDifference(reason=f"{count:,} frames beside {other.number_of_frames:,}")
    if one.is_video or other.is_video:
        count = 1
    if count * _frame_bytes(a[3]) > limits.bytes_max:
        raise TooLarge(f"pixel data of more than {limits.bytes_max:,} bytes are not compared")
    if _frame_bytes(a[3]) > limits.frame_bytes_max:
        raise TooLarge(f"frames of more than {limits.frame_bytes_max:,} bytes are not compared")
    for image in (a, b):
        if image[2].length != UNDEFINED and image[2].length > count * _frame_bytes(image[3]) + 1:
            raise CannotUnderstand("not compared: pixel data reach beyond their last frame")
    batch = max(1, min(limits.batch_frames, limits.frame_bytes_max // max(1, _frame_bytes(a[3]))))
    wrong = 0
    for start in range(1, count + 1, batch):
        numbers = range(start, min(start + batch, count + 1))
        found = [
            _read(image[0], numbers, known, 4 * limits.frame_bytes_max)
            for image, known in ((a, one), (b, other))
        ]
        for first, second in zip(found[0].frames, found[1].frames, strict=True):
            check_time()
            wrong += not _same_frame(a, found[0], first, b, found[1], second)
    return PixelDifference(wrong, count) if wrong else None


def _read(file: BinaryIO, numbers: Sequence[int], known: frames.Layout, bytes_max: int) -> frames.FrameSet:
    """Frames by their fragments, so that none is left out; an Extended Offset Table must lead to the same."""
    found = frames.read(file, numbers, known=_without_table(known), bytes_max=bytes_max)
    if known.frame_offsets:
        by_table = frames.read(file, numbers, known=known, bytes_max=bytes_max).frames
        for whole, pointed in zip(found.frames, by_table, strict=True):
            if whole[: len(pointed)] != pointed or whole[len(pointed) :] not in (b"", b"\0"):
                raise CannotUnderstand("not compared: an offset table does not lead to the frames")
    return found


def _without_table(known: frames.Layout) -> frames.Layout:
    return replace(known, frame_offsets=(), frame_lengths=())


def _same_frame(
    a: Image, one: frames.FrameSet, first: bytes, b: Image, other: frames.FrameSet, second: bytes
) -> bool:
    if one.transfer_syntax_uid == other.transfer_syntax_uid:
        if first == second:
            return True
        if one.transfer_syntax_uid == EXPLICIT_LITTLE:
            return False
        if not is_lossless(one.transfer_syntax_uid):  # such streams say where they end
            return first.rstrip(b"\0") == second.rstrip(b"\0")
    return numpy.array_equal(
        _samples(a[3], one.transfer_syntax_uid, first), _samples(b[3], other.transfer_syntax_uid, second)
    )


def _samples(image: dict[int, bytes], transfer_syntax_uid: str, frame: bytes) -> NDArray[Any]:
    """The samples of a frame: rows by columns by samples, as they are without what only fills their room."""
    rows, columns, samples = _number(image, ROWS), _number(image, COLUMNS), _number(image, SAMPLES, 1)
    bits = _number(image, ALLOCATED)
    if bits not in (8, 16, 32) or samples not in (1, 3):
        raise CannotUnderstand("pixels of this kind are not decoded here")
    if transfer_syntax_uid == EXPLICIT_LITTLE:
        found = numpy.frombuffer(frame, f"<u{bits // 8}")
        if found.size != rows * columns * samples:
            raise CannotUnderstand("a frame does not have the samples that it should")
        if samples == 3 and _number(image, PLANAR) == 1:
            found = found.reshape(3, rows, columns).transpose(1, 2, 0)
        return _canonical(found.reshape(rows, columns, samples), _low_bits(image, bits), bits)
    return _canonical(
        _decoded(image, transfer_syntax_uid, frame, samples).reshape(rows, columns, samples),
        _low_bits(image, bits), bits,
    )  # fmt: skip


def _low_bits(image: dict[int, bytes], allocated: int) -> int:
    """How many low bits of a sample may be all there is: all where the stored ones do not begin at the lowest
    (PS3.5 8.1.1)."""
    stored = _number(image, STORED, allocated)
    return stored if _number(image, HIGH_BIT, stored - 1) == stored - 1 else allocated


def _decoded(image: dict[int, bytes], transfer_syntax_uid: str, frame: bytes, samples: int) -> NDArray[Any]:
    bits = _number(image, ALLOCATED)
    options: dict[str, Any] = {
        "rows": _number(image, ROWS), "columns": _number(image, COLUMNS), "samples_per_pixel": samples,
        "number_of_frames": 1, "photometric_interpretation": _word_of(image, PHOTOMETRIC),
        "bits_allocated": bits, "bits_stored": _number(image, STORED, bits),
        "pixel_representation": _number(image, REPRESENTATION),
        "planar_configuration": _number(image, PLANAR), "pixel_keyword": "PixelData",
        "correct_unused_bits": False,  # an overlay may lie in them
    }  # fmt: skip
    try:
        decode = get_decoder(UID(transfer_syntax_uid))
        found, _ = decode.as_array(encapsulate([frame]), index=0, raw=True, **options)
    except Exception as error:
        raise CannotUnderstand(f"the pixel data can't be decoded here ({type(error).__name__})") from None
    if found.dtype.itemsize * 8 != bits:
        raise CannotUnderstand("the pixel data are decoded to another size")
    unsigned: NDArray[Any] = found.view(f"u{bits // 8}") if found.dtype.kind == "i" else found
    return unsigned


def _canonical(samples: NDArray[Any], stored: int, allocated: int) -> NDArray[Any]:
    """Bits above the stored ones say nothing when they are zero or repeat the sign; else they are kept."""
    if not 0 < stored < allocated:
        return samples
    low = samples & samples.dtype.type((1 << stored) - 1)
    if numpy.array_equal(low, samples):
        return samples
    high = samples.dtype.type(((1 << allocated) - 1) ^ ((1 << stored) - 1))
    signed = numpy.where((low >> samples.dtype.type(stored - 1)) & 1, low | high, low)
    kept: NDArray[Any] = low if numpy.array_equal(signed, samples) else samples
    return kept


def _frame_bytes(image: dict[int, bytes]) -> int:
    return (
        _number(image, ROWS) * _number(image, COLUMNS) * _number(image, SAMPLES, 1)
        * max(8, _number(image, ALLOCATED, 8)) // 8
    )  # fmt: skip


def _number(image: dict[int, bytes], tag: int, default: int = 0) -> int:
    value = image.get(tag, b"")
    return int.from_bytes(value[:2], "little") if len(value) >= 2 else default


def _word_of(image: dict[int, bytes], tag: int) -> str:
    return image.get(tag, b"").decode("ascii", "replace").strip(" \0")
