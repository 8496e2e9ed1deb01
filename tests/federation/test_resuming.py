"""A large object whose push is cut goes on where it was: what crosses the line again is little, whoever was
cut, and the region keeps nothing of it that its digest does not vouch for."""

from __future__ import annotations

import os
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest

from federation import abilities, receiving
from federation.hub import Hub
from federation.replicator import Received, Verdict
from protos import uplink_pb2
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.relays import Relay
from tests.federation.test_receiving import WARD, begin
from tests.federation.wards import Node, open_archive, stored_bytes
from tests.waiting import wait_for

MEGABYTES = int(os.environ.get("MISS_TEST_RESUME_MB", "20"))
LINE = 60e6
AGAIN_MAX = 0.05 if MEGABYTES >= 500 else 0.2  # messages on the way weigh more on a small object


def large() -> Instance:
    made, padding = make_instance(), os.urandom(MEGABYTES * 1_000_000)
    trailing = struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, len(padding))  # PS3.5 7.1.2
    return replace(made, dataset=made.dataset + trailing + padding)


def begun_bytes(hub: Hub) -> int:
    """What the hub has on disk of an object that is not whole."""
    sizes = [0]
    for path in hub.settings.state.glob("large/*.part"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return max(sizes)


def half_way(hub: Hub, instance: Instance) -> None:
    wait_for(lambda: begun_bytes(hub) >= len(instance.dataset) / 2, "half of it is there", 60)


def arrived(hub: Hub, node: Node, instance: Instance) -> None:
    wait_for(lambda: node.pending == 0, "it has a receipt", 120)
    with open_archive(hub.settings.state, outbox=False, read_only=True) as archive:
        assert stored_bytes(archive, instance) == instance.dataset
    assert list(hub.settings.state.glob("large/*.part")) == []
    assert list(hub.settings.state.glob("partial/*")) == []


def test_a_line_that_is_cut_half_way_costs_little(hub: Hub, node: Node) -> None:
    instance = large()
    with Relay(hub.port, LINE) as relay:
        node.take([instance])
        node.start(hub_address=relay.address, zstd=False)
        half_way(hub, instance)
        relay.cut()
        arrived(hub, node, instance)
        again = relay.passed / len(instance.dataset) - 1
    print(f"{len(instance.dataset) / 1e6:.0f} MB cut half way: {again:.1%} was sent again")
    assert again < AGAIN_MAX


def test_a_line_that_falls_silent_one_way_costs_little(hub: Hub, node: Node) -> None:
    """The hub hears nothing and does not know that the node gave up: the offer tells it."""
    instance = large()
    with Relay(hub.port, LINE) as relay:
        node.take([instance])
        node.start(hub_address=relay.address, zstd=False)
        half_way(hub, instance)
        relay.silent = True
        node.leave()  # as a node that is restarted, or whose keepalive is over
        relay.silent = False
        before = relay.passed
        node.start(hub_address=relay.address, zstd=False)
        arrived(hub, node, instance)
        assert relay.passed - before < 0.75 * len(instance.dataset)


def test_a_hub_that_is_restarted_half_way_goes_on(region: Region, hub: Hub, node: Node) -> None:
    instance = large()
    again = Hub(hub.settings)
    with Relay(hub.port, LINE) as relay:
        node.take([instance])
        node.start(hub_address=relay.address, zstd=False)
        half_way(hub, instance)
        hub.stop(grace_s=0)
        again.start()
        try:
            arrived(again, node, instance)
            assert relay.passed < (1 + 2 * AGAIN_MAX) * len(instance.dataset)
        finally:
            again.stop()


@pytest.mark.parametrize("old", ["hub", "node"])
def test_who_can_not_resume_begins_anew(
    hub: Hub, node: Node, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old == "node":
        monkeypatch.setattr(abilities, "OURS", ())
    else:
        monkeypatch.setattr(receiving, "RESUMABLE_BYTES_MIN", 1 << 60)
        monkeypatch.setattr(abilities, "shared", lambda theirs: frozenset())
    instance = large()
    with Relay(hub.port, LINE) as relay:
        node.take([instance])
        node.start(hub_address=relay.address, zstd=False)
        half_way(hub, instance)
        relay.cut()
        arrived(hub, node, instance)
        assert relay.passed > 1.3 * len(instance.dataset)


def test_what_is_wrong_at_the_hub_is_found_and_sent_anew(
    region: Region, hub: Hub, node: Node
) -> None:
    instance = large()
    again = Hub(hub.settings)
    with Relay(hub.port, LINE) as relay:
        node.take([instance])
        node.start(hub_address=relay.address, zstd=False)
        half_way(hub, instance)
        hub.stop(grace_s=0)
        (part,) = hub.settings.state.glob("large/*.part")
        flip(part, 5 << 20)
        again.start()
        try:
            arrived(again, node, instance)
            assert node.store.index.pending_summary().set_aside == 0
        finally:
            again.stop()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_an_offer_ends_the_stream_on_which_the_object_still_hangs(tmp_path: Path) -> None:
    instance = make_instance(rows=2200, columns=2200)
    item = uplink_pb2.OfferItem(
        sop_instance_uid=instance.sop_instance_uid, digest=instance.digest, size=len(instance.dataset)
    )
    with open_archive(tmp_path / "hub", outbox=False) as archive:
        receiver = receiving.Receiver(archive, lambda: time.time_ns() // 1000)
        first, second = receiver.incoming(WARD), receiver.incoming(WARD)
        started = begin(instance)
        started.digest = instance.digest
        chunks = [instance.dataset[at : at + (1 << 20)] for at in range(0, len(instance.dataset), 1 << 20)]
        taken = first.take(
            [uplink_pb2.PushRequest(begin=started), *(uplink_pb2.PushRequest(chunk=c) for c in chunks[:5])]
        )
        assert taken.error is None
        assert receiver.verdicts("galliera/ct", [item]) == [Verdict(None)]
        assert receiver.verdicts(WARD, [item]) == [Verdict(None, 5 << 20)]
        assert first.take([uplink_pb2.PushRequest(chunk=chunks[5])]).error is not None
        started.offset = 5 << 20
        end = uplink_pb2.PushRequest(end=uplink_pb2.PushEnd(digest=instance.digest))
        rest = [uplink_pb2.PushRequest(chunk=chunk) for chunk in chunks[5:]]
        taken = second.take([uplink_pb2.PushRequest(begin=started), *rest, end])
        assert (taken.error, taken.refused) == (None, [])
        (receipt,) = receiver.settle(WARD, taken.pushed)
        assert isinstance(receipt, Received) and receipt.digest == instance.digest
        assert stored_bytes(archive, instance) == instance.dataset
