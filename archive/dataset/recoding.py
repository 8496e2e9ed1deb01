"""Writes a stored instance anew in one of the two native transfer syntaxes that everybody must be able to
read (PS3.5 10.1, PS3.18 8.7.3.5.2), for peers and clients that do not take it as it is stored. It is done on
request, for few instances at a time and within a bound; what is stored never changes.

Nothing is lost by it: elements keep their values, pixel data that are compressed without loss come out as
they went in, and those that were compressed with loss come out as any reader would decode them, with no
further loss, and say so in (0028,2110) as PS3.3 C.7.6.1.1.5 has it. The SOP Instance UID stays. What no
installed decoder reads is refused.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from io import SEEK_END, BytesIO
from typing import BinaryIO

import numpy
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.pixels.decoders.base import get_decoder

from archive.dataset.encoding import (
    DOUBLE_PIXEL_DATA,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    FLOAT_PIXEL_DATA,
    IMPLICIT_LITTLE,
    LOSSLESS_SYNTAXES,
    PIXEL_DATA,
    UNDEFINED,
)
from archive.errors import CannotUnderstand, MissError, TooLarge
from archive.model import Fields, StoredInstance
from archive.packs.records import part10_prefix

DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED})
TARGETS = (EXPLICIT_LITTLE, IMPLICIT_LITTLE)
LOSSLESS = LOSSLESS_SYNTAXES

# JPEG baseline and extended, JPEG-LS near-lossless: always with loss. Of JPEG 2000 and HTJ2K, which may be
# either, the instance says itself.
_ALWAYS_LOSSY = frozenset({
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81",
})
_WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}
_PIXELS = {PIXEL_DATA: b"OW", FLOAT_PIXEL_DATA: b"OF", DOUBLE_PIXEL_DATA: b"OD"}
_NESTING_MAX = 100


@lru_cache(maxsize=256)  # asked for every instance that is sent
def can_decode(transfer_syntax_uid: str) -> bool:
    """Whether a decoder for it is installed."""
    if transfer_syntax_uid in NATIVE:
        return True
    try:
        return get_decoder(pydicom.uid.UID(transfer_syntax_uid)).is_available
    except NotImplementedError:
        return False


def can_be_explicit(stored: StoredInstance, bytes_max: int) -> bool:
    """Whether this instance can be written in Explicit VR Little Endian within the bound."""
    syntax = stored.head.transfer_syntax_uid
    if syntax in NATIVE:
        return stored.location.length <= bytes_max
    return can_decode(syntax) and decoded_bytes(stored.instance) <= bytes_max


def decoded_bytes(fields: Fields) -> int:
    """How large the pixel data are at most when decoded: three samples a pixel, as the index does not
    know."""

    def number(keyword: str, default: int) -> int:
        text = fields.get(keyword, "").split("\\")[0].strip()
        return int(text) if text.isascii() and text.isdigit() else default

    bits = max(number("BitsAllocated", 16), 8)
    return number("Rows", 0) * number("Columns", 0) * number("NumberOfFrames", 1) * 3 * bits // 8


def explicit_part10(payload: BinaryIO, stored: StoredInstance, bytes_max: int) -> bytes:
    """The instance as a Part 10 stream in Explicit VR Little Endian. CannotUnderstand when pydicom can't,
    TooLarge past the bound."""
    prefix = part10_prefix(replace(stored.head, transfer_syntax_uid=EXPLICIT_LITTLE))
    return prefix + recoded(payload, stored, EXPLICIT_LITTLE, bytes_max)


def recoded(payload: BinaryIO, stored: StoredInstance, target: str, bytes_max: int) -> bytes:
    """The data set, without group 2, in one of TARGETS. `payload` is the whole Part 10 stream.
    CannotUnderstand when pydicom can't, TooLarge past the bound."""
    syntax = stored.head.transfer_syntax_uid
    if syntax == DEFLATED and target == EXPLICIT_LITTLE:
        return inflated(payload, stored, bytes_max)
    if syntax not in NATIVE and decoded_bytes(stored.instance) > bytes_max:
        raise TooLarge(f"its pixel data take more than {bytes_max} bytes when they are decoded")
    dataset = read(payload, stored, bytes_max)
    doing = "decoded here"
    try:
        if syntax not in NATIVE:
            _decompress(dataset)
            if syntax in _ALWAYS_LOSSY:
                dataset.LossyImageCompression = "01"
        elif syntax == EXPLICIT_BIG:
            swap_words(dataset)
        doing = "written in another transfer syntax"
        return _encoded(dataset, target)
    except MissError:
        raise
    except Exception as error:
        raise CannotUnderstand(f"can't be {doing} ({type(error).__name__})") from None


@dataclass(frozen=True, slots=True)
class Spliced:
    """A data set of which the beginning was written anew, and whose pixels are those that are stored: the
    stored data set from `rest_from` on."""

    octets: bytes
    rest_from: int


