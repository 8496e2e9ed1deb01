"""Which studies a node gives up, and in which order; and what a ward lays down of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from archive.errors import SettingsError
from archive.index.cached import CachedStudy
from archive.ledger import Pin
from archive.ledger.keeping import PERSON, PRIOR
from archive.model import Level, Match
from node.cache import policy
from node.cache.policy import DAY_US, Candidate, Marks, Room, Survey, Surveying, unused
from node.cache.rules import CacheRules, KeepRule, RulesFile, parse_rules

NOW_US = 1_000 * DAY_US


def study(uid: str, *, days: float = 10, size: int = 100, evictable: int | None = None,
          modality: str = "CT", ae: str = "CT1") -> CachedStudy:  # fmt: skip
    """Of 10 instances, received so many days ago; `evictable` of them may go."""
    may_go = 10 if evictable is None else evictable
    return CachedStudy(uid, 10, size, may_go, size * may_go // 10, NOW_US - int(days * DAY_US),
                       frozenset({modality}), frozenset({ae}))  # fmt: skip


def survey(studies: list[CachedStudy], *, pins: tuple[Pin, ...] = (), rules: tuple[KeepRule, ...] = (),
           uses: dict[str, int] | None = None) -> Survey:  # fmt: skip
    surveying = Surveying(pins, rules, NOW_US)
    for one in studies:  # a page each
        surveying.look([one], uses or {})
    return surveying.done()


def order(found: Survey) -> list[str]:
    return [candidate.study_uid for candidate in found.candidates]


def pin(uid: str, kind: str, days: float) -> Pin:
    return Pin(uid, kind, NOW_US + int(days * DAY_US) if days else 0, "eva", 1)


def test_the_least_recently_wanted_goes_first() -> None:
    studies = [study("a", days=1), study("b", days=30), study("c", days=20), study("d", days=40)]
    found = survey(studies, uses={"d": NOW_US - DAY_US // 2, "c": NOW_US - 50 * DAY_US})
    assert order(found) == ["b", "c", "a", "d"]  # an old use makes nothing older
    assert found.evictable_bytes == 400
    assert [one.study_uid for one in unused(found.candidates, NOW_US - 5 * DAY_US)] == ["b", "c"]


def test_whole_studies_go_before_parts_and_priors_whose_appointment_is_over_before_all() -> None:
    studies = [study("part", days=90, evictable=4), study("whole", days=5), study("prior", days=1)]
    found = survey(studies, pins=(pin("prior", PRIOR, -1),))
    assert order(found) == ["prior", "whole", "part"]
    assert (found.evictable_bytes, found.unprotected_bytes) == (240, 60)


def test_what_the_region_does_not_protect_is_no_candidate() -> None:
    found = survey([study("a", evictable=0)])
    assert found == Survey((), 0, 0, 100)


@pytest.mark.parametrize(("held", "stays"), [
    (pin("a", PERSON, 0), True), (pin("a", PERSON, 1), True), (pin("a", PERSON, -1), False),
    (pin("a", PRIOR, 1), True), (pin("a", PRIOR, -1), False), (pin("b", PERSON, 0), False),
])  # fmt: skip
def test_pins_hold_until_they_end(held: Pin, stays: bool) -> None:
    found = survey([study("a")], pins=(held,))
    assert (order(found) == []) is stays
    assert found.pinned_bytes == (100 if stays else 0)


@pytest.mark.parametrize(("rule", "stays"), [
    (KeepRule(frozenset({"CT1"}), frozenset(), 30), True),
    (KeepRule(frozenset({"CT2"}), frozenset(), 30), False),
    (KeepRule(frozenset(), frozenset({"CT", "MR"}), 30), True),
    (KeepRule(frozenset({"CT1"}), frozenset({"MR"}), 30), False),
    (KeepRule(frozenset(), frozenset(), 30), True),
    (KeepRule(frozenset(), frozenset(), 9), False),
])  # fmt: skip
def test_a_rule_keeps_by_device_modality_and_days(rule: KeepRule, stays: bool) -> None:
    assert (order(survey([study("a", days=10)], rules=(rule,))) == []) is stays


def test_a_survey_keeps_those_that_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "CANDIDATES_MAX", 3)
    found = survey([study(str(days), days=days) for days in (5, 9, 1, 7, 3, 8)])
    assert order(found) == ["9", "8", "7"] and found.evictable_bytes == 600


@pytest.mark.parametrize(("total", "intake", "low", "high"), [
    (1000, 10, 100, 150),    # by percent
    (1000, 100, 150, 187),   # what intake needs, and half as much again, is below both marks
    (100, 100, 75, 75),      # a disk that is small for its settings is not emptied
])  # fmt: skip
def test_marks(total: int, intake: int, low: int, high: int) -> None:
    marks = Marks.of(Room(0, total), low_percent=10, high_percent=15, low_bytes=0, intake_bytes=intake)
    assert (marks.low, marks.high) == (low, high)
    assert Marks.of(Room(0, 1000), low_percent=0, high_percent=0, low_bytes=400, intake_bytes=1).low == 400


def test_candidates_are_ordered_by_rank_then_by_age() -> None:
    assert Candidate(0, 9, "z", 1, 1) < Candidate(1, 1, "a", 1, 1) < Candidate(1, 2, "a", 1, 1)


def test_the_rules_of_a_file() -> None:
    rules = parse_rules("""
        [[keep]]
        device = "CT1"
        modality = ["CT", "MR"]
        days = 30

        [[prefetch]]
        name = "mammography"
        for = "MG"
        modality = "MG"
        body_part = ["BREAST"]
        years = 6
        count = 3
        hours = 24
        at = "02:00"

        [[prefetch]]
    """)
    (keep,), (first, second) = rules.keep, rules.prefetch
    assert keep == KeepRule(frozenset({"CT1"}), frozenset({"CT", "MR"}), 30)
    assert (first.name, first.scheduled) == ("mammography", frozenset({"MG"}))
    assert (first.count, first.at) == (3, "02:00")
    assert first.wants("MG") and not first.wants("CT") and second.wants("CT")
    prior = Match(Level.STUDY, "I", {}, {"StudyDate": "20200101"}, modalities=("MG", "SR"))
    assert first.takes(prior, "20191231") and not first.takes(prior, "20200102")
    assert (second.name, second.count, second.hours, second.at) == ("rule 2", 5, 36.0, "")


@pytest.mark.parametrize(("text", "words"), [
    ("[[keep]]", "days"), ("[[keep]]\ndays = -1", "days"), ("[[keep]]\ndays = 1\nday = 2", "day"),
    ("[keep]\ndays = 1", "two brackets"), ("[[kept]]", "kept"), ("[[prefetch]]\nat = '25:00'", "at"),
    ("[[prefetch]]\ncount = 0", "count"), ("[[prefetch]]\nmodality = 3", "modality"), ("keep", "TOML"),
    ("[[prefetch]]\nname = ''", "name"),
])  # fmt: skip
def test_a_mistake_refuses_the_file_and_is_named(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_rules(text)


def test_a_file_is_read_when_it_changes_and_a_mistake_leaves_what_counts(tmp_path: Path) -> None:
    file = RulesFile(tmp_path / "cache.toml")
    assert file.look() == CacheRules()
    file.path.write_text("[[keep]]\ndays = 1\n")
    assert file.look().keep[0].days == 1
    file.path.write_text("[[keep]]\ndays = 'many'\n")
    assert file.look().keep[0].days == 1 and "days" in file.error
    file.path.write_text("[[keep]]\ndays = 12\n")
    assert file.look().keep[0].days == 12 and not file.error
    file.path.unlink()
    assert file.look() == CacheRules()
