"""Bytes that change between node and region, where nothing below notices: between the node's disk and TLS,
or between TLS and the region's intake. The region gives no receipt for them, the node sends them again, and
what arrives in the end is what the modality stored."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from archive.model import START, FactKind, Record
from archive.packs.storage import Buffer
from federation.delivery import Delivery
from federation.hub import Hub
from federation.push_wire import Chunk, Group, PushMessage
from federation.receiving import Incoming, Receiver, Taken
from protos import uplink_pb2
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import Node, hub_settings, node_of, open_archive
from tests.waiting import wait_for

FLIPS = int(os.environ.get("MISS_TEST_FLIPS", "12"))
SMALL, LARGE = 60, 2


class Flipping:
    """Flips one byte in each `each`-th message of objects' bytes, until `FLIPS` were flipped; and keeps what
    receipts were given for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: int) -> None:
        self.chance = random.Random(each)
        self.each = each
        self.seen = 0
        self.kinds: list[str] = []
        self._lock = threading.Lock()
        take = Incoming.take

        def flipped_take(incoming: Incoming, messages: Sequence[PushMessage]) -> Taken:
            return take(incoming, [self.maybe_flipped(message) for message in messages])

        monkeypatch.setattr(Incoming, "take", flipped_take)

    def maybe_flipped(self, message: PushMessage) -> PushMessage:
        if isinstance(message, Group):
            kind = "group"
        elif isinstance(message, Chunk):
            kind = "chunk"
        else:
            kind = str(message.WhichOneof("message"))
        if kind not in ("group", "zstd_group", "chunk", "zstd_chunk"):
            return message
        with self._lock:
            self.seen += 1
            if self.seen % self.each or len(self.kinds) >= FLIPS:
                return message
            self.kinds.append(kind)
        if isinstance(message, Chunk):
            return Chunk(self.flipped(message.data))
        if isinstance(message, Group):
            wholes = list(message.objects)
            place = self.chance.randrange(len(wholes))
            wholes[place] = replace(wholes[place], dataset=self.flipped(wholes[place].dataset))
            return replace(message, objects=wholes)
        made = uplink_pb2.PushRequest()
        made.CopyFrom(message)
        setattr(made, kind, self.flipped(getattr(made, kind)))
        return made

    def flipped(self, octets: Buffer) -> bytes:
        changed = bytearray(octets)
        changed[self.chance.randrange(len(changed))] ^= 1 << self.chance.randrange(8)
        return bytes(changed)


def corpus() -> list[Instance]:
    """Small ones, and some that go in chunks and are resumed; zstd makes something of them."""
    return [padded(number, 8_000) for number in range(SMALL)] + [
        padded(number, 9_000_000) for number in range(SMALL, SMALL + LARGE)
    ]


def padded(number: int, size: int) -> Instance:
    made = make_instance(number=number, rows=0)
    padding = random.Random(number).randbytes(1_000) * (size // 1_000)
    trailing = struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, len(padding))  # PS3.5 7.1.2
    return replace(made, dataset=made.dataset + trailing + padding)


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    with Hub(hub_settings(region)) as hub:
        yield hub


@pytest.fixture
def node(region: Region, hub: Hub) -> Iterator[Node]:
    node = node_of(region, hub, "San Martino", "Radiology", "SM")
    yield node
    node.stop()


def always_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the line is worth, everything goes as zstd frames."""
    begin = Delivery.__init__

    def begun(delivery: Delivery, *arguments: object, **options: object) -> None:
        begin(delivery, *arguments, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(type(delivery._pushing), "level", property(lambda pushing: 1))

    monkeypatch.setattr(Delivery, "__init__", begun)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_byte_gets_no_receipt_and_is_sent_again(
    region: Region, hub: Hub, node: Node, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    if compressed:
        always_compressed(monkeypatch)
    flipping = Flipping(monkeypatch, each=3)
    promised = receipts_of(monkeypatch)
    instances = corpus()
    digests = {one.sop_instance_uid: one.digest for one in instances}
    node.take(instances)
    node.start(tries_max=100, zstd=compressed)  # chance may flip in one object again and again
    wait_for(lambda: node.pending == 0, "everything has a receipt", 60)
    assert len(flipping.kinds) >= FLIPS // 2
    assert {kind.startswith("zstd") for kind in flipping.kinds} == {compressed}
    assert node.store.index.pending_summary().set_aside == 0
    assert promised() and all(digests[uid] == digest for uid, digest in promised())
    receipts = [fact for batch in node.store.facts.read() for fact in batch.facts
                if fact.kind is FactKind.RECEIPT]
    assert {fact.sop_instance_uid: fact.digest for fact in receipts} == digests
    node.stop()
    hub.stop()
    with open_archive(hub.settings.state, outbox=False) as archive:
        held = [item for item in archive.packs.read(START, archive.packs.log.durable)]
        assert all(isinstance(item, Record) for item in held) and len(held) == len(instances)
        for item in held:
            assert isinstance(item, Record) and item.digest == digests[item.head.sop_instance_uid]
            archive.packs.verify(item.head, item.digest, item.location)
        assert archive.index.totals().conflicts == 0


def receipts_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[str, bytes]]]:
    """What the region gave receipts for: each was whole on its disk when it did."""
    given: list[tuple[str, bytes]] = []
    settle = Receiver.settle

    def settled(receiver: Receiver, *arguments: object) -> object:
        receipts = settle(receiver, *arguments)  # type: ignore[arg-type]
        for receipt in receipts:
            archive, uid = receiver._archive, receipt.sop_instance_uid
            known = archive.index.lookup(uid)
            assert known is not None and known.digest == receipt.digest
            for one in archive.instances(known.study_uid, known.series_uid, uid):
                archive.verify(one)
                given.append((uid, one.digest))
        return receipts

    monkeypatch.setattr(Receiver, "settle", settled)
    return lambda: given
