"""Eviction: only what the region has, listed and counted as before, never answered with wrong bytes, and back
when a sender brings it again; the index made anew equals the old one, whatever crashed in between."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace as changed
from pathlib import Path

import pytest

from archive.archive import Archive, ArchiveSettings
from archive.errors import Evicted, InvalidInput, NotFound, Unavailable
from archive.model import START, Fact, FactKind, Level, Outcome, Query
from archive.packs import holes
from archive.packs.recovery import Damage
from archive.packs.storage import FileStorage
from archive.rebuild import rebuild
from archive.space.eviction import EvictionReport, EvictionRequest
from archive.space.pace import Pace
from tests.archive.archives import abandon, settings_for, store, stored_bytes
from tests.archive.faulty_storage import FaultyStorage
from tests.datasets import PROVENANCE, Instance, make_instance
from tests.waiting import wait_for

NOW_US = 2_000_000_000_000_000  # later than any receipt here
WAIT_S = 30.0


@pytest.fixture
def settings(tmp_path: Path) -> ArchiveSettings:
    return settings_for(tmp_path / "state", drop_delay_s=0.0)


@pytest.fixture
def archive(settings: ArchiveSettings) -> Iterator[Archive]:
    with Archive.open(settings, outbox=True) as opened:
        yield opened


def receive(archive: Archive, instances: list[Instance], at_us: int = 1_000) -> None:
    """The region's receipts."""
    archive.record_facts(
        [Fact(FactKind.RECEIPT, i.sop_instance_uid, i.digest, "", at_us) for i in instances]
    )


def study(number: int, count: int = 6, *, padding: int = 40_000) -> list[Instance]:
    """Instances of one study, the last one large enough for a pack of its own."""
    return [
        make_instance(
            study_uid=f"1.2.{number}", series_uid=f"1.2.{number}.1", sop_uid=f"1.2.{number}.1.{n}",
            number=n, padding=padding if n < count else 2 << 20,
        )
        for n in range(1, count + 1)
    ]  # fmt: skip


def evict(archive: Archive, **request: object) -> EvictionReport:
    asked = EvictionRequest(**{"protected_to_us": NOW_US, **request})  # type: ignore[arg-type]
    return archive.upkeep.evict(asked).result(WAIT_S)


def test_what_the_region_lost_after_it_was_chosen_stays(settings: ArchiveSettings) -> None:
    (instance, *_) = study(1)
    with Archive.open(settings, outbox=True) as archive:
        assert store(archive, instance) is Outcome.STORED
        archive.wait_indexed()
        receive(archive, [instance])
        archive.packs.log.seal()
        eviction = archive.upkeep.eviction
        record = eviction._record_facts

        def lose_it_first(facts: Sequence[Fact]) -> None:
            record([Fact(FactKind.LOST, instance.sop_instance_uid, instance.digest, "", 2_000)])
            record(facts)

        eviction._record_facts = lose_it_first  # between its choice and the fact
        evict(archive, study_uid=instance.study_uid)
        assert [one.head.sop_instance_uid for one in archive.index.pending(10)] == [instance.sop_instance_uid]
        (kept,) = archive.instances(instance.study_uid)
        assert not kept.evicted and not archive.index.has_due(1 << 60)
        with archive.open_payload(kept.location) as payload:
            assert payload.read().endswith(instance.dataset)
    assert rebuilt_equals(settings)


def filled(archive: Archive, studies: int = 2) -> list[list[Instance]]:
    made = [study(number) for number in range(1, studies + 1)]
    for instances in made:
        for instance in instances:
            assert store(archive, instance) is Outcome.STORED
    archive.wait_indexed()
    return made


def rebuilt_equals(settings: ArchiveSettings, storage: FaultyStorage | None = None) -> bool:
    with Archive.open(settings, outbox=True, storage=storage) as archive:
        before = archive.index.dump()
    report = rebuild(settings, outbox=True, storage=storage)
    assert report.damages == ()
    with Archive.open(settings, outbox=True, storage=storage) as archive:
        after = archive.index.dump()
    return before == after


def can_punch(folder: Path) -> bool:
    return holes.can_punch(folder)


