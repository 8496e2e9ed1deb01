"""Three wards, a region, and everything that goes wrong between them, on one thread and a clock that is only
counted: the product's own replicator, intake, receipts, coverage and eviction, over disks that lose what was
not synced and a line that breaks, lags, and changes bytes. A seed gives the same history every time.

What is held against it, again and again:

- *acknowledged => readable*: what a modality was told is stored, the ward reads by its very bytes, or, once
  it gave them up, the region does;
- *receipt => durable*: what the region gave a receipt for, it reads, after every crash;
- *covered => there*: when the region says that a ward is complete up to a time, all that the ward had
  acknowledged then is in the region;
- in the end, when everything is mended, everything has arrived, once, and nothing is pending.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from archive.errors import MissError, OutOfResources, SyncFailed, Unavailable
from archive.ledger import WardState
from archive.model import InstanceHead, PendingInstance, Provenance, Ward
from federation import coverage, serde
from federation.coverage import Report
from federation.reading import read_chunks
from federation.receiving import Receiver
from federation.replicator import Idle, Key, Limits, Offer, Received, Record, Refill, Replicator, Verdict
from miss.load import instances
from protos import uplink_pb2
from tests.simulation.sites import Crash, Site

EPOCH_S = 1_700_000_000.0
STREAMS = 2
GROUP = 4
LATENCY_S = (0.005, 0.25)
RESTART_S = (0.5, 8.0)
REPORT_S = 5.0
LOST_LINE_S = 5.0  # after that a side knows that the line is gone
FAULTS_S = 60.0
MENDED_S_MAX = 3_600.0
LIMITS = Limits(window=16, offer_items=6, unacknowledged=8, tries_max=8, backoff_cap_s=4.0)
CORPUS = instances.small()
_DATASETS = [(CORPUS.instance(number), b"".join(map(bytes, CORPUS.instance(number).chunks())))
             for number in range(60)]


class Broken(AssertionError):
    """A promise that was not kept."""


@dataclass(eq=False)
class Ended:
    """Stands for one life of a process, or of a line: what was under way in it is void when it ends."""

    over: bool = False


class Clock:
    """Virtual time, and what is to happen in it."""

    def __init__(self) -> None:
        self.now_s = EPOCH_S
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    @property
    def now_us(self) -> int:
        return int(self.now_s * 1e6)

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._numbers), event))

    def run(self, until_s: float) -> None:
        """Lets things happen until then."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        self.now_s = max(self.now_s, until_s)


@dataclass
class Line:
    """Between a ward and the region. What breaks in one direction breaks the line, later."""

    outward: bool = True
    inward: bool = True

    @property
    def whole(self) -> bool:
        return self.outward and self.inward


class Region:
    """The hub: its archive, what it keeps of the wards, and whether it runs."""

    def __init__(self, world: World, site: Site) -> None:
        self.world = world
        self.site = site
        self.states: dict[str, WardState] = {}  # the ledger: synced at every write
        self.reports: dict[str, float] = {}     # when the report was made that `complete_to` stands for
        self.life = Ended()
        self.up = True

    @property
    def receiver(self) -> Receiver:
        return Receiver(self.site.archive, lambda: self.world.clock.now_us)

    def guarded(self, act: Callable[[], None]) -> None:
        """The process ends where a crash was set; what it was doing is cut off there."""
        try:
            act()
        except Crash:
            self.crash()

    def crash(self) -> None:
        world = self.world
        self.life.over, self.life, self.up = True, Ended(), False
        self.site.crash(world.chance, power=world.chance.random() < 0.5)
        self.states = {ward: coverage.departed(state) for ward, state in self.states.items()}
        world.clock.after(world.chance.uniform(*RESTART_S), self.restart)

    def restart(self) -> None:
        self.up = True
        self.guarded(self._reopen)

    def _reopen(self) -> None:
        self.site.reopen()
        self.world.check_receipts("after the region's crash")


