"""Orders: kept in the ledger, carried out one after the other, once or safely again, and audited."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from sqlalchemy import text, update

from archive.database import sqlite_url
from archive.errors import InvalidInput, NotFound, OutOfResources
from archive.ledger import Ledger
from archive.ledger import orders as module
from archive.ledger.tables import order_
from archive.orders import OrderDesk
from tests.waiting import wait_for


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    opened = Ledger.open(database_url)
    yield opened
    opened.close()


def test_orders_are_carried_out_in_order_answered_and_audited(ledger: Ledger) -> None:
    asked: list[tuple[str, str]] = []

    def note(detail: Mapping[str, str], by: str) -> str:
        asked.append((detail["n"], by))
        return f"done {detail['n']}"

    def refuse(detail: Mapping[str, str], by: str) -> str:
        raise NotFound("nothing of that kind")

    def break_(detail: Mapping[str, str], by: str) -> str:
        raise ZeroDivisionError("Rossi^Maria")

    desk = OrderDesk(ledger, {"note": note, "refuse": refuse, "break": break_})
    desk.start()
    try:
        ids = [ledger.place_order("note", {"n": str(n)}, "anna") for n in range(5)]
        refused, broken, unknown = (ledger.place_order(kind, {}, "anna") for kind in ("refuse", "break", "x"))
        wait_for(lambda: ledger.order_answer(unknown), "an answer")
        assert asked == [(str(n), "anna") for n in range(5)]
        assert [ledger.order_answer(one) for one in ids] == [(True, f"done {n}") for n in range(5)]
        assert ledger.order_answer(refused) == (False, "nothing of that kind")
        assert ledger.order_answer(broken) == (False, "an error that is not foreseen; the log says more")
        assert ledger.order_answer(unknown) == (False, "this release knows no order 'x'")
        assert not ledger.has_open_orders()
    finally:
        desk.stop()
    rows = {row.correlation: row for row in ledger.audit_rows()}
    assert rows[ids[0]].act == "note" and rows[ids[0]].who == "anna" and rows[ids[0]].outcome == "success"
    assert rows[ids[0]].subject == '{"n": "0"}' and rows[refused].outcome == "failure"
    assert len(rows) == 8


def test_an_order_survives_a_process_that_ends_before_the_answer(ledger: Ledger) -> None:
    done: list[str] = []

    class Ended(BaseException):
        """As a kill: nothing that handles errors sees it."""

    def act_and_die(detail: Mapping[str, str], by: str) -> str:
        done.append("act")
        raise Ended

    order = ledger.place_order("act", {}, "anna")
    with pytest.raises(Ended):
        OrderDesk(ledger, {"act": act_and_die}).work_off()
    assert ledger.order_answer(order) is None and [one.id for one in ledger.open_orders()] == [order]

    def act(detail: Mapping[str, str], by: str) -> str:
        done.append("again")
        return "yes"

    assert OrderDesk(ledger, {"act": act}).work_off() == 1
    assert ledger.order_answer(order) == (True, "yes") and done == ["act", "again"]
    assert OrderDesk(ledger, {"act": act}).work_off() == 0
    assert len(ledger.audit_rows(act="act")) == 1


def test_two_desks_answer_an_order_once(ledger: Ledger) -> None:
    order = ledger.place_order("act", {}, "anna")
    ledger.finish_order(order, True, "first")
    ledger.finish_order(order, False, "second")
    assert ledger.order_answer(order) == (True, "first")
    assert len(ledger.audit_rows(act="act")) == 1


def test_the_queue_is_bounded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ORDERS_OPEN_MAX", 3)
    for _ in range(3):
        ledger.place_order("act", {}, "anna")
    with pytest.raises(OutOfResources):
        ledger.place_order("act", {}, "anna")
    with pytest.raises(InvalidInput):
        ledger.place_order("act", {"long": "x" * module.DETAIL_CHARS_MAX}, "anna")
    assert len(ledger.open_orders()) == 3


def test_answers_are_kept_for_a_day(ledger: Ledger) -> None:
    old, new = ledger.place_order("act", {}, "anna"), ledger.place_order("act", {}, "anna")
    ledger.finish_order(old, True, "old")
    past_us = time.time_ns() // 1000 - module.ANSWERS_KEPT_US - 1
    ledger._database.write(
        lambda c: c.execute(update(order_).where(order_.c.id == old).values(answered_us=past_us))
    )
    ledger.finish_order(new, True, "new")
    assert ledger.order_answer(old) is None and ledger.order_answer(new) == (True, "new")


def test_a_desk_that_stops_leaves_the_rest_to_the_next(ledger: Ledger) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(detail: Mapping[str, str], by: str) -> str:
        began.set()
        assert go_on.wait(10)
        return "slowly"

    first, second = ledger.place_order("slow", {}, "anna"), ledger.place_order("slow", {}, "anna")
    desk = OrderDesk(ledger, {"slow": slow})
    desk.start()
    assert began.wait(10)
    stopping = threading.Thread(target=desk.stop)
    stopping.start()
    wait_for(desk._rounds.stopping.is_set, "it is being stopped")
    go_on.set()
    stopping.join(10)
    assert ledger.order_answer(first) == (True, "slowly") and ledger.order_answer(second) is None
    assert OrderDesk(ledger, {"slow": slow}).work_off() == 1


def test_a_ledger_without_orders_comes_forward(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "ledger.db")
    ledger = Ledger.open(url)
    ledger._database.write(lambda c: c.execute(text("DROP TABLE order_")))
    ledger._database.write(lambda c: c.execute(text("UPDATE schema_version SET version = 2")))
    ledger.close()
    ledger = Ledger.open(url)
    assert ledger.order_answer(ledger.place_order("act", {}, "anna")) is None
    ledger.close()