def test_what_the_region_has_is_given_up_and_stays_listed(
    archive: Archive, settings: ArchiveSettings
) -> None:
    first, second = filled(archive)
    receive(archive, first)
    totals, found = archive.index.totals(), archive.search(Query(Level.STUDY))
    used = sum(archive.packs.storage.allocated(name) for name in archive.packs.storage.list("packs"))
    report = evict(archive, study_uid="1.2.1")
    assert (report.instances, report.kept, report.unreadable) == (6, 0, 0)
    away = [changed(one, nearline=one.study["StudyInstanceUID"] == "1.2.1") for one in found]
    assert archive.index.totals() == totals and archive.search(Query(Level.STUDY)) == away != found
    for level in (Level.SERIES, Level.IMAGE):
        rows = archive.search(Query(level))
        assert all(one.nearline is (one.study["StudyInstanceUID"] == "1.2.1") for one in rows)
    assert len(archive.packs.storage.list("large")) == 1  # the other study's
    stored = archive.instances("1.2.1")
    assert len(stored) == 6 and all(each.evicted for each in stored)
    for each in stored:
        with pytest.raises(Evicted):
            archive.open_instance(each)
    for instance in second:
        assert stored_bytes(archive, instance) == instance.dataset
        assert store(archive, instance) is Outcome.DUPLICATE
    if can_punch(settings.state):
        now = sum(archive.packs.storage.allocated(name) for name in archive.packs.storage.list("packs"))
        assert used - now >= 5 * 32_000


def test_a_place_that_was_read_before_never_gives_zeros(archive: Archive, settings: ArchiveSettings) -> None:
    """A reader in the midst of a payload, or with a place from before, is told; it gets no other bytes."""
    if not can_punch(settings.state):
        pytest.skip("this file system punches no holes")
    instance = make_instance(study_uid="1.2.1", padding=600_000)
    store(archive, instance)
    store(archive, make_instance(study_uid="1.2.2"))  # its pack stays
    (stored,) = archive.instances("1.2.1")
    with archive.open_payload(stored.location) as payload:
        begun = payload.read(1000)
        receive(archive, [instance])
        assert evict(archive, study_uid="1.2.1").instances == 1
        with pytest.raises(Evicted):
            payload.read()
    assert len(begun) == 1000
    with pytest.raises(Evicted):
        b"".join(archive.dataset_chunks(stored.location))
    with pytest.raises(Evicted):
        archive.verify(stored)


def test_readers_beside_an_eviction_see_whole_bytes_or_are_told(archive: Archive) -> None:
    made = filled(archive, 4)
    receive(archive, [each for instances in made for each in instances])
    wrong: list[str] = []
    told = threading.Event()

    def read(seed: int) -> None:
        chance = random.Random(seed)
        while not told.is_set() or chance.random() < 0.98:
            instance = chance.choice(chance.choice(made))
            try:
                (stored,) = archive.instances(instance.study_uid, None, instance.sop_instance_uid)
                with archive.open_instance(stored) as payload:
                    if payload.read()[stored.location.dataset_offset :] != instance.dataset:
                        wrong.append(instance.sop_instance_uid)
            except Evicted:
                told.set()

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 5):
        evict(archive, study_uid=f"1.2.{number}")
    for thread in threads:
        thread.join(WAIT_S)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_only_what_has_a_receipt_below_the_protected_time(archive: Archive) -> None:
    (instances,) = filled(archive, 1)
    receive(archive, instances[:2], at_us=1_000)
    receive(archive, instances[2:4], at_us=5_000)
    assert evict(archive, study_uid="1.2.1", protected_to_us=999).instances == 0
    report = evict(archive, study_uid="1.2.1", protected_to_us=1_000, dry_run=True)
    assert (report.instances, report.kept) == (2, 4)
    assert not any(each.evicted for each in archive.instances("1.2.1"))
    report = evict(archive, study_uid="1.2.1", protected_to_us=1_000)
    assert (report.instances, report.kept) == (2, 4)
    evicted = {each.head.sop_instance_uid for each in archive.instances("1.2.1") if each.evicted}
    assert evicted == {instance.sop_instance_uid for instance in instances[:2]}
    assert archive.index.pending_summary().count == 2


