"""Restoring over a real hub: what a ward evicted, what is damaged at it and what went with its disk comes
back whole, with its bytes and its provenance; and nobody gets what is not his."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from archive.archive import Archive
from archive.errors import InvalidInput, OutOfResources, Unavailable
from archive.model import Fact, FactKind, Level, Query
from archive.space.eviction import EvictionRequest
from certs.identity import Identity
from federation import restoring, restoring_service
from federation.hub import Hub
from federation.line import LinePart
from federation.restoring import Restoring
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import Node, node_of, stored_bytes
from tests.waiting import wait_for

WAIT_S = 20.0


def ward(region: Region, hub: Hub, hospital: str = "San Martino", issuer: str = "SM") -> Node:
    node = node_of(region, hub, hospital, "Radiology", issuer)
    node.parts = _restoring
    return node


def _restoring(archive: Archive, identity: Identity) -> Sequence[LinePart]:
    return (Restoring(archive, identity.ward),)


@pytest.fixture
def node(region: Region, hub: Hub) -> Iterator[Node]:
    node = ward(region, hub)
    yield node
    node.stop()


def part(node: Node) -> Restoring:
    assert node.uplink is not None
    (found,) = [one for one in node.uplink._parts if isinstance(one, Restoring)]
    return found


def ready(node: Node) -> Restoring:
    """Attached, and everything has its receipt."""
    if node.uplink is None:
        node.start()
    found = part(node)
    wait_for(lambda: found.is_ready, "the node can bring things back")
    wait_for(lambda: node.pending == 0, "the region has everything")
    return found


def keys(instances: Sequence[Instance]) -> list[tuple[str, bytes]]:
    return [(one.sop_instance_uid, one.digest) for one in instances]


def batch(count: int, study: str = "1.2.7") -> list[Instance]:
    return [make_instance(number=number, study_uid=study, sop_uid=f"{study}.{number}")
            for number in range(1, count + 1)]  # fmt: skip


def evict(node: Node, study: str = "1.2.7") -> int:
    request = EvictionRequest(time.time_ns() // 1000 + 10**9, study_uid=study)
    return node.store.upkeep.evict(request).result(WAIT_S).instances


def evicted(node: Node, instances: Sequence[Instance]) -> int:
    node.store.wait_indexed()
    places = node.store.index.places(one.sop_instance_uid for one in instances)
    return sum(places[key].evicted for key in keys(instances))


def test_what_was_evicted_is_whole_again_with_its_bytes_and_provenance(node: Node) -> None:
    instances = [*batch(130), make_instance(number=900, study_uid="1.2.7", rows=1500, columns=1500)]
    node.take(instances)
    found = ready(node)
    before = {one.head.sop_instance_uid: one.head for one in node.store.instances("1.2.7")}
    assert evict(node) == evicted(node, instances) == 131
    assert found.bring_blocking(keys(instances), WAIT_S) == frozenset(keys(instances))
    assert evicted(node, instances) == 0
    for one in instances:
        assert stored_bytes(node.store, one) == one.dataset
    assert {one.head.sop_instance_uid: one.head for one in node.store.instances("1.2.7")} == before
    assert node.pending == 0  # its receipts still count
    assert evict(node) == 131  # and it may go again
    assert found.bring_blocking(keys(instances), WAIT_S, urgent=True) == frozenset(keys(instances))


def test_what_is_damaged_is_repaired(node: Node) -> None:
    instances = batch(3)
    node.take(instances)
    found = ready(node)
    hurt = instances[1]
    node.store.record_facts([Fact(FactKind.DAMAGE, hurt.sop_instance_uid, hurt.digest, "", 1)])
    assert not node.store.index.has_content(hurt.sop_instance_uid, hurt.digest)
    assert found.bring_blocking(keys([hurt]), WAIT_S) == frozenset(keys([hurt]))
    assert stored_bytes(node.store, hurt) == hurt.dataset
    assert node.store.index.standings([hurt.sop_instance_uid])[hurt.sop_instance_uid].damaged is False


def test_a_new_disk_gets_its_instances_back(region: Region, hub: Hub, node: Node, tmp_path: Path) -> None:
    instances = batch(5)
    node.take(instances)
    ready(node)
    before = [one.head for one in node.store.instances("1.2.7")]
    node.stop()
    node.folder = tmp_path / "new-disk"
    found = ready(node)
    assert node.store.index.totals().instances == 0
    assert found.bring_blocking(keys(instances), WAIT_S) == frozenset(keys(instances))
    assert [one.head for one in node.store.instances("1.2.7")] == before
    wait_for(lambda: node.pending == 0, "the region says again that it has them")


def test_a_ward_gets_what_it_holds_and_nothing_else(region: Region, hub: Hub, node: Node) -> None:
    own, foreign, both = batch(1), batch(2, "1.2.8"), batch(1, "1.2.9")
    other = ward(region, hub, "Galliera", "GA")
    try:
        node.take([*own, *both])
        ready(node)
        other.take([*foreign, *both])
        theirs = ready(other)
        wanted = keys([*own, *foreign, *both])
        assert part(node).bring_blocking(wanted, WAIT_S) == frozenset(keys([*own, *both]))
        assert node.store.search(Query(Level.STUDY, (("StudyInstanceUID", "1.2.8"),))) == []
        assert evict(other, "1.2.9") == 1  # whose first holder is the other ward
        assert theirs.bring_blocking(keys(both), WAIT_S) == frozenset(keys(both))
        (found,) = other.store.instances("1.2.9")
        assert (found.head.provenance.ward, found.head.provenance.issuer) == (other.ward.id, "GA")
    finally:
        other.stop()


def test_bytes_that_the_region_lost_are_never_taken_for_them(
    region: Region, hub: Hub, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = batch(3)
    node.take(instances)
    found = ready(node)
    assert evict(node) == 3
    given = restoring_service.given_back

    def flipped(*asked: Any) -> Any:
        for message in given(*asked):
            whole = message.group.objects[1]
            whole.dataset = whole.dataset[:-1] + bytes([whole.dataset[-1] ^ 1])
            yield message

    monkeypatch.setattr(restoring_service, "given_back", flipped)
    here = found.bring_blocking(keys(instances), WAIT_S)
    assert here == frozenset(keys([instances[0], instances[2]]))
    assert evicted(node, instances) == 1
    monkeypatch.undo()
    assert found.bring_blocking(keys(instances), WAIT_S) == frozenset(keys(instances))


def test_without_a_line_it_says_so_and_nothing_is_half_here(
    region: Region, hub: Hub, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = batch(40)
    node.take(instances)
    found = ready(node)
    assert evict(node) == 40
    given = restoring_service.given_back
    monkeypatch.setattr("federation.outgoing.GROUP_OBJECTS_MAX", 4)

    def broken(*asked: Any) -> Any:
        for count, message in enumerate(given(*asked)):
            if count == 3:
                raise OSError(5, "the disk of the region")
            yield message

    monkeypatch.setattr(restoring_service, "given_back", broken)
    with pytest.raises(Unavailable):
        found.bring_blocking(keys(instances), WAIT_S)
    monkeypatch.setattr(restoring_service, "given_back", given)
    assert 28 <= evicted(node, instances) <= 40  # what had come before it broke is kept
    assert found.bring_blocking(keys(instances), WAIT_S) == frozenset(keys(instances))
    assert evict(node) == 40
    hub.stop()
    wait_for(lambda: not found.is_ready, "the line is gone")
    with pytest.raises(Unavailable, match=restoring.NO_LINE):
        found.bring_blocking(keys(instances), WAIT_S)
    node.leave()
    with pytest.raises(Unavailable, match=restoring.NO_LINE):
        found.bring_blocking(keys(instances), WAIT_S)


def test_a_disk_without_room_takes_nothing_back(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = batch(2)
    node.take(instances)
    found = ready(node)
    assert evict(node) == 2
    intake = node.store.intake
    monkeypatch.setattr(intake, "limits", replace(intake.limits, free_bytes_min=1 << 60))
    with pytest.raises(OutOfResources):
        found.bring_blocking(keys(instances), WAIT_S)
    assert evicted(node, instances) == 2


def test_a_hub_of_an_older_release_is_not_asked(
    hub: Hub, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federation.abilities.OURS", ())
    instances = batch(1)
    node.take(instances)
    node.start()
    wait_for(lambda: node.pending == 0, "the region has everything")
    assert evict(node) == 1
    with pytest.raises(Unavailable, match=restoring.TOO_OLD):
        part(node).bring_blocking(keys(instances), WAIT_S)


def test_the_hub_bounds_what_a_ward_asks(
    hub: Hub, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = batch(3)
    node.take(instances)
    found = ready(node)
    assert evict(node) == 3
    monkeypatch.setattr(restoring_service, "KEYS_MAX", 2)
    with pytest.raises(Unavailable) as refused:
        found.bring_blocking(keys(instances), WAIT_S)
    assert isinstance(refused.value.__cause__, InvalidInput)
    monkeypatch.setattr(restoring, "PAGE", 2)  # more than one call
    monkeypatch.setattr(restoring, "BUSY_PAUSE_S", 0.01)
    monkeypatch.setattr(restoring_service, "FETCHES_PER_WARD_MAX", 0)
    with pytest.raises(Unavailable) as refused:
        found.bring_blocking(keys(instances), WAIT_S)
    assert isinstance(refused.value.__cause__, OutOfResources)
    monkeypatch.setattr(restoring_service, "FETCHES_PER_WARD_MAX", 4)
    assert found.bring_blocking(keys(instances), WAIT_S) == frozenset(keys(instances))
