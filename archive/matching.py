"""Attribute matching (PS3.4 C.2.2.2), the one engine of C-FIND, worklist and QIDO-RS: keys to predicates.

A key's value becomes a predicate by its VR (`predicate_of`, which knows no catalogue): universal, single
value, list of UIDs (and of codes), wildcard, range, person's name. `predicates.py` says what each means, of
values in the form that `folding.comparable` gives them; `conditions.py` says the same in SQL, and a test
holds the two equal. What the standard leaves open:

- Names (PN) match without case and accents, by component group: a key without `=` matches any group, in a
  key with `=` each group must match one. Everything else is case-sensitive (C.2.2.2.1).
- A time in a key stands for all it includes: 10 is 10:00:00.000000 to 10:59:60.999999. A stored time is its
  first moment. Dates with dots and times with colons (ACR-NEMA) are understood. A date and time (DT) with an
  offset is compared in UTC, one without as it stands.
- Of an attribute with several values, or in a sequence, any value may match; keys into one sequence are met
  by one of its items. An unknown value matches only universal keys. A code may be given as a list, which
  matches when one of it does, or, where multiple values were agreed on and the attribute may have several,
  when all do.
- Fuzzy, where that was agreed on: each word of the key begins a word of the name, in whatever order and
  group, without case and accents; and whatever matches literally matches. There is no phonetic code in it:
  they are made for one language each.
- Empty values are asked for by two quotation marks, where that was agreed on.
- Modality and SOP Class UID asked of studies are Modalities in Study and SOP Classes in Study.
"""

from __future__ import annotations

import re
from dataclasses import replace

from archive.catalog import BY_KEYWORD, COMPUTED, Indexed
from archive.errors import InvalidQuery
from archive.folding import (
    SEPARATOR,
    clean_date,
    clean_datetime,
    clean_integer,
    clean_time,
    first_moment,
    fold,
    fold_group,
)
from archive.model import LITERAL, Level, Query, Rules
from archive.predicates import (
    WORD_ENDS,
    AllOf,
    Between,
    Empty,
    Like,
    Moment,
    Named,
    OneOf,
    Predicate,
    SameItem,
    Worded,
    fits,
    has_wildcard,
    matches,
)
from archive.zoning import ADJUSTED, zoned

__all__ = ["Predicate", "fits", "matches", "parse", "predicate_of"]

KEY_CHARS_MAX = 1024
LIST_VALUES_MAX = 10_000
LIST_VALUES_EACH_MAX = 100
NAME_WORDS_MAX = 16
KEYS_MAX = 100

