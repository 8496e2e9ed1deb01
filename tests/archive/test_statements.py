"""Statements that are made once: what they ask and change, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, bindparam, select, update

from archive.database import Database
from archive.errors import Unavailable
from archive.index.schema import STEPS, outbox, position, series_ward
from archive.index.statements import (
    PARAMETERS_MAX,
    Among,
    Change,
    insert_all,
    move_position,
    read_positions,
    update_some,
)
from archive.model import Position

BY_UID = Among(select(outbox.c.sop_instance_uid, outbox.c.tries), outbox.c.sop_instance_uid)
BY_DIGEST = Among(select(outbox.c.sop_instance_uid), outbox.c.digest)
BY_SERIES = Among(select(series_ward), series_ward.c.study_instance_uid, series_ward.c.series_instance_uid)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url, name="index", steps=STEPS, durable=False)
    yield opened
    opened.close()


def waiting(number: int) -> dict[str, Any]:
    return {
        "sop_instance_uid": f"1.2.{number}", "digest": bytes([number % 256, number // 256]),
        "study_instance_uid": "1", "series_instance_uid": "2", "ward": "a/one", "received_at_us": number,
        "bytes": 1, "conflict": False, "urgent": False, "tries": number, "set_aside": False, "detail": "",
        "hidden": number % 2 == 1,
    }  # fmt: skip


def ask(database: Database, work: Callable[[Connection], list[Any]]) -> list[Any]:
    return sorted(map(tuple, database.read(work)))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 33, PARAMETERS_MAX, PARAMETERS_MAX + 1])
def test_each_row_among_many_values_comes_once(database: Database, count: int) -> None:
    rows = [waiting(number) for number in range(count + 5)]
    database.write(lambda connection: insert_all(connection, outbox, rows))
    uids = {row["sop_instance_uid"] for row in rows[:count]} | {"1.2.3.4.5"}
    assert ask(database, lambda connection: BY_UID.rows(connection, uids)) == sorted(
        (row["sop_instance_uid"], row["tries"]) for row in rows[:count]
    )
    digests = [row["digest"] for row in rows[:count]]
    assert ask(database, lambda connection: BY_DIGEST.rows(connection, digests)) == sorted(
        (row["sop_instance_uid"],) for row in rows[:count]
    )


def test_none_are_among_no_values(database: Database) -> None:
    database.write(lambda connection: insert_all(connection, outbox, [waiting(1)]))
    assert ask(database, lambda connection: BY_UID.rows(connection, ())) == []


def test_rows_are_read_by_place_by_name_and_as_a_whole(database: Database) -> None:
    database.write(lambda connection: insert_all(connection, outbox, [waiting(1)]))
    (row,) = database.read(lambda connection: BY_UID.rows(connection, ["1.2.1"]))
    assert tuple(row) == (row.sop_instance_uid, row.tries) == ("1.2.1", 1)
    assert row._asdict() == {"sop_instance_uid": "1.2.1", "tries": 1}


def test_a_question_that_fails_says_so_as_every_other_does(database: Database) -> None:
    database.write(lambda connection: outbox.drop(connection))
    with pytest.raises(Unavailable):
        database.read(lambda connection: BY_UID.rows(connection, ["1.2.1"]))


def test_rows_near_keys_hold_those_of_the_keys(database: Database) -> None:
    def row(study: int, number: int) -> dict[str, Any]:
        return {"study_instance_uid": f"{study}", "series_instance_uid": f"{number}", "ward": "a/one",
                "sop_classes": "", "instance_count": study * 100 + number}  # fmt: skip

    rows = [row(study, number) for study in range(1, 6) for number in range(1, 6)]
    database.write(lambda connection: insert_all(connection, series_ward, rows))
    keys = {("1", "2"), ("3", "4"), ("5", "1"), ("6", "1")}
    found = database.read(lambda connection: BY_SERIES.rows_near(connection, keys))
    counts = {(one.study_instance_uid, one.series_instance_uid): one.instance_count for one in found}
    assert {key: counts[key] for key in keys & counts.keys()} == {
        ("1", "2"): 102, ("3", "4"): 304, ("5", "1"): 501
    }  # fmt: skip
    assert {study for study, _ in counts} <= {"1", "3", "5"} and {one for _, one in counts} <= {"1", "2", "4"}


def test_a_change_binds_its_own_values_beside_those_of_each_row(database: Database) -> None:
    change = Change(
        update(outbox)
        .where(outbox.c.sop_instance_uid == bindparam("b_uid"), outbox.c.hidden.is_(True))
        .values(detail=bindparam("b_detail"), tries=0, urgent=True)
    )

    def work(connection: Connection) -> None:
        insert_all(connection, outbox, [waiting(number) for number in range(1, 5)])
        change.run(connection, [{"b_uid": f"1.2.{number}", "b_detail": f"d{number}"} for number in (1, 2, 3)])

    database.write(work)
    columns = outbox.c.sop_instance_uid, outbox.c.detail, outbox.c.tries, outbox.c.urgent, outbox.c.hidden
    assert ask(database, lambda connection: list(connection.execute(select(*columns)))) == [
        ("1.2.1", "d1", 0, True, True), ("1.2.2", "", 2, False, False),
        ("1.2.3", "d3", 0, True, True), ("1.2.4", "", 4, False, False),
    ]  # fmt: skip


def test_some_columns_of_some_rows_are_updated(database: Database) -> None:
    rows = [waiting(number) for number in range(3)]

    def work(connection: Connection) -> None:
        insert_all(connection, outbox, rows)
        key = ("sop_instance_uid", "digest")
        changed = [row | {"urgent": True, "detail": "new", "tries": 9} for row in rows[1:]]
        update_some(connection, outbox, key, ("urgent", "detail"), changed)

    database.write(work)
    columns = outbox.c.sop_instance_uid, outbox.c.urgent, outbox.c.detail, outbox.c.tries
    assert ask(database, lambda connection: list(connection.execute(select(*columns)))) == [
        ("1.2.0", False, "", 0), ("1.2.1", True, "new", 1), ("1.2.2", True, "new", 2)
    ]  # fmt: skip


def test_a_position_moves_forward_alone(database: Database) -> None:
    def work(connection: Connection) -> None:
        for file, offset in ((1, 50), (1, 20), (1, 50), (2, 10), (1, 900), (2, 9)):
            move_position(connection, "packs", Position(file, offset))
        move_position(connection, "facts", Position(1, 0))

    database.write(work)
    assert database.read(read_positions) == (Position(2, 10), Position(1, 0))
    assert database.read(lambda connection: len(connection.execute(select(position)).fetchall())) == 2
