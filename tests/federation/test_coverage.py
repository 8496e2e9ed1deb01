"""The coverage of a ward through its life: reports, silence, a dead hub, a new disk, and the words on the
page.
"""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from archive.ledger import WardState
from archive.model import Ward
from federation import coverage as cov
from federation.coverage import Asked, CoverageState, Report, coverage_of, plain_words

WARD = Ward("san-martino/radiology", "San Martino", "Radiology", "SM")
MORNING = int(datetime(2026, 11, 22, 10, 31, tzinfo=UTC).timestamp() * 1e6)
SECOND = 1_000_000
OLD, NEW = b"o" * 16, b"n" * 16


def attached(epoch: bytes = OLD, now_us: int = MORNING) -> WardState:
    return cov.greeted(None, WARD.id, epoch=epoch, version="0.1.0", now_us=now_us)


def reporting(*pendings: int) -> WardState:
    """A ward that reported these backlogs, five seconds apart, the last of them in the morning."""
    state = attached(now_us=MORNING - len(pendings) * 5 * SECOND)
    for place, pending in enumerate(pendings):
        state = cov.reported(state, Report(pending), MORNING - (len(pendings) - 1 - place) * 5 * SECOND)
    return state


def standing(state: WardState | None, now_us: int = MORNING, asked: Asked | None = None) -> CoverageState:
    return coverage_of(WARD, state, now_us, asked).state


def test_a_ward_that_never_reported_is_unknown_attached_or_not() -> None:
    assert standing(None) is CoverageState.UNKNOWN
    assert standing(attached()) is CoverageState.UNKNOWN
    assert not coverage_of(WARD, attached(), MORNING).covered


def test_attached_with_nothing_pending_is_up_to_date_and_need_not_be_asked() -> None:
    state = reporting(0)
    assert standing(state) is CoverageState.UP_TO_DATE
    assert not cov.is_worth_asking(state, MORNING)


def test_only_a_report_with_nothing_pending_moves_complete_to() -> None:
    state = reporting(0, 3)
    assert state.complete_to_us == MORNING - 5 * SECOND
    assert cov.reported(state, Report(0), MORNING + SECOND).complete_to_us == MORNING + SECOND


def test_a_ward_that_left_in_order_is_covered_as_of_its_last_report() -> None:
    state = cov.departed(reporting(4, 0))
    coverage = coverage_of(WARD, state, MORNING + 3600 * SECOND)
    assert coverage.state is CoverageState.AS_OF
    assert coverage.covered
    assert coverage.complete_to_us == coverage.seen_at_us == MORNING


def test_a_ward_that_left_with_a_backlog_is_incomplete_and_the_count_is_named() -> None:
    coverage = coverage_of(WARD, cov.departed(reporting(0, 12)), MORNING + 60 * SECOND)
    assert coverage.state is CoverageState.INCOMPLETE
    assert not coverage.covered
    assert "12 instances" in coverage.reason
    assert coverage.complete_to_us == MORNING - 5 * SECOND


def test_a_hub_that_died_leaves_wards_attached_in_the_ledger_and_silence_tells() -> None:
    state = reporting(0)
    assert standing(state, MORNING + 14 * SECOND) is CoverageState.UP_TO_DATE
    assert standing(state, MORNING + 16 * SECOND) is CoverageState.AS_OF
    assert not cov.is_worth_asking(reporting(5), MORNING + 16 * SECOND)


def test_asking_decides_between_answered_and_incomplete() -> None:
    state = reporting(7)
    assert cov.is_worth_asking(state, MORNING)
    assert standing(state, asked=Asked()) is CoverageState.ANSWERED
    late = coverage_of(WARD, state, MORNING, Asked("no answer within 2 s"))
    assert (late.state, late.reason) == (CoverageState.INCOMPLETE, "no answer within 2 s")


