"""The rows about many wards at one hub: searches that need some of them, none of them, or some that hang, and
what a thousand idle attachments cost. The hub is a process of its own, the wards (`bench/simulated_wards.py`)
are another, and this one is the portal: its regional source, over gRPC to the hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from archive.archive import Archive
from archive.database import sqlite_url
from archive.errors import Unavailable
from archive.index.index import Index
from archive.ledger import Ledger
from archive.model import (
    START,
    Attributes,
    IndexEntry,
    InstanceHead,
    Level,
    Location,
    Provenance,
    Query,
    Record,
    RecordKind,
)
from bench.population import Population
from bench.runs import Bench
from bench.simulated_wards import Behaviour, identity_of, ward_number
from bench.table import Bar, Result
from certs.authority import Authority
from certs.profiles import Member, Profile
from federation.hub_channel import HubChannel
from federation.policy import Principal, Role
from federation.region_source import RegionSource
from federation.source import Answer
from miss import region
from miss.load import usage
from miss.local import HOST
from miss.processes import Child, free_ports, listening, wait_until

ANNA = Principal("anna", Role.PHYSICIAN)
PAGE = Query(Level.STUDY, limit=50)
NEEDED = 5
SLOWEST_S = 0.3
PENDING = 30
START_S_MAX = 300.0
IDLE_S = 10.0
BATCH = 2_000
CT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
DEADLINE_S = 2.0


class Wards:
    """The process of the wards."""

    def __init__(self, folder: Path, address: str, count: int, log: Path) -> None:
        with log.open("ab") as written:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.simulated_wards", str(folder), address, str(count)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written, text=True,
            )  # fmt: skip
        self._hear("attached")

    def behave(self, behaviours: Mapping[int, Behaviour]) -> None:
        assert self._process.stdin is not None
        told = {number: [one.pending, one.delay_s, one.hangs] for number, one in behaviours.items()}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        self._hear("reported")

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(START_S_MAX)
        finally:
            self._process.kill()

    def _hear(self, word: str) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != word:
            raise Unavailable("the simulated wards ended")


@dataclass(frozen=True, slots=True)
class Crowd:
    """A hub with its wards, and the portal's source over them."""

    hub: Child
    wards: Wards
    source: RegionSource
    archive: Archive
    ledger: Ledger

    def behave(self, behaviours: Mapping[int, Behaviour]) -> None:
        """Returns when the ledger, from which a portal knows whom to ask, says the same."""
        self.wards.behave(behaviours)

        def kept() -> bool | None:
            states = self.ledger.ward_states()
            pending = {ward: state.pending for ward, state in states.items() if state.pending}
            wanted = {ward_number(n).id: one.pending for n, one in behaviours.items() if one.pending}
            return True if pending == wanted else None

        wait_until("what the wards report is kept", kept, timeout_s=30.0)


@contextmanager
def crowd(folder: Path, count: int, studies: int) -> Iterator[Crowd]:
    """A region of `count` attached wards, and `studies` in its index."""
    state = folder / "region"
    hub_port, enrol_port = free_ports(2, HOST)
    authority = region.create_region(
        state, "bench", host=HOST, port=hub_port, enrol_port=enrol_port, listen_host=HOST
    )
    fill(state, studies)
    hub = Child("hub", ["hub", "run", "--settings", str(state / "hub.toml"), "--log-level", "WARNING",
                        "--set", f"ask_deadline_s={DEADLINE_S}"], folder / "hub.log")  # fmt: skip
    hub.start()
    try:
        wait_until("the hub takes calls", lambda: listening(HOST, hub_port), timeout_s=60.0, children=[hub])
        address = f"{HOST}:{hub_port}"
        wards = Wards(state, address, count, folder / "wards.log")
        try:
            with _portal(state, authority, address) as (source, archive, ledger):
                yield Crowd(hub, wards, source, archive, ledger)
        finally:
            wards.stop()
    finally:
        hub.stop()


@contextmanager
def _portal(
    state: Path, authority: Authority, address: str
) -> Iterator[tuple[RegionSource, Archive, Ledger]]:
    settings = region.hub_settings(state)
    ledger = Ledger.open(settings.ledger)
    archive = Archive.open(settings.archive_settings(), outbox=False, read_only=True)
    try:
        member = Member(authority.region, Profile.PORTAL, ("bench",))
        portal = HubChannel(identity_of(authority, ledger, member, address), address)
        try:
            yield RegionSource(archive, ledger, portal, ask_deadline_s=DEADLINE_S), archive, ledger
        finally:
            portal.stop()
    finally:
        archive.close()
        ledger.close()


def fill(state: Path, studies: int) -> None:
    """Studies of one instance each, in the regional index alone: nobody reads their pixels here."""
    index = Index.open(sqlite_url(state / "index.db"))
    try:
        entries = [_entry(number, one) for number, one in enumerate(Population(studies).studies)]
        for first in range(0, len(entries), BATCH):
            index.apply(entries[first : first + BATCH], START, outbox=False)
    finally:
        index.close()


