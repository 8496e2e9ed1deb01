"""Deliveries from ward to ward over a real hub: each is taken once, with its bytes, whatever is stopped,
refused or damaged; and who may hand what to whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from archive.archive import Archive
from archive.errors import Corrupt, Forbidden, InvalidInput, NotFound, SettingsError, Unavailable
from archive.ledger import DeliveryStanding
from archive.ledger import deliveries as book
from archive.model import Level, Location, Query, StoredInstance
from federation import deliveries_service
from federation.deliveries import Deliveries
from federation.deliveries_desk import NOT_LET, DeliveryDesk
from federation.deliveries_grants import Accepted, DeliveryGrants, origin_device, origin_ward
from federation.hub import Hub
from federation.settings import DeliverySettings
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import Node, node_of, open_archive, stored_bytes
from tests.waiting import wait_for

MARTINO, GALLIERA = "san-martino/radiology", "galliera/oncology"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test need not sit through."""
    monkeypatch.setattr(deliveries_service, "TELL_S", 0.1)
    monkeypatch.setattr(book, "PAUSE_FIRST_US", 100_000)


@pytest.fixture
def sender(region: Region, hub: Hub) -> Iterator[Node]:
    node = node_of(region, hub, "San Martino", "Radiology", "SM")
    yield node
    node.stop()


@pytest.fixture
def taker(region: Region, hub: Hub) -> Iterator[Node]:
    node = node_of(region, hub, "Galliera", "Oncology", "GA")
    yield node
    node.stop()


def batch(count: int, **options: Any) -> list[Instance]:
    return [
        make_instance(number=number, study_uid=f"1.2.{number // 50}", **options) for number in range(count)
    ]


def attached(node: Node) -> Node:
    node.start()
    await_attached(node)
    return node


def await_attached(node: Node) -> None:
    uplink = node.uplink
    assert uplink is not None
    wait_for(lambda: uplink.status().attached, "the node is attached")


def deliveries(node: Node) -> Deliveries:
    assert node.uplink is not None
    return Deliveries(node.store, node.ward.id, node.uplink)


def stored(node: Node, instances: Sequence[Instance]) -> list[StoredInstance]:
    found = []
    for one in instances:
        found += node.store.instances(one.study_uid, None, one.sop_instance_uid)
    return found


def standing(region: Region) -> DeliveryStanding:
    return (region.ledger.delivery_standings(0) or [DeliveryStanding("", "")])[0]


def delivered(region: Region, count: int) -> None:
    wait_for(lambda: standing(region).delivered == count, f"{count} deliveries are done")


def check_taken(node: Node, instances: Sequence[Instance]) -> None:
    """Each is there once, with the bytes that the modality sent to the other ward, and as its patient."""
    rows = node.store.search(Query(Level.IMAGE))
    assert sorted(row.instance["SOPInstanceUID"] for row in rows) == sorted(
        one.sop_instance_uid for one in instances
    )
    for one in instances:
        assert stored_bytes(node.store, one) == one.dataset
    for found in stored(node, instances):
        origin = found.head.provenance
        assert (origin.ward, origin.issuer) == (GALLIERA, "SM")
        assert (origin.device, origin.calling_ae) == (origin_device(MARTINO), "CT1")
        assert origin.received_at_us > 1_600_000_000_000_000
    assert node.store.index.totals().conflicts == 0


def test_what_is_handed_over_is_taken_once_and_both_are_its_holders(
    region: Region, hub: Hub, sender: Node, taker: Node
) -> None:
    instances = [*batch(60), make_instance(rows=1500, columns=1500), make_instance(rows=900, columns=900)]
    attached(taker)
    attached(sender).take(instances)
    deliveries(sender).send(GALLIERA, stored(sender, instances))  # most are not in the region yet
    delivered(region, len(instances))
    check_taken(taker, instances)
    wait_for(lambda: taker.pending == 0, "what was taken is known to the region")
    with open_archive(hub.settings.state, outbox=False, read_only=True) as archive:
        assert archive.index.totals().instances == len(instances)
        matches = archive.search(Query(Level.IMAGE))
        assert {match.wards for match in matches} == {(GALLIERA, MARTINO)}
        assert archive.index.totals().conflicts == 0
        studies = archive.search(Query(Level.STUDY))
        assert sum(study.instance_count for study in studies) == len(instances)


