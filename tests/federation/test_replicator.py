"""The replicator alone: each rule of its essay, and then a simulation in which anything may fail at any
step, from which every instance must come out in the region exactly once, with a true receipt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from archive.model import Fact, FactKind, InstanceHead, Location, Outcome, PendingInstance, Provenance
from federation.replicator import (
    Idle,
    Key,
    Limits,
    Offer,
    Received,
    Record,
    Refill,
    Refused,
    Replicator,
    Step,
    Verdict,
)

WARD = "san-martino/radiology"
NEED = Verdict(None)


def pending(number: int, *, urgent: bool = False, tries: int = 0) -> PendingInstance:
    head = InstanceHead(
        "1.2.840.10008.5.1.4.1.1.2",
        f"1.2.{number}",
        "1.2.840.10008.1.2.1",
        Provenance(WARD, "SM", "CT1", "CT1", 1_000 + number),
    )
    digest = number.to_bytes(32, "big")
    return PendingInstance(f"1.{number % 7}", head, digest, Location("p", 0, 100, 10), False, urgent, tries)


def receipt(row: PendingInstance, at_us: int = 5) -> Received:
    return Received(row.head.sop_instance_uid, row.digest, at_us, Outcome.STORED)


def machine(**limits: float) -> Replicator:
    chosen = replace(
        Limits(), **{name: type(getattr(Limits(), name))(value) for name, value in limits.items()}
    )
    return Replicator(WARD, chosen, random.Random(1))


def filled(rows: Sequence[PendingInstance], **limits: float) -> Replicator:
    replicator = machine(**limits)
    step = replicator.next(0)
    assert isinstance(step, Refill)
    replicator.refilled(rows, step.limit)
    return replicator


def offered(replicator: Replicator, now_s: float = 0.0) -> list[int]:
    """The numbers of what is offered next; all of it is needed."""
    step = replicator.next(now_s)
    if not isinstance(step, Offer):
        return []
    replicator.offered([NEED] * len(step.items))
    return [int.from_bytes(row.digest, "big") for row in step.items]


def taken(replicator: Replicator, stream: int = 0, now_s: float = 0.0) -> list[int]:
    out = []
    while (row := replicator.take(stream, now_s)) is not None:
        out.append(int.from_bytes(row.digest, "big"))
    return out


def recorded(replicator: Replicator, now_s: float = 0.0) -> Record:
    step = replicator.next(now_s)
    assert isinstance(step, Record)
    replicator.recorded()
    return step


def test_urgent_first_in_the_order_of_reading_then_newest() -> None:
    replicator = filled([pending(5, urgent=True), pending(9), pending(7), pending(2, urgent=True)])
    assert offered(replicator) == [2, 5, 9, 7]
    assert taken(replicator) == [2, 5, 9, 7]


def test_what_becomes_urgent_overtakes_what_waits() -> None:
    replicator = filled([pending(number) for number in (9, 8, 7)])
    assert offered(replicator) == [9, 8, 7]
    replicator.woken(urgent=True)
    step = replicator.next(0)
    assert isinstance(step, Refill)
    replicator.refilled([pending(7, urgent=True), pending(9), pending(8)], step.limit)
    assert taken(replicator) == [7, 9, 8]


def test_a_stream_that_is_kept_for_the_urgent_takes_nothing_else() -> None:
    replicator = filled([pending(5), pending(7)])
    assert offered(replicator) == [7, 5]
    assert replicator.take(1, 0.0, urgent_only=True) is None
    replicator.woken(urgent=True)
    step = replicator.next(0)
    assert isinstance(step, Refill)
    replicator.refilled([pending(5, urgent=True), pending(7)], step.limit)
    taken_row = replicator.take(1, 0.0, urgent_only=True)
    assert taken_row is not None and taken_row.digest == pending(5).digest
    assert taken(replicator) == [7]


@pytest.mark.parametrize(("said", "offset"), [(40, 40), (0, 0), (-3, 0), (90, 90), (1 << 40, 90)])
def test_a_push_goes_on_behind_what_the_region_has(said: int, offset: int) -> None:
    row = pending(1)
    replicator = filled([row])
    assert isinstance(replicator.next(0), Offer)
    replicator.offered([Verdict(None, said)])
    assert taken(replicator) == [1]
    assert (row.dataset_bytes, replicator.resumes_at(row)) == (90, offset)
    replicator.stream_ended(0, 0.0, 0, failed=True)
    replicator.line_up()
    assert isinstance(replicator.next(0), Offer)
    replicator.offered([NEED])
    assert replicator.resumes_at(row) == 0  # the last word counts


def test_have_is_a_receipt_and_nothing_moves() -> None:
    row = pending(1)
    replicator = filled([row])
    assert isinstance(replicator.next(0), Offer)
    replicator.offered([Verdict(receipt(row, 77))])
    assert taken(replicator) == []
    (fact,) = recorded(replicator).facts
    assert (fact.kind, fact.sop_instance_uid, fact.digest, fact.at_us, fact.ward) == (
        FactKind.RECEIPT,
        "1.2.1",
        row.digest,
        77,
        WARD,
    )
    assert replicator.known == 0


def test_a_receipt_for_other_bytes_is_no_receipt() -> None:
    row = pending(1)
    replicator = filled([row])
    assert isinstance(replicator.next(0), Offer)
    replicator.offered([Verdict(receipt(pending(2)))])
    assert offered(replicator) == [1]
    assert taken(replicator) == [1]
    assert not replicator.received(0, replace(receipt(row), digest=b"x" * 32))
    assert not replicator.received(1, receipt(row))
    assert isinstance(replicator.next(0), Idle)
    assert replicator.received(0, receipt(row))


def test_refused_often_is_set_aside_with_the_reason_and_the_others_pass() -> None:
    replicator = filled([pending(2), pending(1)], tries_max=3)
    now = 0.0
    for attempt in (1, 2, 3):
        assert 2 in offered(replicator, now)
        assert 2 in taken(replicator, now_s=now)
        if attempt == 1:
            assert replicator.received(0, receipt(pending(1)))
        refusal = Refused("1.2.2", pending(2).digest, "digest differs", False)
        assert replicator.refused(0, refusal, now, 99)
        record = recorded(replicator, now)
        assert record.tries == (("1.2.2", pending(2).digest),)
        kinds = [fact.kind for fact in record.facts]
        assert kinds == {1: [FactKind.RECEIPT], 2: [], 3: [FactKind.SET_ASIDE]}[attempt]
        assert offered(replicator, now) == []
        now += 100
    assert "digest differs" in record.facts[-1].detail
    assert replicator.known == 0


def test_a_permanent_refusal_is_set_aside_at_once() -> None:
    replicator = filled([pending(2)])
    offered(replicator)
    taken(replicator)
    replicator.refused(0, Refused("1.2.2", pending(2).digest, "no UID", True), 0, 9)
    assert [fact.kind for fact in recorded(replicator).facts] == [FactKind.SET_ASIDE]


def test_tries_of_an_earlier_life_count() -> None:
    replicator = filled([pending(2, tries=4)])
    offered(replicator)
    taken(replicator)
    replicator.refused(0, Refused("1.2.2", pending(2).digest, "digest differs", False), 0, 9)
    assert [fact.kind for fact in recorded(replicator).facts] == [FactKind.SET_ASIDE]


def test_damaged_bytes_are_noted_and_never_sent_again() -> None:
    row = pending(3)
    replicator = filled([row])
    offered(replicator)
    taken(replicator)
    replicator.damaged(0, row, 8)
    assert [fact.kind for fact in recorded(replicator).facts] == [FactKind.DAMAGE, FactKind.SET_ASIDE]
    assert replicator.known == 0


def test_a_broken_stream_offers_anew_what_had_no_verdict() -> None:
    replicator = filled([pending(number) for number in (3, 2, 1)])
    offered(replicator)
    assert taken(replicator) == [3, 2, 1]
    replicator.received(0, receipt(pending(3)))
    replicator.stream_ended(0, 0, 9, failed=True)
    recorded(replicator)
    assert offered(replicator, 100) == [1, 2]  # what it was at goes behind the others
    assert taken(replicator, 0, 100) == [1, 2]


def test_the_line_backs_off_with_a_cap_and_a_receipt_ends_it() -> None:
    replicator = filled([pending(1)], backoff_first_s=1, backoff_cap_s=10)
    now, pauses = 0.0, []
    for _ in range(8):
        assert isinstance(replicator.next(now), Offer)
        replicator.line_failed(now)
        step = replicator.next(now)
        assert isinstance(step, Idle) and step.until_s is not None
        pauses.append(step.until_s - now)
        now = step.until_s
    assert 0.5 <= pauses[0] <= 1
    assert all(5 <= pause <= 10 for pause in pauses[4:])
    assert offered(replicator, now) == [1]


def test_facts_are_recorded_while_the_line_is_down() -> None:
    replicator = filled([pending(2), pending(1)])
    offered(replicator)
    taken(replicator)
    replicator.received(0, receipt(pending(2)))
    replicator.stream_ended(0, 0, 9, failed=True)
    assert [fact.kind for fact in recorded(replicator).facts] == [FactKind.RECEIPT]


def test_facts_are_recorded_in_one_go_with_those_that_come_soon_after() -> None:
    replicator = filled([pending(number) for number in range(1, 9)], record_facts=4, record_gap_s=0.1)
    offered(replicator)
    rows = [replicator.take(0, 0.0) for _ in range(8)]
    told = [receipt(row) for row in rows if row is not None]
    assert replicator.received(0, told[0]) and len(recorded(replicator).facts) == 1
    assert replicator.received(0, told[1]) and replicator.received(0, told[2])
    assert replicator.next(0.05) == Idle(0.1)
    assert len(recorded(replicator, 0.1).facts) == 2
    for one in told[3:7]:
        assert replicator.received(0, one)
    assert len(recorded(replicator, 0.1).facts) == 4, "a full one waits for nothing"


def test_rows_stay_known_until_their_fact_is_synced() -> None:
    row = pending(1)
    replicator = filled([row])
    offered(replicator)
    taken(replicator)
    replicator.received(0, receipt(row))
    assert isinstance(replicator.next(0), Record)
    replicator.woken()
    assert isinstance(replicator.next(0), Idle)  # no refill beside a record
    replicator.record_failed(0)
    assert isinstance(replicator.next(50), Record)
    replicator.recorded()
    step = replicator.next(50)
    assert isinstance(step, Refill)
    replicator.refilled([], step.limit)
    assert replicator.known == 0


def test_a_receipt_is_not_recorded_while_the_outbox_is_read() -> None:
    """The rows that are being read may hold it still: they must not bring it back after it was recorded."""
    row = pending(1)
    replicator = filled([row])
    offered(replicator)
    taken(replicator)
    replicator.woken()
    step = replicator.next(0)
    assert isinstance(step, Refill)
    replicator.received(0, receipt(row))
    assert isinstance(replicator.next(0), Idle)
    replicator.refilled([row], step.limit)
    recorded(replicator)
    assert replicator.known == 0
    assert offered(replicator) == []


def test_without_a_line_nothing_is_offered_and_facts_are_recorded() -> None:
    replicator = filled([pending(2), pending(1)])
    offered(replicator)
    assert replicator.take(0, 0.0) is not None
    replicator.line_down()
    assert replicator.take(0, 0.0) is None
    replicator.received(0, receipt(pending(2)))
    recorded(replicator)
    replicator.stream_ended(0, 0.0, 9, failed=True)
    replicator.line_up()
    assert taken(replicator) == [1]  # at once: the line is new


def test_small_objects_are_taken_up_to_a_size_and_in_order() -> None:
    replicator = filled([pending(3), pending(2)])
    offered(replicator)
    assert replicator.take(0, 0.0, 89) is None
    assert replicator.take(0, 0.0, 90) == pending(3)


def test_hold_delivers_only_what_a_reader_asked_for() -> None:
    replicator = Replicator(WARD, Limits(), random.Random(1), hold=True)
    step = replicator.next(0)
    assert isinstance(step, Refill)
    replicator.refilled([pending(3, urgent=True), pending(9), pending(8)], step.limit)
    assert offered(replicator) == [3]
    assert taken(replicator) == [3]


def test_the_window_is_bounded_and_refills_when_half_empty() -> None:
    replicator = filled([pending(number) for number in range(30, 0, -1)], window=10)
    assert replicator.known == 20
    assert isinstance(replicator.next(0), Offer)
    assert isinstance(replicator.next(0), Idle)


def test_a_stream_has_no_more_on_its_way_than_its_bound() -> None:
    replicator = filled([pending(number) for number in range(9, 0, -1)], unacknowledged=4)
    offered(replicator)
    assert taken(replicator, 0) == [9, 8, 7, 6]
    assert taken(replicator, 1) == [5, 4, 3, 2]
    replicator.received(0, receipt(pending(8)))
    assert taken(replicator, 0) == [1]


@dataclass
class Region:
    """A pretended region: what is stored survives crashes."""

    stored: dict[Key, int] = field(default_factory=dict)

    def push(self, key: Key) -> Received:
        self.stored.setdefault(key, 0)
        if self.stored[key] == 0:
            self.stored[key] = 1  # intake appends once for one content
        return Received(key[0], key[1], 1, Outcome.STORED)


class Simulation:
    """One ward, one region and a wire that fails, on virtual time, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.region = Region()
        self.outbox: dict[Key, PendingInstance] = {}
        self.poison: set[Key] = set()
        self.facts: list[Fact] = []
        self.now_s = 0.0
        self.made = 0
        self.faults = self.chance.choice((0.0, 0.02, 0.1, 0.3))
        self.limits = Limits(
            window=self.chance.choice((1, 4, 20)), offer_items=7, unacknowledged=3, tries_max=3
        )
        self.start()

    def start(self) -> None:
        """The node starts: nothing of the machine survives, the outbox does."""
        self.replicator = Replicator(WARD, self.limits, random.Random(self.chance.random()))
        self.steps: list[Step] = []
        self.on_wire: dict[int, list[PendingInstance]] = {0: [], 1: []}
        self.replies: dict[int, list[Received | Refused]] = {0: [], 1: []}

    def acquire(self, count: int) -> None:
        for _ in range(count):
            self.made += 1
            row = pending(self.made)
            key = row.head.sop_instance_uid, row.digest
            self.outbox[key] = row
            if self.chance.random() < 0.05:
                self.poison.add(key)
        self.replicator.woken()

    def fails(self) -> bool:
        return self.chance.random() < self.faults

    def turn(self) -> None:
        """One thing happens, anywhere."""
        self.now_s += self.chance.random()
        if self.fails() and self.chance.random() < 0.2:
            self.start()
            return
        kind = self.chance.choice(("step", "step", "act", "act", "take", "carry", "reply", "break"))
        stream = self.chance.choice((0, 1))
        if kind == "step":
            step = self.replicator.next(self.now_s)
            if not isinstance(step, Idle):
                self.steps.append(step)
        elif kind == "act" and self.steps:
            self.act(self.steps.pop(self.chance.randrange(len(self.steps))))
        elif kind == "take":
            row = self.replicator.take(stream, self.now_s)
            if row is not None:
                self.on_wire[stream].append(row)
        elif kind == "carry" and self.on_wire[stream]:
            self.carry(stream, self.on_wire[stream].pop(0))
        elif kind == "reply" and self.replies[stream]:
            self.reply(stream, self.replies[stream].pop(0))
        elif kind == "break" and self.fails():
            self.on_wire[stream].clear()
            self.replies[stream].clear()
            blame = self.chance.choice(("", "an unexpected error"))
            self.replicator.stream_ended(stream, self.now_s, 1, failed=True, blame=blame)

    def act(self, step: Step) -> None:
        if isinstance(step, Refill):
            if self.fails():
                self.replicator.refill_failed(self.now_s)
                return
            rows = sorted(
                self.outbox.values(), key=lambda row: (not row.urgent, -row.head.provenance.received_at_us)
            )
            known = [step.known.get((row.head.sop_instance_uid, row.digest), -1) for row in rows]
            news = [row for row, as_urgent in zip(rows, known, strict=True) if row.urgent > as_urgent]
            self.replicator.refilled(news[: step.limit], step.limit)
        elif isinstance(step, Offer):
            if self.fails():
                self.replicator.line_failed(self.now_s)
                return
            keys = [(row.head.sop_instance_uid, row.digest) for row in step.items]
            have = [self.region.push(key) if key in self.region.stored else None for key in keys]
            self.replicator.offered([Verdict(receipt) for receipt in have])
        elif isinstance(step, Record):
            landed = not self.fails()
            if landed or self.chance.random() < 0.5:  # a sync that is not confirmed may have happened
                self.land(step)
            if landed:
                self.replicator.recorded()
            else:
                self.replicator.record_failed(self.now_s)

    def land(self, step: Record) -> None:
        self.facts += step.facts
        for key in step.tries:
            if key in self.outbox:
                self.outbox[key] = replace(self.outbox[key], tries=self.outbox[key].tries + 1)
        for fact in step.facts:
            self.outbox.pop((fact.sop_instance_uid, fact.digest), None)

    def carry(self, stream: int, row: PendingInstance) -> None:
        key = row.head.sop_instance_uid, row.digest
        if key in self.poison or (self.fails() and self.chance.random() < 0.1):
            self.replies[stream].append(Refused(*key, "digest differs", self.chance.random() < 0.3))
        else:
            self.replies[stream].append(self.region.push(key))

    def reply(self, stream: int, reply: Received | Refused) -> None:
        if isinstance(reply, Received):
            assert self.replicator.received(stream, reply)
        else:
            assert self.replicator.refused(stream, reply, self.now_s, 1)

    def run(self) -> None:
        for _ in range(300):
            if self.chance.random() < 0.1:
                self.acquire(self.chance.randrange(1, 6))
            self.turn()
            assert self.replicator.known <= 2 * self.limits.window
            receipts = [fact for fact in self.facts if fact.kind is FactKind.RECEIPT]
            assert all((fact.sop_instance_uid, fact.digest) in self.region.stored for fact in receipts)
        self.faults = 0.0
        for _ in range(60_000):
            self.turn()
            if not self.outbox:
                break
        else:
            raise AssertionError(f"{len(self.outbox)} never delivered")


@pytest.mark.parametrize("block", range(8))
def test_whatever_fails_everything_arrives_once_and_every_receipt_is_true(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        simulation = Simulation(seed)
        simulation.run()
        aside = {(f.sop_instance_uid, f.digest) for f in simulation.facts if f.kind is FactKind.SET_ASIDE}
        received = {(f.sop_instance_uid, f.digest) for f in simulation.facts if f.kind is FactKind.RECEIPT}
        made = {(pending(n).head.sop_instance_uid, pending(n).digest) for n in range(1, simulation.made + 1)}
        assert received | aside == made, f"seed {seed}"
        assert received <= set(simulation.region.stored), f"seed {seed}"
        assert simulation.poison <= aside, f"seed {seed}"
        assert not received & simulation.poison, f"seed {seed}"
        assert set(simulation.region.stored.values()) <= {1}, f"seed {seed}"
