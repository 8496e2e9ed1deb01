"""Intake: the one write path. It takes the bytes of one instance, judges them, decides, and appends; the
answer may go out when `Ticket.wait_durable` has returned, and not before.

Order. (1) Bytes gather in memory within the shared byte budget, or stream into a pack of their own; they
are on no record yet. (2) The header is read and compared with what the sender said; the digest is taken.
(3) The decision: the first content of a SOP Instance UID is STORED, the same content again is a DUPLICATE
and nothing is written, another content is a CONFLICT, kept and not served, or refused, as its device's policy
says. One decision at a time for a UID. What is written and not indexed yet is in `Recent`, everything older
in the index, so both are asked.
(4) The record is appended; its kind is the decision. (5) `wait_durable`: the pack is synced. (6) The
indexer brings it into the index, later.

The index is not needed for (1) to (5). While it does not answer, the decision is made on `Recent` alone,
and the index sorts out later what it then knows better; past the lag bound intake refuses.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache

from archive.budget import ByteBudget
from archive.conflicts.noting import Noting
from archive.errors import MissError, OtherContent, OutOfResources, TooLarge
from archive.index.index import Index
from archive.indexer import Indexer
from archive.model import (
    START,
    Attributes,
    ConflictPolicy,
    InstanceHead,
    Outcome,
    Position,
    Record,
    RecordKind,
    require_uid,
)
from archive.packs.images import RecordImage
from archive.packs.large import FOLDER as LARGE
from archive.packs.large import OwnPack
from archive.packs.packs import Packs, Written
from archive.packs.storage import Storage
from archive.partials import PartialKey, Partials
from archive.recent import Recent, Unindexed
from archive.reception import Content, Reception

log = logging.getLogger(__name__)

_ROOM_WAIT_S = 10.0  # a sender is slowed down before it is refused, as long as the index makes progress
_FREE_ASKED_S = 0.05  # a full disk is noticed by the write itself; this only keeps the reserve


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """The stated bounds of intake."""

    small_object_bytes_max: int = 1 << 20
    object_bytes_max: int = 1 << 40
    free_bytes_min: int = 1 << 30
    index_lag_records_max: int = 10_000
    index_lag_s_max: float = 30.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """What intake decided about one instance. Nothing is promised before `wait_durable` has returned."""

    outcome: Outcome
    digest: bytes
    study_uid: str
    position: Position
    _intake: Intake = field(repr=False, compare=False)
    _written: Written | None = field(repr=False, compare=False)

    def wait_durable(self, timeout_s: float = 30.0) -> None:
        """Return when the instance is synced: a duplicate waits for the first copy. Raises SyncFailed."""
        if self._written is not None:
            self._intake.packs.wait_durable(self._written, timeout_s)

    def wait_indexed(self, timeout_s: float = 30.0) -> None:
        """Return when a search finds the instance too. Raises SyncFailed, or Unavailable."""
        if self._written is not None:
            self._intake.packs.wait_durable(self._written, timeout_s)
            self._intake.indexer.wait(self._written.record.end, timeout_s)


class Intake:
    """Takes instances into one archive; any number of threads at once."""

    def __init__(
        self,
        packs: Packs,
        index: Index,
        indexer: Indexer,
        recent: Recent,
        budget: ByteBudget,
        storage: Storage,
        limits: IntakeLimits,
        partials: Partials,
    ) -> None:
        self.packs = packs
        self.partials = partials
        self.indexer = indexer
        self.budget = budget
        self.limits = limits
        self._index = index
        self._recent = recent
        self._storage = storage
        self._noting = Noting(index, indexer.record_facts)
        self._order = threading.Lock()  # the log and `Recent` have one order
        self._turn = threading.Condition(threading.Lock())
        self._turns_awaited = 0
        self._deciding: set[str] = set()
        self._free_bytes = 0
        self._free_asked_s = -_FREE_ASKED_S

    def begin(
        self,
        head: InstanceHead,
        *,
        conflict: bool = False,
        size_hint: int | None = None,
        policy: ConflictPolicy = ConflictPolicy.KEEP,
        partial: PartialKey | None = None,
        offset: int = 0,
    ) -> Reception:
        """Begin to receive. `conflict` says that the sender keeps this content as a conflict itself; `policy`
        what becomes of it if another is here. What has a `partial` key is kept when its sender is cut off,
        and goes on at `offset` where that is what is kept.

        Raises InvalidInstance, TooLarge, and OutOfResources: disk, index too far behind; Unavailable when
        what should go on is not here.
        """
        require_uid(head.sop_instance_uid, "the SOP Instance UID")
        _require_kind(head.sop_class_uid, head.transfer_syntax_uid)
        size = size_hint or 0
        if size > self.limits.object_bytes_max:
            raise TooLarge(f"an instance may have {self.limits.object_bytes_max} bytes")
        self.require_space(size - offset)
        if self.is_pressed():
            self._require_index()
        return Reception(self, head, conflict, size, policy, partial, offset)

    def holds_unindexed(self, uid: str) -> bool:
        """Whether anything was written under this UID that the index may not show yet."""
        return bool(self._recent.of(uid))

    def is_pressed(self) -> bool:
        """Whether the index is so far behind that intake slows down."""
        recent, limits = self._recent, self.limits
        return len(recent) >= limits.index_lag_records_max or recent.oldest_age_s() > limits.index_lag_s_max

    def decides_at_once(self, uid: str) -> bool:
        """Whether what is sent now waits for nobody: nobody decides on its UID (that may take a large
        object's sync), the index keeps up, and no server is asked for it."""
        return uid not in self._deciding and self._index.is_near and not self.is_pressed()

    def require_space(self, size: int) -> None:
        """Raises OutOfResources when `size` more bytes would leave less than the reserve; what is kept of
        objects that were cut off goes first."""
        if time.monotonic() - self._free_asked_s > _FREE_ASKED_S:
            self._ask_free()
        lacking = self.limits.free_bytes_min - (self._free_bytes - size)
        if lacking > 0 and self.partials.make_room(lacking):
            self._ask_free()
        if self._free_bytes - size < self.limits.free_bytes_min:
            raise OutOfResources("not enough room on the disk for instances")

    def _ask_free(self) -> None:
        try:
            self._free_bytes = self._storage.free_bytes()
        except OSError as error:
            raise OutOfResources("the disk does not say how much room it has") from error
        self._free_asked_s = time.monotonic()

    def _require_index(self) -> None:
        limits = self.limits
        if self._recent.oldest_age_s() > limits.index_lag_s_max:
            raise OutOfResources(f"the index is more than {limits.index_lag_s_max:.0f} s behind")
        if not self.indexer.wait_for_room(limits.index_lag_records_max, _ROOM_WAIT_S):
            raise OutOfResources(f"the index is {limits.index_lag_records_max} instances behind")

    def take(
        self,
        head: InstanceHead,
        attributes: Attributes,
        digest: bytes,
        content: Content,
        *,
        conflict: bool,
        policy: ConflictPolicy = ConflictPolicy.KEEP,
    ) -> Ticket:
        """Decide, and append if there is something to append. Raises OtherContent by the policy."""
        uid = head.sop_instance_uid
        self._claim(uid)
        try:
            outcome, earlier, is_new = self._decide(uid, digest, conflict)
            if is_new and outcome is Outcome.CONFLICT and policy is ConflictPolicy.REFUSE:
                self._noting.refused(head, digest)
                raise OtherContent("another content is here under this SOP Instance UID: not taken")
            if is_new:
                if isinstance(content, OwnPack):
                    content.seal()
                kind = RecordKind.INSTANCE if outcome is Outcome.STORED else RecordKind.CONFLICT
                with self._order:
                    written = self._append(kind, head, content, digest)
                    earlier = self._recent.add(written, attributes.study_uid, attributes)
            if outcome is Outcome.CONFLICT:
                self._put_on_record(head, digest, earlier, is_new, policy)
        finally:
            self._release(uid)
        known = None if earlier is None else earlier.written
        position = START if known is None else known.record.end
        return Ticket(outcome, digest, attributes.study_uid, position, self, known)

    def _append(self, kind: RecordKind, head: InstanceHead, content: Content, digest: bytes) -> Written:
        if isinstance(content, OwnPack):
            return self.packs.append_own(kind, head, content)
        if isinstance(content, RecordImage):
            return self.packs.append_image(kind, head, content, digest)
        return self.packs.append(kind, head, (content,), len(content), digest)

    def write_again(self, record: Record, attributes: Attributes, dataset: bytes, *, live: bool) -> Written:
        """Write a record that is here once more, behind the others, as it came; the index follows. `dataset`
        is empty for one that has a pack of its own: it is referred to again. `live` says what it is by now,
        its kind what it was when it came."""
        now = RecordKind.INSTANCE if live else RecordKind.CONFLICT
        uid = record.head.sop_instance_uid
        self._claim(uid)
        try:
            with self._order:
                if record.location.pack.startswith(LARGE):
                    written = self.packs.append_reference(record)
                else:
                    written = self.packs.append(
                        record.kind, record.head, (dataset,), len(dataset), record.digest
                    )
                known = replace(written, record=replace(written.record, kind=now))
                self._recent.add(known, attributes.study_uid, attributes)
        finally:
            self._release(uid)
        return written

    def _put_on_record(
        self,
        head: InstanceHead,
        digest: bytes,
        earlier: Unindexed | None,
        is_new: bool,
        policy: ConflictPolicy,
    ) -> None:
        """Another content is kept: whoever it concerns is told, and a correction is one when the answer
        goes."""
        proposed = policy is ConflictPolicy.PROPOSE
        if proposed:
            if earlier is not None:
                self.packs.wait_durable(earlier.written)  # the fact is about what is there
            self._noting.proposed(head, digest)
        if is_new:
            self._noting.kept(head, proposed=proposed)

    def _decide(self, uid: str, digest: bytes, conflict: bool) -> tuple[Outcome, Unindexed | None, bool]:
        """The outcome, the record of this content that is not indexed yet, and whether one is to be
        written."""
        live = False
        for entry in self._recent.of(uid):
            is_live = entry.written.record.kind is RecordKind.INSTANCE
            if entry.written.record.digest == digest:
                return (Outcome.DUPLICATE if is_live else Outcome.CONFLICT), entry, False
            live = live or is_live
        try:
            if not live:
                known = self._index.lookup(uid)
                if known is not None and known.digest == digest:
                    if known.evicted or known.damaged:  # success means durable here: it is written again
                        return Outcome.STORED, None, True
                    return Outcome.DUPLICATE, None, False
                live = known is not None
                if known is None and self._index.has_removals():
                    gone = self._index.lookup_removed(uid)
                    if gone is not None and gone.digest == digest:
                        return (Outcome.DUPLICATE, None, False) if gone.settled else (
                            Outcome.STORED, None, True)  # fmt: skip
                    live = gone is not None  # not served, and its UID is taken all the same
            if (live or conflict) and self._index.has_content(uid, digest):
                return Outcome.CONFLICT, None, False
        except MissError as error:
            log.warning("decided without the index: %s", error)
        return (Outcome.CONFLICT if live or conflict else Outcome.STORED), None, True

    def _claim(self, uid: str) -> None:
        """One decision at a time for a UID: whoever holds the claim finds all older content in `Recent` or in
        the index, since nobody else can add any."""
        with self._turn:
            self._turns_awaited += 1
            while uid in self._deciding:
                self._turn.wait()
            self._turns_awaited -= 1
            self._deciding.add(uid)

    def _release(self, uid: str) -> None:
        with self._turn:
            self._deciding.discard(uid)
            if self._turns_awaited:
                self._turn.notify_all()


@lru_cache(maxsize=1024)
def _require_kind(sop_class_uid: str, transfer_syntax_uid: str) -> None:
    require_uid(sop_class_uid, "the SOP Class UID")
    require_uid(transfer_syntax_uid, "the transfer syntax UID")
