"""Owns where the data set of an instance comes from when it is sent: read where it is stored, fetched from
the region where it is not here (M10), recoded where the peer does not take it as it is stored (M8). It never
sends anything and never decides who may have it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from threading import Semaphore
from typing import TYPE_CHECKING, Protocol, Self

from archive.dataset import corrected, recoding
from archive.errors import EVICTED, Corrupt, Evicted, MissError, TooLarge
from archive.model import Location, StoredInstance
from archive.packs.records import part10_prefix
from federation.policy import Principal
from federation.spooling import Spool
from monitoring.tracing import carried
from node.dimse.acceptor import log_unexpected
from node.dimse.outbox import Source
from node.dimse.status import PROCESSING_FAILURE, status_of

if TYPE_CHECKING:
    from archive.archive import Archive

log = logging.getLogger(__name__)

RECODING_AT_ONCE = 2  # instances of all retrieves: each may take several times its bound of memory
DAMAGED = "its bytes here are known to be damaged"
FETCHES_AT_ONCE = 6   # from the region, of all retrieves
AHEAD_BYTES_MAX = 64 << 20  # fetched ahead of one retrieve, beside what is being sent
DECODED_BYTES_MAX = 512 << 20


class Fetcher(Protocol):
    """A node's window on the region."""

    def begin(self, instance: StoredInstance) -> Spool:
        """Where its data set is to lie, to be read while it comes. Waits for nothing; OutOfResources."""

    def fill(self, principal: Principal, instance: StoredInstance, spool: Spool) -> None:
        """Fetches it; who reads it hears what goes wrong."""


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Octets, and then perhaps the rest of another source from a place on."""

    octets: memoryview
    rest: Source | None = None
    rest_from: int = 0

    @property
    def length(self) -> int:
        return len(self.octets) + (self.rest.length - self.rest_from if self.rest is not None else 0)

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        done, size = 0, len(self.octets)
        for number, view in enumerate(views):
            if offset + done >= size:
                if done:
                    return done
                assert self.rest is not None
                return self.rest.read_into(views[number:], self.rest_from + offset - size)
            piece = self.octets[offset + done:offset + done + len(view)]
            view[:len(piece)] = piece
            done += len(piece)
            if len(piece) < len(view):
                return done
        return done

    def confirm(self) -> None:
        if self.rest is not None:
            self.rest.confirm()

    def close(self) -> None:
        if self.rest is not None:
            self.rest.close()


@dataclass(frozen=True, slots=True)
class FetchedSource:
    """What is being fetched: it is read as it comes, and its last fragment held until it is verified. It is
    closed with this; until then its bytes count in the window's budget."""

    spool: Spool

    @property
    def length(self) -> int:
        return self.spool.size

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        self.spool.wait_for(offset)
        done = os.preadv(self.spool.fileno(), views, offset)
        if not done:
            raise OSError("the file ends early")
        return done

    def confirm(self) -> None:
        self.spool.checked()

    def close(self) -> None:
        self.spool.close()


@dataclass(frozen=True, slots=True)
class Payloads:
    """The data sets of a node's instances. Safe to use from any thread; `decoded_bytes_max` bounds one that
    is held in memory to be recoded. `on_read` is told of each that is opened, and waits for nothing."""

    archive: Archive
    window: Fetcher | None = None
    decoded_bytes_max: int = DECODED_BYTES_MAX
    recoding: Semaphore = field(default_factory=lambda: Semaphore(RECODING_AT_ONCE))
    on_read: Callable[[StoredInstance], None] = lambda instance: None
    fetching: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch"))

    def close(self) -> None:
        self.fetching.shutdown(wait=True, cancel_futures=True)

    def syntaxes(self, instance: StoredInstance) -> tuple[str, ...]:
        """The transfer syntaxes that it can be had in, as it is stored first."""
        stored = instance.head.transfer_syntax_uid
        targets = recoding.TARGETS if recoding.can_decode(stored) else ()
        return (stored, *(uid for uid in targets if uid != stored))

    def supply(self, principal: Principal) -> Supply:
        """For one retrieve, in the name of whom it is for."""
        return Supply(self, principal)