def test_ordering_the_same_again_changes_nothing(region: Region, sender: Node, taker: Node) -> None:
    instances = batch(5)
    attached(taker)
    attached(sender).take(instances)
    deliveries(sender).send(GALLIERA, stored(sender, instances))
    deliveries(sender).send(GALLIERA, stored(sender, instances))
    delivered(region, 5)
    before = sum(path.stat().st_size for path in taker.folder.glob("packs/*"))
    deliveries(sender).send(GALLIERA, stored(sender, instances))
    assert standing(region).waiting == 0 and standing(region).delivered == 5
    assert sum(path.stat().st_size for path in taker.folder.glob("packs/*")) == before
    (order,) = region.ledger.audit_rows(act="order deliveries")
    assert (order.who, order.ward, order.subject) == (MARTINO, GALLIERA, "5 instances")


def test_a_ward_that_is_away_gets_it_when_it_comes(region: Region, sender: Node, taker: Node) -> None:
    instances = batch(30)
    attached(sender).take(instances)
    deliveries(sender).send(GALLIERA, stored(sender, instances))
    wait_for(lambda: standing(region).ready == 30, "the region holds all")
    wait_for(lambda: any(one.waiting for one in sender.standings), "the sender knows that it waits")
    assert sender.standings[0].oldest_us > 0
    attached(taker)
    delivered(region, 30)
    check_taken(taker, instances)


def test_what_is_ordered_travels_though_replication_is_held_back(
    region: Region, sender: Node, taker: Node
) -> None:
    handed, kept = batch(3), batch(2)
    sender.take(handed + kept)
    sender.start(hold=True)
    attached(taker)
    await_attached(sender)
    deliveries(sender).send(GALLIERA, stored(sender, handed))
    delivered(region, 3)
    check_taken(taker, handed)
    assert sender.pending == 2


def test_without_a_hub_an_order_is_refused_and_nothing_else_stops(hub: Hub, sender: Node) -> None:
    instances = batch(1)
    attached(sender).take(instances)
    assert sender.uplink is not None
    uplink = sender.uplink
    hub.stop(grace_s=0)
    wait_for(lambda: not uplink.status().attached, "the hub is missed")
    with pytest.raises(Unavailable):
        deliveries(sender).send(GALLIERA, stored(sender, instances))
    sender.take([make_instance(number=9)])


def test_hub_and_wards_are_stopped_in_the_middle(
    region: Region, hub: Hub, sender: Node, taker: Node
) -> None:
    instances = batch(300)
    attached(taker)
    attached(sender).take(instances)
    current = hub
    try:
        for part in range(6):
            await_attached(sender)
            deliveries(sender).send(GALLIERA, stored(sender, instances[part * 50 : part * 50 + 50]))
            if part % 2:
                current.stop(grace_s=0)
                current = Hub(hub.settings)
                current.start()
            else:
                taker.stop()
                taker.start()
        delivered(region, 300)
        check_taken(taker, instances)
    finally:
        current.stop()


def test_a_lost_acknowledgement_is_given_again_and_nothing_is_stored_twice(
    region: Region, sender: Node, taker: Node
) -> None:
    instances = batch(20)
    attached(sender).take(instances)
    deliveries(sender).send(GALLIERA, stored(sender, instances))
    wait_for(lambda: standing(region).ready == 20, "the region holds all")
    taker.take(instances)  # as a node that was killed before it could say so, or a machine of its own
    before = sum(path.stat().st_size for path in taker.folder.glob("packs/*"))
    attached(taker)
    delivered(region, 20)
    assert sum(path.stat().st_size for path in taker.folder.glob("packs/*")) == before


def test_nothing_goes_back_or_on(region: Region, hub: Hub, sender: Node, taker: Node) -> None:
    instances = batch(2)
    other = node_of(region, hub, "Evangelico", "Surgery", "EV")
    attached(taker)
    attached(sender).take(instances)
    deliveries(sender).send(GALLIERA, stored(sender, instances))
    delivered(region, 2)
    taken = stored(taker, instances)
    assert not any(map(deliveries(taker).is_own, taken))
    deliveries(taker).send(MARTINO, taken)  # passed over
    with pytest.raises(Forbidden):
        deliveries(taker).send(other.ward.id, taken)
    assert len(region.ledger.delivery_standings(0)) == 1
    # A node that does not keep to this is kept to it by the hub.
    ours = [replace(one, head=replace(one.head, provenance=replace(one.head.provenance, device="CT1")))
            for one in taken]  # fmt: skip
    deliveries(taker).send(MARTINO, ours)
    assert len(region.ledger.delivery_standings(0)) == 1