def test_a_new_disk_notes_what_may_be_lost_and_the_note_stands() -> None:
    state = cov.greeted(cov.departed(reporting(0, 12)), WARD.id, epoch=NEW, version="1", now_us=MORNING)
    assert "up to 12 instances lost with the old disk" in state.lost_note
    assert state.pending == 0
    state = cov.reported(state, Report(0), MORNING + SECOND)
    for asked in (None, Asked()):
        coverage = coverage_of(WARD, state, MORNING + SECOND, asked)
        assert coverage.state is CoverageState.INCOMPLETE
        assert "12 instances lost" in coverage.reason
    again = cov.greeted(cov.departed(state), WARD.id, epoch=NEW, version="1", now_us=MORNING + 2 * SECOND)
    assert again.lost_note == state.lost_note
    assert standing(cov.cleared(again), MORNING + 2 * SECOND) is CoverageState.UP_TO_DATE


def test_what_was_set_aside_on_the_old_disk_counts_as_at_risk() -> None:
    state = cov.reported(attached(), Report(2, set_aside=3), MORNING)
    assert "up to 5 instances" in cov.greeted(state, WARD.id, epoch=NEW, version="", now_us=MORNING).lost_note


def test_a_new_disk_after_an_empty_backlog_still_says_since_when() -> None:
    state = cov.greeted(reporting(0), WARD.id, epoch=NEW, version="1", now_us=MORNING + SECOND)
    assert "after 2026-11-22 10:31 UTC" in state.lost_note


def test_a_restart_on_the_same_disk_loses_nothing() -> None:
    state = cov.greeted(cov.departed(reporting(12)), WARD.id, epoch=OLD, version="1", now_us=MORNING + SECOND)
    assert state.lost_note == ""
    assert state.pending == 12


def test_a_report_that_came_late_counts_for_when_the_node_looked() -> None:
    looked, came = MORNING, MORNING + 14 * SECOND
    assert cov.reported(attached(), Report(0, as_of_us=looked), came).complete_to_us == looked
    assert cov.reported(attached(), Report(0), came).complete_to_us == came  # of a node that does not say
    assert cov.reported(attached(), Report(0, as_of_us=came + SECOND), came).complete_to_us == came


def test_the_report_is_kept_whole_with_the_skew_of_its_clock() -> None:
    report = Report(1, 2, 3, 4, 5, 6, 7, MORNING + 90 * SECOND, 9, 1.5, "SMRAD", True)
    state = cov.reported(attached(), report, MORNING)
    assert cov.report_in(state) == report
    assert state.skew_us == 90 * SECOND
    assert (state.pending_bytes, state.oldest_pending_us, state.set_aside) == (2, 3, 4)


@pytest.mark.parametrize(
    ("state", "asked", "words"),
    [
        (cov.departed(reporting(0)), None, "San Martino Radiology as of 10:31 UTC"),
        (reporting(0), None, "San Martino Radiology up to date"),
        (reporting(2), Asked(), "San Martino Radiology answered now"),
        (None, None, "San Martino Radiology has never reported"),
        (
            cov.departed(reporting(0, 1)),
            None,
            "San Martino Radiology incomplete: 1 instance still at the ward, which is away, "
            "complete as of 10:30 UTC",
        ),
    ],
)
def test_plain_words(state: WardState | None, asked: Asked | None, words: str) -> None:
    assert plain_words(coverage_of(WARD, state, MORNING, asked), MORNING) == words


def test_plain_words_name_the_day_when_it_is_another_and_the_zone_of_the_reader() -> None:
    coverage = coverage_of(WARD, cov.departed(reporting(0)), MORNING)
    tomorrow = MORNING + 86_400 * SECOND
    assert plain_words(coverage, tomorrow) == "San Martino Radiology as of 2026-11-22 10:31 UTC"
    assert plain_words(coverage, MORNING, ZoneInfo("Europe/Rome")).endswith("as of 11:31 CET")


def test_set_aside_is_listed_apart_and_hides_nothing_else() -> None:
    state = cov.reported(attached(), Report(0, set_aside=2), MORNING)
    coverage = coverage_of(WARD, state, MORNING)
    assert coverage.state is CoverageState.UP_TO_DATE
    assert plain_words(coverage, MORNING) == "San Martino Radiology up to date; 2 instances set aside"
    # It is found at the ward all the same: only a ward that was not asked leaves it out.
    assert cov.is_worth_searching(state, MORNING) and not cov.is_worth_asking(state, MORNING)
    assert cov.apart(coverage) == 2
    assert cov.apart(coverage_of(WARD, state, MORNING, Asked())) == 0
    assert not cov.is_worth_searching(cov.departed(state), MORNING)
