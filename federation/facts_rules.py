"""What the region lets a ward decide: about what that ward holds, or nobody has yet, and about its own
decisions. Each fact is judged by itself, so that one that is refused stops none of the others; the reason is
for the people of the ward."""

from __future__ import annotations

import json
from collections.abc import Callable

from archive.archive import Archive
from archive.corrections import CORRECTIONS_PER_STUDY_MAX, correction_of
from archive.errors import MissError
from archive.model import Fact, FactKind
from federation.facts_pages import is_readable

FUTURE_US_MAX = 86_400 * 1_000_000  # how far a ward's clock may go before the region's

OTHER_WARD = "it names another ward"
UNREADABLE = "it can't be read by the region's release"
FUTURE = "its time lies in the future: is the ward's clock right?"
NOT_HELD = "the ward holds no part of it"
DECIDED_ELSEWHERE = "it was decided in the region or at another ward: it is undone there"
TOO_MANY = f"a study has at most {CORRECTIONS_PER_STUDY_MAX} corrections"


class FactRules:
    """Judges what wards tell. Blocking; safe to use from any thread."""

    def __init__(self, archive: Archive, clock: Callable[[], int]) -> None:
        self._archive = archive
        self._clock = clock

    def refusal(self, ward: str, fact: Fact) -> str:
        """Why the region does not take this of that ward; "" when it does."""
        if fact.ward != ward:
            return OTHER_WARD
        if not is_readable(fact):
            return UNREADABLE
        if fact.at_us > self._clock() + FUTURE_US_MAX:
            return FUTURE
        holders = self._archive.index.travel.known_at(fact.sop_instance_uid)
        if holders and ward not in holders:
            return NOT_HELD
        return self._of_its_kind(ward, fact)

    def _of_its_kind(self, ward: str, fact: Fact) -> str:
        if fact.kind is FactKind.CORRECTED:
            told = correction_of(fact)
            if told.undone is not None and self._corrected_elsewhere(ward, told.id):
                return DECIDED_ELSEWHERE
            if told.undone is None and not self._archive.index.corrections.has_room(told.study_uid):
                return TOO_MANY
        elif fact.kind is not FactKind.REMOVED and self._removed_elsewhere(ward, fact):
            return DECIDED_ELSEWHERE
        return ""

    def _corrected_elsewhere(self, ward: str, correction_id: str) -> bool:
        try:
            return self._archive.index.corrections.named(correction_id).ward != ward
        except MissError:  # it is not known yet
            return False

    def _removed_elsewhere(self, ward: str, fact: Fact) -> bool:
        removal = str(json.loads(fact.detail).get("id", ""))
        found = self._archive.index.removals(1, prefix=removal)
        return any(one.removal.ward != ward for one in found)
