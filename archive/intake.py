"""Intake: the one write path. It takes the bytes of one instance, judges them, decides, and appends; the
answer may go out when `Ticket.wait_durable` has returned, and not before.

Order. (1) Bytes gather in memory within the shared byte budget, or stream into a pack of their own; they
are on no record yet. (2) The header is read and compared with what the sender said; the digest is taken.
(3) The decision: the first content of a SOP Instance UID is STORED, the same content again is a DUPLICATE
and nothing is written, another content is a CONFLICT, kept and not served. One decision at a time for a
UID. What is written and not indexed yet is in `Recent`, everything older in the index, so both are asked.
(4) The record is appended; its kind is the decision. (5) `wait_durable`: the pack is synced. (6) The
indexer brings it into the index, later.

The index is not needed for (1) to (5). While it does not answer, the decision is made on `Recent` alone,
and the index sorts out later what it then knows better; past the lag bound intake refuses.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from dataclasses import dataclass, field
from functools import lru_cache

from archive.budget import ByteBudget
from archive.dataset.header import scan
from archive.errors import Corrupt, DatasetMismatch, MissError, OutOfResources, TooLarge
from archive.index.index import Index
from archive.indexer import Indexer
from archive.model import START, Attributes, InstanceHead, Outcome, Position, RecordKind, require_uid
from archive.packs.large import OwnPack
from archive.packs.packs import Packs, Written
from archive.packs.storage import Buffer, Storage
from archive.recent import Recent, Unindexed

log = logging.getLogger(__name__)

_GRANT_BYTES = 64 << 10
_ROOM_WAIT_S = 10.0  # a sender is slowed down before it is refused, as long as the index makes progress
_FREE_CHECK_BYTES = 64 << 20
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
    ) -> None:
        self.packs = packs
        self.indexer = indexer
        self.budget = budget
        self.limits = limits
        self._index = index
        self._recent = recent
        self._storage = storage
        self._order = threading.Lock()  # the log and `Recent` have one order
        self._turn = threading.Condition(threading.Lock())
        self._turns_awaited = 0
        self._deciding: set[str] = set()
        self._free_bytes = 0
        self._free_asked_s = -_FREE_ASKED_S

    def begin(self, head: InstanceHead, *, conflict: bool = False, size_hint: int | None = None) -> Reception:
        """Begin to receive. `conflict` says that the sender keeps this content as a conflict itself.

        Raises InvalidInstance, TooLarge, and OutOfResources: disk, index too far behind.
        """
        require_uid(head.sop_instance_uid, "the SOP Instance UID")
        _require_kind(head.sop_class_uid, head.transfer_syntax_uid)
        size = size_hint or 0
        if size > self.limits.object_bytes_max:
            raise TooLarge(f"an instance may have {self.limits.object_bytes_max} bytes")
        self.require_space(size)
        if (
            len(self._recent) >= self.limits.index_lag_records_max
            or self._recent.oldest_age_s() > self.limits.index_lag_s_max
        ):
            self._require_index()
        return Reception(self, head, conflict, size)

    def require_space(self, size: int) -> None:
        """Raises OutOfResources when `size` more bytes would leave less than the reserve."""
        now = time.monotonic()
        if now - self._free_asked_s > _FREE_ASKED_S:
            try:
                self._free_bytes = self._storage.free_bytes()
            except OSError as error:
                raise OutOfResources("the disk does not say how much room it has") from error
            self._free_asked_s = now
        if self._free_bytes - size < self.limits.free_bytes_min:
            raise OutOfResources("not enough room on the disk for instances")

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
        content: bytes | OwnPack,
        *,
        conflict: bool,
    ) -> Ticket:
        """Decide, and append if there is something to append."""
        uid = head.sop_instance_uid
        self._claim(uid)
        try:
            outcome, earlier, is_new = self._decide(uid, digest, conflict)
            if is_new:
                if isinstance(content, OwnPack):
                    content.seal()
                kind = RecordKind.INSTANCE if outcome is Outcome.STORED else RecordKind.CONFLICT
                with self._order:
                    if isinstance(content, OwnPack):
                        written = self.packs.append_own(kind, head, content)
                    else:
                        written = self.packs.append(kind, head, (content,), len(content), digest)
                    earlier = self._recent.add(written, attributes.study_uid, attributes)
        finally:
            self._release(uid)
        known = None if earlier is None else earlier.written
        position = START if known is None else known.record.end
        return Ticket(outcome, digest, attributes.study_uid, position, self, known)

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
                    return Outcome.DUPLICATE, None, False
                live = known is not None
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


class Reception:
    """One instance on its way in. `commit` or `abort` ends it; after an exception from `write` it is
    ended."""

    def __init__(self, intake: Intake, head: InstanceHead, conflict: bool, size_hint: int) -> None:
        self._intake = intake
        self._head = head
        self._conflict = conflict
        self._small_max = intake.limits.small_object_bytes_max
        self._pieces: list[bytes] = []
        self._size = 0
        self._granted = 0
        self._checked = 0
        self._own: OwnPack | None = None
        self._ended = False
        if size_hint > self._small_max:
            self._own = intake.packs.begin_own(head)

    @property
    def size(self) -> int:
        """The bytes of the data set so far."""
        return self._size

    def write(self, view: Buffer) -> None:
        """More of the data set, without group 2, in order. Copied or on disk when this returns."""
        if self._ended:
            raise ValueError("this reception has ended")
        size = self._size + len(view)
        try:
            if size > self._intake.limits.object_bytes_max:
                raise TooLarge(f"an instance may have {self._intake.limits.object_bytes_max} bytes")
            if self._own is None and not self._may_hold(size):
                self._spill()
            if self._own is None:
                self._pieces.append(view if type(view) is bytes else bytes(view))
            else:
                if size - self._checked >= _FREE_CHECK_BYTES:
                    self._intake.require_space(0)
                    self._checked = size
                self._own.write(view)
        except BaseException:
            self.abort()
            raise
        self._size = size

    def _may_hold(self, size: int) -> bool:
        """Whether `size` bytes may be held in memory. Past the budget an object goes to disk instead."""
        if size > self._small_max:
            return False
        if size > self._granted:
            grant = max(size - self._granted, _GRANT_BYTES)
            if not self._intake.budget.take(grant):
                return False
            self._granted += grant
        return True

    def _spill(self) -> None:
        self._own = self._intake.packs.begin_own(self._head)
        for piece in self._pieces:
            self._own.write(piece)
        self._drop()

    def commit(self, *, expected_digest: bytes | None = None) -> Ticket:
        """All bytes are here: judge, decide, append. Whatever it raises, nothing stays of the instance.

        Raises CannotUnderstand, DatasetMismatch, TooLarge, Corrupt (the digest differs from
        `expected_digest`), OutOfResources, SyncFailed.
        """
        if self._ended:
            raise ValueError("this reception has ended")
        try:
            return self._commit(expected_digest)
        finally:
            self.abort()

    def _commit(self, expected_digest: bytes | None) -> Ticket:
        head, own = self._head, self._own
        if own is not None:
            digest = own.digest()
            _require_digest(digest, expected_digest)
            with own.dataset() as dataset:
                attributes = scan(dataset, head.transfer_syntax_uid)
            content: bytes | OwnPack = own
        else:
            content = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            digest = hashlib.sha256(content).digest()
            _require_digest(digest, expected_digest)
            attributes = scan(content, head.transfer_syntax_uid)
        _require_match(head, attributes)
        return self._intake.take(head, attributes, digest, content, conflict=self._conflict)

    def abort(self) -> None:
        """Let go of everything; what was committed stays. Any number of times."""
        self._ended = True
        self._drop()
        own, self._own = self._own, None
        if own is not None:
            with contextlib.suppress(OSError):
                own.abort()

    def _drop(self) -> None:
        self._pieces = []
        granted, self._granted = self._granted, 0
        if granted:
            self._intake.budget.give_back(granted)


@lru_cache(maxsize=1024)
def _require_kind(sop_class_uid: str, transfer_syntax_uid: str) -> None:
    require_uid(sop_class_uid, "the SOP Class UID")
    require_uid(transfer_syntax_uid, "the transfer syntax UID")


def _require_digest(digest: bytes, expected: bytes | None) -> None:
    if expected is not None and digest != expected:
        raise Corrupt("the bytes that arrived do not match their digest")


def _require_match(head: InstanceHead, attributes: Attributes) -> None:
    """PS3.4 B.2.3: the data set is of the class and the instance that the command named."""
    if attributes.instance.get("SOPInstanceUID") != head.sop_instance_uid:
        raise DatasetMismatch("the data set's SOP Instance UID is not the command's")
    if attributes.instance.get("SOPClassUID") != head.sop_class_uid:
        raise DatasetMismatch("the data set's SOP Class UID is not the command's")
