"""Writes an instance anew in Explicit VR Little Endian, the one transfer syntax that every web client may
ask for (PS3.18 8.7.3.5.2). It is done on request, in memory, for few instances at a time and up to a bound;
what is stored never changes. Whoever accepts `transfer-syntax=*` gets the stored bytes and none of this."""

from __future__ import annotations

import zlib
from dataclasses import replace
from io import BytesIO
from typing import BinaryIO

import numpy
import pydicom
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.pixels.decoders.base import get_decoder

from archive.dataset.encoding import LOSSLESS_SYNTAXES
from archive.errors import CannotUnderstand, TooLarge
from archive.model import Fields, StoredInstance
from archive.packs.records import part10_prefix

IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = frozenset({IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED})
AT_ONCE = 2  # threads that decode: each may hold a whole instance, more than once

# The lossless ones alone: pixel data that exist only lossy may stay as they are (PS3.18 8.7.3.5.2).
LOSSLESS = LOSSLESS_SYNTAXES
_WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}


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
    prefix = part10_prefix(replace(stored.head, transfer_syntax_uid=EXPLICIT))
    if stored.head.transfer_syntax_uid == DEFLATED:
        return prefix + inflated(payload, stored, bytes_max)
    dataset = read(payload, stored, bytes_max)
    try:
        if stored.head.transfer_syntax_uid not in NATIVE:
            dataset.decompress(generate_instance_uid=False)
        elif stored.head.transfer_syntax_uid == BIG_ENDIAN:
            swap_words(dataset)
        out = DicomBytesIO()
        out.is_little_endian, out.is_implicit_VR = True, False
        write_dataset(out, dataset)
    except Exception as error:
        kind = type(error).__name__
        raise CannotUnderstand(f"can't be written in Explicit VR Little Endian ({kind})") from None
    return prefix + out.getvalue()


def read(payload: BinaryIO, stored: StoredInstance, bytes_max: int) -> Dataset:
    """The data set; its transfer syntax is the record's, whatever the file says of itself, but that a
    deflated one is inflated here: pydicom would inflate without a bound."""
    if stored.location.length > bytes_max:
        raise TooLarge(f"instances of more than {bytes_max} bytes are not decoded")
    head = stored.head
    if head.transfer_syntax_uid == DEFLATED:
        head = replace(head, transfer_syntax_uid=EXPLICIT)
        whole = part10_prefix(head) + inflated(payload, stored, bytes_max)
    else:
        whole = payload.read()
    try:
        dataset = pydicom.dcmread(BytesIO(whole), force=True)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(head.transfer_syntax_uid)
    except Exception as error:
        raise CannotUnderstand(f"the data set can't be read ({type(error).__name__})") from None
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
