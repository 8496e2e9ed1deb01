"""The rows about what a node does of its own accord beside thousands of idle associations: it calls the
destination of a C-MOVE."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from archive.errors import Unavailable
from bench.asking import Asker, retrieve_identifier
from bench.crowds import ROOM_FOR_FILES, VERIFY, allow_files
from bench.receiving import Receiver
from bench.retrieving import loaded
from bench.runs import Bench
from bench.servers import Miss
from bench.table import Bar, Result
from miss.load.instances import Corpus, ct_studies
from miss.load.sender import Line, Target
from node.dimse import contexts

DESTINATION = "READER"
SLOWER_MAX = 1.5


def moved(target: Target, study: Corpus, count: int, receiver: Receiver) -> float:
    """Seconds of one C-MOVE on a new association. Unavailable when not all of it arrived."""
    start, before = time.perf_counter(), receiver.instances
    asker = Asker(target, contexts.STUDY_ROOT_MOVE)
    completed = asker.move(retrieve_identifier(study.instance(0).study_uid), receiver.ae_title)
    asker.release()
    spent = time.perf_counter() - start
    arrived = receiver.instances - before
    if completed != count or arrived != count:
        raise Unavailable(f"a C-MOVE of {count} completed {completed}, and {arrived} arrived")
    return spent


@dataclass(frozen=True, slots=True)
class CrowdedMoveRow:
    key: str = "crowd"

    def measure(self, bench: Bench) -> list[Result]:
        allow_files(2 * bench.scale.idle + ROOM_FOR_FILES)
        count = bench.scale.study_instances
        work = f"C-MOVE of a CT study of {count} beside {bench.scale.idle:,} idle associations"
        study = ct_studies(count)
        alone: list[float] = []
        beside: list[float] = []
        try:
            with bench.fresh("crowd") as folder, ExitStack() as stack:
                receiver = stack.enter_context(Receiver(DESTINATION))
                server = stack.enter_context(Miss(folder, destinations={DESTINATION: receiver.port}))
                loaded(server, study, count)
                for times in (alone, beside):
                    for _ in range(bench.scale.rounds):
                        bench.wait_until_quiet()
                        times.append(median(moved(server.target, study, count, receiver)
                                            for _ in range(bench.scale.retrievals)))
                    if times is alone:
                        for _ in range(bench.scale.idle):
                            stack.callback(Line(server.target, VERIFY).sock.close)
        except (Unavailable, OSError, ValueError) as error:
            return [Result(self.key, work, "s", void=f"void: {error}")]
        return [Result(self.key, work, "s", tuple(beside), "MISS without them", tuple(alone),
                       Bar(most_ratio=SLOWER_MAX))]


CROWDED_ROWS = (CrowdedMoveRow(),)
