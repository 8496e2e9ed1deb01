"""Replication from a ward to the region over gRPC and TLS: everything arrives once, whatever is stopped or
damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from archive.archive import Archive
from archive.conflicts.decisions import ACCEPT
from archive.handlers import handlers_of
from archive.model import ConflictState, Level, Location, Match, Query
from federation.hub import Hub
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import Node, node_of, open_archive, stored_bytes
from tests.waiting import wait_for


def batch(count: int, **options: Any) -> list[Instance]:
    return [
        make_instance(number=number, study_uid=f"1.2.{number // 50}", **options) for number in range(count)
    ]


def region_rows(hub: Hub) -> list[Match]:
    with open_archive(hub.settings.state, outbox=False, read_only=True) as archive:
        return archive.search(Query(Level.IMAGE))


def check_region(hub: Hub, instances: list[Instance]) -> None:
    """Each is there once, with the bytes that the modality sent."""
    with open_archive(hub.settings.state, outbox=False, read_only=True) as archive:
        uids = [match.instance["SOPInstanceUID"] for match in archive.search(Query(Level.IMAGE))]
        assert sorted(uids) == sorted({instance.sop_instance_uid for instance in instances})
        for instance in instances:
            assert stored_bytes(archive, instance) == instance.dataset
        assert archive.index.totals().conflicts == 0


def test_five_hundred_instances_arrive_once_with_their_bytes(hub: Hub, node: Node) -> None:
    instances = batch(500)
    node.start()
    node.take(instances)
    wait_for(lambda: node.pending == 0, "everything has a receipt")
    check_region(hub, instances)
    assert {match.wards for match in region_rows(hub)} == {("san-martino/radiology",)}


def test_large_objects_travel_in_chunks(hub: Hub, node: Node) -> None:
    instances = [
        make_instance(rows=1500, columns=1500),
        make_instance(rows=16),
        make_instance(rows=900, columns=900),
    ]
    assert len(instances[0].dataset) > 4 << 20
    node.take(instances)
    node.start()
    wait_for(lambda: node.pending == 0, "everything has a receipt")
    check_region(hub, instances)


def test_a_backlog_from_before_the_node_started_is_delivered(hub: Hub, node: Node) -> None:
    instances = batch(30)
    node.take(instances)
    node.stop()
    node.start()
    wait_for(lambda: node.pending == 0, "everything has a receipt")
    check_region(hub, instances)


def test_the_hub_is_killed_and_started_again_in_the_middle(region: Region, node: Node, hub: Hub) -> None:
    instances = batch(500)
    node.start()
    current = hub
    for part in range(5):
        node.take(instances[part * 100 : part * 100 + 100])
        current.stop(grace_s=0)
        current = Hub(hub.settings)
        current.start()
    try:
        wait_for(lambda: node.pending == 0, "everything has a receipt", 30)
        check_region(hub, instances)
    finally:
        current.stop()


def test_the_node_is_stopped_and_started_again_in_the_middle(hub: Hub, node: Node) -> None:
    instances = batch(300)
    for part in range(6):
        node.start()
        node.take(instances[part * 50 : part * 50 + 50])
        node.stop()
    node.start()
    wait_for(lambda: node.pending == 0, "everything has a receipt", 30)
    check_region(hub, instances)


def test_lost_receipts_are_given_again_and_nothing_is_stored_twice(hub: Hub, node: Node) -> None:
    """The region committed, and the node lost its last words: all of it is pending again."""
    instances = batch(40)
    node.take(instances)
    node.start()
    wait_for(lambda: node.pending == 0, "everything has a receipt")
    node.stop()
    for left in node.folder.glob("facts/*"):
        left.unlink()
    for left in node.folder.glob("index.db*"):
        left.unlink()
    assert node.pending == 40
    before = sum(path.stat().st_size for path in hub.settings.state.glob("packs/*"))
    node.start()
    wait_for(lambda: node.pending == 0, "receipts were given again")
    assert sum(path.stat().st_size for path in hub.settings.state.glob("packs/*")) == before
    check_region(hub, instances)


class Tampering(Archive):
    """Flips a byte of the first read of each object: as a fault below TLS, or in a pack's page, would."""

    flips: set[Location]
    always: bool

    @classmethod
    def of(cls, archive: Archive, *, always: bool = False) -> Archive:
        archive.__class__ = cls
        assert isinstance(archive, cls)
        archive.flips, archive.always = set(), always
        return archive

    def dataset_chunks(
        self, location: Location, *, offset: int = 0, chunk_bytes: int = 1 << 20
    ) -> Iterator[bytes]:
        first = self.always or location not in self.flips
        self.flips.add(location)
        for chunk in super().dataset_chunks(location, offset=offset, chunk_bytes=chunk_bytes):
            yield chunk[:-1] + bytes([chunk[-1] ^ 1]) if first else chunk
            first = False


def test_a_byte_flipped_on_the_way_is_refused_and_sent_again(hub: Hub, node: Node) -> None:
    instances = [*batch(20), make_instance(rows=1500, columns=1500)]
    Tampering.of(node.store)
    node.take(instances)
    node.start()
    wait_for(lambda: node.pending == 0, "everything has a receipt")
    check_region(hub, instances)
    assert node.store.index.pending_summary().set_aside == 0


