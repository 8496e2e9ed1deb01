"""A node of the last release works with this hub, and this node with a hub of the last release; who speaks no
common protocol is told which side to update."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from archive.model import Level, Query, Ward
from certs.identity import Identity
from federation import attach_service, attaching
from federation.hub import Hub
from federation.region_source import RegionSource
from tests.datasets import make_instance
from tests.federation.earlier import HUB, NODE, Earlier, extract
from tests.federation.regions import Region
from tests.federation.wards import EVA, Node, Regional, hub_settings, node_of
from tests.waiting import wait_for

WARD = Ward("san-martino/radiology", "San Martino", "Radiology", "SM")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract(tmp_path_factory.mktemp("earlier"))


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    with Hub(hub_settings(region)) as hub:
        yield hub


def test_a_node_of_this_release_at_a_hub_of_the_last(source: Path, tmp_path: Path) -> None:
    (tmp_path / "region").mkdir()
    with Earlier(source, HUB, tmp_path / "region") as earlier:
        identity = Identity.load(Path(earlier.begun["identity"]))
        node = Node(WARD, identity, tmp_path / "node")
        node.take(make_instance(study_uid="1.2.1", number=number) for number in range(40))
        node.take([make_instance(study_uid="1.2.1", number=99, rows=1200, columns=1200)])
        node.start()
        wait_for(lambda: node.pending == 0, "everything has a receipt")
        assert node.uplink is not None and node.uplink.policy is not None  # that release lays one down
        wait_for(lambda: earlier.ask("search")["states"] == ["up-to-date"], "it reported")
        assert earlier.ask("search")["instances"] == 41
        node.leave()
        node.start(hold=True)
        node.take(make_instance(study_uid="1.2.2", number=number) for number in range(100, 110))
        wait_for(lambda: earlier.ask("report") == {"attached": True, "pending": 10}, "it reported")
        assert earlier.ask("search") == {"instances": 51, "pending": 1, "states": ["answered"]}
        assert earlier.ask("read", study="1.2.2") == {"instances": 10}
        wait_for(lambda: node.pending == 0, "what a reader asked for has a receipt")
        node.stop()


def test_a_node_of_the_last_release_at_this_hub(source: Path, region: Region, hub: Hub) -> None:
    ward = region.add_ward(WARD.hospital, WARD.name, WARD.issuer)
    identity = region.node(ward, hub.address)
    with Earlier(source, NODE, identity.folder, region.folder / "node") as earlier:
        earlier.ask("take", study="1.2.1", numbers=[0, 40])
        earlier.ask("take", study="1.2.1", numbers=[90, 91], rows=1200)
        earlier.ask("start", hold=False)
        wait_for(lambda: earlier.ask("stand")["pending"] == 0, "everything has a receipt")
        with Regional(region, hub) as regional:
            assert counted(regional) == 41
            earlier.ask("start", hold=True)
            earlier.ask("take", study="1.2.2", numbers=[100, 110])
            states = region.ledger.ward_states
            wait_for(lambda: states()[ward.id].attached and states()[ward.id].pending == 10, "it reported")
            assert counted(regional) == 51
            assert all(one.covered for one in regional.search(EVA, Query(Level.STUDY)).coverage)


def counted(source: RegionSource) -> int:
    return sum(match.instance_count for match in source.search(EVA, Query(Level.STUDY)).matches)


@pytest.fixture
def node(region: Region, hub: Hub) -> Iterator[Node]:
    node = node_of(region, hub, "San Martino", "Radiology", "SM")
    yield node
    node.stop()


def reason(node: Node) -> str:
    assert node.uplink is not None
    return node.uplink.status().reason


def test_a_node_that_speaks_too_old_a_protocol_is_told_to_be_updated(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attach_service, "PROTOCOL_OLDEST", 2)
    node.start()
    wait_for(lambda: "update the node" in reason(node), "it was refused in words")
    assert "speaks protocol 1, the hub 2 or newer" in reason(node)
    assert "update the node" in caplog.text and "san-martino/radiology" in caplog.text


def test_a_hub_that_speaks_too_old_a_protocol_is_named(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "PROTOCOL_OLDEST", 2)
    monkeypatch.setattr(attaching, "PROTOCOL", 3)
    node.start()
    wait_for(lambda: "update the hub" in reason(node), "it says so in words")
    assert "speaks protocol 1, this node 2 to 3" in reason(node)


def test_a_newer_node_speaks_the_hubs_protocol(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "PROTOCOL", 2)
    node.take([make_instance()])
    node.start()
    wait_for(lambda: node.pending == 0, "it is attached")
