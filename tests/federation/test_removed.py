"""Removals between a ward and the region, over real gRPC and TLS: by rejection notes that go with the images,
by facts, and what comes late resurrects nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from archive.archive import Archive
from archive.model import Level, Query
from archive.removals import Purge, Removal, fact_of, fact_of_purge
from archive.removing import Removing
from archive.space.pace import Pace
from federation import facts_service
from federation.facts_exchange import FactsExchange
from federation.hub import Hub
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import EVA, Node, Regional, node_of
from tests.rejections import note_about
from tests.waiting import wait_for

MARTINO = "san-martino/radiology"
STUDY = "1.2.3"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_service, "GATHER_S", 0.02)


@pytest.fixture
def martino(region: Region, hub: Hub) -> Iterator[Node]:
    node = node_of(region, hub, "San Martino", "Radiology", "SM")
    yield node
    node.stop()


@pytest.fixture
def galliera(region: Region, hub: Hub) -> Iterator[Node]:
    node = node_of(region, hub, "Galliera", "Oncology", "GA")
    yield node
    node.stop()


def with_facts(node: Node) -> Node:
    node.parts = lambda archive, identity: [FactsExchange(archive, identity.ward, lambda fact, reason: None)]
    return node


def images(count: int = 3) -> list[Instance]:
    return [make_instance(study_uid=STUDY, series_uid=f"{STUDY}.1", sop_uid=f"{STUDY}.1.{n}", number=n,
                          padding=20_000) for n in range(1, count + 1)]  # fmt: skip


def regional(hub: Hub) -> Archive:
    assert hub._writer is not None
    return hub._writer.archive


def shown(archive: Archive) -> set[str]:
    return {one.instance["SOPInstanceUID"] for one in archive.search(Query(Level.IMAGE))}


def uids(instances: list[Instance]) -> set[str]:
    return {one.sop_instance_uid for one in instances}


def replicated(node: Node) -> None:
    wait_for(lambda: node.pending == 0, "the region has all of it")


def test_a_rejection_travels_with_the_images_and_needs_nothing_else(hub: Hub, martino: Node) -> None:
    one = images()
    martino.take(one)
    martino.start()
    replicated(martino)
    assert shown(regional(hub)) == uids(one)
    martino.take([note_about(one[:2], "113037")])
    replicated(martino)
    wait_for(lambda: shown(regional(hub)) == uids(one[2:]), "the region hides them")
    here = {t.removal for t in martino.store.index.removals()}
    assert here == {t.removal for t in regional(hub).index.removals()}, "both came to the same removals"


def test_what_was_rejected_before_it_was_sent_is_hidden_when_it_comes(hub: Hub, martino: Node) -> None:
    one = images()
    martino.take([*one, note_about(one[:1], "113038")])
    martino.start()
    replicated(martino)
    assert shown(regional(hub)) == uids(one[1:])
    assert regional(hub).index.has_content(one[0].sop_instance_uid, one[0].digest), "it is there, hidden"


def test_a_ward_rejects_nothing_of_another_ward(hub: Hub, martino: Node, galliera: Node) -> None:
    one = images()
    martino.take(one)
    martino.start()
    replicated(martino)
    galliera.take([note_about(one, "113037")])
    galliera.start()
    replicated(galliera)
    assert uids(one) <= shown(regional(hub))


def test_a_late_push_resurrects_nothing(hub: Hub, martino: Node) -> None:
    one = images()
    martino.take(one, at_us=1_000_000)
    at_us = time.time_ns() // 1000
    removal = Removal("ab" * 16, Level.STUDY, STUDY, STUDY, "", "maria", "wrong", at_us, "")
    regional(hub).record_facts([fact_of(removal)])
    martino.start()
    replicated(martino)
    assert shown(regional(hub)) == set()
    assert len(regional(hub).index.removed_under(removal, 10)) == len(one)


def test_what_a_ward_removed_is_hidden_from_everybody_and_comes_back(
    region: Region, hub: Hub, martino: Node
) -> None:
    one = images()
    with_facts(martino).take(one)
    martino.start()
    replicated(martino)
    removing = Removing(martino.store, MARTINO)
    words = removing.remove({"level": "study", "uid": STUDY, "reason": "x", "code": "113001"}, "anna")
    wait_for(lambda: shown(regional(hub)) == set(), "the region hides it")
    with Regional(region, hub) as source:
        assert source.search(EVA, Query(Level.STUDY)).matches == []
    removing.undo({"id": words.partition(":")[0]}, "anna")
    wait_for(lambda: shown(regional(hub)) == uids(one), "the region shows it again")


def test_what_waits_at_a_ward_and_was_removed_is_told_to_nobody(
    region: Region, hub: Hub, martino: Node
) -> None:
    one = images()
    martino.take(one)
    removing = Removing(martino.store, MARTINO)
    removing.remove({"level": "instance", "uid": f"{STUDY}.1.1", "reason": "x", "code": "113001"}, "anna")
    pending = martino.store.search(Query(Level.IMAGE, pending_only=True))
    assert {match.instance["SOPInstanceUID"] for match in pending} == uids(one[1:])
    assert martino.pending == 3, "it still goes to the region"


def test_a_ward_gives_back_what_the_region_purged(hub: Hub, martino: Node) -> None:
    one = images()
    with_facts(martino).take(one)
    martino.start()
    replicated(martino)
    removing = Removing(regional(hub), "")
    removing.remove({"level": "study", "uid": STUDY, "reason": "x", "code": "113001"}, "anna")
    (tombstone,) = regional(hub).index.removals()
    wait_for(lambda: shown(martino.store) == set(), "the ward hides it")
    told = fact_of_purge(Purge(tombstone.removal.id, STUDY, "anna", tombstone.removal.at_us + 1, ""))
    regional(hub).record_facts([told])
    wait_for(lambda: martino.store.index.removals()[0].final, "the ward knows")
    assert Removing(martino.store, MARTINO).look(Pace(1e12)).contents == len(one)
    martino.take(one)
    assert shown(martino.store) == set() and martino.pending == 0
