"""How a node's instances get to the region, each exactly once. A state machine: it is told what happened and
says what to do next; `federation/delivery.py` does it on a real wire, a simulation on a pretended one.

**What is to be delivered** is the outbox of the node's index: instances that were acknowledged to a modality
and have no receipt. The outbox is on disk, and the only memory that counts. The replicator holds a window of
it, at most two thousand rows and what became urgent meanwhile, and forgets everything when it stops: a node
that is killed at any point starts with the outbox it finds.

**The way of one instance.** Refill brings its row into the window. Offer asks the region, a batch at a time,
which of these it lacks. `HAVE` comes with a receipt: the region got it earlier, and the receipt was lost, or
another ward sent the same; nothing moves. `NEED` puts it in the queue of the push streams, which take from
its head; with it the region says how much of the object is there already, since its stream was cut, and the
push goes on behind that. The region verifies the digest, makes the instance durable and sends the receipt, or
refuses with a reason. A receipt becomes a fact; only when the fact is synced does the row leave the outbox
and the window.

**Exactly once** needs no agreement between the two sides, since pushing again is always safe: the region
knows an instance by UID and digest, and gives the same receipt again. So whenever a stream breaks, all that
was on it without a verdict is offered anew, whatever became of it. A verdict names UID and digest; one that
fits nothing that was sent is ignored, so no receipt can be noted for other bytes than those that were
offered. What a person accepted at the ward is offered again, with the time of the decision; a receipt notes
of which decision the region knew, and settles no later one.

**Order.** What a reader waits for (urgent), as it came, then the newest: after an outage of a day the patient
who is in the scanner now does not queue behind yesterday. With `hold` only the urgent travels. A stream may
be told to take nothing else: it is kept free for that.

**Failures.** A line that fails (offer or stream broken) backs off exponentially, with jitter, so that a
region that comes back is not met by every ward at once; any receipt ends that. An instance that the region
refuses backs off alone, while the others pass; each refusal is counted in the index, and after `tries_max`
of them, or at once when trying again can't help, it is set aside: a fact with the reason, shown to people,
until one asks to retry it. Bytes that do not match their digest here are not sent at all: they are noted as
damaged. What is sent first when a stream breaks goes behind the others, so that an object that kills streams
can't stop the queue.

**Bounds.** Window and urgent: twice `window`. One offer, one refill and one record of facts at a time, the
last two never together, since rows read before a record lands would come back into the window after it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from archive.backoff import Backoff
from archive.model import TOLD, Fact, FactKind, Outcome, PendingInstance

Key = tuple[str, bytes]
Order = tuple[bool, int, int]
State = Literal["fresh", "offered", "needed", "sent", "done"]

REASON_LENGTH_MAX = 200


@dataclass(frozen=True, slots=True)
class Received:
    """The region's receipt."""

    sop_instance_uid: str
    digest: bytes
    at_us: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Refused:
    """The region's refusal of one object; trying again will not help when it is `permanent`."""

    sop_instance_uid: str
    digest: bytes
    reason: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the region says to one offered instance: a receipt, or None for one it needs, and how many bytes
    of it are there already."""

    receipt: Received | None
    have_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Refill:
    """Read the outbox: this many rows, urgent first, then newest, leaving out what is `known` (and whether as
    urgent). Answer with `refilled`."""

    limit: int
    known: Mapping[Key, bool]


@dataclass(frozen=True, slots=True)
class Offer:
    """Ask which of these the region lacks. Answer with `offered` or `line_failed`."""

    items: tuple[PendingInstance, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Sync these facts, count a refusal for each of `tries`. Answer with `recorded` or `record_failed`."""

    facts: tuple[Fact, ...]
    tries: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to start before `until_s` (None: before something happens)."""

    until_s: float | None


Step = Refill | Offer | Record | Idle


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a replicator."""

    window: int = 2_000
    offer_items: int = 1_000
    unacknowledged: int = 1_024  # on one stream
    tries_max: int = 5
    backoff_first_s: float = 0.25
    backoff_cap_s: float = 10.0
    record_facts: int = 1_000
    record_gap_s: float = 0.1


