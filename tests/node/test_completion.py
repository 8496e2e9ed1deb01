"""When a study is complete: by a performed step, by a request for commitment, by quiet; again when it grew,
also after a restart, and at least once to everybody."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.database import sqlite_url
from archive.errors import Unavailable
from archive.ledger import Ledger, PerformedStep, StepReference
from node import completion
from node.completion import COMMITMENT, PERFORMED, QUIET, Completion, StudyDone
from tests.datasets import Instance, make_instance
from tests.node.storing import Storing, storing
from tests.waiting import wait_for

NEVER_S = 1000.0


@dataclass
class Watched:
    """A running completion, what it announced, and how many times it is to be refused."""

    completion: Completion
    archive: Archive
    ledger: Ledger
    heard: list[StudyDone] = field(default_factory=list)
    refusals: int = 0

    def hear(self, done: StudyDone) -> None:
        if self.refusals:
            self.refusals -= 1
            raise Unavailable("not now")
        self.heard.append(done)

    def whys(self, study_uid: str) -> list[str]:
        return [done.why for done in self.heard if done.study_uid == study_uid]

    def wait(self, study_uid: str, *whys: str) -> None:
        wait_for(lambda: self.whys(study_uid) == list(whys), f"{whys}, not {self.heard}")

    def wait_open(self, count: int) -> None:
        wait_for(lambda: self.completion.open_studies == count, f"{count} open studies")

    def wait_noted(self, since_us: int) -> None:
        """The ledger says from where to look again, and goes on saying so."""
        wait_for(lambda: self.ledger.completion_followed_us() == since_us, "that it is noted")
        noted_s = self.completion._noted_s
        wait_for(lambda: self.completion._noted_s > noted_s, "that it is noted again")

    def idle(self) -> None:
        """Everything that came was looked at."""
        wait_for(lambda: not any(study.look for study in self.completion._open.values()), "a look")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "_TICK_S", 0.02)
    monkeypatch.setattr(completion, "_RETRY_S", 0.05)
    monkeypatch.setattr(completion, "_FOLLOWED_EVERY_S", 0.05)
    monkeypatch.setattr(completion, "COMMITMENT_QUIET_S", 0.1)


@contextmanager
def watching(archive: Archive, ledger: Ledger, *, quiet_s: float = NEVER_S,
             step_timeout_s: float = NEVER_S) -> Iterator[Watched]:
    watched = Watched(Completion(archive, ledger, quiet_s=quiet_s, step_timeout_s=step_timeout_s), archive,
                      ledger)
    watched.completion.subscribe(watched.hear)
    watched.completion.start()
    try:
        wait_for(lambda: ledger.completion_followed_us() is not None, "the first look")
        yield watched
    finally:
        watched.completion.stop()
        archive._writer().indexer.watchers.clear()  # the next one is of another life


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


def study(count: int) -> list[Instance]:
    first = make_instance(number=1)
    return [first, *(make_instance(number=n, study_uid=first.study_uid, series_uid=first.series_uid)
                     for n in range(2, count + 1))]


def performed(ledger: Ledger, study_uid: str, uids: list[str], state: str = "COMPLETED",
              uid: str = "1.2.840.1") -> None:
    items = [{"00081155": {"vr": "UI", "Value": [one]}} for one in uids]
    series = {"0020000E": {"vr": "UI", "Value": ["1.2"]}, "00081140": {"vr": "SQ", "Value": items}}
    step = PerformedStep(uid, "IN PROGRESS", "CT1", "P", "CT1", "CT", "P1", "20261122", "10", "{}",
                         (StepReference(study_uid, "", "", "S1"),))
    ledger.create_performed(step)
    if state != "IN PROGRESS":
        dataset = json.dumps({"00400340": {"vr": "SQ", "Value": [series]}})
        ledger.change_performed(uid, lambda now: replace(now, state=state, dataset=dataset))


def test_a_performed_step_completes_a_study_when_all_that_it_lists_is_here(served: Storing) -> None:
    one, two, three = study(3)
    with watching(served.archive, served.ledger) as watched:
        served.send(one, two)
        performed(served.ledger, one.study_uid, [each.sop_instance_uid for each in (one, two, three)])
        watched.completion.performed([one.study_uid])
        served.archive.wait_indexed()
        watched.idle()
        assert watched.heard == []
        served.send(three)
        watched.wait(one.study_uid, PERFORMED)
    assert served.ledger.completions_of([one.study_uid])[one.study_uid].instances == 3


def test_a_step_that_ends_after_everything_came(served: Storing) -> None:
    instances = study(2)
    with watching(served.archive, served.ledger) as watched:
        served.send(*instances)
        served.archive.wait_indexed()
        watched.idle()
        performed(served.ledger, instances[0].study_uid, [one.sop_instance_uid for one in instances])
        watched.completion.performed([instances[0].study_uid])
        watched.wait(instances[0].study_uid, PERFORMED)


def test_quiet_is_the_last_resort(served: Storing) -> None:
    one, two = study(2)
    with watching(served.archive, served.ledger, quiet_s=0.3) as watched:
        served.send(one)
        watched.wait(one.study_uid, QUIET)
        wait_for(lambda: watched.completion.open_studies == 0, "the end of it")
        served.send(one)  # the same again is nothing new
        served.send(two)
        watched.wait(one.study_uid, QUIET, QUIET)
    assert served.ledger.completions_of([one.study_uid])[one.study_uid].instances == 2


def test_a_step_in_progress_holds_quiet_back(served: Storing) -> None:
    one, = study(1)
    other, = study(1)
    performed(served.ledger, one.study_uid, [], "IN PROGRESS")
    with watching(served.archive, served.ledger, quiet_s=0.1, step_timeout_s=NEVER_S) as watched:
        served.send(one, other)
        watched.wait(other.study_uid, QUIET)
        assert watched.whys(one.study_uid) == []
    with watching(served.archive, served.ledger, quiet_s=0.1, step_timeout_s=0.2) as watched:
        watched.wait(one.study_uid, QUIET)


def test_a_ledger_that_does_not_answer_for_a_moment_costs_no_performed_step(
        served: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    one, = study(1)
    served.send(one)
    served.archive.wait_indexed()
    performed(served.ledger, one.study_uid, [one.sop_instance_uid])
    whole, failed = served.ledger.performed_of, threading.Event()

    def failing_once(study_uids: Collection[str]) -> dict[str, list[tuple[str, str]]]:
        if one.study_uid in study_uids and not failed.is_set():
            failed.set()
            raise Unavailable("not now")
        return whole(study_uids)

    with watching(served.archive, served.ledger) as watched:
        monkeypatch.setattr(served.ledger, "performed_of", failing_once)
        watched.completion.performed([one.study_uid])
        watched.wait(one.study_uid, PERFORMED)
    assert failed.is_set()


def test_one_of_two_steps_is_not_the_study(served: Storing) -> None:
    one, two = study(2)
    with watching(served.archive, served.ledger) as watched:
        served.send(one)
        performed(served.ledger, one.study_uid, [], "IN PROGRESS", "1.2.840.2")
        performed(served.ledger, one.study_uid, [one.sop_instance_uid])
        watched.completion.performed([one.study_uid])
        served.archive.wait_indexed()
        watched.idle()
        assert watched.heard == []
        served.send(two)
        served.ledger.change_performed("1.2.840.2", lambda now: replace(now, state="DISCONTINUED"))
        watched.completion.performed([one.study_uid])
        watched.wait(one.study_uid, PERFORMED)


def test_a_request_for_commitment_completes_it_soon(served: Storing) -> None:
    one, two = study(2)
    with watching(served.archive, served.ledger) as watched:
        served.send(one, two)
        watched.completion.commitment_asked((one.sop_instance_uid, two.sop_instance_uid, "1.2.9.9"))
        watched.wait(one.study_uid, COMMITMENT)


def test_a_subscriber_that_fails_hears_again(served: Storing) -> None:
    one, = study(1)
    with watching(served.archive, served.ledger, quiet_s=0.1) as watched:
        watched.refusals = 2
        served.send(one)
        watched.wait(one.study_uid, QUIET)
        assert watched.refusals == 0
        wait_for(lambda: watched.completion.open_studies == 0, "the end of it")


def test_what_came_before_a_restart_is_announced_after_it_and_only_once(served: Storing) -> None:
    done, open_ = study(1), study(2)
    with watching(served.archive, served.ledger, quiet_s=0.1) as watched:
        served.send(*done)
        watched.wait(done[0].study_uid, QUIET)
    with watching(served.archive, served.ledger) as watched:
        served.send(open_[0])
        served.archive.wait_indexed()
    served.send(open_[1])  # while nobody looked
    served.archive.wait_indexed()
    with watching(served.archive, served.ledger, quiet_s=0.1) as watched:
        watched.wait(open_[0].study_uid, QUIET)
        wait_for(lambda: watched.completion.open_studies == 0, "the end of it")
        assert watched.whys(done[0].study_uid) == []


def test_a_study_that_stays_open_is_recalled_at_every_start(served: Storing) -> None:
    one, = study(1)
    since_us = 0
    for _ in range(3):
        with watching(served.archive, served.ledger) as watched:
            if not since_us:
                served.send(one)
            watched.wait_open(1)
            since_us = since_us or watched.completion._open[one.study_uid].since_us
            watched.wait_noted(since_us)
        assert served.ledger.completion_followed_us() == since_us
    with watching(served.archive, served.ledger, quiet_s=0.1) as watched:
        watched.wait(one.study_uid, QUIET)


def test_a_node_that_never_looked_does_not_announce_what_it_holds(served: Storing) -> None:
    old, new = study(1), study(1)
    served.send(*old)
    served.archive.wait_indexed()
    with watching(served.archive, served.ledger, quiet_s=0.1) as watched:
        served.send(*new)
        watched.wait(new[0].study_uid, QUIET)
        assert watched.whys(old[0].study_uid) == []


def test_open_studies_are_bounded(served: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "OPEN_STUDIES_MAX", 2)
    studies = [study(1)[0] for _ in range(4)]
    with watching(served.archive, served.ledger) as watched:
        served.send(*studies)
        wait_for(lambda: len(watched.heard) == watched.completion.open_studies == 2, "two to make room")
    assert {done.why for done in watched.heard} == {QUIET}


def test_the_ledger_remembers(tmp_path: Path) -> None:
    ledger = Ledger.open(sqlite_url(tmp_path / "ledger.db"))
    assert ledger.completion_followed_us() is None
    ledger.note_completion_followed(5)
    ledger.note_completion_followed(7)
    ledger.close()
    again = Ledger.open(sqlite_url(tmp_path / "ledger.db"))
    assert again.completion_followed_us() == 7
    again.close()
