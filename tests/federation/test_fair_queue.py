"""A ward that floods the hub with pushes does not slow another's."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from archive.errors import OutOfResources
from archive.model import Level, Query
from federation.codec import deflated
from federation.fair_queue import QUANTUM, FairQueue, cost_of
from federation.hub import Hub
from federation.push_admission import PushAdmission
from federation.push_wire import Chunk
from federation.settings import UplinkSettings
from protos import uplink_pb2
from tests.datasets import make_instance
from tests.federation.regions import Region
from tests.federation.wards import EVA, QUICK, Node, Regional, hub_settings, node_of
from tests.waiting import wait_for

BATCH = 4 * QUANTUM


async def served(queue: FairQueue, waiting: list[tuple[str, int, bool]]) -> list[str]:
    """The wards in the order in which their batches are worked on, one at a time."""
    order: list[str] = []

    async def one(ward: str, cost: int, urgent: bool) -> None:
        turn = await queue.enter(ward, cost, urgent=urgent)
        order.append(ward)
        await asyncio.sleep(0)
        turn.leave()

    await asyncio.gather(*(one(*each) for each in waiting))
    return order


def test_a_ward_waits_for_one_batch_of_another_however_much_that_sends() -> None:
    flood = [("a", BATCH, False)] * 40
    order = asyncio.run(served(FairQueue(1), [*flood, ("b", QUANTUM, False)]))
    assert order.index("b") <= 2
    assert sorted(order) == ["a"] * 40 + ["b"]


def test_wards_share_by_bytes_not_by_batches() -> None:
    large, small = [("a", BATCH, False)] * 20, [("b", QUANTUM, False)] * 80
    order = asyncio.run(served(FairQueue(1), [*large, *small]))
    first = order[:50]
    assert 3 <= first.count("b") / first.count("a") <= 5


def test_what_a_reader_waits_for_goes_first_and_can_not_keep_the_others_out() -> None:
    urgent, ordinary = [("a", QUANTUM, True)] * 30, [("b", QUANTUM, False)] * 10
    order = asyncio.run(served(FairQueue(1), [("x", QUANTUM, False), *ordinary, *urgent]))
    assert order[:5] == ["x", "a", "a", "a", "b"]
    assert order.index("b", 5) <= 8


def test_who_leaves_while_it_waits_holds_nothing() -> None:
    async def test() -> None:
        queue = FairQueue(1)
        first = await queue.enter("a", 10)
        waiting = [asyncio.create_task(queue.enter("b", 10)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        first.leave()
        waiting[1].cancel()  # granted in the same moment
        await asyncio.sleep(0)
        async with asyncio.timeout(1):
            (await waiting[2]).leave()
            (await queue.enter("c", 10)).leave()

    asyncio.run(test())


def test_a_batch_without_anything_passes() -> None:
    assert asyncio.run(served(FairQueue(1), [("a", 0, False), ("b", 0, True)])) == ["a", "b"]


def test_no_more_are_taken_at_once_than_there_are_takers() -> None:
    async def test() -> None:
        queue = FairQueue(takers=2)
        first, second = await queue.enter("a", 1), await queue.enter("a", 1)
        third = asyncio.create_task(queue.enter("a", 1))
        await asyncio.sleep(0)
        assert not third.done()
        first.taken()  # its receipts are not made yet
        async with asyncio.timeout(1):
            (await third).leave()
        second.leave()
        first.leave()
        first.leave()  # any number of times
        again = [await queue.enter("a", 1) for _ in range(2)]
        blocked = asyncio.create_task(queue.enter("a", 1))
        await asyncio.sleep(0)
        assert not blocked.done()
        again[0].leave()
        async with asyncio.timeout(1):
            await blocked

    asyncio.run(test())


def test_a_ward_that_is_not_taken_does_not_wait_for_takers_that_hang() -> None:
    async def test() -> None:
        queue = FairQueue(takers=2)
        for _ in range(2):
            await queue.enter("a", 1)  # for ever
        async with asyncio.timeout(1):
            other = await queue.enter("b", 1)
        again = [asyncio.create_task(queue.enter(ward, 1)) for ward in ("a", "b")]
        await asyncio.sleep(0)
        assert not any(task.done() for task in again)
        other.taken()
        async with asyncio.timeout(1):
            await again[1]
        assert not again[0].done()
        again[0].cancel()

    asyncio.run(test())


def test_past_the_bound_only_a_ward_with_less_than_its_share_goes_on() -> None:
    async def test() -> None:
        queue = FairQueue(100, takers=8)
        flood = await queue.enter("a", 120)
        flood.taken()
        more = asyncio.create_task(queue.enter("a", 10))
        async with asyncio.timeout(1):
            other = await queue.enter("b", 60)  # which has nothing: it does not wait for the receipts of a
        other.taken()
        over = asyncio.create_task(queue.enter("b", 10))
        await asyncio.sleep(0)
        assert not more.done() and not over.done()
        flood.leave()
        async with asyncio.timeout(1):
            await more
            await over

    asyncio.run(test())


def test_what_is_compressed_costs_what_its_ward_says_within_bounds() -> None:
    frame = deflated(bytes(1 << 20), 1)

    def cost(packed: int) -> int:
        return cost_of([uplink_pb2.PushRequest(zstd_group=frame, packed_objects=packed)])

    assert 1 << 20 < cost(4) < cost(100) < cost(0) < cost(1 << 30)
    assert cost(-5) == cost(1)
    assert cost_of([uplink_pb2.PushRequest(zstd_chunk=frame)]) > 1 << 20
    assert cost_of([uplink_pb2.PushRequest(zstd_chunk=b"no frame")]) > 1 << 20
    assert cost_of([Chunk(b"")] * 100) > 4 << 20, "what brings nothing costs a turn all the same"


def test_small_objects_cost_more_than_their_bytes() -> None:
    group = uplink_pb2.PushGroup(objects=[uplink_pb2.PushWhole(dataset=b"x" * 8192)] * 100)
    small = cost_of([uplink_pb2.PushRequest(group=group)])
    large = cost_of([uplink_pb2.PushRequest(chunk=b"x" * (100 * 8192))])
    assert small > 2.5 * large


# --- places for push streams


def test_a_ward_that_has_no_stream_gets_one_from_the_ward_that_has_most() -> None:
    admission = PushAdmission(places=4, per_ward=4)
    a = [admission.enter("a") for _ in range(4)]
    with pytest.raises(OutOfResources):
        admission.enter("a")
    b = admission.enter("b")
    assert [place.given_up for place in a] == [False, False, False, True]
    admission.enter("b")
    assert [place.given_up for place in a] == [False, False, True, True]
    with pytest.raises(OutOfResources):  # it has its share now
        admission.enter("b")
    for place in (*a, b):
        admission.leave(place)
    assert [admission.enter("a") for _ in range(3)]


def test_each_of_more_wards_than_places_is_told_to_come_later() -> None:
    admission = PushAdmission(places=2, per_ward=2)
    first = [admission.enter("a"), admission.enter("b")]
    with pytest.raises(OutOfResources):
        admission.enter("c")
    admission.leave(first[0])
    assert not admission.enter("c").given_up


# --- over the wire


def test_wards_that_came_first_do_not_keep_another_out(region: Region) -> None:
    with Hub(hub_settings(region, pushes_max=2)) as hub:
        nodes = [node_of(region, hub, hospital, "Radiology", "I") for hospital in ("Galliera", "San Martino")]
        try:
            nodes[0].settings = replace(QUICK, push_streams=2)
            nodes[0].take(make_instance(number=number, rows=64, columns=64) for number in range(400))
            nodes[0].start()
            wait_for(lambda: sent(nodes[0]) > 0, "it pushes")
            nodes[1].take(make_instance(number=number) for number in range(1000, 1010))
            nodes[1].start()
            wait_for(lambda: nodes[1].pending == 0, "the other has its receipts", 8)
            wait_for(lambda: nodes[0].pending == 0, "and the first its own", 60)
        finally:
            for node in nodes:
                node.stop()


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    with Hub(hub_settings(region)) as hub:
        yield hub


def test_a_flood_of_one_ward_does_not_slow_another(region: Region, hub: Hub) -> None:
    """How long an instance of ward B takes from its storage to its receipt, and a search to its answer, with
    ward A silent and with A pushing over eight streams all the while; the figures are printed."""
    rounds = int(os.environ.get("MISS_FLOOD_ROUNDS", "2"))
    small, large = rounds * 300, rounds * 20
    flooding = UplinkSettings(push_streams=8, poll_s=0.02, backoff_first_s=0.05, backoff_cap_s=0.3)
    a = node_of(region, hub, "Galliera", "Radiology", "GA")
    b = node_of(region, hub, "San Martino", "Radiology", "SM")
    a.settings, b.settings = flooding, QUICK
    try:
        a.start(hold=True)
        b.start()
        wait_for(lambda: all(node.reported(region).attached for node in (a, b)), "attached")
        with Regional(region, hub) as source:

            def search() -> None:
                source.search(EVA, Query(Level.STUDY, (("PatientName", "NOBODY*"),)))

            quiet = [(receipt_s(b, number), timed(search)) for number in range(rounds)]
            flood = [
                *(make_instance(number=number, rows=64, columns=64) for number in range(small)),
                *(make_instance(number=small + number, rows=512, columns=512) for number in range(large)),
            ]
            a.take(flood)
            a.leave()
            a.start(hold=False)
            wait_for(lambda: sent(a) > 0, "the flood has begun")
            busy: list[tuple[float, float]] = []
            while len(busy) < rounds:
                measured = receipt_s(b, rounds + len(busy)), timed(search)
                if a.pending == 0:
                    break
                busy.append(measured)
            wait_for(lambda: a.pending == 0, "the flood is over", 120)
        assert busy, "the flood was over before it was measured"
        for name, at in (("receipt", 0), ("search", 1)):
            before, during = ([one[at] for one in times] for times in (quiet, busy))
            print(f"{name}: {statistics.median(before):.3f} s alone, {statistics.median(during):.3f} s "
                  f"beside a flood (worst {max(during):.3f})")  # fmt: skip
        assert statistics.median(one for one, _ in busy) < 3.0
    finally:
        a.stop()
        b.stop()


def sent(node: Node) -> int:
    assert node.uplink is not None and node.uplink._delivery is not None
    return node.uplink._delivery.bytes_sent


def receipt_s(node: Node, number: int) -> float:
    def act() -> None:
        node.take([make_instance(number=number, rows=64, columns=64)])
        wait_for(lambda: node.pending == 0, "it has a receipt", 60)

    return timed(act)


def timed(act: Callable[[], None]) -> float:
    begun_s = time.perf_counter()
    act()
    return time.perf_counter() - begun_s
