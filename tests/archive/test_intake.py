"""Intake: what it takes, what it refuses, and what it decides, against a real archive."""

from __future__ import annotations

import hashlib
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.uid import generate_uid

from archive.archive import Archive
from archive.errors import (
    CannotUnderstand,
    Corrupt,
    DatasetMismatch,
    InvalidInstance,
    MissError,
    OutOfResources,
    SyncFailed,
    TooLarge,
    Unavailable,
)
from archive.index.index import Index
from archive.model import START, Fact, FactKind, InstanceHead, Outcome, RecordKind
from archive.rebuild import rebuild
from tests.archive.archives import send, settings_for, store, stored_bytes
from tests.archive.faulty_storage import FaultyStorage
from tests.datasets import BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT, PROVENANCE, Instance, make_instance


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with Archive.open(settings_for(tmp_path / "state"), outbox=True) as opened:
        yield opened


def live_records(archive: Archive) -> list[tuple[RecordKind, str]]:
    archive.packs.log.flush()
    return [
        (item.kind, item.head.sop_instance_uid)  # type: ignore[union-attr]
        for item in archive.packs.read(START, archive.packs.log.durable)
    ]


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED])
def test_what_is_stored_comes_back_byte_for_byte(archive: Archive, syntax: str) -> None:
    instance = make_instance(transfer_syntax=syntax)
    assert store(archive, instance) is Outcome.STORED
    assert stored_bytes(archive, instance) == instance.dataset


@pytest.mark.parametrize("size", [(1 << 20) + 1, 5 << 20])
def test_a_large_instance_streams_into_a_pack_of_its_own(archive: Archive, size: int) -> None:
    instance = make_instance(padding=size)
    assert store(archive, instance, piece_bytes=16 << 10) is Outcome.STORED
    assert stored_bytes(archive, instance) == instance.dataset
    (found,) = archive.instances(instance.study_uid)
    assert found.location.pack.startswith("large/")
    with archive.open_payload(found.location) as payload:
        payload.seek(-10, 2)
        assert payload.read() == instance.dataset[-10:]
        payload.seek(found.location.dataset_offset + 100_000)
        assert payload.read(50) == instance.dataset[100_000:100_050]
    assert archive.intake.budget.taken_bytes == 0


def test_past_the_byte_budget_objects_go_to_disk_instead(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "state", memory_budget_bytes=100 << 10)
    with Archive.open(settings, outbox=True) as archive:
        instances = [make_instance(padding=60 << 10, number=n) for n in range(3)]
        receptions = []
        for instance in instances:
            receptions.append(archive.intake.begin(instance.head()))
            receptions[-1].write(instance.dataset)
        assert archive.intake.budget.taken_bytes <= 100 << 10
        for reception in receptions:
            reception.commit().wait_durable()
        assert archive.intake.budget.taken_bytes == 0
        for instance in instances:
            assert stored_bytes(archive, instance) == instance.dataset


def test_the_same_instance_again_writes_nothing(archive: Archive) -> None:
    instance = make_instance()
    assert store(archive, instance) is Outcome.STORED
    assert store(archive, instance) is Outcome.DUPLICATE  # not indexed yet, or just
    archive.wait_indexed()
    end = archive.packs.log.end
    assert store(archive, instance) is Outcome.DUPLICATE
    assert [kind for kind, _ in live_records(archive)] == [RecordKind.INSTANCE]
    assert archive.packs.log.end.file == end.file


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_another_content_under_the_same_uid_is_a_conflict(
    archive: Archive, indexed: bool, large: bool
) -> None:
    size = 2 << 20 if large else 0
    first = make_instance(sop_uid="1.2.3.4", padding=size)
    other = make_instance(sop_uid="1.2.3.4", padding=size, patient_name="Verdi^Anna")
    assert store(archive, first) is Outcome.STORED
    if indexed:
        archive.wait_indexed()
    assert store(archive, other) is Outcome.CONFLICT
    if indexed:
        archive.wait_indexed()
    assert store(archive, other) is Outcome.CONFLICT  # the same conflicting content is kept once
    assert store(archive, first) is Outcome.DUPLICATE
    assert [kind for kind, _ in live_records(archive)] == [RecordKind.INSTANCE, RecordKind.CONFLICT]
    assert stored_bytes(archive, first) == first.dataset
    (row,) = archive.index.conflicts(10)
    assert (row.kept_digest, row.other_digest) == (first.digest, other.digest)
    with archive.open_payload(row.location) as payload:
        assert payload.read()[row.location.dataset_offset :] == other.dataset