def test_bytes_damaged_at_the_ward_are_set_aside_and_the_others_pass(hub: Hub, node: Node) -> None:
    good, bad = batch(3), make_instance()
    node.take([bad])
    Tampering.of(node.store, always=True)
    node.start()
    wait_for(lambda: node.store.index.pending_summary().set_aside == 1, "it was set aside")
    ((uid, _, reason),) = node.store.index.set_aside()
    assert uid == bad.sop_instance_uid
    assert "digest" in reason
    node.store.__class__ = Archive
    node.take(good)
    wait_for(lambda: node.pending == 1, "the others passed")
    check_region(hub, good)


def test_two_wards_with_one_instance_make_one_copy_with_two_holders(
    region: Region, hub: Hub, node: Node
) -> None:
    other = node_of(region, hub, "Galliera", "Radiology", "GA")
    try:
        instance = make_instance()
        for one in (node, other):
            one.take([instance])
            one.start()
            wait_for(lambda one=one: one.pending == 0, "it has a receipt")  # type: ignore[misc]
        check_region(hub, [instance])
        (match,) = region_rows(hub)
        assert match.wards == ("galliera/radiology", "san-martino/radiology")
    finally:
        other.stop()


def test_other_bytes_under_one_uid_are_a_conflict_and_the_first_stays(
    region: Region, hub: Hub, node: Node
) -> None:
    other = node_of(region, hub, "Galliera", "Radiology", "GA")
    try:
        first = make_instance(sop_uid="1.2.3.4", study_uid="1.2.3")
        second = make_instance(sop_uid="1.2.3.4", study_uid="1.2.3", rows=18)
        node.take([first])
        node.start()
        wait_for(lambda: node.pending == 0, "the first has a receipt")
        other.take([second])
        other.start()
        wait_for(lambda: other.pending == 0, "the second has a receipt")
        with open_archive(hub.settings.state, outbox=False, read_only=True) as archive:
            assert stored_bytes(archive, first) == first.dataset
            (conflict,) = archive.index.conflicts()
            assert (conflict.ward, conflict.other_digest) == ("galliera/radiology", second.digest)
    finally:
        other.stop()


def corrected(first: Instance, **changes: Any) -> Instance:
    return make_instance(sop_uid=first.sop_instance_uid, study_uid=first.study_uid,
                         series_uid=first.series_uid, **changes)  # fmt: skip


def accept(node: Node, instance: Instance) -> None:
    detail = {"uid": instance.sop_instance_uid, "digest": instance.digest.hex()}
    handlers_of(node.store)[ACCEPT](detail, "anna")


def served(hub: Hub, instance: Instance) -> bytes:
    with open_archive(hub.settings.state, outbox=False, read_only=True) as archive:
        return stored_bytes(archive, instance)


@pytest.mark.parametrize("arrived", [True, False])
def test_what_a_ward_accepts_is_served_by_the_region(hub: Hub, node: Node, arrived: bool) -> None:
    first = make_instance(patient_name="Rossi^Mario")
    second = corrected(first, patient_name="Rossi^Maria")
    node.take([first])
    if arrived:
        node.start()
        node.take([second])
        wait_for(lambda: node.pending == 0, "both have receipts")
        assert served(hub, first) == first.dataset
    else:
        node.take([second])
    accept(node, second)
    assert node.pending == (1 if arrived else 2), "the region is to be told"
    if not arrived:
        node.start()
    wait_for(lambda: node.pending == 0, "the region was told")
    assert served(hub, first) == second.dataset
    accept(node, first)
    wait_for(lambda: node.pending == 0, "the region was told again")
    assert served(hub, first) == first.dataset
    with open_archive(hub.settings.state, outbox=False, read_only=True) as archive:
        assert archive.index.totals().conflicts == 0
        (row,) = archive.index.conflicts(states=[ConflictState.REPLACED])
        assert row.decided_by == "san-martino/radiology"


def test_a_ward_does_not_decide_over_what_another_ward_sent(region: Region, hub: Hub, node: Node) -> None:
    other = node_of(region, hub, "Galliera", "Radiology", "GA")
    try:
        theirs = make_instance(patient_name="Bianchi")
        other.take([theirs])
        other.start()
        wait_for(lambda: other.pending == 0, "theirs has a receipt")
        first, second = corrected(theirs, patient_name="A"), corrected(theirs, patient_name="B")
        node.take([first, second])
        accept(node, second)
        node.start()
        wait_for(lambda: node.pending == 0, "the region was told")
        assert served(hub, theirs) == theirs.dataset
        assert stored_bytes(node.store, theirs) == second.dataset
    finally:
        other.stop()


def test_a_node_can_not_speak_for_another_ward(hub: Hub, node: Node) -> None:
    node.ward = replace(node.ward, id="galliera/radiology")  # what its intake writes into the provenance
    node.take([make_instance()])
    node.start()
    wait_for(lambda: node.pending == 0, "it has a receipt")
    assert [match.wards for match in region_rows(hub)] == [("san-martino/radiology",)]


def test_a_region_without_room_puts_off_and_goes_on_by_itself(region: Region, node: Node, hub: Hub) -> None:
    hub.stop()
    full = Hub(replace(hub.settings, archive=replace(hub.settings.archive, free_bytes_min=1 << 60)))
    full.start()
    instances = batch(10)
    node.take(instances)
    node.start()
    wait_for(lambda: node.reported(region).pending == 10, "the backlog is reported")
    full.stop()
    assert node.pending == 10
    assert node.store.index.pending_summary().set_aside == 0
    roomy = Hub(hub.settings)
    roomy.start()
    try:
        wait_for(lambda: node.pending == 0, "it went on")
        check_region(hub, instances)
    finally:
        roomy.stop()
