"""Storage commitment SCP (PS3.4 Annex J; SC1 to SC5, SC7, SC8): every way in which a request is answered and
a report is heard, with pynetdicom as the modality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from archive.archive import Archive
from archive.ledger.commitments import ANSWERING, DONE, GIVEN_UP, OPEN, SCP
from archive.model import Fact, FactKind, StoredInstance
from archive.space.eviction import EvictionRequest
from node.dimse import commitments as sets
from node.dimse import messages
from node.dimse.contexts import EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE, STORAGE_COMMITMENT
from node.dimse.identifiers import read_identifier, write_identifier
from node.dimse.messages import Field
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from node.settings import CommitmentSettings
from tests.datasets import CT, EXPLICIT, MR, instance_of, make_instance, make_study
from tests.node.committing import EAGER, Committing, Modality, ask, committing, request_of
from tests.node.serving import AE_TITLE, QUICK
from tests.node.storing import WARD
from tests.waiting import wait_for


@pytest.fixture
def modality() -> Iterator[Modality]:
    made = Modality()
    yield made
    made.close()


@pytest.fixture
def node(tmp_path: Path, modality: Modality) -> Iterator[Committing]:
    with committing(tmp_path, port=modality.port) as running:
        yield running


AT_ONCE = replace(EAGER, same_association_s=0.0)


def test_a_report_over_the_same_association(node: Committing, modality: Modality) -> None:
    study = make_study(5)
    node.send(*study)
    uid = str(generate_uid())
    with modality.associated(node.port) as association:
        assert modality.ask(association, study, uid=uid) == 0
        event = modality.event()
        assert event.over_own and event.kind == 1 and event.transaction_uid == uid
        assert event.committed == {one.sop_instance_uid for one in study} and not event.failed
        assert event.retrieve_ae == AE_TITLE
        node.await_state(DONE)
        again = make_instance()  # the association lives on
        node.send(again)
        assert modality.ask(association, [again]) == 0
        assert modality.event().committed == {again.sop_instance_uid}
    entry = next(one for one in node.log(3) if "N-ACTION 0000" in one.operations)
    assert "N-EVENT-REPORT 0000" in entry.operations


def test_a_report_over_an_association_of_our_own_when_the_modality_is_gone(node: Committing,
                                                                           modality: Modality) -> None:
    modality.listen()
    study = make_study(3)
    node.send(*study)
    with modality.associated(node.port) as association:
        assert modality.ask(association, study) == 0
        association.release()
        event = modality.event()
    assert event.kind == 1 and not event.over_own
    assert event.committed == {one.sop_instance_uid for one in study}
    assert node.await_state(DONE).tries == 0


def test_nobody_listens_for_a_while(tmp_path: Path, modality: Modality) -> None:
    study = make_study(2)
    with committing(tmp_path, AT_ONCE, port=modality.port) as node:
        node.send(*study)
        with modality.associated(node.port) as association:
            assert modality.ask(association, study) == 0
        waits = node.await_state(ANSWERING, tries=2)
        assert "no connection" in waits.last_error
    with committing(tmp_path, AT_ONCE, port=modality.port) as node:  # and the node was away meanwhile
        modality.listen()
        assert modality.event().committed == {one.sop_instance_uid for one in study}
        node.await_state(DONE)


def test_a_modality_that_answers_failure_is_told_again(tmp_path: Path, modality: Modality) -> None:
    modality.listen()
    modality.status = 0x0110
    instance = make_instance()
    with committing(tmp_path, AT_ONCE, port=modality.port) as node:
        node.send(instance)
        with modality.associated(node.port) as association:
            assert modality.ask(association, [instance]) == 0
        assert modality.event().kind == modality.event().kind == -1
        assert "0110" in node.await_state(ANSWERING, tries=1).last_error
        modality.status = 0
        wait_for(lambda: modality.event().kind == 1, "a report that is heard")
        node.await_state(DONE)


def test_a_failure_over_the_same_association_goes_on_over_another(node: Committing,
                                                                  modality: Modality) -> None:
    instance = make_instance()
    node.send(instance)
    modality.status = 0x0110
    with modality.associated(node.port) as association:
        assert modality.ask(association, [instance]) == 0
        assert modality.event().over_own
        node.await_state(ANSWERING, tries=1)
        modality.status = 0
        modality.listen()
        event = modality.event()
        assert (event.kind, event.over_own) == (1, False)
        node.await_state(DONE)


def test_a_refused_role_is_seen_and_tried_again(tmp_path: Path, modality: Modality) -> None:
    modality.listen(takes_role=False)
    instance = make_instance()
    with committing(tmp_path, AT_ONCE, port=modality.port) as node:
        node.send(instance)
        with modality.associated(node.port) as association:
            assert modality.ask(association, [instance]) == 0
        assert "role" in node.await_state(ANSWERING, tries=1).last_error
        modality.close()
        modality.listen()
        assert modality.event().kind == 1


def test_what_nobody_hears_is_given_up_in_the_end(tmp_path: Path, modality: Modality) -> None:
    instance = make_instance()
    with committing(tmp_path, replace(AT_ONCE, report_days=0.0), port=modality.port) as node:
        node.send(instance)
        with modality.associated(node.port) as association:
            assert modality.ask(association, [instance]) == 0
        assert "no connection" in node.await_state(GIVEN_UP).last_error
        assert node.ledger.commitments(failed_only=True)
        assert not node.ledger.has_live_commitments(SCP, ANSWERING)


def test_a_device_that_cannot_be_called_hears_over_a_later_association(tmp_path: Path,
                                                                       modality: Modality) -> None:
    first, second = make_instance(), make_instance()
    with committing(tmp_path) as node:  # nobody said where it listens
        node.send(first, second)
        with modality.associated(node.port) as association:
            assert modality.ask(association, [first]) == 0
            assert modality.event().committed == {first.sop_instance_uid}
            node.await_state(DONE)
        modality.status = 0x0110  # this one is lost on it
        with modality.associated(node.port) as association:
            assert modality.ask(association, [second]) == 0
            assert modality.event().kind == -1
        node.await_state(ANSWERING, tries=1)
        modality.status = 0
        with modality.associated(node.port) as association:
            assert modality.ask(association, [first]) == 0
            heard = {modality.event().committed, modality.event().committed}
        assert heard == {frozenset({first.sop_instance_uid}), frozenset({second.sop_instance_uid})}


def test_stored_missing_corrupted_and_mistaken_instances(node: Committing, modality: Modality) -> None:
    """Row 57: success, 0112, failure; what is corrupted is never committed."""
    good, damaged, other_class = make_study(3)
    node.send(good, damaged, other_class)
    node.damage(damaged)
    missing, strange = str(generate_uid()), str(generate_uid())
    with modality.associated(node.port) as association:
        assert ask(association, request_of([
            (CT, good.sop_instance_uid), (CT, damaged.sop_instance_uid), (MR, other_class.sop_instance_uid),
            (CT, missing), ("1.2.840.10008.5.1.4.34.6.1", strange)])) == 0
        event = modality.event()
        assert event.kind == 2 and event.committed == {good.sop_instance_uid}
        assert event.failed == {damaged.sop_instance_uid: 0x0110, other_class.sop_instance_uid: 0x0119,
                                missing: 0x0112, strange: 0x0122}
        assert event.retrieve_ae == AE_TITLE
        # Its sender sends it again, and it is whole again.
        assert node.await_state(DONE).failed == 4
        node.send(damaged)
        assert modality.ask(association, [damaged]) == 0
        assert modality.event().committed == {damaged.sop_instance_uid}


def test_other_content_of_this_device_is_not_committed(node: Committing, modality: Modality) -> None:
    """What it sent last under the UID is kept apart, and is not what it would get back."""
    first = make_instance(seed=1)
    second = make_instance(sop_uid=first.sop_instance_uid, study_uid=first.study_uid,
                           series_uid=first.series_uid, seed=2)
    node.send(first)
    node.send(second)
    with modality.associated(node.port) as association:
        assert modality.ask(association, [first]) == 0
        assert modality.event().failed == {first.sop_instance_uid: 0x0110}


def test_the_same_content_in_another_encoding_is_committed(node: Committing, modality: Modality) -> None:
    """Sent again by another transfer syntax, and asked for before the two were compared."""
    first = make_instance(transfer_syntax=EXPLICIT)
    again = instance_of(first.read(), IMPLICIT_LITTLE)
    assert again.dataset != first.dataset
    node.send(first)
    node.send(again)
    with modality.associated(node.port) as association:
        assert modality.ask(association, [first]) == 0
        assert modality.event().committed == {first.sop_instance_uid}


def test_held_until_the_region_has_a_receipt_for_this_content(tmp_path: Path, modality: Modality) -> None:
    study = make_study(3)
    asked: list[Sequence[str]] = []
    with committing(tmp_path, by_region=True, port=modality.port, on_request=asked.append) as node:
        node.send(*study)
        with modality.associated(node.port) as association:
            assert modality.ask(association, study) == 0
            hashed = wait_for(lambda: node.ledger.commitment_items(node.only().id)[2].digest, "hashing")
            assert len(hashed) == 32
            receipt(node, study[0].sop_instance_uid, study[0].digest)
            receipt(node, study[1].sop_instance_uid, b"other content" + bytes(19))
            wait_for(lambda: waiting(node) == 2, "the first receipt")
            assert modality.events.empty() and node.only().state == OPEN
            for one in study[1:]:
                receipt(node, one.sop_instance_uid, one.digest)
            assert modality.event().committed == {one.sop_instance_uid for one in study}
    assert asked == [tuple(one.sop_instance_uid for one in study)]


def test_what_the_region_does_not_take_in_time_fails(tmp_path: Path, modality: Modality) -> None:
    settings = replace(EAGER, timeout_s=0.5)
    taken, late = make_study(2)
    with committing(tmp_path, settings, by_region=True, port=modality.port) as node:
        node.send(taken, late)
        receipt(node, taken.sop_instance_uid, taken.digest)
        with modality.associated(node.port) as association:
            assert modality.ask(association, [taken, late]) == 0
            event = modality.event()
        assert event.committed == {taken.sop_instance_uid}
        assert event.failed == {late.sop_instance_uid: 0x0213}


@pytest.mark.parametrize("by_region", [False, True])
def test_what_was_evicted_counts_by_its_receipt(tmp_path: Path, modality: Modality, by_region: bool) -> None:
    instance = make_instance(padding=40_000)
    with committing(tmp_path, by_region=by_region, port=modality.port) as node:
        node.send(instance)
        receipt(node, instance.sop_instance_uid, instance.digest)
        asked = EvictionRequest(protected_to_us=1_000, study_uid=instance.study_uid)
        assert node.archive.upkeep.evict(asked).result(20).instances == 1
        with modality.associated(node.port) as association:
            assert modality.ask(association, [instance]) == 0
            assert modality.event().committed == {instance.sop_instance_uid}


def test_a_stopped_verifier_hashes_nothing_twice(tmp_path: Path, modality: Modality,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(4)
    hashed: list[str] = []
    verify = Archive.verify

    def counting(self: Archive, instance: StoredInstance) -> None:
        hashed.append(instance.head.sop_instance_uid)
        verify(self, instance)

    monkeypatch.setattr(Archive, "verify", counting)
    with committing(tmp_path, AT_ONCE, by_region=True, port=modality.port) as node:
        node.send(*study)
        with modality.associated(node.port) as association:
            assert modality.ask(association, study) == 0
        wait_for(lambda: all(item.digest for item in node.ledger.commitment_items(node.only().id)), "hashing")
    modality.listen()
    with committing(tmp_path, AT_ONCE, by_region=True, port=modality.port) as node:
        for one in study:
            receipt(node, one.sop_instance_uid, one.digest)
        assert len(modality.event().committed) == 4
    assert sorted(hashed) == sorted(one.sop_instance_uid for one in study)


def receipt(node: Committing, uid: str, digest: bytes) -> None:
    node.archive.wait_indexed()
    node.archive.record_facts([Fact(FactKind.RECEIPT, uid, digest, WARD, 77, "stored")])


def waiting(node: Committing) -> int:
    return len(node.ledger.waiting_items(node.only().id, "", 100))


@pytest.mark.parametrize(("change", "status"), [
    ({}, 0x0000), ({"action": 2}, 0x0123), ({"instance": "1.2.3"}, 0x0112), ({"no uid": 1}, 0x0115),
    ({"no items": 1}, 0x0115), ({"twice": 1}, 0x0115), ({"no class": 1}, 0x0115), ({"bad uid": 1}, 0x0115),
])
def test_a_request_is_checked(node: Committing, modality: Modality, change: dict[str, object],
                              status: int) -> None:
    uid = str(generate_uid())
    request = request_of([(CT, uid), (CT, uid if "twice" in change else str(generate_uid()))])
    if "no uid" in change:
        del request.TransactionUID
    if "no items" in change:
        request.ReferencedSOPSequence = []
    if "no class" in change:
        del request.ReferencedSOPSequence[1].ReferencedSOPClassUID
    if "bad uid" in change:
        request.ReferencedSOPSequence[1].ReferencedSOPInstanceUID = "1.02.x"
    options = {key: value for key, value in change.items() if key in ("action", "instance")}
    with modality.associated(node.port) as association:
        assert ask(association, request, **options) == status  # type: ignore[arg-type]
        assert ask(association, request_of([(CT, uid)])) == 0  # it lives on
    assert len(node.ledger.commitments()) == 1 + (status == 0)


def test_the_same_transaction_again(tmp_path: Path, modality: Modality) -> None:
    instance, other = make_study(2)
    with committing(tmp_path, by_region=True, port=modality.port) as node:
        node.send(instance, other)
        uid = str(generate_uid())
        for _ in range(2):
            with modality.associated(node.port) as association:
                assert modality.ask(association, [instance], uid=uid) == 0
        with modality.associated(node.port) as association:
            assert modality.ask(association, [instance, other], uid=uid) == 0x0115
        assert node.only().instances == 1


def test_open_requests_of_a_device_are_bounded(tmp_path: Path, modality: Modality) -> None:
    settings = CommitmentSettings(open_per_device_max=2, same_association_s=0.0)
    instance = make_instance()
    with committing(tmp_path, settings, by_region=True, port=modality.port) as node:
        node.send(instance)
        with modality.associated(node.port) as association:
            assert [modality.ask(association, [instance]) for _ in range(3)] == [0, 0, 0x0213]


def test_a_large_request_holds_up_no_small_one(tmp_path: Path, modality: Modality,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.commitment.verifier.SLICE_BYTES", 100_000)
    big = make_study(60, rows=128, columns=128)
    small = make_instance()
    settings = replace(AT_ONCE, verify_bytes_per_s=1e6)
    modality.listen()
    with committing(tmp_path, settings, port=modality.port) as node:
        node.send(*big, small)
        with modality.associated(node.port) as association:
            assert modality.ask(association, big) == 0
            assert modality.ask(association, [small]) == 0
        assert modality.event().committed == {small.sop_instance_uid}
        assert len(modality.event().committed) == 60


@pytest.mark.parametrize("syntax", [IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG])
def test_the_information_is_what_pydicom_reads_and_writes(syntax: str) -> None:
    information = sets.Information("1.2.3", {"1.4": CT, "1.5": MR}, {"1.6": (CT, 0x0112)}, "MISS1")
    octets = sets.encode(information, syntax)
    read = read_identifier(octets, syntax)
    assert read.TransactionUID == "1.2.3" and read.RetrieveAETitle == "MISS1"
    assert [item.ReferencedSOPInstanceUID for item in read.ReferencedSOPSequence] == ["1.4", "1.5"]
    assert [item.FailureReason for item in read.FailedSOPSequence] == [0x0112]
    assert sets.decode(octets, syntax) == information
    assert "RetrieveAETitle" not in read.ReferencedSOPSequence[0]


def test_undefined_lengths_and_other_elements_are_read(tmp_path: Path) -> None:
    request = request_of([(CT, "1.4"), (CT, "1.5")], uid="1.2.3")
    request.StorageMediaFileSetID = "X"
    request["ReferencedSOPSequence"].is_undefined_length = True
    for item in request.ReferencedSOPSequence:
        item.is_undefined_length_sequence_item = True
        item.ReferencedSOPSequence = [Dataset()]
    octets = write_identifier(request, EXPLICIT_LITTLE)
    assert sets.decode(octets, EXPLICIT_LITTLE).referenced == {"1.4": CT, "1.5": CT}


def action_request(message_id: int) -> bytes:
    return messages.normalized_request(Field.N_ACTION, message_id, STORAGE_COMMITMENT, sets.INSTANCE,
                                       has_dataset=True, more=messages.short(messages.ACTION_TYPE_ID, 1))


def test_a_request_that_crosses_the_report_is_served(node: Committing) -> None:
    """The modality sends an instance while our report is on its way, and answers the report after that."""
    first, second = make_study(2)
    node.send(first)
    proposed = [ProposedContext(1, STORAGE_COMMITMENT, (EXPLICIT_LITTLE,)),
                ProposedContext(3, CT, (EXPLICIT,))]
    with Requestor.connect(node.peer, "CT1", proposed, limits=QUICK) as requestor:
        association = requestor.association
        commit, storage = requestor.context_of(STORAGE_COMMITMENT), requestor.context_of(CT)
        assert commit is not None and storage is not None
        action = action_request(1)
        information = sets.Information("2.25.1", {first.sop_instance_uid: CT})
        association.send(commit, action, sets.encode(information, EXPLICIT_LITTLE))
        assert association.receive()[1].status == 0
        context, event = association.receive()
        assert event.field == Field.N_EVENT_REPORT
        report = sets.decode(association.read_dataset(context, 1 << 20), EXPLICIT_LITTLE)
        assert set(report.referenced) == {first.sop_instance_uid}
        store_request = messages.store_request(2, CT, second.sop_instance_uid)
        association.send(storage, store_request, second.dataset)
        association.send(commit, messages.response(event, 0))
        _, answer = association.receive()
        assert (answer.field, answer.status) == (Field.C_STORE | messages.RESPONSE, 0)
        assert answer.short(messages.MESSAGE_ID_RESPONDED_TO, 0) == 2
        node.await_state(DONE)
        assert requestor.call(storage, messages.store_request(requestor.next_message_id(), CT,
                                                              first.sop_instance_uid),
                              first.dataset)[0].status == 0


def test_a_report_that_is_never_answered_goes_over_another_association(node: Committing,
                                                                      modality: Modality) -> None:
    instance = make_instance()
    node.send(instance)
    proposed = [ProposedContext(1, STORAGE_COMMITMENT, (EXPLICIT_LITTLE,))]
    with Requestor.connect(node.peer, "CT1", proposed, limits=QUICK) as requestor:
        commit = requestor.context_of(STORAGE_COMMITMENT)
        assert commit is not None
        action = action_request(1)
        information = sets.Information("2.25.1", {instance.sop_instance_uid: CT})
        requestor.association.send(commit, action, sets.encode(information, EXPLICIT_LITTLE))
        assert requestor.association.receive()[1].status == 0
        context, event = requestor.association.receive()
        assert event.field == Field.N_EVENT_REPORT
        requestor.association.drain(context)
        modality.listen()
    assert modality.event().kind == 1  # as soon as that one is over