_DEPTH = {Level.PATIENT: 0, Level.STUDY: 1, Level.SERIES: 2, Level.IMAGE: 3}
_IN_STUDY = {"Modality": "ModalitiesInStudy", "SOPClassUID": "SOPClassesInStudy"}
_IN_STUDY_VR = {"ModalitiesInStudy": "CS", "SOPClassesInStudy": "UI"}
_WILDCARD_VRS = frozenset({"AE", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT"})
_LIST_VRS = frozenset({"UI", "CS"})
_TEXT_VRS = frozenset({"LT", "ST", "UR", "UT"})  # a backslash is a character in them (PS3.5 6.2)
_INTEGER_VRS = frozenset({"IS", "US", "SS", "UL", "SL"})
_EACH_VRS = frozenset({"AE", "AS", "CS", "LO", "PN", "SH", "UC"})  # PS3.4 C.2.2.2.8
_EMPTY = '""'
_DATE = re.compile(r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", re.ASCII)
_TIME = re.compile(r"([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?", re.ASCII)
_INSTANT = (
    r"\d{4}((0[1-9]|1[0-2])((0[1-9]|[12]\d|3[01])(([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?)?)?)?"
    r"([+-](0\d|1[0-4])[0-5]\d)?"  # four digits after a hyphen are an offset where they can be one
)
_DATETIME_RANGE = re.compile(rf"(?P<lower>{_INSTANT})?((?P<dash>-)(?P<upper>{_INSTANT})?)?", re.ASCII)
_DATED = {**ADJUSTED, "PatientBirthDate": "PatientBirthTime"}


def parse(query: Query) -> tuple[Predicate, ...]:
    """What `query` asks of a row at its level; nothing for universal keys. InvalidQuery for a keyword that
    is not indexed, a key below the level, and a value that its VR does not allow."""
    if len(query.keys) > KEYS_MAX:
        raise InvalidQuery(f"more than {KEYS_MAX} keys")
    predicates: list[Predicate] = []
    for keyword, value in query.keys:
        try:
            predicate = _predicate(query.level, keyword, value, query.rules)
        except InvalidQuery as error:
            raise InvalidQuery(str(error), keyword) from None
        if predicate is not None:
            predicates.append(predicate)
    predicates = _by_item(predicates)
    if query.combine_datetime:
        predicates = _combined(predicates)
    return tuple(zoned(predicates, query.rules.timezone) if query.rules.timezone else predicates)


def predicate_of(
    keyword: str, vr: str, value: str, *, multiple: bool = False, rules: Rules = LITERAL
) -> Predicate | None:
    """What a key with this value asks of an attribute of this VR; None for a universal key. `multiple` says
    that the attribute may hold several values, joined by backslashes. InvalidQuery for what the VR does not
    allow; `keyword` is what the predicate calls the attribute, and need be in no catalogue. The timezone of
    `rules` is not looked at: it takes more than one attribute."""
    value = _stripped(value)
    if _is_universal(value):
        return None
    if rules.empty_values and value == _EMPTY:
        return Empty(keyword, "." in keyword)
    if rules.multiple_values and multiple and vr in _EACH_VRS and "\\" in value:
        return _each(keyword, vr, value, rules)
    values = [one.strip() for one in value.split("\\")] if vr not in _TEXT_VRS else [value]
    values = [one for one in values if one]
    if not values or len(values) > (LIST_VALUES_MAX if vr in _LIST_VRS else 1):
        raise InvalidQuery(f"{keyword}: a list of values is for UIDs and codes, up to {LIST_VALUES_MAX}")
    if not all(one.strip("*") for one in values):
        return None  # a list with a universal key in it
    if max(map(len, values)) > KEY_CHARS_MAX:
        raise InvalidQuery(f"{keyword}: a value is longer than {KEY_CHARS_MAX} characters")
    if vr == "PN":
        name = _name(keyword, values[0])
        return _worded(name, values[0]) if rules.fuzzy_names else name
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


def _predicate(level: Level, keyword: str, value: str, rules: Rules) -> Predicate | None:
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
        return predicate_of(keyword, vr, value, multiple=True, rules=rules)
    if len(entry.path) > 1:
        rules = replace(rules, multiple_values=False)  # the attribute has one, its items make them many
    return predicate_of(keyword, entry.vr, value, multiple=_several(entry), rules=rules)


def _stripped(value: str) -> str:
    return value.replace("\x00", "").strip()


def _is_universal(value: str) -> bool:
    """Nothing, or stars alone (PS3.4 C.2.2.2.3, C.2.2.2.4)."""
    return not value.strip("*")


def _several(entry: Indexed) -> bool:
    return entry.multiple and entry.vr not in _TEXT_VRS


def _each(keyword: str, vr: str, value: str, rules: Rules) -> Predicate | None:
    values = [one.strip() for one in value.split("\\") if one.strip()]
    if any(map(has_wildcard, values)) or len(values) > LIST_VALUES_EACH_MAX:
        raise InvalidQuery(f"{keyword}: several values, up to {LIST_VALUES_EACH_MAX}, have no wildcards")
    each = (predicate_of(keyword, vr, one, multiple=True, rules=rules) for one in values)
    return AllOf(tuple(predicate for predicate in each if predicate is not None))


def _worded(name: Named, value: str) -> Predicate:
    text = fold(value)
    for end in (*WORD_ENDS, ","):
        text = text.replace(end, " ")
    words = tuple(re.sub(r"\*+", "*", word) for word in text.split() if word.strip("*"))
    if not words or len(words) > NAME_WORDS_MAX:
        raise InvalidQuery(f"{name.keyword}: a name has up to {NAME_WORDS_MAX} words")
    return Worded(name.keyword, words, name)


def _by_item(predicates: list[Predicate]) -> list[Predicate]:
    """Keys into the same sequence are met by the same item of it (PS3.4 C.2.2.2.6)."""
    of_sequence: dict[str, list[OneOf | Like]] = {}
    others: list[Predicate] = []
    for predicate in predicates:
        if isinstance(predicate, OneOf | Like) and "." in predicate.keyword:
            of_sequence.setdefault(predicate.keyword.rpartition(".")[0], []).append(predicate)
        else:
            others.append(predicate)
    together = [each[0] if len(each) == 1 else SameItem(tuple(each)) for each in of_sequence.values()]
    return [*others, *together]


def _name(keyword: str, value: str) -> Named:
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
    return Between(keyword, first_moment(lower), _last_moment(upper))


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
        moment = moment[:8] + first_moment(moment[8:])
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
