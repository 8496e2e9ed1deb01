"""Twenty wards at one hub, simulated over real gRPC and TLS (`bench/simulated_wards.py`): who is asked, who
is waited for and how long, who is named; and what a person settles."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest

from archive.ledger import WardState
from archive.model import Level, Match, Query
from archive.orders import OrderDesk
from bench.simulated_wards import Behaviour, SimulatedWards, ward_number
from federation.coverage import CoverageState, WardCoverage
from federation.hub import Hub
from federation.leash import LEASH_S, MISSES_MAX, Leash
from federation.region_source import RegionSource
from federation.source import Answer
from federation.ward_orders import SETTLE, handlers_alone
from tests.federation.regions import Region
from tests.federation.wards import EVA, Regional, hub_settings
from tests.waiting import wait_for

COUNT = 20
DEADLINE_S = 1.0
STUDIES = Query(Level.STUDY, limit=50)


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    hub = Hub(hub_settings(region, ask_deadline_s=DEADLINE_S))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def wards(region: Region, hub: Hub) -> Iterator[SimulatedWards]:
    with SimulatedWards(region.folder, region.ledger_url, hub.address, COUNT) as wards:
        yield wards


@pytest.fixture
def source(region: Region, hub: Hub) -> Iterator[RegionSource]:
    with Regional(region, hub, ask_deadline_s=DEADLINE_S) as source:
        yield source


def behave(region: Region, wards: SimulatedWards, behaviours: Mapping[int, Behaviour]) -> None:
    wards.behave(behaviours)
    wanted = {ward_number(number).id: one.pending for number, one in behaviours.items() if one.pending}

    def kept() -> bool:
        held = {state.ward: state.pending + state.set_aside for state in region.ledger.ward_states().values()}
        return {ward: count for ward, count in held.items() if count} == wanted

    wait_for(kept, "what the wards report is kept")


def alone(answer: Answer) -> set[str]:
    """The wards that hold a row of the answer alone."""
    return {ward for match in answer.matches for ward in match.pending_at}


def unanswered(answer: Answer) -> dict[str, str]:
    return {one.ward: one.reason for one in answer.coverage if "no answer" in one.reason}


def timed(source: RegionSource) -> tuple[float, Answer]:
    begun = time.monotonic()
    answer = source.search(EVA, STUDIES)
    return time.monotonic() - begun, answer


def test_only_who_holds_something_alone_is_asked_and_all_of_them_at_once(
    region: Region, wards: SimulatedWards, source: RegionSource
) -> None:
    behave(region, wards, {number: Behaviour(15, 0.3) for number in range(5)})
    took_s, answer = timed(source)
    assert 0.3 <= took_s < 1.4  # one after the other they would take 1.5 s
    assert alone(answer) == {ward_number(number).id for number in range(5)}
    assert sum(match.instance_count for match in answer.matches) == 5 * 15
    assert [ward.asked for ward in wards.wards] == [1] * 5 + [0] * 15
    states = {one.ward: one.state for one in answer.coverage}
    assert len(states) == COUNT
    assert {states[ward_number(number).id] for number in range(5)} == {CoverageState.ANSWERED}
    assert {states[ward_number(number).id] for number in range(5, COUNT)} == {CoverageState.UP_TO_DATE}
    behave(region, wards, {})
    assert source.search(EVA, STUDIES).covered
    assert sum(ward.asked for ward in wards.wards) == 5  # nobody holds anything: nobody was asked


def test_what_is_set_aside_at_a_ward_is_found_there(
    region: Region, wards: SimulatedWards, source: RegionSource
) -> None:
    behave(region, wards, {7: Behaviour(3, aside=True)})
    answer = source.search(EVA, STUDIES)
    assert alone(answer) == {ward_number(7).id} and answer.covered
    (coverage,) = [one for one in answer.coverage if one.ward == ward_number(7).id]
    assert (coverage.state, coverage.set_aside) == (CoverageState.ANSWERED, 3)


def test_wards_that_hang_are_named_cost_little_and_come_back_by_themselves(
    region: Region, wards: SimulatedWards, source: RegionSource
) -> None:
    hanging = {ward_number(number).id for number in (3, 4, 5)}
    here = {number: Behaviour(10, 0.05) for number in range(3)}
    behave(region, wards, here | {number: Behaviour(10, hangs=True) for number in (3, 4, 5)})
    took = []
    for search in range(MISSES_MAX + 3):
        took_s, answer = timed(source)
        took.append(took_s)
        assert set(unanswered(answer)) == hanging and len(alone(answer)) == 3
        said = all("nor did it answer before" in reason for reason in unanswered(answer).values())
        assert said == (search >= MISSES_MAX)
    assert all(DEADLINE_S <= took_s < 2 * DEADLINE_S for took_s in took[:MISSES_MAX])  # all three at once
    assert min(took[MISSES_MAX:]) < DEADLINE_S - 0.2
    # They answer again, too slowly for the leash: a question that stayed open finds it out.
    behave(region, wards, here | {number: Behaviour(10, LEASH_S + 0.2) for number in (3, 4, 5)})
    wait_for(lambda: not unanswered(source.search(EVA, STUDIES)), "they are back")
    assert len(alone(source.search(EVA, STUDIES))) == 6


def test_the_pages_of_a_list_are_read_on_across_wards(
    region: Region, wards: SimulatedWards, source: RegionSource
) -> None:
    behave(region, wards, {number: Behaviour(50) for number in range(3)})
    whole = [match.place for match in source.search(EVA, STUDIES).matches]
    assert len(whole) == 15
    seen = []
    query = replace(STUDIES, limit=4)
    while page := source.search(EVA, query):
        seen += [match.place for match in page.matches]
        if not page.more:
            break
        query = replace(query, after=page.matches[-1].place)
    assert seen == whole
    listing = source.listing(EVA, replace(STUDIES, limit=4), 100)
    assert listing.whole and list(listing.uids) == [place.uid for place in whole]
    assert not source.listing(EVA, replace(STUDIES, limit=4), 10).whole


def test_what_a_disk_lost_stands_until_a_person_settles_it(
    region: Region, hub: Hub, wards: SimulatedWards, source: RegionSource
) -> None:
    first = ward_number(0).id

    def coverage() -> WardCoverage:
        (found,) = [one for one in source.search(EVA, STUDIES).coverage if one.ward == first]
        return found

    state = region.ledger.ward_states()[first]
    hub.stop()
    region.ledger.put_ward_state(replace(state, epoch=b"another", pending=7))
    hub.start()
    wait_for(lambda: region.ledger.ward_states()[first].attached, "it attaches with another disk")
    wait_for(lambda: "up to 7 instances lost with the old disk" in coverage().reason, "it is said")
    assert coverage().state is CoverageState.INCOMPLETE
    order = region.ledger.place_order(SETTLE, {"ward": first}, "ugo")
    wait_for(lambda: region.ledger.order_answer(order) is not None, "the hub comes to it")
    assert region.ledger.order_answer(order) == (
        True, f"{first}: settled: up to 7 instances lost with the old disk",
    )  # fmt: skip
    wait_for(lambda: coverage().covered, "it counts as whole")
    since_us = region.ledger.ward_states()[first].seen_us
    wait_for(lambda: region.ledger.ward_states()[first].seen_us > since_us, "it reports again")
    assert coverage().covered  # the hub does not remember it either


def test_a_note_is_settled_where_no_hub_runs(region: Region) -> None:
    region.ledger.put_ward_state(WardState("a/b", epoch=b"1", seen_us=5, lost_note="up to 3 lost", pending=3))
    orders = [region.ledger.place_order(SETTLE, {"ward": ward}, "ugo") for ward in ("a/b", "a/b", "a/c")]
    OrderDesk(region.ledger, handlers_alone(region.ledger)).work_off()
    assert [region.ledger.order_answer(order) for order in orders] == [
        (True, "a/b: settled: up to 3 lost"), (True, "a/b: nothing of it counts as lost"),
        (False, "no such ward has ever reported"),
    ]  # fmt: skip
    state = region.ledger.ward_states()["a/b"]
    assert (state.lost_note, state.pending, state.seen_us) == ("", 3, 5)


def test_a_search_that_needs_nobody_asks_the_index_once(
    region: Region, wards: SimulatedWards, source: RegionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(region, wards, {})
    asked: list[Query] = []
    search = source._archive.search

    def counted(query: Query) -> list[Match]:
        asked.append(query)
        return search(query)

    monkeypatch.setattr(source._archive, "search", counted)
    monkeypatch.setattr(source._archive, "count", None)
    assert source.search(EVA, STUDIES).covered
    assert len(asked) == 1


def test_a_leash_is_short_after_misses_and_long_after_an_answer() -> None:
    leash = Leash()
    for _ in range(MISSES_MAX):
        assert leash.wait_s(2.0) == 2.0
        leash.missed()
    assert leash.wait_s(2.0) == LEASH_S and leash.wait_s(0.1) == 0.1
    leash.missed()
    leash.answered()
    assert leash.wait_s(2.0) == 2.0
    leash.missed()
    leash.answered()
    leash.missed()
    assert leash.wait_s(2.0) == 2.0  # only misses in a row count
