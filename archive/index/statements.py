"""Statements that the index's writers share: many rows at once, and questions about many UIDs of a bounded
length.

What every batch runs is made once, when the program starts (`Among`, `Change`), and goes to SQLite's driver
as text and values: SQLAlchemy took 90 us to make, look up and run such a statement anew, now it is 2 to 13.
PostgreSQL gets the same statement by way of SQLAlchemy, whose driver has its own types.
"""

from __future__ import annotations

import sqlite3
from collections import namedtuple
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    TextClause,
    Update,
    bindparam,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.dml import UpdateBase

from archive.index.rows import Row
from archive.index.schema import position
from archive.model import Position

PARAMETERS_MAX = 500  # UIDs in one IN list
_DIALECT = sqlite.dialect()


class Among:
    """A question about the rows of which a column is one of many values, made once; no other value may be
    bound in it. On SQLite flags come as 0 and 1."""

    def __init__(self, query: Select[Any], *columns: ColumnElement[Any]) -> None:
        """With several `columns` each of them is one of its own values."""
        self._query = query
        self._columns = columns
        self._names = [f"among_{place}" for place in range(len(columns))]
        self._statement = query.where(*(
            column.in_(bindparam(name, expanding=True))
            for column, name in zip(columns, self._names, strict=True)
        ))  # fmt: skip
        self._texts: dict[int, str] = {}
        self._row: Any = namedtuple("_row", [column.name for column in query.selected_columns])  # type: ignore[misc]

    def rows(self, connection: Connection, values: Iterable[Any]) -> list[Any]:
        """The rows, by place, by name or as `_asdict()`, asked for in questions of a bounded length."""
        return self._rows(connection, [[value] for value in sorted(values)])

    def rows_near(self, connection: Connection, keys: Iterable[tuple[Any, ...]]) -> list[Any]:
        """The rows whose columns are each in one of these keys, perhaps in different ones."""
        return self._rows(connection, sorted(keys))

    def _rows(self, connection: Connection, keys: Sequence[Sequence[Any]]) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(keys), PARAMETERS_MAX):
            chunk = keys[start : start + PARAMETERS_MAX]
            found += self._ask(connection, list(zip(*chunk, strict=True)))
        return found

    def _ask(self, connection: Connection, values: Sequence[tuple[Any, ...]]) -> Iterable[Any]:
        if connection.dialect.name != "sqlite":
            bound_sets = {name: sorted(set(some)) for name, some in zip(self._names, values, strict=True)}
            return connection.execute(self._statement, bound_sets).fetchall()
        # A few lengths alone, the rest said twice: the driver keeps each text that it has parsed.
        count = min(1 << (len(values[0]) - 1).bit_length(), PARAMETERS_MAX)
        bound: tuple[Any, ...] = ()
        for some in values:
            bound += some + some[-1:] * (count - len(some))
        return map(self._row._make, _answer(connection, self._text(count), bound))

    def _text(self, count: int) -> str:
        known = self._texts.get(count)
        if known is None:
            asked = self._query.where(*(column.in_([""] * count) for column in self._columns))
            made = asked.compile(dialect=_DIALECT, compile_kwargs={"render_postcompile": True})
            known = self._texts[count] = str(made)
        return known


def _answer(connection: Connection, asked: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The rows from SQLite's driver itself: SQLAlchemy's result takes 12 us to set up, of a table as wide as
    `study` 30, twice as long as SQLite needs to answer. Errors are those that SQLAlchemy would raise."""
    driver: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
    try:
        return driver.execute(asked, values).fetchall()
    except sqlite3.Error as error:
        raise DBAPIError.instance(asked, None, error, sqlite3.Error, hide_parameters=True) from error


class Change:
    """An INSERT, UPDATE or DELETE with bound names, made once, for many rows: 4 us a row less on SQLite than
    SQLAlchemy's bound parameters."""

    def __init__(self, statement: UpdateBase | TextClause) -> None:
        self._statement = statement
        made = statement.compile(dialect=_DIALECT)
        self._text = str(made)
        self._names = tuple(made.positiontup or ())
        self._constants = {name: value for name, value in made.params.items() if value is not None}

    def run(self, connection: Connection, rows: Sequence[Row]) -> None:
        """At least one row, each with what is bound."""
        if connection.dialect.name != "sqlite":
            connection.execute(self._statement, rows)
            return
        if self._constants:
            rows = [self._constants | row for row in rows]
        names = self._names
        connection.exec_driver_sql(self._text, [tuple([row[name] for name in names]) for row in rows])


def read_positions(connection: Connection) -> tuple[Position | None, Position | None]:
    rows = {row.log: Position(row.file, row.place) for row in connection.execute(select(position))}
    return rows.get("packs"), rows.get("facts")


def move_position(connection: Connection, log: str, to: Position) -> None:
    """Remember how far a log has been read; never backwards."""
    _MOVE.run(connection, [{"log": log, "file": to.file, "place": to.offset}])


_MOVE = Change(text(
    "INSERT INTO position (log, file, place) VALUES (:log, :file, :place) ON CONFLICT (log)"
    " DO UPDATE SET file = excluded.file, place = excluded.place"
    " WHERE (position.file, position.place) < (excluded.file, excluded.place)"
))  # fmt: skip


def insert_all(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """Insert rows, at least one, that have the same columns. On SQLite they go to the driver as they are: by
    way of bound parameters an instance's row cost 20 us more, a third of all that the index does for it."""
    if connection.dialect.name != "sqlite":
        connection.execute(insert(table), rows)
        return
    names = list(rows[0])
    marks = ", ".join("?" * len(names))
    values = itemgetter(*names)
    connection.exec_driver_sql(
        f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({marks})", [values(row) for row in rows]
    )


def update_all(connection: Connection, table: Table, key: Sequence[str], rows: Sequence[Row]) -> None:
    update_some(connection, table, key, [c.name for c in table.c if c.name not in key], rows)


def update_some(
    connection: Connection, table: Table, key: Sequence[str], columns: Sequence[str], rows: Sequence[Row]
) -> None:
    if connection.dialect.name == "sqlite":
        values = itemgetter(*columns, *key)
        setting = ", ".join(f"{name} = ?" for name in columns)
        here = " AND ".join(f"{name} = ?" for name in key)
        connection.exec_driver_sql(
            f"UPDATE {table.name} SET {setting} WHERE {here}", [values(row) for row in rows]
        )
        return
    bound = [{f"b_{name}": row[name] for name in (*key, *columns)} for row in rows]
    connection.execute(_update(table, tuple(key), tuple(columns)), bound)


@cache
def _update(table: Table, key: tuple[str, ...], columns: tuple[str, ...]) -> Update:
    # Bound names may not be column names in an UPDATE: SQLAlchemy keeps those for itself.
    return (
        update(table)
        .where(*(table.c[name] == bindparam(f"b_{name}") for name in key))
        .values({name: bindparam(f"b_{name}") for name in columns})
    )


def by_uid(connection: Connection, query: Any, column: Any, uids: Iterable[Any]) -> Iterator[Any]:
    """The rows of `query` whose `column` is one of `uids`, in questions of a bounded length."""
    ordered = sorted(uids)
    for start in range(0, len(ordered), PARAMETERS_MAX):
        yield from connection.execute(
            query.where(column.in_(ordered[start : start + PARAMETERS_MAX]))
        ).fetchall()