class WardNode:
    """A node: its archive, its replicator on a pretended wire, and what it told its modalities."""

    def __init__(self, world: World, ward: Ward, site: Site) -> None:
        self.world = world
        self.ward = ward
        self.site = site
        self.up = True
        self.line = Line()
        self.life = Ended()
        self.attach: Ended | None = None
        self.acknowledged: dict[Key, float] = {}
        self.sent: set[str] = set()
        self.receipts: set[Key] = set()
        self.calls: dict[int, Ended] = {}
        self._begin()

    def _begin(self) -> None:
        self.replicator = Replicator(self.ward.id, LIMITS, self.world.chance)
        self.replicator.line_down()
        self._wake_at_s = -1.0
        self._seen: object = None
        self._later(self._try_to_attach, 0.1)
        self._later(self._watch, 0.1)

    def _later(self, act: Callable[[], None], delay_s: float) -> None:
        """In this life of the process, or never."""
        life = self.life

        def event() -> None:
            if not life.over:
                self.guarded(act)

        self.world.clock.after(delay_s, event)

    def guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Crash:
            self.crash()

    # Modalities.

    def store(self, uid_number: int, *, other: bool) -> None:
        """A modality sends; what it is told is remembered."""
        instance, dataset = _DATASETS[uid_number % len(_DATASETS)]
        if other:
            dataset = dataset[:-1] + bytes([dataset[-1] ^ 1])
        self.sent.add(instance.sop_instance_uid)
        head = InstanceHead(
            instance.sop_class_uid, instance.sop_instance_uid, instance.transfer_syntax_uid,
            Provenance(self.ward.id, self.ward.issuer, "CT1", "CT1", self.world.clock.now_us))
        try:
            digest, _ = self.site.take(head, dataset)
        except (SyncFailed, OutOfResources, Unavailable):
            return
        if digest != hashlib.sha256(dataset).digest():
            raise Broken("another digest than that of what was sent")
        self.acknowledged.setdefault((instance.sop_instance_uid, digest), self.world.clock.now_s)

    def backlog(self) -> int:
        """What has no receipt, of all that was acknowledged."""
        self.site.archive.wait_indexed()
        return self.site.archive.index.pending_summary().count

    # The line.

    def _try_to_attach(self) -> None:
        region, world = self.world.region, self.world
        if self.attach is None and self.line.whole and region.up:
            self.attach = attach = Ended()
            state = region.states.get(self.ward.id)
            region.states[self.ward.id] = coverage.greeted(
                state, self.ward.id, epoch=self.site.archive.epoch, version="1", now_us=world.clock.now_us)
            self._watch_line(attach, region.life)
            self.replicator.line_up()
            self._report(attach)
            self.pump()
        self._later(self._try_to_attach, world.chance.uniform(0.2, 2.0))

    def _watch_line(self, attach: Ended, hub: Ended) -> None:
        """The node learns of a line that is gone a while after it went."""
        def look() -> None:
            if attach.over:
                return
            if hub.over or not self.line.whole:
                self.detach()
            else:
                self._later(look, 0.5)

        self._later(look, 0.5)

    def detach(self) -> None:
        attach, self.attach = self.attach, None
        if attach is None:
            return
        attach.over = True
        self.replicator.line_down()
        for stream in list(self.calls):
            self._end_call(stream, failed=True)
        region = self.world.region
        if region.up and self.ward.id in region.states:
            region.states[self.ward.id] = coverage.departed(region.states[self.ward.id])

    def _send(self, attach: Ended, act: Callable[[], None]) -> None:
        """Has `act` happen at the region, if the line and the region live so long."""
        region, world = self.world.region, self.world
        life = region.life

        def event() -> None:
            if not attach.over and self.line.outward and region.up and not life.over:
                region.guarded(act)

        world.clock.after(world.chance.uniform(*LATENCY_S), event)

    def _answer(self, attach: Ended, act: Callable[[], None]) -> None:
        """Has `act` happen here, likewise."""
        life, world = self.life, self.world

        def event() -> None:
            if not attach.over and not life.over and self.line.inward:
                self.guarded(act)

        world.clock.after(world.chance.uniform(*LATENCY_S), event)

    # Reports.

    def _report(self, attach: Ended) -> None:
        if attach.over:
            return
        try:
            self.site.archive.wait_indexed()
            summary = self.site.archive.index.pending_summary()
        except MissError:
            summary = None
        made_s = self.world.clock.now_s
        if summary is not None:
            report = Report(pending=summary.count - summary.set_aside, set_aside=summary.set_aside)
            self._send(attach, lambda: self.world.reported(self.ward.id, report, made_s))
        self._later(lambda: self._report(attach), REPORT_S)

    # The replicator on its wire.

    def _watch(self) -> None:
        """Sees that the index moved on: here by what was told to modalities."""
        now = (self.site.parts.indexer.position, self.life)
        if now != self._seen:
            self._seen = now
            self.replicator.woken(urgent=self.world.chance.random() < 0.05)
            self.pump()
        self._later(self._watch, 0.5)

    def pump(self) -> None:
        """Does what the replicator says until it says nothing more."""
        clock = self.world.clock
        while not isinstance(step := self.replicator.next(clock.now_s), Idle):
            if isinstance(step, Refill):
                try:
                    rows = self.site.archive.index.pending(step.limit, step.known)
                except MissError:
                    self.replicator.refill_failed(clock.now_s)
                else:
                    self.replicator.refilled(rows, step.limit)
            elif isinstance(step, Record):
                self._record(step)
            elif isinstance(step, Offer):
                self._offer(step)
        if step.until_s is not None and step.until_s != self._wake_at_s:
            self._wake_at_s = step.until_s
            self._later(self.pump, max(step.until_s - clock.now_s, 0.0))
        if self.attach is not None:
            for stream in range(STREAMS):
                self._push(stream, self.attach)

    def _record(self, step: Record) -> None:
        try:
            for uid, digest in step.tries:
                self.site.archive.index.note_try(uid, digest)
            if step.facts:
                self.site.archive.record_facts(step.facts)
        except MissError:
            self.replicator.record_failed(self.world.clock.now_s)
        else:
            self.replicator.recorded()

    def _offer(self, step: Offer) -> None:
        attach, region = self.attach, self.world.region
        assert attach is not None
        items = [uplink_pb2.OfferItem(sop_instance_uid=row.head.sop_instance_uid, digest=row.digest,
                                      size=row.dataset_bytes) for row in step.items]
        answered = Ended()

        def ask() -> None:
            try:
                found = region.receiver.verdicts(self.ward.id, items)
            except MissError:
                self._answer(attach, fail)
            else:
                self._answer(attach, lambda: take([_verdict(one) for one in found]))

        def take(verdicts: list[Verdict]) -> None:
            if not answered.over:
                answered.over = True
                self.replicator.offered(verdicts)
                self.pump()

        def fail() -> None:
            if not answered.over:
                answered.over = True
                self.replicator.line_failed(self.world.clock.now_s)
                self.pump()

        self._send(attach, ask)
        self._later(fail, LOST_LINE_S)

    def _push(self, stream: int, attach: Ended) -> None:
        """One message of a push stream; the next goes when its verdicts have come."""
        if stream in self.calls:
            return
        rows: list[PendingInstance] = []
        while len(rows) < GROUP and (row := self.replicator.take(stream, self.world.clock.now_s)) is not None:
            rows.append(row)
        group = uplink_pb2.PushGroup()
        for row in rows:
            if (whole := self._whole(stream, row)) is not None:
                group.objects.append(whole)
        if not group.objects:
            return
        self.calls[stream] = call = Ended()
        self._send(attach, lambda: self._received(stream, attach, call, group))
        self._later(lambda: None if call.over else self._end_call(stream, failed=True), 2 * LOST_LINE_S)

    def _whole(self, stream: int, row: PendingInstance) -> uplink_pb2.PushWhole | None:
        uid, world = row.head.sop_instance_uid, self.world
        try:
            dataset = b"".join(read_chunks(self.site.archive, uid, row.digest, row.location))
        except (MissError, OSError):
            self.replicator.damaged(stream, row, world.clock.now_us)
            return None
        if world.chance.random() < world.flips:
            place = world.chance.randrange(len(dataset))
            dataset = dataset[:place] + bytes([dataset[place] ^ 0x10]) + dataset[place + 1 :]
        begin = uplink_pb2.PushBegin(head=serde.head_to(row.head), size=len(dataset), conflict=row.conflict)
        return uplink_pb2.PushWhole(begin=begin, dataset=dataset, digest=row.digest)

    def _received(self, stream: int, attach: Ended, call: Ended, group: uplink_pb2.PushGroup) -> None:
        """At the region: taken now, settled a moment later, so that it may crash between the two."""
        region, world = self.world.region, self.world
        taken = region.receiver.incoming(self.ward.id).take([uplink_pb2.PushRequest(group=group)])
        life = region.life

        def settle() -> None:
            try:
                receipts = region.receiver.settle(self.ward.id, taken.pushed)
            except MissError:
                self._answer(attach, lambda: self._end_call(stream, failed=True))
                return
            world.given |= {(one.sop_instance_uid, one.digest) for one in receipts}
            self._answer(attach, lambda: heard(receipts))

        def heard(receipts: Sequence[object]) -> None:
            if call.over:
                return
            for receipt in receipts:
                assert isinstance(receipt, Received)
                if self.replicator.received(stream, receipt):
                    self.receipts.add((receipt.sop_instance_uid, receipt.digest))
            for refusal in taken.refused:
                self.replicator.refused(stream, refusal, world.clock.now_s, world.clock.now_us)
            self._end_call(stream, failed=taken.error is not None)

        def event() -> None:
            if region.up and not life.over:
                region.guarded(settle)

        world.clock.after(world.chance.uniform(0.0, 0.1), event)

    def _end_call(self, stream: int, *, failed: bool) -> None:
        call = self.calls.pop(stream, None)
        if call is None:
            return
        call.over = True
        left = self.replicator.unacknowledged(stream) > 0
        now_s, now_us = self.world.clock.now_s, self.world.clock.now_us
        self.replicator.stream_ended(stream, now_s, now_us, failed=failed or left)
        self._later(self.pump, 0.0)

    # What happens to it.

    def crash(self) -> None:
        world = self.world
        self.life.over, self.life, self.up = True, Ended(), False
        attach, self.attach = self.attach, None
        if attach is not None:
            attach.over = True
        self.calls.clear()
        self.site.crash(world.chance, power=world.chance.random() < 0.5)
        state = world.region.states.get(self.ward.id)
        if state is not None:
            world.region.states[self.ward.id] = coverage.departed(state)
        world.clock.after(world.chance.uniform(*RESTART_S), self.restart)

    def restart(self) -> None:
        self.up = True
        self.guarded(self._reopen)

    def _reopen(self) -> None:
        self.site.reopen()
        self._begin()
        self.world.check_acknowledged(self, "after the ward's crash")


