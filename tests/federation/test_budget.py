"""The bandwidth budget: which entry holds when, that a bucket obeys it over a minute, also when it changes
inside one, and that a node obeys it on a real line."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from archive.errors import SettingsError
from archive.settings import describe, load, render_toml, setting
from federation.budget import DAYS, Bucket, Budget, parse_days
from federation.hub import Hub
from federation.settings import BudgetSettings, UplinkSettings
from federation.turns import Turns
from tests.datasets import make_instance
from tests.federation.regions import Region
from tests.federation.wards import Node, hub_settings, node_of
from tests.waiting import wait_for


def budget(*entries: tuple[str, str, float]) -> Budget:
    return Budget([BudgetSettings(rate, days, hours).entry() for days, hours, rate in entries], UTC)


@dataclass(frozen=True)
class NodeUplink:
    """The uplink's settings where a node's file has them."""

    uplink: UplinkSettings = setting(UplinkSettings)


def at_us(text: str) -> int:
    """A moment of the week of Monday, 5 January 2026."""
    day, clock = text.split()
    hour, minute, second = (int(part) for part in f"{clock}:00".split(":")[:3])
    moment = datetime(2026, 1, 5 + DAYS.index(day), hour, minute, second, tzinfo=UTC)
    return int(moment.timestamp() * 1e6)


WEEK = budget(
    ("mon-fri", "07:00-19:00", 2e6), ("", "12:00-14:00", 5e6), ("fri", "22:00-06:00", 1e6), ("sun", "", 0.0)
)


@pytest.mark.parametrize(
    ("moment", "rate"),
    [
        ("mon 06:59", None),
        ("mon 07:00", 2e6),
        ("mon 12:30", 2e6),  # the lowest
        ("mon 18:59", 2e6),
        ("mon 19:00", None),
        ("sat 12:30", 5e6),
        ("fri 21:59", None),
        ("fri 22:00", 1e6),
        ("sat 05:59", 1e6),  # of Friday's night
        ("sat 06:00", None),
        ("thu 23:00", None),
        ("sun 12:30", 0.0),
    ],
)
def test_the_lowest_entry_that_holds_counts(moment: str, rate: float | None) -> None:
    assert WEEK.rate(at_us(moment)) == rate


@pytest.mark.parametrize(
    ("text", "days"),
    [("", range(7)), ("mon", [0]), ("mon-wed, sun", [0, 1, 2, 6]), ("SAT-mon", [5, 6, 0]), ("tue-tue", [1])],
)
def test_days_are_read(text: str, days: list[int]) -> None:
    assert parse_days(text) == frozenset(days)


@pytest.mark.parametrize("text", ["monday", "mon-", "0", "mon,funday", "-fri"])
def test_what_are_no_days_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="days are"):
        parse_days(text)


def sent_by_second(
    rates: Budget, start: str, seconds: int, sizes: list[int], urgent: bool = False
) -> list[int]:
    """What goes each second when there is always something to send, on a pretended clock."""
    bucket, chance = Bucket(rates), random.Random(1)
    out, now_s = [0] * seconds, 0.0
    while now_s < seconds:
        now_us = at_us(start) + int(now_s * 1e6)
        wait_s = bucket.wait_s(now_s, now_us, urgent=urgent)
        if wait_s > 0:
            now_s += wait_s
            continue
        size = min(chance.choice(sizes), bucket.message_bytes_max(now_us))
        bucket.took(size, now_s, now_us)
        out[min(int(now_s), seconds - 1)] += size
        now_s += size / 200e6  # the line itself
    return out


@pytest.mark.parametrize("rate", [20e3, 250e3, 2e6])
@pytest.mark.parametrize("sizes", [[1 << 20], [9_800], [500, 600_000, 1 << 20]])
def test_a_minute_obeys_the_budget(rate: float, sizes: list[int]) -> None:
    sent = sent_by_second(budget(("", "", rate)), "mon 10:00", 180, sizes)
    for begin in (0, 17, 60, 119):
        assert sum(sent[begin : begin + 60]) == pytest.approx(60 * rate, rel=0.1)


@pytest.mark.parametrize(("first", "second"), [(2e6, 500e3), (500e3, 4e6), (1e6, 0.0), (0.0, 1e6)])
def test_a_minute_in_which_it_changes_obeys_both(first: float, second: float) -> None:
    rates = budget(("", "09:00-10:00", first), ("", "10:00-11:00", second))
    sent = sent_by_second(rates, "mon 09:59:30", 60, [1 << 20, 9_800])
    assert sum(sent[:30]) == pytest.approx(30 * first, rel=0.1, abs=1)
    assert sum(sent[31:]) == pytest.approx(29 * second, rel=0.1, abs=1)
    assert sum(sent) == pytest.approx(30 * first + 30 * second, rel=0.1)


def test_without_an_entry_there_is_no_cap() -> None:
    assert sum(sent_by_second(Budget([]), "mon 10:00", 2, [1 << 20])) > 300e6


def test_at_rate_0_only_what_is_urgent_goes() -> None:
    shut = budget(("", "", 0.0))
    assert sum(sent_by_second(shut, "mon 10:00", 10, [1 << 20])) == 0
    assert sum(sent_by_second(shut, "mon 10:00", 2, [1 << 20], urgent=True)) > 300e6
    assert Bucket(shut).is_shut(at_us("mon 10:00"))


def test_a_pause_is_not_made_up_for() -> None:
    bucket = Bucket(budget(("", "", 1e6)))
    now_us = at_us("mon 10:00")
    bucket.took(1, 0.0, now_us)
    burst, now_s = 0, 3600.0
    while bucket.wait_s(now_s, now_us, urgent=False) == 0:
        bucket.took(10_000, now_s, now_us)
        burst += 10_000
    assert burst <= 300_000


def test_what_is_urgent_goes_first() -> None:
    async def run() -> list[str]:
        turns = Turns(Bucket(budget(("", "", 1e6))), lambda: at_us("mon 10:00"))
        went: list[str] = []

        async def write(name: str, *, urgent: bool) -> None:
            await turns.take(60_000, urgent=urgent)
            went.append(name)

        await write("first", urgent=False)
        waiting = [asyncio.create_task(write(f"other {n}", urgent=False)) for n in range(5)]
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(write("urgent", urgent=True)))
        given_up = asyncio.create_task(write("given up", urgent=True))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(*waiting)
        return went

    assert asyncio.run(run()) == ["first", "urgent", *(f"other {n}" for n in range(5))]


TOML = """
[[budget]]
days = "mon-fri"
hours = "07:00-19:00"
bytes_per_s = 2e6

