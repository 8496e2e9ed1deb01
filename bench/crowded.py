"""The rows about a node that calls others, alone and beside thousands of idle associations: the destination
of a C-MOVE, a device that waits for its commitment report, and where a rule forwards to."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from archive.errors import MissError, Unavailable
from bench.asking import Asker, retrieve_identifier
from bench.crowds import ROOM_FOR_FILES, VERIFY, allow_files
from bench.population import Population
from bench.receiving import Receiver
from bench.retrieving import loaded
from bench.runs import Bench
from bench.servers import Miss
from bench.table import Bar, Result
from miss.load.instances import Corpus, ct_studies
from miss.load.sender import CALLING_AE, Line, Plan, Target, send
from miss.processes import wait_until
from node.dimse import contexts, messages
from node.dimse.errors import AssociationEnded
from node.dimse.identifiers import write_identifier
from node.dimse.messages import Field
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor

READER, ONWARD = "READER", "ONWARD"
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"  # the well-known SOP instance (PS3.4 J.3.5)
REQUEST_COMMITMENT = 1                          # action type ID (PS3.4 Table J.3-1)
ARRIVAL_S_MAX = 120.0
SLOWER_MAX = 1.5
REPORT_S_MAX = 5.0
RULE = f"""[[rule]]
name = "onward"
to = "{ONWARD}"
match = {{ sop_class = "SecondaryCaptureImageStorage" }}
"""


@dataclass(frozen=True, slots=True)
class Called:
    """A node with a study, and who waits to be called by it."""

    target: Target
    study: Corpus
    count: int
    reader: Receiver
    onward: Receiver
    reports: Receiver
    population: Population

    def move(self, attempt: int) -> float:
        """Seconds of one C-MOVE on a new association. Unavailable when not all of it arrived."""
        start, before = time.perf_counter(), self.reader.instances
        asker = Asker(self.target, contexts.STUDY_ROOT_MOVE)
        completed = asker.move(retrieve_identifier(self.study.instance(0).study_uid), READER)
        asker.release()
        spent = time.perf_counter() - start
        arrived = self.reader.instances - before
        if completed != self.count or arrived != self.count:
            raise Unavailable(f"a C-MOVE of {self.count} completed {completed}, and {arrived} arrived")
        return spent

    def report(self, attempt: int) -> float:
        """Seconds from a request for commitment, whose association ends at once, to the report on another."""
        before = self.reports.instances
        asked = Dataset()
        asked.TransactionUID = generate_uid()
        asked.ReferencedSOPSequence = [_referenced(self.study, number) for number in range(self.count)]
        peer = Peer(self.target.host, self.target.port, self.target.called_ae)
        proposed = [ProposedContext(1, contexts.STORAGE_COMMITMENT, (contexts.EXPLICIT_LITTLE,))]
        with Requestor.connect(peer, CALLING_AE, proposed) as requestor:
            context = requestor.context_of(contexts.STORAGE_COMMITMENT)
            if context is None:
                raise Unavailable("the node takes no request for commitment")
            request = messages.normalized_request(
                Field.N_ACTION, requestor.next_message_id(), contexts.STORAGE_COMMITMENT, COMMITMENT_INSTANCE,
                has_dataset=True, more=messages.short(messages.ACTION_TYPE_ID, REQUEST_COMMITMENT))
            start = time.perf_counter()
            answer, _ = requestor.call(context, request, write_identifier(asked, contexts.EXPLICIT_LITTLE))
            if answer.status:
                raise Unavailable(f"a request for commitment was answered {answer.status:04X}")
        _arrived(self.reports, before + 1)
        return time.perf_counter() - start

    def forward(self, attempt: int) -> float:
        """Seconds from the first C-STORE to the arrival of the last instance where the rule sends it."""
        before, start = self.onward.instances, time.perf_counter()
        tally = send(self.target, self.population, Plan(1, ARRIVAL_S_MAX, self.count, attempt * self.count))
        if tally.stored != self.count:
            raise Unavailable(f"{tally.stored} of {self.count} were stored")
        _arrived(self.onward, before + self.count)
        return time.perf_counter() - start


def _referenced(corpus: Corpus, number: int) -> Dataset:
    instance, item = corpus.instance(number), Dataset()
    item.ReferencedSOPClassUID = instance.sop_class_uid
    item.ReferencedSOPInstanceUID = instance.sop_instance_uid
    return item


def _arrived(receiver: Receiver, count: int) -> None:
    wait_until("what the node sends", lambda: receiver.instances >= count or None, timeout_s=ARRIVAL_S_MAX)


@dataclass(frozen=True, slots=True)
class CrowdedRow:
    key: str = "crowd"

    def measure(self, bench: Bench) -> list[Result]:
        allow_files(2 * bench.scale.idle + ROOM_FOR_FILES)
        beside = f"beside {bench.scale.idle:,} idle associations"
        alone: list[list[float]] = []
        crowded: list[list[float]] = []
        try:
            self._measure(bench, alone, crowded)
        except (MissError, AssociationEnded, OSError, ValueError) as error:
            return [Result(self.key, f"the node calls {beside}", "s", void=f"void: {error}")]
        count = bench.scale.study_instances
        works = ((f"C-MOVE of a CT study of {count}", Bar(most_ratio=SLOWER_MAX)),
                 (f"commitment of {count}, until its report,", Bar(most=REPORT_S_MAX)),
                 (f"{count} small instances stored and forwarded", Bar(most_ratio=SLOWER_MAX)))
        return [
            Result(self.key, f"{work} {beside}", "s", tuple(after), "MISS without them", tuple(before), bar)
            for (work, bar), before, after in zip(works, alone, crowded, strict=True)]

    def _measure(self, bench: Bench, alone: list[list[float]], crowded: list[list[float]]) -> None:
        scale = bench.scale
        attempts = 2 * scale.rounds * scale.retrievals
        with bench.fresh("crowd") as folder, ExitStack() as stack:
            reader, onward, reports = (stack.enter_context(Receiver(name))
                                       for name in (READER, ONWARD, CALLING_AE))
            server = Miss(folder, destinations={one.ae_title: one.port for one in (reader, onward, reports)})
            (server.node.place.state / "routes.toml").write_text(RULE)
            stack.enter_context(server)
            called = Called(server.target, ct_studies(scale.study_instances), scale.study_instances, reader,
                            onward, reports, Population(attempts * scale.study_instances // 10 + 1))
            loaded(server, called.study, called.count)
            works: list[Callable[[int], float]] = [called.move, called.report, called.forward]
            for first, found in ((0, alone), (attempts // 2, crowded)):
                if found is crowded:
                    for _ in range(scale.idle):
                        stack.callback(Line(server.target, VERIFY).sock.close)
                for work in works:
                    found.append([self._round(bench, work, first + number * scale.retrievals)
                                  for number in range(scale.rounds)])
                    bench.say(f"  {work.__name__}, {'beside the crowd' if found is crowded else 'alone'}: "
                              f"{median(found[-1]):.3f} s")

    def _round(self, bench: Bench, work: Callable[[int], float], first: int) -> float:
        bench.wait_until_quiet()
        return median(work(first + number) for number in range(bench.scale.retrievals))


CROWDED_ROWS = (CrowdedRow(),)