@pytest.mark.parametrize("request_", [{}, {"protected_to_us": 0, "study_uid": "1.2"}])
def test_a_request_that_says_too_little_is_refused(request_: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        EvictionRequest(**{"protected_to_us": 1, **request_})  # type: ignore[arg-type]


def test_a_conflict_is_never_evicted(archive: Archive) -> None:
    one = make_instance(study_uid="1.2.1", sop_uid="1.2.1.1.1", padding=20_000)
    other = make_instance(study_uid="1.2.1", sop_uid="1.2.1.1.1", padding=20_002)
    assert store(archive, one) is Outcome.STORED
    assert store(archive, other) is Outcome.CONFLICT
    archive.wait_indexed()
    receive(archive, [one, other])
    assert evict(archive, study_uid="1.2.1").instances == 1
    (row,) = archive.index.conflicts()
    assert b"".join(archive.dataset_chunks(row.location)) == other.dataset


def test_the_oldest_goes_by_age_and_until_enough_is_free(settings: ArchiveSettings) -> None:
    with Archive.open(changed(settings, pack_bytes_max=300_000), outbox=True) as archive:
        made = [make_instance(study_uid=f"1.2.{n}", padding=50_000) for n in range(30)]
        for number, instance in enumerate(made):
            store(archive, instance, provenance=changed(PROVENANCE, received_at_us=1_000 + number))
        archive.wait_indexed()
        receive(archive, made)
        report = evict(archive, received_before_us=1_010)
        assert report.instances == 10
        gone = [bool(archive.instances(each.study_uid)[0].evicted) for each in made]
        assert gone == [True] * 10 + [False] * 20
        free = archive.free_bytes()
        report = evict(archive, free_bytes=free + 200_000)
        assert 4 <= report.instances <= 6
        assert [bool(archive.instances(each.study_uid)[0].evicted) for each in made].index(False) >= 14
    assert rebuilt_equals(changed(settings, pack_bytes_max=300_000))


# Coming again


def test_what_was_evicted_is_written_again_when_it_comes_again(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        (instances,) = filled(archive, 1)
        receive(archive, instances)
        evict(archive, study_uid="1.2.1")
        for instance in instances:
            assert store(archive, instance) is Outcome.STORED  # success means that its bytes are here
            assert stored_bytes(archive, instance) == instance.dataset
            assert store(archive, instance) is Outcome.DUPLICATE
        assert archive.index.totals().instances == 6
        assert archive.index.pending_summary().count == 0  # the region has it all the while
        assert not any(each.evicted for each in archive.instances("1.2.1"))
        assert evict(archive, study_uid="1.2.1").instances == 6  # and may go again
        assert store(archive, instances[0]) is Outcome.STORED
        archive.wait_indexed()
    assert rebuilt_equals(settings)


def test_it_may_come_from_another_device(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        (instances,) = filled(archive, 1)
        receive(archive, instances)
        evict(archive, study_uid="1.2.1")
        other = changed(PROVENANCE, device="PACS", calling_ae="PACS", received_at_us=77)
        assert store(archive, instances[0], provenance=other) is Outcome.STORED
        assert stored_bytes(archive, instances[0]) == instances[0].dataset  # verified, its Part 10 prefix too
        (found,) = archive.instances("1.2.1", None, instances[0].sop_instance_uid)
        assert found.head.provenance.device == "PACS"
    assert rebuilt_equals(settings)


# Again and anew


def test_an_index_made_anew_equals_also_without_the_old_one(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        made = filled(archive, 3)
        receive(archive, [*made[0], *made[1]])
        evict(archive, study_uid="1.2.1")
        store(archive, made[0][0])
        late = study(4)
        for instance in late:
            store(archive, instance)
        receive(archive, late)
        evict(archive, study_uid="1.2.4")
        archive.wait_indexed()
        dump = archive.index.dump()
    for name in settings.state.glob("index.db*"):
        name.unlink()
    with Archive.open(settings, outbox=True) as again:
        assert again.index.dump() == dump
        items = list(again.packs.read(START, again.packs.log.durable, check_digests=False))
        assert not [item for item in items if isinstance(item, Damage)]
        facts = [fact for batch in again.facts.read() for fact in batch.facts]
        assert not [fact for fact in facts if fact.kind is FactKind.DAMAGE]
    assert rebuilt_equals(settings)


def test_a_person_accepts_another_content_in_a_study_that_was_evicted(settings: ArchiveSettings) -> None:
    """The study's row is made anew from what it has left, also from instances whose bytes are gone."""
    with Archive.open(settings, outbox=True) as archive:
        (instances,) = filled(archive, 1)
        other = make_instance(
            study_uid="1.2.1", series_uid="1.2.1.1", sop_uid="1.2.1.1.1", number=1, padding=30_000
        )
        assert store(archive, other) is Outcome.CONFLICT
        archive.wait_indexed()
        receive(archive, instances)
        before = archive.search(Query(Level.STUDY))
        evict(archive, study_uid="1.2.1")
        accepted = Fact(FactKind.ACCEPTED, other.sop_instance_uid, other.digest, "", 5, "somebody")
        archive.record_facts([accepted])
        after = archive.search(Query(Level.STUDY))
        assert [match.study for match in after] == [match.study for match in before]
        assert [match.patient for match in after] == [match.patient for match in before]
        assert stored_bytes(archive, other) == other.dataset
    assert rebuilt_equals(settings)


# Crashes


class Stopped(BaseException):
    """The power went, as far as the code under test is concerned."""


@pytest.mark.parametrize("punch", [True, False])
@pytest.mark.parametrize(
    "at", ["before the fact", "fact synced", "index committed", "half punched", "punched"]
)
def test_a_crash_anywhere_goes_on_where_it_was(tmp_path: Path, at: str, punch: bool) -> None:
    settings = settings_for(tmp_path / "state", drop_delay_s=0.0)
    storage = FaultyStorage(punch_holes=punch)
    archive = Archive.open(settings, outbox=True, storage=storage)
    instances, others = filled(archive)
    receive(archive, instances)
    archive.wait_indexed()
    eviction = archive.upkeep.eviction
    archive.upkeep.close()  # its thread would go on with what is left, on the disk of before
    with pytest.MonkeyPatch.context() as patch:
        def stop(*_: object, **__: object) -> None:
            raise Stopped

        if at == "before the fact":
            patch.setattr(archive.facts, "record", stop)
        elif at == "fact synced":
            patch.setattr(archive.index, "apply_facts", stop)
        elif at == "index committed":
            patch.setattr(eviction, "give_back", stop)
        elif at == "half punched":
            done = eviction._give_back

            def one(pack: str, rows: list[object]) -> None:
                done(pack, rows[:2])  # type: ignore[arg-type]
                raise Stopped

            patch.setattr(eviction, "_give_back", one)
        else:
            patch.setattr(archive.index, "note_given_back", stop)
        request = EvictionRequest(NOW_US, study_uid="1.2.1")
        with pytest.raises(Stopped):
            eviction.evict(request, Pace(1e12))
    crashed = storage.power_loss(random.Random(5))
    abandon(archive)

    with Archive.open(settings, outbox=True, storage=crashed) as again:
        assert all(each.evicted is (at != "before the fact") for each in again.instances("1.2.1"))
        again.upkeep.eviction.give_back()
        assert not again.index.due(NOW_US, 10)
        for instance in others:
            assert stored_bytes(again, instance) == instance.dataset
        if at == "before the fact":
            for instance in instances:
                assert stored_bytes(again, instance) == instance.dataset
        else:
            assert len(crashed.list("large")) == 1
            assert store(again, instances[0]) is Outcome.STORED
            assert stored_bytes(again, instances[0]) == instances[0].dataset
        again.wait_indexed()
    assert rebuilt_equals(settings, crashed)


def test_facts_that_the_index_could_not_take_are_given_back_later(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    (instances,) = filled(archive, 1)
    receive(archive, instances)

    def down(*_: object, **__: object) -> None:
        raise Unavailable("the index does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(archive.index, "apply_facts", down)
        with pytest.raises(Unavailable):
            evict(archive, study_uid="1.2.1")
    wait_for(lambda: all(each.evicted for each in archive.instances("1.2.1")), "the index has the facts")
    wait_for(lambda: not archive.index.due(NOW_US, 1), "the space is given back")
    assert archive.packs.storage.list("large") == []


# Files


def test_holes_on_this_disk(tmp_path: Path) -> None:
    if not holes.can_punch(tmp_path):
        pytest.skip("this file system punches no holes")
    storage = FileStorage(tmp_path)
    file = storage.create("packs/00000001.pack")
    data = random.Random(1).randbytes(10 * 4096)
    file.pwritev([data], 0)
    file.fdatasync()
    assert not file.is_hole(4096, 8192)
    file.punch(4096, 8192)
    assert file.read(0, len(data)) == data[:4096] + bytes(8192) + data[12288:]
    assert file.is_hole(4096, 12288) and not file.is_hole(4096, 12289) and not file.is_hole(0, 4096)
    assert storage.allocated("packs/00000001.pack") <= 8 * 4096 < file.size()
    file.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting another file system needs root")
def test_a_file_system_that_punches_nothing_is_known_as_that(tmp_path: Path) -> None:
    with mounted(tmp_path / "ramfs"):
        assert not FileStorage(tmp_path / "ramfs").capabilities.punch_holes
        settings = settings_for(tmp_path / "ramfs" / "state", drop_delay_s=0.0)
        with Archive.open(settings, outbox=True, storage=Roomy(settings.state)) as archive:
            first, second = filled(archive)
            receive(archive, first)
            assert evict(archive, study_uid="1.2.1").instances == 6
            for instance in second:
                assert stored_bytes(archive, instance) == instance.dataset
            packs = archive.packs.storage.list("packs")
            with pytest.raises((Evicted, NotFound)):
                archive.open_instance(archive.instances("1.2.1")[0])
        assert packs == ["packs/00000002.pack"]  # what counted of the first was written once more
        assert rebuilt_equals(settings)


class Roomy(FileStorage):
    """A ramfs says that it has no room at all."""

    def free_bytes(self) -> int:
        return 1 << 40


class mounted:
    """A ramfs, which knows no fallocate."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        self._folder.mkdir()
        done = subprocess.run(["mount", "-t", "ramfs", "ramfs", str(self._folder)], capture_output=True)
        if done.returncode:
            pytest.skip("this machine does not let us mount a ramfs")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self._folder)], check=True)