@dataclass
class World:
    """One history. `run` raises Broken when a promise was not kept."""

    seed: int
    folder: Path
    template: Path
    wards: int = 3
    stores: int = 36
    flips: float = 0.02
    clock: Clock = field(default_factory=Clock)
    given: set[Key] = field(default_factory=set)  # what the region gave a receipt for
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.region = Region(self, self._site("region", outbox=False))
        self.nodes = [
            WardNode(self, Ward(f"h{number}/w", f"H{number}", "W", f"I{number}"),
                     self._site(f"ward{number}", outbox=True))
            for number in range(self.wards)
        ]

    def _site(self, name: str, *, outbox: bool) -> Site:
        return Site(f"{self.seed}-{name}", self.folder, outbox=outbox, template=self.template)

    def close(self) -> None:
        for site in (self.region.site, *(node.site for node in self.nodes)):
            site.close()

    def run(self) -> None:
        self._plan()
        self.clock.run(EPOCH_S + FAULTS_S)
        self._mend()
        until_s = self.clock.now_s + MENDED_S_MAX
        while not self._settled() and self.clock.now_s < until_s:
            self.clock.run(self.clock.now_s + 2.0)
        if not self._settled():
            raise Broken("it does not come to rest: " + ", ".join(
                f"{node.ward.id} has {node.site.archive.index.pending_summary()}" for node in self.nodes))
        self.check_receipts("in the end")
        for node in self.nodes:
            self.check_acknowledged(node, "in the end")
            for uid, digest in node.acknowledged:
                if problem := self.region.site.problem(uid, digest):
                    raise Broken(f"{node.ward.id}: {uid} in the region {problem}")
        totals = self.region.site.archive.index.totals()
        held = {uid for node in self.nodes for uid, _ in node.acknowledged}
        sent = set().union(*(node.sent for node in self.nodes))
        if not len(held) <= totals.instances <= len(sent):
            raise Broken(f"the region counts {totals.instances} instances of {len(held)} to {len(sent)}")

    # The plan of a history.

    def _plan(self) -> None:
        chance, after = self.chance, self.clock.after
        for _ in range(self.stores):
            node = chance.choice(self.nodes)
            number = chance.randrange(len(_DATASETS) * 2) // (1 if chance.random() < 0.9 else 4)
            other = chance.random() < 0.06
            after(chance.uniform(0, FAULTS_S * 0.9), lambda n=node, k=number, o=other: self._store(n, k, o))  # type: ignore[misc]
        faults = (self._crash_ward, self._crash_region, self._cut, self._cut, self._fail_sync, self._evict,
                  self._crash_soon, self._crash_soon, self._rest, self._check)
        for _ in range(chance.randrange(4, 14)):
            after(chance.uniform(1, FAULTS_S), chance.choice(faults))

    def _store(self, node: WardNode, number: int, other: bool) -> None:
        if node.up:
            node.guarded(lambda: node.store(number, other=other))

    def _crash_ward(self) -> None:
        if (node := self.chance.choice(self.nodes)).up:
            node.crash()

    def _crash_region(self) -> None:
        if self.region.up:
            self.region.crash()

    def _crash_soon(self) -> None:
        """In the middle of something: before one of the next syncs."""
        site = self.chance.choice([self.region.site, *(node.site for node in self.nodes)])
        site.crash_at_sync(self.chance.randrange(1, 12))

    def _cut(self) -> None:
        node = self.chance.choice(self.nodes)
        node.line = Line(*self.chance.choice([(False, False), (True, False), (False, True)]))

        def heal() -> None:
            node.line = Line()

        self.clock.after(self.chance.uniform(1, 40), heal)

    def _fail_sync(self) -> None:
        site = self.chance.choice([self.region.site, *(node.site for node in self.nodes)])
        site.disk.fail_syncs = self.chance.randrange(1, 3)

    def _evict(self) -> None:
        if (node := self.chance.choice(self.nodes)).up:
            def act() -> None:
                try:
                    node.site.evict(self.clock.now_us + 1)
                except MissError as error:
                    self.log.append(f"no eviction: {error}")
            node.guarded(act)

    def _rest(self) -> None:
        for node in self.nodes:
            if node.up:
                def act(node: WardNode = node) -> None:
                    try:
                        node.site.idle()
                    except MissError as error:
                        self.log.append(f"no mark: {error}")
                node.guarded(act)

    def _check(self) -> None:
        if self.region.up:
            self.check_receipts("on the way")
        for node in self.nodes:
            if node.up and self.region.up:
                self.check_acknowledged(node, "on the way")

    def _mend(self) -> None:
        for site in (self.region.site, *(node.site for node in self.nodes)):
            site.disk.before_sync = None
            site.disk.fail_syncs = 0
        for node in self.nodes:
            node.line = Line()
        self.flips = 0.0

    def _settled(self) -> bool:
        if not (self.region.up and all(node.up for node in self.nodes)):
            return False
        return all(not node.calls and self._is_covered(node) and node.backlog() == 0 for node in self.nodes)

    def _is_covered(self, node: WardNode) -> bool:
        state = self.region.states.get(node.ward.id)
        return coverage.coverage_of(node.ward, state, self.clock.now_us).covered

    # What is held against it.

    def reported(self, ward: str, report: Report, made_s: float) -> None:
        """At the region: a report came."""
        region = self.region
        state = region.states.get(ward) or coverage.blank(ward)
        before = state.complete_to_us
        region.states[ward] = after = coverage.reported(state, report, self.clock.now_us)
        if after.complete_to_us != before:
            region.reports[ward] = made_s
            self._check_coverage(next(node for node in self.nodes if node.ward.id == ward))

    def _check_coverage(self, node: WardNode) -> None:
        made_s = self.region.reports[node.ward.id]
        for (uid, digest), at_s in node.acknowledged.items():
            if at_s <= made_s and (problem := self.region.site.problem(uid, digest)):
                raise Broken(f"{node.ward.id} is complete up to later, and {uid} in the region {problem}")

    def check_receipts(self, when: str) -> None:
        """What the region confirmed is there by its very bytes."""
        if not self.region.up:
            return
        for uid, digest in sorted(self.given):
            if problem := self.region.site.problem(uid, digest):
                raise Broken(f"{when}: {uid} has a receipt, and in the region {problem}")

    def check_acknowledged(self, node: WardNode, when: str) -> None:
        for uid, digest in node.acknowledged:
            site = node.site
            if site.evicted(uid, digest):
                if not self.region.up:
                    continue
                if (uid, digest) not in self.given:
                    raise Broken(f"{when}: {uid} was given up at {node.ward.id} without a receipt")
                site = self.region.site
            if problem := site.problem(uid, digest):
                raise Broken(f"{when}: {uid} was acknowledged by {node.ward.id}, and {problem}")


def _verdict(receipt: object) -> Verdict:
    return Verdict(receipt if isinstance(receipt, Received) else None)
