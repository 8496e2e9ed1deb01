"""C-FIND responses' identifiers (PS3.4 C.4.1.1.3.2), encoded straight from matches: a study list of a busy
ward is hundreds of them. What was asked for and nothing else, without a value where nothing is known; besides
the level, the Retrieve AE Title, the availability below patients, and the character set where it takes one.

Text goes out in the character set of the request where all of it fits, since many a workstation knows no
other; else in UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct

from pydicom.datadict import dictionary_VR, tag_for_keyword

from archive.catalog import BY_KEYWORD, SEQUENCES
from archive.dataset.attributes import value_of
from archive.dataset.jsonvalues import number_of
from archive.dataset.questions import OF_STUDY_TOO, Question
from archive.dataset.textencoding import UNICODE, TextEncoder, encoder
from archive.dataset.values import DEFAULT_CHARSET_VRS
from archive.matching import matches, predicate_of
from archive.model import Level, Match
from archive.predicates import Predicate
from archive.zoning import in_zone

_CHARACTER_SET = 0x00080005
_OFFSET = 0x00080201
_ITEM = (0xFFFE, 0xE000)
_SHORT_BYTES_MAX = 0xFFFE
_LONG_VRS = frozenset({"SQ", "UC", "UR", "UT"})
_LISTS = frozenset({"ModalitiesInStudy", "SOPClassesInStudy"})
_NUMBERS = {"US": ("H", 0xFFFF), "UL": ("I", 0xFFFFFFFF)}

Text = Callable[[Match], str]
Head = Callable[[int], bytes]  # what stands before a value of that many bytes; in even numbers


class Answers:
    """The identifiers of one question's responses."""

    def __init__(self, question: Question, retrieve_ae: str, *, implicit: bool, little: bool,
                 timezone: str = "") -> None:  # fmt: skip
        """`timezone` is the offset in which dates and times are told; empty tells them as they are stored."""
        self._order = "<" if little else ">"
        self._implicit = implicit
        self._level = question.level
        self._timezone = timezone
        self._encode = encoder(question.character_set)
        self._asked = _predicates(question)
        self._item = Struct(f"{self._order}HHI")
        told = dict.fromkeys(path for each in question.wanted for path in SEQUENCES.get(each, (each,)))
        if timezone:
            told["TimezoneOffsetFromUTC"] = None
        self._places = self._lay_out(told, retrieve_ae)
        self._character_set = self._head(_CHARACTER_SET, "CS")

    def encode(self, match: Match) -> bytes:
        """The identifier of one match."""
        if self._timezone:
            match = in_zone(match, self._timezone)
        texts = [place.texts(match) for place in self._places]
        encode = self._encoder_for(texts)
        parts: dict[int, bytes] = {}
        for place, values in zip(self._places, texts, strict=True):
            if place.tag != _OFFSET or values[0]:
                parts[place.tag] = place.octets(values, encode)
        if encode is not None:
            term = _even(encode.term.encode("ascii"), b" ")
            parts[_CHARACTER_SET] = self._character_set(len(term)) + term
            return b"".join(parts[tag] for tag in sorted(parts))
        return b"".join(parts.values())

    def _encoder_for(self, texts: list[list[str]]) -> TextEncoder | None:
        """The encoder for these texts; None when all are ASCII, which needs none."""
        beyond = [
            text
            for place, values in zip(self._places, texts, strict=True) if place.in_character_set
            for text in values if not text.isascii()
        ]  # fmt: skip
        if not beyond:
            return None
        return UNICODE if any(self._encode(text) is None for text in beyond) else self._encode

    def _lay_out(self, told: Iterable[str], retrieve_ae: str) -> list[_Place]:
        sequences: dict[str, list[str]] = {}
        places: list[_Place] = [self._leaf("QueryRetrieveLevel", lambda _: self._level.value)]
        if retrieve_ae:
            places.append(self._leaf("RetrieveAETitle", lambda _: retrieve_ae))
        if self._level is not Level.PATIENT:
            places.append(self._leaf("InstanceAvailability", _getter("InstanceAvailability", self._level)))
        there = {"RetrieveAETitle", "InstanceAvailability", "QueryRetrieveLevel"}
        for path in told:
            sequence, _, leaf = path.rpartition(".")
            if sequence:
                sequences.setdefault(sequence, []).append(path)
            elif leaf not in there:
                places.append(self._leaf(leaf, _getter(leaf, self._level)))
        for sequence, paths in sequences.items():
            places.append(self._sequence(sequence, paths))
        return sorted(places, key=lambda place: place.tag)

    def _leaf(self, keyword: str, text: Text) -> _Leaf:
        tag, vr = _tag_and_vr(keyword)
        return _Leaf(tag, vr, self._head(tag, vr), text, self._order)

    def _sequence(self, sequence: str, paths: list[str]) -> _Sequence:
        tag, _ = _tag_and_vr(sequence)
        leaves = [self._leaf(path.rpartition(".")[2], _getter(path, self._level)) for path in paths]
        predicates = [self._asked.get(path) for path in paths]
        return _Sequence(tag, self._head(tag, "SQ"), leaves, predicates, self._item)

    def _head(self, tag: int, vr: str) -> Head:
        group, element = tag >> 16, tag & 0xFFFF
        if self._implicit:
            before, length = Struct(f"{self._order}HH").pack(group, element), Struct(f"{self._order}I")
        else:
            long = vr in _LONG_VRS
            before = Struct(f"{self._order}HH2s").pack(group, element, vr.encode()) + b"\0\0" * long
            length = Struct(f"{self._order}{'I' if long else 'H'}")
        pack = length.pack
        return lambda size: before + pack(size)


