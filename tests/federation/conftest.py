"""Fixtures of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.federation.regions import Region, make_region


@pytest.fixture
def region(tmp_path: Path) -> Region:
    return make_region(tmp_path)
