"""Predicates (`archive/predicates.py`) as SQL conditions, for SQLite and PostgreSQL. It knows no table, only
columns.

Every value is a bound parameter. Patterns become LIKE with `%`, `_` and the escape character escaped; a
pattern whose `*` or `?` could run across two values of one column is checked by a regular expression as
well.
"""

from __future__ import annotations

import re
from typing import Protocol

from sqlalchemy import ColumnElement, and_, literal, or_, true

from archive.folding import SEPARATOR
from archive.predicates import (
    ITEMS_MAX,
    WORD_ENDS,
    AllOf,
    AnyOf,
    Between,
    Empty,
    Like,
    Moment,
    Named,
    OneOf,
    Predicate,
    SameItem,
    Worded,
    Zoned,
)

ESCAPE = "/"
TRIGRAM_CHARS_MIN = 3


class Columns(Protocol):
    """Where the stored values are."""

    def plain(self, keyword: str) -> ColumnElement[str]: ...

    def folded(self, keyword: str) -> ColumnElement[str]: ...


def condition(predicate: Predicate, columns: Columns, *, sqlite: bool) -> ColumnElement[bool]:
    """`predicate` in SQL."""
    match predicate:
        case Moment():
            return _moment(predicate, columns)
        case AllOf():
            return and_(*(condition(each, columns, sqlite=sqlite) for each in predicate.predicates))
        case AnyOf():
            return or_(*(condition(each, columns, sqlite=sqlite) for each in predicate.predicates))
        case SameItem():
            return _same_item(predicate, columns, sqlite)
        case Zoned():
            return _zoned(predicate, columns, sqlite)
        case Named():
            return _named(predicate, columns, sqlite)
        case Worded():
            return _worded(predicate, columns, sqlite)
    column = columns.plain(predicate.keyword)
    match predicate:
        case Empty():
            none = column == ""
            among = _whole(column).contains("\\\\", autoescape=True, escape=ESCAPE)
            return or_(none, among) if predicate.within else none
        case Between():
            ends = [column >= predicate.lower] if predicate.lower else [column != ""]
            return and_(*ends, *([column <= predicate.upper] if predicate.upper else []))
        case Like():
            if predicate.multiple:
                whole = _whole(column)
                return or_(*(_within(whole, "\\", pattern, sqlite) for pattern in predicate.patterns))
            return or_(*(_like(column, pattern) for pattern in predicate.patterns))
        case OneOf():
            return _one_of(predicate, column)


def literal_run(predicate: Predicate) -> str | None:
    """The longest run of characters that every match contains, if it is long enough for trigrams: a
    question to a trigram index can begin with it."""
    if isinstance(predicate, Worded):
        runs = [run for word in predicate.words for run in re.split(r"[*?]", word)]
    elif isinstance(predicate, Named):
        patterns = [f"{SEPARATOR}{group}{SEPARATOR}" for group in predicate.groups]
        # Where a group's pattern is open at an end, the separator is no neighbour of its text.
        runs = [run for pattern in patterns for run in re.split(r"[*?]", _trimmed(pattern))]
    elif isinstance(predicate, Like) and len(predicate.patterns) == 1:
        runs = re.split(r"[*?]", predicate.patterns[0])
    else:
        return None
    longest = max(runs, key=len)
    return longest if len(longest) >= TRIGRAM_CHARS_MIN else None


def _trimmed(pattern: str) -> str:
    pattern = pattern[1:] if pattern.startswith(SEPARATOR + "*") else pattern
    return pattern[:-1] if pattern.endswith("*" + SEPARATOR) else pattern


def _whole(column: ColumnElement[str]) -> ColumnElement[str]:
    """Several values, each between two backslashes."""
    return literal("\\") + column + literal("\\")


def _named(predicate: Named, columns: Columns, sqlite: bool) -> ColumnElement[bool]:
    column = columns.folded(predicate.keyword)
    return and_(*(_within(column, SEPARATOR, pattern, sqlite) for pattern in predicate.groups))


def _worded(predicate: Worded, columns: Columns, sqlite: bool) -> ColumnElement[bool]:
    column = columns.folded(predicate.keyword)
    words = and_(*(_begins(column, word, sqlite) for word in predicate.words))
    return or_(words, _named(predicate.literally, columns, sqlite))


def _begins(column: ColumnElement[str], word: str, sqlite: bool) -> ColumnElement[bool]:
    """A word of the folded name begins like this; its wildcards do not run into the next."""
    if not re.search(r"[*?]", word):
        like = (f"%{_escaped(end)}{_escaped(word)}%" for end in WORD_ENDS)
        return or_(*(column.like(pattern, escape=ESCAPE) for pattern in like))
    return column.regexp_match(_regex(f"{word}*", WORD_ENDS, sqlite))


