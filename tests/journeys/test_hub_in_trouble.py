"""The hub is alive and of no use: its disk is full, or it hangs. The ward goes on, its node's memory stays
bounded, and what waited drains by itself when the hub is well again. And of two hubs that share a store, the
one that writes is killed, in turns."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from miss.processes import wait_until
from tests.trials import Mix, Trial, asked

HANG_S = float(asked("MISS_HANG_S", "4"))
HUB_KILLS = int(asked("MISS_HUB_KILLS", "2"))
# What the node may take beside what it has without trouble.
GROWTH_BYTES_MAX = 200 << 20
MIB = 1 << 20


@contextmanager
def disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """A disk of that size in `folder`."""
    folder.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "trial", str(folder)],
                          capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no disk of its own can be made for the hub")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


@pytest.mark.timeout(240)
def test_a_hub_whose_disk_is_full(tmp_path: Path) -> None:
    region = tmp_path / "state" / "region"
    with disk(region, 96):
        options = [f"archive.free_bytes_min={24 * MIB}", f"archive.pack_bytes_max={8 * MIB}"]
        with Trial(tmp_path, mix=Mix(ct_each=3), hub_options=options) as trial:
            trial.begin()
            wait_until("the disk's being full", lambda: room(region) < 30 * MIB or None, timeout_s=60)
            before, stored = trial.watch.rss_max["node"], len(trial.load.acknowledged)
            wait_until("the ward's going on", lambda: len(trial.load.acknowledged) > stored + 100 or None,
                       timeout_s=60)
            assert room(region) >= 16 * MIB  # what it keeps free is kept free
            assert trial.hubs[0].running and trial.node.running
            subprocess.run(["mount", "-o", "remount,size=4g", str(region)], check=True)
            trial.await_region()
            trial.end()
            drain_s = trial.drain()
            figures = trial.figures()
            assert trial.watch.rss_max["node"] - before < GROWTH_BYTES_MAX
            trial.check()
    print(f"full: {figures}; drained within {drain_s:.1f} s")


def room(folder: Path) -> int:
    """Bytes that are free there."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@pytest.mark.timeout(240 + 3 * HANG_S)
def test_a_hub_that_hangs(tmp_path: Path) -> None:
    with Trial(tmp_path, mix=Mix(ct_each=3, large_each=100)) as trial:
        trial.begin()
        threading.Event().wait(1.0)
        before, stored = trial.watch.rss_max["node"], len(trial.load.acknowledged)
        os.kill(trial.hubs[0].pid, signal.SIGSTOP)
        try:
            threading.Event().wait(HANG_S)
            assert len(trial.load.acknowledged) > stored
        finally:
            os.kill(trial.hubs[0].pid, signal.SIGCONT)
        trial.await_region()
        trial.end()
        drain_s = trial.drain()
        figures = trial.figures()
        assert trial.watch.rss_max["node"] - before < GROWTH_BYTES_MAX
        trial.check()
    print(f"hung for {HANG_S:g} s: {figures}; drained within {drain_s:.1f} s")


@pytest.mark.timeout(240 + 30 * HUB_KILLS)
def test_of_two_hubs_the_one_that_writes_is_killed(tmp_path: Path) -> None:
    with Trial(tmp_path, mix=Mix(ct_each=7, large_each=100), hub_count=2) as trial:
        trial.begin()
        for number in range(HUB_KILLS):
            writer = number % 2  # the other one stood by, and writes from now on
            trial.hubs[writer].kill()
            trial.await_region()
            trial.start_hub(writer)
        trial.end()
        drain_s = trial.drain()
        figures = trial.figures()
        trial.check(rebuilt=True)
    print(f"{HUB_KILLS} writers killed: {figures}; drained within {drain_s:.1f} s")
