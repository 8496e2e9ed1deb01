"""The line between a ward and its region is cut while a modality stores: for random times, in one direction
or both, and the node is started anew meanwhile, so that new connections are tried over what is left of the
line. Every C-STORE is answered 0000; what was stored arrives once.

`MISS_CUTS=20 MISS_CUT_S=600` cuts that often, for up to that long; `MISS_CUT_SEED` is where chance begins.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from bench.link import Link, Shape
from miss.processes import wait_until
from tests.trials import Mix, Trial, asked

pytestmark = pytest.mark.skipif(bool(Link.missing()), reason=Link.missing() or "there is one")

IS_LONG = "MISS_CUTS" in os.environ
CUTS = int(asked("MISS_CUTS", "4"))
CUT_S_MAX = float(asked("MISS_CUT_S", "2"))
CUT_S_MIN = float(asked("MISS_CUT_S_MIN", "0.3"))
SEED = int(asked("MISS_CUT_SEED", "1"))
LINE = Shape(100e6, delay_s=0.005)
LONG_S = 30.0  # from here on the modalities send less than the line carries, so that what waits can drain


@pytest.mark.timeout(int(120 + CUTS * (CUT_S_MAX * 3 + 60)))
def test_what_is_stored_while_the_line_is_cut_arrives_once(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    drains = []
    with Link(LINE) as link:
        # Uncompressed in the long trials: what the line carried is held against what was stored.
        options = ["uplink.zstd=false"] if IS_LONG else []
        pause_s = 0.08 if CUT_S_MAX > LONG_S else 0.01
        mix = Mix(ct_each=10, large_each=400)
        with Trial(tmp_path, link, mix, node_options=options, pause_s=pause_s) as trial:
            trial.begin()
            for number in range(CUTS):
                cut(trial, link, chance, number)
                trial.await_region()
                if CUT_S_MAX > LONG_S:
                    drains.append(trial.drain_below(50))
            trial.end()
            drains.append(trial.drain())
            figures = trial.figures()
            trial.check(rebuilt=True)
    print(f"seed {SEED}, {CUTS} cuts of up to {CUT_S_MAX:g} s: {figures}; "
          f"drained within {', '.join(f'{drain:.1f}' for drain in drains)} s")


def cut(trial: Trial, link: Link, chance: random.Random, number: int) -> None:
    """One cut: the modality gets its answers all the while."""
    outward, inward = chance.choice([(True, True), (True, False), (False, True)])
    stored = len(trial.load.acknowledged)
    link.cut(outward=outward, inward=inward)
    try:
        if number % 4 == 2:  # its connections are gone: new ones are tried over what is left of the line
            trial.node.kill()
            trial.start_node()
        threading.Event().wait(chance.uniform(CUT_S_MIN, CUT_S_MAX))
        wait_until("an answer while the line is cut",
                   lambda: len(trial.load.acknowledged) > stored or None, timeout_s=10)
    finally:
        link.heal()
    assert trial.load.wrong == []


@pytest.mark.timeout(int(120 + CUTS * (CUT_S_MAX * 3 + 60)))
def test_the_region_never_says_that_it_has_what_it_lacks(tmp_path: Path) -> None:
    """Few are stored, so that reports of an empty backlog are on the line whenever it is cut."""
    chance = random.Random(SEED)
    with Link(LINE) as link, Trial(tmp_path, link, Mix(ct_each=0), modalities=1, pause_s=0.2) as trial:
        trial.begin()
        for _ in range(CUTS):
            link.cut(outward=True, inward=chance.random() < 0.5)
            threading.Event().wait(chance.uniform(CUT_S_MIN, CUT_S_MAX))
            link.heal()
            trial.await_complete()
        trial.end()
        trial.drain()
        figures = trial.figures()
        trial.check()
    print(f"seed {SEED}, {CUTS} cuts of up to {CUT_S_MAX:g} s: {figures}")
