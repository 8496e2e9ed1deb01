"""What the region lets a ward decide: about what that ward holds, or nobody has yet, and about its own
decisions. It removes only what it holds the whole of: what another ward alone holds stays. Each fact is
judged by itself, so that one that is refused stops none of the others; the reason is for the people of the
ward."""

from __future__ import annotations

from collections.abc import Callable

from archive.archive import Archive
from archive.corrections import CORRECTIONS_PER_STUDY_MAX, correction_of
from archive.model import Fact, FactKind
from archive.removals import purge_of, removal_of, restoration_of
from federation.facts_pages import is_readable

FUTURE_US_MAX = 86_400 * 1_000_000  # how far a ward's clock may go before the region's

OTHER_WARD = "it names another ward"
UNREADABLE = "it can't be read by the region's release"
FUTURE = "its time lies in the future: is the ward's clock right?"
NOT_HELD = "the ward holds no part of it"
OTHERS_HOLD = "another ward holds a part of it: what is this ward's own is removed by series or instance"
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
            known = self._archive.index.travel.decided_at(fact.kind, told.id)
            if known not in (None, ward):
                return DECIDED_ELSEWHERE
            if known is None and not self._archive.index.corrections.has_room(told.study_uid):
                return TOO_MANY
            return ""
        if self._archive.index.travel.decided_at(fact.kind, _removal_named_by(fact)) not in (None, ward):
            return DECIDED_ELSEWHERE
        if fact.kind is FactKind.REMOVED and self._archive.index.travel.others_hold(
            fact.sop_instance_uid, ward
        ):
            return OTHERS_HOLD
        return ""


def _removal_named_by(fact: Fact) -> str:
    if fact.kind is FactKind.REMOVED:
        return removal_of(fact).id
    return restoration_of(fact).removal if fact.kind is FactKind.RESTORED else purge_of(fact).removal
