"""Scheduled and performed steps, and complete studies, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from archive.errors import InvalidInput, NotFound, OtherContent, OutOfResources
from archive.ledger import (
    Ledger,
    PerformedStep,
    ScheduledStep,
    StepReference,
    StepSearch,
    StudyCompletion,
    worklist,
)
from archive.ledger.worklist import OVER, STEP_STATUSES, steps_of


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    opened = Ledger.open(database_url)
    yield opened
    opened.close()


def item(number: int = 1, origin: str = "command", *, step: Mapping[str, str] | None = None,
         **given: str) -> ScheduledStep:
    """A step; `step` and `given` change it by tag."""
    def elements(texts: Mapping[str, str]) -> dict[str, Any]:
        return {tag.removeprefix("t"): {"vr": "LO", "Value": text.split("\\")} for tag, text in texts.items()
                if text}

    inner = {"00400009": f"S{number}", "00400002": "20261122", "00400003": f"{number % 24:02}",
             "00400001": "CT1", "00080060": "CT"} | dict(step or {})
    outer = {"00080050": f"A{number}", "00401001": f"R{number}", "0020000D": f"1.2.{number}",
             "00100020": f"P{number}"} | {tag.removeprefix("t"): text for tag, text in given.items()}
    attributes = elements(outer) | {"00400100": {"vr": "SQ", "Value": [elements(inner)]}}
    return steps_of(attributes, origin)[0]


def ids(ledger: Ledger, **search: Any) -> list[str]:
    return [step.step_id for step in ledger.scheduled_steps(StepSearch(**search))]


def test_steps_are_upserted_by_accession_procedure_and_step(ledger: Ledger) -> None:
    assert ledger.schedule([item(1), item(2)]) == 2
    assert ledger.schedule([item(1)]) == 0  # the same again
    assert ledger.schedule([item(1, t00100020="P9")]) == 1
    assert [step.patient_id for step in ledger.scheduled_steps()] == ["P9", "P2"]
    assert ledger.schedule([item(1, t00080050="")]) == 1  # another: nobody gave its accession number
    assert ids(ledger) == ["S1", "S1", "S2"] or ids(ledger) == ["S1", "S2", "S1"]
    step = item(2)
    assert ledger.scheduled(step.id) == replace(step, changed_us=ledger.scheduled(step.id).changed_us)  # type: ignore[union-attr]
    assert [one.id for one in ledger.scheduled_like(step.id[:6])] == [step.id]
    assert ledger.unschedule([step.id]) == 1 and ledger.unschedule([step.id]) == 0
    assert ledger.scheduled(step.id) is None


def test_searches_are_narrowed(ledger: Ledger) -> None:
    ledger.schedule([
        item(1), item(2, step={"00400001": "CT1\\CT2", "00400002": "20261123"}),
        item(3, step={"00400001": "", "00400002": "20261124", "00080060": "MR"}),
        item(4, step={"00400001": "MR1", "00400002": ""}, t00100020="P1"),
    ])  # fmt: skip
    assert ids(ledger) == ["S4", "S1", "S2", "S3"]
    assert ids(ledger, stations=["CT2"]) == ["S2"]
    assert ids(ledger, stations=["CT2", ""]) == ["S2", "S3"]
    assert ids(ledger, stations=["CT1"], first_date="20261123") == ["S2"]
    assert ids(ledger, stations=["CT1"], last_date="20261122") == ["S1"]
    assert ids(ledger, first_date="20261123", last_date="20261123") == ["S2"]
    assert ids(ledger, patient_id="P1") == ["S4", "S1"]
    assert ids(ledger, accession_number="A2") == ["S2"]
    assert ids(ledger, study_uid="1.2.3") == ["S3"]
    assert ids(ledger, modality="MR") == ["S3"]
    assert ids(ledger, statuses=OVER) == []


def test_pages_hold_every_step_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worklist, "_PAGE", 3)
    ledger.schedule([item(number, step={"00400003": f"{number % 4:02}"}) for number in range(1, 12)])
    found = [(step.start_time, step.id) for step in ledger.scheduled_steps()]
    assert len(found) == 11 and found == sorted(set(found))


def test_a_status_only_moves_forward(ledger: Ledger) -> None:
    def now() -> str:
        return next(ledger.scheduled_steps()).status

    for status in ("SCHEDULED", "ARRIVED", "STARTED"):
        ledger.schedule([item(1, step={"00400020": status})])
        assert now() == status
    ledger.schedule([item(1)])
    assert now() == "STARTED"
    ledger.schedule([item(1, step={"00400020": "DISCONTINUED"})])
    ledger.schedule([item(1, step={"00400020": "COMPLETED"})])
    assert now() == "DISCONTINUED"
    shown = next(ledger.scheduled_steps()).attributes["00400100"]["Value"][0]
    assert shown["00400020"] == {"vr": "CS", "Value": ["DISCONTINUED"]}
    assert set(OVER) < set(STEP_STATUSES)


def test_a_source_takes_back_what_it_does_not_name_any_more(ledger: Ledger) -> None:
    ledger.schedule([item(1, "file:a"), item(2, "file:a"), item(3, "file:b"), item(4)])
    assert ledger.origins("file:") == {"file:a", "file:b"}
    assert ledger.schedule([item(2, "file:a")], instead_of="file:a") == 1
    assert ids(ledger) == ["S2", "S3", "S4"]
    assert ledger.unschedule_origin("file:b") == 1
    assert ids(ledger) == ["S2", "S4"] and ids(ledger, stations=["CT1"]) == ["S2", "S4"]


def test_past_steps_are_pruned(ledger: Ledger) -> None:
    ledger.schedule([item(1, step={"00400002": "20261101"}), item(2), item(3, step={"00400002": ""})])
    assert ledger.prune_scheduled("20261110", 0) == 1
    assert ids(ledger) == ["S3", "S2"]
    assert ledger.prune_scheduled("20261110", 2**60) == 1
    assert ids(ledger) == ["S2"]


def test_the_worklist_is_bounded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worklist, "SCHEDULED_STEPS_MAX", 2)
    ledger.schedule([item(1), item(2)])
    ledger.schedule([item(2, t00100020="P9")])
    with pytest.raises(OutOfResources):
        ledger.schedule([item(3)])
    assert ids(ledger) == ["S1", "S2"]


@pytest.mark.parametrize(("step", "given"), [
    ({"00400009": ""}, {}), ({"00400020": "SOON"}, {}), ({}, {"t0020000D": ""}), ({}, {"t0020000D": "1.2."}),
    ({"00400001": "\\".join(f"AE{n}" for n in range(40))}, {}),
], ids=str)  # fmt: skip
def test_what_nobody_could_perform_is_refused(step: Mapping[str, str], given: Mapping[str, str]) -> None:
    with pytest.raises(InvalidInput):
        item(1, step=step, **given)


PERFORMED = PerformedStep("1.2.9", "IN PROGRESS", "CT1", "PPS1", "CT1", "CT", "P1", "20261122", "10", "{}",
                          (StepReference("1.2.1", "A1", "R1", "S1"), StepReference("1.2.2", "", "", "S2")))


def test_scheduled_steps_follow_performed_ones(ledger: Ledger) -> None:
    ledger.schedule([item(1), item(2), item(3), item(1, t00080050="A7", t00401001="R7")])
    ledger.create_performed(PERFORMED)
    with pytest.raises(OtherContent):
        ledger.create_performed(PERFORMED)
    assert ledger.scheduled_counts() == {"STARTED": 2, "SCHEDULED": 2}
    assert ledger.performed_of(["1.2.1", "1.2.3"]) == {"1.2.1": [("1.2.9", "IN PROGRESS")]}
    ledger.change_performed("1.2.9", lambda step: replace(step, state="COMPLETED"))
    assert ledger.scheduled_counts() == {"COMPLETED": 2, "SCHEDULED": 2}
    found = ledger.performed("1.2.9")
    assert found is not None and set(found.references) == set(PERFORMED.references)
    assert ledger.performed_counts() == {"COMPLETED": 1}
    assert [step.uid for step in ledger.performed_steps(states=["COMPLETED"])] == ["1.2.9"]
    assert ledger.performed_steps(states=["IN PROGRESS"]) == []
    with pytest.raises(NotFound):
        ledger.change_performed("1.2.8", lambda step: step)
    assert ledger.prune_performed(found.changed_us) == 0
    assert ledger.prune_performed(found.changed_us + 1) == 1
    assert ledger.performed_of(["1.2.1"]) == {} and ledger.performed("1.2.9") is None


def test_a_change_that_is_refused_changes_nothing(ledger: Ledger) -> None:
    ledger.create_performed(PERFORMED)

    def refuse(step: PerformedStep) -> PerformedStep:
        raise InvalidInput("no")

    before = ledger.performed("1.2.9")
    with pytest.raises(InvalidInput):
        ledger.change_performed("1.2.9", refuse)
    assert ledger.performed("1.2.9") == before


def test_instances_are_those_of_every_series_and_kind() -> None:
    def listed(tag: str, *uids: str) -> dict[str, Any]:
        return {tag: {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": [uid]}} for uid in uids]}}

    series = [listed("00081140", "1.1", "1.2"), listed("00400220", "1.3") | listed("00081140", "1.1"), {}]
    dataset = json.dumps({"00400340": {"vr": "SQ", "Value": series}})
    assert replace(PERFORMED, dataset=dataset).instances == {"1.1", "1.2", "1.3"}


def test_completions(ledger: Ledger) -> None:
    first = StudyCompletion("1.2", "quiet", 3, 2**60)
    ledger.note_completion(first)
    ledger.note_completion(StudyCompletion("1.3", "commitment", 1, 5))  # long ago: gone with the next
    ledger.note_completion(replace(first, why="performed step", instances=4))
    ledger.note_completion(replace(first, study_uid="1.4"))
    assert ledger.completions_of(["1.2", "1.3"]) == {"1.2": replace(first, why="performed step", instances=4)}
    assert ledger.completion_followed_us() is None
    ledger.note_completion_followed(5)
    ledger.note_completion_followed(9)
    assert ledger.completion_followed_us() == 9
