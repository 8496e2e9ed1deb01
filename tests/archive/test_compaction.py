"""Compaction, and histories of everything that gives space back: nothing live is ever lost, what the region
does not have stays here, and the index made anew equals the old one, whatever stopped in between."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archive.archive import Archive, ArchiveSettings
from archive.errors import Evicted, MissError, NotFound
from archive.model import Fact, FactKind, Outcome
from archive.packs.survey import Finding, Survey
from archive.rebuild import rebuild
from archive.space.compaction import Compacted
from archive.space.eviction import EvictionRequest
from archive.space.pace import Pace
from tests.archive.archives import abandon, settings_for, store, stored_bytes
from tests.archive.faulty_storage import FaultyStorage
from tests.datasets import Instance, make_instance
from tests.waiting import wait_for

LATE_US = 2_000_000_000_000_000
WAIT_S = 30.0
SMALL = {"pack_bytes_max": 120_000, "small_object_bytes_max": 60_000, "drop_delay_s": 0.0}


def instance_of(number: int, *, large: bool = False, other: bool = False) -> Instance:
    study = number % 3
    padding = (70_000 if large else 12_000 + 2 * (number % 50)) + (2 if other else 0)
    return make_instance(
        study_uid=f"1.2.{study}", series_uid=f"1.2.{study}.1", sop_uid=f"1.2.9.{number}", number=number,
        padding=padding, seed=number,
    )  # fmt: skip


def receive(archive: Archive, instances: list[Instance]) -> None:
    archive.wait_indexed()
    archive.record_facts([Fact(FactKind.RECEIPT, i.sop_instance_uid, i.digest, "", 1_000) for i in instances])


def compact(archive: Archive, number: int | None = None) -> list[Compacted]:
    return archive.upkeep.compact(number).result(WAIT_S)


def evict_study(archive: Archive, study_uid: str) -> int:
    return archive.upkeep.evict(EvictionRequest(LATE_US, study_uid=study_uid)).result(WAIT_S).instances


def filled(archive: Archive, count: int = 18) -> list[Instance]:
    made = [instance_of(number, large=number in (4, 5)) for number in range(count)]
    for instance in made:
        assert store(archive, instance) is Outcome.STORED
    receive(archive, made)
    return made


def check_rebuilt(archive_settings: ArchiveSettings, storage: FaultyStorage | None) -> None:
    with Archive.open(archive_settings, outbox=True, storage=storage) as archive:
        before = archive.index.dump()
    assert rebuild(archive_settings, outbox=True, storage=storage).damages == ()
    with Archive.open(archive_settings, outbox=True, storage=storage) as archive:
        after = archive.index.dump()
    assert after == before


def test_what_counts_of_a_pack_is_written_once_more_and_the_pack_goes(tmp_path: Path) -> None:
    archive_settings = settings_for(tmp_path / "state", **SMALL)
    storage = FaultyStorage()  # it punches nothing
    with Archive.open(archive_settings, outbox=True, storage=storage) as archive:
        made = filled(archive)
        packs = len(storage.list("packs"))
        used = sum(storage.size(name) for name in storage.list("packs"))
        assert evict_study(archive, "1.2.0") == 6 and evict_study(archive, "1.2.1") == 6
        compact(archive)
        assert sum(storage.size(name) for name in storage.list("packs")) < 0.7 * used
        assert len(storage.list("packs")) <= packs
        for instance in made:
            if instance.study_uid == "1.2.2":
                assert stored_bytes(archive, instance) == instance.dataset
                assert store(archive, instance) is Outcome.DUPLICATE
        assert archive.index.totals().instances == 18
        assert not [item for item in everything(storage) if isinstance(item, Finding)]
    check_rebuilt(archive_settings, storage)


def everything(storage: FaultyStorage) -> list[object]:
    survey = Survey(storage)
    found: list[object] = list(survey.missing())
    for name in survey.names:
        found += survey.verify(survey.number_of(name), lambda count: None)
    return found


def test_readers_with_an_old_place_find_it_until_the_pack_goes(tmp_path: Path) -> None:
    archive_settings = settings_for(tmp_path / "state", **(SMALL | {"drop_delay_s": 1.5}))
    storage = FaultyStorage()
    with Archive.open(archive_settings, outbox=True, storage=storage) as archive:
        made = filled(archive)
        old = {each.head.sop_instance_uid: each for each in archive.instances("1.2.2")}
        evict_study(archive, "1.2.0")
        evict_study(archive, "1.2.1")
        compact(archive)
        moved = [each for each in archive.instances("1.2.2")
                 if each.location != old[each.head.sop_instance_uid].location]  # fmt: skip
        assert moved
        for each in moved:
            before = old[each.head.sop_instance_uid]
            assert b"".join(archive.dataset_chunks(before.location)) == dataset_of(made, before)
        wait_for(lambda: not archive.index.due(LATE_US, 10), "the upkeep removes them in its own time")
        for each in moved:
            before = old[each.head.sop_instance_uid]
            with pytest.raises(NotFound):
                archive.open_payload(before.location)
            with archive.open_instance(before) as payload:  # its place is asked once more
                assert payload.read().endswith(dataset_of(made, before))


def dataset_of(made: list[Instance], stored: object) -> bytes:
    uid = stored.head.sop_instance_uid  # type: ignore[attr-defined]
    return next(each.dataset for each in made if each.sop_instance_uid == uid)


def test_a_conflict_and_a_large_object_are_moved_too(tmp_path: Path) -> None:
    archive_settings = settings_for(tmp_path / "state", **SMALL)
    storage = FaultyStorage()
    with Archive.open(archive_settings, outbox=True, storage=storage) as archive:
        large = instance_of(5, large=True)
        store(archive, large)
        other = instance_of(1, other=True)
        gone = [instance_of(number) for number in range(0, 24, 3)]
        store(archive, gone[0])
        store(archive, instance_of(1))
        assert store(archive, other) is Outcome.CONFLICT
        for instance in gone[1:]:
            store(archive, instance)
        receive(archive, gone)
        evict_study(archive, "1.2.0")
        done = compact(archive, 1)
        assert "packs/00000001.pack" not in storage.list("packs"), done
        assert stored_bytes(archive, large) == large.dataset
        (row,) = archive.index.conflicts()
        assert b"".join(archive.dataset_chunks(row.location)) == other.dataset
        archive.packs.verify(row.head, row.other_digest, row.location)
        assert archive.index.pending_summary().count == 3  # the region still gets them
    check_rebuilt(archive_settings, storage)


def test_a_damaged_pack_is_left_alone(tmp_path: Path) -> None:
    archive_settings = settings_for(tmp_path / "state", **SMALL)
    storage = FaultyStorage()
    with Archive.open(archive_settings, outbox=True, storage=storage) as archive:
        filled(archive)
        (live,) = [each for each in archive.instances("1.2.2") if each.location.pack.endswith("01.pack")][:1]
        storage.flip(live.location.pack, live.location.offset + live.location.length - 5)
        evict_study(archive, "1.2.0")
        evict_study(archive, "1.2.1")
        (done,) = compact(archive, 1)
        assert done.reason and "packs/00000001.pack" in storage.list("packs")
        assert compact(archive, 99)[0].reason


def test_a_pack_of_which_most_counts_is_left_alone(tmp_path: Path) -> None:
    archive_settings = settings_for(tmp_path / "state", **SMALL)
    with Archive.open(archive_settings, outbox=True, storage=FaultyStorage()) as archive:
        filled(archive)
        (done,) = compact(archive, 1)
        assert done.reason and compact(archive) == []


# Histories


class Stopped(BaseException):
    """The process was killed here."""


@dataclass
class History:
    """A node through evictions, compactions and crashes, and what must be true of it at any time."""

    folder: Path
    storage: FaultyStorage
    archive: Archive = field(init=False)
    made: dict[str, Instance] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    number: int = 0

    def __post_init__(self) -> None:
        self.settings = settings_for(self.folder / "state", **SMALL)
        self.open()

    def open(self) -> None:
        self.archive = Archive.open(self.settings, outbox=True, storage=self.storage)
        self.archive.upkeep.close()  # what its thread would do is done here, step by step

    def store(self, count: int) -> None:
        for _ in range(count):
            self.number += 1
            instance = instance_of(self.number, large=self.number % 7 == 0)
            self.made[instance.sop_instance_uid] = instance
            store(self.archive, instance)
            self.acknowledged.add(instance.sop_instance_uid)

    def resend(self, choice: int) -> None:
        if self.acknowledged:
            uid = sorted(self.acknowledged)[choice % len(self.acknowledged)]
            outcome = store(self.archive, self.made[uid])
            assert outcome in (Outcome.STORED, Outcome.DUPLICATE)
            assert stored_bytes(self.archive, self.made[uid]) == self.made[uid].dataset

    def receive(self, share: int) -> None:
        uids = sorted(self.acknowledged - self.received)
        uids = uids[: len(uids) * share // 100]
        if uids:
            receive(self.archive, [self.made[uid] for uid in uids])
            self.received |= set(uids)

    def evict(self, study: int) -> None:
        request = EvictionRequest(LATE_US, study_uid=f"1.2.{study}")
        self.archive.wait_indexed()
        self.archive.upkeep.eviction.evict(request, Pace(1e12, share=1.0))

    def compact(self, which: int) -> None:
        sealed = sorted(self.archive.packs.log.sealed())
        if sealed:
            self.archive.wait_indexed()
            self.archive.upkeep.compaction.compact(sealed[which % len(sealed)], Pace(1e12, share=1.0))
            self.archive.upkeep.eviction.give_back()

    def stopped_during(self, work: str, value: int, syncs: int) -> None:
        """Kill the process at one of the next syncs of a work."""
        left = syncs

        def stop(name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped

        self.storage.before_sync = stop
        with contextlib.suppress(Stopped, MissError):
            getattr(self, work)(value)
        self.storage.before_sync = None
        self.crash(value)

    def crash(self, seed: int, *, lose_index: bool = False) -> None:
        after = self.storage.power_loss(random.Random(seed))
        abandon(self.archive)
        self.storage = after
        if lose_index:
            for name in self.settings.state.glob("index.db*"):
                name.unlink()
        self.open()

    def check(self) -> None:
        self.archive.wait_indexed()
        self.archive.upkeep.eviction.give_back()
        assert self.archive.index.totals().instances == len(self.acknowledged)
        for uid in self.acknowledged:
            instance = self.made[uid]
            (stored,) = self.archive.instances(instance.study_uid, None, uid)
            assert stored.digest == instance.digest
            if stored.evicted:
                assert uid in self.received
                with pytest.raises(Evicted):
                    self.archive.open_instance(stored)
            else:
                assert stored_bytes(self.archive, instance) == instance.dataset
        findings = [item for item in everything(self.storage) if isinstance(item, Finding)]
        assert findings == []
        facts = [fact for batch in self.archive.facts.read() for fact in batch.facts]
        assert not [fact for fact in facts if fact.kind is FactKind.DAMAGE]

    def close(self) -> None:
        self.archive.close()


STEPS = st.one_of(
    st.tuples(st.just("store"), st.integers(1, 8)),
    st.tuples(st.just("store"), st.integers(4, 8)),
    st.tuples(st.just("receive"), st.sampled_from([50, 100])),
    st.tuples(st.just("evict"), st.integers(0, 2)),
    st.tuples(st.just("compact"), st.integers(0, 5)),
    st.tuples(st.just("resend"), st.integers(0, 100)),
    st.tuples(st.just("crash"), st.integers(0, 1 << 20)),
    st.tuples(st.just("lose index"), st.integers(0, 1 << 20)),
    st.tuples(st.just("stop evict"), st.tuples(st.integers(0, 2), st.integers(0, 9))),
    st.tuples(st.just("stop compact"), st.tuples(st.integers(0, 5), st.integers(0, 9))),
)


@settings(max_examples=int(os.environ.get("MISS_SPACE_HISTORIES", "20")), deadline=None)
@given(st.lists(STEPS, min_size=3, max_size=14), st.booleans())
def test_nothing_live_is_ever_lost(steps: list[tuple[str, object]], punch: bool) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        history = History(folder, FaultyStorage(punch_holes=punch))
        history.store(6)
        history.receive(50)
        for step, value in steps:
            if step == "crash":
                history.crash(value)  # type: ignore[arg-type]
            elif step == "lose index":
                history.crash(value, lose_index=True)  # type: ignore[arg-type]
            elif step.startswith("stop "):
                history.stopped_during(step[5:], *value)  # type: ignore[misc]
            else:
                getattr(history, step)(value)
        history.check()
        history.crash(1)
        history.check()
        history.close()
        check_rebuilt(history.settings, history.storage)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
