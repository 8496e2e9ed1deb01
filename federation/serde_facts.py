"""Facts that travel between a ward and the region, and what is corrected of an instance: domain objects to
messages and back, checked on the way in. What a fact says is checked by who takes it."""

from __future__ import annotations

from archive.corrections import DETAIL_CHARS_MAX, checked_changes
from archive.errors import InvalidInput
from archive.index.travel import TRAVELLING, Cursor
from archive.model import Fact, FactKind, Overlay, Position, is_uid
from federation import serde
from protos import facts_pb2, window_pb2

LOG_BYTES_MAX = 64
SEAL_BYTES_MAX = 32
_WARD_CHARS_MAX = 200


def fact_to(fact: Fact) -> facts_pb2.ToldFact:
    return facts_pb2.ToldFact(
        kind=fact.kind.value,
        uid=fact.sop_instance_uid,
        digest=fact.digest,
        ward=fact.ward,
        at_us=fact.at_us,
        detail=fact.detail,
    )


def fact_from(message: facts_pb2.ToldFact) -> Fact:
    """Raises InvalidInput for what can't be a fact that travels."""
    try:
        kind = FactKind(message.kind)
    except ValueError:
        kind = None
    if kind not in TRAVELLING:
        raise InvalidInput("facts of this kind do not travel")
    if (
        not is_uid(message.uid)
        or len(message.digest) not in (0, 32)
        or len(message.ward) > _WARD_CHARS_MAX
        or not 0 < message.at_us < 1 << 62
        or len(message.detail) > DETAIL_CHARS_MAX
    ):
        raise InvalidInput("a fact is not written as facts are")
    return Fact(kind, message.uid, message.digest, message.ward, message.at_us, message.detail)


def cursor_to(cursor: Cursor) -> facts_pb2.FactsCursor:
    return facts_pb2.FactsCursor(
        log=cursor.log, file=cursor.position.file, offset=cursor.position.offset, seal=cursor.seal
    )


def cursor_from(message: facts_pb2.FactsCursor) -> Cursor:
    if (
        len(message.log) > LOG_BYTES_MAX
        or len(message.seal) > SEAL_BYTES_MAX
        or not 1 <= message.file < 1 << 31
        or not 0 <= message.offset < 1 << 62
    ):
        raise InvalidInput("a place in a fact log is a file from 1 and an offset")
    return Cursor(message.log, Position(message.file, message.offset), message.seal)


def put_corrections(message: window_pb2.WindowInstance, overlay: Overlay | None) -> None:
    """What is corrected of an instance, so that the node that fetches its bytes as stored applies it."""
    if overlay is not None:
        message.corrected.CopyFrom(serde.fields_to(dict(overlay.values)))
        message.corrected_us, message.corrected_ward = overlay.at_us, overlay.ward


def corrections_from(message: window_pb2.WindowInstance) -> Overlay | None:
    if not message.HasField("corrected"):
        return None
    values = checked_changes(serde.fields_from(message.corrected))
    return Overlay(values, message.corrected_us, message.corrected_ward[:_WARD_CHARS_MAX])
