"""The contents of a SOP Instance UID beside each other: the live one, those that are kept and not served,
and those that were not taken. It reads, and notes what was compared; where each stands is up to `effects.py`
and `acceptance.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sqlalchemy import Connection, bindparam, exists, select, update

from archive.index.schema import conflict, instance, refusal
from archive.index.statements import by_uid
from archive.index.stored import INSTANCE_COLUMNS, conflict_of, instance_of
from archive.model import UNDECIDED, ConflictRow, ConflictState, Refusal, Standing, StoredInstance

CONFLICTS_MAX = 10_000


def conflicts(
    connection: Connection,
    limit: int,
    states: Collection[ConflictState],
    uid: str | None,
    *,
    uncompared: bool,
) -> list[ConflictRow]:
    """Kept contents, newest first; `uncompared`: those that have a live one to be compared with."""
    both = conflict.join(
        instance, conflict.c.sop_instance_uid == instance.c.sop_instance_uid, isouter=not uncompared
    )
    query = (
        select(
            conflict,
            instance.c.digest.label("live_digest"),
            instance.c.study_instance_uid.label("live_study"),
            instance.c.series_instance_uid.label("live_series"),
        )
        .select_from(both)
        .where(conflict.c.state.in_(sorted(state.value for state in states)))
        .order_by(conflict.c.received_at_us.desc(), conflict.c.sop_instance_uid, conflict.c.digest)
        .limit(min(limit, CONFLICTS_MAX))
    )
    if uid is not None:
        query = query.where(conflict.c.sop_instance_uid == uid)
    if uncompared:
        query = query.where(conflict.c.compared.is_(False))
    return [conflict_of(row) for row in connection.execute(query)]


def note_compared(connection: Connection, pairs: Sequence[tuple[str, bytes, bytes]]) -> None:
    """These (UID, live digest, other digest) were compared; not so where another is live by now."""
    live = exists().where(
        instance.c.sop_instance_uid == conflict.c.sop_instance_uid, instance.c.digest == bindparam("b_live")
    )
    statement = update(conflict).where(
        conflict.c.sop_instance_uid == bindparam("b_uid"), conflict.c.digest == bindparam("b_other"), live
    )
    if pairs:
        connection.execute(statement.values(compared=True), [
            {"b_uid": uid, "b_live": kept, "b_other": other} for uid, kept, other in pairs
        ])  # fmt: skip


def live(connection: Connection, uid: str) -> StoredInstance | None:
    query = select(*INSTANCE_COLUMNS).where(instance.c.sop_instance_uid == uid)
    row = connection.execute(query).fetchone()
    return None if row is None else instance_of(row)


def standings(connection: Connection, uids: Iterable[str]) -> dict[str, Standing]:
    """How safe the live contents of these UIDs are, of those that are here."""
    wanted = list(uids)
    undecided = select(conflict.c.sop_instance_uid, conflict.c.calling_ae, conflict.c.compared).where(
        conflict.c.state.in_([state.value for state in UNDECIDED])
    )
    contested: dict[str, set[str]] = {}
    uncompared: dict[str, set[str]] = {}
    for row in by_uid(connection, undecided, conflict.c.sop_instance_uid, wanted):
        contested.setdefault(row.sop_instance_uid, set()).add(row.calling_ae)
        if not row.compared:
            uncompared.setdefault(row.sop_instance_uid, set()).add(row.calling_ae)
    query = select(*INSTANCE_COLUMNS, instance.c.receipt_us)
    return {
        row.sop_instance_uid: Standing(
            instance_of(row), row.receipt_us, bool(row.damaged),
            frozenset(contested.get(row.sop_instance_uid, ())),
            frozenset(uncompared.get(row.sop_instance_uid, ())),
        )
        for row in by_uid(connection, query, instance.c.sop_instance_uid, wanted)
    }  # fmt: skip


def refusals(connection: Connection, limit: int) -> list[Refusal]:
    query = select(refusal).order_by(refusal.c.at_us.desc(), refusal.c.sop_instance_uid, refusal.c.digest)
    return [
        Refusal(row.sop_instance_uid, bytes(row.digest), row.ward, row.device, row.at_us)
        for row in connection.execute(query.limit(min(limit, CONFLICTS_MAX)))
    ]
