"""The wards of the region, and what each last said of itself (design: Coverage). It decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from archive.ledger.tables import Subject, as_row, ward, ward_state
from archive.model import Ward


@dataclass(frozen=True, slots=True)
class WardState:
    """A ward's last report as the hub keeps it. `complete_to_us` is hub time; 0 is never, in every time
    here."""

    ward: str
    epoch: bytes = b""
    complete_to_us: int = 0
    pending: int = 0
    pending_bytes: int = 0
    oldest_pending_us: int = 0
    set_aside: int = 0
    seen_us: int = 0
    attached: bool = False
    attached_since_us: int = 0
    version: str = ""
    skew_us: int = 0
    report_json: str = ""
    lost_note: str = ""
    last_receipt_us: int = 0


_MARK = """SELECT count(CASE WHEN attached AND pending + set_aside > 0 THEN 1 END),
(SELECT count(*) FROM ward), count(*),
count(CASE WHEN attached THEN 1 END), max(attached_since_us), sum(pending), sum(set_aside),
count(CASE WHEN seen_us = 0 THEN 1 END), count(CASE WHEN complete_to_us = 0 THEN 1 END),
sum(length(lost_note)) FROM ward_state"""


class Wards(Subject):
    """Wards and ward states."""

    def add_ward(self, new: Ward) -> None:
        """Add a ward, or change its names and issuer."""

        def work(connection: Connection) -> None:
            row = as_row(new)
            if not connection.execute(update(ward).where(ward.c.id == new.id).values(row)).rowcount:
                connection.execute(insert(ward).values(row))

        self._database.write(work)

    def wards(self) -> list[Ward]:
        rows = self._database.read(lambda c: c.execute(select(ward).order_by(ward.c.id)).fetchall())
        return [Ward(**row._mapping) for row in rows]

    def ward(self, ward_id: str) -> Ward | None:
        row = self._database.read(lambda c: c.execute(select(ward).where(ward.c.id == ward_id)).fetchone())
        return None if row is None else Ward(**row._mapping)

    def remove_ward(self, ward_id: str) -> bool:
        """Forget a ward and its state; what it sent stays in the archive."""

        def work(connection: Connection) -> bool:
            connection.execute(delete(ward_state).where(ward_state.c.ward == ward_id))
            return connection.execute(delete(ward).where(ward.c.id == ward_id)).rowcount > 0

        return self._database.write(work)

    def ward_mark(self) -> tuple[int, ...]:
        """Changes whenever anything of the wards does but the times of their last reports and receipts; first
        how many are attached and hold something alone. Microseconds on SQLite."""
        return tuple(int(value or 0) for value in self._database.quick(_MARK))

    def ward_states(self) -> dict[str, WardState]:
        rows = self._database.read(
            lambda c: c.execute(select(ward_state).order_by(ward_state.c.ward)).fetchall()
        )
        return {row.ward: WardState(**row._mapping) for row in rows}

    def put_ward_state(self, state: WardState) -> None:
        """Keep `state` in place of the ward's last one."""
        self.put_ward_states([state])

    def put_ward_states(self, states: Sequence[WardState]) -> None:
        """The same of several wards, in one transaction."""

        def work(connection: Connection) -> None:
            for state in states:
                row = as_row(state)
                if not connection.execute(
                    update(ward_state).where(ward_state.c.ward == state.ward).values(row)
                ).rowcount:
                    connection.execute(insert(ward_state).values(row))

        if states:
            self._database.write(work)
