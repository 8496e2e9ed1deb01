"""Attributes as rows of the index: the catalogue's columns, cleaned, bounded, and first come first kept.

Cleaning touches only what neither database could hold (NUL and lone surrogates) or compare
(`archive/folding.py`). The bytes of the instance are not touched by any of it. It knows no database
connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from archive.catalog import Indexed, at_level
from archive.database import storable
from archive.folding import CLEANERS, folded_name
from archive.index.schema import folded_column
from archive.model import Fields, Level

VALUE_CHARS_MAX = 4096
# PostgreSQL's B-tree takes no more than 2,704 bytes; a longer value breaks its VR sixteen times over.
KEY_CHARS_MAX = 256
NUMBER_UNKNOWN = 2**31 - 1  # sorts last

_KEYS = frozenset(
    {
        "PatientID",
        "AccessionNumber",
        "StudyDate",
        "StudyTime",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "Modality",
    }
)

Row = dict[str, Any]
Content = tuple[str, bytes]  # a SOP Instance UID and a digest



@dataclass(frozen=True, slots=True)
class _Field:
    keyword: str
    column: str
    clean: Callable[[str], str] | None
    chars_max: int
    folded: str | None


def _field(entry: Indexed) -> _Field:
    chars_max = KEY_CHARS_MAX if entry.keyword in _KEYS else VALUE_CHARS_MAX
    return _Field(entry.keyword, entry.column, CLEANERS.get(entry.vr), chars_max, folded_column(entry))


_FIELDS: dict[Level, tuple[_Field, ...]] = {
    level: tuple(_field(entry) for entry in at_level(level)) for level in Level
}
# An empty row of a level, and its fields by keyword.
_ROWS: dict[Level, tuple[Row, dict[str, _Field]]] = {
    level: (
        {name: "" for field in fields for name in (field.column, field.folded) if name is not None},
        {field.keyword: field for field in fields},
    )
    for level, fields in _FIELDS.items()
}
_COLUMNS: dict[Level, dict[str, str]] = {
    level: {field.column: field.keyword for field in fields} for level, fields in _FIELDS.items()
}


def row_of(level: Level, fields: Fields) -> Row:
    """The columns of one level. Takes what an instance has of them, about half, each by one look-up: asking
    for each column took twice as long."""
    empty, by_keyword = _ROWS[level]
    row = empty.copy()
    for keyword, value in fields.items():
        field = by_keyword.get(keyword)
        if not value or field is None:
            continue
        if field.clean is not None:
            value = field.clean(value)
        row[field.column] = value = storable(value[: field.chars_max])
        if field.folded is not None:
            row[field.folded] = folded_name(value)
    return row


def fields_of(level: Level, row: Mapping[str, Any]) -> dict[str, str]:
    """The fields of one level, those that are known."""
    return {keyword: row[column] for column, keyword in _COLUMNS[level].items() if row[column]}


def fill(row: Row, level: Level, other: Row) -> bool:
    """Give `row` the values of `other` where it has none: the first that comes is kept. True when one was
    given."""
    changed = False
    for field in _FIELDS[level]:
        if not row[field.column] and other[field.column]:
            row[field.column] = other[field.column]
            if field.folded is not None:
                row[field.folded] = other[field.folded]
            changed = True
    return changed


def number_of(text: str) -> int:
    """An integer string as a number to sort by."""
    try:
        return max(-(2**31), min(int(text), NUMBER_UNKNOWN)) if len(text) <= 16 else NUMBER_UNKNOWN
    except ValueError:
        return NUMBER_UNKNOWN


def joined(values: set[str]) -> str:
    """Several values in one column, in an order of their own."""
    return "\\".join(sorted(values))


def split(text: str) -> tuple[str, ...]:
    return tuple(text.split("\\")) if text else ()
