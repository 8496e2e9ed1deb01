"""The rows about everything at once: four senders store as fast as they can, alone and then while others
search and retrieve at a rate of their own, which has to be met."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, cycle
from statistics import median

from archive.errors import MissError, Unavailable
from bench.asking import Asker, retrieve_identifier, study_identifier
from bench.population import Population
from bench.questions import questions
from bench.receiving import Receiver
from bench.retrieving import loaded
from bench.runs import Bench
from bench.servers import Miss
from bench.table import Bar, Result
from miss.load.instances import Corpus, ct_studies
from miss.load.measure import check
from miss.load.sender import Load, Plan, Tally, Target, send
from node.dimse import contexts

ASSOCIATIONS = 4
FINDS_PER_S = 50
FIND_ASSOCIATIONS = 16
MOVES = 8
MOVE_BYTES_PER_S = 10e6
MET = 0.95           # of what was offered: starts and ends are in the figures
SHARE_LEFT = 0.6
UNLIMITED = 10**7
SECOND_LOAD = 10**8  # the number of its first instance: none of the first load's


@dataclass(slots=True)
class Offered:
    """Work that others bring from `begin` on for so many seconds, by threads; `problems` say what failed."""

    seconds: float
    problems: list[str] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _start: float = 0.0

    def begin(self, works: list[Callable[[], None]]) -> None:
        self._start = time.perf_counter()
        for work in works:
            thread = threading.Thread(target=self._run, args=(work,), name="offered")
            thread.start()
            self._threads.append(thread)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def due(self, seconds: float) -> bool:
        """Waits for that moment after the beginning; False when it is past the end."""
        if seconds >= self.seconds:
            return False
        time.sleep(max(0.0, self._start + seconds - time.perf_counter()))  # the pace that is offered
        return True

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (MissError, OSError, ValueError) as error:
            self.problems.append(str(error))


@dataclass(slots=True)
class Finds:
    """Searches at a fixed rate, each begun when it is due, whether the one before is answered or not: as many
    associations as there are threads. Latencies count from when they were due."""

    target: Target
    population: Population
    latencies: list[float] = field(default_factory=list)
    ended: float = 0.0

    def works(self, offered: Offered) -> list[Callable[[], None]]:
        asked = cycle([one for kind in questions(self.population).values() for one in kind])
        numbers = count()
        lock = threading.Lock()

        def work() -> None:
            asker = Asker(self.target)
            while True:
                with lock:
                    question, due = next(asked), next(numbers) / FINDS_PER_S
                if not offered.due(due):
                    break
                matches = asker.find(study_identifier(question))
                self.ended = offered.elapsed
                self.latencies.append(self.ended - due)
                if matches != question.matches:
                    raise Unavailable(f"a C-FIND had {matches} matches, of {question.matches}")
            asker.release()

        return [work] * FIND_ASSOCIATIONS

    @property
    def rate(self) -> float:
        return len(self.latencies) / max(self.ended, 1e-6)


@dataclass(slots=True)
class Moves:
    """One study, again and again, to destinations that read at their own pace: bytes a second of each C-MOVE
    from its request to its final response."""

    target: Target
    study: Corpus
    count: int
    receivers: list[Receiver]
    rates: list[float] = field(default_factory=list)

    def works(self, offered: Offered) -> list[Callable[[], None]]:
        size = sum(self.study.instance(number).size for number in range(self.count))
        identifier = retrieve_identifier(self.study.instance(0).study_uid)

        def mover(receiver: Receiver) -> Callable[[], None]:
            def work() -> None:
                asker = Asker(self.target, contexts.STUDY_ROOT_MOVE)
                while True:
                    start, before = time.perf_counter(), receiver.received_bytes
                    completed = asker.move(identifier, receiver.ae_title)
                    self.rates.append(size / (time.perf_counter() - start))
                    received = receiver.received_bytes - before
                    if completed != self.count or received != size:
                        raise Unavailable(f"a C-MOVE completed {completed} of {self.count} sub-operations, "
                                          f"{received:,} bytes of {size:,}")
                    if offered.elapsed >= offered.seconds:
                        break
                asker.release()

            return work

        return [mover(receiver) for receiver in self.receivers]


@dataclass(frozen=True, slots=True)
class MixedRound:
    alone: Tally
    beside: Tally
    finds: Finds
    moves: Moves


@dataclass(frozen=True, slots=True)
class MixedRow:
    key: str
    stored: str
    corpus: Callable[[Bench], Corpus]

    def measure(self, bench: Bench) -> list[Result]:
        work = f"{ASSOCIATIONS} associations that store {self.stored} beside {FINDS_PER_S} C-FIND/s and " \
               f"{MOVES} C-MOVEs"
        try:
            rounds = [self._round(bench) for _ in range(bench.scale.rounds)]
        except (Unavailable, OSError) as error:
            return [Result(self.key, work, "instances/s", void=f"void: {error}")]
        latencies = sorted(one for each in rounds for one in each.finds.latencies)
        return [
            Result(self.key, work, "instances/s", tuple(one.beside.rate for one in rounds), "MISS alone",
                   tuple(one.alone.rate for one in rounds), Bar(least_ratio=SHARE_LEFT)),
            Result(self.key, "C-FIND answered meanwhile", "1/s", tuple(one.finds.rate for one in rounds),
                   bar=Bar(least=MET * FINDS_PER_S),
                   note=f"p50 {median(latencies) * 1e3:.0f} ms, p95 "
                        f"{latencies[int(len(latencies) * 0.95)] * 1e3:.0f} ms"),
            Result(self.key, f"the slowest of the C-MOVEs to {MOVES} destinations meanwhile", "MB/s",
                   tuple(min(one.moves.rates) / 1e6 for one in rounds),
                   bar=Bar(least=MET * MOVE_BYTES_PER_S / 1e6),
                   note=f"{sum(len(one.moves.rates) for one in rounds)} C-MOVEs"),
        ]

    def _round(self, bench: Bench) -> MixedRound:
        corpus, scale = self.corpus(bench), bench.scale
        study, population = ct_studies(scale.study_instances), Population(scale.mixed_studies)
        with bench.fresh("mixed") as folder, ExitStack() as stack:
            receivers = [stack.enter_context(Receiver(f"READER{number}", MOVE_BYTES_PER_S))
                         for number in range(MOVES)]
            server = stack.enter_context(
                Miss(folder, destinations={one.ae_title: one.port for one in receivers}))
            loaded(server, study, scale.study_instances)
            send(server.target, population, Plan(ASSOCIATIONS, 3600.0, population.count))
            bench.wait_until_quiet()
            alone = send(server.target, corpus, Plan(ASSOCIATIONS, scale.mixed_seconds, UNLIMITED))
            bench.wait_until_quiet()
            plan = Plan(ASSOCIATIONS, scale.mixed_seconds, UNLIMITED, first=SECOND_LOAD)
            with Load(server.target, corpus, plan) as load:
                offered = Offered(scale.mixed_seconds)
                finds = Finds(server.target, population)
                moves = Moves(server.target, study, scale.study_instances, receivers)
                offered.begin(finds.works(offered) + moves.works(offered))
                load.begin()
                beside = load.finish()
                offered.join()
            if offered.problems:
                raise Unavailable("; ".join(dict.fromkeys(offered.problems)))
            everything = Tally(alone.stored + beside.stored + scale.study_instances + population.count,
                               failures=alone.failures + beside.failures)
            if problem := check(server.node.place, corpus, everything):
                raise Unavailable(problem)
        bench.say(f"  {self.stored}: alone {alone.rate:,.0f}/s, beside {beside.rate:,.0f}/s; "
                  f"{finds.rate:.1f} C-FIND/s, p50 {median(finds.latencies) * 1e3:.0f} ms; slowest of "
                  f"{len(moves.rates)} C-MOVEs {min(moves.rates) / 1e6:.1f} MB/s")
        return MixedRound(alone, beside, finds, moves)


MIXED_ROWS = (
    MixedRow("mixed-small", "8 KB", lambda bench: bench.small),
    MixedRow("mixed-ct", "0.5 MB CT", lambda bench: bench.ct),
)