class Supply:
    """The data sets of one retrieve. What has to be fetched is fetched ahead; leaving its `with` block lets
    go what nobody took."""

    def __init__(self, payloads: Payloads, principal: Principal) -> None:
        self._payloads = payloads
        self._principal = principal
        self._ahead: dict[str, tuple[Spool, Future[None]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for spool, future in self._ahead.values():
            future.cancel()
            spool.close()
        self._ahead.clear()

    def expect(self, instance: StoredInstance) -> None:
        """It is to be opened soon. Waits for nothing; what there is no room for is fetched when its turn
        comes."""
        uid = instance.head.sop_instance_uid
        if not (instance.evicted or instance.damaged) or uid in self._ahead:
            return
        size = instance.location.length - instance.location.dataset_offset
        if self._ahead and size + sum(spool.size for spool, _ in self._ahead.values()) > AHEAD_BYTES_MAX:
            return
        with suppress(RuntimeError, MissError):  # the node is being stopped; there is no room now
            self._ahead[uid] = self._begin(instance)

    def _begin(self, instance: StoredInstance) -> tuple[Spool, Future[None]]:
        window = self._payloads.window
        if window is None:
            raise Evicted(EVICTED)
        spool = window.begin(instance)
        try:
            return spool, self._payloads.fetching.submit(
                carried(window.fill, self._principal, instance, spool))
        except BaseException:
            spool.close()
            raise

    def open(self, instance: StoredInstance, transfer_syntax_uid: str) -> Source:
        """Its data set in one of its syntaxes. Raises Corrupt for what is known to be damaged, NotFound and
        Unavailable when it can't be had, CannotUnderstand or TooLarge when it can't be recoded. What is sent
        as it is stored is not hashed again here: the scrub and the peer's own checks are for that."""
        if instance.damaged and self._payloads.window is None:
            raise Corrupt(DAMAGED)
        self._payloads.on_read(instance)
        if transfer_syntax_uid == instance.head.transfer_syntax_uid:
            return self._stored(instance)
        with self._payloads.recoding:
            return self._recoded(instance, transfer_syntax_uid)

    def _stored(self, instance: StoredInstance) -> Source:
        try:
            _require_good(instance)
            return self._payloads.archive.open_dataset(instance)
        except Evicted:
            return _corrected_source(self._fetched(instance), instance)

    def _recoded(self, instance: StoredInstance, transfer_syntax_uid: str) -> Source:
        bytes_max = self._payloads.decoded_bytes_max
        head = instance.head
        try:
            _require_good(instance)
            payload = self._payloads.archive.open_instance(instance)
        except Evicted:
            source = self._fetched(instance)
            prefix = part10_prefix(head)
            try:
                if source.length > bytes_max:
                    raise TooLarge(f"instances of more than {bytes_max} bytes are not recoded") from None
                source.confirm()
                whole = _corrected_whole(prefix + source.spool.read(), len(prefix), instance)
            finally:
                source.close()
            place = Location("", 0, len(whole), len(prefix))
            return MemorySource(memoryview(recoding.recoded(
                BytesIO(whole), replace(instance, location=place), transfer_syntax_uid, bytes_max)))
        with payload:
            spliced = recoding.spliced(payload, instance, transfer_syntax_uid, bytes_max)
            if spliced is not None:
                return MemorySource(memoryview(spliced.octets), self._stored(instance), spliced.rest_from)
            return MemorySource(memoryview(recoding.recoded(payload, instance, transfer_syntax_uid,
                                                            bytes_max)))

    def _fetched(self, instance: StoredInstance) -> FetchedSource:
        """From the region, which has what is not here."""
        uid = instance.head.sop_instance_uid
        spool, _ = self._ahead.pop(uid) if uid in self._ahead else self._begin(instance)
        return FetchedSource(spool)


def why_not(instance: StoredInstance, error: Exception) -> tuple[int, str]:
    """The status and comment of a sub-operation whose data set can't be had, which is logged. The text of an
    error that nobody foresaw may quote a data set: it goes nowhere."""
    uid = instance.head.sop_instance_uid
    if isinstance(error, MissError):
        log.warning("instance %s can't be sent: %s", uid, error)
        return status_of(error), str(error)
    if isinstance(error, OSError):
        log.warning("instance %s can't be read: %s", uid, error)
    else:
        log_unexpected(f"sending instance {uid}", error)
    return PROCESSING_FAILURE, "it can't be read"


def _require_good(instance: StoredInstance) -> None:
    """Bytes that are known to be damaged here are as good as gone: the region may have them."""
    if instance.damaged:
        raise Evicted(DAMAGED)


def _corrected_source(source: FetchedSource, instance: StoredInstance) -> Source:
    """What came from elsewhere came as it is stored there: people's corrections are laid over it here."""
    if instance.corrections is None:
        return source
    try:
        source.confirm()
        syntax = instance.head.transfer_syntax_uid
        return corrected.corrected_dataset(source, source.spool, 0, syntax, instance.corrections)
    except BaseException:
        source.close()
        raise


def _corrected_whole(whole: bytes, dataset_offset: int, instance: StoredInstance) -> bytes:
    if instance.corrections is None:
        return whole
    syntax = instance.head.transfer_syntax_uid
    with corrected.corrected_file(BytesIO(whole), dataset_offset, syntax, instance.corrections) as payload:
        return payload.read()
