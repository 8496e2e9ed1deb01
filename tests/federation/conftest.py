"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from federation.hub import Hub
from tests.federation.regions import Region, make_region
from tests.federation.wards import Node, hub_settings, node_of


@pytest.fixture
def region(tmp_path: Path) -> Region:
    return make_region(tmp_path)


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    """The region's hub, as it is set up by default."""
    hub = Hub(hub_settings(region))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def node(region: Region, hub: Hub) -> Iterator[Node]:
    """A ward's node, to be started by the test."""
    node = node_of(region, hub, "San Martino", "Radiology", "SM")
    yield node
    node.stop()
