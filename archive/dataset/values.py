"""One encoded value in DICOM's own string form (PS3.5 6.2): text decoded, padding gone, several values
joined by a backslash. Owns the strings that the index keeps and matches; it never fails, whatever the
bytes."""

from __future__ import annotations

from hashlib import sha256
from struct import Struct

from archive.dataset.charsets import TextDecoder

# Longer values are looked at up to here only. No text that the index keeps is longer (PS3.5 6.2: LT, 10,240).
VALUE_BYTES_MAX = 64 << 10
SHORT_CHARS_MAX = 512
LONG_CHARS_MAX = 10_240
_NUMBERS_MAX = 64
_DIGITS = 16

_NUMBERS = {
    "US": ("H", 2), "SS": ("h", 2), "UL": ("I", 4), "SL": ("i", 4),
    "UV": ("Q", 8), "SV": ("q", 8), "FL": ("f", 4), "FD": ("d", 8),
}  # fmt: skip
# These are not subject to Specific Character Set (PS3.5 6.1.2.3); Latin-1 keeps whatever bytes they hold
# apart.
DEFAULT_CHARSET_VRS = frozenset({"AE", "AS", "CS", "DA", "DS", "DT", "IS", "TM", "UI", "UR"})
_LONG_TEXT_VRS = frozenset({"LT", "ST", "UT", "UR"})

# The usual value: short ASCII without backslash, escape or NUL.
_PLAIN_VRS = frozenset({b"CS", b"DA", b"TM", b"LO", b"SH", b"PN", b"IS", b"DS", b"AE", b"AS"})
# Empty components at the end of a name, and their delimiters, mean nothing (PS3.5 6.2.1).
_NAME_ENDS = "^= \0"
_SPECIAL = frozenset(b"\\\x1b\0")


# A value as it stood: its VR (b"" in implicit VR), whether big endian, bytes (up to VALUE_BYTES_MAX) and
# the decoder that its place calls for. A plain tuple, as the scanner makes some forty for each instance.
RawValue = tuple[bytes, bool, bytes, TextDecoder]


def text_of(raw: RawValue, dictionary_vr: str, *, chars_max: int = SHORT_CHARS_MAX) -> str:
    """The value's string form. Past the stated bounds it is cut and ends in 16 hex digits of its SHA-256,
    so that two long identifiers stay two."""
    own_vr, big, value, decode = raw
    if len(value) <= 64 and own_vr in _PLAIN_VRS and value.isascii() and _SPECIAL.isdisjoint(value):
        text = value.decode("ascii").strip(" ")
        return text.rstrip(_NAME_ENDS) if dictionary_vr == "PN" else text
    vr = dictionary_vr if own_vr in (b"", b"UN") else own_vr.decode("latin-1")
    if vr in _NUMBERS:
        return _numbers(value, big, *_NUMBERS[vr])
    text = value.decode("latin-1") if dictionary_vr in DEFAULT_CHARSET_VRS else decode(value)
    if dictionary_vr in _LONG_TEXT_VRS:
        return _cut(text.rstrip(" \0"), max(chars_max, LONG_CHARS_MAX))
    ends = _NAME_ENDS if dictionary_vr == "PN" else " \0"
    if "\\" in text:
        text = "\\".join(part.strip(" \0").rstrip(ends) for part in text.split("\\"))
    else:
        text = text.strip(" \0").rstrip(ends)
    return _cut(text, chars_max)


def _cut(text: str, chars_max: int) -> str:
    # NUL can't stand in a PostgreSQL text; it is no character of any DICOM text either (PS3.5 6.1.3).
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if len(text) <= chars_max:
        return text
    return (
        text[: chars_max - _DIGITS - 1] + "…" + sha256(text.encode("utf-8", "replace")).hexdigest()[:_DIGITS]
    )


def _numbers(value: bytes, big: bool, code: str, size: int) -> str:
    count = min(len(value) // size, _NUMBERS_MAX)
    if count == 1:
        return str(Struct((">" if big else "<") + code).unpack_from(value)[0])
    return "\\".join(
        str(number) for number in Struct(f"{'>' if big else '<'}{count}{code}").unpack_from(value)
    )
