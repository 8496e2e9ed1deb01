"""What is put on record when another content comes under a UID that is here, before the answer goes out: that
it was refused, or that it was sent as a correction; and the line in the log that a person is to see. It
decides nothing: intake does, by the policy of the device."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from archive.errors import MissError, Unavailable
from archive.index.index import Index
from archive.model import ConflictState, Fact, FactKind, InstanceHead

log = logging.getLogger(__name__)

NOTED_MAX = 10_000
ANNOUNCED_EVERY_S = 10.0  # a device that sends its whole disk again does not fill the log


class Noting:
    """Records facts about other contents, each once as far as memory and index know."""

    def __init__(self, index: Index, record_facts: Callable[[Sequence[Fact]], None]) -> None:
        self._index = index
        self._record_facts = record_facts
        self._lock = threading.Lock()
        self._noted: OrderedDict[tuple[FactKind, str, bytes], None] = OrderedDict()
        self._announced_s = -ANNOUNCED_EVERY_S
        self._silent = 0

    def refused(self, head: InstanceHead, digest: bytes) -> None:
        """This content was not taken. Durable when this returns; raises SyncFailed or OutOfResources."""
        self._note(FactKind.REFUSED, head, digest, lambda: self._index.was_refused(*_content(head, digest)))
        self._announce("refused, as its device's are", head)

    def proposed(self, head: InstanceHead, digest: bytes) -> None:
        """This content, which is durable, was sent as a correction."""

        def is_settled() -> bool:
            state = self._index.kept_state(*_content(head, digest))
            return state is not None and state is not ConflictState.OPEN

        self._note(FactKind.PROPOSED, head, digest, is_settled)

    def kept(self, head: InstanceHead, *, proposed: bool) -> None:
        """Tell people: the content is kept beside the first."""
        self._announce("kept as a proposed correction" if proposed else "kept as a conflict", head)

    def _note(
        self, kind: FactKind, head: InstanceHead, digest: bytes, is_known: Callable[[], bool]
    ) -> None:
        key = (kind, *_content(head, digest))
        with self._lock:
            if key in self._noted:
                return
        try:
            known = is_known()
        except MissError as error:
            log.warning("noted without the index: %s", error)
            known = False
        if not known:
            source = head.provenance
            fact = Fact(kind, *_content(head, digest), source.ward, time.time_ns() // 1000, source.device)
            try:
                self._record_facts([fact])
            except Unavailable as error:  # it is in the log, and the index will have it
                log.warning("noted, and not in the index yet: %s", error)
        with self._lock:
            self._noted[key] = None
            if len(self._noted) > NOTED_MAX:
                self._noted.popitem(last=False)

    def _announce(self, what: str, head: InstanceHead) -> None:
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._announced_s < ANNOUNCED_EVERY_S:
                self._silent += 1
                return
            silent, self._silent, self._announced_s = self._silent, 0, now_s
        more = f"; {silent} more since the last such line" if silent else ""
        log.warning("another content came for %s from %s: %s%s; see `miss conflicts ls`",
                    head.sop_instance_uid, head.provenance.device, what, more)  # fmt: skip


def _content(head: InstanceHead, digest: bytes) -> tuple[str, bytes]:
    return head.sop_instance_uid, digest
