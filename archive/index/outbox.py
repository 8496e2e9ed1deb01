"""A node's outbox: what has no receipt from the region yet, in the order in which it is offered.

Urgent first (a reader waits), then the newest; what was set aside is not offered. Rows come and go with
records and facts (`apply.py`, `effects.py`); here it is read, and given the two things that derive from
nothing: that a reader waits, and how often an instance was tried.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Integer, Table, and_, cast, func, select, update

from archive.index.rows import Content
from archive.index.schema import conflict, instance, outbox, removed
from archive.index.statements import by_uid
from archive.index.stored import INSTANCE_COLUMNS, head_of, instance_of, location_of
from archive.model import PendingInstance, PendingStudy, PendingSummary, StoredInstance

PENDING_MAX = 10_000
NOTHING: Mapping[Content, bool] = MappingProxyType({})


def pending(
    connection: Connection, limit: int, known: Mapping[Content, bool] = NOTHING
) -> list[PendingInstance]:
    """`known` are contents that the caller has, and whether as urgent: they are left out unless they became
    it."""
    listed = connection.execute(
        select(outbox)
        .where(outbox.c.set_aside.is_(False))
        .order_by(
            outbox.c.urgent.desc(), outbox.c.received_at_us.desc(), outbox.c.sop_instance_uid, outbox.c.digest
        )
        .limit(min(limit, PENDING_MAX) + len(known))
    ).fetchall()
    rows = [row for row in listed if _is_news(row, known)][:limit] if known else listed
    stored = {
        home: _stored(connection, home, {row.sop_instance_uid for row in rows if _home(row) is home})
        for home in (instance, removed, conflict)
    }
    return [
        _pending(row, stored[_home(row)][(row.sop_instance_uid, bytes(row.digest))])
        for row in rows
        if (row.sop_instance_uid, bytes(row.digest)) in stored[_home(row)]
    ]


def _is_news(row: Any, known: Mapping[Content, bool]) -> bool:
    as_urgent = known.get((row.sop_instance_uid, bytes(row.digest)))
    return as_urgent is None or (row.urgent and not as_urgent)


def _home(row: Any) -> Table:
    """Where a row of the outbox has its content."""
    return conflict if row.conflict else removed if row.hidden else instance


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


def _stored(connection: Connection, table: Table, uids: set[str]) -> dict[tuple[str, bytes], Any]:
    rows = by_uid(connection, select(table), table.c.sop_instance_uid, uids)
    return {(row.sop_instance_uid, bytes(row.digest)): row for row in rows}


def _pending(row: Any, stored: Any) -> PendingInstance:
    return PendingInstance(
        study_uid=row.study_instance_uid,
        head=head_of(stored),
        digest=bytes(row.digest),
        location=location_of(stored),
        conflict=bool(row.conflict),
        urgent=bool(row.urgent),
        tries=row.tries,
        accepted_us=row.accepted_us,
    )