@dataclass(slots=True)
class _Item:
    row: PendingInstance
    state: State = "fresh"
    tries: int = 0
    breaks: int = 0
    have_bytes: int = 0
    not_before_s: float = 0.0
    generation: int = 0

    @property
    def order(self) -> Order:
        at_us = self.row.head.provenance.received_at_us
        # A reader reads what it waits for from its beginning.
        return not self.row.urgent, self.breaks, at_us if self.row.urgent else -at_us


class Replicator:
    """The state machine. `ward` is written in its facts; `chance` makes the jitter, and a test repeatable."""

    def __init__(self, ward: str, limits: Limits, chance: random.Random, *, hold: bool = False) -> None:
        self.ward = ward
        self.limits = limits
        self.hold = hold
        self._backoff = Backoff(limits.backoff_first_s, limits.backoff_cap_s, chance)
        self._items: dict[Key, _Item] = {}
        self._fresh: list[tuple[Order, int, Key]] = []
        self._needed: list[tuple[Order, int, Key]] = []
        self._later: list[tuple[float, int, Key]] = []
        self._sent: dict[int, dict[Key, None]] = {}
        self._facts: list[Fact] = []
        self._tries: list[Key] = []
        self._offer: tuple[PendingInstance, ...] | None = None
        self._record: Record | None = None
        self._refilling = False
        self._more = True  # the outbox may hold rows that the window lacks
        self._urgent = False  # some of them may be urgent
        self._online = True
        self._failures = 0
        self._line_at_s = 0.0  # neither offer nor push before
        self._disk_at_s = 0.0  # neither refill nor record before
        self._record_at_s = 0.0  # no record before, unless it is a full one

    # What to do.

    def next(self, now_s: float) -> Step:
        """The next thing to start; call again until it says Idle. What was started runs beside the others."""
        self._return_due(now_s)
        if self._record is None and not self._refilling and now_s >= self._disk_at_s:
            told = max(len(self._facts), len(self._tries))
            if told and (now_s >= self._record_at_s or told >= self.limits.record_facts):
                return self._start_record(now_s)
            if self._urgent or (self._more and len(self._items) <= self.limits.window // 2):
                self._refilling, self._more, self._urgent = True, False, False
                return Refill(
                    self.limits.window, {key: item.row.urgent for key, item in self._items.items()}
                )
        if self._online and self._offer is None and now_s >= self._line_at_s:
            batch = self._pop(self._fresh, "fresh", self.limits.offer_items)
            if batch:
                for item in batch:
                    item.state = "offered"
                self._offer = tuple(item.row for item in batch)
                return Offer(self._offer)
        return Idle(self._wakes_at(now_s))

    def take(
        self, stream: int, now_s: float, bytes_max: int | None = None, *, urgent_only: bool = False
    ) -> PendingInstance | None:
        """The next instance for this push stream; None when there is none, when the next is larger than
        `bytes_max` or not as urgent as it must be, or when the stream has enough on its way."""
        sent = self._sent.setdefault(stream, {})
        if not self._online or now_s < self._line_at_s or len(sent) >= self.limits.unacknowledged:
            return None
        for item in self._pop(self._needed, "needed", 1):
            too_large = bytes_max is not None and item.row.dataset_bytes > bytes_max
            if too_large or (urgent_only and not item.row.urgent):
                self._queue(item, "needed")
                return None
            item.state = "sent"
            sent[_key(item.row)] = None
            return item.row
        return None

    def line_wait_s(self, now_s: float) -> float | None:
        """How long the line still rests, None when it does not."""
        return self._line_at_s - now_s if self._line_at_s > now_s else None

    def resumes_at(self, row: PendingInstance) -> int:
        """How much of this instance the region has; the push goes on behind that."""
        item = self._items.get(_key(row))
        return 0 if item is None else item.have_bytes

    def on_stream(self, stream: int, uid: str, digest: bytes) -> PendingInstance | None:
        """What was sent on this stream and has no verdict yet."""
        return self._items[(uid, digest)].row if (uid, digest) in self._sent.get(stream, {}) else None

    @property
    def known(self) -> int:
        """How many rows the window holds; at most twice `window`."""
        return len(self._items)

    def unacknowledged(self, stream: int) -> int:
        return len(self._sent.get(stream, {}))

    # What happened.

    def line_up(self) -> None:
        """There is a line: what backed off because there was none need not wait."""
        self._online, self._failures, self._line_at_s = True, 0, 0.0

    def line_down(self) -> None:
        """There is no line: nothing is offered or pushed before there is. Facts are recorded all the same."""
        self._online = False

    def woken(self, *, urgent: bool = False) -> None:
        """The outbox may hold new rows, or rows that became urgent."""
        self._more = True
        self._urgent = self._urgent or urgent

    def refilled(self, rows: Sequence[PendingInstance], limit: int) -> None:
        """The outbox was read. Rows that are known are only made urgent."""
        self._refilling = False
        wanted = [row for row in rows if row.urgent or not self.hold]
        if len(rows) >= limit and len(wanted) == len(rows):
            self._more = True
        for row in wanted:
            known = self._items.get(_key(row))
            if known is None:
                if len(self._items) < 2 * self.limits.window:
                    self._items[_key(row)] = item = _Item(row, tries=row.tries)
                    self._queue(item, "fresh")
                else:
                    self._more = True
            elif row.urgent and not known.row.urgent:
                known.row = row
                if known.state in ("fresh", "needed"):
                    known.not_before_s = 0.0
                    self._queue(known, known.state)

    def refill_failed(self, now_s: float) -> None:
        """The outbox could not be read."""
        self._refilling, self._more = False, True
        self._disk_at_s = now_s + self.limits.backoff_cap_s / 10

    def offered(self, verdicts: Sequence[Verdict]) -> None:
        """The region answered the offer, in its order."""
        offer, self._offer = self._offer or (), None
        for row, verdict in zip(offer, verdicts, strict=False):
            item = self._items[_key(row)]
            if verdict.receipt is None:
                item.have_bytes = min(max(verdict.have_bytes, 0), row.dataset_bytes)
                self._queue(item, "needed")
            elif (verdict.receipt.sop_instance_uid, verdict.receipt.digest) == _key(row):
                self._done(item, FactKind.RECEIPT, verdict.receipt.at_us, _told(item, verdict.receipt))
            else:
                self._queue(item, "fresh")
        for row in offer[len(verdicts) :]:
            self._queue(self._items[_key(row)], "fresh")
        if offer and verdicts:
            self._failures = 0

    def line_failed(self, now_s: float) -> None:
        """The offer was not answered."""
        offer, self._offer = self._offer or (), None
        for row in offer:
            self._queue(self._items[_key(row)], "fresh")
        self._back_off(now_s)

    def received(self, stream: int, receipt: Received) -> bool:
        """A receipt came; False when it is for nothing that was sent on this stream."""
        key = (receipt.sop_instance_uid, receipt.digest)
        if key not in self._sent.get(stream, {}):
            return False
        del self._sent[stream][key]
        self._failures = 0
        item = self._items[key]
        self._done(item, FactKind.RECEIPT, receipt.at_us, _told(item, receipt))
        return True

    def refused(self, stream: int, refusal: Refused, now_s: float, now_us: int) -> bool:
        """The region refused an object; False when it was not sent on this stream."""
        key = (refusal.sop_instance_uid, refusal.digest)
        if key not in self._sent.get(stream, {}):
            return False
        del self._sent[stream][key]
        self._count_try(self._items[key], refusal.reason, now_s, now_us, permanent=refusal.permanent)
        return True

    def damaged(self, stream: int, row: PendingInstance, now_us: int) -> None:
        """The bytes here do not match their digest: they are not sent, and people are told."""
        self._sent.get(stream, {}).pop(_key(row), None)
        reason = "its bytes no longer match their digest at the ward"
        self._facts.append(self._fact(FactKind.DAMAGE, row, now_us, reason))
        self._done(self._items[_key(row)], FactKind.SET_ASIDE, now_us, reason)

    def stream_ended(self, stream: int, now_s: float, now_us: int, *, failed: bool, blame: str = "") -> None:
        """A push stream ended. What is on it without a verdict is offered anew. With `blame` (the region
        answered, and not for want of resources) the object it was at counts a refusal; a lost line is
        nobody's fault.
        """
        sent = [self._items[key] for key in self._sent.pop(stream, {})]
        for item in sent:
            self._queue(item, "fresh")
        if failed:
            self._back_off(now_s)
            if sent and blame:
                self._count_try(sent[0], blame, now_s, now_us, permanent=False)
            elif sent:
                sent[0].breaks += 1
                self._queue(sent[0], "fresh")

    def recorded(self) -> None:
        """The facts are synced and the index has them: the rows are gone from the outbox."""
        record, self._record = self._record, None
        for fact in record.facts if record else ():
            if fact.kind in (FactKind.RECEIPT, FactKind.SET_ASIDE):
                self._items.pop((fact.sop_instance_uid, fact.digest), None)

    def record_failed(self, now_s: float) -> None:
        """The facts are not known to be synced: they are recorded again."""
        record, self._record = self._record, None
        if record is not None:
            self._facts[:0] = record.facts
            self._tries[:0] = record.tries
        self._disk_at_s = now_s + self.limits.backoff_cap_s / 10

    # How.

    def _start_record(self, now_s: float) -> Record:
        self._record_at_s = now_s + self.limits.record_gap_s
        cut = self.limits.record_facts
        self._record = Record(tuple(self._facts[:cut]), tuple(self._tries[:cut]))
        del self._facts[:cut], self._tries[:cut]
        return self._record

    def _count_try(self, item: _Item, reason: str, now_s: float, now_us: int, *, permanent: bool) -> None:
        item.tries += 1
        self._tries.append(_key(item.row))
        if permanent or item.tries >= self.limits.tries_max:
            times = "" if permanent else f" ({item.tries} times)"
            self._done(item, FactKind.SET_ASIDE, now_us, f"{reason[:REASON_LENGTH_MAX]}{times}")
            return
        item.not_before_s = now_s + self._backoff.pause_s(item.tries)
        self._queue(item, "fresh")

    def _done(self, item: _Item, kind: FactKind, at_us: int, detail: str) -> None:
        item.state = "done"
        item.generation += 1
        self._facts.append(self._fact(kind, item.row, at_us, detail))

    def _fact(self, kind: FactKind, row: PendingInstance, at_us: int, detail: str) -> Fact:
        return Fact(kind, row.head.sop_instance_uid, row.digest, self.ward, at_us, detail)

    def _queue(self, item: _Item, state: State) -> None:
        """Puts the item in a queue; an older entry of it, there or elsewhere, no longer counts."""
        item.state = state
        item.generation += 1
        key = _key(item.row)
        if state == "needed":
            heapq.heappush(self._needed, (item.order, item.generation, key))
        elif item.not_before_s > 0:
            heapq.heappush(self._later, (item.not_before_s, item.generation, key))
        else:
            heapq.heappush(self._fresh, (item.order, item.generation, key))

    def _return_due(self, now_s: float) -> None:
        while self._later and self._later[0][0] <= now_s:
            _, generation, key = heapq.heappop(self._later)
            item = self._items.get(key)
            if item is not None and item.generation == generation:
                item.not_before_s = 0.0
                self._queue(item, "fresh")

    def _pop(self, queue: list[tuple[Order, int, Key]], state: State, limit: int) -> list[_Item]:
        out: list[_Item] = []
        while queue and len(out) < limit:
            _, generation, key = heapq.heappop(queue)
            item = self._items.get(key)
            if item is not None and item.state == state and item.generation == generation:
                out.append(item)
        return out

    def _back_off(self, now_s: float) -> None:
        self._failures += 1
        self._line_at_s = max(self._line_at_s, now_s + self._backoff.pause_s(self._failures))

    def _wakes_at(self, now_s: float) -> float | None:
        times = [self._later[0][0]] if self._later else []
        pauses = [self._line_at_s, self._disk_at_s]
        if self._facts or self._tries:
            pauses.append(self._record_at_s)
        times.extend(at_s for at_s in pauses if now_s < at_s)
        return min(times, default=None)


def _told(item: _Item, receipt: Received) -> str:
    """The outcome, and up to which decision at the ward the region was told when it gave the receipt."""
    accepted_us = item.row.accepted_us
    return receipt.outcome.value + (f", {TOLD}{accepted_us}" if accepted_us else "")


def _key(row: PendingInstance) -> Key:
    return row.head.sop_instance_uid, row.digest
