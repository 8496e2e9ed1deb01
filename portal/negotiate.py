"""Reads Accept headers as DICOMweb uses them (PS3.18 8.7.5, RFC 9110 12.5.1) and nothing else: which
representation answers a request is decided beside what can produce it (`qido.py`, `wado.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from archive.errors import InvalidQuery

ACCEPT_CHARS_MAX = 4_096
RANGES_MAX = 64

DICOM_JSON = "application/dicom+json"
DICOM_XML = "application/dicom+xml"
DICOM = "application/dicom"
OCTETS = "application/octet-stream"
MULTIPART = "multipart/related"
RENDERED = frozenset({"image/jpeg", "image/png", "image/gif"})

T = TypeVar("T")


class NotAcceptable(Exception):
    """Nothing that the caller accepts can be made; the message says what could be."""


@dataclass(frozen=True, slots=True)
class MediaRange:
    """One member of an Accept header: media type, `type` and `transfer-syntax` parameters, weight."""

    media: str
    part: str = ""  # the `type` parameter of multipart/related
    transfer_syntax: str = ""  # "" when not given, "*" for whatever is stored
    weight: float = 1.0

    @property
    def is_multipart(self) -> bool:
        return self.media == MULTIPART

    @property
    def wanted(self) -> str:
        """The media type of the content itself, inside a multipart or bare; `*/*` when it does not matter."""
        return (self.part or "*/*") if self.is_multipart else self.media

    def takes(self, media: str) -> bool:
        """Whether a content of type `media` satisfies this range."""
        wanted = self.wanted
        return wanted in ("*/*", media) or (wanted.endswith("/*") and media.startswith(wanted[:-1]))


def accepted(header: str | None, parameter: str | None = None) -> list[MediaRange]:
    """What the caller accepts, best first. `parameter` is the `accept` query parameter, which stands in for
    the header where a link can't set one (PS3.18 8.3.3.1). No member at all: NotAcceptable."""
    text = parameter if parameter else header
    if not text:
        raise NotAcceptable("name what you accept: the request has no Accept header")
    if len(text) > ACCEPT_CHARS_MAX:
        raise InvalidQuery(f"an Accept header of more than {ACCEPT_CHARS_MAX} characters")
    ranges = [r for r in (_range(member) for member in split(text, ",")) if r is not None]
    if len(ranges) > RANGES_MAX:
        raise InvalidQuery(f"an Accept header of more than {RANGES_MAX} members")
    return sorted((r for r in ranges if r.weight > 0), key=lambda r: -r.weight)


def forbid_mixture(ranges: Iterable[MediaRange]) -> None:
    """DICOM and rendered media types in one request contradict each other: 400 (PS3.18 8.7.4)."""
    wanted = {r.wanted for r in ranges}
    if wanted & {DICOM, DICOM_JSON, DICOM_XML} and wanted & RENDERED:
        raise InvalidQuery("DICOM and rendered media types in one Accept header")


def first(ranges: Sequence[MediaRange], offers: Sequence[tuple[str, T]]) -> tuple[MediaRange, T] | None:
    """The best range that one of `offers` (media type, what makes it) satisfies; the preferred offer
    first."""
    for accepted_range in ranges:
        for media, offer in offers:
            if accepted_range.takes(media):
                return accepted_range, offer
    return None


def _range(text: str) -> MediaRange | None:
    media, *parameters = (part.strip() for part in split(text, ";"))
    media = media.lower()
    if "/" not in media:
        return None  # a member that is not understood is ignored (PS3.18 8.7.5)
    values = {"q": "1"}
    for parameter in parameters:
        name, separator, value = parameter.partition("=")
        if separator:
            values[name.strip().lower()] = unquote(value.strip())
    try:
        weight = float(values["q"])
    except ValueError:
        return None
    if not 0 <= weight <= 1:
        return None
    return MediaRange(media, values.get("type", "").lower(), values.get("transfer-syntax", ""), weight)


def split(text: str, separator: str) -> list[str]:
    """Split outside quoted strings. The `/` of an unquoted parameter (`type=application/dicom`, as OHIF sends
    it) needs no care: it separates nothing."""
    parts, current, quoted, escaped = [], "", False, False
    for char in text:
        if char == separator and not quoted:
            parts.append(current)
            current = ""
            continue
        if quoted and char == "\\" and not escaped:
            escaped = True
        else:
            quoted ^= char == '"' and not escaped
            escaped = False
        current += char
    parts.append(current)
    return [part.strip() for part in parts if part.strip()]


def unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return value[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    return value
