"""Decodes pixel data with whatever decoders pydicom finds installed: frames for clients that can't decode,
and pictures for those that can't window either (PS3.18 8.3.5). Bounded in size, few at a time; never
stored."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi_lut,
    convert_color_space,
)
from pydicom.pixels.utils import pixel_array

from archive.dataset.recoding import read
from archive.errors import CannotUnderstand, NotFound
from archive.model import StoredInstance

SIDE_MAX = 4_096


@dataclass(frozen=True, slots=True)
class View:
    """How a picture is wanted: the box it must fit in, and a window of values."""

    width: int | None = None
    height: int | None = None
    center: float | None = None
    window: float | None = None
    quality: int = 90


def decoded_frames(
    payload: BinaryIO, stored: StoredInstance, numbers: Sequence[int], bytes_max: int
) -> list[bytes]:
    """The frames as Explicit VR Little Endian would hold them."""
    dataset = read(payload, stored, bytes_max)
    return [_array(dataset, number, raw=True).tobytes() for number in numbers]


def picture(
    payload: BinaryIO, stored: StoredInstance, number: int, view: View, media_type: str, bytes_max: int
) -> bytes:
    """One frame as people look at it, encoded as `media_type`."""
    dataset = read(payload, stored, bytes_max)
    if "PixelData" not in dataset and "FloatPixelData" not in dataset:
        raise NotFound("no pixel data")
    try:
        shown = _shown(dataset, _array(dataset, number, raw=False), view)
    except (NotFound, CannotUnderstand):
        raise
    except Exception as error:
        raise CannotUnderstand(f"can't be rendered ({type(error).__name__})") from None
    shown = _fitted(shown, view)
    return png(shown) if media_type == "image/png" else jpeg(shown, view.quality)


def _array(dataset: Dataset, number: int, *, raw: bool) -> NDArray[Any]:
    frames = int(dataset.get("NumberOfFrames") or 1)
    if not 1 <= number <= frames:
        raise NotFound("no such frame")
    try:
        return pixel_array(dataset, index=number - 1, raw=raw)
    except Exception as error:
        raise CannotUnderstand(f"the pixel data can't be decoded ({type(error).__name__})") from None


def _shown(dataset: Dataset, pixels: NDArray[Any], view: View) -> NDArray[numpy.uint8]:
    """Modality and VOI transformations, to 8 bits (PS3.4 N.2)."""
    photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if photometric == "PALETTE COLOR":
        return _eight_bits(apply_color_lut(pixels, dataset))
    if pixels.ndim == 3:
        if photometric.startswith("YBR"):
            # pixel_array has turned it into RGB already.
            photometric = "RGB"
        return _eight_bits(
            convert_color_space(pixels, photometric, "RGB") if photometric != "RGB" else pixels
        )
    values = apply_modality_lut(pixels, dataset)
    if "VOILUTSequence" in dataset and view.center is None:
        values = apply_voi_lut(values, dataset)
        low, high = float(values.min()), float(values.max())
    else:
        low, high = _window(dataset, values, view)
    scaled = (values.astype(numpy.float64) - low) / max(high - low, 1e-9) * 255
    scaled = 255 - scaled if photometric == "MONOCHROME1" else scaled
    return numpy.clip(scaled, 0, 255).astype(numpy.uint8)


def _window(dataset: Dataset, values: NDArray[Any], view: View) -> tuple[float, float]:
    """The lowest and highest value shown (PS3.3 C.11.2.1.2): the one asked for, the first of the data set,
    or one that leaves the extremes out."""
    center, width = view.center, view.window
    if center is None or width is None:
        center, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if center is not None and width is not None and width >= 1:
        return center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    low, high = numpy.percentile(values, (0.5, 99.5))
    return float(low), float(high)


def _number(dataset: Dataset, keyword: str) -> float | None:
    value = dataset.get(keyword)
    try:
        return float(value[0] if isinstance(value, MultiValue) else value)
    except (TypeError, ValueError, IndexError):
        return None


def _eight_bits(pixels: NDArray[Any]) -> NDArray[numpy.uint8]:
    return pixels.astype(numpy.uint8) if pixels.dtype.itemsize == 1 else (pixels >> 8).astype(numpy.uint8)


def _fitted(pixels: NDArray[numpy.uint8], view: View) -> NDArray[numpy.uint8]:
    """Smaller by averaging blocks, never larger: the viewport is a box to fit in (PS3.18 8.3.5.1.3)."""
    rows, columns = pixels.shape[:2]
    width, height = min(view.width or columns, SIDE_MAX), min(view.height or rows, SIDE_MAX)
    scale = min(width / columns, height / rows, 1.0)
    if scale == 1.0:
        return pixels
    new_rows, new_columns = max(1, int(rows * scale)), max(1, int(columns * scale))
    row_edges = numpy.linspace(0, rows, new_rows + 1).astype(int)
    column_edges = numpy.linspace(0, columns, new_columns + 1).astype(int)
    summed = numpy.add.reduceat(pixels.astype(numpy.uint32), row_edges[:-1], axis=0)
    summed = numpy.add.reduceat(summed, column_edges[:-1], axis=1)
    area = numpy.outer(numpy.diff(row_edges), numpy.diff(column_edges))
    smaller: NDArray[numpy.uint8] = (summed // (area if pixels.ndim == 2 else area[:, :, None])).astype(
        numpy.uint8
    )
    return smaller


def can_jpeg() -> bool:
    """Whether the JPEG encoder, an optional library, is installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        return False
    return True


def jpeg(pixels: NDArray[numpy.uint8], quality: int) -> bytes:
    from PIL import Image

    out = BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def png(pixels: NDArray[numpy.uint8]) -> bytes:
    """A PNG (ISO/IEC 15948) of 8-bit grey or RGB pixels."""
    rows, columns = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    lines = numpy.zeros((rows, 1 + pixels.reshape(rows, -1).shape[1]), numpy.uint8)
    lines[:, 1:] = pixels.reshape(rows, -1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
