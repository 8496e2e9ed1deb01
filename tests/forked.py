"""A node's archive and DIMSE server in a process of its own, forked from a server process that has imported
everything already: some tens of milliseconds where a new interpreter takes a second. For tests that kill it,
trace it or weigh it; they see what a sender sees, the process, its log and its folder."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from node.dimse.association import Limits
from node.dimse.requestor import Peer
from tests.node.serving import AE_TITLE
from tests.node.storing import storing

START_S_MAX = 60.0
STOP_S_MAX = 30.0
PATIENT = Limits(message_timeout_s=30.0, artim_s=30.0)
LOG = "log"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.forked", "tests.killing"])


def serve(folder: Path, options: dict[str, Any], says: Connection) -> None:
    """What the process runs; ends when the other end of the pipe is closed."""
    logging.basicConfig(filename=folder / LOG, level=logging.INFO, force=True)
    with storing(folder, **{"limits": PATIENT, **options}) as served:
        says.send(served.port)
        with suppress(EOFError, OSError):
            says.recv()


def begin(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection, int | None]:
    """Start a process that says its port: None when it ended before it could."""
    hears, says = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=target, args=(*arguments, says), daemon=True)
    process.start()
    says.close()
    ready = wait([hears, process.sentinel], START_S_MAX)
    assert ready, "the node does not start"
    if hears in ready:
        with suppress(EOFError):
            return process, hears, hears.recv()
    return process, hears, None


@dataclass(frozen=True)
class Forked:
    """A running node."""

    port: int
    pid: int
    folder: Path

    @property
    def peer(self) -> Peer:
        return Peer("127.0.0.1", self.port, AE_TITLE)

    @property
    def rss(self) -> int:
        return int(psutil.Process(self.pid).memory_info().rss)

    @property
    def cpu_s(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def log(self) -> str:
        return (self.folder / LOG).read_text()

    def check_no_surprise(self) -> None:
        """No error of a kind that nobody foresaw: those are logged with where they came from."""
        surprises = [line for line in self.log().splitlines()
                     if (" failed: " in line and not line.startswith("INFO:"))
                     or "Traceback" in line or "does not know" in line]
        assert not surprises, surprises[:5]


@contextmanager
def forked(folder: Path, **options: Any) -> Iterator[Forked]:
    """A node until the block ends; then it stops in good order, or the test fails."""
    process, hears, port = begin(serve, folder, options)
    assert port is not None and process.pid is not None, "the node ended as it started"
    stop = threading.Timer(STOP_S_MAX, process.kill)
    try:
        yield Forked(port, process.pid, folder)
    finally:
        hears.close()
        stop.start()
        process.join()
        stop.cancel()
    assert process.exitcode == 0, f"the node ended with {process.exitcode}"
