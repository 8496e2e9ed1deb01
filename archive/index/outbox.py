"""A node's outbox: what has no receipt from the region yet, in the order in which it is offered.

Urgent first (a reader waits), then the newest; what was set aside is not offered. Rows come and go with
records and facts (`apply.py`, `effects.py`); here it is read, and given the two things that derive from
nothing: that a reader waits, and how often an instance was tried.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Integer, Table, and_, bindparam, cast, func, select, update

from archive.index.rows import Content
from archive.index.schema import conflict, instance, outbox, removed
from archive.index.statements import Among
from archive.index.stored import INSTANCE_COLUMNS, instance_of
from archive.model import (
    InstanceHead,
    Location,
    PendingInstance,
    PendingStudy,
    PendingSummary,
    Provenance,
    StoredInstance,
)

PENDING_MAX = 10_000
NOTHING: Mapping[Content, bool] = MappingProxyType({})


def pending(
    connection: Connection, limit: int, known: Mapping[Content, bool] = NOTHING
) -> list[PendingInstance]:
    """`known` are contents that the caller has, and whether as urgent: they are left out unless they became
    it."""
    listed: Sequence[Any] = connection.execute(
        _NEXT, {"rows": min(limit, PENDING_MAX) + len(known)}
    ).fetchall()
    if known:
        listed = [row for row in listed if _is_news(row, known)][:limit]
    # Rows and what is stored are taken apart by place: a window of 2,000 is read over and over, and by name
    # each row took twice as long.
    uids: dict[Table, list[str]] = {instance: [], removed: [], conflict: []}
    for uid, _, _, in_conflict, hidden, *_ in listed:
        uids[_home(in_conflict, hidden)].append(uid)
    stored = {home: _stored(connection, home, set(some)) for home, some in uids.items()}
    found: list[PendingInstance] = []
    for uid, digest, urgent, in_conflict, hidden, study_uid, tries, accepted_us in listed:
        content = (uid, bytes(digest))
        one = stored[_home(in_conflict, hidden)].get(content)
        if one is not None:
            found.append(PendingInstance(
                study_uid, *_head_and_place(content, one), bool(in_conflict), bool(urgent), tries, accepted_us
            ))  # fmt: skip
    return found


_NEXT = (
    select(*(outbox.c[name] for name in (
        "sop_instance_uid", "digest", "urgent", "conflict", "hidden", "study_instance_uid", "tries",
        "accepted_us",
    )))
    .where(outbox.c.set_aside.is_(False))
    .order_by(
        outbox.c.urgent.desc(), outbox.c.received_at_us.desc(), outbox.c.sop_instance_uid, outbox.c.digest
    )
    .limit(bindparam("rows"))
)  # fmt: skip
_STORED = {
    table: Among(
        select(*(table.c[name] for name in (
            "sop_instance_uid", "digest", "sop_class_uid", "transfer_syntax_uid", "ward", "issuer", "device",
            "calling_ae", "received_at_us", "pack", "payload_offset", "payload_length", "dataset_offset",
        ))),
        table.c.sop_instance_uid,
    )
    for table in (instance, removed, conflict)
}  # fmt: skip


def _is_news(row: Sequence[Any], known: Mapping[Content, bool]) -> bool:
    uid, digest, urgent, *_ = row
    as_urgent = known.get((uid, bytes(digest)))
    return as_urgent is None or (urgent and not as_urgent)


def _home(in_conflict: bool, hidden: bool) -> Table:
    """Where a row of the outbox has its content."""
    return conflict if in_conflict else removed if hidden else instance


def _stored(connection: Connection, table: Table, uids: set[str]) -> dict[Content, Sequence[Any]]:
    return {(row[0], bytes(row[1])): row for row in _STORED[table].rows(connection, uids)}


def _head_and_place(content: Content, stored: Sequence[Any]) -> tuple[InstanceHead, bytes, Location]:
    (_, _, sop_class_uid, syntax_uid, ward, issuer, device, calling_ae, received_at_us, pack, offset, length,
     dataset_offset) = stored  # fmt: skip
    source = Provenance(ward, issuer, device, calling_ae, received_at_us)
    head = InstanceHead(sop_class_uid, content[0], syntax_uid, source)
    return head, content[1], Location(pack, offset, length, dataset_offset)


def of_study(
    connection: Connection, study_uid: str, sop_instance_uid: str | None, limit: int
) -> tuple[list[StoredInstance], int]:
    """What is served of a study (or one instance of it) and has no receipt yet, by series and number, and how
    many more of it are set aside."""
    here = outbox.c.study_instance_uid == study_uid
    if sop_instance_uid:
        here = and_(here, outbox.c.sop_instance_uid == sop_instance_uid)
    same = and_(
        outbox.c.sop_instance_uid == instance.c.sop_instance_uid, outbox.c.digest == instance.c.digest
    )
    rows = connection.execute(
        select(*INSTANCE_COLUMNS)
        .join(outbox, same)
        .where(here, outbox.c.set_aside.is_(False))
        .order_by(instance.c.series_instance_uid, instance.c.number, instance.c.sop_instance_uid)
        .limit(limit)
    ).fetchall()
    aside = connection.execute(
        select(func.count()).select_from(outbox).where(here, outbox.c.set_aside.is_(True))
    ).scalar_one()
    return [instance_of(row) for row in rows], int(aside)


def mark_urgent(connection: Connection, study_uid: str, sop_instance_uid: str | None) -> int:
    """Put a study, or one instance of it, before the others; how many that concerns."""
    statement = update(outbox).where(outbox.c.study_instance_uid == study_uid, outbox.c.set_aside.is_(False))
    if sop_instance_uid:
        statement = statement.where(outbox.c.sop_instance_uid == sop_instance_uid)
    return connection.execute(statement.values(urgent=True)).rowcount


def mark_urgent_all(connection: Connection, uids: Collection[str]) -> int:
    """The same of single instances; at most some hundred at once."""
    statement = update(outbox).where(outbox.c.sop_instance_uid.in_(uids), outbox.c.set_aside.is_(False))
    return connection.execute(statement.values(urgent=True)).rowcount if uids else 0


def note_try(connection: Connection, sop_instance_uid: str, digest: bytes) -> int:
    """Count one more try and say how many there were; 0 when it is not in the outbox."""
    here = and_(outbox.c.sop_instance_uid == sop_instance_uid, outbox.c.digest == digest)
    connection.execute(update(outbox).where(here).values(tries=outbox.c.tries + 1))
    return connection.execute(select(outbox.c.tries).where(here)).scalar() or 0


def summary(connection: Connection) -> PendingSummary:
    """Everything without a receipt; what was set aside counts among it and apart."""
    row = connection.execute(
        select(
            func.count(),
            func.coalesce(func.sum(outbox.c.bytes), 0),
            func.min(outbox.c.received_at_us),
            func.coalesce(func.sum(cast(outbox.c.set_aside, Integer)), 0),
        ).select_from(outbox)
    ).one()
    return PendingSummary(count=row[0], bytes=int(row[1]), oldest_us=row[2], set_aside=int(row[3]))


def studies(connection: Connection, limit: int) -> list[PendingStudy]:
    """The backlog by study, the oldest first."""
    oldest = func.min(outbox.c.received_at_us)
    rows = connection.execute(
        select(
            outbox.c.study_instance_uid,
            func.count(),
            func.sum(outbox.c.bytes),
            oldest,
            func.sum(cast(outbox.c.set_aside, Integer)),
        )
        .group_by(outbox.c.study_instance_uid)
        .order_by(oldest, outbox.c.study_instance_uid)
        .limit(min(limit, PENDING_MAX))
    )
    return [PendingStudy(row[0], row[1], int(row[2]), row[3], int(row[4])) for row in rows]


def set_aside(connection: Connection, limit: int) -> list[tuple[str, bytes, str]]:
    """What was set aside, with the reason: UID, digest, detail."""
    rows = connection.execute(
        select(outbox.c.sop_instance_uid, outbox.c.digest, outbox.c.detail)
        .where(outbox.c.set_aside.is_(True))
        .order_by(outbox.c.received_at_us, outbox.c.sop_instance_uid)
        .limit(min(limit, PENDING_MAX))
    )
    return [(row[0], bytes(row[1]), row[2]) for row in rows]
