"""The ledger's routes on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from archive.database import sqlite_url
from archive.ledger import (
    CompleteStudy,
    Destination,
    DestinationState,
    Ledger,
    RouteChoice,
    Routed,
    RouteKind,
    RouteState,
    RuleMark,
    Settlement,
)
from archive.model import Position

ONCO = Destination(RouteKind.DEVICE, "ONCO")
WARD = Destination(RouteKind.WARD, "galliera/oncology")


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    opened = Ledger.open(database_url)
    yield opened
    opened.close()


def row(number: int, *, to: Destination = ONCO, rank: int = 1, next_try_us: int = 0,
        rule: str = "all") -> Routed:
    return Routed(rule, to, f"1.{number % 2}", "1.2.3", f"1.2.3.{number}", bytes([number]) * 32, 100 + number,
                  next_try_us, 10_000, rank=rank, commit=number % 2 == 0)


def test_rows_and_marks_go_in_together_and_once(ledger: Ledger) -> None:
    mark = RuleMark("all", 5, b"e" * 16, Position(2, 300))
    assert ledger.queue_routes([row(1), row(2), row(1), row(1, rule="another")], [mark]) == 2
    assert ledger.queue_routes([row(1), row(3)], [replace(mark, position=Position(2, 400))]) == 1
    assert ledger.rule_marks() == {"all": replace(mark, position=Position(2, 400))}
    assert ledger.routes(10) == [row(1), row(2), row(3)]
    assert ledger.route_count(ONCO) == 3 and ledger.route_count(WARD) == 0
    ledger.keep_rules(["other"])
    assert ledger.rule_marks() == {} and ledger.route_count(ONCO) == 3


def test_more_rows_than_one_question_takes(ledger: Ledger) -> None:
    many = [Routed("all", ONCO, "1.2", "1.2.3", f"1.2.3.{n}", n.to_bytes(32, "big"), n, 0, 1)
            for n in range(1200)]
    assert ledger.queue_routes(many) == 1200
    assert ledger.queue_routes(many) == 0
    ledger.settle_routes(Settlement(done=many), 7)
    assert ledger.queue_routes(many) == 0 and ledger.route_count(ONCO) == 0
    assert ledger.trim_sent(7) == 0
    assert ledger.trim_sent(8) == 1200
    assert ledger.queue_routes(many) == 1200


def test_what_is_due_comes_by_rank_then_age(ledger: Ledger) -> None:
    ledger.queue_routes([row(3), row(1, rank=2), row(2), row(4, rank=0), row(5, next_try_us=50),
                         row(6, to=WARD)])
    assert [one.sop_instance_uid for one in ledger.due_routes(ONCO, 49, 10)] == [
        "1.2.3.4", "1.2.3.2", "1.2.3.3", "1.2.3.1"]
    assert len(ledger.due_routes(ONCO, 50, 10)) == 5 and len(ledger.due_routes(ONCO, 50, 2)) == 2
    assert ledger.next_route_us(ONCO) == 0
    ledger.postpone_routes(ONCO, "all", 80)
    assert ledger.due_routes(ONCO, 79, 10) == [] and ledger.next_route_us(ONCO) == 80
    assert len(ledger.due_routes(WARD, 0, 10)) == 1
    assert ledger.next_route_us(Destination(RouteKind.NOTICE, "ONCO")) is None


def test_a_clock_that_is_set_back_holds_up_nothing_that_was_never_put_off(ledger: Ledger) -> None:
    ledger.queue_routes([row(1, next_try_us=101), row(2, next_try_us=103)])  # queued at 101 and at 102
    assert [one.sop_instance_uid for one in ledger.due_routes(ONCO, 5, 10)] == ["1.2.3.1"]


def test_what_is_done_leaves_and_is_remembered_and_a_dropped_row_stays_dropped(ledger: Ledger) -> None:
    ledger.queue_routes([row(1), row(2), row(3)])
    changed = replace(row(2), state=RouteState.SET_ASIDE, tries=2, status=0xA900, comment="x" * 900)
    assert ledger.drop_routes(RouteChoice(study_uid="1.1")) == 2  # 1 and 3
    ledger.settle_routes(Settlement(done=[row(1)], changed=[changed, replace(row(3), tries=9)]), 5)
    one, = ledger.routes(10)
    assert (one.state, one.tries, one.status, one.comment) == (RouteState.SET_ASIDE, 2, 0xA900, "x" * 200)
    assert ledger.queue_routes([row(1), row(3)]) == 1  # 1 was sent all the same
    ledger.settle_routes(Settlement(done=[row(1)]), 6)  # written again after a crash: nothing changes
    ledger.forget_sent([row(1)])
    assert ledger.queue_routes([row(1)]) == 1


def test_summaries_retries_and_destinations(ledger: Ledger) -> None:
    ledger.queue_routes([row(1), row(2), row(3, to=WARD)])
    ledger.settle_routes(Settlement(changed=[
        replace(row(2), state=RouteState.SET_ASIDE, tries=4),
        replace(row(3, to=WARD), state=RouteState.COMMITTING),
    ]), 5)
    failing = DestinationState(ONCO, 3, 99, "no connection", 98)
    ledger.note_destination(failing)
    onco, ward = ledger.route_summaries()
    assert (onco.waiting, onco.committing, onco.set_aside, onco.tries, onco.oldest_us) == (1, 0, 1, 4, 101)
    assert (onco.to, onco.state) == (ONCO, failing)
    assert (ward.to, ward.waiting, ward.committing, ward.set_aside) == (WARD, 0, 1, 0)
    assert ledger.retry_routes(RouteChoice(), 500, 900) == 2  # not what is being committed
    assert {(one.state, one.tries, one.next_try_us, one.expires_us) for one in ledger.routes(
        10, RouteChoice(to=ONCO))} == {(RouteState.WAITING, 0, 500, 900)}
    assert [one.failures for one in ledger.destinations_of_routes()] == [0, 0]


def test_complete_studies_stay_until_they_were_looked_at(ledger: Ledger) -> None:
    first = CompleteStudy("1.2", "quiet", 5)
    assert not ledger.has_complete_studies()
    ledger.note_complete(first)
    again = replace(first, why="performed step", at_us=6)
    ledger.note_complete(again)  # it grew while the rules looked at it
    ledger.queue_routes([row(1)], (), [first])
    assert ledger.complete_studies(10) == [again] and ledger.has_complete_studies()
    ledger.queue_routes([row(1)], (), [again])
    assert ledger.complete_studies(10) == []


def test_a_ledger_of_the_release_before_gets_the_queue(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "ledger.db")
    Ledger.open(url).close()
    engine = create_engine(f"sqlite:///{tmp_path / 'ledger.db'}")
    with engine.begin() as connection:
        for name in ("route", "route_sent", "route_rule", "route_destination", "route_study"):
            connection.execute(text(f"DROP TABLE {name}"))
        connection.execute(text("UPDATE schema_version SET version = 5 WHERE name = 'ledger'"))
    engine.dispose()
    ledger = Ledger.open(url)
    assert ledger.queue_routes([row(1)]) == 1
    ledger.close()
