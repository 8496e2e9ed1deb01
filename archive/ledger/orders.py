"""Orders: what a command asks of the process that holds an archive, through the ledger that both have open,
so that an archive keeps its one writer. A bounded queue, in the order of time; answers are kept for a day. It
carries nothing out (`archive/orders.py` does)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, insert, select, update

from archive.database import storable
from archive.errors import InvalidInput, OutOfResources
from archive.ledger.audit import AuditRow
from archive.ledger.tables import Subject, as_row, audit, log_key, order_

OPEN, DONE, FAILED = "open", "done", "failed"
ORDERS_OPEN_MAX = 1_000
DETAIL_CHARS_MAX = 16_384
ANSWER_CHARS_MAX = 16_384
ANSWERS_KEPT_US = 86_400 * 1_000_000


@dataclass(frozen=True, slots=True)
class Order:
    """Something asked of the process that runs: what (`kind`, `detail`), by whom, and when."""

    id: str
    kind: str
    detail: Mapping[str, str]
    by: str
    at_us: int


class Orders(Subject):
    """The orders of one archive."""

    def place_order(self, kind: str, detail: Mapping[str, str], by: str) -> str:
        """Put an order behind the others; its id. It is durable when this returns. Raises OutOfResources when
        too many wait."""
        text = json.dumps(dict(detail), ensure_ascii=True, sort_keys=True)
        if len(text) > DETAIL_CHARS_MAX:
            raise InvalidInput(f"an order may have {DETAIL_CHARS_MAX:,} characters of detail")
        now_us = time.time_ns() // 1000
        order_id = log_key(now_us)

        def work(connection: Connection) -> None:
            waiting = select(func.count()).select_from(order_).where(order_.c.state == OPEN)
            if connection.execute(waiting).scalar_one() >= ORDERS_OPEN_MAX:
                raise OutOfResources(f"{ORDERS_OPEN_MAX:,} orders wait already: is the process running?")
            connection.execute(insert(order_).values(
                id=order_id, kind=kind, detail=text, by=storable(by), at_us=now_us, state=OPEN, answer="",
                answered_us=0,
            ))  # fmt: skip

        self._database.write(work)
        return order_id

    def has_open_orders(self) -> bool:
        """Whether any order waits; microseconds on SQLite, as it is asked four times a second."""
        return self._database.quick("SELECT 1 FROM order_ WHERE state = 'open' LIMIT 1") is not None

    def open_orders(self, limit: int = 100) -> list[Order]:
        """What waits, the oldest first."""
        query = select(order_).where(order_.c.state == OPEN).order_by(order_.c.id).limit(limit)
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        return [Order(row.id, row.kind, json.loads(row.detail), row.by, row.at_us) for row in rows]

    def finish_order(self, order_id: str, ok: bool, answer: str) -> None:
        """Answer an order and write it to the audit log, in one transaction; answers older than a day go. An
        order that is answered already keeps its answer."""
        now_us = time.time_ns() // 1000
        changed = update(order_).where(order_.c.id == order_id, order_.c.state == OPEN)

        def work(connection: Connection) -> None:
            found = connection.execute(select(order_).where(order_.c.id == order_id)).fetchone()
            values = {"state": DONE if ok else FAILED, "answer": storable(answer)[:ANSWER_CHARS_MAX],
                      "answered_us": now_us}  # fmt: skip
            if found is None or not connection.execute(changed.values(values)).rowcount:
                return
            row = AuditRow(at_us=now_us, who=found.by, act=found.kind, subject=found.detail,
                           outcome="success" if ok else "failure", correlation=order_id)  # fmt: skip
            connection.execute(insert(audit).values(as_row(row) | {"id": log_key(now_us)}))
            connection.execute(delete(order_).where(
                order_.c.state != OPEN, order_.c.answered_us < now_us - ANSWERS_KEPT_US
            ))  # fmt: skip

        self._database.write(work)

    def order_answer(self, order_id: str) -> tuple[bool, str] | None:
        """Whether it was carried out, and the answer; None while it waits, and once a day has passed."""
        query = select(order_.c.state, order_.c.answer).where(order_.c.id == order_id, order_.c.state != OPEN)
        row = self._database.read(lambda c: c.execute(query).fetchone())
        return None if row is None else (row.state == DONE, row.answer)
