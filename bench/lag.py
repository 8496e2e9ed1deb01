"""The row about the index under full load: how far it lags behind what was acknowledged, and whether a C-FIND
right after a C-STORE sees it."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from dataclasses import dataclass, field
from statistics import median

from archive.errors import MissError
from bench.runs import Bench
from bench.servers import Miss
from bench.table import Bar, Result
from miss.load.instances import Corpus, Instance
from miss.load.measure import check
from miss.load.sender import CALLING_AE, Load, Plan, Target
from miss.load.temporary_node import Place
from node.dimse import contexts
from node.dimse.errors import AssociationEnded
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.dimse.status import PENDING, SUCCESS

ASSOCIATIONS = 4
CLOCK_S = 0.01
LOOK_S = 0.25
FIND_EVERY_S = 0.5
FOUND_FIRST = 500_000_000  # numbers that the load does not reach
RECORDS_MAX = 10_000       # the bound past which intake waits for the index
SECONDS_MAX = 30.0


@dataclass(slots=True)
class Lag:
    """Samples: how many acknowledged instances the index lacked, and how old the oldest of them was."""

    records: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Looking:
    """C-STORE of one instance, then C-FIND for it, again and again over one association beside the load."""

    target: Target
    corpus: Corpus
    stored: int = 0
    missed: int = 0
    latencies: list[float] = field(default_factory=list)
    problem: str = ""
    _ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            peer = Peer(self.target.host, self.target.port, self.target.called_ae)
            proposed = [
                ProposedContext(1, self.corpus.sop_class_uid, (self.corpus.transfer_syntax_uid,)),
                ProposedContext(3, contexts.STUDY_ROOT_FIND, (contexts.EXPLICIT_LITTLE,)),
            ]
            with Requestor.connect(peer, CALLING_AE, proposed) as requestor:
                while not self.stored or not self._ended.wait(FIND_EVERY_S):
                    self._look(requestor, self.corpus.instance(FOUND_FIRST + self.stored))
        except (AssociationEnded, MissError) as error:
            self.problem = f"looking ended: {error}"

    def end(self) -> None:
        self._ended.set()

    def _look(self, requestor: Requestor, instance: Instance) -> None:
        context = requestor.context(instance.sop_class_uid, instance.transfer_syntax_uid)
        assert context is not None
        status = requestor.store(context, instance.sop_instance_uid, instance.chunks())
        if status != SUCCESS:
            self.problem = f"an instance was answered {status:04X}"
            return
        self.stored += 1
        start = time.perf_counter()
        answers = [answer.status for answer, _ in requestor.find(image_identifier(instance))]
        self.latencies.append(time.perf_counter() - start)
        if answers != [PENDING, SUCCESS]:
            self.missed += 1


def image_identifier(instance: Instance) -> bytes:
    """Which study, series and instance, as a C-FIND at the level IMAGE asks (PS3.4 C.6.2.1)."""
    series_uid = instance.sop_instance_uid.rpartition(".")[0]
    found = b""
    for group, element, vr, value in (
        (0x0008, 0x0018, b"UI", instance.sop_instance_uid), (0x0008, 0x0052, b"CS", "IMAGE"),
        (0x0020, 0x000D, b"UI", instance.study_uid), (0x0020, 0x000E, b"UI", series_uid),
    ):
        octets = value.encode()
        octets += (b"\0" if vr == b"UI" else b" ") * (len(octets) & 1)
        found += (group.to_bytes(2, "little") + element.to_bytes(2, "little") + vr
                  + len(octets).to_bytes(2, "little") + octets)
    return found


@dataclass(frozen=True, slots=True)
class LagRow:
    key: str = "lag"
    work: str = "index lag under full load, 8 KB, 4 associations"

    def measure(self, bench: Bench) -> list[Result]:
        with bench.fresh("lag") as folder, Miss(folder) as server:
            bench.wait_until_quiet()
            looking = Looking(server.target, bench.small)
            thread = threading.Thread(target=looking.run, name="looking")
            plan = Plan(ASSOCIATIONS, bench.scale.lag_seconds, 10**8)
            with Load(server.target, bench.small, plan) as load:
                thread.start()
                try:
                    load.begin()
                    lag = watch(server.node.place, load, looking, bench.scale.lag_seconds)
                    tally = load.finish()
                finally:
                    looking.end()
                    thread.join()
            rate = tally.rate
            tally.stored += looking.stored
            void = looking.problem or check(server.node.place, bench.small, tally)
        bench.say(f"  {rate:,.0f}/s; lag p50 {median(lag.records):,.0f} max {max(lag.records):,} records, "
                  f"max {max(lag.seconds):.2f} s; {looking.missed} of {looking.stored} finds missed")
        void = f"void: {void}" if void else ""
        seconds = f"{bench.scale.lag_seconds:g} s at {rate:,.0f}/s"
        return [
            Result(self.key, f"{self.work}, most", "records", (float(max(lag.records)),),
                   bar=Bar(most=RECORDS_MAX), void=void, note=f"p50 {median(lag.records):,.0f}; {seconds}"),
            Result(self.key, f"{self.work}, most", "s", (max(lag.seconds),), bar=Bar(most=SECONDS_MAX),
                   void=void, note=f"p50 {median(lag.seconds):.2f} s"),
            Result(self.key, "C-FIND right after a C-STORE meanwhile: not seen", "instances",
                   (float(looking.missed),), bar=Bar(most=0), void=void,
                   note=f"{looking.stored} asked, p50 {median(looking.latencies) * 1e3:.0f} ms, slowest "
                        f"{max(looking.latencies) * 1e3:.0f} ms"),
        ]


def watch(place: Place, load: Load, looking: Looking, seconds: float) -> Lag:
    """Samples until the time is over. The index is looked at before the count of what was acknowledged: a
    sample is never too good."""
    found = Lag()
    archive = place.open_archive()
    times, counts = [time.monotonic()], [0]
    end = times[0] + seconds
    next_look = times[0]
    try:
        while (now := time.monotonic()) < end or not found.records:
            times.append(now)
            counts.append(load.stored + looking.stored)
            if now >= next_look:
                next_look = now + LOOK_S
                indexed = archive.index.totals().instances
                behind = max(0, load.stored + looking.stored - indexed)
                found.records.append(behind)
                first = bisect_right(counts, indexed)  # when more than that was first acknowledged
                waits = behind and first < len(times)
                found.seconds.append(time.monotonic() - times[first] if waits else 0.0)
            time.sleep(CLOCK_S)  # the clock of the samples
    finally:
        archive.close()
    return found


LAG_ROWS = (LagRow(),)
