"""A line that is dead one way, without a word: both sides notice it in the time that the documentation
states. The times here are the real ones divided by eight, unless MISS_REAL_TIMES is set."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from federation import attach_service, attaching, coverage
from federation.hub import Hub
from tests.datasets import make_instance
from tests.federation.proxy import Proxy
from tests.federation.regions import Region
from tests.federation.wards import Node, hub_settings, node_of
from tests.waiting import wait_for

PART = 1 if os.environ.get("MISS_REAL_TIMES") else 8
NOTICES_S = coverage.STALE_AFTER_S / PART
MARGIN_S = 3.0  # of a busy machine


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach_service, "STALE_AFTER_S", NOTICES_S)
    monkeypatch.setattr(attaching, "STALE_AFTER_S", NOTICES_S)


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    with Hub(hub_settings(region)) as hub:
        yield hub


@pytest.fixture
def line(hub: Hub) -> Iterator[Proxy]:
    with Proxy(hub.port) as line:
        yield line


@pytest.fixture
def node(region: Region, hub: Hub, line: Proxy) -> Iterator[Node]:
    node = node_of(region, hub, "San Martino", "Radiology", "SM")
    node.start(hub_address=f"127.0.0.1:{line.port}")
    wait_for(lambda: node.reported(region).seen_us > 0, "it reported")
    yield node
    line.up = line.down = True
    node.stop()


@pytest.mark.parametrize("up, down", [(False, True), (True, False), (False, False)])
def test_both_sides_notice(
    region: Region, hub: Hub, node: Node, line: Proxy, up: bool, down: bool
) -> None:
    uplink = node.uplink
    assert uplink is not None
    line.up, line.down = up, down
    cut_s = time.monotonic()
    wait_for(lambda: not uplink.status().attached, "the node notices", NOTICES_S + MARGIN_S)
    node_s = time.monotonic() - cut_s
    if not up:
        left_s = max(0.1, NOTICES_S + MARGIN_S - node_s)
        wait_for(lambda: not node.reported(region).attached, "the hub notices", left_s)
    print(f"up {up}, down {down}: the node after {node_s:.1f} s, the hub by {time.monotonic() - cut_s:.1f} s")
    node.take([make_instance()])
    line.up = line.down = True
    wait_for(lambda: node.pending == 0, "it goes on when the line does")