[[budget]]
bytes_per_s = 10000000
"""


def settings_of(tmp_path: Path, text: str) -> UplinkSettings:
    path = tmp_path / "node.toml"
    path.write_text(text)
    return load(UplinkSettings, path)


def test_entries_may_be_written_below_a_settings_file_that_was_made(tmp_path: Path) -> None:
    """As docs/replication.md has them, at the end of the node.toml that `miss node enrol` writes."""
    path = tmp_path / "node.toml"
    made = render_toml(NodeUplink())
    path.write_text(made)
    assert load(NodeUplink, path) == NodeUplink()
    path.write_text(f'{made}\n[[uplink.budget]]\ndays = "sun"\nbytes_per_s = 0\n')
    found = load(NodeUplink, path)
    assert found.uplink.budget == (BudgetSettings(0.0, "sun"),)
    path.write_text(render_toml(found))
    assert load(NodeUplink, path) == found


def test_the_budget_is_a_list_of_tables(tmp_path: Path) -> None:
    found = settings_of(tmp_path, TOML)
    assert found.budget == (BudgetSettings(2e6, "mon-fri", "07:00-19:00"), BudgetSettings(1e7))
    assert settings_of(tmp_path, render_toml(found)) == found
    text = '[{"days": "sat", "bytes_per_s": 5}]'
    assert load(UplinkSettings, None, {"MISS_BUDGET": text}).budget == (BudgetSettings(5.0, "sat"),)
    (doc,) = [doc for doc in describe(UplinkSettings) if doc.key == "budget"]
    assert (doc.type, doc.default) == ("list of tables", "[]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[budget]]\ndays = 'mon'", "entry 1: bytes_per_s is not set"),
        ("[[budget]]\nbytes_per_s = -1.0", "at least"),
        ("[[budget]]\nbytes_per_s = 1\nrate = 3", "unknown setting 'rate'"),
        ("[[budget]]\nbytes_per_s = 1\ndays = 'x'", "days are"),
        ("[[budget]]\nbytes_per_s = 1\nhours = '25:00-26:00'", "HH:MM"),
        ("budget = 3", "a list of tables"),
        ("budget = [3]", "a list of tables"),
        ("[[budget]]\nbytes_per_s = 1\n" * 1001, "more than 1000"),
    ],
)
def test_an_entry_that_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settings_of(tmp_path, text)


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    hub = Hub(hub_settings(region))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def node(region: Region, hub: Hub) -> Iterator[Node]:
    node = node_of(region, hub, "San Martino", "Radiology", "SM")
    yield node
    node.stop()


def test_a_node_obeys_its_budget_on_a_real_line(hub: Hub, node: Node) -> None:
    rate, size = 2e6, 8e6
    instances = [make_instance(rows=500, columns=500, number=number) for number in range(int(size / 500e3))]
    node.take(instances)
    begun_s = time.monotonic()
    node.start(budget=(BudgetSettings(rate),), zstd=False)
    wait_for(lambda: node.pending == 0, "everything has a receipt", 30)
    took_s = time.monotonic() - begun_s
    assert 0.8 * size / rate <= took_s <= 1.4 * size / rate + 1


def test_what_a_reader_waits_for_does_not_wait_for_the_budget(hub: Hub, node: Node) -> None:
    others = [make_instance(rows=200, number=number, study_uid="1.2.3") for number in range(20)]
    urgent = make_instance(study_uid="1.2.4")
    node.take([*others, urgent])
    node.store.wait_indexed()
    assert node.store.index.mark_urgent("1.2.4") == 1
    node.start(budget=(BudgetSettings(0.0),))
    wait_for(lambda: node.pending == 20, "the urgent one has its receipt")
    assert [row.study_uid for row in node.store.index.pending(100)] == ["1.2.3"] * 20
