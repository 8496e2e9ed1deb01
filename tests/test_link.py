"""The line on which replication is tried: what it carries, how fast, and that it can be cut."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.link import Link, Shape

pytestmark = pytest.mark.skipif(bool(Link.missing()), reason=Link.missing() or "there is one")

SENDER = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as line:
    for _ in range(int(sys.argv[3])):
        line.sendall(b"x" * 10_000)
    line.shutdown(socket.SHUT_WR)
    line.recv(1)
"""
SHAPE = Shape(40e6, delay_s=0.01)


@contextmanager
def listening(link: Link) -> Iterator[socket.socket]:
    with socket.create_server((link.near_address, 0)) as server:
        server.settimeout(10)
        yield server


def sender(link: Link, server: socket.socket, pieces: int) -> subprocess.Popen[bytes]:
    where = (link.near_address, str(server.getsockname()[1]))
    return subprocess.Popen([*link.far, sys.executable, "-c", SENDER, *where, str(pieces)])


def take(line: socket.socket, size: int) -> int:
    taken = 0
    while taken < size and (piece := line.recv(1 << 16)):
        taken += len(piece)
    return taken


def test_a_line_is_as_slow_as_it_is_told_to_be() -> None:
    with Link(SHAPE) as link, listening(link) as server:
        child = sender(link, server, 300)
        line, address = server.accept()
        with line:
            start = time.monotonic()
            assert take(line, 3_000_000) == 3_000_000
            spent = time.monotonic() - start
            line.sendall(b".")
        assert child.wait(10) == 0
        assert address[0] == link.far_address
        # Never faster than the line; how much slower is the machine's affair.
        assert spent >= 0.8 * 3_000_000 * 8 / SHAPE.bits_per_s
        outward, inward = link.carried()
        assert outward > 3_000_000 > inward > 0


@pytest.mark.parametrize(("outward", "inward"), [(True, True), (True, False), (False, True)])
def test_a_line_that_is_cut_carries_nothing_until_it_is_healed(outward: bool, inward: bool) -> None:
    with Link(SHAPE) as link, listening(link) as server:
        child = sender(link, server, 30)
        line, _ = server.accept()
        with line:
            line.settimeout(20)
            assert take(line, 1) >= 1
            link.cut(outward=outward, inward=inward)
            before = link.carried()
            line.settimeout(0.5)
            with pytest.raises(TimeoutError):
                while take(line, 1 << 20):  # what had passed comes still
                    pass
            after = link.carried()
            assert after[0] == before[0] or not outward
            assert after[1] == before[1] or not inward
            link.heal()
            line.settimeout(20)
            line.sendall(b".")
            take(line, 1 << 20)
        assert child.wait(20) == 0


def test_the_ends_of_a_line_go_with_it() -> None:
    with Link(SHAPE) as link:
        assert subprocess.run([*link.far, "true"], check=False).returncode == 0
    assert subprocess.run([*link.far, "true"], capture_output=True, check=False).returncode != 0
