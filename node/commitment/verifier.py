"""Owns the decision on every instance that a device asked to have committed: a thread beside the work reads
the stored bytes, hashes them again, and waits for the region's receipt where that is what committed means
(SC7). All open requests go on in turn, so that a large one delays no small one by much. What it found is
durable; a verifier that starts anew hashes nothing twice within a request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from archive.archive import Archive
from archive.errors import Corrupt, Evicted, MissError, NotFound
from archive.ledger import Commitment, CommitmentItem, Ledger
from archive.ledger.commitments import COMMITTED, OPEN, SCP
from archive.model import Fact, FactKind, Position, Standing
from archive.rounds import Rounds
from archive.space.pace import Pace
from node.commitment.desk import DAY_US, now_us
from node.dimse.commitments import (
    CLASS_CONFLICT,
    CLASS_NOT_SUPPORTED,
    NO_SUCH_INSTANCE,
    PROCESSING_FAILURE,
    RESOURCE_LIMITATION,
)

log = logging.getLogger(__name__)

SLICE_ITEMS = 500       # of a request in its turn
SLICE_BYTES = 32 << 20  # that are hashed in a turn; one instance at least
POLL_S = 1.0
AGAIN_S = 1.0           # after a pass over a request of which something still waits
ERROR_S = 5.0
FORGET_S = 600.0
_DAMAGED = "its bytes no longer match their digest: found by storage commitment"


@dataclass(slots=True)
class _Pass:
    """How far the pass over one request has come."""

    after_uid: str = ""
    indexed: bool = False               # what was acknowledged before the request is in the index
    facts: Position | None = None       # how far facts were applied when this pass began
    seen: Position | None = None        # and when the last whole one began
    not_before_s: float = 0.0
    began_s: float = 0.0
    moved: bool = False                 # something may be known soon, though no fact will say so


class Verifier:
    """See the module's docstring. `by_region`: an instance needs the region's receipt. `settled` is told of
    each request whose outcome is known."""

    def __init__(self, archive: Archive, ledger: Ledger, *, by_region: bool, timeout_s: float,
                 takes_class: Callable[[str], bool], ward: str, bytes_per_s: float, keep_days: float,
                 settled: Callable[[str], None]) -> None:
        self._archive = archive
        self._ledger = ledger
        self._by_region = by_region
        self._timeout_us = int(timeout_s * 1e6)
        self._takes_class = takes_class
        self._ward = ward
        self._bytes_per_s = bytes_per_s
        self._keep_us = int(keep_days * DAY_US)
        self._settled = settled
        self._passes: dict[str, _Pass] = {}
        self._forgot_s = -FORGET_S
        self._pace: Pace | None = None  # of the rounds since it last had nothing to do
        self._rounds = Rounds("commitment-verifier", self._go_round, log, retry_s=POLL_S)
        self._stopping = self._rounds.stopping

    def start(self) -> None:
        self._rounds.start()

    def stop(self) -> None:
        self._rounds.stop()

    def wake(self) -> None:
        """There is a new request."""
        self._rounds.wake()

    def _go_round(self) -> float:
        pace = self._pace or Pace(self._bytes_per_s, pressed=self._archive.intake.is_pressed,
                                  stopping=self._stopping)
        self._pace = None
        busy = self.round(pace)
        self._forget()
        if not busy:
            return POLL_S
        self._pace = pace
        return 0.0

    def round(self, pace: Pace) -> bool:
        """One turn for every open request; whether any has more to do at once."""
        if not self._ledger.has_live_commitments(SCP, OPEN):
            self._passes.clear()
            return False
        requests = self._ledger.live_commitments(SCP, OPEN)
        facts = self._archive.index.positions()[1]
        busy = False
        for request in requests:
            if self._stopping.is_set():
                return False
            state = self._passes.setdefault(request.id, _Pass())
            if time.monotonic() < state.not_before_s:
                continue
            try:
                busy = self._turn(request, state, facts, pace) or busy
            except MissError as error:
                if self._stopping.is_set():
                    return False
                log.warning("a request for storage commitment waits: %s", error)
                state.not_before_s = time.monotonic() + ERROR_S
        return busy

    def _turn(self, request: Commitment, state: _Pass, facts: Position, pace: Pace) -> bool:
        """A piece of one request; whether it can go on at once."""
        is_late = now_us() >= request.asked_us + self._timeout_us
        if not state.after_uid:
            if state.seen == facts and not is_late and not state.moved:
                return False  # nothing has changed since it was looked at
            state.facts, state.began_s, state.moved = facts, time.monotonic(), False
        if not state.indexed:
            self._archive.wait_indexed()
            state.indexed = True
        items = self._ledger.waiting_items(request.id, state.after_uid, SLICE_ITEMS)
        taken = self._judge_some(request, items, state, pace)
        if self._stopping.is_set():
            return False
        if taken < len(items) or len(items) == SLICE_ITEMS:
            state.after_uid = items[taken - 1].sop_instance_uid
            return True
        # Verified and without a receipt in time, or not even that: the index did not answer, say.
        remaining = {True: RESOURCE_LIMITATION, False: PROCESSING_FAILURE} if is_late else None
        if self._ledger.settle_commitment(request.id, remaining):
            self._passes.pop(request.id, None)
            self._settled(request.id)
            return False
        now_s = time.monotonic()
        state.after_uid, state.seen = "", state.facts
        state.not_before_s = now_s + max(AGAIN_S, 4 * (now_s - state.began_s))
        return False

    def _judge_some(self, request: Commitment, items: list[CommitmentItem], state: _Pass,
                    pace: Pace) -> int:
        """Decide on instances until enough was read; on how many."""
        standings = self._archive.index.standings(item.sop_instance_uid for item in items)
        known: list[CommitmentItem] = []
        read = taken = 0
        try:
            for item in items:
                if read > SLICE_BYTES or self._stopping.is_set():
                    break
                standing = standings.get(item.sop_instance_uid)
                verdict, count = self._judge(request, item, standing, state)
                read += count
                taken += 1
                if verdict != item:
                    known.append(verdict)
        finally:
            self._ledger.note_items(request.id, known)  # also when it is to end: what is hashed stays so
        if read:
            pace.took(read)
        return taken

    def _judge(self, request: Commitment, item: CommitmentItem, standing: Standing | None,
               state: _Pass) -> tuple[CommitmentItem, int]:
        """What is known of an instance now, and how many bytes were read for it."""
        if standing is None:
            supported = self._takes_class(item.sop_class_uid)
            return replace(item, reason=NO_SUCH_INSTANCE if supported else CLASS_NOT_SUPPORTED), 0
        instance = standing.instance
        if instance.head.sop_class_uid != item.sop_class_uid:
            return replace(item, reason=CLASS_CONFLICT), 0
        if request.device in standing.uncompared_by and not standing.damaged:
            state.moved = True  # perhaps it is the same in another encoding: that is found out just now
            return item, 0
        if standing.damaged or request.device in standing.contested_by:
            # What this device sent last under this UID is not what it would get back.
            return replace(item, reason=PROCESSING_FAILURE), 0
        if instance.evicted:  # by its receipt, without which no bytes are given up
            return replace(item, reason=COMMITTED if standing.receipt_us else NO_SUCH_INSTANCE), 0
        read = 0
        if item.digest != instance.digest:
            read = instance.location.length
            try:
                self._archive.verify(instance)
            except (Evicted, NotFound):  # its bytes went, or moved, just now: the next pass sees where
                state.moved = True
                return item, 0
            except Corrupt as error:
                self._tell_damage(item, instance.digest, error)
                return replace(item, reason=PROCESSING_FAILURE), read
            item = replace(item, digest=instance.digest)
        if standing.receipt_us or not self._by_region:
            item = replace(item, reason=COMMITTED)
        return item, read

    def _tell_damage(self, item: CommitmentItem, digest: bytes, error: Corrupt) -> None:
        """As a fact, so that it is written again when its sender sends it again, and people see it."""
        log.error("storage commitment: %s: %s", item.sop_instance_uid, error)
        self._archive.record_facts([
            Fact(FactKind.DAMAGE, item.sop_instance_uid, digest, self._ward, now_us(), _DAMAGED)])

    def _forget(self) -> None:
        """What came to an end long ago, piece by piece."""
        if time.monotonic() - self._forgot_s < FORGET_S:
            return
        if not self._ledger.forget_commitments(now_us() - self._keep_us):
            self._forgot_s = time.monotonic()
