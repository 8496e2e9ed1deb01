"""kill -9 of the node, of the hub, or of both, at random moments while modalities store small instances and
large ones: what was acknowledged is in the region once, whatever died, and an object that was half there goes
on where it was. Afterwards both indexes are what a rebuild makes of the disks.

`MISS_KILLS=200 MISS_KILL_BOTH_SEED=7` kills that often; each region is killed `REGION_KILLS` times, then
looked at.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from bench.link import FAST, Link
from tests.trials import Mix, Trial, asked

IS_LONG = "MISS_KILLS" in os.environ
KILLS = int(asked("MISS_KILLS", "6"))
REGION_KILLS = 50
SEED = int(asked("MISS_KILL_BOTH_SEED", "1"))
RUN_S_MAX = 2.0 if KILLS > 6 else 0.6  # of work between two kills


@pytest.mark.timeout(120 + 30 * KILLS)
def test_either_side_is_killed_at_any_moment(tmp_path: Path) -> None:
    for first in range(0, KILLS, REGION_KILLS):
        seed, kills = SEED + first, min(REGION_KILLS, KILLS - first)
        chance = random.Random(seed)
        with Trial(tmp_path / str(first), mix=Mix(ct_each=7, large_each=60)) as trial:
            trial.begin()
            for _ in range(kills):
                kill(trial, chance)
            trial.end()
            drain_s = trial.drain()
            figures = trial.figures()
            trial.check(rebuilt=True)
        print(f"seed {seed}, {kills} kills: {figures}; drained within {drain_s:.1f} s", flush=True)


@pytest.mark.skipif(bool(Link.missing()), reason=Link.missing() or "there is a link")
@pytest.mark.skipif(not IS_LONG, reason="a long trial, for its figures")
@pytest.mark.timeout(120 + 30 * KILLS)
def test_how_much_is_sent_twice(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    with Link(FAST) as link:
        options = ["uplink.zstd=false"]
        with Trial(tmp_path, link, Mix(ct_each=7, large_each=60), node_options=options) as trial:
            trial.begin()
            for _ in range(min(KILLS, 30)):
                kill(trial, chance)
            trial.end()
            trial.drain()
            figures = trial.figures()
            trial.check()
    print(f"seed {SEED}: {figures}")


def kill(trial: Trial, chance: random.Random) -> None:
    """One kill, and until something arrives again."""
    threading.Event().wait(chance.uniform(0.0, RUN_S_MAX))
    kind = chance.random()
    if kind < 0.45:
        trial.node.kill()
        trial.start_node()
    elif kind < 0.9:
        trial.hubs[0].kill()
        threading.Event().wait(chance.choice([0.0, 0.0, RUN_S_MAX]))
        trial.start_hub()
    else:
        trial.node.kill()
        trial.hubs[0].kill()
        trial.start_hub()
        trial.start_node()
    trial.await_region()
