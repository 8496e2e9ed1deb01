"""The fact log: what can't be derived from instances, in the order it became known, synced, never dropped.

One record holds a batch, so that a batch is there whole or not at all, and one sync serves it. It also
holds how far the index had read the packs when the batch was applied: a rebuild applies facts and instances
in the same order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from archive.errors import Corrupt, TooLarge
from archive.model import START, Fact, FactKind, InstanceHead, Position, Provenance
from archive.packs.log import Log
from archive.packs.logfiles import Layout, LogLimits
from archive.packs.records import Purpose
from archive.packs.recovery import Damage
from archive.packs.storage import Storage

log = logging.getLogger(__name__)

LAYOUT = Layout("facts", "facts", Purpose.FACTS)
BATCH_FACTS_MAX = 10_000
BATCH_BYTES_MAX = 16 << 20
_KIND = 16  # beside the kinds of a pack's records

LIMITS = LogLimits(file_bytes_max=256 << 20, file_age_s_max=365 * 86400.0, ahead_bytes=1 << 20)


@dataclass(frozen=True, slots=True)
class FactBatch:
    """Facts that were recorded together. `after` is how far the index had read the packs, `end` where the
    next batch begins."""

    facts: tuple[Fact, ...]
    after: Position
    end: Position


class FactLog:
    """The facts of one archive. One process writes them."""

    def __init__(self, storage: Storage, records: Log) -> None:
        self._storage = storage
        self._log = records

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        promised: Position = START,
        writer: bytes = b"",
        limits: LogLimits | None = None,
    ) -> FactLog:
        """To write. `promised` is a place that was read from the facts before; `writer` names a new log."""
        records = Log.open(storage, LAYOUT, promised=promised, limits=limits or LIMITS, writer=writer)
        return cls(storage, records)

    @property
    def end(self) -> Position:
        """Every recorded fact lies below."""
        return self._log.durable

    def record(self, facts: Sequence[Fact], *, after: Position) -> Position:
        """Append and sync one batch; the position behind it. Raises SyncFailed or OutOfResources, and then
        nothing was recorded."""
        if len(facts) > BATCH_FACTS_MAX:
            raise TooLarge(f"a batch holds at most {BATCH_FACTS_MAX} facts")
        payload = _encode(facts, after)
        if len(payload) > BATCH_BYTES_MAX:
            raise TooLarge(f"a batch of facts takes at most {BATCH_BYTES_MAX} bytes")
        head = InstanceHead("", "", "", Provenance("", "", "", "", time.time_ns() // 1000))
        digest = hashlib.sha256(payload).digest()
        appended = self._log.append(_KIND, head, [payload], len(payload), prefix=b"", digest=digest)
        self._log.wait_durable(appended)
        return appended.end

    def read(self, start: Position = START) -> Iterator[FactBatch]:
        """The batches from `start` on. A batch that can't be read any more is stepped over and logged."""
        for item in self._log.read(start, self._log.durable):
            if isinstance(item, Damage):
                log.error("facts file %d is damaged from %d to %d", item.number, item.offset, item.end)
            elif item.header.kind == _KIND:
                header = item.header
                payload = self._storage.reader(LAYOUT.name_of(item.number)).read(
                    header.payload_offset, header.payload_bytes
                )
                facts, after = _decode(payload)
                yield FactBatch(facts, after, Position(item.number, header.end))

    def mark(self) -> bool:
        """In an idle moment: promise the last batch by a MARK."""
        return self._log.mark()

    def close(self) -> None:
        self._log.close()


def _encode(facts: Sequence[Fact], after: Position) -> bytes:
    rows = [
        [fact.kind.value, fact.sop_instance_uid, fact.digest.hex(), fact.ward, fact.at_us, fact.detail]
        for fact in facts
    ]
    body = {"after": [after.file, after.offset], "facts": rows}
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")


def _decode(payload: bytes) -> tuple[tuple[Fact, ...], Position]:
    try:
        body = json.loads(payload)
        facts = tuple(
            Fact(FactKind(kind), uid, bytes.fromhex(digest), ward, at_us, detail)
            for kind, uid, digest, ward, at_us, detail in body["facts"]
        )
        return facts, Position(*body["after"])
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt("a batch of facts was written by a release that this one does not know") from error
