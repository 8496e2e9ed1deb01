"""Text of a data set by its Specific Character Set (PS3.5 6.1). Owns the defined terms and the decoding
(`textencoding.py` is the way back); never fails, never warns: what can't be decoded becomes U+FFFD, and an
unknown character set is read as UTF-8 if it is that, else as Latin-1.

The tables are pydicom's; the loop is our own because pydicom's warns through the process-wide `warnings`
filters and keeps the escape sequences of ISO 2022 IR 58 in the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from pydicom.charset import CODES_TO_ENCODINGS, STAND_ALONE_ENCODINGS, python_encoding

ESCAPE = b"\x1b"
UTF_8 = "ISO_IR 192"

# Python's names of the defined terms, and of what escape sequences designate. Latin alphabet No. 9 is newer
# than pydicom's tables.
ENCODINGS: Mapping[str, str] = {
    **python_encoding, "ISO_IR 203": "iso8859_15", "ISO 2022 IR 203": "iso8859_15",
}  # fmt: skip
CODES: Mapping[bytes, str] = {**CODES_TO_ENCODINGS, b"\x1b-b": "iso8859_15"}
STAND_ALONE = STAND_ALONE_ENCODINGS

# In the default repertoire any byte may stand; Latin-1 reads each of them, as pydicom does.
_DEFAULT = "latin-1"

# A designation holds until the value, the line or a part of a name ends (PS3.5 6.1.2.5.3).
_RESETS = re.compile(rb"[\\^=\r\n\t\f]")
_FRAGMENTS = re.compile(rb"^[^\x1b]+|\x1b[^\x1b]*")

# Python's codecs for these follow the escape sequence themselves.
_KEEPS_ESCAPE = frozenset({"iso2022_jp", "iso2022_jp_2"})

_DEFINED_TERMS_MAX = 16


class TextDecoder:
    """Decodes the values of one data set, or of one item that names its own character sets."""

    __slots__ = ("_extensions", "_first", "_guess")

    def __init__(self, encodings: Sequence[str | None]) -> None:
        self._guess = encodings[0] is None
        self._first = encodings[0] or _DEFAULT
        self._extensions = {encoding for encoding in encodings if encoding} | {ENCODINGS[""]}

    def __call__(self, value: bytes) -> str:
        """The text of a value with all its backslashes, padding kept."""
        if ESCAPE not in value:
            if value.isascii():
                return value.decode("ascii")
            return self._plain(value)
        return "".join(self._fragment(fragment) for fragment in _FRAGMENTS.findall(value))

    def _plain(self, value: bytes) -> str:
        if self._guess:
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                return value.decode(_DEFAULT)
        return value.decode(self._first, "replace")

    def _fragment(self, fragment: bytes) -> str:
        if not fragment.startswith(ESCAPE):
            return self._plain(fragment)
        # Sequences that begin with ESC $ ( or ESC $ ) have four bytes, the others three.
        length = 4 if fragment[1:3] in (b"$(", b"$)") else 3
        encoding = CODES.get(fragment[:length])
        if encoding is None or encoding not in self._extensions:
            return fragment.decode(self._first, "replace").replace("\x1b", "\ufffd")
        if encoding in _KEEPS_ESCAPE:
            return fragment.decode(encoding, "replace")
        body = fragment[length:]
        reset = _RESETS.search(body)
        if reset is None:
            return body.decode(encoding, "replace")
        return body[: reset.start()].decode(encoding, "replace") + self._plain(body[reset.start() :])


@lru_cache(maxsize=256)
def decoder(specific_character_set: bytes) -> TextDecoder:
    """The decoder for the raw value of (0008,0005); empty is the default repertoire (PS3.3 C.12.1.1.2)."""
    return TextDecoder([ENCODINGS.get(term) for term in terms_of(specific_character_set)])


def terms_of(specific_character_set: bytes) -> list[str]:
    """The defined terms in the raw value of (0008,0005), spelt as the standard does; at least one, of which
    the first may be empty. What is no defined term stays as it is."""
    terms = [
        term.strip(b" \0").decode("ascii", "replace").upper()
        for term in specific_character_set.split(b"\\")[:_DEFINED_TERMS_MAX]
    ]
    if terms[0] in STAND_ALONE:
        terms = terms[:1]
    return [_spelt(term) for term in terms]


def _spelt(term: str) -> str:
    if term not in ENCODINGS and term.startswith("ISO"):
        # Spellings met in the field: "ISO-IR 100", "ISO IR 100", "ISO 2022-IR 100", "ISO_2022_IR_100".
        parts = re.split(r"[ _-]+", term)
        spelt = " ".join(parts) if len(parts) > 3 else f"ISO_IR {parts[-1]}"
        return spelt if spelt in ENCODINGS else term
    return term


DEFAULT_DECODER = decoder(b"")
