"""Histories of a small region, each from its seed. `MISS_SEEDS=10000` runs so many, `MISS_SEED=4711` that
one alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.sites import make_template
from tests.simulation.world import World

SEEDS = int(os.environ.get("MISS_SEEDS", "200"))
PARTS = 8
MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """No disk: what is lost and kept is the simulation's to say."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as place:
        make_template(Path(place) / "template.db")
        yield Path(place)


def history(seed: int, folder: Path) -> None:
    world = World(seed, folder, folder / "template.db")
    try:
        world.run()
    except BaseException as error:
        error.add_note(f"seed {seed}: MISS_SEED={seed} pytest {Path(__file__).name} runs it again")
        raise
    finally:
        world.close()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_promise_is_broken_in_any_history(part: int, folder: Path) -> None:
    only = os.environ.get("MISS_SEED")
    seeds = [int(only)] if only is not None and part == 0 else range(part, 0 if only else SEEDS, PARTS)
    for seed in seeds:
        history(seed, folder)
