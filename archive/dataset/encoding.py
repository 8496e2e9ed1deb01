"""How data sets are written (PS3.5 7 and Annex A): byte order, value representations, the tags that give
structure. Owns what every reader of encoded bytes needs to know, and reads nothing itself."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pydicom.datadict import dictionary_VR, private_dictionary_VR

UNDEFINED = 0xFFFFFFFF
ITEM = 0xFFFEE000
ITEM_END = 0xFFFEE00D
SEQUENCE_END = 0xFFFEE0DD
FLOAT_PIXEL_DATA = 0x7FE00008
DOUBLE_PIXEL_DATA = 0x7FE00009
PIXEL_DATA = 0x7FE00010

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
# GE's private syntax is implicit little endian but for the pixel data, which are big endian.
GE_IMPLICIT_LITTLE = "1.2.840.113619.5.2"
DEFLATED_SYNTAXES = frozenset(
    {
        "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
        "1.2.840.10008.1.2.4.95",  # JPIP Referenced Deflate
        "1.2.840.10008.1.2.4.205",  # JPIP HTJ2K Referenced Deflate
    }
)

NATIVE_SYNTAXES = DEFLATED_SYNTAXES | {IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, GE_IMPLICIT_LITTLE}

# Pixel data that are compressed without loss. JPEG 2000 and its likes that may be either are not among them.
LOSSLESS_SYNTAXES = frozenset(
    {
        "1.2.840.10008.1.2.1.98",  # Encapsulated Uncompressed
        "1.2.840.10008.1.2.5",  # RLE
        "1.2.840.10008.1.2.4.57",  # JPEG Lossless
        "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
        "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
        "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
        "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
        "1.2.840.10008.1.2.4.202",  # HTJ2K Lossless RPCL
    }
)

# PS3.5 7.1.2: these have a 16-bit length; the others two reserved bytes and a 32-bit one.
SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
BINARY_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})


class Encoding(NamedTuple):
    """How elements are written: with VRs or without, and in which byte order."""

    implicit: bool
    big_endian: bool


IMPLICIT = Encoding(implicit=True, big_endian=False)
EXPLICIT = Encoding(implicit=False, big_endian=False)
BIG = Encoding(implicit=False, big_endian=True)


def encoding_of(transfer_syntax_uid: str, start: bytes) -> Encoding:
    """The encoding of a data set that begins with `start`. Writers mistake implicit for explicit and the
    other way round; the first element shows it, since no first element is so long that its length looks
    like a VR."""
    if transfer_syntax_uid == EXPLICIT_BIG:
        return BIG
    declared = IMPLICIT if transfer_syntax_uid in (IMPLICIT_LITTLE, GE_IMPLICIT_LITTLE) else EXPLICIT
    if len(start) < 8:
        return declared
    letters = 0x41 <= start[4] <= 0x5A and 0x41 <= start[5] <= 0x5A
    return EXPLICIT if letters else IMPLICIT


def is_no_vr(vr: bytes) -> bool:
    """Whether two bytes where a VR belongs are the length of an element in implicit VR, to which some
    writers switch in between. Other bytes are a VR that nobody knows, and those have 16-bit lengths, as
    DCMTK and pydicom take it."""
    return vr != b"\0\0" and not (0x20 <= vr[0] <= 0x7E and 0x20 <= vr[1] <= 0x7E)


@lru_cache(maxsize=16384)
def known_vr(tag: int) -> str | None:
    """The dictionary's VR of a public tag ("US or SS" and so on included), None when it is not known."""
    if tag >> 16 & 1:
        return None
    try:
        return dictionary_VR(tag)
    except KeyError:
        return None


@lru_cache(maxsize=4096)
def private_vr(tag: int, creator: str) -> str:
    """The VR of a private tag by its creator, UN when nobody knows (PS3.5 6.2.2)."""
    try:
        return private_dictionary_VR(tag, creator)
    except KeyError:
        return "UN"
