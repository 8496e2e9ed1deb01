"""What a search of a device that looks into the region answers, and what its final response says."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from archive.errors import Unavailable
from archive.model import Level, Match, Query
from federation.coverage import CoverageState, WardCoverage
from federation.policy import Principal, Reach
from federation.source import Answer
from node.dimse.exchange import Caller
from node.dimse.messages import COMMENT_LENGTH_MAX
from node.dimse.services.regional import missing_words, widened

CALLER = Caller("WS", "Workstation", None, frozenset(), reach="region", max_age_s=60)
NOW_US = 1_000_000_000
HERE = WardCoverage("a/x", "A", "X", CoverageState.ANSWERED)


def study(uid: str) -> Match:
    return Match(Level.STUDY, "I", {}, {"StudyInstanceUID": uid}, instance_count=1)


class Window:
    """The region, answering as it is told."""

    def __init__(self, *coverage: WardCoverage, matches: tuple[Match, ...] = ()) -> None:
        self._answer = Answer(list(matches), list(coverage))

    def clock_us(self) -> int:
        return NOW_US

    def search(self, principal: Principal, query: Query) -> Answer:
        assert principal == CALLER.principal("a/x") and principal.reach is Reach.REGION
        return self._answer


def ward(name: str, state: CoverageState, complete_to_us: int = 0) -> WardCoverage:
    return WardCoverage(f"b/{name}", "B", name, state, complete_to_us)


def comment(window: Window, caller: Caller = CALLER) -> str:
    return widened(window, caller.principal("a/x"), caller, Query(Level.STUDY, limit=10), []).comment(caller)


def test_ward_and_region_are_one_answer() -> None:
    found = widened(Window(HERE, matches=(study("1.2"), study("1.1"))), CALLER.principal("a/x"), CALLER,
                    Query(Level.STUDY, limit=2), [study("1.3"), study("1.1")])
    rows = [(match.study["StudyInstanceUID"], match.nearline) for match in found.matches]
    assert rows == [("1.3", False), ("1.2", True)]
    assert found.lacking == [] and found.comment(CALLER) == ""


@pytest.mark.parametrize(("state", "complete_to_us", "lacks"), [
    (CoverageState.UP_TO_DATE, 0, False), (CoverageState.ANSWERED, 0, False),
    (CoverageState.AS_OF, NOW_US - 60_000_000, False), (CoverageState.AS_OF, NOW_US - 60_000_001, True),
    (CoverageState.INCOMPLETE, NOW_US, True), (CoverageState.UNKNOWN, 0, True)])
def test_a_ward_lacks_when_something_is_missing_or_too_old(
    state: CoverageState, complete_to_us: int, lacks: bool, caplog: pytest.LogCaptureFixture
) -> None:
    window = Window(HERE, ward("y", state, complete_to_us))
    with caplog.at_level(logging.WARNING):
        assert comment(window) == ("1 ward missing: B y" if lacks else "")
    assert ("B y" in caplog.text) == lacks
    strict = replace(CALLER, on_incomplete="fail")
    if lacks:
        with pytest.raises(Unavailable, match="1 ward missing: B y"):
            comment(window, strict)
    else:
        assert comment(window, strict) == ""


def test_the_comment_begins_with_how_many() -> None:
    many = [ward(f"Ward {number}", CoverageState.INCOMPLETE) for number in range(12)]
    assert missing_words(many).startswith("12 wards missing: B Ward 0, ")
    nobody = WardCoverage("", "", "the region", CoverageState.UNKNOWN)
    assert missing_words([nobody]) == "the region does not answer: this ward alone"
    assert len(missing_words([nobody])) <= COMMENT_LENGTH_MAX
