"""Statements that the index's writers share: many rows at once, and questions about many UIDs of a bounded
length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Table, bindparam, insert, select, update

from archive.index.rows import Row
from archive.index.schema import position
from archive.model import Position

PARAMETERS_MAX = 500  # UIDs in one IN list


def read_positions(connection: Connection) -> tuple[Position | None, Position | None]:
    rows = {row.log: Position(row.file, row.place) for row in connection.execute(select(position))}
    return rows.get("packs"), rows.get("facts")


def move_position(connection: Connection, log: str, to: Position) -> None:
    """Remember how far a log has been read; never backwards."""
    row = connection.execute(select(position).where(position.c.log == log)).fetchone()
    if row is None:
        connection.execute(insert(position).values(log=log, file=to.file, place=to.offset))
    elif Position(row.file, row.place) < to:
        connection.execute(
            update(position).where(position.c.log == log).values(file=to.file, place=to.offset)
        )


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
    # Bound names may not be column names in an UPDATE: SQLAlchemy keeps those for itself.
    statement = (
        update(table)
        .where(*(table.c[name] == bindparam(f"b_{name}") for name in key))
        .values({name: bindparam(f"b_{name}") for name in columns})
    )
    connection.execute(statement, [{f"b_{name}": row[name] for name in (*key, *columns)} for row in rows])


def by_uid(connection: Connection, query: Any, column: Any, uids: Iterable[Any]) -> Iterator[Any]:
    """The rows of `query` whose `column` is one of `uids`, in questions of a bounded length."""
    ordered = sorted(uids)
    for start in range(0, len(ordered), PARAMETERS_MAX):
        yield from connection.execute(
            query.where(column.in_(ordered[start : start + PARAMETERS_MAX]))
        ).fetchall()
