"""Keys of an identifier whose attributes lie in sequences (PS3.4 C.2.2.2.6, K.4.1): what is asked of a data
set in the DICOM JSON model, whether one fits, and the answer with what was asked for. What a single value
means, `archive/matching.py` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydicom.datadict import keyword_for_tag

from archive.dataset.jsonsets import Attributes, items_of, text_of, vr_of
from archive.errors import InvalidQuery
from archive.folding import comparable
from archive.matching import predicate_of
from archive.predicates import Between, Moment, OneOf, Predicate, matches

KEYS_MAX = 512
DEPTH_MAX = 8

_CHARACTER_SET = "00080005"
_TIMEZONE = "00080201"
_LEVEL = "00080052"  # a worklist has one (K.4.1.1), and some modalities say it all the same
_NOT_KEYS = frozenset({_CHARACTER_SET, _TIMEZONE, _LEVEL})
_ONE_VALUE_VRS = frozenset({"LT", "ST", "UR", "UT"})
_MULTIPLE_VRS = frozenset({
    "AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "PN", "SH", "SL", "SS", "SV", "TM", "UC", "UI", "UL",
    "US", "UV",
})  # fmt: skip
_COMPARED_VRS = frozenset({"DA", "TM", "DT", "IS"})  # in another form than as they stand


@dataclass(frozen=True, slots=True)
class Key:
    """One attribute that is asked for: by a predicate (None for universal matching), or, of a sequence, by
    the keys of its one item (None when the whole sequence is asked for)."""

    tag: str
    vr: str
    predicate: Predicate | None = None
    items: Keys | None = None


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a data set or of an item. `moments` are dates and times that are one range together;
    `unmatched` says that some key's value is not matched on, here or further down."""

    keys: tuple[Key, ...]
    moments: tuple[Moment, ...] = ()
    unmatched: bool = False
    by_tag: Mapping[str, Key] = field(default_factory=dict)

    def inside(self, tag: str) -> Keys:
        """The keys within a sequence; none when it is not asked for, or as a whole."""
        key = self.by_tag.get(tag)
        return key.items if key is not None and key.items is not None else NOTHING


NOTHING = Keys(())


def keys_of(identifier: Attributes, *, combined: Sequence[tuple[str, str]] = (), depth: int = 0) -> Keys:
    """The keys of an identifier. `combined` are the tags of dates and times whose ranges are one. Raises
    InvalidQuery for what a VR does not allow, for several items in a key and for too much of it."""
    if len(identifier) > KEYS_MAX or depth > DEPTH_MAX:
        raise InvalidQuery(f"more than {KEYS_MAX} keys, or deeper than {DEPTH_MAX} sequences")
    keys: list[Key] = []
    unmatched = False
    for tag, element in identifier.items():
        if tag in _NOT_KEYS or tag.endswith("0000"):
            continue
        key, understood = _key(tag, element, combined, depth)
        unmatched |= not understood
        keys.append(key)
    unmatched |= any(key.items.unmatched for key in keys if key.items is not None)
    keys, moments = _combined(keys, combined)
    return Keys(tuple(keys), moments, unmatched, {key.tag: key for key in keys})


def _key(
    tag: str, element: Mapping[str, Any], combined: Sequence[tuple[str, str]], depth: int
) -> tuple[Key, bool]:
    """A key, and whether its value can be matched on."""
    vr = vr_of(tag, element)
    if vr == "SQ":
        items = items_of({tag: element}, tag)
        if len(items) > 1:
            raise InvalidQuery("a sequence key has more than one item (PS3.4 C.2.2.2.6)", _keyword(tag))
        inner = keys_of(items[0], combined=combined, depth=depth + 1) if items and items[0] else None
        return Key(tag, vr, items=inner), True
    text = text_of({tag: element}, tag)
    if vr not in _MULTIPLE_VRS | _ONE_VALUE_VRS:
        return Key(tag, vr), not text and "InlineBinary" not in element
    try:
        return Key(tag, vr, predicate_of(tag, vr, text, multiple=vr in _MULTIPLE_VRS)), True
    except InvalidQuery as error:
        raise InvalidQuery(str(error), _keyword(tag)) from None


def _keyword(tag: str) -> str:
    return keyword_for_tag(int(tag, 16))


def _combined(
    keys: list[Key], combined: Sequence[tuple[str, str]]
) -> tuple[list[Key], tuple[Moment, ...]]:
    """A date range and a time range of the same event as one span."""
    moments: list[Moment] = []
    by_tag = {key.tag: key for key in keys}
    for date_tag, time_tag in combined:
        date = by_tag[date_tag].predicate if date_tag in by_tag else None
        time = by_tag[time_tag].predicate if time_tag in by_tag else None
        if not isinstance(time, Between) or not isinstance(date, Between | OneOf):
            continue
        lower, upper = (date.lower, date.upper) if isinstance(date, Between) else (date.values[0],) * 2
        moments.append(Moment(date_tag, time_tag, (lower, time.lower), (upper, time.upper)))
        keys = [Key(key.tag, key.vr) if key.tag in (date_tag, time_tag) else key for key in keys]
    return keys, tuple(moments)


def fits(keys: Keys, attributes: Attributes) -> bool:
    """Whether a data set matches every key. A sequence matches when one of its items does (PS3.4
    C.2.2.2.6)."""

    def value_of(tag: str) -> str:
        text = text_of(attributes, tag)
        vr = vr_of(tag, attributes[tag]) if text else ""
        return "\\".join(comparable(vr, part) for part in text.split("\\")) if vr in _COMPARED_VRS else text

    for key in keys.keys:
        if key.predicate is not None and not matches(key.predicate, value_of):
            return False
        if (key.items is not None and asks(key.items)
                and not any(fits(key.items, item) for item in items_of(attributes, key.tag))):
            return False
    return all(matches(moment, value_of) for moment in keys.moments)


def asks(keys: Keys) -> bool:
    """Whether anything but universal matching is among the keys."""
    return bool(keys.moments) or any(
        key.predicate is not None or (key.items is not None and asks(key.items)) for key in keys.keys
    )


def answered(keys: Keys, attributes: Attributes) -> dict[str, Any]:
    """What was asked for, and nothing else: without value where nothing is known (PS3.4 K.6.1.2.2, return
    keys of type 1 and 2). Of a sequence every item, as far as it was asked for."""
    answer: dict[str, Any] = {}
    for key in keys.keys:
        if key.vr == "SQ":
            items: list[Any] = items_of(attributes, key.tag)
            if key.items is not None:
                items = [answered(key.items, item) for item in items]
            answer[key.tag] = {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}
        else:
            known = attributes.get(key.tag)
            answer[key.tag] = known if known is not None else {"vr": key.vr}
    return answer
