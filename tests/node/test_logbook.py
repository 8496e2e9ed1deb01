"""The connection log under strangers: nothing is lost of devices, and a million scans are some rows."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from archive.database import sqlite_url
from archive.errors import Unavailable
from archive.ledger import Connection, Ledger
from node.logbook import (
    MANY,
    MANY_CAUSES,
    REFUSED_ROWS_PER_MINUTE_MAX,
    SHARED_MANY_MAX,
    SHARED_MAX,
    SHARED_S,
    LogBook,
)
from tests.waiting import wait_for

_at_us = itertools.count(1)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(sqlite_url(tmp_path / "ledger.db"))
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(ledger: Ledger, clock: Clock) -> Iterator[LogBook]:
    made = LogBook(ledger, clock=clock)
    yield made
    made.close()


def entry(outcome: str, address: str = "10.0.0.5", calling_ae: str = "CT1",
          why: str = "no reason") -> Connection:
    return Connection(next(_at_us), address, calling_ae, "MISS", outcome=outcome, bytes_in=10,
                      reason=why if outcome == "refused" else "", ended=why)


def add(book: LogBook, count: int, make: Callable[[int], Connection]) -> None:
    for number in range(count):
        book.add(make(number))


def test_every_association_has_a_row(book: LogBook, ledger: Ledger) -> None:
    threads = [threading.Thread(target=add, args=(book, 200, lambda _: entry("accepted"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    book.close()
    rows = ledger.connections(1000)
    assert len(rows) == 800 and {row.times for row in rows} == {1}


def test_a_stranger_that_comes_again_is_counted(book: LogBook, ledger: Ledger, clock: Clock) -> None:
    book.add(entry("failed"))
    wait_for(lambda: len(ledger.connections()) == 1, "the first is written at once")
    add(book, 10_000, lambda _: entry("failed"))
    book.add(entry("failed", why="another cause"))
    clock.now_s += 2
    book.close()
    rows = {row.ended: row for row in ledger.connections()}
    assert (rows["no reason"].times, rows["no reason"].bytes_in) == (10_001, 100_010)
    assert rows["another cause"].times == 1 and len(rows) == 2


def test_the_next_ten_minutes_have_a_row_of_their_own(book: LogBook, ledger: Ledger, clock: Clock) -> None:
    book.add(entry("failed"))
    wait_for(lambda: len(ledger.connections()) == 1, "the first is written")
    clock.now_s += SHARED_S + 1
    book.add(entry("failed"))
    book.close()
    assert [row.times for row in ledger.connections()] == [1, 1]


def test_scans_from_everywhere_are_some_rows(book: LogBook, ledger: Ledger) -> None:
    add(book, 5000, lambda n: entry("failed", address=f"10.1.{n // 256}.{n % 256}"))
    book.add(entry("accepted"))
    book.close()
    rows = ledger.connections(100_000)
    assert len(rows) == SHARED_MAX + 2
    assert sum(row.times for row in rows) == 5001
    many, = [row for row in rows if row.address == MANY]
    assert many.times == 5000 - SHARED_MAX


def test_causes_that_name_users_who_were_made_up_are_few_rows(book: LogBook, ledger: Ledger) -> None:
    """The reason of a refusal may hold what a stranger chose."""
    add(book, 5000, lambda n: entry("refused", address=f"10.0.{n >> 8}.{n & 255}", why=f"wrong: user{n}"))
    book.close()
    rows = ledger.connections(10_000)
    assert len(rows) <= REFUSED_ROWS_PER_MINUTE_MAX + SHARED_MAX + SHARED_MANY_MAX + 1
    assert sum(row.times for row in rows) == 5000
    last, = [row for row in rows if row.reason == MANY_CAUSES]
    assert last.address == MANY


def test_refusals_have_rows_of_their_own_while_they_are_few(book: LogBook, ledger: Ledger,
                                                           clock: Clock) -> None:
    add(book, REFUSED_ROWS_PER_MINUTE_MAX + 500, lambda n: entry("refused", calling_ae=f"AE{n}"))
    wait_for(lambda: len(ledger.connections(1000)) >= REFUSED_ROWS_PER_MINUTE_MAX, "the first")
    clock.now_s += 60
    book.add(entry("refused", calling_ae="NEXT"))
    book.close()
    rows = ledger.connections(1000)
    assert len(rows) == REFUSED_ROWS_PER_MINUTE_MAX + SHARED_MAX + 2
    assert sum(row.times for row in rows) == REFUSED_ROWS_PER_MINUTE_MAX + 501
    named, = [row for row in rows if row.calling_ae == "NEXT"]
    assert named.times == 1


def test_a_ledger_that_fails_stops_nobody(book: LogBook, ledger: Ledger, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    def failing(*_: object) -> list[str]:
        raise Unavailable("the ledger does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "log_connections", failing)
        add(book, 20, lambda n: entry(("accepted", "failed")[n % 2]))
        wait_for(lambda: "not be written" in caplog.text and "not written" in caplog.text, "it is said")
    book.add(entry("accepted"))
    book.close()
    assert "10.0.0.5" not in caplog.text
    assert len(ledger.connections()) == 1


def test_a_queue_that_is_full_waits_for_nobody(ledger: Ledger, monkeypatch: pytest.MonkeyPatch,
                                               caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("node.logbook.QUEUE_MAX", 5)
    held, free = threading.Event(), threading.Event()

    def slow(*_: object) -> list[str]:
        held.set()
        free.wait(10)
        return []

    monkeypatch.setattr(ledger, "log_connections", slow)
    book = LogBook(ledger)
    book.add(entry("accepted"))
    assert held.wait(10)
    add(book, 20, lambda _: entry("accepted"))
    free.set()
    book.close()
    assert "15 entries of the connection log were not written" in caplog.text
