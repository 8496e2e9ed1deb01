"""The rows in which programs send files: DCMTK's storescu as it comes, to MISS and to Orthanc as they come,
and `miss send` beside pynetdicom's storescu, to a storescp that keeps nothing."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from archive.errors import Unavailable
from bench import programs
from bench.runs import Bench
from bench.servers import IgnoringStorescp, Miss, Orthanc, Server
from bench.table import Bar, Result
from miss.load.instances import Corpus
from miss.load.sender import CALLING_AE, Tally, Target

SEND_S_MAX = 600.0


@functools.cache
def written(folder: Path, corpus: Corpus, count: int) -> Path:
    """A folder of the first `count` instances as files."""
    made = folder / f"files-{corpus.name.replace(' ', '')}-{count}"
    made.mkdir()
    for number in range(count):
        instance = corpus.instance(number)
        with (made / f"{number:06d}.dcm").open("wb") as file:
            file.write(instance.part10_head())
            file.writelines(instance.chunks())
    return made


def timed(command: list[str], environment: dict[str, str]) -> float:
    """How long a program took; Unavailable with its last words when it failed."""
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SEND_S_MAX,
                          check=False)
    spent = time.perf_counter() - start
    if done.returncode:
        raise Unavailable(f"{Path(command[0]).name} ended with code {done.returncode}: "
                          f"{(done.stderr or done.stdout).strip()[-300:]}")
    return spent


@dataclass(frozen=True, slots=True)
class UntunedRow:
    """DCMTK's storescu with Nagle's algorithm on. Orthanc runs as it comes, too; it gets fewer files, as each
    may cost it a tenth of a second."""

    key: str
    work: str
    corpus: Callable[[Bench], Corpus]
    files: Callable[[Bench], int]
    least_ratio: float

    def measure(self, bench: Bench) -> list[Result]:
        bar, unit = Bar(least_ratio=self.least_ratio), "instances/s"
        if programs.find("storescu") is None:
            return [Result(self.key, self.work, unit, bar=bar, void="DCMTK is not installed")]
        peer_missing = Orthanc.missing(tls=False)
        ours: list[float] = []
        theirs: list[float] = []
        try:
            for _ in range(bench.scale.rounds):
                ours.append(self._rate(bench, Miss, self.files(bench)))
                if not peer_missing:
                    theirs.append(self._rate(bench, Orthanc, bench.scale.files_for_slow_peers))
        except Unavailable as error:
            return [Result(self.key, self.work, unit, bar=bar, void=f"void: {error}")]
        return [Result(self.key, self.work, unit, tuple(ours), Orthanc.name, tuple(theirs), bar,
                       peer_missing)]

    def _rate(self, bench: Bench, kind: type[Server], count: int) -> float:
        corpus = self.corpus(bench)
        files = written(bench.folder, corpus, count)
        with bench.fresh("untuned") as place, kind(place, nagle=True) as server:
            bench.wait_until_quiet()
            spent = timed(storescu(server.target, files), programs.environment(nagle=True))
            if problem := server.problem(corpus, Tally(stored=count)):
                raise Unavailable(f"{kind.name}: {problem}")
        bench.say(f"  storescu as it comes, {corpus.name}, to {kind.name}: {count / spent:,.1f}/s")
        return count / spent


def storescu(target: Target, folder: Path) -> list[str]:
    return [programs.find("storescu") or "storescu", "-aet", CALLING_AE, "-aec", target.called_ae, "+sd",
            "+r", target.host, str(target.port), str(folder)]


@dataclass(frozen=True, slots=True)
class RequestorRow:
    """What a further file costs: the time of many less the time of one, so that no program pays for its
    start."""

    key: str = "send"
    work: str = "sending 0.5 MB CT to DCMTK's storescp"

    def measure(self, bench: Bench) -> list[Result]:
        bar, unit = Bar(least_ratio=3), "MB/s"
        if why := IgnoringStorescp.missing(tls=False):
            return [Result(self.key, self.work, unit, bar=bar, void=why)]
        count = bench.scale.large_files
        many, one = written(bench.folder, bench.ct, count), written(bench.folder, bench.ct, 1)
        rates: dict[str, list[float]] = {"MISS": [], "pynetdicom storescu": []}
        commands = {"MISS": miss_send, "pynetdicom storescu": pynetdicom_storescu}
        try:
            for _ in range(bench.scale.rounds):
                for name, command in commands.items():
                    with bench.fresh("send") as place, IgnoringStorescp(place) as server:
                        bench.wait_until_quiet()
                        alone, all_of_them = (timed(command(server.target, folder), programs.environment())
                                              for folder in (one, many))
                    further = (count - 1) * bench.ct.instance(0).size / 1e6
                    bench.say(f"  {name}: one file {alone:.2f} s, {count} files {all_of_them:.2f} s")
                    if all_of_them > alone:
                        rates[name].append(further / (all_of_them - alone))
        except Unavailable as error:
            return [Result(self.key, self.work, unit, bar=bar, void=f"void: {error}")]
        (_, ours), (peer, theirs) = rates.items()
        if not ours or not theirs:
            return [Result(self.key, self.work, unit, bar=bar,
                           void="not measured: the files took no longer than a program's start")]
        return [Result(self.key, self.work, unit, tuple(ours), peer, tuple(theirs), bar)]


def miss_send(target: Target, folder: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "miss", "send", str(folder), "--calling", CALLING_AE,
            "--to", f"{target.called_ae}@{target.host}:{target.port}"]


def pynetdicom_storescu(target: Target, folder: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "pynetdicom", "storescu", target.host, str(target.port), str(folder),
            "-r", "-cx", "-aet", CALLING_AE, "-aec", target.called_ae]


SENDING_ROWS = (
    UntunedRow("untuned-small", "8 KB from storescu as it comes", lambda bench: bench.small,
               lambda bench: bench.scale.files, 30),
    UntunedRow("untuned-ct", "0.5 MB CT from storescu as it comes", lambda bench: bench.ct,
               lambda bench: bench.scale.large_files, 10),
    RequestorRow(),
)
