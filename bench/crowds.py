"""The rows about many connections: two thousand idle associations beside four that send, and silent
connections beside an echo."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from archive.errors import Unavailable
from bench.runs import Bench
from bench.servers import START_S_MAX, Miss
from bench.table import Bar, Result
from miss.load import usage
from miss.load.measure import check
from miss.load.sender import CONTEXT_ID, Line, Load, Plan, Target, send
from miss.load.temporary_node import HOST, Place
from miss.processes import listening, wait_until
from node.dimse.contexts import IMPLICIT_LITTLE, VERIFICATION
from node.dimse.pdu import ProposedContext

ASSOCIATIONS = 4
ECHO_EVERY_S = 0.05
ECHO_MS_MAX = 100.0
ROOM_FOR_FILES = 1_000
VERIFY = [ProposedContext(CONTEXT_ID, VERIFICATION, (IMPLICIT_LITTLE,))]
STOP_S_MAX = 30.0


def echo_s(target: Target) -> float:
    """A new connection, association, C-ECHO: until the answer is there. Unavailable when it is another than
    0000."""
    start = time.perf_counter()
    line = Line(target, VERIFY)
    status = line.echo(1)
    spent = time.perf_counter() - start
    line.release()
    if status:
        raise Unavailable(f"an echo was answered {status:04X}")
    return spent


def allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


class CommandedNode:
    """A node that opens associations of its own when it is told to (`bench/commanded.py`)."""

    def __init__(self, folder: Path) -> None:
        self.place = Place.prepare(folder)
        self._log = folder / "node.log"

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "bench.commanded", str(self.place.settings)], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        try:
            wait_until("the node", lambda: self._up(process), timeout_s=START_S_MAX)
            yield process
        finally:
            try:
                process.communicate(timeout=STOP_S_MAX)  # the end of its input ends it
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _up(self, process: subprocess.Popen[str]) -> bool | None:
        if process.poll() is not None:
            raise Unavailable(f"the node ended; its log ends with {self._log.read_text()[-500:]}")
        return listening(HOST, self.place.port)


def open_one(process: subprocess.Popen[str], target: Target) -> dict[str, Any]:
    """Lets the node open an association with `target` and echo."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([target.called_ae, target.host, target.port]) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline() or '{"error": "the node ended"}')
    return answer


@dataclass(frozen=True, slots=True)
class IdleRound:
    """One node: the rate of four senders alone, then beside the idle associations."""

    alone: float
    beside: float
    association_bytes: float
    echoes: list[float]
    own_s: float


