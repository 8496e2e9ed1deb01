"""Storage commitment's transactions in the ledger: durable, bounded, each answered once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from archive.errors import OtherContent, OutOfResources
from archive.ledger import CommitmentItem, Ledger
from archive.ledger import commitments as module
from archive.ledger.commitments import ANSWERING, COMMITTED, DONE, GIVEN_UP, OPEN, SCP, SCU, WAITING

CT = "1.2.840.10008.5.1.4.1.1.2"
THREE = {"1.1": CT, "1.2": CT, "1.3": CT}


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    opened = Ledger.open(database_url)
    yield opened
    opened.close()


def test_a_transaction_from_its_request_to_its_end(ledger: Ledger, database_url: str) -> None:
    asked, is_new = ledger.open_commitment(SCP, "CT1", "2.25.1", THREE)
    assert is_new and asked.state == OPEN and asked.instances == 3
    assert ledger.has_live_commitments(SCP, OPEN) and not ledger.has_live_commitments(SCU, OPEN)
    assert ledger.waiting_items(asked.id, "1.1", 1) == [CommitmentItem(CT, "1.2")]
    ledger.note_items(asked.id, [CommitmentItem(CT, "1.1", COMMITTED, b"d"),
                                 CommitmentItem(CT, "1.2", 0x112)])
    assert not ledger.settle_commitment(asked.id)
    ledger.note_items(asked.id, [CommitmentItem(CT, "1.3", WAITING, b"e")])
    ledger.close()
    again = Ledger.open(database_url)  # another process goes on
    assert [one.sop_instance_uid for one in again.waiting_items(asked.id, "", 10)] == ["1.3"]
    assert again.settle_commitment(asked.id, {True: 0x213, False: 0x110})
    assert not again.settle_commitment(asked.id)
    settled = again.commitment(SCP, "CT1", "2.25.1")
    assert settled is not None and (settled.state, settled.failed) == (ANSWERING, 2)
    assert [item.reason for item in again.commitment_items(asked.id)] == [COMMITTED, 0x112, 0x213]
    assert again.live_commitments(SCP, ANSWERING, due_us=settled.next_try_us) == [settled]
    assert again.live_commitments(SCP, ANSWERING, due_us=1) == [settled]  # the clock was set back
    later_us = settled.next_try_us + 5
    again.note_failed_try(asked.id, "nobody there", later_us)
    assert again.live_commitments(SCP, ANSWERING, due_us=later_us - 1) == []
    assert [one.id for one in again.live_commitments(SCP, ANSWERING, due_us=later_us)] == [asked.id]
    assert again.commitment_counts(SCP) == module.CommitmentCounts(answering=1, failing=1)
    again.end_commitment(asked.id, DONE)
    again.end_commitment(asked.id, GIVEN_UP)  # over is over
    done, = again.commitments(failed_only=True)
    assert (done.state, done.tries, done.last_error) == (DONE, 1, "nobody there")
    assert [item.sop_instance_uid for item in again.commitment_items(asked.id)] == ["1.2", "1.3"]
    again.close()


def test_the_same_request_again_is_the_same_transaction_while_it_lives(ledger: Ledger) -> None:
    first, _ = ledger.open_commitment(SCP, "CT1", "2.25.1", THREE)
    assert ledger.open_commitment(SCP, "CT1", "2.25.1", dict(reversed(THREE.items()))) == (first, False)
    for other in ({"1.1": CT}, THREE | {"1.3": "1.2"}):
        with pytest.raises(OtherContent):
            ledger.open_commitment(SCP, "CT1", "2.25.1", other)
    of_other, is_new = ledger.open_commitment(SCP, "MR1", "2.25.1", {"1.1": CT})
    assert is_new and of_other.id != first.id
    ledger.end_commitment(first.id, DONE)
    later, is_new = ledger.open_commitment(SCP, "CT1", "2.25.1", {"1.1": CT})
    assert is_new and later.id != first.id
    assert ledger.commitment_items(first.id) == []


def test_open_requests_are_bounded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        ledger.open_commitment(SCP, "CT1", f"2.25.{number}", THREE, open_max=2)
    with pytest.raises(OutOfResources):
        ledger.open_commitment(SCP, "CT1", "2.25.9", THREE, open_max=2)
    monkeypatch.setattr(module, "OPEN_ITEMS_MAX", 8)
    with pytest.raises(OutOfResources):
        ledger.open_commitment(SCP, "MR1", "2.25.9", THREE, open_max=2)
    ledger.open_commitment(SCP, "MR1", "2.25.9", {"1.1": CT}, open_max=2)


def test_what_is_over_goes_in_time(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [ledger.open_commitment(SCP, "CT1", f"2.25.{n}", THREE)[0].id for n in range(4)]
    for one in ids[:3]:
        ledger.end_commitment(one, DONE)
    assert ledger.forget_commitments(1) == 0
    monkeypatch.setattr(module, "ENDED_MAX", 2)
    assert ledger.forget_commitments(1) == 1
    assert {one.id for one in ledger.commitments()} == set(ids[1:])
    assert ledger.forget_commitments(1 << 60) == 2
    assert [one.id for one in ledger.commitments()] == [ids[3]]
    assert ledger.commitment_items(ids[0]) == []


def test_an_answer_to_us_is_kept_whole_and_once(ledger: Ledger) -> None:
    asked, _ = ledger.open_commitment(SCU, "PACS", "2.25.1", THREE)
    ledger.await_answer(asked.id, 77)
    waits = ledger.asked_commitment("2.25.1")
    assert waits is not None and (waits.state, waits.next_try_us) == (ANSWERING, 77)
    ledger.answer_commitment(asked.id, {"1.1": COMMITTED, "1.2": 0x112, "9.9": COMMITTED}, 0x110)
    ledger.answer_commitment(asked.id, {"1.1": 0x110}, 0x110)
    assert [item.reason for item in ledger.commitment_items(asked.id)] == [COMMITTED, 0x112, 0x110]
    done = ledger.asked_commitment("2.25.1")
    assert done is not None and (done.state, done.failed) == (DONE, 2)
