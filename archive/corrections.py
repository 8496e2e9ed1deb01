"""Corrections: what a person says that a study's own attributes, or its patient's, are to be. They are facts;
the bytes that came stay as they came.

A correction has an id of its own, and so does nothing else about it: told again it changes nothing, whatever
comes before or after it. Of two that name one attribute the later counts, by its time and then its id; one
that was withdrawn counts no more, even if the withdrawal was heard of first. So every archive that was told
the same corrections shows the same, in whatever order it was told.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from archive.catalog import BY_KEYWORD, Indexed, at_level
from archive.errors import InvalidInput
from archive.model import Attributes, Fact, FactKind, Level, Overlay, is_uid

ID_LENGTH_MAX = 64
WORDS_CHARS_MAX = 200   # of who and why
DETAIL_CHARS_MAX = 16_384
CORRECTIONS_PER_STUDY_MAX = 1_000

# Every indexed attribute of a patient and a study but the identity: what a person may correct.
CORRECTABLE: Mapping[str, Indexed] = {
    entry.keyword: entry
    for level in (Level.PATIENT, Level.STUDY)
    for entry in at_level(level)
    if entry.vr != "UI" and len(entry.path) == 1
}


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """That a correction counts no more, by whom, and where that was decided."""

    by: str
    reason: str
    at_us: int
    ward: str


@dataclass(frozen=True, slots=True)
class Correction:
    """What a person said that attributes of a study are. An empty value takes the attribute's value away.
    `ward` is where it was decided, "" for the region. Without `changes` only its withdrawal is known yet."""

    id: str
    study_uid: str
    changes: tuple[tuple[str, str], ...]
    by: str
    reason: str
    at_us: int
    ward: str
    undone: Withdrawal | None = None


def fact_of(correction: Correction) -> Fact:
    """A correction that counts, as a fact."""
    body = {"id": correction.id, "set": dict(correction.changes), "by": correction.by,
            "reason": correction.reason}  # fmt: skip
    return _fact(correction.study_uid, correction.ward, correction.at_us, body)


def withdrawal_fact(correction_id: str, study_uid: str, withdrawal: Withdrawal) -> Fact:
    """That the correction `correction_id` is withdrawn, as a fact."""
    body = {"undo": correction_id, "by": withdrawal.by, "reason": withdrawal.reason}
    return _fact(study_uid, withdrawal.ward, withdrawal.at_us, body)


def facts_of(correction: Correction) -> list[Fact]:
    """What is known of a correction, as the facts that told it."""
    facts = [fact_of(correction)] if correction.changes else []
    if correction.undone is not None:
        facts.append(withdrawal_fact(correction.id, correction.study_uid, correction.undone))
    return facts


def _fact(study_uid: str, ward: str, at_us: int, body: Mapping[str, object]) -> Fact:
    detail = json.dumps(body, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
    return Fact(FactKind.CORRECTED, study_uid, b"", ward, at_us, detail)


def correction_of(fact: Fact) -> Correction:
    """The correction that a fact tells, or that it withdraws. Raises InvalidInput for one that can't be."""
    try:
        body = json.loads(fact.detail) if len(fact.detail) <= DETAIL_CHARS_MAX else None
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict) or not is_uid(fact.sop_instance_uid) or fact.at_us <= 0:
        raise InvalidInput("a fact about a correction can't be read")
    by, reason = _words(body.get("by")), _words(body.get("reason"))
    if "undo" in body:
        undone = Withdrawal(by, reason, fact.at_us, fact.ward)
        return Correction(_id(body["undo"]), fact.sop_instance_uid, (), "", "", 0, "", undone)
    changes = body.get("set")
    if not isinstance(changes, dict):
        raise InvalidInput("a correction says what it sets")
    checked = checked_changes(changes)
    return Correction(_id(body.get("id")), fact.sop_instance_uid, checked, by, reason, fact.at_us, fact.ward)


