"""One node for all foreign programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from miss.load.temporary_node import TemporaryNode
from tests.interop.running import MODALITY, RunningNode


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with TemporaryNode(tmp_path_factory.mktemp("interop")) as running:
        made = RunningNode(running.place)
        made.allow(MODALITY)
        yield made
