"""What processes cost and how busy the machine is, as Linux tells it in /proc: CPU time of a tree with what
it has reaped, resident memory and its peak, the CPU time that others took. Measures, and never judges."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

PROC = "/proc"
TICKS = os.sysconf("SC_CLK_TCK")
QUIET_SHARE = 0.12
QUIET_WINDOW_S = 0.5


@dataclass(frozen=True, slots=True)
class Machine:
    """CPU seconds of all cores since the machine started, and how many of them somebody used."""

    busy_s: float
    total_s: float


def machine() -> Machine:
    with open(f"{PROC}/stat") as file:
        values = [int(text) for text in file.readline().split()[1:9]]
    idle = values[3] + values[4]
    return Machine((sum(values) - idle) / TICKS, sum(values) / TICKS)


def tree(pid: int) -> list[int]:
    """`pid` and all below it."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir(PROC):
        if name.isdigit() and (fields := _stat(int(name))) is not None:
            parents.setdefault(int(fields[1]), []).append(int(name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of these processes and of the children they have reaped."""
    ticks = 0
    for pid in pids:
        if (fields := _stat(pid)) is not None:
            ticks += sum(int(text) for text in fields[11:15])
    return ticks / TICKS


def own_cpu_s() -> float:
    """Of this process and the children it has reaped."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def resident_bytes(pids: list[int]) -> int:
    return sum(_status_bytes(pid, "VmRSS") for pid in pids)


def peak_bytes(pids: list[int]) -> int:
    """The highest resident memory of each since it started, or since `forget_peak`."""
    return sum(_status_bytes(pid, "VmHWM") for pid in pids)


def forget_peak(pids: list[int]) -> None:
    """From now on `peak_bytes` counts anew (proc(5), clear_refs)."""
    for pid in pids:
        with open(f"{PROC}/{pid}/clear_refs", "w") as file:
            file.write("5")


def proportional_bytes(pids: list[int]) -> int:
    """PSS: what is shared counts by shares."""
    total = 0
    for pid in pids:
        try:
            with open(f"{PROC}/{pid}/smaps_rollup") as file:
                total += sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
        except OSError:
            continue
    return total


def wait_until_quiet(timeout_s: float, share: float = QUIET_SHARE) -> float:
    """Wait until the machine does little, as it may be shared; the share that was busy at last."""
    deadline = time.monotonic() + timeout_s
    while True:
        before = machine()
        time.sleep(QUIET_WINDOW_S)
        after = machine()
        busy = (after.busy_s - before.busy_s) / max(after.total_s - before.total_s, 0.01)
        if busy < share or time.monotonic() > deadline:
            return busy


def _stat(pid: int) -> list[str] | None:
    """The fields after the program's name, which may hold anything: [0] is the state."""
    try:
        with open(f"{PROC}/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _status_bytes(pid: int, key: str) -> int:
    try:
        with open(f"{PROC}/{pid}/status") as file:
            for line in file:
                if line.startswith(key):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0
