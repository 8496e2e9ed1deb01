"""Runs: a server on fresh data, loaded once, measured from outside, checked, stopped and removed. What is
compared runs in turns, round by round, so that whatever slows the machine slows all; a run during which
others used the machine is made again once, and counts only when there is no better one."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.certificates import Certificates, make_certificates
from bench.servers import Server
from miss.load import instances, usage
from miss.load.instances import Corpus
from miss.load.sender import Plan, Tally, send

FOREIGN_SHARE_MAX = 0.15
SETTLE_S_MAX = 5.0
SETTLE_WINDOW_S = 0.25
SETTLE_CPU_S = 0.01
UNLIMITED = 10_000_000


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done. The defaults give the table in less than 25 minutes on two cores."""

    rounds: int = 3
    more_rounds: int = 1           # at most, for runs that others disturbed
    mammogram_rounds: int = 5
    seconds: float = 4.0
    mammograms: int = 40
    native_frames: int = 4200
    fragments: int = 11_500
    files: int = 1_000             # for programs that send files: of 8 KB
    large_files: int = 600         # and of CT
    files_for_slow_peers: int = 60
    lag_seconds: float = 60.0
    idle: int = 2_000
    silent: int = 200
    silent_tls: int = 50
    echoes: int = 20
    studies: int = 10_000          # to search in
    many_studies: int = 100_000    # and for the growth
    questions: int = 100           # of each kind, in each round
    study_instances: int = 100     # of the CT study that is retrieved
    retrievals: int = 5            # of it by each program, in each round
    mixed_studies: int = 1_000     # to search in while others store
    mixed_seconds: float = 20.0
    replicated_ct: int = 4_000     # 2 GB
    replicated_small: int = 20_000
    replicated_thin: int = 120     # 63 MB: 25 s of 20 Mbit/s
    wards: int = 200               # that are attached while a portal searches
    wards_hanging: int = 20        # of them
    wards_attached: int = 1_000    # that do nothing else
    ward_searches: int = 20
    quiet_s_max: float = 15.0