def _id(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{8,64}", value, re.ASCII):
        raise InvalidInput("a correction has an id of hex digits")
    return value


def _words(value: object) -> str:
    if not isinstance(value, str) or len(value) > WORDS_CHARS_MAX or _CONTROLS.search(value):
        raise InvalidInput(f"who corrects, and why, is said in at most {WORDS_CHARS_MAX} characters")
    return value


def joined(first: Correction, second: Correction) -> Correction:
    """The same correction told twice: its changes, and the earliest withdrawal."""
    known, other = (first, second) if first.changes else (second, first)
    found = [each for each in (known.undone, other.undone) if each is not None]
    earliest = min(found, key=lambda one: (one.at_us, one.ward, one.by, one.reason), default=None)
    return replace(known, undone=earliest)


def overlay_of(corrections: Iterable[Correction]) -> Overlay | None:
    """What counts now of all the corrections of a study; None when nothing does."""
    values: dict[str, str] = {}
    at_us, system = 0, ""
    for one in sorted(corrections, key=lambda one: (one.at_us, one.id)):
        if one.undone is None and one.changes:
            values.update(one.changes)
            at_us, system = one.at_us, one.ward
    return Overlay(tuple(sorted(values.items())), at_us, system) if values else None


def corrected(attributes: Attributes, overlay: Overlay | None) -> Attributes:
    """What the index keeps of an instance, as corrected."""
    if overlay is None:
        return attributes
    patient, study = dict(attributes.patient), dict(attributes.study)
    for keyword, value in overlay.values:
        entry = CORRECTABLE.get(keyword)
        if entry is not None:
            (patient if entry.level is Level.PATIENT else study)[keyword] = value
    return replace(attributes, patient=patient, study=study)


# What a value may be, by PS3.5 6.2.

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_LINES = re.compile(r"[\x00-\x09\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_PATTERNS = {
    "DA": re.compile(r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", re.ASCII),
    "TM": re.compile(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?", re.ASCII),
    "AS": re.compile(r"\d{3}[DWMY]", re.ASCII),
    "CS": re.compile(r"[A-Z0-9_ ]{1,16}", re.ASCII),
    "DS": re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII),
}
_CHARS_MAX = {"LO": 64, "SH": 16, "DS": 16, "LT": 10_240}
_ZONE = re.compile(r"[+-](0\d|1[0-4])[0-5]\d", re.ASCII)
_NAME_GROUP_CHARS_MAX = 64


def checked_changes(changes: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """The changes in their order, each value as it is to be kept. Raises InvalidInput, which names the
    attribute and no value."""
    if not changes:
        raise InvalidInput("a correction changes something")
    checked = []
    for keyword in sorted(changes):
        value = changes[keyword]
        if keyword not in CORRECTABLE:
            known = ", ".join(sorted(CORRECTABLE))
            which = keyword if keyword in BY_KEYWORD else "an attribute that is not known"
            raise InvalidInput(f"{which} can't be corrected; these can: {known}")
        if not isinstance(value, str):
            raise InvalidInput(f"the value of {keyword} is a text")
        checked.append((keyword, checked_value(CORRECTABLE[keyword], value)))
    return tuple(checked)


def checked_value(entry: Indexed, text: str) -> str:
    """A value as it is to be kept: composed (NFC), without blanks around it."""
    text = unicodedata.normalize("NFC", text)
    if entry.vr == "LT":
        return _one(entry, text.rstrip(" "))
    values = text.split("\\") if entry.multiple else [text]
    return "\\".join(_one(entry, value.strip(" ")) for value in values)


def _one(entry: Indexed, value: str) -> str:
    vr = entry.vr
    if not value:
        return value
    bad = (_LINES if vr == "LT" else _CONTROLS).search(value) or (vr != "LT" and "\\" in value)
    pattern = _PATTERNS.get(vr)
    if bad or (pattern is not None and not pattern.fullmatch(value)) or len(value) > _CHARS_MAX.get(vr, 1024):
        raise InvalidInput(f"that is no value of {entry.keyword} ({vr}, PS3.5 6.2)")
    if vr == "PN" and not _is_name(value):
        raise InvalidInput(f"that is no value of {entry.keyword}: a name has at most three groups (=) of "
                           f"{_NAME_GROUP_CHARS_MAX} characters and five components (^), PS3.5 6.2.1")
    if entry.keyword == "TimezoneOffsetFromUTC" and not _ZONE.fullmatch(value):
        raise InvalidInput(f"{entry.keyword} is like +0100")
    return value


def _is_name(value: str) -> bool:
    groups = value.split("=")
    return len(groups) <= 3 and all(
        len(group) <= _NAME_GROUP_CHARS_MAX and group.count("^") <= 4 for group in groups
    )
