"""The orders about a node's backlog, "backlog urgent" and "backlog retry": a study goes before the others,
what replication gave up on is tried again. What they say is in words; both may be repeated."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from archive.archive import Archive
from archive.errors import InvalidInput
from archive.model import Fact, FactKind, require_uid
from archive.orders import Handler

log = logging.getLogger(__name__)

URGENT, RETRY = "backlog urgent", "backlog retry"
RETRIED_MAX = 10_000  # by one order


class BacklogOrders:
    """The handlers of one archive's orders; `on_urgent` is told that something became urgent."""

    def __init__(self, archive: Archive, ward: str, on_urgent: Callable[[], None] = lambda: None) -> None:
        self._archive = archive
        self._ward = ward
        self._on_urgent = on_urgent

    def handlers(self) -> dict[str, Handler]:
        return {URGENT: self.urgent, RETRY: self.retry}

    def urgent(self, detail: Mapping[str, str], by: str) -> str:
        """`study`, its UID."""
        study_uid = require_uid(detail.get("study", ""), "the Study Instance UID")
        log.info("a study was made urgent by %s", by)
        self._archive.wait_indexed()
        marked = self._archive.index.mark_urgent(study_uid)
        if marked:
            self._on_urgent()
            return f"{marked} instances go before the others"
        return "nothing of this study waits for the region"

    def retry(self, detail: Mapping[str, str], by: str) -> str:
        """`uid`, the instance, or nothing for all that was set aside."""
        uid = detail.get("uid", "")
        self._archive.wait_indexed()
        found = [row for row in self._archive.index.set_aside(RETRIED_MAX) if not uid or row[0] == uid]
        if uid and not found:
            raise InvalidInput("no such instance is set aside")
        log.info("%d instances that were set aside are tried again, asked by %s", len(found), by)
        now_us = time.time_ns() // 1000
        facts = [Fact(FactKind.RETRY, row[0], row[1], self._ward, now_us) for row in found]
        self._archive.record_facts(facts)
        return f"{len(found)} instances are tried again" if found else "nothing is set aside"
