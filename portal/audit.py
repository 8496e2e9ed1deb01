"""Writes who searched and saw what into the ledger's audit log, before the first byte leaves: a row that
can't be written is an answer that is not given. It never reads the log."""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping

from archive.errors import MissError, Unavailable
from archive.ledger import AuditRow, Ledger
from monitoring.tracing import trace_id
from portal.signin import Visitor
from portal.workers import Workers

# Looking at one study is hundreds of requests for frames. They are one act, written again after this long.
SAME_ACT_US = 300 * 1_000_000
REMEMBERED_MAX = 20_000
SUBJECT_CHARS_MAX = 2_000


class Audit:
    """`clock` gives microseconds since 1970."""

    def __init__(self, ledger: Ledger, workers: Workers, clock: Callable[[], int]) -> None:
        self._ledger = ledger
        self._workers = workers
        self._clock = clock
        self._written: OrderedDict[tuple[str, bytes, str, str], int] = OrderedDict()

    async def record(
        self, visitor: Visitor | None, act: str, subject: Mapping[str, object], outcome: str, address: str
    ) -> None:
        """One row; Unavailable when it can't be written. Text from outside is JSON inside the row: one
        line."""
        row = AuditRow(
            at_us=self._clock(),
            who=visitor.user.name if visitor else "",
            role=visitor.user.role if visitor else "",
            ward=(visitor.user.ward or "") if visitor else "",
            act=act,
            subject=json.dumps(subject, ensure_ascii=True, default=str)[:SUBJECT_CHARS_MAX],
            outcome=outcome,
            address=address,
            correlation=trace_id() or secrets.token_hex(8),
        )
        try:
            await self._workers.run(self._ledger.audit, row)
        except MissError:
            raise
        except Exception as error:
            raise Unavailable("the audit log can't be written: nothing is shown") from error

    async def seen(self, visitor: Visitor, act: str, study_uid: str, address: str) -> None:
        """That `visitor` sees something of a study: one row for as long as it is the same act."""
        key = (visitor.user.name, visitor.session, act, study_uid)
        now_us = self._clock()
        if self._written.get(key, 0) > now_us - SAME_ACT_US:
            return
        await self.record(visitor, act, {"StudyInstanceUID": study_uid}, "ok", address)
        self._written[key] = now_us
        self._written.move_to_end(key)
        while len(self._written) > REMEMBERED_MAX:
            self._written.popitem(last=False)
