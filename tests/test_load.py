"""What loads a node: synthetic instances that other implementations can read, a sender whose answers are
counted truly, and `miss bench intake` as a person runs it. No figure is judged here."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread

from archive.dataset.header import scan
from archive.errors import Corrupt
from miss.bench import interpretation
from miss.load import instances, usage
from miss.load.disk import Disk, measure_disk
from miss.load.instances import Corpus, Instance
from miss.load.measure import Measurement, check, measure_node
from miss.load.sender import Load, Plan, Target, fragmented, send
from miss.load.temporary_node import TemporaryNode
from miss.processes import free_ports
from node.dimse.pdu import HEADER_BYTES
from tests.commands import miss

SMALL = instances.small()


def octets(instance: Instance) -> bytes:
    return b"".join(instance.chunks())


@pytest.mark.parametrize("make", [instances.small, instances.ct, instances.mammogram,
                                  lambda: instances.native_frames(3), lambda: instances.fragments(5)])
def test_pydicom_reads_them(make: Callable[[], Corpus]) -> None:
    corpus = make()
    first, same, other = corpus.instance(0), corpus.instance(0), corpus.instance(instances.NUMBERS_MAX - 1)
    assert octets(first) == octets(same) and first.size == len(octets(first))
    read = dcmread(BytesIO(first.part10_head() + octets(first)))
    assert read.SOPInstanceUID == first.sop_instance_uid and read.StudyInstanceUID == first.study_uid
    assert read.SOPClassUID == first.sop_class_uid == read.file_meta.MediaStorageSOPClassUID
    assert read.file_meta.TransferSyntaxUID == first.transfer_syntax_uid
    assert len(read.SOPInstanceUID) <= 64 and read.SOPInstanceUID.is_valid
    frames = int(read.get("NumberOfFrames", 1))
    if read.file_meta.TransferSyntaxUID.is_encapsulated:
        from pydicom.encaps import generate_frames

        assert len(list(generate_frames(read.PixelData, number_of_frames=frames))) == frames
    else:
        assert len(read.PixelData) == read.Rows * read.Columns * 2 * frames
    assert octets(other) != octets(first) and other.sop_instance_uid != first.sop_instance_uid


def test_six_gigabytes_cost_the_memory_of_a_few_frames() -> None:
    before = usage.resident_bytes([os.getpid()])
    one = instances.fragments().instance(0)
    assert one.size > 6_000_000_000 and usage.resident_bytes([os.getpid()]) - before < 64 << 20
    head = b"".join(chunk for chunk, _ in zip(one.chunks(), range(3), strict=False))
    assert scan(head, one.transfer_syntax_uid).instance["NumberOfFrames"] == "11500"


@given(number=st.integers(0, instances.NUMBERS_MAX - 1), step=st.integers(1, 9_000).map(lambda n: 2 * n))
def test_pdus_hold_the_data_set_and_end_once(number: int, step: int) -> None:
    instance = SMALL.instance(number)
    stream = b"".join(fragmented(instance, step))
    found, lasts = list[bytes](), list[int]()
    at = 0
    while at < len(stream):
        length = int.from_bytes(stream[at + 2:at + 6], "big")
        assert stream[at] == 4 and int.from_bytes(stream[at + 6:at + 10], "big") == length - 4
        lasts.append(stream[at + 11])
        found.append(stream[at + HEADER_BYTES + 6:at + HEADER_BYTES + length])
        at += HEADER_BYTES + length
    assert b"".join(found) == octets(instance)
    assert lasts == [0] * (len(lasts) - 1) + [2] and all(0 < len(one) <= step for one in found)


@pytest.fixture(scope="module")
def node() -> Iterator[TemporaryNode]:
    with tempfile.TemporaryDirectory(prefix="miss-load-") as folder, TemporaryNode(Path(folder)) as running:
        yield running


def test_every_answer_is_counted_and_checked(node: TemporaryNode) -> None:
    with Load(node.place.target, SMALL, Plan(associations=3, seconds=60, instances=50)) as load:
        assert load.stored == 0
        load.begin()
        tally = load.finish()
    assert (tally.stored, tally.failed, len(tally.latencies)) == (50, 0, 50) and load.stored == 50
    assert tally.bytes == 50 * SMALL.instance(0).size and 0 < tally.latency_s(0.5) <= tally.latency_s(1)
    assert check(node.place, SMALL, tally) == ""
    tally.stored += 1  # an answer that was not true
    assert "51 were acknowledged, and 50 are in the index" in check(node.place, SMALL, tally)
    tally.failures[0xA700] += 2
    assert check(node.place, SMALL, tally) == "answered other than 0000: 2 x A700"


def test_bytes_that_differ_are_noticed(node: TemporaryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = send(node.place.target, SMALL, Plan(1, 60, 1))
    tally.stored = node.place.totals().instances
    monkeypatch.setattr(hashlib, "sha256", hashlib.sha1)
    assert check(node.place, SMALL, tally) == ""
    one = SMALL.instance(0)
    other = Instance(one.sop_class_uid, one.sop_instance_uid, one.study_uid, one.transfer_syntax_uid,
                     one.head, (SMALL.instance(1).body[0],), one.size)
    monkeypatch.setattr(Corpus, "instance", lambda *_: other)
    assert check(node.place, SMALL, tally) == "the bytes of an instance are not what was sent"


def test_the_time_ends_it(node: TemporaryNode) -> None:
    tally = send(node.place.target, SMALL, Plan(2, 0.3, 10_000_000, first=1_000))
    assert tally.stored > 0 and not tally.failures and tally.wall_s < 5


def test_who_refuses_or_is_not_there_is_a_failure(node: TemporaryNode) -> None:
    port = node.place.port
    stranger = send(Target(port, "SOMEBODY-ELSE"), SMALL, Plan(2, 1, 4))
    assert stranger.stored == 0 and stranger.failures == {-1: 2}
    [free] = free_ports(1)
    assert send(Target(free, "NOBODY"), SMALL, Plan(1, 1, 1)).failures == {-1: 1}


def test_senders_that_never_began_do_not_stay() -> None:
    before = multiprocessing.active_children()
    with Load(Target(1, "NOBODY"), SMALL, Plan(2, 60, 10)):
        assert len(multiprocessing.active_children()) == len(before) + 2
    assert multiprocessing.active_children() == before


def test_a_node_is_measured(tmp_path: Path) -> None:
    found = measure_node(tmp_path / "run", SMALL, 2, 0.3)
    assert found.problem == "" and found.instances > 0 and found.rate > 0 and found.cpu_per_1000_s > 0


def test_bench_intake_says_it_all_and_leaves_nothing(tmp_path: Path) -> None:
    done = miss("bench", "intake", "--seconds", "0.3", "--associations", "1", "--state", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "per second" in done.stdout and "the disk:" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["8", "CT"]
    assert list(tmp_path.iterdir()) == []
    as_json = json.loads(miss("bench", "intake", "--seconds", "0.3", "--associations", "2", "--state",
                              str(tmp_path), "--json").stdout)
    assert [one["associations"] for one in as_json["intake"]] == [2, 2] and as_json["disk"]["syncs_per_s"] > 0


def test_the_disk_is_measured_and_left_clean(tmp_path: Path) -> None:
    found = measure_disk(tmp_path, 0.2)
    assert found.syncs_per_s > 0 and found.bytes_per_s > 0 and list(tmp_path.iterdir()) == []


def test_what_is_used_is_seen() -> None:
    own = usage.tree(os.getpid())
    assert own[0] == os.getpid() and usage.cpu_s(own) > 0 and usage.own_cpu_s() > 0
    assert usage.peak_bytes([own[0]]) >= usage.resident_bytes([own[0]]) > 1 << 20
    assert usage.proportional_bytes([own[0]]) > 1 << 20
    assert 0 <= usage.machine().busy_s <= usage.machine().total_s
    assert 0 <= usage.wait_until_quiet(0.1, share=0) <= 1.01


@pytest.mark.parametrize(("rate", "bytes_rate", "busy", "words"), [
    (100, 9e8, 0.5, "faster disk"), (5_000, 1e6, 0.95, "processor is the limit"),
    (900, 1e6, 0.5, "waits for the disk"), (100, 1e6, 0.5, "more senders")])
def test_it_says_what_the_limit_is(rate: float, bytes_rate: float, busy: float, words: str) -> None:
    found = Measurement("8 KB", 9_000, 1, 10, rate, bytes_rate, 0.1, 0.2, 1.0, busy, "")
    assert words in interpretation(Disk(1_000, 1e9), [found])


def test_an_answer_that_was_not_true_is_no_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from miss import bench
    from miss.load import measure

    wrong = Measurement("8 KB", 9_000, 1, 10, 1.0, 1.0, 0.1, 0.2, 1.0, 0.5, "2 are missing")

    def measured(folder: Path, *_: object) -> Measurement:
        folder.mkdir()
        return wrong

    monkeypatch.setattr(measure, "measure_node", measured)
    monkeypatch.setattr(bench, "DISK_S", 0.1)
    with pytest.raises(Corrupt, match="2 are missing"):
        bench.intake(seconds=0.2, associations=[1], state=tmp_path, as_json=False)
    assert list(tmp_path.iterdir()) == []
