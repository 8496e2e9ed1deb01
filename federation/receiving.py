"""What the hub does with offered and pushed instances: the synchronous half, run in a pool of threads.
Everything goes through the region's intake. A receipt is made only of what is durable and in the index, with
the digest that was sent, and after the fact that names this ward as one more holder.

What came of a large object stays when its stream is cut (`archive/partials.py`), and the next offer says how
much that is. An object that is offered again is on no stream any more, as far as its sender knows: one that
still hangs here is ended first.

A refusal is about one object. What is about the region (no room, a disk that does not confirm) ends the
stream instead, so that no object is blamed for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field

from archive.archive import Archive
from archive.errors import Corrupt, InvalidInput, MissError, OtherContent, TooLarge, Unavailable
from archive.intake import Ticket
from archive.model import ConflictPolicy, ConflictState, Fact, FactKind, InstanceHead, Outcome, Scope
from archive.packs.storage import Buffer
from archive.partials import PartialKey
from archive.reception import Reception
from federation import serde
from federation.codec import CHUNK_BYTES_MAX, Inflating
from federation.push_wire import OBJECTS_MAX, PACKED_OBJECTS, Chunk, Group, PushMessage, Whole
from federation.replicator import Received, Refused, Verdict
from federation.tapping import Taps
from monitoring.measures import Distribution, Tally
from protos import uplink_pb2

log = logging.getLogger(__name__)

OFFER_ITEMS_MAX = 1_000
CONTENTS_MAX = 1_000  # kept under one UID, that are looked through
RESUMABLE_BYTES_MIN = 8 << 20  # smaller objects begin anew


@dataclass(frozen=True, slots=True)
class Pushed:
    """An object that intake took, and the ticket that says when it may be acknowledged."""

    uid: str
    digest: bytes
    ticket: Ticket
    accepted_us: int = 0
    begun_s: float = 0.0
    bytes: int = 0


class PushMeasures:
    """How long pushed objects took from their first byte here to what the receipt says, and how much came by
    ward."""

    def __init__(self) -> None:
        self.seconds = Distribution()
        self.instances = Tally()
        self.bytes = Tally()

    def took(self, ward: str, pushed: Pushed) -> None:
        self.seconds.observe(time.perf_counter() - pushed.begun_s)
        self.instances.add(ward)
        self.bytes.add(ward, pushed.bytes)


@dataclass(slots=True)
class Taken:
    """What became of some messages. `error` ends the stream, after the receipts of what came before it."""

    pushed: list[Pushed] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    error: Exception | None = None


class Receiver:
    """The region's side of replication, over its archive."""

    def __init__(self, archive: Archive, clock: Callable[[], int]) -> None:
        self._archive = archive
        self._clock = clock
        self.taps = Taps()
        self.measures = PushMeasures()
        self._resumable: dict[PartialKey, Incoming] = {}

    def verdicts(self, ward: str, items: Sequence[uplink_pb2.OfferItem]) -> list[Verdict]:
        """For each offered item the receipt, or how much of it is here."""
        if len(items) > OFFER_ITEMS_MAX:
            raise InvalidInput(f"more than {OFFER_ITEMS_MAX:,} instances in one offer")
        intake = self._archive.intake
        if any(intake.holds_unindexed(item.sop_instance_uid) for item in items):
            self._archive.wait_indexed()
        found = [self._receipt_for(item.sop_instance_uid, serde.digest_from(item.digest)) for item in items]
        for item, receipt in zip(items, found, strict=True):
            if item.accepted_us > 0 and receipt is not None:
                self._accept(ward, receipt.sop_instance_uid, receipt.digest, item.accepted_us)
        self._note_copies(ward, [receipt for receipt in found if receipt is not None])
        return [
            Verdict(receipt, self._begun_bytes(ward, item) if receipt is None else 0)
            for item, receipt in zip(items, found, strict=True)
        ]

    def _begun_bytes(self, ward: str, item: uplink_pb2.OfferItem) -> int:
        if item.size < RESUMABLE_BYTES_MIN:
            return 0
        key = PartialKey(ward, item.sop_instance_uid, item.digest)
        if (incoming := self._resumable.get(key)) is not None:
            incoming.abort()
        return self._archive.intake.partials.have(key)

    def settle(self, ward: str, pushed: Iterable[Pushed]) -> list[Received]:
        """Waits until what was pushed is durable and indexed, then makes the receipts."""
        receipts = []
        for one in pushed:
            one.ticket.wait_durable()
            one.ticket.wait_indexed()
            if one.accepted_us > 0:
                self._accept(ward, one.uid, one.digest, one.accepted_us)
            receipts.append(Received(one.uid, one.digest, self._clock(), one.ticket.outcome))
            self.measures.took(ward, one)
        self._note_copies(ward, [one for one in receipts if one.outcome is Outcome.DUPLICATE])
        return receipts

    def incoming(self, ward: str) -> Incoming:
        """The objects of one push stream of this ward."""
        return Incoming(self._archive, ward, resumable=self._resumable, taps=self.taps)

    def _accept(self, ward: str, uid: str, digest: bytes, accepted_us: int) -> None:
        """A person at the ward decided which of two contents is served. It counts here where both are that
        ward's: nobody decides over what another ward sent."""
        live = self._archive.index.live(uid)
        rows = self._archive.index.conflicts(CONTENTS_MAX, states=list(ConflictState), uid=uid)
        if not any(row.other_digest == digest and row.ward == ward for row in rows):
            return
        if live is not None and live.head.provenance.ward != ward:
            log.warning("%s decided about %s, which is served as another ward's", ward, uid)
            return
        self._archive.record_facts([Fact(FactKind.ACCEPTED, uid, digest, ward, accepted_us, ward)])

    def _receipt_for(self, uid: str, digest: bytes) -> Received | None:
        if not self._archive.index.has_content(uid, digest):
            return None
        known = self._archive.index.lookup(uid)
        live = known is not None and known.digest == digest
        return Received(uid, digest, self._clock(), Outcome.DUPLICATE if live else Outcome.CONFLICT)

    def _note_copies(self, ward: str, receipts: Iterable[Received]) -> None:
        """One fact for each of these that is the region's by another ward and was not yet known to be here
        too.
        """
        facts = [
            Fact(FactKind.COPY, receipt.sop_instance_uid, receipt.digest, ward, self._clock())
            for receipt in receipts
            if self._is_new_holder(ward, receipt)
        ]
        if facts:
            self._archive.record_facts(facts)

    def _is_new_holder(self, ward: str, receipt: Received) -> bool:
        uid = receipt.sop_instance_uid
        known = self._archive.index.lookup(uid)
        if known is None or known.digest != receipt.digest:
            return False
        own = Scope(frozenset({ward}))
        return not self._archive.index.instances(known.study_uid, known.series_uid, uid, scope=own)


