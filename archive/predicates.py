"""What may be asked of an attribute, as predicates, and what each means. `matching.py` makes them of keys,
`index/conditions.py` says the same in SQL. Stored values are strings in the form that `folding.comparable`
gives, several joined by a backslash; "" is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from archive.folding import SEPARATOR, folded_name

ITEMS_MAX = 32  # of a sequence that are looked at together
WORD_ENDS = (SEPARATOR, "^", " ", "-")  # what a word of a folded name stands after

_WORDS = re.compile("[" + re.escape("".join(WORD_ENDS)) + "]+")


@dataclass(frozen=True, slots=True)
class OneOf:
    """The value is one of these, exactly."""

    keyword: str
    values: tuple[str, ...]
    multiple: bool = False


@dataclass(frozen=True, slots=True)
class Like:
    """The value fits a pattern of `*` (any characters) and `?` (one), or one of several."""

    keyword: str
    patterns: tuple[str, ...]
    multiple: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """A person's name; for each of the folded patterns one of its component groups fits."""

    keyword: str
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Worded:
    """A person's name that has each of the folded words at the beginning of a word of its own, in whatever
    order, component and group; or that fits literally."""

    keyword: str
    words: tuple[str, ...]
    literally: Named


@dataclass(frozen=True, slots=True)
class Between:
    """The value's text lies between two texts, both included; an empty one is open. The bounds are such
    that the order of texts is that of the dates or times they stand for, whatever the precision."""

    keyword: str
    lower: str
    upper: str


@dataclass(frozen=True, slots=True)
class Moment:
    """Date and time together lie between two moments (PS3.18 8.3.4.1.1); an empty date is open."""

    date: str
    time: str
    lower: tuple[str, str]
    upper: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Empty:
    """There is no value; or, `within` a sequence, one of its items has none."""

    keyword: str
    within: bool = False


@dataclass(frozen=True, slots=True)
class AllOf:
    """Each of these."""

    predicates: tuple[Predicate, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """One of these."""

    predicates: tuple[Predicate, ...]


@dataclass(frozen=True, slots=True)
class SameItem:
    """One item of a sequence fits each of these (PS3.4 C.2.2.2.6); of its first 32."""

    predicates: tuple[OneOf | Like, ...]


@dataclass(frozen=True, slots=True)
class Zoned:
    """What is asked depends on the offset from UTC that is stored beside the value. `within` is what every
    row fits that fits one of these, said without an offset."""

    keyword: str
    by_offset: tuple[tuple[str, Predicate], ...]
    otherwise: Predicate
    within: Predicate | None


Predicate = OneOf | Like | Named | Worded | Between | Moment | Empty | AllOf | AnyOf | SameItem | Zoned


def matches(predicate: Predicate, value_of: Callable[[str], str]) -> bool:
    """Whether a row fits, whose stored values `value_of` gives by keyword ("" when unknown)."""
    match predicate:
        case Moment():
            return _in_moments(predicate, value_of(predicate.date), value_of(predicate.time))
        case AllOf():
            return all(matches(each, value_of) for each in predicate.predicates)
        case AnyOf():
            return any(matches(each, value_of) for each in predicate.predicates)
        case SameItem():
            return _in_one_item(predicate, value_of)
        case Zoned():
            offset = value_of(predicate.keyword)
            return matches(dict(predicate.by_offset).get(offset, predicate.otherwise), value_of)
        case _:
            return _fits(predicate, value_of(predicate.keyword))


def _fits(predicate: OneOf | Like | Named | Worded | Between | Empty, value: str) -> bool:
    if isinstance(predicate, Empty):
        return not value or (predicate.within and "" in value.split("\\"))
    if not value:
        return False
    if isinstance(predicate, Between):
        return predicate.lower <= value and (not predicate.upper or value <= predicate.upper)
    if isinstance(predicate, Named | Worded):
        return _is_named(predicate, folded_name(value))
    return any(_is_one(predicate, one) for one in (value.split("\\") if predicate.multiple else [value]))


def _is_named(predicate: Named | Worded, folded: str) -> bool:
    if isinstance(predicate, Named):
        groups = folded.strip(SEPARATOR).split(SEPARATOR)
        return all(any(fits(pattern, group) for group in groups) for pattern in predicate.groups)
    words = [word for word in _WORDS.split(folded) if word]
    by_words = all(any(fits(f"{asked}*", word) for word in words) for asked in predicate.words)
    return by_words or _is_named(predicate.literally, folded)


def _is_one(predicate: OneOf | Like, value: str) -> bool:
    if isinstance(predicate, OneOf):
        return value in predicate.values
    return any(fits(pattern, value) for pattern in predicate.patterns)


def _in_one_item(predicate: SameItem, value_of: Callable[[str], str]) -> bool:
    columns = [value_of(each.keyword).split("\\")[:ITEMS_MAX] for each in predicate.predicates]
    return any(
        all(_is_one(each, value) for each, value in zip(predicate.predicates, item, strict=True))
        for item in zip(*columns, strict=False)
    )


def _in_moments(predicate: Moment, date: str, time: str) -> bool:
    if not date:
        return False
    first_date, first_time = predicate.lower
    last_date, last_time = predicate.upper
    if first_date and (date < first_date or (date == first_date and time < first_time)):
        return False
    if not last_date or date < last_date or (date == last_date and not last_time):
        return True
    return date == last_date and time != "" and time <= last_time


def fits(pattern: str, value: str) -> bool:
    """Whether the whole value fits a pattern of `*` and `?`, in a time that grows with their product at
    most."""
    at = place = 0
    star = resume = -1
    while place < len(value):
        if at < len(pattern) and pattern[at] != "*" and pattern[at] in ("?", value[place]):
            at, place = at + 1, place + 1
        elif at < len(pattern) and pattern[at] == "*":
            star, resume, at = at, place, at + 1
        elif star >= 0:
            resume += 1
            at, place = star + 1, resume
        else:
            return False
    return pattern[at:].strip("*") == ""


def has_wildcard(text: str) -> bool:
    return "*" in text or "?" in text
