"""A line between two places of this machine that is as slow, as long and as bad as it is told to be, for
benches and tests. Linux offers `netem` for this where the kernel has it; this needs a TUN device alone.

    with Link(THIN) as link:
        subprocess.run([*link.far, "ping", "-c", "3", link.near_address])
        link.cut()

The near end is this machine's own network, the far end a network namespace that is made for the link and
goes with it: what runs there has the link and a loopback of its own, and nothing else. Packets are carried
by a process of its own (`python -m bench.link`): a queue of a bounded length in each direction, then the
rate, then the delay; what does not fit in the queue is dropped, as a router does, and `loss` of the others.

Needs root. Both ends and the process are gone when the `with` block ends, and when the program does.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

TUN = Path("/dev/net/tun")
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_NAMES = itertools.count()
_START_S_MAX = 10.0
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """What a line is like, the same in both directions. `delay_s` is one way; `loss` a share of packets."""

    bits_per_s: float
    delay_s: float = 0.0
    loss: float = 0.0
    mtu: int = 1500
    queue_bytes: int = 256 << 10
    seed: int = 1


# As a gigabit in a hospital; with frames as large as TUN takes, so that Python carries them without effort.
FAST = Shape(1e9, mtu=65_000, queue_bytes=4 << 20)
THIN = Shape(20e6, delay_s=0.02, loss=0.01)


class Link:
    """See the module's docstring. `congestion` is the far end's TCP congestion control (`cubic`, `bbr`)."""

    def __init__(self, shape: Shape, *, congestion: str = "cubic") -> None:
        self.shape = shape
        self.congestion = congestion
        number = (os.getpid() * 7 + next(_NAMES)) % (1 << 14)
        self.name = f"miss-{os.getpid()}-{number}"
        self._devices = f"mn{number}", f"mf{number}"
        subnet = f"10.213.{number >> 6}.{(number & 63) * 4}"
        head, last = subnet.rsplit(".", 1)
        self.near_address = f"{head}.{int(last) + 1}"
        self.far_address = f"{head}.{int(last) + 2}"
        self._carrier: subprocess.Popen[str] | None = None

    @staticmethod
    def missing() -> str:
        """Why there can be none here; empty when there can."""
        if os.geteuid() != 0:
            return "a link needs root"
        if not TUN.exists():
            return "there is no TUN device"
        made = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
        return "" if made.returncode == 0 else "no network namespace can be made"

    @property
    def far(self) -> list[str]:
        """What goes before a command that is to run at the far end."""
        return ["ip", "netns", "exec", self.name]

    def __enter__(self) -> Self:
        near, far = self._devices
        try:
            _run("ip", "netns", "add", self.name)
            self._carrier = subprocess.Popen(
                [sys.executable, "-P", "-m", "bench.link", near, far, json.dumps(asdict(self.shape))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                cwd=Path(__file__).parent.parent, start_new_session=True)
            assert self._carrier.stdout is not None
            if self._carrier.stdout.readline() != "ready\n":
                raise OSError("the link's devices can't be made")
            _run("ip", "link", "set", far, "netns", self.name)
            for prefix, device, ours, theirs in (
                ([], near, self.near_address, self.far_address),
                (self.far, far, self.far_address, self.near_address),
            ):
                _run(*prefix, "ip", "address", "add", ours, "peer", theirs, "dev", device)
                _run(*prefix, "ip", "link", "set", device, "mtu", str(self.shape.mtu), "up")
            _run(*self.far, "ip", "link", "set", "lo", "up")
            _run(*self.far, "ip", "route", "replace", self.near_address, "dev", far,
                 "congctl", self.congestion)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Both ends go. Safe to repeat."""
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            assert carrier.stdin is not None and carrier.stdout is not None
            with contextlib.suppress(OSError):
                carrier.stdin.close()  # it ends with us
            try:
                carrier.wait(_START_S_MAX)
            except subprocess.TimeoutExpired:
                carrier.kill()
                carrier.wait()
            carrier.stdout.close()
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)

    def cut(self, *, outward: bool = True, inward: bool = True) -> None:
        """Nothing passes any more: `outward` from the far end to the near one, `inward` back."""
        self._ask("cut", outward, inward)

    def heal(self) -> None:
        self._ask("cut", False, False)

    def carried(self) -> tuple[int, int]:
        """Octets of packets that have passed, outward and inward."""
        outward, inward = json.loads(self._ask("carried"))
        return outward, inward

    def _ask(self, *words: object) -> str:
        assert self._carrier is not None and self._carrier.stdin is not None
        assert self._carrier.stdout is not None
        self._carrier.stdin.write(json.dumps(words) + "\n")
        self._carrier.stdin.flush()
        return self._carrier.stdout.readline()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