TINY = Scale(rounds=1, more_rounds=0, mammogram_rounds=1, seconds=0.3, mammograms=2, native_frames=8,
             fragments=8, files=12, large_files=6, files_for_slow_peers=6, lag_seconds=1.5, idle=20,
             silent=10, silent_tls=5, echoes=3, studies=30, many_studies=60, questions=5,
             study_instances=4, retrievals=1, mixed_studies=20, mixed_seconds=0.5,
             replicated_ct=4, replicated_small=20, replicated_thin=1, wards=8,
             wards_hanging=2, wards_attached=10, ward_searches=2, quiet_s_max=0.0)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run came to. `growth_bytes` is the highest resident memory over that of the idle server;
    `foreign` the share of all cores that neither server nor senders used; `problem` voids it."""

    tally: Tally
    server_cpu_s: float
    growth_bytes: int
    pss_bytes: int
    foreign: float
    problem: str

    @property
    def cpu_per_1000_s(self) -> float:
        return 1000 * self.server_cpu_s / max(self.tally.stored, 1)


@dataclass
class Bench:
    """What the rows share: the folder, the scale, corpora, certificates, and runs that were made already."""

    folder: Path
    scale: Scale
    kept: Path | None = None  # where loaded servers' data are kept for the next time
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    _runs: dict[tuple[str, str, int, bool], list[Run]] = field(default_factory=dict)

    @functools.cached_property
    def certificates(self) -> Certificates:
        return make_certificates(self.folder / "certificates")

    @functools.cached_property
    def small(self) -> Corpus:
        return instances.small()

    @functools.cached_property
    def ct(self) -> Corpus:
        return instances.ct()

    @functools.cached_property
    def mammogram(self) -> Corpus:
        return instances.mammogram()

    @functools.cached_property
    def native(self) -> Corpus:
        return instances.native_frames(self.scale.native_frames)

    @functools.cached_property
    def encapsulated(self) -> Corpus:
        return instances.fragments(self.scale.fragments)

    def wait_until_quiet(self) -> None:
        if self.scale.quiet_s_max:
            usage.wait_until_quiet(self.scale.quiet_s_max)

    @contextmanager
    def fresh(self, name: str) -> Iterator[Path]:
        """A folder for one run, gone afterwards with all that the disk still had to do for it."""
        place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            os.sync()

    def compare(self, servers: Sequence[type[Server]], corpus: Corpus, associations: int, rounds: int, *,
                count: int = UNLIMITED, tls: bool = False) -> list[list[Run]]:
        """The runs of each server, all of them in turns; those that another row asked for are not made
        again."""
        keys = [(server.name, corpus.name, associations, tls) for server in servers]
        todo = [(server, key) for server, key in zip(servers, keys, strict=True) if key not in self._runs]
        self._runs |= {key: [] for _, key in todo}
        for attempt in range(rounds + self.scale.more_rounds):
            for server, key in todo:
                held = self._runs[key]
                good = [run for run in held if run.foreign <= FOREIGN_SHARE_MAX]
                if attempt < rounds or len(good) < rounds:
                    held.append(self.run(server, corpus, associations, count=count, tls=tls))
        return [self._counting(self._runs[key]) for key in keys]

    def _counting(self, runs: list[Run]) -> list[Run]:
        quiet = [run for run in runs if run.foreign <= FOREIGN_SHARE_MAX]
        return quiet or runs

    def run(self, kind: type[Server], corpus: Corpus, associations: int, *, count: int = UNLIMITED,
            tls: bool = False) -> Run:
        """One run, from fresh data to none."""
        seconds = self.scale.seconds if count == UNLIMITED else 3600.0
        with self.fresh("run") as place, kind(place, self.certificates if tls else None) as server:
            self.wait_until_quiet()
            meter = Meter(server.pid)
            tally = send(server.target, corpus, Plan(associations, seconds, count))
            foreign = meter.foreign()
            problem = server.problem(corpus, tally)
            run = meter.run(tally, foreign, problem)
        self.say(f"  {kind.name} {corpus.name} x{associations}{' TLS' if tls else ''}: {tally.rate:,.1f}/s, "
                 f"{tally.bytes_rate / 1e6:,.1f} MB/s, p50 {tally.latency_s(0.5) * 1e3:.2f} ms, p95 "
                 f"{tally.latency_s(0.95) * 1e3:.2f} ms, CPU/1000 {run.cpu_per_1000_s:.2f} s (senders "
                 f"{1000 * tally.cpu_s / max(tally.stored, 1):.2f}), growth {run.growth_bytes / 1e6:.0f} MB, "
                 f"others {foreign:.0%}{f', VOID: {problem}' if problem else ''}")
        return run


class Meter:
    """What a server's tree costs from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        pids = usage.tree(pid)
        self._idle_bytes = usage.resident_bytes(pids)
        usage.forget_peak(pids)
        self._cpu_s = usage.cpu_s(pids)
        self._own_s = usage.own_cpu_s()
        self._machine = usage.machine()

    def foreign(self) -> float:
        """The share of the machine that others used so far."""
        now = usage.machine()
        ours = usage.own_cpu_s() - self._own_s + usage.cpu_s(usage.tree(self._pid)) - self._cpu_s
        others = now.busy_s - self._machine.busy_s - ours
        return max(0.0, others / max(now.total_s - self._machine.total_s, 0.01))

    def run(self, tally: Tally, foreign: float, problem: str) -> Run:
        """Once the server has nothing left to do."""
        self._settle()
        pids = usage.tree(self._pid)
        return Run(tally, usage.cpu_s(pids) - self._cpu_s, usage.peak_bytes(pids) - self._idle_bytes,
                   usage.proportional_bytes(pids), foreign, problem)

    def _settle(self) -> None:
        deadline = time.monotonic() + SETTLE_S_MAX
        before = usage.cpu_s(usage.tree(self._pid))
        while time.monotonic() < deadline:
            time.sleep(SETTLE_WINDOW_S)  # the window of the measurement, not a wait for luck
            after = usage.cpu_s(usage.tree(self._pid))
            if after - before <= SETTLE_CPU_S:
                return
            before = after
