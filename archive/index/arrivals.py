"""What came lately, by study: for whoever has to know when a study is complete. It reads the studies' own
counts and the instances' times; it writes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, select

from archive.index.schema import instance, study
from archive.index.statements import by_uid


def instance_counts(connection: Connection, study_uids: Iterable[str]) -> dict[str, int]:
    """How many instances each of these studies has; those not here are left out."""
    query = select(study.c.study_instance_uid, study.c.instance_count)
    return {uid: count for uid, count in by_uid(connection, query, study.c.study_instance_uid, study_uids)}


def studies_received_since(connection: Connection, since_us: int) -> list[str]:
    """The studies of which something was received at `since_us` or later, by UID."""
    query = select(instance.c.study_instance_uid).where(instance.c.received_at_us >= since_us).distinct()
    return [row[0] for row in connection.execute(query.order_by(instance.c.study_instance_uid))]