class Incoming:
    """The objects of one push stream, in order; at most one of them is half here. `policy` says what becomes
    of another content than the one that is here under its UID.

    A stream may be cut while a thread still takes what had been read of it: `abort` waits for that thread,
    which stops at the next message, so that nothing begins behind its back and is held for ever.
    """

    def __init__(
        self,
        archive: Archive,
        ward: str,
        policy: ConflictPolicy = ConflictPolicy.KEEP,
        resumable: MutableMapping[PartialKey, Incoming] | None = None,
        taps: Taps | None = None,
    ) -> None:
        """`resumable` is where it says which objects it can leave half here."""
        self._archive = archive
        self._ward = ward
        self._policy = policy
        self._taps = taps
        self._resumable = resumable
        self._key: PartialKey | None = None
        self._inflating = Inflating()
        self._head: InstanceHead | None = None
        self._reception: Reception | None = None
        self._left = 0
        self._begun_s = 0.0
        self._bytes = 0
        self._accepted_us = 0
        self._refusal: MissError | None = None
        self._taking = threading.Lock()
        self._over = False

    def take(self, messages: Sequence[PushMessage]) -> Taken:
        """Takes messages in the order they came. Stops at what ends the stream."""
        taken = Taken()
        with self._taking:
            for message in messages:
                if self._over:
                    taken.error = Unavailable("this push was given up")
                    break
                try:
                    self._take_one(message, taken)
                except Exception as error:
                    # Its traceback leads to this frame and back to itself: the messages would stay until the
                    # collector of cycles comes. Who does not expect it wants the traceback.
                    taken.error = error.with_traceback(None) if isinstance(error, MissError) else error
                    self._give_up()
                    break
        return taken

    def abort(self) -> None:
        """The stream ended: what is half here is given up."""
        self._over = True
        with self._taking:
            self._give_up()

    def _give_up(self) -> None:
        reception, self._reception, self._head = self._reception, None, None
        if reception is not None:
            reception.suspend()
        self._forget_key()

    def _take_one(self, message: PushMessage, taken: Taken) -> None:
        if isinstance(message, Group):
            self._take_group(message.objects, taken)
            return
        if isinstance(message, Chunk):
            self._write(message.data)
            return
        kind = message.WhichOneof("message")
        if kind == "group":
            self._take_group(message.group.objects, taken)
        elif kind == "zstd_group":
            objects = self._inflating.group(message.zstd_group)
            if len(objects) > (message.packed_objects or PACKED_OBJECTS):  # what its turn was given for
                raise InvalidInput("a compressed group of more objects than it was said to hold")
            self._take_group(objects, taken)
        elif kind == "begin":
            self._begin(message.begin)
        elif kind == "chunk":
            self._write(message.chunk)
        elif kind == "zstd_chunk":
            self._write(self._inflating.chunk(message.zstd_chunk))
        elif kind == "end":
            self._end(message.end.digest, taken)
        else:
            raise InvalidInput("a push message that this release does not know")

    def _take_group(self, objects: Sequence[Whole | uplink_pb2.PushWhole], taken: Taken) -> None:
        if self._head is not None:
            raise InvalidInput("a group between the begin and the end of an object")
        if len(objects) > OBJECTS_MAX:
            raise InvalidInput(f"a group of more than {OBJECTS_MAX:,} objects")
        for whole in objects:
            self._begin(whole.begin)
            self._write(whole.dataset)
            self._end(whole.digest, taken)

    def _begin(self, begin: uplink_pb2.PushBegin) -> None:
        if self._head is not None:
            raise InvalidInput("an object begins inside another")
        if begin.size < 0:
            raise InvalidInput("an object of less than no bytes")
        key = self._key_of(begin)
        if not 0 <= begin.offset <= begin.size or (begin.offset and key is None):
            raise InvalidInput("an object that goes on where it can't")
        self._begun_s, self._bytes = time.perf_counter(), begin.size
        self._head = serde.head_from(begin.head, ward=self._ward)
        self._left, self._refusal, self._accepted_us = begin.size - begin.offset, None, begin.accepted_us
        with self._refusing():
            self._reception = self._archive.intake.begin(
                self._head, conflict=begin.conflict, size_hint=begin.size, policy=self._policy,
                partial=key, offset=begin.offset,
            )  # fmt: skip
            small_max = self._archive.intake.limits.small_object_bytes_max
            if self._taps is not None and begin.size > small_max and not begin.conflict:
                self._taps.begin(self._ward, self._head.sop_instance_uid, self._reception)
            if key is not None and self._resumable is not None:
                self._key = key
                self._resumable[key] = self

    def _key_of(self, begin: uplink_pb2.PushBegin) -> PartialKey | None:
        if self._resumable is None or not begin.digest or begin.size < RESUMABLE_BYTES_MIN:
            return None
        return PartialKey(self._ward, begin.head.sop_instance_uid, serde.digest_from(begin.digest))

    def _forget_key(self) -> None:
        key, self._key = self._key, None
        if key is not None and self._resumable is not None and self._resumable.get(key) is self:
            del self._resumable[key]

    def _write(self, chunk: Buffer) -> None:
        if self._head is None:
            raise InvalidInput("a chunk of no object")
        if len(chunk) > CHUNK_BYTES_MAX:
            raise InvalidInput("a chunk larger than 1 MiB")
        self._left -= len(chunk)
        if self._left < 0:
            raise InvalidInput("an object longer than it was said to be")
        if self._reception is not None:
            with self._refusing():
                self._reception.write(chunk)

    def _end(self, digest: bytes, taken: Taken) -> None:
        if self._head is None:
            raise InvalidInput("the end of no object")
        digest = serde.digest_from(digest)
        uid = self._head.sop_instance_uid
        if self._reception is not None:
            with self._refusing():
                if self._left:
                    raise Corrupt("an object shorter than it was said to be")
                ticket = self._reception.commit(expected_digest=digest)
                taken.pushed.append(
                    Pushed(uid, digest, ticket, self._accepted_us, self._begun_s, self._bytes)
                )
        if self._refusal is not None:
            permanent = not isinstance(self._refusal, Corrupt)
            taken.refused.append(Refused(uid, digest, str(self._refusal), permanent))
        self._head = self._reception = None
        self._forget_key()

    def _refusing(self) -> _Refusing:
        return _Refusing(self)

    def refuse(self, error: MissError) -> None:
        """Gives up the object that is half here; its other messages are dropped."""
        self._refusal = error
        if self._reception is not None:
            self._reception.abort()
            self._reception = None


class _Refusing:
    """What is wrong with one object refuses it alone; what else is raised goes on up and ends the stream."""

    def __init__(self, incoming: Incoming) -> None:
        self._incoming = incoming

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, (InvalidInput, TooLarge, Corrupt, OtherContent)):
            self._incoming.refuse(error)
            return True
        return False
