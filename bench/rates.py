"""The rows that are rates of a load by our own sender, with what follows from the same runs: memory, CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.runs import UNLIMITED, Bench, Run
from bench.servers import ForkingStorescp, Miss, Orthanc, Pynetdicom, Server, Storescp
from bench.table import Bar, Result
from miss.load.instances import Corpus

MIB = 1 << 20
GROWTH_MIB_MAX = 64.0
RATE, BYTES_RATE, CPU, GROWTH = "instances/s", "MB/s", "CPU s per 1,000", "MiB over idle"

FIGURES: dict[str, Callable[[Run], float]] = {
    RATE: lambda run: run.tally.rate,
    BYTES_RATE: lambda run: run.tally.bytes_rate / 1e6,
    CPU: lambda run: run.cpu_per_1000_s,
    GROWTH: lambda run: run.growth_bytes / MIB,
}


@dataclass(frozen=True, slots=True)
class RateRow:
    """Lines from one group of runs: of each peer and unit what is to be reached. `alone` units are of MISS,
    with no peer beside them. `count` and `rounds` pick from the scale where the defaults do not do."""

    key: str
    work: str
    corpus: Callable[[Bench], Corpus]
    associations: int
    peers: Sequence[tuple[type[Server], str, Bar]]
    alone: Sequence[tuple[str, Bar]] = ()
    tls: bool = False
    count: Callable[[Bench], int] = lambda bench: UNLIMITED
    rounds: Callable[[Bench], int] = lambda bench: bench.scale.rounds

    def measure(self, bench: Bench) -> list[Result]:
        if why := Miss.missing(tls=self.tls):
            return [Result(self.key, self.work, self._units()[0], void=why)]
        there = list(dict.fromkeys(peer for peer, _, _ in self.peers if not peer.missing(tls=self.tls)))
        groups = bench.compare([Miss, *there], self.corpus(bench), self.associations, self.rounds(bench),
                               count=self.count(bench), tls=self.tls)
        runs: dict[type[Server], list[Run]] = dict(zip([Miss, *there], groups, strict=True))
        lines = [self._against(runs, peer, unit, bar) for peer, unit, bar in self.peers]
        return lines + [self._line(runs[Miss], unit, bar) for unit, bar in self.alone]

    def _units(self) -> list[str]:
        return [unit for _, unit, _ in self.peers] + [unit for unit, _ in self.alone]

    def _against(self, runs: dict[type[Server], list[Run]], peer: type[Server], unit: str,
                 bar: Bar) -> Result:
        line = self._line(runs[Miss], unit, bar)
        if why := peer.missing(tls=self.tls):
            if not bar.needs_peer and bar != Bar():
                return replace(line, note=f"{line.note}; {why}")
            return replace(line, peer=peer.name, void=line.void or why)
        theirs = tuple(map(FIGURES[unit], runs[peer]))
        return replace(line, peer=peer.name, theirs=theirs, void=line.void or _void(peer.name, runs[peer]))

    def _line(self, runs: list[Run], unit: str, bar: Bar) -> Result:
        middle = sorted(runs, key=lambda run: run.tally.rate)[len(runs) // 2]
        p50_ms, p95_ms = (middle.tally.latency_s(share) * 1e3 for share in (0.5, 0.95))
        note = f"p50 {p50_ms:.2f} ms, p95 {p95_ms:.2f} ms" if unit in (RATE, BYTES_RATE) else ""
        if unit == GROWTH:
            note = f"PSS afterwards {middle.pss_bytes / MIB:.0f} MiB"
        return Result(self.key, self.work, unit, tuple(map(FIGURES[unit], runs)), bar=bar,
                      void=_void("MISS", runs), note=note)


def _void(name: str, runs: Sequence[Run]) -> str:
    """Whose answers were not true."""
    return next((f"void: {name}: {run.problem}" for run in runs if run.problem), "")


def _ratio(least: float) -> Bar:
    return Bar(least_ratio=least)


_THIRD = Bar(most_ratio=1 / 3)
_GROWTH = Bar(most=GROWTH_MIB_MAX)


def _small(associations: int, least: float, *others: tuple[type[Server], Bar]) -> RateRow:
    return RateRow(
        f"small-{associations}", f"8 KB, {_many(associations)}", lambda bench: bench.small, associations,
        [(Orthanc, RATE, _ratio(least)), *((server, RATE, bar) for server, bar in others)])


def _ct(associations: int, least: float) -> RateRow:
    return RateRow(f"ct-{associations}", f"0.5 MB CT, {_many(associations)}", lambda bench: bench.ct,
                   associations, [(Orthanc, BYTES_RATE, _ratio(least))])


def _many(associations: int) -> str:
    return f"{associations} association{'s' if associations > 1 else ''}"


def _mammogram(associations: int) -> RateRow:
    return RateRow(
        f"mg-{associations}", f"30 MB MG, {_many(associations)}", lambda bench: bench.mammogram, associations,
        [(Orthanc, BYTES_RATE, _ratio(1.3)), (Orthanc, GROWTH, _GROWTH)],
        count=lambda bench: bench.scale.mammograms, rounds=lambda bench: bench.scale.mammogram_rounds)


def _tls(name: str, corpus: Callable[[Bench], Corpus], associations: int, unit: str, least: float) -> RateRow:
    return RateRow(f"tls-{name}-{associations}", f"{'8 KB' if name == 'small' else '0.5 MB CT'} over TLS, "
                   f"{_many(associations)}", corpus, associations, [(Orthanc, unit, _ratio(least))], tls=True)


RATE_ROWS: tuple[RateRow, ...] = (
    _small(1, 2.5, (Storescp, Bar())),
    _small(4, 3, (Storescp, _ratio(1)), (ForkingStorescp, Bar()), (Pynetdicom, Bar())),
    _small(8, 3, (Storescp, _ratio(1))),
    _ct(1, 3), _ct(4, 2.5), _ct(8, 2.5),
    _mammogram(1), _mammogram(4),
    RateRow("native", "one native object of 2.2 GB", lambda bench: bench.native, 1,
            [(Orthanc, BYTES_RATE, _ratio(3)), (Orthanc, GROWTH, _GROWTH)], count=lambda bench: 1),
    RateRow("encapsulated", "one object of 6 GB in fragments", lambda bench: bench.encapsulated, 1,
            [], [(BYTES_RATE, Bar()), (GROWTH, _GROWTH)], count=lambda bench: 1),
    _tls("small", lambda bench: bench.small, 1, RATE, 2.5),
    _tls("small", lambda bench: bench.small, 4, RATE, 2.5),
    _tls("ct", lambda bench: bench.ct, 1, BYTES_RATE, 1.3),
    _tls("ct", lambda bench: bench.ct, 4, BYTES_RATE, 1.3),
    RateRow("cpu-small", "CPU of 8 KB, index included, 4 associations", lambda bench: bench.small, 4,
            [(Orthanc, CPU, _THIRD)]),
    RateRow("cpu-ct", "CPU of CT, index included, 4 associations", lambda bench: bench.ct, 4,
            [(Orthanc, CPU, _THIRD)]),
)
