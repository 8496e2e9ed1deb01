"""Owns the file of routing rules (TOML): reads it, and says of each mistake in which line and rule it stands.
A file is taken as a whole or not at all."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import tag_for_keyword

from archive.catalog import BY_KEYWORD, COMPUTED
from archive.errors import InvalidQuery, SettingsError
from archive.hours import Hours
from archive.ledger import Destination, RouteKind
from archive.matching import parse
from archive.model import Level, Query, is_uid
from archive.predicates import Predicate
from node.routing.rules import (
    RANKS,
    RETRY_DAYS,
    SOURCES,
    AttributeIs,
    Condition,
    ReceivedIn,
    Rule,
    SourceIs,
    When,
)
from node.settings import AE_LENGTH_MAX

FILE_BYTES_MAX = 1 << 20
RULES_MAX = 200
DESTINATIONS_MAX = 16   # of one rule
CONDITIONS_MAX = 64     # of one rule
VALUES_MAX = 1_000      # of one condition
NAME_CHARS_MAX = 64
DELAY_S_MAX = 30 * 86_400.0
RETRY_DAYS_MAX = 365.0

_KEYS = ("name", "when", "to", "ward", "notify", "match", "not", "commit", "priority", "delay_s", "hours",
         "retry_days", "urgent")
_MATCHED = (*BY_KEYWORD, "ModalitiesInStudy", "SOPClassesInStudy")
_WARD = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*/[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_UID_NAMES = {entry[4]: uid for uid, entry in UID_dictionary.items() if entry[4]}
_RULE_LINE = re.compile(r"\s*\[\[\s*rule\s*\]\]")
_TABLE_LINE = re.compile(r"\s*\[\s*rule\s*\.\s*(\w+)\s*\]")
_KEY_LINE = re.compile(r"\s*(\"[^\"]+\"|'[^']+'|[\w.-]+)\s*=")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rule stands in the file: its first line, and that of each of its keys."""

    line: int
    keys: Mapping[str, int]


class _Mistake(Exception):
    """A value of a rule that can't be: `key` says which."""

    def __init__(self, key: str, words: str) -> None:
        super().__init__(words)
        self.key = key


def read_rules(path: Path) -> tuple[Rule, ...]:
    """The rules of a file, in its order. Raises SettingsError with a line for each mistake."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    if len(raw) > FILE_BYTES_MAX:
        raise SettingsError(f"{path}: larger than {FILE_BYTES_MAX} bytes")
    try:
        return parse_rules(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not UTF-8") from None
    except SettingsError as error:
        raise SettingsError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def parse_rules(text: str) -> tuple[Rule, ...]:
    """The same of a text."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"not TOML: {error}") from None
    except RecursionError:
        raise SettingsError("not TOML that is taken: nested too deeply") from None
    tables = document.pop("rule", [])
    if document:
        raise SettingsError(f"{sorted(document)[0]!r}: a file of rules holds [[rule]] and nothing else")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError("a rule begins with [[rule]], in two brackets")
    if len(tables) > RULES_MAX:
        raise SettingsError(f"more than {RULES_MAX} rules")
    places = _places(text)
    rules: list[Rule] = []
    mistakes: list[str] = []
    for number, table in enumerate(tables, 1):
        place = places[number - 1] if len(places) == len(tables) else None
        name = table.get("name")
        called = f"rule {number}" + (f" {name!r}" if isinstance(name, str) and name else "")
        try:
            rule = _rule(table)
            if any(rule.name == other.name for other in rules):
                raise _Mistake("name", "another rule has this name")
            rules.append(rule)
        except _Mistake as mistake:
            line = None if place is None else place.keys.get(mistake.key, place.line)
            where = "" if line is None else f"line {line}, "
            mistakes.append(f"{where}{called}: {mistake.key}: {mistake}")
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return tuple(rules)


def _places(text: str) -> list[_Place]:
    """Where each rule stands, as far as the lines show it: only for words to people."""
    places: list[_Place] = []
    keys: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), 1):
        if _RULE_LINE.match(line):
            keys, prefix = {}, ""
            places.append(_Place(number, keys))
        elif found := _TABLE_LINE.match(line):
            prefix = f"{found[1]}."
            keys.setdefault(found[1], number)
        elif found := _KEY_LINE.match(line):
            keys.setdefault(prefix + found[1].strip("\"'"), number)
    return places


def _rule(table: Mapping[str, Any]) -> Rule:
    for key in table:
        if key not in _KEYS:
            raise _Mistake(key, f"no such key{_meant(key, _KEYS)}")
    name = _text(table, "name", "")
    if not name or len(name) > NAME_CHARS_MAX or not name.isprintable():
        raise _Mistake("name", f"a rule needs a name, of at most {NAME_CHARS_MAX} characters")
    when = _choice(table, "when", When.STORED, [one.value for one in When])
    to = tuple(dict.fromkeys(_destinations(table)))
    urgent = _flag(table, "urgent")
    if not to and not urgent:
        raise _Mistake("to", "a rule needs a destination: to, ward or notify; or urgent = true")
    if len(to) > DESTINATIONS_MAX:
        raise _Mistake("to", f"more than {DESTINATIONS_MAX} destinations")
    if when == When.STORED and any(one.kind is RouteKind.NOTICE for one in to):
        raise _Mistake("notify", "a notice is of a study: it needs when = \"study complete\"")
    commit = _flag(table, "commit")
    if commit and not any(one.kind is RouteKind.DEVICE for one in to):
        raise _Mistake("commit", "only a device can be asked to commit: there is no `to`")
    return Rule(
        name=name, when=When(when), to=to, match=_conditions(table, "match"),
        exclude=_conditions(table, "not"), commit=commit,
        rank=RANKS[_choice(table, "priority", "normal", list(RANKS))],
        delay_s=_number(table, "delay_s", 0.0, 0.0, DELAY_S_MAX),
        hours=_hours(table, "hours"),
        retry_days=_number(table, "retry_days", RETRY_DAYS, 0.0, RETRY_DAYS_MAX), urgent=urgent,
    )  # fmt: skip