def test_a_conflict_that_a_ward_reports_is_kept_as_one(archive: Archive) -> None:
    other = make_instance(sop_uid="1.2.3.4")
    first = make_instance(sop_uid="1.2.3.4", patient_name="Verdi^Anna")
    assert store(archive, other, conflict=True) is Outcome.CONFLICT
    assert store(archive, other, conflict=True) is Outcome.CONFLICT
    assert store(archive, first) is Outcome.STORED
    assert len(live_records(archive)) == 2
    assert stored_bytes(archive, first) == first.dataset


def test_twenty_parallel_stores_make_one_live_record(archive: Archive) -> None:
    instance = make_instance()
    start = threading.Barrier(20)
    outcomes: list[Outcome] = []

    def one() -> None:
        start.wait()
        outcomes.append(store(archive, instance))

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.value for outcome in outcomes) == ["duplicate"] * 19 + ["stored"]
    assert live_records(archive) == [(RecordKind.INSTANCE, instance.sop_instance_uid)]
    assert archive.index.totals().instances <= 1


def test_parallel_stores_of_two_contents_leave_one_live_and_one_conflict(archive: Archive) -> None:
    contents = [make_instance(sop_uid="1.2.3.4", patient_name=name) for name in ("A^A", "B^B")]
    start = threading.Barrier(16)

    def one(instance: Instance) -> None:
        start.wait()
        store(archive, instance)

    threads = [threading.Thread(target=one, args=(contents[n % 2],)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kind for kind, _ in live_records(archive)) == [RecordKind.INSTANCE, RecordKind.CONFLICT]


@pytest.mark.parametrize(
    "uid", ["../../../etc/x", "1.2/3", "abc", "1." + "2" * 63, "1.02", "", "1.2\n", "1.2\0"]
)
def test_what_is_no_uid_is_refused_before_a_byte(archive: Archive, tmp_path: Path, uid: str) -> None:
    head = make_instance().head()
    before = sorted(tmp_path.rglob("*"))
    for broken in (
        replace(head, sop_instance_uid=uid),
        replace(head, sop_class_uid=uid),
        replace(head, transfer_syntax_uid=uid),
    ):
        with pytest.raises(InvalidInstance):
            archive.intake.begin(broken)
    assert sorted(tmp_path.rglob("*")) == before


def refused(archive: Archive, head: InstanceHead, data: bytes, error: type[MissError]) -> None:
    end = archive.packs.log.end
    reception = archive.intake.begin(head)
    with pytest.raises(error):
        reception.write(data)
        reception.commit()
    assert archive.packs.log.end == end
    assert archive.intake.budget.taken_bytes == 0
    assert archive.packs.storage.list("large") == []


@pytest.mark.parametrize("padding", [0, 2 << 20])
def test_what_is_refused_leaves_nothing(archive: Archive, padding: int) -> None:
    instance = make_instance(padding=padding)
    head = instance.head()
    refused(archive, replace(head, sop_instance_uid=generate_uid()), instance.dataset, DatasetMismatch)
    refused(archive, replace(head, sop_class_uid="1.2.3"), instance.dataset, DatasetMismatch)
    refused(archive, head, b"\xff" * (len(instance.dataset)), CannotUnderstand)
    no_study = make_instance(padding=padding, StudyInstanceUID=None)
    refused(archive, no_study.head(), no_study.dataset, DatasetMismatch)
    assert store(archive, instance) is Outcome.STORED


@pytest.mark.parametrize("padding", [0, 2 << 20])
def test_bytes_that_do_not_match_their_digest_are_refused(archive: Archive, padding: int) -> None:
    instance = make_instance(padding=padding)
    reception = archive.intake.begin(instance.head())
    reception.write(instance.dataset)
    with pytest.raises(Corrupt):
        reception.commit(expected_digest=hashlib.sha256(b"other").digest())
    reception = archive.intake.begin(instance.head())
    reception.write(instance.dataset)
    assert reception.commit(expected_digest=instance.digest).outcome is Outcome.STORED


def test_crumbs_cost_no_more_memory_than_was_granted(archive: Archive) -> None:
    """A peer may send fragments of two octets: 32,000 objects in place of 64 KB would be 1.4 MB."""
    instance = make_instance(padding=60_000)
    reception = archive.intake.begin(instance.head())
    tracemalloc.start()
    try:
        for start in range(0, len(instance.dataset), 2):
            reception.write(memoryview(instance.dataset)[start : start + 2])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(instance.dataset) + (16 << 10)
    reception.commit().wait_durable()
    assert stored_bytes(archive, instance) == instance.dataset


def test_a_view_may_be_used_again_after_write(archive: Archive) -> None:
    instance = make_instance(padding=20_000)
    reception = archive.intake.begin(instance.head())
    buffer = bytearray(1000)
    for start in range(0, len(instance.dataset), 1000):
        piece = instance.dataset[start : start + 1000]
        buffer[: len(piece)] = piece
        reception.write(memoryview(buffer)[: len(piece)])
    buffer[:] = bytes(1000)
    reception.commit().wait_durable()
    assert stored_bytes(archive, instance) == instance.dataset


@pytest.mark.parametrize("padding", [0, 2 << 20])
def test_abort_frees_everything(archive: Archive, padding: int) -> None:
    instance = make_instance(padding=padding)
    reception = archive.intake.begin(instance.head())
    reception.write(instance.dataset)
    reception.abort()
    reception.abort()
    assert archive.intake.budget.taken_bytes == 0
    assert archive.packs.storage.list("large") == []
    with pytest.raises(ValueError, match="ended"):
        reception.commit()


def test_an_object_past_the_limit_is_refused(tmp_path: Path) -> None:
    with Archive.open(settings_for(tmp_path / "s", object_bytes_max=50_000), outbox=True) as archive:
        instance = make_instance(padding=60_000)
        with pytest.raises(TooLarge):
            archive.intake.begin(instance.head(), size_hint=60_000)
        refused(archive, instance.head(), instance.dataset, TooLarge)


def test_the_reserve_of_the_disk_is_kept(tmp_path: Path) -> None:
    with Archive.open(settings_for(tmp_path / "s", free_bytes_min=1 << 60), outbox=True) as archive:
        with pytest.raises(OutOfResources):
            archive.intake.begin(make_instance().head())
        assert archive.index.totals().instances == 0


def test_a_failed_sync_is_no_success_for_anybody_and_the_next_instance_is_stored(tmp_path: Path) -> None:
    storage = FaultyStorage()
    with Archive.open(settings_for(tmp_path / "s"), outbox=True, storage=storage) as archive:
        first, second = make_instance(), make_instance()
        ticket = send(archive, first)
        duplicate = send(archive, first)
        assert duplicate.outcome is Outcome.DUPLICATE
        storage.fail_syncs = 1
        with pytest.raises(SyncFailed):
            ticket.wait_durable()
        with pytest.raises(SyncFailed):
            duplicate.wait_durable()
        assert store(archive, first) is Outcome.STORED  # what failed is not there: it is no duplicate
        assert store(archive, second) is Outcome.STORED
        assert stored_bytes(archive, first) == first.dataset
        assert archive.index.totals().instances == 2
        assert [kind for kind, _ in live_records(archive)] == [RecordKind.INSTANCE] * 2


def test_intake_goes_on_without_the_index_until_the_lag_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path / "s", index_lag_records_max=20)
    with Archive.open(settings, outbox=True) as archive:
        kept = make_instance()
        store(archive, kept)
        archive.wait_indexed()

        def down(*_: object, **__: object) -> None:
            raise Unavailable("the index does not answer")

        with monkeypatch.context() as patch:
            for method in ("apply", "lookup", "has_content", "apply_facts"):
                patch.setattr(Index, method, down)
            instances = [make_instance(number=n) for n in range(20)]
            for instance in instances:
                assert store(archive, instance) is Outcome.STORED
            assert store_again(archive, instances[3]) is None
            with pytest.raises(Unavailable):
                archive.wait_indexed(timeout_s=0.2)
            with pytest.raises(OutOfResources):
                archive.intake.begin(make_instance().head())
        archive.wait_indexed()
        assert archive.index.totals().instances == 21
        assert store(archive, make_instance()) is Outcome.STORED
        for instance in (kept, *instances):
            assert stored_bytes(archive, instance) == instance.dataset


