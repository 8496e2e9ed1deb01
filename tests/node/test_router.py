"""The router alone: each rule of its essay, and then a simulation in which destinations fail, refuse and
answer nothing and the process dies at any step, from which every row must come out delivered, or set aside
with a reason, and none but what was just sent may go twice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from archive.errors import OutOfResources, Unavailable
from archive.hours import Hours
from archive.ledger import Destination, DestinationState, Routed, RouteKind, RouteState, Settlement
from node.routing.router import Committed, Router, RouterLimits, Tell, Verdict

SECOND = 1_000_000
HOUR = 3600 * SECOND
ONCO = Destination(RouteKind.DEVICE, "ONCO")
LIMITS = RouterLimits(batch=4, settle_rows=2, tries_max=3, commit_poll_s=30.0)


class Crash(BaseException):
    """The process is killed here."""


def row(number: int, *, rank: int = 1, commit: bool = False, to: Destination = ONCO, rule: str = "all",
        expires_us: int = 1000 * HOUR) -> Routed:
    return Routed(rule, to, "1.2", "1.2.3", f"1.2.3.{number}", number.to_bytes(32, "big"), number, 0,
                  expires_us, rank=rank, commit=commit)


@dataclass
class DiskQueue:
    """What the ledger does, in memory: it outlives the router. `crash_at` counts down calls to a kill."""

    rows: dict[bytes, Routed] = field(default_factory=dict)
    sent: set[bytes] = field(default_factory=set)
    states: dict[Destination, DestinationState] = field(default_factory=dict)
    crash_in: int = 0
    reads: int = 0
    full: bool = False

    def add(self, *new: Routed) -> None:
        self.rows |= {one.key: one for one in new if one.key not in self.sent}

    def due_routes(
        self, to: Destination, now_us: int, limit: int, state: RouteState = RouteState.WAITING
    ) -> list[Routed]:
        self.reads += 1
        due = [one for one in self.rows.values()
               if one.to == to and one.state is state and one.next_try_us <= now_us]
        return sorted(due, key=lambda one: (one.rank, one.queued_us, one.key))[:limit]

    def next_route_us(self, to: Destination) -> int | None:
        waiting = [one.next_try_us for one in self.rows.values()
                   if one.to == to and one.state is not RouteState.SET_ASIDE]
        return min(waiting, default=None)

    def postpone_routes(self, to: Destination, rule: str, until_us: int) -> None:
        for one in list(self.rows.values()):
            if one.rule == rule and one.to == to and one.state is RouteState.WAITING:
                self.rows[one.key] = replace(one, next_try_us=max(one.next_try_us, until_us))

    def settle_routes(self, settlement: Settlement, now_us: int) -> None:
        self.die()
        if self.full:
            raise OutOfResources("no room")
        for one in settlement.done:
            self.rows.pop(one.key, None)
            self.sent.add(one.key)
        for one in settlement.changed:
            if one.key in self.rows:
                self.rows[one.key] = one
        self.die()

    def note_destination(self, state: DestinationState) -> None:
        self.states[state.to] = state

    def die(self) -> None:
        if self.crash_in:
            self.crash_in -= 1
            if not self.crash_in:
                raise Crash


@dataclass
class Destinations:
    """What is at the other end of the wire."""

    queue: DiskQueue
    away: bool = False
    answers: dict[str, Verdict] = field(default_factory=dict)
    commits: dict[str, Committed] = field(default_factory=dict)
    break_after: int = -1
    received: Counter[str] = field(default_factory=Counter)
    batches: list[list[str]] = field(default_factory=list)
    transactions: int = 0

    def send(self, to: Destination, rows: Sequence[Routed], tell: Tell) -> None:
        if self.away:
            raise Unavailable("no connection")
        self.batches.append([one.sop_instance_uid for one in rows])
        for number, one in enumerate(rows):
            if number == self.break_after:
                raise Unavailable("the association broke")
            verdict = self.answers.get(one.sop_instance_uid, Verdict.SENT)
            if verdict is Verdict.SENT:
                self.received[one.sop_instance_uid] += 1
            self.queue.die()
            tell(one, verdict, {Verdict.SENT: 0}.get(verdict, 0x0110), verdict.value)

    def ask_to_commit(self, to: Destination, rows: Sequence[Routed]) -> str:
        if self.away:
            raise Unavailable("no connection")
        self.transactions += 1
        return f"2.25.{self.transactions}"

    def committed(self, rows: Sequence[Routed]) -> Sequence[tuple[Committed, str]]:
        return [(self.commits.get(one.sop_instance_uid, Committed.NOT_YET), "0112") for one in rows]


class World:
    """A queue, a destination, a clock, and the router of this life."""

    def __init__(self, limits: RouterLimits = LIMITS) -> None:
        self.now_us = 10 * SECOND
        self.queue = DiskQueue()
        self.there = Destinations(self.queue)
        self.limits = limits
        self.start()

    def start(self) -> None:
        self.router = Router(self.queue, self.there, lambda: self.now_us, self.limits, random.Random(1))

    def turns(self, to: Destination = ONCO) -> None:
        while self.router.turn(to):
            pass

    def wait(self, us: int) -> None:
        """Time passes; every turn that is due is had."""
        until_us = self.now_us + us
        self.turns()
        while self.now_us < until_us:
            self.now_us = min(until_us, self.now_us + SECOND)
            if self.router.is_due(ONCO):
                self.turns()

    def uids(self, state: RouteState = RouteState.WAITING) -> set[str]:
        return {one.sop_instance_uid for one in self.queue.rows.values() if one.state is state}


def test_urgent_first_then_the_oldest_in_batches() -> None:
    world = World()
    world.queue.add(*(row(number) for number in (5, 3, 9, 7, 8)), row(6, rank=0), row(4, rank=2))
    world.turns()
    assert world.there.batches == [["1.2.3.6", "1.2.3.3", "1.2.3.5", "1.2.3.7"],
                                   ["1.2.3.8", "1.2.3.9", "1.2.3.4"]]
    assert not world.queue.rows


def test_one_that_is_away_is_left_alone_longer_and_longer_and_costs_nothing() -> None:
    world = World()
    world.there.away = True
    world.queue.add(*(row(number) for number in range(1000)))
    pauses = []
    for _ in range(14):
        assert not world.router.turn(ONCO)
        state = world.queue.states[ONCO]
        pauses.append(state.resume_us - world.now_us)
        world.now_us = state.resume_us - 1
        before = world.queue.reads
        world.router.wake(ONCO)  # what is queued meanwhile changes nothing
        assert not world.router.is_due(ONCO) and not world.router.turn(ONCO)
        assert world.queue.reads == before
        world.now_us += 1
    assert 5 * SECOND <= pauses[0] <= 10 * SECOND
    assert all(1800 * SECOND <= pause <= 3600 * SECOND for pause in pauses[10:])
    assert {one.tries for one in world.queue.rows.values()} == {0}
    world.there.away = False
    world.router.wake(ONCO, at_once=True)  # a person asks
    world.turns()
    assert not world.queue.rows and world.queue.states[ONCO].failures == 0


@pytest.mark.parametrize("away", [True, False])
def test_a_clock_that_is_set_back_keeps_nobody_waiting(away: bool) -> None:
    """Neither a destination that rests nor one for which nothing was there."""
    world = World()
    world.now_us = 2 * HOUR
    world.there.away = away
    if away:
        world.queue.add(row(1))
    world.turns()
    assert not world.router.is_due(ONCO)
    world.there.away = False
    world.now_us -= HOUR
    world.queue.add(row(2))
    assert world.router.is_due(ONCO)
    world.turns()
    assert not world.queue.rows


def test_a_queue_that_can_t_be_written_sends_nothing_twice() -> None:
    world = World()
    world.queue.add(*(row(number) for number in range(10)))
    world.queue.full = True
    for _ in range(20):
        with suppress(OutOfResources):
            world.turns()
        world.now_us += HOUR
    assert sum(world.there.received.values()) == LIMITS.batch and len(world.queue.rows) == 10
    world.queue.full = False
    world.turns()
    assert not world.queue.rows and set(world.there.received.values()) == {1}


def test_refusals_back_off_alone_and_end_set_aside() -> None:
    world = World()
    world.queue.add(row(1), row(2), row(3))
    world.there.answers = {"1.2.3.1": Verdict.AGAIN, "1.2.3.2": Verdict.NEVER}
    world.turns()
    assert world.there.received == {"1.2.3.3": 1}
    assert world.uids(RouteState.SET_ASIDE) == {"1.2.3.2"} and world.uids() == {"1.2.3.1"}
    world.wait(HOUR)
    assert world.uids(RouteState.SET_ASIDE) == {"1.2.3.1", "1.2.3.2"}
    tries = sum("1.2.3.1" in batch for batch in world.there.batches)
    assert tries == LIMITS.tries_max
    assert {one.comment for one in world.queue.rows.values()} == {"again (3 times)", "never"}


def test_one_without_room_rests_and_nothing_is_given_up() -> None:
    world = World()
    world.queue.add(row(1))
    world.there.answers = {"1.2.3.1": Verdict.BUSY}
    world.wait(6 * HOUR)
    assert world.uids() == {"1.2.3.1"} and len(world.there.batches) > LIMITS.tries_max
    world.there.answers.clear()
    world.wait(2 * HOUR)
    assert not world.queue.rows


def test_what_was_not_delivered_in_its_days_is_set_aside_with_the_last_reason() -> None:
    world = World()
    world.there.away = True
    world.queue.add(row(1, expires_us=2 * HOUR))
    world.wait(5 * HOUR)
    one, = world.queue.rows.values()
    assert (one.state, one.comment) == (RouteState.SET_ASIDE, "not delivered in time: no connection")


def test_what_expired_while_nobody_ran_gets_its_one_try() -> None:
    world = World()
    world.queue.add(row(1, expires_us=1))
    world.turns()
    assert world.there.received == {"1.2.3.1": 1}


def test_a_closed_window_postpones_its_rule_alone() -> None:
    from datetime import UTC

    world = World()
    world.router.use_hours({"night": Hours.parse("22:00-06:00", UTC)})
    world.now_us = 12 * HOUR  # noon of a day in 1970
    world.queue.add(row(1, rule="night"), row(2))
    world.wait(9 * HOUR)
    assert set(world.there.received) == {"1.2.3.2"}
    world.wait(2 * HOUR)
    assert set(world.there.received) == {"1.2.3.1", "1.2.3.2"}


def test_what_is_to_be_committed_stays_until_it_is() -> None:
    world = World()
    world.queue.add(*(row(number, commit=True) for number in (1, 2, 3, 4)))
    world.turns()
    assert world.uids(RouteState.COMMITTING) == {f"1.2.3.{number}" for number in (1, 2, 3, 4)}
    world.there.commits = {"1.2.3.1": Committed.YES, "1.2.3.2": Committed.NO, "1.2.3.4": Committed.UNKNOWN}
    world.wait(60 * SECOND)
    assert world.there.received["1.2.3.1"] == 1 and row(1).key in world.queue.sent
    assert world.there.received["1.2.3.2"] == 2  # it is sent again
    assert world.uids(RouteState.SET_ASIDE) == {"1.2.3.4"}
    world.wait(6 * HOUR)
    assert world.there.received["1.2.3.2"] == LIMITS.tries_max  # and not for ever
    assert world.uids(RouteState.COMMITTING) == {"1.2.3.3"}


@pytest.mark.parametrize("at", range(1, 12))
def test_killed_at_any_step_each_arrives(at: int) -> None:
    """What goes again is at most what was not yet written."""
    world = World()
    world.queue.add(*(row(number) for number in range(6)))
    world.queue.crash_in = at
    with pytest.raises(Crash):
        world.turns()
    world.queue.crash_in = 0
    world.start()
    world.turns()
    assert set(world.there.received) == {f"1.2.3.{number}" for number in range(6)}
    assert sum(world.there.received.values()) <= 6 + LIMITS.settle_rows
    assert not world.queue.rows


class Simulation(RuleBasedStateMachine):
    """Anything may fail, at any step; in the end all is well again."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.asked: set[str] = set()
        self.kills = 0
        self.number = 0

    @contextmanager
    def surviving(self) -> Iterator[None]:
        try:
            yield
        except Crash:
            self.kills += 1
            self.world.queue.crash_in = 0
            self.world.there.break_after = -1
            self.world.start()

    @rule(count=st.integers(1, 6), rank=st.integers(0, 2), verdict=st.sampled_from(Verdict),
          answer=st.none() | st.sampled_from(Committed))
    def queue(self, count: int, rank: int, verdict: Verdict, answer: Committed | None) -> None:
        """Rows of one kind; those with an answer are to be committed."""
        for _ in range(count):
            self.number += 1
            one = row(self.number, rank=rank, commit=answer is not None, expires_us=10**6 * HOUR)
            self.asked.add(one.sop_instance_uid)
            self.world.there.answers[one.sop_instance_uid] = verdict
            self.world.there.commits[one.sop_instance_uid] = answer or Committed.NOT_YET
            self.world.queue.add(replace(one, next_try_us=self.world.now_us))
        self.world.router.wake(ONCO)

    @rule(away=st.booleans())
    def leave_or_come(self, away: bool) -> None:
        self.world.there.away = away

    @rule(verdict=st.sampled_from(Verdict), answer=st.sampled_from(Committed), share=st.integers(1, 3))
    def change_its_mind(self, verdict: Verdict, answer: Committed, share: int) -> None:
        for number in range(1, self.number + 1, share):
            self.world.there.answers[f"1.2.3.{number}"] = verdict
            self.world.there.commits[f"1.2.3.{number}"] = answer

    @rule(after=st.integers(-1, 4))
    def break_later(self, after: int) -> None:
        self.world.there.break_after = after

    @rule(calls=st.integers(1, 15))
    def kill_later(self, calls: int) -> None:
        self.world.queue.crash_in = calls

    @rule(seconds=st.sampled_from([1, 10, 100, 4000]))
    def go_on(self, seconds: int) -> None:
        with self.surviving():
            self.world.wait(seconds * SECOND)

    @rule()
    def retry(self) -> None:
        for one in list(self.world.queue.rows.values()):
            if one.state is RouteState.SET_ASIDE:
                self.world.queue.rows[one.key] = replace(
                    one, state=RouteState.WAITING, tries=0, next_try_us=self.world.now_us)
        self.world.router.wake(ONCO, at_once=True)

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "world"):
            return
        queue = self.world.queue
        waiting = {one.sop_instance_uid for one in queue.rows.values()}
        delivered = {f"1.2.3.{n}" for n in range(1, self.number + 1) if row(n).key in queue.sent}
        assert waiting | delivered == self.asked
        assert not waiting & delivered
        assert all(self.world.there.received[uid] for uid in delivered)  # nothing is said sent that was not
        assert all(one.comment for one in queue.rows.values() if one.state is RouteState.SET_ASIDE)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        there = self.world.there
        there.away, there.break_after, there.answers = False, -1, {}
        there.commits = {uid: Committed.YES for uid in self.asked}
        self.world.queue.crash_in = 0
        self.retry()
        self.world.wait(8000 * SECOND)
        assert not self.world.queue.rows
        assert set(there.received) == self.asked


TestSimulation = Simulation.TestCase
TestSimulation.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