def _destinations(table: Mapping[str, Any]) -> Iterator[Destination]:
    for key, kind in (("to", RouteKind.DEVICE), ("ward", RouteKind.WARD), ("notify", RouteKind.NOTICE)):
        for name in _texts(key, table.get(key, [])):
            if kind is RouteKind.WARD and not _WARD.fullmatch(name):
                raise _Mistake(key, f"{name!r} is no ward: write hospital/ward")
            if kind is not RouteKind.WARD and (not 0 < len(name) <= AE_LENGTH_MAX or "\\" in name):
                raise _Mistake(key, f"{name!r} is no AE title (PS3.5 6.2)")
            yield Destination(kind, name)


def _conditions(table: Mapping[str, Any], key: str) -> tuple[Condition, ...]:
    given = table.get(key, {})
    if not isinstance(given, dict):
        raise _Mistake(key, f"a table is needed: [rule.{key}]")
    flat = dict(_flat(given))
    if len(flat) > CONDITIONS_MAX:
        raise _Mistake(key, f"more than {CONDITIONS_MAX} conditions")
    return tuple(_condition(f"{key}.{name}", name, value) for name, value in flat.items())


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths into sequences, quoted or not."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _condition(key: str, name: str, value: Any) -> Condition:
    if name == "received":
        hours = _hours({key: value}, key)
        assert hours is not None
        return ReceivedIn(hours)
    texts = _texts(key, value)
    if not texts:
        raise _Mistake(key, "a value is needed")
    if name in SOURCES:
        return SourceIs(name, tuple(_source_value(key, name, text) for text in texts), texts)
    if name not in _MATCHED:
        known = (*_MATCHED, *SOURCES, "received")
        there = name in COMPUTED or tag_for_keyword(name.rpartition(".")[2]) is not None
        words = "is not indexed here" if there else "is no condition"
        raise _Mistake(key, f"{words}{_meant(name, known)}")
    predicates: list[Predicate] = []
    for text in texts:
        try:
            found = parse(Query(Level.IMAGE, ((name, _uid_or(name, text)),)))
        except InvalidQuery as error:
            raise _Mistake(key, str(error)) from None
        if not found:
            raise _Mistake(key, f"{text!r} is met by everything: leave the condition out")
        predicates += found
    return AttributeIs(name, texts, tuple(predicates))


def _source_value(key: str, name: str, text: str) -> str:
    if name not in ("sop_class", "transfer_syntax"):
        return text
    uid = _UID_NAMES.get(text, text)
    if not is_uid(uid):
        raise _Mistake(key, f"{text!r} is neither a UID nor a keyword of PS3.6 A{_meant(text, _UID_NAMES)}")
    return uid


def _uid_or(name: str, text: str) -> str:
    """The standard's name of a SOP class stands for its UID."""
    return _UID_NAMES.get(text, text) if name in ("SOPClassUID", "SOPClassesInStudy") else text


def _texts(key: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if len(values) > VALUES_MAX:
        raise _Mistake(key, f"more than {VALUES_MAX} values")
    if any(isinstance(one, bool) or not isinstance(one, str | int) for one in values):
        raise _Mistake(key, "a text, or a list of texts, is needed")
    texts = tuple(str(one).strip() for one in values)
    if not all(texts):
        raise _Mistake(key, "an empty text stands for nothing")
    return texts


def _text(table: Mapping[str, Any], key: str, default: str) -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise _Mistake(key, "a text is needed")
    return value.strip()


def _choice(table: Mapping[str, Any], key: str, default: str, choices: list[str]) -> str:
    value = _text(table, key, default)
    if value not in choices:
        raise _Mistake(key, f"one of {', '.join(choices)} is needed")
    return value


def _flag(table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise _Mistake(key, "true or false is needed")
    return value


def _number(table: Mapping[str, Any], key: str, default: float, minimum: float, maximum: float) -> float:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= maximum:
        raise _Mistake(key, f"a number from {minimum:g} to {maximum:g} is needed")
    return float(value)


def _hours(table: Mapping[str, Any], key: str) -> Hours | None:
    if key not in table:
        return None
    try:
        return Hours.parse(_text(table, key, ""))
    except ValueError as error:
        raise _Mistake(key, str(error)) from None


def _meant(word: str, known: Any) -> str:
    near: Callable[..., list[str]] = difflib.get_close_matches
    found = near(word, list(known), 1, 0.75)
    return f"; did you mean {found[0]!r}?" if found else ""
