"""Text in a data set of a given Specific Character Set (PS3.5 6.1): the way back from `charsets.py`. It says
when a text does not fit, and never sends a question mark in a character's place.

With code extensions (ISO 2022) each part of a value that delimiters end begins in the initial state (PS3.5
6.1.2.5.3), so each part designates what it needs, and gives G0 back to the initial set where it took it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from archive.dataset.charsets import CODES, ENCODINGS, STAND_ALONE, UTF_8, terms_of

_ESCAPE = "\x1b"
_PARTS = re.compile(r"([\\^=\r\n\t\f])")
_ASCII = b"\x1b(B"
_ROMAN = b"\x1b(J"

# Sets that are designated to G0, where ASCII stands, and that Python's codecs designate themselves.
_IN_G0 = {"iso2022_jp": b"\x1b$B", "iso2022_jp_2": b"\x1b$(D"}
_DESIGNATIONS = {encoding: code for code, encoding in CODES.items() if code not in (_ASCII, _ROMAN)}
_CHARACTER_BYTES = {"euc_kr": 2, "iso_ir_58": 2}  # of a character in G1; the others have one


class TextEncoder:
    """Encodes the texts of one data set. `term` is its Specific Character Set, as it is to be written."""

    __slots__ = ("_encode", "term")

    def __init__(self, term: str, encode: Callable[[str], bytes | None]) -> None:
        self.term = term
        self._encode = encode

    def __call__(self, text: str) -> bytes | None:
        """The octets of a value, its delimiters in it; None when a character of it has no code. ESC has none:
        it begins a code extension (PS3.5 6.1.3)."""
        if _ESCAPE in text:
            return None
        return text.encode("ascii") if text.isascii() else self._encode(text)


@lru_cache(maxsize=256)
def encoder(specific_character_set: bytes) -> TextEncoder:
    """The encoder for the raw value of (0008,0005). Of a character set that is not known it takes ASCII
    alone."""
    terms = terms_of(specific_character_set)
    if terms[0] in STAND_ALONE:
        return TextEncoder(terms[0], lambda text: _encoded(text, ENCODINGS[terms[0]]))
    if len(terms) > 1:
        first = terms[0] if terms[0] in ENCODINGS else ""
        terms = [first, *(each for each in terms[1:] if each in ENCODINGS)]
    term = "\\".join(terms).encode("ascii", "replace").decode("ascii")
    if len(terms) == 1:
        first = ENCODINGS.get(terms[0], "")
        if not first or terms[0] in ("", "ISO_IR 6", "ISO 2022 IR 6"):
            return TextEncoder(term, lambda _: None)
        if first in _IN_G0 or first in _CHARACTER_BYTES:
            return TextEncoder(term, _Extended("", (first,)))  # written without the empty first value
        return TextEncoder(term, lambda text: _in_one_set(text, first))
    initial = "" if terms[0] in ("", "ISO 2022 IR 6") else ENCODINGS.get(terms[0], "")
    further = [ENCODINGS[each] for each in terms[1:] if ENCODINGS.get(each) in _DESIGNATIONS]
    extended = _Extended(initial, tuple(dict.fromkeys(further)))
    return TextEncoder(term, extended)


def _encoded(text: str, encoding: str) -> bytes | None:
    try:
        return text.encode(encoding)
    except UnicodeError:
        return None


def _in_one_set(text: str, encoding: str) -> bytes | None:
    octets = _encoded(text, encoding)
    return octets if octets is not None and len(octets) == len(text) else None  # one byte each


class _Extended:
    """Code extension: an initial set, and others that escape sequences designate."""

    __slots__ = ("_further", "_initial", "_to_initial")

    def __init__(self, initial: str, further: tuple[str, ...]) -> None:
        self._initial = initial
        self._further = further
        self._to_initial = _ROMAN if initial == "shift_jis" else _ASCII

    def __call__(self, text: str) -> bytes | None:
        parts = []
        for part in _PARTS.split(text):
            octets = self._part(part)
            if octets is None:
                return None
            parts.append(octets)
        return b"".join(parts)

    def _part(self, part: str) -> bytes | None:
        octets = b""
        designated = self._initial  # to G1
        for encoding, run in self._runs(part):
            if encoding in _IN_G0:
                code = _IN_G0[encoding]
                body = run.encode(encoding)
                # The codec designates the set, and ASCII at the end.
                octets += code + body.removeprefix(code).removesuffix(_ASCII) + self._to_initial
                continue
            if encoding and encoding != designated:
                octets += _DESIGNATIONS[encoding]
                designated = encoding
            octets += run.encode(encoding or "ascii")
        return None if octets == b"" and part else octets

    def _runs(self, part: str) -> list[tuple[str, str]]:
        """The part cut where its characters' sets change ("" is ASCII); none when a character has no set."""
        runs: list[tuple[str, str]] = []
        for char in part:
            encoding = "" if char.isascii() else self._set_of(char)
            if encoding is None:
                return []
            if runs and runs[-1][0] == encoding:
                runs[-1] = (encoding, runs[-1][1] + char)
            else:
                runs.append((encoding, char))
        return runs

    def _set_of(self, char: str) -> str | None:
        return next((each for each in (self._initial, *self._further) if each and _holds(each, char)), None)


@lru_cache(maxsize=16384)
def _holds(encoding: str, char: str) -> bool:
    octets = _encoded(char, encoding)
    if octets is None:
        return False
    if encoding in _IN_G0:
        return octets.startswith(_IN_G0[encoding])  # Python's codecs know sets beside the one we mean
    return len(octets) == _CHARACTER_BYTES.get(encoding, 1)


UNICODE = encoder(UTF_8.encode())
