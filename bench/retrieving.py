"""The rows about retrieving: DCMTK's getscu and movescu fetch one CT study again and again, from MISS and
from Orthanc in turns."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from archive.errors import Unavailable
from bench import programs
from bench.runs import Bench, Meter
from bench.servers import PDU_BYTES, IgnoringStorescp, Miss, Orthanc, Server
from bench.table import Bar, Result
from miss.load.instances import Corpus, ct_studies
from miss.load.sender import CALLING_AE, Plan, Tally, send
from miss.load.temporary_node import HOST
from miss.processes import free_ports

MIB = 1 << 20
MOVESCU_AE = "MOVESCU"
LOADING_ASSOCIATIONS = 4
LOADING_S_MAX = 600.0
RETRIEVE_S_MAX = 300.0
GROWTH_MIB_MAX = 64.0
MEMORY_FOLDER = Path("/dev/shm")

GET = "C-GET by getscu"
MOVE = "C-MOVE by movescu, to its own port"
MOVE_AWAY = "C-MOVE by movescu, to storescp --ignore"
RATE_BARS = {GET: Bar(least_ratio=1), MOVE: Bar(least_ratio=5), MOVE_AWAY: Bar()}


@dataclass(frozen=True, slots=True)
class Fetched:
    """Of one server in one round."""

    bytes_rate: float
    cpu_s_per_gb: float
    growth_bytes: int


@contextmanager
def memory_folder(bench: Bench) -> Iterator[Path]:
    """A folder that no disk slows, where the machine has one."""
    place = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else bench.folder
    with tempfile.TemporaryDirectory(prefix="miss-bench-", dir=place) as folder:
        yield Path(folder)


def loaded(server: Server, corpus: Corpus, count: int) -> None:
    """Stores the first `count` instances; Unavailable when the server does not hold them all."""
    tally = send(server.target, corpus, Plan(LOADING_ASSOCIATIONS, LOADING_S_MAX, count))
    if problem := server.problem(corpus, tally):
        raise Unavailable(f"{server.name}, while it was loaded: {problem}")


@dataclass(frozen=True, slots=True)
class Study:
    """What is fetched, and where to."""

    corpus: Corpus
    count: int
    move_port: int

    @property
    def size(self) -> int:
        return sum(self.corpus.instance(number).size for number in range(self.count))

    def fetch(self, kind: str, server: Server, folder: Path) -> float:
        """Seconds that one program takes. Unavailable when it failed or left other than the study."""
        with tempfile.TemporaryDirectory(dir=folder) as place:
            start = time.perf_counter()
            done = subprocess.run(self._command(kind, server, place), env=programs.environment(), cwd=place,
                                  capture_output=True, text=True, timeout=RETRIEVE_S_MAX, check=False)
            spent = time.perf_counter() - start
            if done.returncode:
                raise Unavailable(f"{kind} from {server.name} ended with code {done.returncode}: "
                                  f"{(done.stderr or done.stdout).strip()[-300:]}")
            if kind != MOVE_AWAY:
                self._check(kind, server, Path(place))
        return spent

    def _command(self, kind: str, server: Server, place: str) -> list[str]:
        get = kind == GET
        program = "getscu" if get else "movescu"
        options = ["-S", "-pdu", PDU_BYTES, "-aet", CALLING_AE, "-aec", server.target.called_ae,
                   "-k", "0008,0052=STUDY", "-k", f"0020,000d={self.corpus.instance(0).study_uid}"]
        if kind != MOVE_AWAY:
            options += ["+B", "-od", place]
        if not get:
            options += ["-aem", IgnoringStorescp.called_ae if kind == MOVE_AWAY else MOVESCU_AE]
        if kind == MOVE:
            options += ["+P", str(self.move_port)]
        return [programs.find(program) or program, *options, HOST, str(server.target.port)]

    def _check(self, kind: str, server: Server, place: Path) -> None:
        """A file of each instance, which ends with the data set that was stored."""
        files = {path.name.removeprefix("CT."): path for path in place.iterdir()}
        for sent in map(self.corpus.instance, range(self.count)):
            path = files.pop(sent.sop_instance_uid, None)
            if path is None or not path.read_bytes().endswith(b"".join(sent.chunks())):
                raise Unavailable(f"{kind} from {server.name} lacks an instance, or gave other bytes")
        if files:
            raise Unavailable(f"{kind} from {server.name} gave more than the study")


@dataclass(frozen=True, slots=True)
class RetrieveRow:
    key: str = "retrieve"

    def measure(self, bench: Bench) -> list[Result]:
        count = bench.scale.study_instances
        missing = Orthanc.missing(tls=False)
        if programs.find("movescu") is None or programs.find("getscu") is None:
            return [Result(self.key, f"a CT study of {count}", "MB/s", void="DCMTK is not installed")]
        try:
            found = self._fetched(bench, count, [Miss, *(() if missing else (Orthanc,))])
        except (Unavailable, OSError, subprocess.TimeoutExpired) as error:
            return [Result(self.key, f"a CT study of {count}", "MB/s", void=f"void: {error}")]
        lines: list[Result] = []
        for kind, bar in RATE_BARS.items():
            ours, theirs = found[kind][Miss.name], found[kind].get(Orthanc.name, [])
            work = f"{kind}, a CT study of {count}"
            for unit, figure, reach in (
                ("MB/s", lambda one: one.bytes_rate / 1e6, bar),
                ("CPU s per GB", lambda one: one.cpu_s_per_gb, Bar(most_ratio=0.5)),
                ("MiB over idle", lambda one: one.growth_bytes / MIB, Bar(most=GROWTH_MIB_MAX)),
            ):
                lines.append(Result(
                    self.key, work, unit, tuple(map(figure, ours)), Orthanc.name,
                    tuple(map(figure, theirs)), reach, missing if reach.needs_peer or reach == Bar() else ""))
        return lines

    def _fetched(self, bench: Bench, count: int, kinds: list[type[Server]]
                 ) -> Mapping[str, Mapping[str, list[Fetched]]]:
        """By way of fetching and name of the server, round by round."""
        found: dict[str, dict[str, list[Fetched]]] = defaultdict(lambda: defaultdict(list))
        [port] = free_ports(1, HOST)
        study = Study(ct_studies(count), count, port)
        with ExitStack() as stack:
            folder = stack.enter_context(memory_folder(bench))
            away = stack.enter_context(IgnoringStorescp(stack.enter_context(bench.fresh("destination"))))
            destinations = {MOVESCU_AE: port, away.called_ae: away.target.port}
            servers = [stack.enter_context(kind(stack.enter_context(bench.fresh("retrieve")),
                                                destinations=destinations)) for kind in kinds]
            for server in servers:
                loaded(server, study.corpus, count)
            for _ in range(bench.scale.rounds):
                for kind in RATE_BARS:
                    for server in servers:
                        found[kind][server.name].append(_fetch(bench, kind, server, study, folder))
        return found


def _fetch(bench: Bench, kind: str, server: Server, study: Study, folder: Path) -> Fetched:
    bench.wait_until_quiet()
    times = bench.scale.retrievals
    meter = Meter(server.pid)
    spent = [study.fetch(kind, server, folder) for _ in range(times)]
    run = meter.run(Tally(), meter.foreign(), "")
    fetched = Fetched(study.size / median(spent), 1e9 * run.server_cpu_s / (times * study.size),
                      run.growth_bytes)
    bench.say(f"  {kind}, {server.name}: {fetched.bytes_rate / 1e6:,.0f} MB/s, "
              f"{fetched.cpu_s_per_gb:.2f} CPU s/GB, growth {fetched.growth_bytes / MIB:.1f} MiB, others "
              f"{run.foreign:.0%}")
    return fetched


RETRIEVE_ROWS = (RetrieveRow(),)