class _Leaf:
    """Where an attribute's value stands in each response."""

    __slots__ = ("_head", "_order", "_pad", "_text", "in_character_set", "tag", "vr")

    def __init__(self, tag: int, vr: str, head: Head, text: Text, order: str) -> None:
        self.tag = tag
        self.vr = vr
        self.in_character_set = vr not in DEFAULT_CHARSET_VRS and vr not in _NUMBERS
        self._head = head
        self._text = text
        self._order = order
        self._pad = b"\0" if vr == "UI" else b" "

    def texts(self, match: Match) -> list[str]:
        return [self._text(match)]

    def octets(self, values: list[str], encode: TextEncoder | None) -> bytes:
        return self.element(values[0], encode)

    def element(self, text: str, encode: TextEncoder | None) -> bytes:
        """What was stored is told as it came, if it can be written; else the value is left empty rather than
        failing the answer."""
        value = self._value(text, encode) if text else b""
        if len(value) & 1:
            value += self._pad
        if len(value) > _SHORT_BYTES_MAX and self.vr not in _LONG_VRS:
            value = b""
        return self._head(len(value)) + value

    def _value(self, text: str, encode: TextEncoder | None) -> bytes:
        if self.vr in _NUMBERS:
            return self._numbers(text)
        if self.vr in ("IS", "DS") and any(number_of(self.vr, part) is None for part in text.split("\\")):
            return b""
        if text.isascii():
            return text.encode("ascii")
        if not self.in_character_set:
            return text.encode("latin-1", "replace")
        octets = encode(text) if encode is not None else None
        return text.encode("utf-8", "replace") if octets is None else octets

    def _numbers(self, text: str) -> bytes:
        code, largest = _NUMBERS[self.vr]
        numbers = [number_of(self.vr, part) for part in text.split("\\")]
        whole = [number for number in numbers if isinstance(number, int) and 0 <= number <= largest]
        return Struct(f"{self._order}{len(whole)}{code}").pack(*whole) if len(whole) == len(numbers) else b""


class _Sequence:
    """Where a sequence stands in each response: what is kept of its items, of those that match."""

    __slots__ = ("_head", "_item", "_leaves", "_predicates", "in_character_set", "tag")

    def __init__(self, tag: int, head: Head, leaves: list[_Leaf], predicates: list[Predicate | None],
                 item: Struct) -> None:  # fmt: skip
        self.tag = tag
        self.in_character_set = True
        self._head = head
        order = sorted(range(len(leaves)), key=lambda at: leaves[at].tag)
        self._leaves = [leaves[at] for at in order]
        self._predicates = [predicates[at] for at in order]
        self._item = item

    def texts(self, match: Match) -> list[str]:
        return [leaf.texts(match)[0] for leaf in self._leaves]

    def octets(self, values: list[str], encode: TextEncoder | None) -> bytes:
        columns = [text.split("\\") if text else [] for text in values]
        items = b"".join(
            self._encoded_item([column[at] if at < len(column) else None for column in columns], encode)
            for at in range(max(map(len, columns)))
        )
        return self._head(len(items)) + items

    def _encoded_item(self, values: list[str | None], encode: TextEncoder | None) -> bytes:
        for predicate, value in zip(self._predicates, values, strict=True):
            if predicate is not None and not matches(predicate, lambda _, of_item=value: of_item or ""):  # type: ignore[misc]
                return b""
        body = b"".join(
            leaf.element(value, encode)
            for leaf, value in zip(self._leaves, values, strict=True) if value is not None
        )  # fmt: skip
        return self._item.pack(*_ITEM, len(body)) + body


_Place = _Leaf | _Sequence


def _predicates(question: Question) -> dict[str, Predicate | None]:
    """What the items of a sequence are asked for, by path."""
    return {
        path: predicate_of(path, BY_KEYWORD[path].vr, value)
        for path, value in question.keys if "." in path
    }  # fmt: skip


def _getter(keyword: str, level: Level) -> Text:
    """Where a match has the text of an attribute: looked up once, not for each response."""
    if level is Level.STUDY and keyword in OF_STUDY_TOO:
        return _modality if keyword == "Modality" else _sop_class
    if level is not Level.STUDY and keyword in _LISTS:
        return lambda _: ""  # a match holds its own level's
    entry = BY_KEYWORD.get(keyword)
    if entry is None or keyword == "IssuerOfPatientID":
        return lambda match: value_of(match, keyword)
    if entry.level is Level.PATIENT:
        return lambda match: match.patient.get(keyword, "")
    if entry.level is Level.STUDY:
        return lambda match: match.study.get(keyword, "")
    if entry.level is Level.SERIES:
        return lambda match: match.series.get(keyword, "")
    return lambda match: match.instance.get(keyword, "")


def _modality(match: Match) -> str:
    """A study's, where it has one: the attribute has one value."""
    return match.modalities[0] if len(match.modalities) == 1 else ""


def _sop_class(match: Match) -> str:
    return match.sop_classes[0] if len(match.sop_classes) == 1 else ""


def _tag_and_vr(keyword: str) -> tuple[int, str]:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise LookupError(keyword)
    return tag, dictionary_VR(tag)


def _even(octets: bytes, pad: bytes) -> bytes:
    return octets + pad if len(octets) & 1 else octets
