"""What only a ward holds is read while it arrives: listed at once, each instance as soon as it is here, a
large one while it comes, and nothing that is short passes for whole.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from archive.errors import MissError, NotFound, Unavailable
from archive.model import StoredInstance
from archive.reception import Reception
from federation import asks, promoting
from federation.gathering import Awaited
from federation.hub import Hub
from federation.methods import Methods
from federation.region_source import RegionSource
from federation.window import RegionWindow
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.test_region_window import device, window_of
from tests.federation.thin import ThinLine
from tests.federation.wards import EVA, Node, Regional, hub_settings, node_of
from tests.waiting import wait_for

OWN = "san-martino/radiology"
RATE = 8 << 20


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    settings = hub_settings(region, ask_deadline_s=1.0, promote_deadline_s=3.0, devices_see_region=(OWN,))
    with Hub(settings) as hub:
        yield hub


@pytest.fixture
def line(hub: Hub) -> Iterator[ThinLine]:
    with ThinLine(hub.settings.port, RATE) as line:
        yield line


@pytest.fixture
def far(region: Region, line: ThinLine) -> Iterator[Node]:
    """A ward behind a thin line that pushes only what is read."""
    ward = region.add_ward("Galliera", "Radiology", "GA")
    identity = region.node(ward, f"127.0.0.1:{line.port}")
    node = Node(ward, identity, region.folder / "nodes" / "far")
    yield node
    node.stop()


@pytest.fixture
def near(region: Region, hub: Hub) -> Iterator[Node]:
    node = node_of(region, hub, "San Martino", "Radiology", "SM")
    yield node
    node.stop()


@pytest.fixture
def source(region: Region, hub: Hub) -> Iterator[RegionSource]:
    with Regional(region, hub, promote_deadline_s=3.0) as source:
        yield source


@pytest.fixture
def window(near: Node, region: Region) -> Iterator[RegionWindow]:
    near.start()
    wait_for(lambda: near.uplink is not None and near.uplink.status().attached, "the near ward is attached")
    window = window_of(near)
    yield window
    window.close()


def study(count: int, start: int = 0, **options: Any) -> list[Instance]:
    return [
        make_instance(study_uid="1.2.7", series_uid="1.2.7.1", sop_uid=f"1.2.7.1.{n}", number=n, **options)
        for n in range(start + 1, start + count + 1)
    ]


def hold(node: Node, region: Region, instances: list[Instance]) -> None:
    """The ward holds these alone, and the hub knows it."""
    node.take(instances)
    node.start(hold=True)
    wait_for(lambda: node.reported(region).pending == len(instances), "the ward has reported")


def whole(source: RegionSource, one: StoredInstance) -> bytes:
    with source.open_payload(one) as payload:
        return payload.read()[one.location.dataset_offset :]


def test_instances_are_given_at_once_and_read_as_each_arrives(
    region: Region, far: Node, source: RegionSource
) -> None:
    sent = study(16, padding=1 << 20)  # two seconds of the line
    hold(far, region, sent)
    begun_s = time.monotonic()
    found = source.instances(EVA, "1.2.7")
    listed_s = time.monotonic() - begun_s
    assert [one.head.sop_instance_uid for one in found] == [one.sop_instance_uid for one in sent]
    assert [one.digest for one in found] == [hashlib.sha256(one.dataset).digest() for one in sent]
    assert all(isinstance(one, Awaited) for one in found) and not found.lacking
    at_s: list[float] = []

    def read(one: StoredInstance, instance: Instance) -> None:
        assert whole(source, one) == instance.dataset
        at_s.append(time.monotonic() - begun_s)

    threads = [threading.Thread(target=read, args=pair) for pair in zip(found, sent, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(at_s) == 16
    assert listed_s < max(at_s) / 2 and min(at_s) < max(at_s) * 0.7


def test_a_study_that_is_half_replicated_is_whole(region: Region, far: Node, source: RegionSource) -> None:
    first, second = study(3), study(3, start=3, padding=1 << 20)
    far.take(first)
    far.start()
    wait_for(lambda: far.pending == 0, "three are in the region")
    far.leave()
    hold(far, region, second)
    found = source.instances(EVA, "1.2.7")
    assert [isinstance(one, Awaited) for one in found] == [False] * 3 + [True] * 3
    for one, instance in zip(found, [*first, *second], strict=True):
        assert whole(source, one) == instance.dataset


def test_a_large_instance_streams_through_and_its_last_chunk_waits_for_the_digest(
    region: Region, far: Node, source: RegionSource, window: RegionWindow, near: Node,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (sent,) = study(1, padding=16 << 20)
    hold(far, region, [sent])
    checking, commit = threading.Event(), Reception.commit

    def slowly(self: Reception, **options: Any) -> Any:
        if self.size > 1 << 20:
            assert checking.wait(20)
        return commit(self, **options)

    monkeypatch.setattr(Reception, "commit", slowly)
    (one,) = source.instances(EVA, "1.2.7")
    got: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        for chunk in source.passing(EVA, one):
            got.append(chunk)
        done.set()

    threading.Thread(target=read, daemon=True).start()
    (seen,) = window.instances(device(near), "1.2.7")
    spool = window.begin(seen)
    threading.Thread(target=window.fill, args=(device(near), seen, spool), daemon=True).start()
    wait_for(lambda: sum(map(len, got)) > 4 << 20, "the portal's reader has the beginning")
    wait_for(lambda: spool.received > 4 << 20, "the device's reader has the beginning")
    assert far.store.index.lookup(sent.sop_instance_uid) is not None and far.pending == 1
    time_left = wait_for(lambda: sum(map(len, got)) > 12 << 20, "nearly all of it was passed on")
    assert time_left and not done.is_set() and spool.received < spool.size  # not the last of it
    checking.set()
    assert done.wait(20)
    assert b"".join(got)[one.location.dataset_offset :] == sent.dataset
    spool.checked()
    spool.seek(0)
    assert spool.read() == sent.dataset
    spool.close()


def test_what_breaks_off_is_an_error_and_no_short_study(
    region: Region, far: Node, line: ThinLine, source: RegionSource
) -> None:
    sent = study(12, padding=1 << 20)
    hold(far, region, sent)
    found = source.instances(EVA, "1.2.7")
    big = source.passing(EVA, found[0])
    assert next(big)
    line.cut()
    begun_s = time.monotonic()
    with pytest.raises(Unavailable):
        for one in found:
            whole(source, one)
    assert time.monotonic() - begun_s < 12
    wait_for(lambda: not far.reported(region).attached, "the hub knows that it is away")
    with pytest.raises(Unavailable, match="away"):  # nobody can tell: that is not "not found"
        source.instances(EVA, "1.2.9")
    arrived = source.at_hand(EVA, "1.2.7") if far.pending < 12 else None
    if arrived is not None:
        assert arrived.lacking == promoting.AWAY  # what is there is given, and said to be short


def test_bytes_that_are_changed_on_the_way_are_refused(
    region: Region, far: Node, source: RegionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sent,) = study(1, padding=12 << 20)
    hold(far, region, [sent])
    write, flips = Reception.write, [1]

    def flipped(self: Reception, view: Any) -> None:
        if self.size > 2 << 20 and flips:
            flips.pop()
            view = bytes((view[0] ^ 1,)) + bytes(view[1:])
        write(self, view)

    monkeypatch.setattr(Reception, "write", flipped)
    (one,) = source.instances(EVA, "1.2.7")
    got = b""
    with pytest.raises(MissError):
        for chunk in source.passing(EVA, one):
            got += chunk
    assert len(got) < len(sent.dataset)
    assert whole(source, source.instances(EVA, "1.2.7")[0]) == sent.dataset  # pushed again, and whole


def test_a_ward_and_a_hub_of_the_release_before_are_waited_for(
    region: Region, far: Node, source: RegionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = study(3)
    hold(far, region, sent)
    with monkeypatch.context() as patched:
        patched.setattr(asks.Asks, "_list", asks.Asks._match)  # a ward that lists nothing
        found = source.instances(EVA, "1.2.7", None, sent[0].sop_instance_uid)
        assert [isinstance(one, Awaited) for one in found] == [False]

    known = Methods.service

    def without(self: Methods, details: Any) -> Any:
        return None if str(details.method).endswith("/Gather") else known(self, details)

    monkeypatch.setattr(Methods, "service", without)
    found = source.instances(EVA, "1.2.7")
    assert [isinstance(one, Awaited) for one in found] == [False] * 3


def test_what_nobody_promised_is_not_waited_for(
    region: Region, far: Node, near: Node, window: RegionWindow
) -> None:
    sent = study(2)
    hold(far, region, sent)
    found = window.instances(device(near), "1.2.7")
    assert len(found) == 2
    with pytest.raises(NotFound):
        window.fetch(device(near), replace(found[0], digest=bytes(32)))
    with window.fetch(device(near), found[0]) as file:
        assert file.read() == sent[0].dataset