# The process that carries.


@dataclass(slots=True)
class _Direction:
    """Packets from one device to the other."""

    source: int
    sink: int
    shape: Shape
    chance: random.Random
    is_cut: bool = False
    carried: int = 0
    queued: int = 0
    free_at_s: float = 0.0  # when the line has sent what it was given
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)  # sent, and on the way until then
    on_line: list[tuple[float, int]] = field(default_factory=list)  # in the queue until then

    def take(self, now_s: float) -> None:
        """Reads what the device has for us."""
        for _ in range(_BATCH):
            try:
                packet = os.read(self.source, self.shape.mtu + 64)
            except BlockingIOError:
                return
            self._leave_queue(now_s)
            lost = self.is_cut or self.chance.random() < self.shape.loss
            if self.queued + len(packet) > self.shape.queue_bytes:
                continue
            self.free_at_s = max(self.free_at_s, now_s) + len(packet) * 8 / self.shape.bits_per_s
            heapq.heappush(self.on_line, (self.free_at_s, len(packet)))
            self.queued += len(packet)
            if not lost:
                self.waiting.append((self.free_at_s + self.shape.delay_s, packet))

    def give(self, now_s: float) -> None:
        """Hands on what has arrived."""
        while self.waiting and self.waiting[0][0] <= now_s:
            _, packet = self.waiting.popleft()
            if not self.is_cut:
                with contextlib.suppress(OSError):  # the device is down, or its queue is full: lost
                    os.write(self.sink, packet)
                    self.carried += len(packet)

    def _leave_queue(self, now_s: float) -> None:
        while self.on_line and self.on_line[0][0] <= now_s:
            self.queued -= heapq.heappop(self.on_line)[1]

    def wait_s(self, now_s: float) -> float | None:
        return max(self.waiting[0][0] - now_s, 0.0) if self.waiting else None


def _open_tun(name: str) -> int:
    fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def carry(near: str, far: str, shape: Shape) -> None:
    """Carries packets between two devices that it makes, until its standard input ends."""
    ends = _open_tun(near), _open_tun(far)
    chance = random.Random(shape.seed)
    outward, inward = _Direction(ends[1], ends[0], shape, chance), _Direction(*ends, shape, chance)
    print("ready", flush=True)
    while True:
        now_s = time.monotonic()
        outward.give(now_s)
        inward.give(now_s)
        waits = [wait for one in (outward, inward) if (wait := one.wait_s(now_s)) is not None]
        readable, _, _ = select.select([*ends, 0], [], [], min(waits) if waits else 1.0)
        now_s = time.monotonic()
        if ends[1] in readable:
            outward.take(now_s)
        if ends[0] in readable:
            inward.take(now_s)
        if 0 in readable and not _obey(outward, inward):
            return


def _obey(outward: _Direction, inward: _Direction) -> bool:
    """One command; False when who made the link has gone."""
    line = os.read(0, 4096)  # commands come one at a time: each is answered before the next
    if not line:
        return False
    verb, *values = json.loads(line)
    if verb == "cut":
        outward.is_cut, inward.is_cut = values
    print(json.dumps([outward.carried, inward.carried]), flush=True)
    return True


if __name__ == "__main__":
    carry(sys.argv[1], sys.argv[2], Shape(**json.loads(sys.argv[3])))
