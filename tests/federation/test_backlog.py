"""A node's backlog: what is urgent goes first, also past large objects; what was given up is tried again when
a person says so; a region that is slow or full is waited for within bounds of the node's memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from archive.archive import Archive
from archive.backlog_orders import RETRY, URGENT, BacklogOrders
from archive.errors import InvalidInput, OutOfResources
from archive.handlers import handlers_of
from archive.intake import Intake
from archive.model import Location
from federation.hub import Hub
from federation.settings import BudgetSettings
from tests.datasets import make_instance
from tests.federation.test_replication import check_region, region_rows
from tests.federation.wards import Node
from tests.waiting import wait_for


def pending_studies(node: Node) -> set[str]:
    node.store.wait_indexed()
    return {row.study_uid for row in node.store.index.pending(1000)}


def test_an_urgent_study_passes_large_objects_that_fill_the_line(hub: Hub, node: Node) -> None:
    """Every ordinary stream is busy for a minute with what fills the budget."""
    large = [make_instance(study_uid="1.2.1", number=number, padding=8_000_000) for number in range(7)]
    node.take(large)
    node.start(budget=(BudgetSettings(1e6),), zstd=False, push_streams=2)
    assert node.uplink is not None
    wait_for(lambda: list(hub.settings.state.glob("large/*.part")), "a large object is on its way")
    node.take([make_instance(study_uid="1.2.2"), make_instance(study_uid="1.2.3")])
    orders = BacklogOrders(node.store, node.ward.id, node.uplink.ordered).handlers()
    assert orders[URGENT]({"study": "1.2.3"}, "anna") == "1 instances go before the others"
    wait_for(lambda: "1.2.3" not in pending_studies(node), "the urgent study has its receipt", 5)
    assert pending_studies(node) == {"1.2.1", "1.2.2"}
    assert orders[URGENT]({"study": "1.2.3"}, "anna") == "nothing of this study waits for the region"
    with pytest.raises(InvalidInput):
        orders[URGENT]({}, "anna")


class Refused(Archive):
    """What is pushed of it arrives wrong, each time; what it reads to look whether it is sound is right."""

    reads = 0

    def dataset_chunks(
        self, location: Location, *, offset: int = 0, chunk_bytes: int = 1 << 20
    ) -> Iterator[bytes]:
        self.reads += 1
        wrong = self.reads % 2 == 1
        for chunk in super().dataset_chunks(location, offset=offset, chunk_bytes=chunk_bytes):
            yield chunk[:-1] + bytes([chunk[-1] ^ 1]) if wrong else chunk


def test_what_is_refused_is_set_aside_and_tried_again_on_demand(hub: Hub, node: Node) -> None:
    poison = make_instance()
    node.store.__class__ = Refused
    node.take([poison])
    node.start(tries_max=2)
    wait_for(lambda: node.store.index.pending_summary().set_aside == 1, "it was set aside")
    ((uid, digest, reason),) = node.store.index.set_aside()
    assert (uid, digest) == (poison.sop_instance_uid, poison.digest)
    assert reason == "the bytes that arrived do not match their digest (2 times)"
    node.store.__class__ = Archive
    retry = handlers_of(node.store, node.ward.id)[RETRY]
    with pytest.raises(InvalidInput):
        retry({"uid": "1.2.3.4.5"}, "anna")
    assert retry({"uid": uid}, "anna") == "1 instances are tried again"
    wait_for(lambda: node.pending == 0, "it has a receipt")
    check_region(hub, [poison])
    assert retry({}, "anna") == "nothing is set aside"


def held_bytes_max(node: Node) -> int:
    assert node.uplink is not None and node.uplink._delivery is not None
    return node.uplink._delivery.held_bytes_max


def test_a_region_that_is_slow_is_waited_for_within_the_nodes_memory(
    hub: Hub, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, begin = threading.Event(), Intake.begin

    def blocked(self: Intake, *args: Any, **options: Any) -> Any:
        if not goes_on.wait(60):
            raise OutOfResources("nobody let it go on")
        return begin(self, *args, **options)

    instances = [make_instance(number=number, padding=600_000) for number in range(60)]
    instances += [make_instance(number=100 + number, padding=4_000_000) for number in range(6)]
    node.take(instances)
    with monkeypatch.context() as patched:
        patched.setattr(Intake, "begin", blocked)
        try:
            node.start(zstd=False)
            wait_for(lambda: held_bytes_max(node) > 0, "it writes")
            wait_for(lambda: sent_and_stuck(node), "it is stopped")
            assert sent_bytes(node) < 30e6, "the rest waits on disk"
            assert node.pending == len(instances)
        finally:
            goes_on.set()
    wait_for(lambda: node.pending == 0, "it went on by itself", 60)
    check_region(hub, instances)
    assert held_bytes_max(node) <= node.settings.push_streams * (2 << 20) + (1 << 20)


def sent_bytes(node: Node) -> int:
    assert node.uplink is not None and node.uplink._delivery is not None
    return node.uplink._delivery.bytes_sent


def sent_and_stuck(node: Node) -> bool:
    """Whether nothing more was written for a while."""
    before = sent_bytes(node)
    return before > 0 and not threading.Event().wait(0.5) and sent_bytes(node) == before


def test_a_region_without_room_is_waited_for_and_it_goes_on_by_itself(
    hub: Hub, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = [make_instance(number=number, padding=300_000) for number in range(20)]
    refused = threading.Event()

    def full(self: Intake, size: int) -> None:
        refused.set()
        raise OutOfResources("not enough room on the disk for instances")

    with monkeypatch.context() as patched:
        node.take(instances)
        patched.setattr(Intake, "require_space", full)
        node.start()
        assert refused.wait(20)
        assert region_rows(hub) == []
    wait_for(lambda: node.pending == 0, "it went on by itself")
    assert node.store.index.pending_summary().set_aside == 0
    check_region(hub, instances)
