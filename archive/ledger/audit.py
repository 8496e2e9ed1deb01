"""The transaction log: who did what, when, from where and with which outcome (PS3.15 A.5.3). It only grows;
the database itself refuses a change. A row that can't be written raises, so that its act is refused
(invariant 10).
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import insert, select

from archive.ledger.tables import Subject, as_row, audit, log_key


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One act. `subject` holds UIDs or criteria; `correlation` joins what one question did at several
    places."""

    at_us: int
    who: str
    role: str = ""
    ward: str = ""
    act: str = ""
    subject: str = ""
    outcome: str = "success"
    address: str = ""
    correlation: str = ""


class AuditLog(Subject):
    """The audit log."""

    def audit(self, row: AuditRow) -> None:
        """Write one row; it is durable when this returns."""
        self._database.write(
            lambda c: c.execute(insert(audit).values(as_row(row) | {"id": log_key(row.at_us)}))
        )

    def audit_rows(
        self,
        limit: int = 100,
        *,
        before_us: int | None = None,
        who: str | None = None,
        act: str | None = None,
        correlation: str | None = None,
    ) -> list[AuditRow]:
        """The newest rows, newest first; those before `before_us`, of one person, act or correlation."""
        query = select(audit).order_by(audit.c.id.desc()).limit(limit)
        if before_us is not None:
            query = query.where(audit.c.id < f"{before_us:016x}")
        for column, value in ((audit.c.who, who), (audit.c.act, act), (audit.c.correlation, correlation)):
            if value is not None:
                query = query.where(column == value)
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        return [AuditRow(**{k: v for k, v in row._mapping.items() if k != "id"}) for row in rows]
