"""Reconciliation over a real hub: what either side lost or has damaged is whole again on both, without a
person; what both lost is said; nothing is ever deleted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.model import EVERYTHING, Fact, FactKind, Level, Query
from archive.space.eviction import EvictionRequest
from federation.hub import Hub
from federation.reconcile_notes import Notes
from federation.reconciling import BACK, FIRST
from tests.datasets import Instance, make_instance
from tests.federation.reconciled import NEVER, Reconciled, flip, place_of, reconciled
from tests.federation.regions import Region
from tests.federation.wards import hub_settings, stored_bytes
from tests.waiting import wait_for as until

WAIT_S = 20.0


@pytest.fixture
def ward(region: Region, hub: Hub) -> Iterator[Reconciled]:
    ward = reconciled(region, hub)
    yield ward
    ward.node.stop()


def instances(count: int, start: int = 0) -> list[Instance]:
    return [make_instance(seed=number) for number in range(start, start + count)]


def drained(ward: Reconciled) -> None:
    until(lambda: ward.node.pending == 0, "it is so")


def region_archive(hub: Hub) -> Archive:
    assert hub._writer is not None
    return hub._writer.archive


def held(archive: Archive) -> dict[str, bytes]:
    """Every live content by its UID."""
    return {one.head.sop_instance_uid: one.digest
            for match in archive.search(Query(Level.STUDY))
            for one in archive.instances(match.study["StudyInstanceUID"], scope=EVERYTHING)}  # fmt: skip


def test_equal_inventories_differ_in_nothing(ward: Reconciled) -> None:
    ward.node.take(instances(20))
    ward.start()
    drained(ward)
    outcome = ward.compare()
    assert (outcome.here, outcome.there, outcome.differing, outcome.alarms) == (20, 20, 0, 0)
    assert not outcome.failure
    until(lambda: not ward.reconciling.held(), "it is so")


def test_what_the_region_has_damaged_is_sent_again_and_taken(hub: Hub, ward: Reconciled) -> None:
    taken = instances(5)
    ward.node.take(taken)
    ward.start()
    drained(ward)
    archive, hurt = region_archive(hub), taken[2]
    flip(hub.settings.state, place_of(archive, hurt))
    archive.record_facts([Fact(FactKind.DAMAGE, hurt.sop_instance_uid, hurt.digest, "", 1)])
    assert ward.compare(dry_run=True).pushed == 1
    assert ward.node.pending == 0, "a dry run changes nothing"
    assert ward.compare().pushed == 1
    drained(ward)
    assert archive.index.has_content(hurt.sop_instance_uid, hurt.digest)
    assert stored_bytes(archive, hurt) == hurt.dataset
    assert ward.compare().differing == 0


def test_what_is_damaged_here_comes_back(ward: Reconciled) -> None:
    taken = instances(5)
    ward.node.take(taken)
    ward.start()
    drained(ward)
    hurt = taken[3]
    flip(ward.node.folder, place_of(ward.node.store, hurt))
    ward.node.store.record_facts([Fact(FactKind.DAMAGE, hurt.sop_instance_uid, hurt.digest, "", 1)])
    outcome = ward.compare()
    assert (outcome.brought, outcome.alarms) == (1, 0)
    assert stored_bytes(ward.node.store, hurt) == hurt.dataset


def test_what_both_lost_is_said_and_nothing_is_deleted(hub: Hub, ward: Reconciled) -> None:
    taken = instances(4)
    ward.node.take(taken)
    ward.start()
    drained(ward)
    gone, hurt = taken[0], taken[1]
    now_us = time.time_ns() // 1000
    ward.node.store.upkeep.evict(
        EvictionRequest(protected_to_us=now_us, study_uid=gone.study_uid)).result(WAIT_S)
    both = [Fact(FactKind.DAMAGE, one.sop_instance_uid, one.digest, "", 1) for one in (gone, hurt)]
    region_archive(hub).record_facts(both)
    ward.node.store.record_facts(both[1:])
    outcome = ward.compare()
    assert outcome.alarms == 2 and outcome.pushed == 0
    assert {one.sop_instance_uid for one in outcome.listed_alarms} == {
        gone.sop_instance_uid, hurt.sop_instance_uid}
    assert len(held(ward.node.store)) == len(held(region_archive(hub))) == 4
    until(lambda: Notes(hub.settings.state).now.wards[ward.node.ward.id].alarms == 2, "it is so")


def test_a_region_restored_from_a_backup_asks_for_what_it_lacks(
    region: Region, tmp_path: Path
) -> None:
    settings = hub_settings(region)
    hub = Hub(settings)
    hub.start()
    ward = reconciled(region, hub)
    before, after = instances(6), instances(7, start=100)
    ward.node.take(before)
    ward.start()
    drained(ward)
    ward.compare()
    hub.stop()
    shutil.copytree(settings.state, tmp_path / "backup", symlinks=True)
    hub = Hub(settings)
    hub.start()
    ward.node.take(after)
    drained(ward)
    until(lambda: len(held(region_archive(hub))) == 13, "it is so")
    hub.stop()
    shutil.rmtree(settings.state)
    shutil.copytree(tmp_path / "backup", settings.state, symlinks=True)
    ward.reconciling._seen_s = ward.reconciling._looked_s = -10_000.0
    hub = Hub(settings)
    hub.start()
    try:
        until(lambda: held(region_archive(hub)) == held(ward.node.store), "it is so")
        assert ward.compared(BACK).pushed == 7
        until(lambda: not ward.reconciling.held(), "it is so")
        for one in (*before, *after):
            assert stored_bytes(region_archive(hub), one) == one.dataset
    finally:
        ward.node.stop()
        hub.stop()


def test_nothing_is_evicted_until_a_restored_region_was_compared(ward: Reconciled) -> None:
    ward.node.take(instances(3))
    ward.start()
    drained(ward)
    ward.compare()
    part = ward.reconciling
    until(lambda: not part.held(), "it is so")
    until(lambda: part.notes.now.stores, "the store was seen")
    policy = part._policy()
    assert policy is not None
    place = part.notes.now.stores[policy.store.hex()]
    part._policy = lambda: replace(policy, store_position=replace(place, offset=place.offset - 1))
    assert part.held(), "the store stands further back than it was seen"
    part._policy = lambda: replace(policy, store=b"another")
    assert part.held()
    part._policy = lambda: replace(policy, store_position=place)
    assert not part.held()


def test_a_new_disk_gets_its_lists_back_and_what_came_lately(
    region: Region, hub: Hub, ward: Reconciled
) -> None:
    old, new = instances(6), instances(3, start=50)
    day_us = 86_400_000_000
    ward.node.take(old, at_us=time.time_ns() // 1000 - 30 * day_us)
    ward.node.take(new)
    ward.start()
    drained(ward)
    before = held(ward.node.store)
    matches = ward.node.store.search(Query(Level.STUDY))
    ward.node.stop()
    shutil.rmtree(ward.node.folder)
    ward.settings = replace(NEVER, refill_days=7.0)
    ward.start()
    outcome = ward.compared(FIRST)
    store = ward.node.store
    assert (outcome.listed, outcome.brought, outcome.alarms) == (9, 3, 0)
    assert held(store) == before
    assert ward.node.pending == 0, "what the region has is not sent to it"
    again = store.search(Query(Level.STUDY))
    assert [one.study for one in again] == [one.study for one in matches]
    assert [one.patient for one in again] == [one.patient for one in matches]
    nearline = {one.study["StudyInstanceUID"] for one in again if one.nearline}
    assert nearline == {one.study_uid for one in old}
    for one in new:
        assert stored_bytes(store, one) == one.dataset
    assert ward.compare().differing == 0

    dump = store.index.dump()
    ward.node.stop()
    (ward.node.folder / "index.db").unlink()
    for suffix in ("-wal", "-shm"):
        (ward.node.folder / f"index.db{suffix}").unlink(missing_ok=True)
    assert ward.node.store.index.dump() == dump, "an index made anew equals the one that went"


def test_the_region_has_nothing_of_another_ward_to_tell(region: Region, hub: Hub, ward: Reconciled) -> None:
    other = reconciled(region, hub, "Cardiology")
    try:
        ward.node.take(instances(3))
        other.node.take(instances(4, start=60))
        ward.start()
        other.start()
        drained(ward)
        drained(other)
        assert (ward.compare().there, other.compare().there) == (3, 4)
    finally:
        other.node.stop()


def test_a_person_reads_the_last_outcome_without_the_process(ward: Reconciled) -> None:
    ward.node.take(instances(2))
    ward.start()
    drained(ward)
    ward.compare()
    until(lambda: "asked" in (Notes(ward.node.folder).now.last or ward.compared()).reason, "it is so")
    ward.node.stop()
    last = Notes(ward.node.folder).now.last
    assert last is not None and last.words() == "2 here, 2 in the region: nothing differs"

