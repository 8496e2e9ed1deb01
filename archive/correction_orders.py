"""The orders by which people correct studies and take corrections back. Each becomes a fact, synced before it
counts. The order names the correction's id, so that one that is carried out again changes nothing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping

from archive.archive import Archive
from archive.corrections import (
    CORRECTIONS_PER_STUDY_MAX,
    Correction,
    Withdrawal,
    correction_of,
    fact_of,
    withdrawal_fact,
)
from archive.errors import InvalidInput, NotFound, OutOfResources, Unavailable
from archive.model import Fact, Level, Query, require_uid

log = logging.getLogger(__name__)

CORRECT, UNDO = "correct", "correct-undo"
_LATER = "; the index does not answer and follows later"


class CorrectionOrders:
    """The handlers of one archive's orders. `ward` is whose it is, "" the region's."""

    def __init__(self, archive: Archive, ward: str) -> None:
        self._archive = archive
        self._ward = ward

    def correct(self, detail: Mapping[str, str], by: str) -> str:
        """`study`, `id`, `at_us`, `reason`, and `set`: a JSON object of keywords and values."""
        study_uid = require_uid(detail.get("study", ""), "the Study Instance UID")
        try:
            changes, at_us = json.loads(detail["set"]), int(detail["at_us"])
        except (KeyError, ValueError):
            raise InvalidInput("a correction says what it sets, and when it was asked") from None
        if not isinstance(changes, dict):
            raise InvalidInput("a correction says what it sets")
        reason = _reason(detail)
        told = Correction(detail.get("id", ""), study_uid, tuple(changes.items()), by, reason, at_us,
                          self._ward)  # fmt: skip
        one = correction_of(fact_of(told))  # as whoever is told of it reads it
        self._archive.wait_indexed()
        self._require_study(study_uid)
        if not self._archive.index.corrections.has_room(study_uid):
            raise OutOfResources(f"a study has at most {CORRECTIONS_PER_STUDY_MAX} corrections")
        words = self._record(fact_of(one))
        log.info("study %s was corrected, as %s decided", study_uid, by)
        return f"{', '.join(keyword for keyword, _ in one.changes)} corrected ({one.id[:8]}){words}"

    def undo(self, detail: Mapping[str, str], by: str) -> str:
        """`id`, or how it begins, and `reason`."""
        reason = _reason(detail)
        self._archive.wait_indexed()
        found = self._archive.index.corrections.named(detail.get("id", ""))
        if found.undone is not None:
            return f"{found.id[:8]} was undone already, by {found.undone.by}"
        if self._ward and found.ward != self._ward:
            raise InvalidInput("it was decided in the region: there it is undone")
        withdrawal = Withdrawal(by, reason, time.time_ns() // 1000, self._ward)
        fact = withdrawal_fact(found.id, found.study_uid, withdrawal)
        correction_of(fact)
        words = self._record(fact)
        log.info("a correction of study %s was undone, as %s decided", found.study_uid, by)
        return f"{found.id[:8]} undone{words}"

    def _require_study(self, study_uid: str) -> None:
        if not self._archive.index.search(Query(Level.STUDY, (("StudyInstanceUID", study_uid),), limit=1)):
            raise NotFound("no such study here")

    def _record(self, fact: Fact) -> str:
        try:
            if self._archive.index.travel.unknown([fact]):
                self._archive.record_facts([fact])
        except Unavailable:
            return _LATER
        return ""


def _reason(detail: Mapping[str, str]) -> str:
    reason = detail.get("reason", "").strip()
    if not reason:
        raise InvalidInput("a correction says why: --reason")
    return reason