def store_again(archive: Archive, instance: Instance) -> Outcome | None:
    try:
        return store(archive, instance)
    except OutOfResources:
        return None


def test_an_index_that_was_away_too_long_stops_intake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path / "s", index_lag_s_max=0.05)
    with Archive.open(settings, outbox=True) as archive:

        def down(*_: object, **__: object) -> None:
            raise Unavailable("the index does not answer")

        with monkeypatch.context() as patch:
            patch.setattr(Index, "apply", down)
            store(archive, make_instance())
            with pytest.raises(OutOfResources):
                while True:
                    store(archive, make_instance())
        archive.wait_indexed()
        assert store(archive, make_instance()) is Outcome.STORED


def test_provenance_is_kept_in_the_record(archive: Archive) -> None:
    instance = make_instance()
    source = replace(PROVENANCE, device="MR 2", calling_ae="MR2", received_at_us=77)
    store(archive, instance, provenance=source)
    (found,) = archive.instances(instance.study_uid)
    assert found.head.provenance == source
    assert found.digest == instance.digest


@pytest.mark.parametrize(
    "padding, conflict", [(0, False), (200_000, False), (2 << 20, False), (20_000, True)]
)
def test_what_is_damaged_here_is_written_again_when_it_comes_again(
    tmp_path: Path, padding: int, conflict: bool
) -> None:
    """A sender that is told of success may forget its copy: so the bytes that came are here, and go on."""
    settings = settings_for(tmp_path / "state")
    instance = make_instance(padding=padding)
    uid, digest = instance.sop_instance_uid, instance.digest
    with Archive.open(settings, outbox=True) as archive:
        if conflict:
            store(archive, make_instance(sop_uid=uid, study_uid=instance.study_uid))
        store(archive, instance)
        archive.wait_indexed()
        place = archive.index.places([uid])[uid, digest].location
        with (settings.state / place.pack).open("r+b") as pack:
            pack.seek(place.offset + place.length - 10)
            pack.write(b"rot")
        archive.record_facts([
            Fact(kind, uid, digest, "", 5, "damaged") for kind in (FactKind.DAMAGE, FactKind.SET_ASIDE)
        ])  # fmt: skip
        assert archive.index.pending_summary().set_aside == 1
        kept = Outcome.CONFLICT if conflict else Outcome.STORED
        again = Outcome.CONFLICT if conflict else Outcome.DUPLICATE
        assert store(archive, instance) is kept
        assert store(archive, instance) is again, "before the index has it"
        archive.wait_indexed()
        now = archive.index.places([uid])[uid, digest].location
        assert now != place
        assert store(archive, instance) is again
        archive.wait_indexed()
        assert archive.index.places([uid])[uid, digest].location == now, "it is not written once more"
        archive.packs.verify(instance.head(), digest, now)
        assert archive.index.pending_summary().set_aside == 0, "it is offered to the region"
    rebuild(settings, outbox=True)
    with Archive.open(settings, outbox=True) as archive:
        assert archive.index.places([uid])[uid, digest].location == now
        archive.packs.verify(instance.head(), digest, now)
