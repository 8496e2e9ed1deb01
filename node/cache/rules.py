"""Owns the file of the cache's rules (TOML): what a ward keeps on its disk however old it is, and which
priors it has fetched for the patients on its worklist. A file is taken as a whole or not at all; a mistake is
named by the rule in which it stands.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archive.errors import SettingsError
from archive.index.cached import CachedStudy
from archive.model import Match

FILE_BYTES_MAX = 1 << 20
RULES_MAX = 100
VALUES_MAX = 100  # of one key
COUNT_MAX = 100
DAY_US = 86_400 * 1_000_000

_KEEP = ("device", "modality", "days")
_PREFETCH = ("name", "for", "modality", "body_part", "years", "count", "hours", "at")
_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class KeepRule:
    """A study of which these devices (AE titles) sent something, with one of these modalities, stays until it
    was not wanted for so many days; an empty set asks for nothing."""

    devices: frozenset[str]
    modalities: frozenset[str]
    days: float

    def keeps(self, study: CachedStudy, wanted_us: int, now_us: int) -> bool:
        if self.devices and not self.devices & study.aes:
            return False
        if self.modalities and not self.modalities & study.modalities:
            return False
        return wanted_us > now_us - int(self.days * DAY_US)


@dataclass(frozen=True, slots=True)
class PrefetchRule:
    """For steps of these modalities that begin within `hours`: the patient's last `count` studies of these
    modalities and body parts, not older than `years`. `at` is the time of day at which it is done ("02:00");
    without one it is done as the worklist changes."""

    name: str
    scheduled: frozenset[str] = frozenset()
    modalities: frozenset[str] = frozenset()
    body_parts: frozenset[str] = frozenset()
    years: float = 10.0
    count: int = 5
    hours: float = 36.0
    at: str = ""

    def wants(self, modality: str) -> bool:
        """Whether it is about steps of this modality."""
        return not self.scheduled or modality in self.scheduled

    def takes(self, prior: Match, oldest_date: str) -> bool:
        """Whether the study counts, but for its body part."""
        if self.modalities and not self.modalities & set(prior.modalities):
            return False
        return prior.study.get("StudyDate", "") >= oldest_date


@dataclass(frozen=True, slots=True)
class CacheRules:
    """All rules of a node's cache."""

    keep: tuple[KeepRule, ...] = ()
    prefetch: tuple[PrefetchRule, ...] = ()


class RulesFile:
    """The file, read again when it changes. No file is no rules; one that can't be taken leaves those that
    count in force, and says so once for each change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rules = CacheRules()
        self.error = ""
        self._seen: tuple[int, int, int] | None = None

    def look(self) -> CacheRules:
        try:
            found = self.path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            self._seen, self.rules, self.error = None, CacheRules(), ""
            return self.rules
        if seen != self._seen:
            self._seen = seen
            try:
                self.rules, self.error = read_rules(self.path), ""
            except SettingsError as error:
                self.error = str(error)
        return self.rules


def read_rules(path: Path) -> CacheRules:
    """The rules of a file. Raises SettingsError."""
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
        raise SettingsError(f"{path}: {error}") from None


def parse_rules(text: str) -> CacheRules:
    """The same of a text."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsError(f"not TOML: {error}") from None
    unknown = sorted(document.keys() - {"keep", "prefetch"})
    if unknown:
        raise SettingsError(f"{unknown[0]!r}: the cache's rules are [[keep]] and [[prefetch]]")
    found: dict[str, list[Any]] = {"keep": [], "prefetch": []}
    for kind, tables in document.items():
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise SettingsError(f"a rule begins with [[{kind}]], in two brackets")
        if len(tables) > RULES_MAX:
            raise SettingsError(f"more than {RULES_MAX} rules [[{kind}]]")
        for number, table in enumerate(tables, 1):
            try:
                found[kind].append(_keep(table) if kind == "keep" else _prefetch(table, number))
            except SettingsError as error:
                raise SettingsError(f"[[{kind}]] {number}: {error}") from None
    return CacheRules(tuple(found["keep"]), tuple(found["prefetch"]))


def _keep(table: Mapping[str, Any]) -> KeepRule:
    _require_known(table, _KEEP)
    if "days" not in table:
        raise SettingsError("days: how long it is kept is needed")
    return KeepRule(
        _texts(table, "device"), _texts(table, "modality"), _number(table, "days", 0.0, 36_500.0, 0.0)
    )


def _prefetch(table: Mapping[str, Any], number: int) -> PrefetchRule:
    _require_known(table, _PREFETCH)
    name, at = table.get("name", f"rule {number}"), table.get("at", "")
    if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
        raise SettingsError("name: a text of at most 64 characters is needed")
    if not isinstance(at, str) or (at and not _TIME.fullmatch(at)):
        raise SettingsError('at: a time of day such as "02:00" is needed')
    return PrefetchRule(
        name, _texts(table, "for"), _texts(table, "modality"), _texts(table, "body_part"),
        _number(table, "years", 0.0, 150.0, 10.0), int(_number(table, "count", 1, COUNT_MAX, 5)),
        _number(table, "hours", 1.0, 14 * 24.0, 36.0), at,
    )  # fmt: skip


def _require_known(table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            raise SettingsError(f"{key}: no such key; there are {', '.join(known)}")


def _texts(table: Mapping[str, Any], key: str) -> frozenset[str]:
    value = table.get(key, [])
    values = value if isinstance(value, list) else [value]
    if len(values) > VALUES_MAX or not all(isinstance(one, str) and one.strip() for one in values):
        raise SettingsError(f"{key}: a text, or a list of at most {VALUES_MAX}, is needed")
    return frozenset(one.strip() for one in values)


def _number(table: Mapping[str, Any], key: str, minimum: float, maximum: float, default: float) -> float:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= maximum:
        raise SettingsError(f"{key}: a number from {minimum:g} to {maximum:g} is needed")
    return float(value)
