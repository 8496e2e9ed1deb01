"""The ledger's book of deliveries: against a model, with processes that end at any moment, and its bounds."""

from __future__ import annotations

import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import Engine, event

from archive.database import sqlite_url
from archive.errors import InvalidInput, OutOfResources
from archive.ledger import Delivery, DeliveryKey, DeliveryStanding, DeliveryState, Ledger
from archive.ledger import deliveries as book

WARDS = ("a/x", "b/x", "c/x")
CONTENTS = [(f"1.2.{number}", bytes([digest]) * 32) for number in range(2) for digest in range(2)]
SECOND = 1_000_000
HOUR = 3600 * SECOND

contents = st.sampled_from(CONTENTS)
wards = st.sampled_from(WARDS)
pairs = st.sampled_from([(WARDS[0], WARDS[1]), (WARDS[1], WARDS[0]), (WARDS[0], WARDS[2])])


def ordered(key: DeliveryKey, now_us: int = 0) -> Delivery:
    return Delivery(key, "ISSUER", "CT1", 100, now_us)


class Region(RuleBasedStateMachine):
    """Wards that order, a region that gets what is awaited, wards that take and die in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now_us = book.KEPT_US * 2
        self.model: dict[DeliveryKey, Delivery] = {}
        self.region: set[tuple[str, str, bytes]] = set()  # ward, UID, digest: what has its receipt
        self.stored: Counter[tuple[str, str, bytes]] = Counter()  # what each ward's disk holds by delivery

    @initialize()
    def begin(self) -> None:
        self.ledger = Ledger.open(self.url)

    @property
    def url(self) -> str:
        return sqlite_url(self.folder / "ledger.db")

    def teardown(self) -> None:
        try:
            if hasattr(self, "ledger"):
                self.all_comes_in_the_end()
        finally:
            self.ledger.close()
            shutil.rmtree(self.folder)

    def held(self, key: DeliveryKey) -> bool:
        return (key.from_ward, key.sop_instance_uid, key.digest) in self.region

    def look(self, keys: Sequence[DeliveryKey]) -> None:
        """What the hub does with what it is told of."""
        self.ledger.ready_deliveries([key for key in keys if self.held(key)], self.now_us)
        for key in keys:
            if self.held(key) and self.model[key].state is DeliveryState.AWAITED:
                self.model[key] = replace(self.model[key], state=DeliveryState.READY, due_us=self.now_us)

    @rule(pair=pairs, wanted=st.lists(contents, min_size=1, max_size=4))
    def order(self, pair: tuple[str, str], wanted: list[tuple[str, bytes]]) -> None:
        source, other = pair
        keys = dict.fromkeys(DeliveryKey(source, other, *content) for content in wanted)
        fresh = self.ledger.order_deliveries([ordered(key, self.now_us) for key in keys], self.now_us)
        expected = []
        for key in keys:
            known = self.model.get(key)
            back = DeliveryKey(other, source, key.sop_instance_uid, key.digest)
            if (known is None and back not in self.model) or (
                known is not None and known.state is DeliveryState.FAILED
            ):
                due_us = 0 if known is None else known.due_us
                done_us = 0 if known is None else known.done_us
                self.model[key] = replace(ordered(key, self.now_us), due_us=due_us, done_us=done_us)
                expected.append(key)
        assert sorted(map(repr, fresh)) == sorted(map(repr, expected))
        self.look(fresh)

    @rule(ward=wards, came=st.lists(contents, min_size=1, max_size=4))
    def replicate(self, ward: str, came: list[tuple[str, bytes]]) -> None:
        self.region |= {(ward, *content) for content in came}
        self.look([one.key for one in self.ledger.awaited_deliveries(uids=[uid for uid, _ in came])])

    @rule(ward=wards, takes=st.integers(0, 3), says=st.sampled_from([True, True, False]))
    def take(self, ward: str, takes: int, says: bool) -> None:
        """A ward stores some of what waits for it; it may be killed before it says so."""
        page = self.ledger.next_deliveries(ward, self.now_us, 3)
        assert [one.key for one in page] == self.due(ward)[:3]
        for one in page[:takes]:
            content = (ward, one.key.sop_instance_uid, one.key.digest)
            if not self.stored[content]:
                self.stored[content] += 1
        if says:
            self.finish([one.key for one in page[:takes]])

    def due(self, ward: str) -> list[DeliveryKey]:
        ready = [one for one in self.model.values() if one.state is DeliveryState.READY]
        due = [one for one in ready if one.key.to_ward == ward and one.due_us <= self.now_us]
        due.sort(key=lambda one: (one.due_us, one.key.from_ward, one.key.sop_instance_uid, one.key.digest))
        return [one.key for one in due]

    def finish(self, keys: Sequence[DeliveryKey]) -> None:
        self.ledger.finish_deliveries(keys, self.now_us)
        for key in keys:
            self.model[key] = replace(
                self.model[key], state=DeliveryState.DELIVERED, done_us=self.now_us, reason=""
            )

    @rule(ward=wards, permanent=st.booleans())
    def refuse(self, ward: str, permanent: bool) -> None:
        for key in self.due(ward)[:1]:
            self.ledger.refuse_delivery(key, "no room", self.now_us, permanent=permanent)
            one = self.model[key]
            tries = one.tries + 1
            if permanent or tries >= book.TRIES_MAX:
                changed = replace(one, state=DeliveryState.FAILED, done_us=self.now_us)
            else:
                pause_us = min(book.PAUSE_FIRST_US * 2 ** (tries - 1), book.PAUSE_MAX_US)
                changed = replace(one, due_us=self.now_us + pause_us)
            self.model[key] = replace(changed, tries=tries, reason="no room")

    @rule(chance=st.randoms(use_true_random=False), said=st.sampled_from(["ready", "done", "refused"]))
    def say_again(self, chance: random.Random, said: str) -> None:
        """A word that comes late, or twice."""
        if not self.model:
            return
        key = chance.choice(list(self.model))
        state = self.model[key].state
        if said == "ready" and state is not DeliveryState.AWAITED:
            self.ledger.ready_deliveries([key], self.now_us)
        elif said == "done" and state is DeliveryState.DELIVERED:
            self.ledger.finish_deliveries([key], self.now_us + 1)
        elif said == "refused" and state is not DeliveryState.READY:
            self.ledger.refuse_delivery(key, "late", self.now_us, permanent=True)

    @rule(seconds=st.sampled_from([1, 60, 4000]))
    def wait(self, seconds: int) -> None:
        self.now_us += seconds * SECOND

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = Ledger.open(self.url)
        # A word that was lost with the process: all that is awaited is looked at.
        self.look([one.key for one in self.ledger.awaited_deliveries()])

    @rule()
    def age(self) -> None:
        """Nothing is old enough yet."""
        self.ledger.age_deliveries(self.now_us)

    @invariant()
    def the_book_says_what_was_done(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert set(self.ledger.ready_of(list(self.model))) == {
            one for one in self.model.values() if one.state is DeliveryState.READY
        }
        assert self.ledger.deliveries(list(self.model)) == list(self.model.values())
        assert set(self.ledger.awaited_deliveries()) == {
            one for one in self.model.values() if one.state is DeliveryState.AWAITED
        }
        for standing in self.ledger.delivery_standings(self.now_us):
            pair = [one for key, one in self.model.items()
                    if (key.from_ward, key.to_ward) == (standing.from_ward, standing.to_ward)]  # fmt: skip
            counts = Counter(one.state for one in pair)
            assert (standing.awaited, standing.ready, standing.failed) == (
                counts[DeliveryState.AWAITED], counts[DeliveryState.READY], counts[DeliveryState.FAILED]
            )  # fmt: skip
            open_us = [one.ordered_us for one in pair if one.state in book.OPEN]
            assert standing.oldest_us == min(open_us, default=0)
        assert set(self.stored.values()) <= {1}

    def all_comes_in_the_end(self) -> None:
        """When nothing fails any more, each ward has once what was ordered for it and not given up."""
        for key in self.model:
            self.region.add((key.from_ward, key.sop_instance_uid, key.digest))
        self.restart()
        self.now_us += book.PAUSE_MAX_US
        for ward in WARDS:
            while self.due(ward):
                self.take(ward, 3, True)
        for key, one in self.model.items():
            assert one.state in (DeliveryState.DELIVERED, DeliveryState.FAILED)
            if one.state is DeliveryState.DELIVERED:
                assert self.stored[key.to_ward, key.sop_instance_uid, key.digest] == 1
        self.the_book_says_what_was_done()


TestRegion = Region.TestCase
TestRegion.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    opened = Ledger.open(database_url)
    yield opened
    opened.close()


KEY = DeliveryKey("a/x", "b/x", "1.2.3", b"d" * 32)


def test_a_delivery_on_either_database(ledger: Ledger) -> None:
    other = replace(KEY, sop_instance_uid="1.2.4")
    assert set(ledger.order_deliveries([ordered(KEY, 5), ordered(other, 5)], 5)) == {KEY, other}
    assert ledger.order_deliveries([ordered(KEY, 6)], 6) == []
    assert ledger.order_deliveries([ordered(DeliveryKey("b/x", "a/x", *CONTENTS[0]))], 6) != []
    assert [one.key for one in ledger.awaited_deliveries(uids=["1.2.3"])] == [KEY]
    first = ledger.awaited_deliveries(1)[0].key
    assert first not in [one.key for one in ledger.awaited_deliveries(after=first)]
    ledger.ready_deliveries([KEY, other], 7)
    assert [one.key for one in ledger.next_deliveries("b/x", 7)] == [KEY, other]
    assert ledger.wards_with_deliveries(7) == ["b/x"]
    ledger.refuse_delivery(other, "x" * 500, 8, permanent=False)
    ledger.finish_deliveries([KEY], 9)
    ledger.refuse_delivery(KEY, "too late", 10, permanent=True)
    ledger.ready_deliveries([KEY], 10)  # a word that comes late
    ledger.finish_deliveries([KEY], 10)
    (done,) = ledger.deliveries([KEY])
    assert (done.state, done.done_us) == (DeliveryState.DELIVERED, 9)
    assert ledger.next_deliveries("b/x", 10) == []
    (trouble,) = ledger.troubled_deliveries()
    assert (trouble.key, trouble.reason, trouble.tries) == (other, "x" * book.REASON_CHARS_MAX, 1)
    assert ledger.delivery_standings(10, "c/x") == []
    standing = ledger.delivery_standings(10, "b/x")[0]
    assert replace(standing, reason="") == DeliveryStanding("a/x", "b/x", 0, 1, 5, 1, 0, "", 10)


def test_a_clock_that_is_set_back_holds_up_nothing_that_was_never_tried(ledger: Ledger) -> None:
    put_off = replace(KEY, sop_instance_uid="1.2.4")
    ledger.order_deliveries([ordered(KEY, HOUR), ordered(put_off, HOUR)], HOUR)
    ledger.ready_deliveries([KEY, put_off], HOUR)
    ledger.refuse_delivery(put_off, "no room", HOUR, permanent=False)
    assert [one.key for one in ledger.next_deliveries("b/x", 1)] == [KEY]
    assert ledger.wards_with_deliveries(1) == ["b/x"]
    ledger.finish_deliveries([KEY], 2)
    assert ledger.next_deliveries("b/x", 2) == [] and ledger.wards_with_deliveries(2) == []


def test_what_is_too_old_is_given_up_and_then_forgotten(ledger: Ledger) -> None:
    fetched = replace(KEY, sop_instance_uid="1.2.4")
    ledger.order_deliveries([ordered(KEY, 1), ordered(fetched, 1)], 1)
    ledger.ready_deliveries([fetched], 1)
    ledger.age_deliveries(book.KEPT_US)
    assert ledger.troubled_deliveries() == []
    ledger.age_deliveries(book.KEPT_US + 2)
    reasons = {one.key: one.reason for one in ledger.troubled_deliveries()}
    assert reasons == {KEY: "the region never got it", fetched: "the ward never fetched it"}
    assert ledger.retry_deliveries(to_ward="c/x") == 0
    ledger.age_deliveries(2 * book.KEPT_US + 3)
    assert ledger.delivery_standings(0) == []


def test_a_retry_goes_on_where_it_was(ledger: Ledger) -> None:
    held = replace(KEY, sop_instance_uid="1.2.4")
    ledger.order_deliveries([ordered(KEY, 1), ordered(held, 1)], 1)
    ledger.ready_deliveries([held], 1)
    ledger.age_deliveries(book.KEPT_US + 2)
    assert ledger.retry_deliveries(from_ward="a/x") == 2
    assert [one.key for one in ledger.awaited_deliveries()] == [KEY]
    assert [one.key for one in ledger.next_deliveries("b/x", 2)] == [held]


def test_a_delivery_fails_after_its_tries(ledger: Ledger) -> None:
    ledger.order_deliveries([ordered(KEY)], 1)
    ledger.ready_deliveries([KEY], 1)
    now_us = 1
    for _ in range(book.TRIES_MAX):
        (one,) = ledger.next_deliveries("b/x", now_us)
        ledger.refuse_delivery(one.key, "no room", now_us, permanent=False)
        now_us += book.PAUSE_MAX_US
    assert ledger.next_deliveries("b/x", now_us) == []
    assert ledger.delivery_standings(now_us)[0].failed == 1


def test_orders_are_bounded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "OPEN_MAX", 2)
    keys = [replace(KEY, sop_instance_uid=f"1.2.{number}") for number in range(3)]
    ledger.order_deliveries([ordered(key) for key in keys[:2]], 1)
    with pytest.raises(OutOfResources):
        ledger.order_deliveries([ordered(keys[2])], 1)
    ledger.order_deliveries([ordered(replace(keys[2], to_ward="c/x"))], 1)  # another pair has its own room
    with pytest.raises(InvalidInput):
        ledger.order_deliveries([ordered(keys[0]), ordered(replace(keys[1], to_ward="c/x"))], 1)
    with pytest.raises(InvalidInput):
        ledger.order_deliveries([ordered(KEY)] * (book.ORDER_MAX + 1), 1)


def test_what_is_asked_again_and_again_reads_nothing_that_was_delivered_long_ago(tmp_path: Path) -> None:
    """A region keeps what was delivered for a month, and each of its wards asks every few seconds."""
    url = sqlite_url(tmp_path / "ledger.db")
    ledger = Ledger.open(url)
    asked: list[tuple[str, tuple[object, ...]]] = []

    def note(connection: object, cursor: object, statement: str, parameters: tuple[object, ...],
             *_: object) -> None:
        asked.append((statement, parameters))

    key = DeliveryKey(WARDS[0], WARDS[1], *CONTENTS[0])
    ledger.order_deliveries([ordered(key)], SECOND)
    event.listen(Engine, "before_cursor_execute", note)
    try:
        ledger.delivery_standings(SECOND, WARDS[0])
        ledger.wards_with_deliveries(SECOND)
        ledger.next_deliveries(WARDS[1], SECOND)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    ledger.close()
    plans = [row[3] for statement, parameters in asked if statement.startswith("SELECT")
             for row in sqlite3.connect(tmp_path / "ledger.db").execute(
                 f"EXPLAIN QUERY PLAN {statement}", parameters)]
    reads = [plan for plan in plans if " delivery" in plan]
    assert len(reads) >= 4 and all("state=?" in plan for plan in reads), reads


def test_what_a_node_was_told_takes_the_place_of_what_it_knew(ledger: Ledger) -> None:
    told = [DeliveryStanding("a/x", "b/x", 1, 2, 3, 4, 5, "no room", 6), DeliveryStanding("c/x", "a/x", 1)]
    ledger.note_standings(told)
    assert ledger.told_standings() == told
    ledger.note_standings(told[:1])
    assert ledger.told_standings() == told[:1]
    ledger.note_standings([])
    assert ledger.told_standings() == []