def _entry(number: int, study: object) -> IndexEntry:
    uid = str(getattr(study, "uid"))  # noqa: B009
    head = InstanceHead(CT, f"{uid}.1.1", EXPLICIT, Provenance("bench/ward-0000", "B", "CT1", "CT1", 1_000))
    place = Location("packs/none", 0, 1_000, 500)
    record = Record(RecordKind.INSTANCE, number, head, hashlib.sha256(uid.encode()).digest(), place, START)
    named = {
        "PatientID": "patient_id", "PatientName": "patient_name", "PatientBirthDate": "birth_date",
        "StudyDate": "date", "StudyTime": "time", "StudyDescription": "description",
    }  # fmt: skip
    values = {keyword: str(getattr(study, name)) for keyword, name in named.items()}
    patient = {keyword: value for keyword, value in values.items() if keyword.startswith("Patient")}
    others = {keyword: value for keyword, value in values.items() if keyword not in patient}
    return IndexEntry(record, Attributes(
        patient, others | {"StudyInstanceUID": uid},
        {"SeriesInstanceUID": f"{uid}.1", "Modality": "CT"},
        {"SOPInstanceUID": f"{uid}.1.1", "SOPClassUID": CT},
    ))  # fmt: skip


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return took


@dataclass(frozen=True, slots=True)
class SearchRow:
    """Searches of a region with many wards."""

    key: str = "wards"

    def measure(self, bench: Bench) -> list[Result]:
        scale = bench.scale
        with bench.fresh("wards") as folder, crowd(folder, scale.wards, scale.studies) as region_of_wards:
            bench.wait_until_quiet()
            return [
                self._none(bench, region_of_wards),
                self._needed(bench, region_of_wards),
                *self._hanging(bench, region_of_wards),
            ]

    def _needed(self, bench: Bench, crowd: Crowd) -> Result:
        step = SLOWEST_S / (NEEDED + 1)
        delays = {number: SLOWEST_S - step * number for number in range(NEEDED)}  # 0.1 to 0.3 s
        crowd.behave({number: Behaviour(PENDING, delay) for number, delay in delays.items()})
        wrong = _wrong(crowd.source.search(ANNA, PAGE), NEEDED)
        took = timed(lambda: crowd.source.search(ANNA, PAGE), bench.scale.ward_searches)
        return Result(
            self.key, f"a search that needs {NEEDED} of {bench.scale.wards} wards, against the slowest",
            "s", (median(took),), "the slowest ward", (SLOWEST_S,), Bar(most_ratio=1.3), wrong,
            f"slowest {max(took):.3f} s",
        )  # fmt: skip

    def _none(self, bench: Bench, crowd: Crowd) -> Result:
        crowd.behave({})
        searches = bench.scale.ward_searches * 10
        crowd.source.search(ANNA, PAGE)
        ours, alone = [], []
        for _ in range(searches):  # in turns
            alone += timed(lambda: crowd.archive.search(replace(PAGE, limit=51)), 1)
            ours += timed(lambda: crowd.source.search(ANNA, PAGE), 1)
        return Result(
            self.key, f"a search that needs none of {bench.scale.wards} wards, against the index alone",
            "s", (median(ours),), "the index", (median(alone),), Bar(most_ratio=1.1),
        )  # fmt: skip

    def _hanging(self, bench: Bench, crowd: Crowd) -> list[Result]:
        hanging = min(bench.scale.wards_hanging, bench.scale.wards - NEEDED)
        asked = {number: Behaviour(PENDING, 0.1) for number in range(NEEDED)}
        asked |= {number: Behaviour(PENDING, hangs=True) for number in range(NEEDED, NEEDED + hanging)}
        crowd.behave(asked)
        wrong, took = "", []
        for _ in range(6):
            start = time.perf_counter()
            answer = crowd.source.search(ANNA, PAGE)
            took.append(time.perf_counter() - start)
            named = [one for one in answer.coverage if "no answer within" in one.reason]
            if len(named) != hanging:
                wrong = f"void: {len(named)} of {hanging} wards that hang were named"
            wrong = wrong or _wrong(answer, NEEDED)
        return [
            Result(self.key, f"the same while {hanging} others hang: the first search", "s", (took[0],),
                   "the deadline", (DEADLINE_S,), Bar(most_ratio=1.15), wrong),
            Result(self.key, f"the same while {hanging} others hang: later searches", "s",
                   (median(took[2:]),), bar=Bar(most=0.5), void=wrong),
        ]  # fmt: skip


def _wrong(answer: Answer, needed: int) -> str:
    found = {ward for match in answer.matches for ward in match.pending_at}
    return "" if len(found) == needed else f"void: rows of {len(found)} wards, not of {needed}"


@dataclass(frozen=True, slots=True)
class IdleRow:
    """What attachments cost a hub that nobody asks anything."""

    key: str = "attached"

    def measure(self, bench: Bench) -> list[Result]:
        count = bench.scale.wards_attached
        with bench.fresh("attached") as folder, crowd(folder, count, 1) as idle:
            pids = usage.tree(idle.hub.pid)
            before, start = usage.cpu_s(pids), time.monotonic()
            time.sleep(min(bench.scale.seconds * 2.5, IDLE_S))  # the window of the measurement
            cpu = (usage.cpu_s(pids) - before) / (time.monotonic() - start)
            resident = usage.resident_bytes(pids)
            states = idle.ledger.ward_states().values()
            attached = sum(state.attached for state in states)
        void = "" if attached == count else f"void: {attached} of {count} are attached"
        return [
            Result(self.key, f"a hub with {count:,} idle attachments: memory", "MB", (resident / 1e6,),
                   bar=Bar(most=1_000), void=void),
            Result(self.key, f"a hub with {count:,} idle attachments: CPU", "s/s", (cpu,), bar=Bar(most=0.5),
                   void=void),
        ]  # fmt: skip


WARD_ROWS = (SearchRow(), IdleRow())