def test_who_may_deliver_to_whom(region: Region, sender: Node, taker: Node, hub: Hub) -> None:
    instances = batch(1)
    attached(sender).take(instances)
    with pytest.raises(NotFound):
        deliveries(sender).send("galliera/nobody", stored(sender, instances))
    with pytest.raises(InvalidInput):
        deliveries(sender).send(MARTINO, stored(sender, instances))
    hub.stop(grace_s=0)
    current = Hub(replace(hub.settings, deliveries=(f"{GALLIERA} > *",)))
    current.start()
    try:
        await_attached(sender)
        with pytest.raises(Forbidden):
            deliveries(sender).send(GALLIERA, stored(sender, instances))
        assert region.ledger.delivery_standings(0) == []
    finally:
        current.stop()


def test_what_was_ordered_is_not_delivered_once_the_region_does_not_let_it(
    region: Region, sender: Node, taker: Node, hub: Hub
) -> None:
    instances = batch(3)
    attached(sender).take(instances)
    deliveries(sender).send(GALLIERA, stored(sender, instances))
    wait_for(lambda: standing(region).ready == 3, "the region holds all")
    keys = [one.key for one in region.ledger.next_deliveries(GALLIERA, 0)]
    hub.stop(grace_s=0)
    with open_archive(hub.settings.state, outbox=False, read_only=True) as held:
        for pairs, messages in (["* > *"], 1), ([], 0):  # also of who asks for them by name
            desk = DeliveryDesk(held, region.ledger, DeliveryGrants.of(pairs), lambda: 0)
            assert len(list(desk.messages(GALLIERA, keys))) == messages
    current = Hub(replace(hub.settings, deliveries=(f"{GALLIERA} > *",)))
    current.start()
    try:
        attached(taker)
        wait_for(lambda: standing(region).failed == 3, "they are given up")
        assert standing(region).reason == NOT_LET
        assert taker.archive is not None and taker.archive.index.totals().instances == 0
    finally:
        current.stop()


def test_a_ward_that_does_not_take_from_another_says_so(region: Region, sender: Node, taker: Node) -> None:
    instances = batch(3)
    taker.deliveries = DeliverySettings(accept_from=("evangelico/surgery",))
    attached(taker)
    attached(sender).take(instances)
    deliveries(sender).send(GALLIERA, stored(sender, instances))
    wait_for(lambda: standing(region).failed == 3, "all are refused")
    assert "does not take" in standing(region).reason
    assert taker.store.search(Query(Level.IMAGE)) == []
    taker.stop()
    taker.deliveries = DeliverySettings()
    attached(taker)
    assert region.ledger.retry_deliveries(to_ward=GALLIERA) == 3  # a person asked for it
    delivered(region, 3)
    check_taken(taker, instances)


@pytest.mark.parametrize("on_conflict", ["keep", "refuse"])
def test_another_content_under_its_uid_is_kept_apart_or_refused(
    region: Region, sender: Node, taker: Node, on_conflict: str
) -> None:
    taker.deliveries = DeliverySettings(on_conflict=on_conflict)
    ours = make_instance(number=1, sop_uid="1.2.3.4", study_uid="1.2.3")
    theirs = make_instance(number=2, sop_uid="1.2.3.4", study_uid="1.2.3")
    sender.take([theirs])
    attached(sender)
    wait_for(lambda: sender.pending == 0, "the region has it")
    taker.take([ours])
    attached(taker)
    deliveries(sender).send(GALLIERA, stored(sender, [theirs]))
    if on_conflict == "keep":
        delivered(region, 1)
        taker.store.wait_indexed()
        (row,) = taker.store.index.conflicts()
        assert row.other_digest == theirs.digest
    else:
        wait_for(lambda: standing(region).failed == 1, "it is refused")
        assert "another content" in standing(region).reason
        assert taker.store.index.conflicts() == []
    assert stored_bytes(taker.store, ours) == ours.dataset


