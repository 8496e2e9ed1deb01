"""Attribute matching (PS3.4 C.2.2.2), the one engine of C-FIND, worklist and QIDO-RS: keys to predicates,
and what they mean.

A key's value becomes a predicate by its VR (`predicate_of`, which knows no catalogue): universal, single
value, list of UIDs (and of codes), wildcard, range, person's name. `matches` says in Python what each means,
of values in the form that `folding.comparable` gives them; `conditions.py` says the same in SQL, and a test
holds the two equal. What the standard leaves open:

- Names (PN) match without case and accents, by component group: a key without `=` matches any group, in a
  key with `=` each group must match one. Everything else is case-sensitive (C.2.2.2.1).
- A time in a key stands for all it includes: 10 is 10:00:00.000000 to 10:59:60.999999. A stored time is its
  first moment. Dates with dots and times with colons (ACR-NEMA) are understood. A date and time (DT) with an
  offset is compared in UTC, one without as it stands.
- Of an attribute with several values, or in a sequence, any value may match. An unknown value matches only
  universal keys. A code may be given as a list, which matches when one of it does.
- Modality and SOP Class UID asked of studies are Modalities in Study and SOP Classes in Study.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from archive.catalog import BY_KEYWORD, COMPUTED, Indexed
from archive.errors import InvalidQuery
from archive.folding import (
    SEPARATOR,
    clean_date,
    clean_datetime,
    clean_integer,
    clean_time,
    fold_group,
    folded_name,
)
from archive.model import Level, Query

KEY_CHARS_MAX = 1024
LIST_VALUES_MAX = 10_000
KEYS_MAX = 100

_DEPTH = {Level.PATIENT: 0, Level.STUDY: 1, Level.SERIES: 2, Level.IMAGE: 3}
_IN_STUDY = {"Modality": "ModalitiesInStudy", "SOPClassUID": "SOPClassesInStudy"}
_IN_STUDY_VR = {"ModalitiesInStudy": "CS", "SOPClassesInStudy": "UI"}
_WILDCARD_VRS = frozenset({"AE", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT"})
_LIST_VRS = frozenset({"UI", "CS"})
_TEXT_VRS = frozenset({"LT", "ST", "UR", "UT"})  # a backslash is a character in them (PS3.5 6.2)
_INTEGER_VRS = frozenset({"IS", "US", "SS", "UL", "SL"})
_DATE = re.compile(r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", re.ASCII)
_TIME = re.compile(r"([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?", re.ASCII)
_INSTANT = (
    r"\d{4}((0[1-9]|1[0-2])((0[1-9]|[12]\d|3[01])(([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?)?)?)?"
    r"([+-](0\d|1[0-4])[0-5]\d)?"  # four digits after a hyphen are an offset where they can be one
)
_DATETIME_RANGE = re.compile(rf"(?P<lower>{_INSTANT})?((?P<dash>-)(?P<upper>{_INSTANT})?)?", re.ASCII)
_DATED = {
    "StudyDate": "StudyTime",
    "SeriesDate": "SeriesTime",
    "ContentDate": "ContentTime",
    "AcquisitionDate": "AcquisitionTime",
    "PatientBirthDate": "PatientBirthTime",
    "PerformedProcedureStepStartDate": "PerformedProcedureStepStartTime",
}


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


Predicate = OneOf | Like | Named | Between | Moment


def parse(query: Query) -> tuple[Predicate, ...]:
    """What `query` asks of a row at its level; nothing for universal keys. InvalidQuery for a keyword that
    is not indexed, a key below the level, and a value that its VR does not allow."""
    if len(query.keys) > KEYS_MAX:
        raise InvalidQuery(f"more than {KEYS_MAX} keys")
    predicates: list[Predicate] = []
    for keyword, value in query.keys:
        predicate = _predicate(query.level, keyword, value)
        if predicate is not None:
            predicates.append(predicate)
    return tuple(_combined(predicates) if query.combine_datetime else predicates)


def predicate_of(keyword: str, vr: str, value: str, *, multiple: bool = False) -> Predicate | None:
    """What a key with this value asks of an attribute of this VR; None for a universal key. `multiple` says
    that the attribute may hold several values, joined by backslashes. InvalidQuery for what the VR does not
    allow; `keyword` is what the predicate calls the attribute, and need be in no catalogue."""
    value = _stripped(value)
    if _is_universal(value):
        return None
    values = [one.strip() for one in value.split("\\")] if vr not in _TEXT_VRS else [value]
    values = [one for one in values if one]
    if not values or len(values) > (LIST_VALUES_MAX if vr in _LIST_VRS else 1):
        raise InvalidQuery(f"{keyword}: a list of values is for UIDs and codes, up to {LIST_VALUES_MAX}")
    if not all(one.strip("*") for one in values):
        return None  # a list with a universal key in it
    if max(map(len, values)) > KEY_CHARS_MAX:
        raise InvalidQuery(f"{keyword}: a value is longer than {KEY_CHARS_MAX} characters")
    if vr == "PN":
        return _name(keyword, values[0])
    if vr == "DA":
        return _date(keyword, values[0])
    if vr == "TM":
        return _time(keyword, values[0])
    if vr == "DT":
        return _datetime(keyword, values[0])
    if any(map(has_wildcard, values)):
        if vr not in _WILDCARD_VRS:
            raise InvalidQuery(f"{keyword}: no wildcards in {vr} (PS3.4 C.2.2.2.4)")
        return Like(keyword, tuple(re.sub(r"\*+", "*", one) for one in values), multiple)
    if vr in _INTEGER_VRS:
        values = [clean_integer(one) for one in values]
        if not re.fullmatch(r"-?\d{1,16}", values[0], re.ASCII):
            raise InvalidQuery(f"{keyword}: not an integer")
    return OneOf(keyword, tuple(values), multiple)


def matches(predicate: Predicate, value_of: Callable[[str], str]) -> bool:
    """Whether a row fits, whose stored values `value_of` gives by keyword ("" when unknown)."""
    if isinstance(predicate, Moment):
        return _in_moments(predicate, value_of(predicate.date), value_of(predicate.time))
    value = value_of(predicate.keyword)
    if not value:
        return False
    if isinstance(predicate, Between):
        return predicate.lower <= value and (not predicate.upper or value <= predicate.upper)
    if isinstance(predicate, Named):
        groups = folded_name(value).strip(SEPARATOR).split(SEPARATOR)
        return all(any(fits(pattern, group) for group in groups) for pattern in predicate.groups)
    values = value.split("\\") if predicate.multiple else [value]
    if isinstance(predicate, OneOf):
        return any(one in predicate.values for one in values)
    return any(fits(pattern, one) for pattern in predicate.patterns for one in values)


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


def _predicate(level: Level, keyword: str, value: str) -> Predicate | None:
    entry = BY_KEYWORD.get(keyword)
    if entry is None and keyword not in COMPUTED:
        raise InvalidQuery(f"{keyword[:64]!r} is not a key that is indexed here")
    if _is_universal(_stripped(value)):
        return None
    if level is Level.STUDY and keyword in _IN_STUDY:
        keyword, entry = _IN_STUDY[keyword], None
    own_level = COMPUTED[keyword] if entry is None else entry.level
    if _DEPTH[own_level] > _DEPTH[level]:
        raise InvalidQuery(f"{keyword} is no key at {level.value} level")
    if entry is None:
        vr = _IN_STUDY_VR.get(keyword)
        if vr is None:
            raise InvalidQuery(f"{keyword} can be asked for, not matched on")
        return predicate_of(keyword, vr, value, multiple=True)
    return predicate_of(keyword, entry.vr, value, multiple=_several(entry))


def _stripped(value: str) -> str:
    return value.replace("\x00", "").strip()


def _is_universal(value: str) -> bool:
    """Nothing, or stars alone (PS3.4 C.2.2.2.3, C.2.2.2.4)."""
    return not value.strip("*")


def _several(entry: Indexed) -> bool:
    return entry.multiple and entry.vr not in _TEXT_VRS


def _name(keyword: str, value: str) -> Predicate:
    groups = (re.sub(r"\*+", "*", fold_group(group)) for group in value.split(SEPARATOR))
    asked = tuple(group for group in groups if group.strip("*"))
    if not asked:
        raise InvalidQuery(f"{keyword}: no name in it")
    return Named(keyword, asked)


def _date(keyword: str, value: str) -> Predicate:
    lower, upper = _ends(keyword, value)
    lower, upper = clean_date(lower), clean_date(upper)
    for date in (lower, upper):
        if date and not _DATE.fullmatch(date):
            raise InvalidQuery(f"{keyword}: a date is YYYYMMDD, a range YYYYMMDD-YYYYMMDD")
    return OneOf(keyword, (lower,)) if lower == upper else Between(keyword, lower, upper)


def _time(keyword: str, value: str) -> Predicate:
    lower, upper = _ends(keyword, value)
    lower, upper = clean_time(lower), clean_time(upper)
    for time in (lower, upper):
        if time and not _TIME.fullmatch(time):
            raise InvalidQuery(f"{keyword}: a time is HH, HHMM, HHMMSS or HHMMSS.FFFFFF, or a range of them")
    return Between(keyword, _first_moment(lower), _last_moment(upper))


def _datetime(keyword: str, value: str) -> Predicate:
    ends = _DATETIME_RANGE.fullmatch(value.replace(" ", ""))
    if ends is None or not (ends["lower"] or ends["upper"]):
        raise InvalidQuery(f"{keyword}: a date and time is YYYYMMDDHHMMSS.FFFFFF&ZZXX, or a range of them")
    lower = ends["lower"] or ""
    upper = lower if ends["dash"] is None else ends["upper"] or ""
    return Between(keyword, _first_instant(clean_datetime(lower)), _last_instant(clean_datetime(upper)))


def _ends(keyword: str, value: str) -> tuple[str, str]:
    """Both ends of a range, the same twice for a single value, "" for an open end."""
    lower, dash, upper = (part.strip() for part in value.partition("-"))
    if not dash:
        return value, value
    if not lower and not upper:
        raise InvalidQuery(f"{keyword}: a range has at least one end")
    return lower, upper


def _first_moment(time: str) -> str:
    """The shortest text of the same moment: no stored text of it, or of a later one, is less."""
    if "." in time:
        time = time.rstrip("0").rstrip(".")
    while len(time) in (4, 6) and time.endswith("00"):
        time = time[:-2]
    return time


def _last_moment(time: str) -> str:
    """The last moment that `time` includes; a stored text of less precision is its beginning, and so not
    greater."""
    if not time:
        return ""
    if "." in time:
        return time.ljust(13, "9")
    return time + "5960.999999"[{2: 0, 4: 2, 6: 4}[len(time)] :]


def _first_instant(moment: str) -> str:
    """The shortest text of the moment at which a date and time begins."""
    if len(moment) > 8:
        moment = moment[:8] + _first_moment(moment[8:])
        moment = moment[:8] if moment[8:] == "00" else moment
    while len(moment) in (6, 8) and moment.endswith("01"):
        moment = moment[:-2]
    return moment


def _last_instant(moment: str) -> str:
    """The last moment that a date and time includes."""
    if not moment:
        return ""
    return moment.ljust(21, "9") if "." in moment else moment + "99991231235960.999999"[len(moment) :]


def _combined(predicates: list[Predicate]) -> list[Predicate]:
    """Date and time of the same event as one range, where one of them is a range."""
    by_keyword = {p.keyword: p for p in predicates if isinstance(p, Between | OneOf)}
    for date_keyword, time_keyword in _DATED.items():
        date, time = by_keyword.get(date_keyword), by_keyword.get(time_keyword)
        if date is None or not isinstance(time, Between):
            continue
        lower, upper = (date.lower, date.upper) if isinstance(date, Between) else (date.values[0],) * 2
        moment = Moment(date_keyword, time_keyword, (lower, time.lower), (upper, time.upper))
        predicates = [p for p in predicates if p is not date and p is not time] + [moment]
    return predicates


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