def spliced(payload: BinaryIO, stored: StoredInstance, target: str, bytes_max: int) -> Spliced | None:
    """From implicit to explicit VR or back, both little endian, where pixel data of a known length are the
    last element: their value is the same in both, so that an object of any size need not be held. None where
    that is not how the instance is; what stands before the pixels is within the bound."""
    syntax = stored.head.transfer_syntax_uid
    if syntax not in TARGETS or target not in TARGETS:
        return None
    location = stored.location
    try:
        dataset = pydicom.dcmread(payload, stop_before_pixels=True, force=True)
        at = payload.tell()
        head = payload.read(12)
        whole_length = payload.seek(0, SEEK_END)  # what was corrected may have made it longer
        group, number = struct.unpack_from("<HH", head)
    except Exception:
        return None  # `recoded` says what is wrong
    tag = group << 16 | number
    if tag not in _PIXELS:
        return None
    explicit = head[4:6].isalpha()
    size, length = (12, struct.unpack_from("<I", head, 8)[0]) if explicit else (
        8, struct.unpack_from("<I", head, 4)[0])
    if length == UNDEFINED or at + size + length != whole_length:
        return None
    if at > bytes_max:
        raise TooLarge(f"more than {bytes_max} bytes stand before its pixel data")
    _require_whole(dataset, stored)
    try:
        octets = _encoded(dataset, target)
    except Exception as error:
        kind = type(error).__name__
        raise CannotUnderstand(f"can't be written in another transfer syntax ({kind})") from None
    # Native pixel data of 8 bits or fewer may be OB or OW, and of implicit VR they are OW (PS3.5 A.1, A.2).
    written = struct.pack("<HH", group, number)
    written += _PIXELS[tag] + b"\0\0" if target == EXPLICIT_LITTLE else b""
    written += struct.pack("<I", length)
    return Spliced(octets + written, at + size - location.dataset_offset)


def read(payload: BinaryIO, stored: StoredInstance, bytes_max: int) -> Dataset:
    """The data set; its transfer syntax is the record's, whatever the file says of itself, but that a
    deflated one is inflated here: pydicom would inflate without a bound."""
    if stored.location.length > bytes_max:
        raise TooLarge(f"instances of more than {bytes_max} bytes are not decoded")
    head = stored.head
    if head.transfer_syntax_uid == DEFLATED:
        head = replace(head, transfer_syntax_uid=EXPLICIT_LITTLE)
        whole = part10_prefix(head) + inflated(payload, stored, bytes_max)
    else:
        payload.seek(0)
        whole = payload.read()
    try:
        dataset = pydicom.dcmread(BytesIO(whole), force=True)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(head.transfer_syntax_uid)
    except Exception as error:
        raise CannotUnderstand(f"the data set can't be read ({type(error).__name__})") from None
    _require_whole(dataset, stored)
    return dataset


def inflated(payload: BinaryIO, stored: StoredInstance, bytes_max: int) -> bytes:
    """A deflated data set (PS3.5 A.5), inflated no further than the bound."""
    payload.seek(stored.location.dataset_offset)
    packed = payload.read()
    for bits in (-zlib.MAX_WBITS, zlib.MAX_WBITS):  # raw by the standard; some writers add zlib's header
        inflate = zlib.decompressobj(bits)
        try:
            plain = inflate.decompress(packed, bytes_max)
        except zlib.error:
            continue
        if inflate.unconsumed_tail:
            raise TooLarge(f"inflates to more than {bytes_max} bytes")
        return plain + b"\0" * (len(plain) % 2)
    raise CannotUnderstand("the deflated data set can't be inflated")


def swap_words(dataset: Dataset) -> None:
    """Turn the words of binary values from big to little endian (PS3.5 7.3): pydicom keeps their bytes."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                swap_words(item)
        elif element.VR in _WORD_BYTES and isinstance(element.value, bytes):
            width = _WORD_BYTES[element.VR]
            whole = len(element.value) // width * width
            words = numpy.frombuffer(element.value[:whole], f"u{width}")
            element.value = words.byteswap().tobytes() + element.value[whole:]


def _encoded(dataset: Dataset, target: str) -> bytes:
    """Without the group lengths, which would no longer be true (PS3.5 7.2)."""
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, target == IMPLICIT_LITTLE
    write_dataset(out, dataset)
    return out.getvalue()


def _decompress(dataset: Dataset) -> None:
    """The pixels, and those of icons and of whatever else is nested: a native syntax has no fragments."""
    _decompress_items(dataset, dataset.file_meta.TransferSyntaxUID, 0)
    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        dataset.decompress(generate_instance_uid=False)


def _decompress_items(within: Dataset, transfer_syntax_uid: pydicom.uid.UID, depth: int) -> None:
    if depth > _NESTING_MAX:
        raise CannotUnderstand(f"sequences nest deeper than {_NESTING_MAX}")
    for element in within:
        if element.VR != "SQ":
            continue
        for item in element.value:
            if "PixelData" in item and item["PixelData"].is_undefined_length:
                item.file_meta = FileMetaDataset()
                item.file_meta.TransferSyntaxUID = transfer_syntax_uid
                item.decompress(generate_instance_uid=False)
                del item.file_meta
            _decompress_items(item, transfer_syntax_uid, depth + 1)


def _require_whole(dataset: Dataset, stored: StoredInstance) -> None:
    """Raises CannotUnderstand where pydicom gave up in the middle, which it does without a word: of a data
    set that is cut it may leave nothing."""
    if str(dataset.get("SOPInstanceUID", "")) != stored.head.sop_instance_uid:
        raise CannotUnderstand("the data set can't be read to its end")
