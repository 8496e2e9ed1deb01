"""What becomes of another content under a UID that is here, by the policy of the device that sends it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.errors import OtherContent
from archive.model import ConflictPolicy, ConflictState, FactKind, Outcome, Position
from tests.archive.archives import settings_for, store
from tests.datasets import PROVENANCE, Instance, make_instance


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with Archive.open(settings_for(tmp_path), outbox=True) as opened:
        yield opened


def pair(**changes: object) -> tuple[Instance, Instance]:
    """Two contents of one UID: a name corrected."""
    first = make_instance(patient_name="Rossi^Mario")
    second = make_instance(
        sop_uid=first.sop_instance_uid, study_uid=first.study_uid, series_uid=first.series_uid,
        patient_name="Rossi^Maria", **changes,  # type: ignore[arg-type]
    )  # fmt: skip
    return first, second


def send(archive: Archive, instance: Instance, policy: ConflictPolicy) -> Outcome:
    reception = archive.intake.begin(instance.head(PROVENANCE), policy=policy)
    reception.write(instance.dataset)
    ticket = reception.commit()
    ticket.wait_durable()
    return ticket.outcome


def facts(archive: Archive, kind: FactKind) -> list[tuple[str, bytes, str, str]]:
    return [
        (fact.sop_instance_uid, fact.digest, fact.ward, fact.detail)
        for batch in archive.facts.read() for fact in batch.facts if fact.kind is kind
    ]  # fmt: skip


@pytest.mark.parametrize("indexed", [True, False])
def test_refused_content_leaves_a_fact_and_nothing_else(
    archive: Archive, indexed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = pair()
    assert store(archive, first) is Outcome.STORED
    if indexed:
        archive.wait_indexed()
    end = archive.packs.log.end
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(OtherContent):
                send(archive, second, ConflictPolicy.REFUSE)
    assert facts(archive, FactKind.REFUSED) == [
        (first.sop_instance_uid, second.digest, PROVENANCE.ward, PROVENANCE.device)
    ]
    assert archive.packs.log.end == end, "nothing of it is in a pack"
    assert send(archive, first, ConflictPolicy.REFUSE) is Outcome.DUPLICATE
    archive.wait_indexed()
    totals = archive.index.totals()
    assert (totals.instances, totals.conflicts, totals.proposed) == (1, 0, 0)
    (row,) = archive.index.refusals()
    assert row.device == PROVENANCE.device
    assert first.sop_instance_uid in caplog.text and "Rossi" not in caplog.text


def test_a_large_content_that_is_refused_leaves_no_pack_of_its_own(tmp_path: Path) -> None:
    with Archive.open(settings_for(tmp_path, small_object_bytes_max=1000), outbox=True) as archive:
        first, second = pair(rows=64, columns=64)
        store(archive, first)
        with pytest.raises(OtherContent):
            send(archive, second, ConflictPolicy.REFUSE)
        assert len(list((tmp_path / "large").iterdir())) <= 1


@pytest.mark.parametrize("indexed", [True, False])
def test_a_proposal_is_on_record_when_it_is_answered(archive: Archive, indexed: bool) -> None:
    first, second = pair()
    store(archive, first)
    if indexed:
        archive.wait_indexed()
    assert send(archive, second, ConflictPolicy.PROPOSE) is Outcome.CONFLICT
    wanted = [(first.sop_instance_uid, second.digest, PROVENANCE.ward, PROVENANCE.device)]
    assert facts(archive, FactKind.PROPOSED) == wanted
    assert send(archive, second, ConflictPolicy.PROPOSE) is Outcome.CONFLICT
    assert facts(archive, FactKind.PROPOSED) == wanted, "once is enough"
    archive.wait_indexed()
    (row,) = archive.index.conflicts()
    assert row.state is ConflictState.PROPOSED and row.other_digest == second.digest
    totals = archive.index.totals()
    assert (totals.instances, totals.conflicts, totals.proposed) == (1, 0, 1)


def test_what_was_kept_may_be_proposed_later(archive: Archive) -> None:
    first, second = pair()
    store(archive, first)
    store(archive, second)
    archive.wait_indexed()
    assert archive.index.conflicts()[0].state is ConflictState.OPEN
    send(archive, second, ConflictPolicy.PROPOSE)
    assert archive.index.conflicts()[0].state is ConflictState.PROPOSED


def test_another_study_is_another_content(archive: Archive) -> None:
    first = make_instance()
    other = make_instance(sop_uid=first.sop_instance_uid)  # its own study and series
    store(archive, first)
    with pytest.raises(OtherContent):
        send(archive, other, ConflictPolicy.REFUSE)
    assert store(archive, other) is Outcome.CONFLICT
    archive.wait_indexed()
    (row,) = archive.index.conflicts()
    assert row.kept_study_uid == first.study_uid and row.study_uid == other.study_uid
    assert len(archive.instances(first.study_uid)) == 1 and archive.instances(other.study_uid) == []


@pytest.mark.parametrize("policy", list(ConflictPolicy))
@pytest.mark.parametrize("indexed", [True, False])
def test_twenty_at_once_make_one_live_record(archive: Archive, policy: ConflictPolicy, indexed: bool) -> None:
    first, second = pair()
    if indexed:
        store(archive, first)
        archive.wait_indexed()
    answers: list[Outcome | type[Exception]] = []
    start = threading.Barrier(20)

    def one(instance: Instance) -> None:
        start.wait()
        try:
            answers.append(send(archive, instance, policy))
        except OtherContent:
            answers.append(OtherContent)

    threads = [threading.Thread(target=one, args=[(first, second)[n % 2]]) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 20
    archive.wait_indexed()
    totals = archive.index.totals()
    assert totals.instances == 1
    assert len(facts(archive, FactKind.REFUSED)) == (1 if policy is ConflictPolicy.REFUSE else 0)
    assert len(facts(archive, FactKind.PROPOSED)) == (1 if policy is ConflictPolicy.PROPOSE else 0)
    if policy is ConflictPolicy.REFUSE:
        assert answers.count(OtherContent) == 10 and totals.conflicts == 0
    else:
        assert answers.count(Outcome.CONFLICT) == 10 and totals.conflicts + totals.proposed == 1
    records = [item for item in archive.packs.read(Position(1, 0), archive.packs.log.durable)]
    assert len(records) == (1 if policy is ConflictPolicy.REFUSE else 2)
