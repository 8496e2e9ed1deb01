"""Reads the query strings of QIDO-RS (PS3.18 8.3.4, 10.6.1): matching keys by keyword, tag or dotted path,
what to return besides, and paging. It asks nobody and knows no HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from archive.catalog import BY_KEYWORD, COMPUTED
from archive.errors import InvalidQuery
from archive.model import LITERAL, Level, Rules

VALUE_CHARS_MAX = 65_536  # a list of UIDs; uvicorn bounds the whole request line
UIDS_MAX = 1_000
KEYS_MAX = 64
ORDER = (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE)
SWITCHES = ("fuzzymatching", "emptyvaluematching", "multiplevaluematching")  # PS3.18 8.3.4.2, .5 and .6


@dataclass(frozen=True, slots=True)
class Asked:
    """A query string, read: matching keys, what to return besides, and what could not be done with it."""

    keys: tuple[tuple[str, str], ...]
    includefield: set[str] | Literal["all"]
    limit: int | None
    offset: int
    rules: Rules = LITERAL
    warnings: list[str] = field(default_factory=list)


def read(parameters: Iterable[tuple[str, str]], level: Level) -> Asked:
    """Reads the parameters by PS3.18 8.3.4 and 10.6.1. A keyword that is none, a duplicate, or a value that
    can't be one is InvalidQuery; an attribute that is not indexed at this level matches nothing and is
    warned of."""
    keys: dict[str, str] = {}
    seen: set[str] = set()
    fields: list[str] = []
    numbers: dict[str, int] = {}
    switches: dict[str, bool] = {}
    warnings: list[str] = []
    for name, value in parameters:
        if len(value) > VALUE_CHARS_MAX or len(seen) > KEYS_MAX:
            raise InvalidQuery("a query that is too long")
        lowered = name.lower()
        if lowered == "includefield":
            fields += [part.strip() for part in value.split(",") if part.strip()]
            continue
        attribute = lowered if lowered in ("limit", "offset", "accept", *SWITCHES) else keyword_of(name)
        if attribute in seen:
            raise InvalidQuery(f"{attribute} is given twice")
        seen.add(attribute)
        if attribute in ("limit", "offset"):
            numbers[attribute] = _number(attribute, value)
        elif attribute in SWITCHES:
            switches[attribute] = _switch(attribute, value)
        elif attribute != "accept":
            if can_match(attribute, level):
                keys[attribute] = _value(attribute, value)
            elif value:
                warnings.append(
                    f"The attribute {attribute} is not supported for matching here and was ignored."
                )
    rules = Rules(
        fuzzy_names=switches.get("fuzzymatching", False),
        empty_values=switches.get("emptyvaluematching", False),
        multiple_values=switches.get("multiplevaluematching", False),
    )
    return Asked(
        tuple(keys.items()), _fields(fields), numbers.get("limit"), numbers.get("offset", 0), rules, warnings
    )


def keyword_of(name: str) -> str:
    """The keyword path of an attribute's name: keywords or 8-digit tags, dotted for sequences. A tag
    without an entry in the dictionary stays a tag: it is known syntax, and matches nothing."""
    return ".".join(_one_keyword(part, name) for part in name.split("."))


def _one_keyword(part: str, name: str) -> str:
    if len(part) == 8 and all(c in "0123456789abcdefABCDEF" for c in part):
        return keyword_for_tag(int(part, 16)) or part.upper()
    if not part.isascii() or not part.isalnum() or tag_for_keyword(part) is None:
        raise InvalidQuery(f"unknown parameter {name[:64]!r}")
    return part


def can_match(keyword: str, level: Level) -> bool:
    """Whether a key is indexed at this level or above it."""
    entry = BY_KEYWORD.get(keyword)
    known = entry.level if entry is not None else COMPUTED.get(keyword)
    return known is not None and ORDER.index(known) <= ORDER.index(level)


def _value(keyword: str, value: str) -> str:
    """Lists are for UIDs alone; OHIF joins them by backslashes too."""
    if _is_uid_key(keyword):
        uids = [uid.strip() for uid in value.replace(",", "\\").split("\\") if uid.strip()]
        if len(uids) > UIDS_MAX:
            raise InvalidQuery(f"a list of more than {UIDS_MAX} UIDs")
        return "\\".join(uids)
    return value


def _is_uid_key(keyword: str) -> bool:
    tag = tag_for_keyword(keyword.rpartition(".")[2])
    return tag is not None and dictionary_VR(tag) == "UI"


def _number(name: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise InvalidQuery(f"{name} is not a number")
    return int(value)


def _switch(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise InvalidQuery(f"{name} is neither true nor false")
    return value.lower() == "true"


def _fields(names: Sequence[str]) -> set[str] | Literal["all"]:
    if "all" in names:
        if len(names) > 1:
            raise InvalidQuery("includefield=all stands alone")
        return "all"
    return {keyword_of(name) for name in names}