@dataclass(frozen=True, slots=True)
class IdleRow:
    key: str = "idle"
    work: str = "idle associations + 4 that send 8 KB"

    def measure(self, bench: Bench) -> list[Result]:
        allow_files(2 * bench.scale.idle + ROOM_FOR_FILES)
        work = f"{bench.scale.idle:,} {self.work}"
        try:
            rounds = [self._round(bench) for _ in range(bench.scale.rounds)]
        except (Unavailable, OSError) as error:
            return [Result(self.key, work, "instances/s", void=f"void: {error}")]
        own_ms = [one.own_s * 1e3 for one in rounds]
        return [
            Result(self.key, work, "instances/s", tuple(one.beside for one in rounds), "MISS without them",
                   tuple(one.alone for one in rounds), Bar(least_ratio=0.8)),
            Result(self.key, "an echo meanwhile, slowest", "ms",
                   tuple(max(one.echoes) * 1e3 for one in rounds), bar=Bar(most=ECHO_MS_MAX),
                   note=f"p50 {median(echo for one in rounds for echo in one.echoes) * 1e3:.1f} ms"),
            Result(self.key, "memory of an idle association", "KiB",
                   tuple(one.association_bytes / 1024 for one in rounds)),
            Result(self.key, "an association of the node's own meanwhile", "ms", tuple(own_ms),
                   bar=Bar(most=1000)),
        ]

    def _round(self, bench: Bench) -> IdleRound:
        with bench.fresh("idle") as folder, ExitStack() as stack:
            node = CommandedNode(folder)
            process = stack.enter_context(node.running())
            target = node.place.target
            bench.wait_until_quiet()
            before = send(target, bench.small, Plan(ASSOCIATIONS, bench.scale.seconds, 10**7))
            bench.wait_until_quiet()
            pids = usage.tree(process.pid)
            resident = usage.resident_bytes(pids)
            for _ in range(bench.scale.idle):
                stack.callback(Line(target, VERIFY).sock.close)
            each = (usage.resident_bytes(pids) - resident) / bench.scale.idle
            bench.wait_until_quiet()
            echoing = Echoing(target)
            plan = Plan(ASSOCIATIONS, bench.scale.seconds, 10**7, first=10**8)
            with Load(target, bench.small, plan) as load, echoing:
                load.begin()
                own = open_one(process, target)
                beside = load.finish()
            if own.get("status") != 0:
                raise Unavailable(f"the node's own association: {own}")
            beside.stored, stored = beside.stored + before.stored, beside.stored
            beside.failures += before.failures
            problem = check(node.place, bench.small, beside)
            beside.stored = stored
            if problem or echoing.problem:
                raise Unavailable(problem or echoing.problem)
        bench.say(f"  alone {before.rate:,.0f}/s, beside {bench.scale.idle:,} idle {beside.rate:,.0f}/s, "
                  f"{each / 1024:.1f} KiB each, echo max {max(echoing.latencies) * 1e3:.1f} ms, own "
                  f"association {own['seconds'] * 1e3:.1f} ms")
        return IdleRound(before.rate, beside.rate, each, echoing.latencies, own["seconds"])


class Echoing:
    """Echoes, one after the other, as long as its `with` block."""

    def __init__(self, target: Target) -> None:
        self.latencies: list[float] = []
        self.problem = ""
        self._target = target
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="echoing")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self.latencies or not self._ended.wait(ECHO_EVERY_S):
                self.latencies.append(echo_s(self._target))
        except (Unavailable, OSError, ValueError) as error:
            self.problem = f"an echo failed: {error}"


@dataclass(frozen=True, slots=True)
class SilentRow:
    """Connections that say nothing, not even a TLS ClientHello, beside an echo on a new one."""

    key: str = "silent"

    def measure(self, bench: Bench) -> list[Result]:
        allow_files(2 * bench.scale.silent + ROOM_FOR_FILES)
        why = Miss.missing(tls=True)
        tls = not why
        silent = f"{bench.scale.silent} silent connections" + (
            f" and {bench.scale.silent_tls} to the TLS port" if tls else "")
        with bench.fresh("silent") as folder, ExitStack() as stack:
            server = stack.enter_context(Miss(folder, bench.certificates if tls else None))
            encrypted, plain = server.target, server.node.place.target
            for target, count in ((plain, bench.scale.silent), (encrypted, bench.scale.silent_tls * tls)):
                for _ in range(count):
                    stack.enter_context(socket.create_connection((target.host, target.port)))
            results = [self._echoes(bench, f"an echo beside {silent}, slowest", plain)]
            if tls:
                results.append(self._echoes(bench, f"an echo over TLS beside {silent}, slowest", encrypted))
        return results + ([Result(self.key, "an echo over TLS, slowest", "ms", void=why)] if why else [])

    def _echoes(self, bench: Bench, work: str, target: Target) -> Result:
        try:
            found = [echo_s(target) for _ in range(bench.scale.echoes)]
        except (Unavailable, OSError, ValueError) as error:
            return Result(self.key, work, "ms", bar=Bar(most=1000), void=f"void: {error}")
        return Result(self.key, work, "ms", (max(found) * 1e3,), bar=Bar(most=1000),
                      note=f"p50 {median(found) * 1e3:.1f} ms of {len(found)}")


CROWD_ROWS = (IdleRow(), SilentRow())