def test_a_full_disk_puts_it_off_with_the_reason(region: Region, sender: Node, taker: Node) -> None:
    instances = batch(2)
    attached(sender).take(instances)
    deliveries(sender).send(GALLIERA, stored(sender, instances))
    wait_for(lambda: standing(region).ready == 2, "the region holds all")
    object.__setattr__(taker.store.intake.limits, "free_bytes_min", 1 << 60)
    attached(taker)
    wait_for(lambda: region.ledger.troubled_deliveries(), "it is put off")
    assert "room" in standing(region).reason and standing(region).failed == 0
    wait_for(lambda: any("room" in one.reason for one in taker.standings), "its people can see why")
    assert taker.store.search(Query(Level.IMAGE)) == []
    object.__setattr__(taker.store.intake.limits, "free_bytes_min", 1 << 20)
    delivered(region, 2)
    check_taken(taker, instances)


@pytest.mark.parametrize("rows", [16, 1200])
def test_bytes_that_changed_in_the_region_are_not_delivered(
    region: Region, hub: Hub, sender: Node, taker: Node, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (instance,) = instances = [make_instance(rows=rows, columns=rows)]
    attached(sender).take(instances)
    wait_for(lambda: sender.pending == 0, "the region has it")
    read = Archive.dataset_chunks

    def flipped(self: Archive, location: Location, **options: Any) -> Iterator[bytes]:
        for chunk in read(self, location, **options):
            yield chunk[:-1] + bytes([chunk[-1] ^ 1])

    with monkeypatch.context() as patched:
        patched.setattr(Archive, "dataset_chunks", flipped)
        deliveries(sender).send(GALLIERA, stored(sender, instances))
        attached(taker)
        wait_for(lambda: region.ledger.troubled_deliveries(), "it is put off")
        assert "digest" in standing(region).reason
        assert taker.store.search(Query(Level.IMAGE)) == []
    delivered(region, 1)
    check_taken(taker, [instance])


@pytest.mark.parametrize("rows", [16, 1200])
def test_what_the_region_can_t_read_is_put_off_and_the_others_come(
    region: Region, hub: Hub, sender: Node, taker: Node, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = [make_instance(number=number, rows=rows, columns=rows) for number in range(3)]
    attached(sender).take(instances)
    wait_for(lambda: sender.pending == 0, "the region has all")
    with monkeypatch.context() as patched:
        patched.setattr(Archive, "dataset_chunks", _damaging(Archive.dataset_chunks, instances[1]))
        deliveries(sender).send(GALLIERA, stored(sender, instances))
        attached(taker)
        wait_for(lambda: standing(region).delivered == 2, "the others are taken")
        (row,) = wait_for(region.ledger.troubled_deliveries, "it is on record why one was not")
        assert row.key.sop_instance_uid == instances[1].sop_instance_uid and "checksum" in row.reason
    delivered(region, 3)
    check_taken(taker, instances)


def _damaging(read: Any, instance: Instance) -> Any:
    def damaged(
        self: Archive, location: Location, *, offset: int = 0, chunk_bytes: int = 1 << 20
    ) -> Iterator[bytes]:
        for chunk in read(self, location, offset=offset, chunk_bytes=chunk_bytes):
            if instance.sop_instance_uid.encode() in chunk:
                raise Corrupt("its checksum is wrong")
            yield chunk

    return damaged


def test_pairs_of_wards_are_granted_by_the_region() -> None:
    grants = DeliveryGrants.of([f"{MARTINO} > {GALLIERA}", "* > a/b"])
    grants.require(MARTINO, GALLIERA)
    grants.require(GALLIERA, "a/b")
    for pair in ((GALLIERA, MARTINO), (MARTINO, "c/d")):
        with pytest.raises(Forbidden):
            grants.require(*pair)
    with pytest.raises(Forbidden):
        DeliveryGrants.of([]).require(MARTINO, GALLIERA)
    DeliveryGrants.of(["* > *"]).require(MARTINO, GALLIERA)
    for word in ("all", MARTINO, f"{MARTINO} >", "> a/b", "A/B > c/d"):
        with pytest.raises(SettingsError):
            DeliveryGrants.of([word])


def test_a_node_takes_from_those_it_names() -> None:
    assert Accepted.of(["*"]).takes_from(MARTINO)
    assert Accepted.of([MARTINO]).takes_from(MARTINO) and not Accepted.of([MARTINO]).takes_from(GALLIERA)
    assert not Accepted.of([]).takes_from(MARTINO)
    with pytest.raises(SettingsError):
        Accepted.of(["San Martino"])


def test_the_device_of_a_delivery_says_which_ward_it_came_from() -> None:
    assert origin_ward(origin_device(MARTINO)) == MARTINO
    assert origin_ward("CT1") is None and origin_ward("ward:") is None
