"""Conflicts in a whole archive: sorted, decided, rebuilt, and killed in between."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archive.archive import Archive
from archive.conflicts.decisions import ACCEPT, REJECT, choose
from archive.errors import Corrupt, Evicted, InvalidInput, NotFound
from archive.handlers import handlers_of
from archive.index.index import Index
from archive.indexer import Indexer
from archive.model import ConflictState, Fact, FactKind, Level, Outcome, Query, StoredInstance
from archive.rebuild import rebuild
from archive.space.eviction import EvictionRequest
from tests.archive.archives import settings_for, store, stored_bytes
from tests.archive.test_acceptance import consistent
from tests.datasets import EXPLICIT, IMPLICIT, Instance, instance_of, make_dataset, make_instance, make_study
from tests.waiting import wait_for


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with Archive.open(settings_for(tmp_path), outbox=True) as opened:
        yield opened


def again(instance: Instance, **changes: Any) -> Instance:
    """Another content under the same UID, in the same series unless `changes` say otherwise."""
    same = {"sop_uid": instance.sop_instance_uid, "study_uid": instance.study_uid,
            "series_uid": instance.series_uid}  # fmt: skip
    return make_instance(**{**same, **changes})


def decide(archive: Archive, kind: str, instance: Instance, by: str = "anna") -> str:
    detail = {"uid": instance.sop_instance_uid, "digest": instance.digest.hex()}
    return handlers_of(archive)[kind](detail, by)


def settle(archive: Archive) -> None:
    """Everything is indexed, and what could be compared was."""
    archive.wait_indexed()
    wait_for(lambda: not archive.index.has_uncompared(), "all that could be was compared")


def names(archive: Archive) -> list[str]:
    return [match.patient.get("PatientName", "") for match in archive.search(Query(Level.STUDY))]


def rebuilt_equal(archive: Archive, *, outbox: bool = True) -> None:
    """Close, rebuild, compare."""
    settle(archive)
    before = archive.index.dump()
    settings = archive.settings
    archive.close()
    report = rebuild(settings, outbox=outbox)
    assert report.damages == ()
    index = Index.open(settings.database_url, read_only=True)
    try:
        after = index.dump()
        assert after == before, [name for name in after if after[name] != before[name]]
        assert consistent(index) == []
    finally:
        index.close()


def test_accepting_serves_the_other_and_back(tmp_path: Path) -> None:
    archive = Archive.open(settings_for(tmp_path), outbox=True)
    first = make_instance(patient_name="Rossi^Mario")
    second = again(first, patient_name="Rossi^Maria")
    assert store(archive, first) is Outcome.STORED and store(archive, second) is Outcome.CONFLICT
    settle(archive)
    assert names(archive) == ["Rossi^Mario"]
    assert "served with the other" in decide(archive, ACCEPT, second)
    assert names(archive) == ["Rossi^Maria"] and stored_bytes(archive, first) == second.dataset
    assert "already" in decide(archive, ACCEPT, second), "an order may be carried out again"
    assert store(archive, second) is Outcome.DUPLICATE and store(archive, first) is Outcome.CONFLICT
    assert archive.index.totals().conflicts == 0
    decide(archive, ACCEPT, first)
    assert names(archive) == ["Rossi^Mario"] and stored_bytes(archive, first) == first.dataset
    decide(archive, ACCEPT, second)
    accepted = [fact for batch in archive.facts.read() for fact in batch.facts
                if fact.kind is FactKind.ACCEPTED]  # fmt: skip
    assert [fact.digest for fact in accepted] == [second.digest, first.digest, second.digest]
    assert {fact.detail for fact in accepted} == {"anna"}
    rebuilt_equal(archive)


def test_an_instance_that_moves_to_another_study_and_patient(tmp_path: Path) -> None:
    archive = Archive.open(settings_for(tmp_path), outbox=True)
    study = make_study(3, patient_id="1", patient_name="Wrong^Patient", modality="CT")
    target = make_study(2, patient_id="2", patient_name="Right^Patient", modality="MR")
    for one in (*study, *target):
        store(archive, one)
    moved = again(study[0], patient_id="2", patient_name="Right^Patient", modality="MR",
                  study_uid=target[0].study_uid, series_uid=target[0].series_uid, number=3)  # fmt: skip
    store(archive, moved)
    decide(archive, ACCEPT, moved)
    found = archive.search(Query(Level.STUDY))
    counts = {match.patient["PatientID"]: match.instance_count for match in found}
    assert counts == {"1": 2, "2": 3}
    assert [one.digest for one in archive.instances(study[0].study_uid, None, moved.sop_instance_uid)] == []
    rebuilt_equal(archive)


def test_a_study_that_is_emptied_goes(tmp_path: Path) -> None:
    archive = Archive.open(settings_for(tmp_path), outbox=True)
    first = make_instance(patient_id="1")
    moved = make_instance(sop_uid=first.sop_instance_uid, patient_id="2")
    for one in (first, moved):
        store(archive, one)
    decide(archive, ACCEPT, moved)
    assert [match.patient["PatientID"] for match in archive.search(Query(Level.STUDY))] == ["2"]
    assert [match.patient["PatientID"] for match in archive.search(Query(Level.PATIENT))] == ["2"]
    rebuilt_equal(archive)


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_are_rebuilt_equal(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    studies = [make_study(3, patient_id=str(n), patient_name=f"N{n}") for n in range(3)]
    flat = [one for study in studies for one in study]
    outbox = chance.random() < 0.7
    archive = Archive.open(settings_for(tmp_path), outbox=outbox)
    known: dict[str, list[Instance]] = {}
    for _ in range(40):
        if chance.random() < 0.6 or not known:
            like, home = chance.choice(flat), chance.choice(flat)
            one = like if chance.random() < 0.4 else make_instance(
                sop_uid=like.sop_instance_uid, patient_id=str(chance.randrange(4)),
                patient_name=chance.choice(["A", "B", ""]), number=chance.randrange(9),
                study_uid=home.study_uid, series_uid=home.series_uid, modality=chance.choice(["CT", "MR"]),
            )  # fmt: skip
            store(archive, one)
            known.setdefault(one.sop_instance_uid, []).append(one)
        else:
            one = chance.choice(chance.choice(list(known.values())))
            kind = chance.choice([ACCEPT, ACCEPT, REJECT])
            with contextlib.suppress(InvalidInput, NotFound):
                decide(archive, kind, one)
        if chance.random() < 0.1:
            settle(archive)
            assert consistent(archive.index) == []
    rebuilt_equal(archive, outbox=outbox)


@pytest.mark.parametrize("seed", range(4))
def test_decisions_among_evictions_and_compactions_are_rebuilt_equal(tmp_path: Path, seed: int) -> None:
    """The attributes that a study is made anew from may be in facts alone by then."""
    chance = random.Random(seed)
    archive = Archive.open(settings_for(tmp_path, pack_bytes_max=24_000, drop_delay_s=0.0), outbox=True)
    uids = [f"1.2.{n}" for n in range(1, 8)]
    known: list[Instance] = []
    for _ in range(60):
        roll = chance.random()
        if roll < 0.55 or not known:
            study = chance.randrange(1, 4)
            one = chance.choice(known) if known and chance.random() < 0.2 else make_instance(
                sop_uid=chance.choice(uids), study_uid=f"1.3.{study}", series_uid=f"1.3.{study}.1",
                patient_id=str(study), patient_name=chance.choice("ABC"), padding=2_000,
                number=chance.randrange(9), seed=chance.randrange(1 << 20),
            )  # fmt: skip
            store(archive, one)
            known.append(one)
        elif roll < 0.75:
            with contextlib.suppress(InvalidInput, NotFound, Evicted):
                decide(archive, chance.choice([ACCEPT, ACCEPT, REJECT]), chance.choice(known))
        elif roll < 0.85:
            archive.wait_indexed()
            archive.record_facts([
                Fact(FactKind.RECEIPT, row.head.sop_instance_uid, row.digest, "a/one", 10,
                     f"stored, accepted {row.accepted_us}")
                for row in archive.index.pending(100)
            ])  # fmt: skip
        elif roll < 0.93:
            archive.wait_indexed()
            request = EvictionRequest(protected_to_us=100, study_uid=f"1.3.{chance.randrange(1, 4)}")
            archive.upkeep.evict(request).result(30)
        else:
            archive.wait_indexed()
            archive.upkeep.compact().result(30)
    archive.wait_indexed()
    assert consistent(archive.index) == []
    for study_uid in ("1.3.1", "1.3.2", "1.3.3"):
        for row in archive.instances(study_uid):
            if not row.evicted:
                archive.verify(row)
    rebuilt_equal(archive)


def test_the_same_in_another_encoding_is_sorted_out_by_itself(tmp_path: Path) -> None:
    archive = Archive.open(settings_for(tmp_path), outbox=True)
    dataset = make_dataset()
    first, second = instance_of(dataset, EXPLICIT), instance_of(dataset, IMPLICIT)
    dataset.PatientName = "Else"
    third = instance_of(dataset, IMPLICIT)
    store(archive, first)
    assert store(archive, second) is Outcome.CONFLICT
    store(archive, third)
    settle(archive)
    totals = archive.index.totals()
    assert (totals.instances, totals.conflicts, totals.equivalents) == (1, 1, 1)
    (row,) = archive.index.conflicts()
    assert row.other_digest == third.digest
    (fact,) = [fact for batch in archive.facts.read() for fact in batch.facts]
    assert fact.kind is FactKind.EQUIVALENT and fact.detail == first.digest.hex()
    # Of the content that a person accepts, another may be the equivalent.
    fourth = instance_of(dataset, EXPLICIT)
    store(archive, fourth)
    settle(archive)
    assert archive.index.totals().conflicts == 2
    decide(archive, ACCEPT, third)
    settle(archive)
    assert archive.index.kept_state(first.sop_instance_uid, fourth.digest) is ConflictState.EQUIVALENT
    assert archive.index.totals().conflicts == 0
    rebuilt_equal(archive)


def test_decisions_are_refused_with_what_there_is(archive: Archive) -> None:
    first = make_instance()
    store(archive, first)
    with pytest.raises(NotFound):
        decide(archive, ACCEPT, again(first, patient_name="X"))
    with pytest.raises(NotFound):
        choose(archive.index, "1.2.3", "")
    others = [again(first, patient_name=name) for name in ("A", "B")]
    for other in others:
        store(archive, other)
    archive.wait_indexed()
    with pytest.raises(InvalidInput, match="2 contents"):
        choose(archive.index, first.sop_instance_uid, "")
    short = others[0].digest.hex()[:8]
    assert choose(archive.index, first.sop_instance_uid, short).other_digest == others[0].digest
    with pytest.raises(NotFound):
        choose(archive.index, first.sop_instance_uid, "0" * 64)
    with pytest.raises(InvalidInput, match="the one that is served"):
        choose(archive.index, first.sop_instance_uid, first.digest.hex()[:8])
    assert "rejected, and kept" in decide(archive, REJECT, others[0])
    assert "already" in decide(archive, REJECT, others[0])
    assert choose(archive.index, first.sop_instance_uid, "").other_digest == others[1].digest
    decide(archive, ACCEPT, others[0])  # a rejected one may be accepted all the same
    with pytest.raises(InvalidInput, match="replaced"):
        decide(archive, REJECT, first)
    for detail in ({}, {"uid": "1.2", "digest": "xy"}, {"uid": "1.2", "digest": "00"}):
        with pytest.raises(InvalidInput):
            handlers_of(archive)[ACCEPT](detail, "anna")


def test_damaged_bytes_are_not_accepted(archive: Archive, tmp_path: Path) -> None:
    first = make_instance()
    second = again(first, patient_name="X")
    for one in (first, second):
        store(archive, one)
    settle(archive)
    (row,) = archive.index.conflicts()
    with (tmp_path / row.location.pack).open("r+b") as pack:
        pack.seek(row.location.offset + row.location.length - 10)
        pack.write(b"\0" * 10)
    with pytest.raises(Corrupt):
        decide(archive, ACCEPT, second)
    assert stored_bytes(archive, first) == first.dataset


# Killed between the fact and the index


def _decide_and_die(folder: Path, uid: str, digest: str, moment: str) -> None:
    archive = Archive.open(settings_for(folder), outbox=True)

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "before the index":
        archive.index.apply_facts = die  # type: ignore[method-assign]
    else:
        record = Indexer._record_facts

        def record_and_die(self: Indexer, facts: Any) -> None:
            record(self, facts)
            die()

        Indexer._record_facts = record_and_die  # type: ignore[method-assign]
    handlers_of(archive)[ACCEPT]({"uid": uid, "digest": digest}, "anna")


@pytest.mark.parametrize("moment", ["before the index", "before the answer"])
def test_a_decision_survives_a_kill(tmp_path: Path, moment: str) -> None:
    first = make_instance(patient_name="Rossi^Mario")
    second = again(first, patient_name="Rossi^Maria")
    with Archive.open(settings_for(tmp_path), outbox=True) as archive:
        store(archive, first)
        store(archive, second)
    process = multiprocessing.get_context("spawn").Process(
        target=_decide_and_die, args=(tmp_path, first.sop_instance_uid, second.digest.hex(), moment)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    archive = Archive.open(settings_for(tmp_path), outbox=True)
    assert names(archive) == ["Rossi^Maria"] and stored_bytes(archive, first) == second.dataset
    assert "already" in decide(archive, ACCEPT, second)
    rebuilt_equal(archive)


def _found(archive: Archive, instance: Instance) -> Callable[[], list[StoredInstance]]:
    return lambda: archive.instances(instance.study_uid)


def test_a_decision_waits_for_what_was_acknowledged(archive: Archive) -> None:
    """The conflict may not be in the index yet when a person decides."""
    first = make_instance()
    second = again(first, patient_name="X")
    store(archive, first)
    store(archive, second)
    decide(archive, ACCEPT, second)
    assert [one.digest for one in _found(archive, first)()] == [second.digest]
