"""The fact log and the watermark: what was recorded is there after any crash, in order, batch by batch."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archive.errors import OutOfResources, SyncFailed, TooLarge
from archive.model import START, Fact, FactKind, Position
from archive.packs.facts import BATCH_FACTS_MAX, FactLog
from archive.packs.logfiles import LogLimits
from archive.packs.watermark import Watermark, read_watermark
from tests.archive.faulty_storage import FaultyStorage

LIMITS = LogLimits(file_bytes_max=64 << 10, ahead_bytes=16 << 10, ahead_by_thread=False)

FACTS = st.builds(
    Fact,
    st.sampled_from(FactKind),
    st.integers(0, 10**30).map(lambda number: f"1.2.{number}"),
    st.binary(min_size=32, max_size=32) | st.just(b""),
    st.text(max_size=20),
    st.integers(0, 1 << 60),
    st.text(max_size=60),
)
POSITIONS = st.builds(Position, st.integers(1, 1 << 20), st.integers(0, 1 << 40))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.lists(FACTS, max_size=5), POSITIONS), max_size=8), st.integers(0, 1 << 30))
def test_recorded_batches_survive_a_power_loss_in_order(
    batches: list[tuple[list[Fact], Position]], seed: int
) -> None:
    storage = FaultyStorage()
    log = FactLog.open(storage, limits=LIMITS)
    ends = [log.record(facts, after=after) for facts, after in batches]
    for crash in range(3):
        storage = storage.power_loss(random.Random(seed + crash))
        log = FactLog.open(storage, limits=LIMITS)
        found = list(log.read())
        assert [(list(batch.facts), batch.after) for batch in found] == batches
        assert [batch.end for batch in found] == ends
        for number, end in enumerate(ends):
            assert len(list(log.read(end))) == len(ends) - number - 1


def test_facts_go_on_over_many_files() -> None:
    storage = FaultyStorage()
    log = FactLog.open(storage, limits=LIMITS)
    recorded = []
    for number in range(2000):
        fact = Fact(FactKind.RECEIPT, f"1.2.{number}", b"d" * 32, "h/w", number)
        recorded.append(fact)
        log.record([fact], after=START)
        if number % 400 == 0:
            log.mark()
            log.close()
            storage = storage.kill()
            log = FactLog.open(storage, limits=LIMITS)
    assert len(storage.list("facts")) > 5
    assert [fact for batch in log.read() for fact in batch.facts] == recorded


def test_what_was_not_synced_was_not_recorded() -> None:
    storage = FaultyStorage()
    log = FactLog.open(storage, limits=LIMITS)
    fact = Fact(FactKind.RECEIPT, "1.2.3", b"d" * 32, "", 1)
    storage.fail_syncs = 1
    with pytest.raises(SyncFailed):
        log.record([fact], after=START)
    assert list(log.read()) == []
    log.record([fact], after=START)
    assert [batch.facts for batch in log.read()] == [(fact,)]
    storage.capacity = 0
    with pytest.raises(OutOfResources):
        for _ in range(200):
            log.record([fact], after=START)
    storage.capacity = 1 << 40
    log.record([fact], after=START)


def test_a_batch_is_bounded() -> None:
    log = FactLog.open(FaultyStorage(), limits=LIMITS)
    fact = Fact(FactKind.RECEIPT, "1.2.3", b"", "", 1)
    with pytest.raises(TooLarge):
        log.record([fact] * (BATCH_FACTS_MAX + 1), after=START)
    with pytest.raises(TooLarge):
        log.record([Fact(FactKind.RECEIPT, "1.2.3", b"", "", 1, "x" * (17 << 20))], after=START)


def test_rot_in_the_facts_costs_one_batch() -> None:
    storage = FaultyStorage()
    log = FactLog.open(storage, limits=LIMITS)
    facts = [Fact(FactKind.RECEIPT, f"1.2.{n}", b"d" * 32, "", n) for n in range(5)]
    ends = [log.record([fact], after=START) for fact in facts]
    log.mark()
    storage.flip("facts/00000001.facts", ends[2].offset - 200)
    log = FactLog.open(storage.kill(), limits=LIMITS)
    assert [fact for batch in log.read() for fact in batch.facts] == facts[:2] + facts[3:]


def test_the_watermark_says_what_was_published_last(tmp_path: Path) -> None:
    path = tmp_path / "watermark"
    assert read_watermark(path) == START
    mark = Watermark.open(path, b"w" * 16)
    assert mark.position == START
    for offset in range(1, 20):
        mark.publish(Position(3, offset))
        assert read_watermark(path) == Position(3, offset)
    mark.close()
    again = Watermark.open(path, b"w" * 16)
    assert again.position == Position(3, 19)
    again.publish(Position(4, 1))
    assert read_watermark(path) == Position(4, 1)
    again.close()
    assert Watermark.open(path, b"x" * 16).position == START  # other packs: it says nothing of them


@pytest.mark.parametrize("slot", [0, 64])
def test_a_half_written_slot_is_passed_over(tmp_path: Path, slot: int) -> None:
    path = tmp_path / "watermark"
    mark = Watermark.open(path, b"w" * 16)
    mark.publish(Position(1, 100))
    mark.publish(Position(1, 200))
    mark.close()
    data = bytearray(path.read_bytes())
    data[slot + 36 : slot + 40] = struct.pack("<I", 77)
    path.write_bytes(bytes(data))
    assert read_watermark(path) in (Position(1, 100), Position(1, 200))
