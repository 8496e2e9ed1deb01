"""Owns how rows of the queue reach the three kinds of destinations: a device by C-STORE, a ward through the
hub, a device that is told of a study by N-CREATE. It translates what they answer to the router's verdicts,
and decides neither order nor retries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from archive.archive import Archive
from archive.errors import NotFound, Unavailable
from archive.ledger import Destination, Routed, RouteKind
from archive.model import StoredInstance
from node.availability import AvailabilityScu, Notice
from node.commitment.scu import CommitmentResult, CommitmentScu
from node.dimse.commitments import REASONS
from node.dimse.status import (
    CLASS_NOT_SUPPORTED,
    DUPLICATE_INSTANCE,
    INVALID_INSTANCE,
    NO_SUCH_INSTANCE,
    OUT_OF_RESOURCES,
    is_stored,
    meaning,
)
from node.forwarding import Forwarder, Forwarding
from node.routing.router import Committed, Tell, Verdict

GONE = "it is no longer here, or another content is under its UID"
_NEVER = frozenset({CLASS_NOT_SUPPORTED, DUPLICATE_INSTANCE, NO_SUCH_INSTANCE, INVALID_INSTANCE, 0x0118})


class Delivers(Protocol):
    """Hands instances over to another ward; returns when that is acknowledged."""

    def send(self, ward_id: str, instances: Sequence[StoredInstance]) -> object: ...


class Senders:
    """The router's sender. Safe to use from any thread."""

    def __init__(
        self, archive: Archive, forwarder: Forwarder, notifier: AvailabilityScu, *,
        deliveries: Delivers | None = None, commitment: CommitmentScu | None = None,
        steps_of: Callable[[str], Sequence[str]] = lambda study_uid: (),
    ) -> None:  # fmt: skip
        """`steps_of` gives the performed procedure steps that are known of a study."""
        self._archive = archive
        self._forwarder = forwarder
        self._notifier = notifier
        self._deliveries = deliveries
        self._commitment = commitment
        self._steps_of = steps_of
        self._lock = threading.Lock()
        self._live: set[Forwarding] = set()
        self._stopped = False
        self._cut = False

    def send(self, to: Destination, rows: Sequence[Routed], tell: Tell) -> None:
        """See `router.Sender`."""
        if to.kind is RouteKind.NOTICE:
            self._notify(to.name, rows, tell)
            return
        found = self._found(rows, tell)
        if not found:
            return
        by_uid = {one.head.sop_instance_uid: row for row, one in found}
        instances = [one for _, one in found]
        if to.kind is RouteKind.WARD:
            if self._deliveries is None:
                raise Unavailable("this node has no uplink that takes deliveries to other wards")
            self._deliveries.send(to.name, instances)
            for row, _ in found:
                tell(row, Verdict.SENT, 0, "")
            return

        def on_outcome(one: StoredInstance, status: int, comment: str) -> None:
            verdict = verdict_of(status)
            if verdict is Verdict.BUSY and one.evicted:
                verdict = Verdict.AGAIN  # it is the region that does not give it now
            if not self._cut:
                tell(by_uid[one.head.sop_instance_uid], verdict, status, _words(status, comment))

        peer = self._forwarder.peer(to.name)
        forwarding = self._forwarder.forwarding(peer, instances, on_outcome, stopping=lambda: self._stopped)
        with self._under_way(forwarding):
            forwarding.run()

    def stop(self) -> None:
        """Begin nothing further."""
        self._stopped = True

    def cut(self) -> None:
        """End what is under way: nothing is told of it, as if it had not been sent."""
        self._stopped = self._cut = True
        with self._lock:
            for forwarding in self._live:
                forwarding.cut()

    @contextmanager
    def _under_way(self, forwarding: Forwarding) -> Iterator[None]:
        with self._lock:
            if self._cut:
                raise Unavailable("the node is stopping")
            self._live.add(forwarding)
        try:
            yield
        finally:
            with self._lock:
                self._live.discard(forwarding)

    def ask_to_commit(self, to: Destination, rows: Sequence[Routed]) -> str:
        """See `router.Sender`."""
        if self._commitment is None:
            raise Unavailable("this node asks nobody to commit")
        here = self._contents(rows)
        instances = [here[key] for row in rows if (key := (row.sop_instance_uid, row.digest)) in here]
        return self._commitment.request(to.name, instances) if instances else ""

    def committed(self, rows: Sequence[Routed]) -> Sequence[tuple[Committed, str]]:
        """See `router.Sender`."""
        results: dict[str, CommitmentResult | None] = {}
        for uid in {row.transaction_uid for row in rows}:
            try:
                results[uid] = None if self._commitment is None else self._commitment.result(uid)
            except NotFound:
                results[uid] = None
        return [_committed(results[row.transaction_uid], row.sop_instance_uid) for row in rows]

    def _found(self, rows: Sequence[Routed], tell: Tell) -> list[tuple[Routed, StoredInstance]]:
        here = self._contents(rows)
        found = []
        for row in rows:
            one = here.get((row.sop_instance_uid, row.digest))
            if one is None:
                tell(row, Verdict.NEVER, NO_SUCH_INSTANCE, GONE)
            else:
                found.append((row, one))
        return found

    def _contents(self, rows: Sequence[Routed]) -> dict[tuple[str, bytes], StoredInstance]:
        described = self._archive.index.described({row.sop_instance_uid for row in rows})
        return {(one.stored.head.sop_instance_uid, one.stored.digest): one.stored for one in described}

    def _notify(self, to: str, rows: Sequence[Routed], tell: Tell) -> None:
        by_notice: dict[str, Routed] = {}
        notices = []
        for row in rows:
            instances = self._archive.index.instances(row.study_uid)
            if not instances:
                tell(row, Verdict.NEVER, NO_SUCH_INSTANCE, "the study is no longer here")
                continue
            uid = f"2.25.{int.from_bytes(row.key, 'big')}"  # the same at every try (PS3.5 B.2)
            by_notice[uid] = row
            notices.append(Notice(uid, row.study_uid, instances, self._steps_of(row.study_uid)))

        def heard(notice: Notice, status: int, comment: str) -> None:
            # Told twice under one UID is what a lost answer comes to: the device knows.
            verdict = Verdict.SENT if status == DUPLICATE_INSTANCE else verdict_of(status)
            tell(by_notice[notice.uid], verdict, status, _words(status, comment))

        if notices:
            self._notifier.notify(to, notices, heard)


def verdict_of(status: int) -> Verdict:
    """What a status of C-STORE (PS3.4 Table B.2-1) or N-CREATE means for a row."""
    if is_stored(status):
        return Verdict.SENT
    if OUT_OF_RESOURCES <= status <= 0xA7FF:
        return Verdict.BUSY
    if status in _NEVER or 0xA900 <= status <= 0xA9FF or 0xC000 <= status <= 0xCFFF:
        return Verdict.NEVER
    return Verdict.AGAIN


def _committed(result: CommitmentResult | None, uid: str) -> tuple[Committed, str]:
    if result is None:
        return Committed.UNKNOWN, "nobody knows the transaction any more"
    if uid in result.committed:
        return Committed.YES, ""
    if uid in result.failed:
        reason = result.failed[uid]
        return Committed.NO, f"{reason:04X} {REASONS.get(reason, 'an unknown reason')}"
    return (Committed.UNKNOWN if result.is_over else Committed.NOT_YET), result.error


def _words(status: int, comment: str) -> str:
    words = f"{status:04X} {meaning(status)}"
    return f"{words}: {comment}" if comment else words
