"""The rows about searching: C-FIND at study level beside Orthanc over the same population, and how much
longer an answer of the same length takes where ten times as much is held."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

from archive.errors import Unavailable
from bench.asking import Asker, study_identifier
from bench.population import Population
from bench.questions import Question, questions
from bench.runs import Bench
from bench.servers import Miss, Orthanc, Server
from bench.table import Bar, Result
from miss.load.sender import Plan, Target, send

LOADING_ASSOCIATIONS = 4
LOADING_S_MAX = 3 * 3600.0
WARM_UP = 5  # questions of each kind that are not counted
P50, P95 = 0.5, 0.95
FIVE_TIMES_FASTER = Bar(most_ratio=0.2)
GROWTH_MAX = Bar(most_ratio=2)


@contextmanager
def holding(bench: Bench, kind: type[Server], population: Population) -> Iterator[Server]:
    """A server that holds the population: loaded by fast senders, or as it was kept before."""
    with bench.fresh("find") as folder:
        server = kind(folder)
        template = bench.kept and bench.kept / f"{kind.name}-{population.name.replace(' ', '-')}"
        if template and template.exists():
            bench.say(f"  {kind.name}: as kept in {template}")
            server.take(template)
        else:
            with server:
                _load(bench, server, population)
            if template:
                template.parent.mkdir(parents=True, exist_ok=True)
                server.keep(template)
        with server:
            yield server


def _load(bench: Bench, server: Server, population: Population) -> None:
    tally = send(server.target, population, Plan(LOADING_ASSOCIATIONS, LOADING_S_MAX, population.count))
    if problem := server.problem(population, tally):
        raise Unavailable(f"{server.name}, while it was loaded: {problem}")
    bench.say(f"  {server.name}: {tally.stored:,} loaded over {LOADING_ASSOCIATIONS} associations, "
              f"{tally.rate:,.0f}/s")


@dataclass(slots=True)
class Latencies:
    """Of one server and one kind of question: p50 and p95 of each round, in milliseconds."""

    p50: list[float] = field(default_factory=list)
    p95: list[float] = field(default_factory=list)

    def add(self, seconds: Sequence[float]) -> None:
        ordered = sorted(seconds)
        for share, found in ((P50, self.p50), (P95, self.p95)):
            found.append(1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))])


def ask(target: Target, asked: Sequence[Question], count: int) -> list[float]:
    """`count` questions over one association that stays open: seconds of each. Unavailable when an answer has
    another number of matches than there are."""
    asker = Asker(target)
    prepared = [(one, study_identifier(one)) for one in asked]
    spent: list[float] = []
    try:
        for one, identifier in islice(cycle(prepared), WARM_UP + count):
            start = time.perf_counter()
            matches = asker.find(identifier)
            spent.append(time.perf_counter() - start)
            if matches != one.matches:
                raise Unavailable(f"{one.keyword} {one.value}: {matches} matches, of {one.matches}")
    finally:
        asker.release()
    return spent[WARM_UP:]


def _rounds(bench: Bench, servers: Sequence[tuple[Server, dict[str, list[Question]]]]
            ) -> list[dict[str, Latencies]]:
    """What each server takes for each kind of its questions, in turns."""
    kinds = list(servers[0][1])
    found = [{kind: Latencies() for kind in kinds} for _ in servers]
    for _ in range(bench.scale.rounds):
        for kind in kinds:
            for (server, asked), latencies in zip(servers, found, strict=True):
                bench.wait_until_quiet()
                try:
                    latencies[kind].add(ask(server.target, asked[kind], bench.scale.questions))
                except (Unavailable, OSError) as error:
                    raise Unavailable(f"{server.name}: {error}") from None
                bench.say(f"  {server.name}, {kind}: p50 {latencies[kind].p50[-1]:.2f} ms, p95 "
                          f"{latencies[kind].p95[-1]:.2f} ms")
    return found


def _note(asked: Sequence[Question]) -> str:
    matches = sorted({one.matches for one in asked})
    said = f"{matches[0]}" if len(matches) == 1 else f"{matches[0]} to {matches[-1]}"
    return f"{said} match{'es' if matches[-1] > 1 else ''}"


@dataclass(frozen=True, slots=True)
class FindRow:
    """Both servers hold the same and are asked the same."""

    key: str = "find"

    def measure(self, bench: Bench) -> list[Result]:
        population = Population(bench.scale.studies)
        asked = questions(population)
        work = f"C-FIND in {population.count:,} instances"
        missing = Orthanc.missing(tls=False)
        try:
            with ExitStack() as stack:
                servers = [stack.enter_context(holding(bench, kind, population))
                           for kind in (Miss, *(() if missing else (Orthanc,)))]
                ours, *theirs = _rounds(bench, [(server, asked) for server in servers])
        except (Unavailable, OSError) as error:
            return [Result(self.key, work, "ms", void=f"void: {error}")]
        lines: list[Result] = []
        for kind, values in asked.items():
            line = Result(self.key, f"{work} by {kind}, p50", "ms", tuple(ours[kind].p50), Orthanc.name,
                          bar=FIVE_TIMES_FASTER, void=missing, note=_note(values))
            slow = replace(line, work=f"{work} by {kind}, p95", ours=tuple(ours[kind].p95), bar=Bar())
            for other in theirs:
                line = replace(line, theirs=tuple(other[kind].p50))
                slow = replace(slow, theirs=tuple(other[kind].p95))
            lines += [line, slow]
        return lines


@dataclass(frozen=True, slots=True)
class GrowthRow:
    """Two nodes, of which one holds ten times as much, and answers of the same length. Both are loaded over
    associations, as a ward loads them: the large one for some ten minutes."""

    key: str = "growth"

    def measure(self, bench: Bench) -> list[Result]:
        small, large = Population(bench.scale.studies), Population(bench.scale.many_studies)
        asked = questions(small), questions(large)
        work = f"C-FIND in {large.count:,} instances"
        peer = f"MISS with {small.count:,}"
        try:
            with ExitStack() as stack:
                servers = [stack.enter_context(holding(bench, Miss, held)) for held in (small, large)]
                before, after = _rounds(bench, list(zip(servers, asked, strict=True)))
        except (Unavailable, OSError) as error:
            return [Result(self.key, work, "ms", void=f"void: {error}")]
        lines: list[Result] = []
        for kind in asked[0]:
            line = Result(self.key, f"{work} by {kind}, p50", "ms", tuple(after[kind].p50), peer,
                          tuple(before[kind].p50), GROWTH_MAX, note=_note([*asked[0][kind], *asked[1][kind]]))
            lines += [line, replace(line, work=f"{work} by {kind}, p95", ours=tuple(after[kind].p95),
                                    theirs=tuple(before[kind].p95), bar=Bar())]
        return lines


FIND_ROWS = (FindRow(),)
GROWTH_ROWS = (GrowthRow(),)
