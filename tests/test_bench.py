"""The bench: every kind of row runs on MISS and on the peers that are here, with parameters so small that no
figure means anything, and gives results that are complete and checked. No figure is judged."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import psutil
import pytest
from pydicom import dcmread

from bench import programs, runs, servers, table
from bench.__main__ import LONG_ROWS, ROWS, Row, chosen, machine, run
from bench.asking import Asker, study_identifier
from bench.certificates import make_certificates
from bench.finding import holding
from bench.population import Population, Study
from bench.questions import Question, questions
from bench.rates import RATE_ROWS
from bench.receiving import CREDIT_S_MAX, Receiver
from bench.runs import TINY, Bench, Run
from bench.servers import ForkingStorescp, Miss, Orthanc, Pynetdicom, Server, Storescp
from bench.table import Bar, Report, Result
from miss.load.sender import Plan, Tally, Target, send
from miss.processes import wait_until

SCALE = replace(TINY, seconds=0.2, lag_seconds=0.8, mixed_seconds=0.4)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, SCALE, say=lambda text: None)


def row(key: str) -> Row:
    [found] = [one for one in (*ROWS, *LONG_ROWS) if one.key == key]
    return found


# One of each kind: the others differ in parameters alone.
KINDS = ("small-1", "mg-1", "native", "encapsulated", "tls-small-1", "cpu-ct", "untuned-small", "send", "lag",
         "idle", "silent", "find", "growth", "retrieve", "mixed-small", "crowd", "wards", "attached",
         "replicate", "push-fast", "flood")


@pytest.mark.parametrize("key", KINDS)
def test_a_row_is_complete_and_true(key: str, bench: Bench) -> None:
    results = row(key).measure(bench)
    assert results
    for result in results:
        assert result.row == key and result.work and result.unit
        if result.void:
            assert "not" in result.void and not result.void.startswith("void"), result.void
        else:
            assert len(result.ours) == 1 and result.our_median is not None
            assert bool(result.theirs) == bool(result.peer)  # less than a clock tick is 0, and no ratio
            assert (result.ratio is not None) == any(result.theirs)
        assert len(result.cells()) == len(table.COLUMNS)
    left = [path.name for path in bench.folder.iterdir() if not path.name.startswith(("files-", "certif"))]
    assert left == []


@pytest.mark.parametrize("kind", [Miss, Orthanc, Storescp, ForkingStorescp, Pynetdicom])
def test_a_server_tells_a_true_answer_from_one_that_is_not(kind: type[Server], bench: Bench) -> None:
    if why := kind.missing(tls=False):
        pytest.skip(why)
    with bench.fresh("server") as folder, kind(folder) as server:
        tally = send(server.target, bench.small, Plan(2, 60, 10))
        assert tally.stored == 10 and server.problem(bench.small, tally) == ""
        tally.stored += 1
        assert "11 were acknowledged" in server.problem(bench.small, tally)
        tally.failures[0xA700] += 1
        assert "A700" in server.problem(bench.small, tally)


@pytest.mark.parametrize("kind", [Miss, Orthanc])
def test_a_server_over_tls(kind: type[Server], bench: Bench) -> None:
    if why := kind.missing(tls=True):
        pytest.skip(why)
    found = bench.run(kind, bench.small, 1, count=3, tls=True)
    assert found.tally.stored == 3 and found.problem == ""


def test_a_population_is_the_same_each_time_and_what_is_asked_of_it_is_true() -> None:
    population = Population(2000)
    assert population.studies == Population(2000).studies
    names = {study.patient_name for study in population.studies}
    assert 300 < len(names) < 2000  # some people came more than once
    instance = population.instance(17)
    read = dcmread(BytesIO(instance.part10_head() + b"".join(instance.chunks())))
    assert read.StudyInstanceUID == population.studies[1].uid and read.pixel_array.shape == (32, 32)
    asked = questions(population)
    assert len(asked) == 5
    for kind, values in asked.items():
        for one in values:
            assert one.matches == sum(_matches(one, study) for study in population.studies), (kind, one)


def _matches(question: Question, study: Study) -> bool:
    value = question.value.strip("*")
    if question.keyword == "StudyDate":
        first, last = value.split("-")
        return first <= study.date <= last
    if question.keyword == "PatientName":
        name = study.patient_name
        return value in name if question.value.startswith("*") else name.startswith(value)
    return value == (study.patient_id if question.keyword == "PatientID" else study.accession_number)


@pytest.mark.parametrize("kind", [Miss, Orthanc])
def test_what_was_kept_is_held_again(kind: type[Server], bench: Bench) -> None:
    if why := kind.missing(tls=False):
        pytest.skip(why)
    population = Population(3)
    bench.kept = bench.folder / "files-kept"
    asked = Question("PatientID", population.studies[0].patient_id, 0)
    found = []
    said: list[str] = []
    bench.say = said.append
    for _ in range(2):
        with holding(bench, kind, population) as server:
            asker = Asker(server.target)
            found.append(asker.find(study_identifier(asked)))
            asker.release()
    assert found[0] == found[1] > 0
    assert [("loaded" in text, "as kept" in text) for text in said] == [(True, False), (False, True)]


def test_a_search_that_finds_another_number_voids_its_row(
        bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Orthanc, "missing", lambda **_: "Orthanc is not installed")
    monkeypatch.setattr(Asker, "find", lambda *_: 4711)
    [result] = row("find").measure(bench)
    assert result.void.startswith("void: MISS: ") and "4711 matches" in result.void


def test_a_receiver_reads_no_faster_than_it_is_told(bench: Bench) -> None:
    corpus = bench.ct
    with Receiver("SLOW", bytes_per_s=2e6) as slow, Receiver("FAST") as fast:
        spent = {}
        for receiver in (slow, fast):
            tally = send(Target(receiver.port, receiver.ae_title), corpus, Plan(2, 60, 4))
            assert tally.stored == 4 == receiver.instances
            assert receiver.received_bytes == tally.bytes
            spent[receiver.ae_title] = tally.wall_s
    size = 4 * corpus.instance(0).size
    assert spent["SLOW"] > size / 2e6 - CREDIT_S_MAX > 0 and spent["FAST"] < spent["SLOW"]


def test_a_peer_that_is_not_there_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find", lambda program: None)
    results = row("small-1").measure(bench)
    assert {result.void for result in results} == {"Orthanc is not installed", "DCMTK is not installed"}
    assert all(result.ours and not result.theirs and result.met is None for result in results)
    speed, memory = row("native").measure(bench)
    assert speed.void == "Orthanc is not installed" and speed.met is None
    assert not memory.void and memory.met is not None and memory.note.endswith("Orthanc is not installed")
    assert row("untuned-ct").measure(bench)[0].void == "DCMTK is not installed"
    assert row("send").measure(bench)[0].void == "DCMTK is not installed"


def test_what_is_compared_takes_turns_and_is_made_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[type[Server]] = []
    foreign = iter([0.5, 0.01, 0.02, 0.01, 0.03])

    def ran(kind: type[Server], *_: object, **__: object) -> Run:
        made.append(kind)
        return Run(Tally(stored=1), 1.0, 0, 0, next(foreign), "")

    monkeypatch.setattr(bench, "run", ran)
    bench.scale = replace(SCALE, more_rounds=1)
    ours, theirs = bench.compare([Miss, Orthanc], bench.small, 4, 2)
    assert made == [Miss, Orthanc, Miss, Orthanc, Miss]  # the first was disturbed and is made again, once
    assert [one.foreign for one in ours] == [0.02, 0.03] and [one.foreign for one in theirs] == [0.01, 0.01]
    assert bench.compare([Miss], bench.small, 4, 2) == [ours] and len(made) == 5


def test_answers_that_were_not_true_void_a_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Miss, "problem", lambda *_: "one is missing")
    monkeypatch.setattr(Orthanc, "missing", lambda **_: "not here")
    [result] = row("ct-1").measure(bench)
    assert result.void == "void: MISS: one is missing" and result.met is None
    assert "void" in table.line(result)


def test_the_table_comes_back_from_json() -> None:
    report = Report({"machine": "2 cores"}, {"Orthanc": "1.10.1", "DCMTK storescp": ""}, {"rounds": 3}, [
        Result("a", "8 KB | 1", "instances/s", (100.0, 300.0, 200.0), "Orthanc", (50.0, 40.0, 60.0),
               Bar(least_ratio=3)),
        Result("b", "memory", "MiB", (70.5,), bar=Bar(most=64)),
        Result("c", "TLS", "MB/s", void="TLS is not configured", bar=Bar(least_ratio=2)),
    ])
    assert Report.from_json(report.to_json()) == report
    lines = report.to_markdown().splitlines()
    assert lines[2] == "| 8 KB \\| 1 (instances/s) | 200 | Orthanc 50 | 4.00 | >= 3 x | yes |  |"
    assert lines[3] == "| memory (MiB) | 70.5 | - | - | <= 64 MiB | **no** |  |"
    assert "TLS is not configured" in lines[4] and "DCMTK storescp: not installed" in lines[6]


@pytest.mark.parametrize(("bar", "ours", "theirs", "met"), [
    (Bar(), 1, 1, None), (Bar(least_ratio=2), 4, 2, True), (Bar(least_ratio=2), 3, 2, False),
    (Bar(most_ratio=1 / 3), 1, 3, True), (Bar(most_ratio=1 / 3), 2, 3, False),
    (Bar(least_ratio=2), 4, None, None), (Bar(most=64), 64, None, True), (Bar(most=64), 65, None, False),
    (Bar(least=2), 1, None, False)])
def test_what_reaches_a_bar(bar: Bar, ours: float, theirs: float | None, met: bool | None) -> None:
    assert bar.met(ours, theirs) is met


def test_rows_are_chosen_by_name_and_by_its_beginning() -> None:
    assert [one.key for one in chosen(["small"])] == ["small-1", "small-4", "small-8"]
    assert [one.key for one in chosen(["lag", "native"])] == ["native", "lag"]
    assert chosen([]) == list(ROWS) and len({one.key for one in ROWS}) == len(ROWS)
    assert chosen(["growth"]) == list(LONG_ROWS)
    with pytest.raises(SystemExit, match="there is no row fast"):
        chosen(["fast"])
    assert all(one.peers or one.alone for one in RATE_ROWS)


def test_it_is_a_command(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "silent", "--tiny", "--data", str(tmp_path), "--json", str(kept)],
        capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "silent connections" in done.stdout and "no figure means anything" in done.stdout
    again = subprocess.run([sys.executable, "-m", "bench.table", str(kept)], capture_output=True, text=True,
                           timeout=60, check=True)
    assert again.stdout == done.stdout
    assert list(tmp_path.iterdir()) == [kept]


def test_it_leaves_nothing_when_it_is_stopped(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "ct-1", "--seconds", "60", "--data", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until("the node's packs", lambda: next(tmp_path.glob("*/run-*/node/packs"), None), timeout_s=60)
        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert below and psutil.wait_procs(below, timeout=30)[1] == []
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_start_voids_its_row_alone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Orthanc, "command", lambda self: ["/bin/false"])
    monkeypatch.setattr(Orthanc, "missing", lambda **_: "")
    report = run([row("ct-1"), row("encapsulated")], SCALE, tmp_path)
    assert [bool(result.ours) for result in report.results] == [False, True, True]
    assert "void: Orthanc ended with code 1" in report.results[0].void and report.results[0].met is None


def test_the_machine_and_the_peers_are_named(tmp_path: Path) -> None:
    assert "cores" in machine(tmp_path)["machine"]
    assert programs.versions()["pynetdicom"]
    assert "TCP_NODELAY" not in programs.environment(nagle=True)
    assert programs.environment()["TCP_NODELAY"] == "1"


@pytest.fixture(autouse=True)
def no_program_outlives_its_test() -> Iterator[None]:
    before = set(psutil.Process().children())
    yield
    left = [child for child in set(psutil.Process().children()) - before
            if child.status() != psutil.STATUS_ZOMBIE]
    assert left == []


def test_certificates_are_private(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "made")
    assert {path.stat().st_mode & 0o777 for path in (made.server_key, made.client_key)} == {0o600}
    assert runs.Scale().quiet_s_max > 0 and servers.Miss.name == "MISS"
