"""zstd on the way: when it is worth it, over simulated lines; what the hub makes of it, and of what it should
not take; and a node on a thin line that compresses what can be compressed."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import zstandard

from archive.errors import InvalidInput
from federation import abilities
from federation.codec import CHUNK_BYTES_MAX, Inflating, deflated
from federation.compression import LEVELS, Compression
from federation.hub import Hub
from federation.packing import Packing
from protos import uplink_pb2
from tests.datasets import RLE, Instance, make_instance
from tests.federation.relays import Relay
from tests.federation.test_receiving import group
from tests.federation.wards import Node, open_archive, stored_bytes
from tests.waiting import wait_for

MIB = 1 << 20


@dataclass
class Line:
    """A line in pretended time: messages of 1 MiB, made and written one after the other. `carries` says how
    many bytes a second go over it, `takes` how many of data sets the hub stores; the compressor makes `speed`
    at level 1."""

    carries: Callable[[float], float]
    takes: float = 1e12
    speed: float = 400e6
    ratio: float = 2.0
    supply: float = 1e9
    compression: Compression = field(default_factory=Compression)
    now_s: float = 0.0
    levels: list[tuple[float, int]] = field(default_factory=list)
    data: int = 0

    def run(self, seconds: float) -> Line:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self._send()
        return self

    def _send(self) -> None:
        level = self.compression.level
        worked_s = MIB / self.supply
        wire = MIB
        if level or self.compression.wants_probe(self.now_s):
            speed = self.speed / {0: 1.0, 1: 1.0, 3: 1.7, 6: 5.0}[level]
            size = MIB if level else MIB // 4
            worked_s += size / speed
            self.compression.compressed(level or 1, size, int(size / self.ratio), size / speed, self.now_s)
            wire = int(MIB / self.ratio) if level else MIB
        waited_s = max(wire / self.carries(self.now_s), MIB / self.takes)
        self.now_s += worked_s + waited_s
        self.data += MIB
        self.compression.wrote(MIB, wire, waited_s, worked_s, self.now_s)
        self.levels.append((self.now_s, self.compression.level))

    def share_on(self, begin_s: float, end_s: float) -> float:
        some = [level > 0 for at_s, level in self.levels if begin_s <= at_s < end_s]
        return sum(some) / len(some)


def steady(rate: float) -> Callable[[float], float]:
    return lambda at_s: rate


def test_on_a_fast_line_nothing_is_compressed() -> None:
    line = Line(steady(600e6), speed=300e6).run(120)
    assert line.share_on(0, 120) == 0.0


@pytest.mark.parametrize(("rate", "gain"), [(0.25e6, 1.85), (2.5e6, 1.85), (12e6, 1.7), (60e6, 1.35)])
def test_on_a_thin_line_it_is_soon_and_stays(rate: float, gain: float) -> None:
    line = Line(steady(rate)).run(120)
    assert line.share_on(15, 120) > 0.99
    assert line.data / 120 > gain * rate  # of the 2 that compressing may bring


def test_a_hub_that_is_waited_for_on_a_fast_line_is_not_taken_for_the_line() -> None:
    line = Line(steady(800e6), takes=200e6, speed=500e6).run(60)
    assert line.share_on(0, 60) == 0.0


def test_a_line_that_changes_is_followed() -> None:
    line = Line(lambda at_s: 2.5e6 if (at_s // 100) % 2 else 800e6, speed=300e6).run(400)
    assert line.share_on(20, 100) == 0.0
    assert line.share_on(115, 200) > 0.95
    assert line.share_on(215, 300) < 0.05
    assert line.share_on(315, 400) > 0.95


def test_what_can_not_be_compressed_is_not() -> None:
    line = Line(steady(2.5e6), ratio=1.01).run(300)
    assert line.share_on(0, 300) == 0.0


def test_a_hub_that_is_slow_is_no_reason() -> None:
    """Writes wait, and compressed ones would wait as long: it is tried, seldom, and given up."""
    line = Line(steady(100e6), takes=20e6).run(1200)
    assert line.share_on(0, 1200) < 0.05
    assert sum(one[1] > 0 for one in line.levels) >= 1


def test_a_line_that_stands_idle_is_not_waited_for() -> None:
    line = Line(steady(2.5e6)).run(60)
    assert line.compression.level
    line.supply, line.carries = 0.5e6, steady(50e6)
    line.run(60)
    assert not line.compression.level


@pytest.mark.parametrize(("rate", "level"), [(0.5e6, LEVELS[-1]), (20e6, LEVELS[1]), (60e6, LEVELS[0])])
def test_the_thinner_the_line_the_harder_it_is_compressed(rate: float, level: int) -> None:
    assert Line(steady(rate)).run(60).compression.level == level


# What the hub takes.


def test_what_was_deflated_comes_back() -> None:
    data = bytes(300_000) + make_instance().dataset
    for level in LEVELS:
        assert Inflating().chunk(deflated(data, level)) == data
    message = group(make_instance(), make_instance())
    inflated = Inflating().group(deflated(message.group.SerializeToString(), 1))
    assert [(one.begin, bytes(one.dataset), one.digest) for one in inflated] == [
        (one.begin, one.dataset, one.digest) for one in message.group.objects
    ]


def without_length(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


@pytest.mark.parametrize(
    "frame",
    [
        deflated(bytes(CHUNK_BYTES_MAX + 1), 19),
        deflated(bytes(1 << 30), 1),
        without_length(bytes(1 << 20)),
        deflated(bytes(100), 1)[:-3],
        deflated(bytes(100), 1) + b"more",
        b"",
        b"no frame at all",
    ],
    ids=["one too many", "bomb", "no length", "cut", "more", "nothing", "other"],
)
def test_what_is_no_chunk_is_refused(frame: bytes) -> None:
    with pytest.raises(InvalidInput):
        Inflating().chunk(frame)


@pytest.mark.parametrize("data", [bytes(3 << 20), b"\xff" * 10])
def test_what_is_no_group_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        Inflating().group(deflated(data, 1))


# A node and a hub.


def flat(size: int, number: int) -> Instance:
    """As an image whose half is air: it compresses well."""
    made, half = make_instance(number=number), bytes(size // 2) + os.urandom(size // 2)
    trailing = struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, len(half))  # PS3.5 7.1.2
    return replace(made, dataset=made.dataset + trailing + half)


def replicated(hub: Hub, node: Node, instances: list[Instance]) -> float:
    """Over a line of 6 MB/s; how many bytes crossed it for each of the data sets."""
    with Relay(hub.port, 6e6) as relay:
        node.take(instances)
        node.start(hub_address=relay.address, push_streams=3, channels=2)
        wait_for(lambda: node.pending == 0, "everything has a receipt", 60)
        with open_archive(hub.settings.state, outbox=False, read_only=True) as archive:
            for instance in instances:
                assert stored_bytes(archive, instance) == instance.dataset
        return relay.passed / sum(len(instance.dataset) for instance in instances)


def test_a_thin_line_gets_compressed_groups_and_chunks(hub: Hub, node: Node) -> None:
    instances = [flat(400_000, number) for number in range(70)] + [flat(5_000_000, 99)]
    assert replicated(hub, node, instances) < 0.85


def test_a_hub_that_can_not_inflate_is_sent_nothing_compressed(
    hub: Hub, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abilities, "shared", lambda theirs: frozenset())
    assert replicated(hub, node, [flat(400_000, number) for number in range(20)]) > 1.0


def test_what_is_compressed_in_itself_travels_as_it_is(node: Node) -> None:
    plain, encapsulated = flat(100_000, 1), make_instance(transfer_syntax=RLE)
    node.take([plain, encapsulated])
    node.store.wait_indexed()
    packed = Packing(node.store).group(node.store.index.pending(10), level=3)
    messages = [uplink_pb2.PushRequest.FromString(one.message) for one in packed.parcels]
    assert sorted(str(one.WhichOneof("message")) for one in messages) == ["group", "zstd_group"]
    (whole,) = next(one.group.objects for one in messages if one.group.objects)
    assert whole.dataset == encapsulated.dataset
    assert isinstance(whole, uplink_pb2.PushWhole)
