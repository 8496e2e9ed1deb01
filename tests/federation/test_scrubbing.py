"""The scrubber with the repair behind it, over a real hub: a flipped byte, a pack that is gone, an index that
is gone, at the node, in the region, in both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.errors import Unavailable
from archive.space.scrubber import Scrubber, read_note
from federation.hub import Hub
from tests.datasets import Instance, make_instance
from tests.federation.reconciled import Reconciled, flip, place_of, reconciled
from tests.federation.regions import Region
from tests.federation.test_reconciling import drained, held, region_archive
from tests.federation.wards import stored_bytes
from tests.waiting import wait_for as until

DAY_S = 86_400.0


@pytest.fixture
def ward(region: Region, hub: Hub) -> Iterator[Reconciled]:
    ward = reconciled(region, hub)
    yield ward
    ward.node.stop()


def scrubbed(archive: Archive) -> list[tuple[str, bytes]]:
    """What one pass finds."""
    found: list[tuple[str, bytes]] = []
    scrubber = Scrubber(archive, interval_s=DAY_S, bytes_per_s_max=1e9, found=found.extend)
    note = scrubber.run_pass(fast=True)
    assert note.full_found == len(found) and note == read_note(archive.settings.state)
    return found


def replicated(ward: Reconciled, count: int = 6) -> list[Instance]:
    taken = [make_instance(seed=number) for number in range(count)]
    ward.node.take(taken)
    ward.start()
    drained(ward)
    return taken


def contents(taken: Sequence[Instance]) -> set[tuple[str, bytes]]:
    return {(one.sop_instance_uid, one.digest) for one in taken}


def whole(archive: Archive, taken: Sequence[Instance]) -> bool:
    return all(archive.index.has_content(one.sop_instance_uid, one.digest)
               and stored_bytes(archive, one) == one.dataset for one in taken)  # fmt: skip


def rebuilt_is_equal(ward: Reconciled) -> None:
    dump = ward.node.store.index.dump()
    ward.node.stop()
    for suffix in ("", "-wal", "-shm"):
        (ward.node.folder / f"index.db{suffix}").unlink(missing_ok=True)
    assert ward.node.store.index.dump() == dump


def test_a_byte_flipped_at_the_node_is_found_and_mended(ward: Reconciled) -> None:
    taken = replicated(ward)
    assert scrubbed(ward.node.store) == []
    flip(ward.node.folder, place_of(ward.node.store, taken[2]))
    assert set(scrubbed(ward.node.store)) == contents(taken[2:3])
    ward.reconciling.damage_found()
    until(lambda: whole(ward.node.store, taken), "it was brought back")
    assert scrubbed(ward.node.store) == []
    rebuilt_is_equal(ward)


def test_a_byte_flipped_in_the_region_is_found_and_sent_again(hub: Hub, ward: Reconciled) -> None:
    taken = replicated(ward)
    archive = region_archive(hub)
    flip(hub.settings.state, place_of(archive, taken[4]))
    assert set(scrubbed(archive)) == contents(taken[4:5])
    assert ward.compare().pushed == 1
    until(lambda: whole(archive, taken), "it was pushed again")
    assert scrubbed(archive) == []


def test_what_is_flipped_in_both_is_said_and_kept(hub: Hub, ward: Reconciled) -> None:
    taken = replicated(ward)
    archive = region_archive(hub)
    for each, folder in ((archive, hub.settings.state), (ward.node.store, ward.node.folder)):
        flip(folder, place_of(each, taken[0]))
        assert set(scrubbed(each)) == contents(taken[:1])
    outcome = ward.compare()
    assert (outcome.alarms, outcome.listed_alarms[0].sop_instance_uid) == (1, taken[0].sop_instance_uid)
    assert len(held(archive)) == len(held(ward.node.store)) == len(taken)


def packs_in(folder: Path) -> list[Path]:
    return sorted((folder / "packs").glob("*.pack"))


def test_a_pack_that_is_gone_at_the_node_comes_back(ward: Reconciled) -> None:
    taken = replicated(ward)
    ward.node.store.packs.log.seal()
    more = [make_instance(seed=77)]
    ward.node.take(more)
    drained(ward)
    packs_in(ward.node.folder)[0].unlink()
    assert set(scrubbed(ward.node.store)) == contents(taken)
    ward.reconciling.damage_found()
    until(lambda: whole(ward.node.store, [*taken, *more]), "all was brought back")
    assert scrubbed(ward.node.store) == []
    before = held(ward.node.store)
    rebuilt_is_equal(ward)
    assert held(ward.node.store) == before


def test_a_pack_that_is_gone_in_the_region_is_sent_again(hub: Hub, ward: Reconciled) -> None:
    taken = replicated(ward)
    archive = region_archive(hub)
    archive.packs.log.seal()
    ward.node.take([make_instance(seed=78)])
    drained(ward)
    packs_in(hub.settings.state)[0].unlink()
    assert set(scrubbed(archive)) == contents(taken)
    assert ward.compare().pushed == len(taken)
    until(lambda: whole(archive, taken), "all was pushed again")
    assert scrubbed(archive) == []


def test_a_node_whose_index_is_gone_is_as_before(ward: Reconciled) -> None:
    replicated(ward)
    rebuilt_is_equal(ward)
    ward.start()
    assert ward.compare().differing == 0


def test_a_pass_that_is_stopped_goes_on_behind_the_last_pack(ward: Reconciled) -> None:
    replicated(ward, 2)
    archive = ward.node.store
    for seed in (40, 41, 42):
        archive.packs.log.seal()
        ward.node.take([make_instance(seed=seed)])
    archive.wait_indexed()
    read: list[int] = []
    stopped = Scrubber(archive, interval_s=DAY_S, bytes_per_s_max=1e9)
    original = stopped._read_pack

    def two(number: int, end: int, pace: object) -> None:
        if len(read) == 2:
            raise Unavailable("stopped")
        read.append(number)
        original(number, end, pace)  # type: ignore[arg-type]

    stopped._read_pack = two  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        stopped.run_pass()
    again = Scrubber(archive, interval_s=DAY_S, bytes_per_s_max=1e9)
    assert again.note.pack == read[-1]
    later = again._read_pack

    def noted(number: int, end: int, pace: object) -> None:
        read.append(number)
        later(number, end, pace)  # type: ignore[arg-type]

    again._read_pack = noted  # type: ignore[method-assign]
    assert again.run_pass().full_us
    assert read == sorted(set(read)) and len(read) == 4
