"""The fact log: what can't be derived from instances, in the order it became known, synced, never dropped.

One record holds a batch, so that a batch is there whole or not at all, and one sync serves it. It also
holds how far the index had read the packs when the batch was applied: a rebuild applies facts and instances
in the same order. A batch with entries of the index in it is deflated: the instances of a study say the same
of nearly everything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from archive.errors import Corrupt, NotFound, TooLarge
from archive.model import (
    START,
    Attributes,
    Fact,
    FactKind,
    IndexEntry,
    InstanceHead,
    Location,
    Position,
    Provenance,
    Record,
    RecordKind,
)
from archive.packs.log import Log
from archive.packs.logfiles import Layout, LogLimits
from archive.packs.records import Purpose
from archive.packs.recovery import Damage, FoundRecord
from archive.packs.storage import Storage

log = logging.getLogger(__name__)

LAYOUT = Layout("facts", "facts", Purpose.FACTS)
BATCH_FACTS_MAX = 10_000
BATCH_BYTES_MAX = 16 << 20
_KIND = 16  # beside the kinds of a pack's records
_INFLATED_BYTES_MAX = 256 << 20
_SEALED_BYTES = 256  # a record's trailer, with its digest, and more
_DEFLATED = b"x"  # how zlib begins; JSON begins with a brace

LIMITS = LogLimits(file_bytes_max=256 << 20, file_age_s_max=365 * 86400.0, ahead_bytes=1 << 20)


@dataclass(frozen=True, slots=True)
class FactBatch:
    """Facts that were recorded together. `after` is how far the index had read the packs, `start` where the
    batch begins and `end` where the next one does."""

    facts: tuple[Fact, ...]
    after: Position
    end: Position
    start: Position = START


class Records(Protocol):
    """What is needed of a log to read it: a log that is open to write, or one that is looked at."""

    @property
    def durable(self) -> Position: ...

    def read(self, start: Position, stop: Position) -> Iterator[FoundRecord | Damage]: ...


class FactReader:
    """The facts of one archive, to read."""

    def __init__(self, storage: Storage, records: Records) -> None:
        self._storage = storage
        self._records = records

    def read(
        self, start: Position = START, *, kinds: Collection[FactKind] | None = None
    ) -> Iterator[FactBatch]:
        """The batches from `start` on; with `kinds` only those that may hold such facts. A batch that can't
        be read any more is stepped over and logged."""
        words = None if kinds is None else [f'"{kind.value}"'.encode() for kind in kinds]
        for item in self._records.read(start, self._records.durable):
            if isinstance(item, Damage):
                log.error("facts file %d is damaged from %d to %d", item.number, item.offset, item.end)
            elif item.header.kind == _KIND:
                header = item.header
                payload = self._storage.reader(LAYOUT.name_of(item.number)).read(
                    header.payload_offset, header.payload_bytes
                )
                text = _inflated(payload)
                if words is not None and not any(word in text for word in words):
                    continue
                facts, after = _decode(text)
                start = Position(item.number, header.offset)
                yield FactBatch(facts, after, Position(item.number, header.end), start)


    def seal_at(self, position: Position) -> bytes:
        """Stands for what was recorded just below a place: a log that was put back from a backup, and went on
        otherwise, has another one there. Empty when nothing lies there."""
        start = max(position.offset - _SEALED_BYTES, 0)
        try:
            name = LAYOUT.name_of(position.file)
            below = self._storage.reader(name).read(start, position.offset - start)
        except (NotFound, OSError):
            return b""
        return hashlib.blake2b(below, digest_size=8).digest() if below.strip(b"\0") else b""


class FactLog(FactReader):
    """The facts of one archive. One process writes them."""

    def __init__(self, storage: Storage, records: Log) -> None:
        super().__init__(storage, records)
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

    def mark(self) -> bool:
        """In an idle moment: promise the last batch by a MARK."""
        return self._log.mark()

    def close(self) -> None:
        self._log.close()


def _encode(facts: Sequence[Fact], after: Position) -> bytes:
    rows: list[list[Any]] = []
    for fact in facts:
        row = [fact.kind.value, fact.sop_instance_uid, fact.digest.hex(), fact.ward, fact.at_us, fact.detail]
        rows.append(row if fact.entry is None else [*row, _encode_entry(fact.entry)])
    body = {"after": [after.file, after.offset], "facts": rows}
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(text) > _INFLATED_BYTES_MAX:
        raise TooLarge(f"a batch of facts holds at most {_INFLATED_BYTES_MAX} bytes of text")
    return zlib.compress(text) if any(fact.entry is not None for fact in facts) else text


def _encode_entry(entry: IndexEntry) -> list[Any]:
    record, found = entry.record, entry.attributes
    head, place = record.head, record.location
    source = head.provenance
    return [
        [int(record.kind), record.sequence, record.end.file, record.end.offset],
        [head.sop_class_uid, head.transfer_syntax_uid, source.ward, source.issuer, source.device,
         source.calling_ae, source.received_at_us],
        [place.pack, place.offset, place.length, place.dataset_offset],
        [dict(found.patient), dict(found.study), dict(found.series), dict(found.instance)],
    ]  # fmt: skip


def _decode_entry(uid: str, digest: bytes, body: list[Any]) -> IndexEntry:
    (kind, sequence, *end), (sop_class, syntax, *source), place, levels = body
    head = InstanceHead(sop_class, uid, syntax, Provenance(*source))
    record = Record(RecordKind(kind), sequence, head, digest, Location(*place), Position(*end))
    return IndexEntry(record, Attributes(*levels))


def _inflated(payload: bytes) -> bytes:
    if not payload.startswith(_DEFLATED):
        return payload
    try:
        inflater = zlib.decompressobj()
        text = inflater.decompress(payload, _INFLATED_BYTES_MAX)
    except zlib.error as error:
        raise Corrupt("a batch of facts can't be inflated") from error
    if not inflater.eof:
        raise Corrupt("a batch of facts can't be inflated")
    return text


def _decode(text: bytes) -> tuple[tuple[Fact, ...], Position]:
    try:
        body = json.loads(text)
        facts = []
        for kind, uid, digest_hex, ward, at_us, detail, *entry in body["facts"]:
            digest = bytes.fromhex(digest_hex)
            told = _decode_entry(uid, digest, entry[0]) if entry else None
            facts.append(Fact(FactKind(kind), uid, digest, ward, at_us, detail, told))
        return tuple(facts), Position(*body["after"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Corrupt("a batch of facts was written by a release that this one does not know") from error