def _same_item(predicate: SameItem, columns: Columns, sqlite: bool) -> ColumnElement[bool]:
    """Each of the conditions by itself, which is soon decided, and all of them at one place in the lists."""
    apart = [condition(each, columns, sqlite=sqlite) for each in predicate.predicates]

    def at(place: int, each: OneOf | Like) -> ColumnElement[bool]:
        whole = _whole(columns.plain(each.keyword))
        if isinstance(each, OneOf):
            ways = [f"\\\\{re.escape(value)}\\\\" for value in each.values]
        else:
            ways = [_regex(pattern, ("\\",), sqlite) for pattern in each.patterns]
        before = rf"^(?:\\[^\\]*){{{place}}}"
        return or_(*(whole.regexp_match(before + way) for way in ways))

    together = (and_(*(at(place, each) for each in predicate.predicates)) for place in range(ITEMS_MAX))
    return and_(*apart, or_(*together))


def _zoned(predicate: Zoned, columns: Columns, sqlite: bool) -> ColumnElement[bool]:
    offset = columns.plain(predicate.keyword)
    known = [there for there, _ in predicate.by_offset]
    ways = [
        and_(offset == there, condition(each, columns, sqlite=sqlite)) for there, each in predicate.by_offset
    ]
    ways.append(and_(offset.not_in(known), condition(predicate.otherwise, columns, sqlite=sqlite)))
    if predicate.within is None:
        return or_(*ways)
    return and_(condition(predicate.within, columns, sqlite=sqlite), or_(*ways))


def _one_of(predicate: OneOf, column: ColumnElement[str]) -> ColumnElement[bool]:
    if not predicate.multiple:
        return column == predicate.values[0] if len(predicate.values) == 1 else column.in_(predicate.values)
    whole = _whole(column)
    return or_(
        *(whole.contains(f"\\{value}\\", autoescape=True, escape=ESCAPE) for value in predicate.values)
    )


def _like(column: ColumnElement[str], pattern: str) -> ColumnElement[bool]:
    like = column.like(_like_text(pattern), escape=ESCAPE)
    prefix = re.split(r"[*?]", pattern)[0]
    if not prefix:
        return like
    # Neither planner makes a range of a LIKE with an escape character.
    end = _after(prefix)
    return and_(column >= prefix, *([column < end] if end else []), like)


def _within(column: ColumnElement[str], separator: str, pattern: str, sqlite: bool) -> ColumnElement[bool]:
    """One of the values that stand between separators in `column` fits the pattern."""
    head = "%" if pattern.startswith("*") else f"%{_escaped(separator)}"
    tail = "%" if pattern.endswith("*") else f"{_escaped(separator)}%"
    like = column.like(head + _like_text(pattern.strip("*")) + tail, escape=ESCAPE)
    if not re.search(r"[*?]", pattern.strip("*")):
        return like
    return and_(like, column.regexp_match(_regex(pattern, (separator,), sqlite)))


def _regex(pattern: str, separators: tuple[str, ...], sqlite: bool) -> str:
    """The pattern between separators. In Python, which answers for SQLite, each run of text is taken where
    it is found first and for good: without that a key of many stars would take exponential time."""
    ends = "".join(map(re.escape, separators))
    end, one = f"[{ends}]", f"[^{ends}]"
    runs = ["".join(one if char == "?" else re.escape(char) for char in run) for run in pattern.split("*")]
    if len(runs) == 1:
        return f"{end}{runs[0]}{end}"
    taken = (f"(?>{one}*?{run})" if sqlite else f"{one}*{run}" for run in runs[1:-1])
    return f"{end}{runs[0]}{''.join(taken)}{one}*{runs[-1]}{end}"


def _moment(predicate: Moment, columns: Columns) -> ColumnElement[bool]:
    date, time = columns.plain(predicate.date), columns.plain(predicate.time)
    (first_date, first_time), (last_date, last_time) = predicate.lower, predicate.upper
    conditions: list[ColumnElement[bool]] = [date != ""]
    if first_date:
        # The plain bound first: it is what an index on the date can use.
        conditions += [date >= first_date, or_(date > first_date, time >= first_time)]
    if last_date:
        at_end = and_(time != "", time <= last_time) if last_time else true()
        conditions += [date <= last_date, or_(date < last_date, at_end)]
    return and_(*conditions)


def _like_text(pattern: str) -> str:
    return "".join({"*": "%", "?": "_"}.get(char) or _escaped(char) for char in pattern)


def _escaped(text: str) -> str:
    return re.sub(r"([%_/])", rf"{ESCAPE}\1", text)


def _after(prefix: str) -> str:
    """The least text that is greater than every text that begins with `prefix`; "" when there is none."""
    for place in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[place])
        if code < 0x10FFFF:
            following = 0xE000 if code + 1 == 0xD800 else code + 1  # no surrogates in UTF-8
            return prefix[:place] + chr(following)
    return ""
