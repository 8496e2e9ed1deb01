"""The registry of attaches and the questions that are on their way: one attach for a ward, stated bounds,
and nobody who waits longer than a deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from archive.errors import OutOfResources, Unavailable
from archive.ledger import WardState
from archive.model import Level, Match, SeriesHolding
from federation.arrivals import Arrivals
from federation.attachments import ANSWER_BYTES_MAX, ASKS_MAX, OUTBOUND_MAX, Attachment, Attachments
from federation.coverage import Report
from protos import uplink_pb2

WARD = "san-martino/radiology"
HELLO = uplink_pb2.Hello(version="1", epoch=b"e" * 16)


def run(test: Callable[[Attachments], Coroutine[Any, Any, None]]) -> list[WardState]:
    """Runs a test in a loop of its own; returns what was kept in the ledger."""
    kept: list[WardState] = []

    async def keep(states: Sequence[WardState]) -> None:
        kept.extend(states)

    asyncio.run(test(Attachments({}, keep, lambda: time.time_ns() // 1000)))
    return kept


def search(ask_id: str) -> uplink_pb2.HubMessage:
    return uplink_pb2.HubMessage(search=uplink_pb2.SearchAsk(ask_id=ask_id))


def listing(count: int) -> Match:
    uids = tuple(f"1.2.{number}" for number in range(count))
    return Match(
        Level.STUDY, "A", {}, {"StudyInstanceUID": "1.2"}, holdings=(SeriesHolding("1.3", "CT", uids),)
    )


async def asked(attachment: Attachment) -> str:
    """The id of the next question that is sent to the ward."""
    return (await attachment.outbound.get()).search.ask_id


def test_an_answer_comes_in_pages_to_who_asked() -> None:
    async def test(attachments: Attachments) -> None:
        attachment = await attachments.attach(WARD, HELLO)
        asking = asyncio.create_task(attachments.ask(WARD, search, 5))
        ask_id = await asked(attachment)
        attachments.answered(WARD, ask_id, [listing(2)], last=False, truncated=False)
        attachments.answered("another/ward", ask_id, [listing(9)], last=True, truncated=False)
        attachments.answered(WARD, "another question", [listing(9)], last=True, truncated=False)
        assert not asking.done()
        attachments.answered(WARD, ask_id, [listing(3)], last=True, truncated=True)
        ask = await asking
        assert ([len(match.holdings[0].sop_instance_uids) for match in ask.matches], ask.truncated) == (
            [2, 3],
            True,
        )
        attachments.answered(WARD, ask_id, [listing(1)], last=True, truncated=False)  # late: dropped

    run(test)


def test_an_answer_of_few_rows_and_many_bytes_ends_the_question() -> None:
    async def test(attachments: Attachments) -> None:
        attachment = await attachments.attach(WARD, HELLO)
        asking = asyncio.create_task(attachments.ask(WARD, search, 5))
        ask_id = await asked(attachment)
        assert attachments.hears(WARD, ask_id, ANSWER_BYTES_MAX)
        assert not attachments.hears("another/ward", ask_id, 1)
        assert not attachments.hears(WARD, ask_id, 1)
        with pytest.raises(OutOfResources):
            await asking

    run(test)


def test_who_does_not_answer_costs_the_deadline_and_is_told_to_stop() -> None:
    async def test(attachments: Attachments) -> None:
        attachment = await attachments.attach(WARD, HELLO)
        begun_s = time.monotonic()
        with pytest.raises(Unavailable, match="no answer within 0.1 s"):
            await attachments.ask(WARD, search, 0.1)
        assert 0.09 < time.monotonic() - begun_s < 2
        ask_id = await asked(attachment)
        assert attachment.outbound.get_nowait().cancel.ask_id == ask_id
        assert attachment.asks == {}

    run(test)


def test_a_ward_that_is_away_or_leaves_costs_nothing() -> None:
    async def test(attachments: Attachments) -> None:
        with pytest.raises(Unavailable, match="away"):
            await attachments.ask(WARD, search, 60)
        attachment = await attachments.attach(WARD, HELLO)
        asking = asyncio.create_task(attachments.ask(WARD, search, 60))
        await asked(attachment)
        await attachments.detach(attachment, "the line was lost")
        with pytest.raises(Unavailable, match="line was lost"):
            await asking

    run(test)


def test_a_newer_attach_takes_the_place_of_an_older_one() -> None:
    async def test(attachments: Attachments) -> None:
        older = await attachments.attach(WARD, HELLO)
        newer = await attachments.attach(WARD, HELLO)
        assert older.ended.result() == "the ward attached anew"
        await attachments.detach(older, "gone")
        assert attachments.attached(WARD) is newer
        assert attachments.states[WARD].attached

    kept = run(test)
    assert all(state.attached for state in kept)


def test_who_leaves_while_it_is_written_down_does_not_stay_attached() -> None:
    async def test() -> None:
        writing, go_on = asyncio.Event(), asyncio.Event()

        async def keep(states: Sequence[WardState]) -> None:
            writing.set()
            await go_on.wait()

        attachments = Attachments({}, keep, lambda: time.time_ns() // 1000)
        attaching = asyncio.create_task(attachments.attach(WARD, HELLO))
        await writing.wait()
        attaching.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        assert attachments.attached(WARD) is None
        assert not attachments.states[WARD].attached

    asyncio.run(test())


def test_questions_and_messages_are_bounded() -> None:
    async def test(attachments: Attachments) -> None:
        attachment = await attachments.attach(WARD, HELLO)
        asking = [asyncio.create_task(attachments.ask(WARD, search, 60)) for _ in range(ASKS_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(OutOfResources, match="too many questions"):
            await attachments.ask(WARD, search, 60)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        while attachment.outbound.qsize() < OUTBOUND_MAX:
            attachment.send(search("x"))
        with pytest.raises(OutOfResources, match="does not take"):
            await attachments.ask(WARD, search, 60)
        assert attachment.asks == {}

    run(test)


def test_an_answer_past_its_bounds_is_no_answer() -> None:
    async def test(attachments: Attachments) -> None:
        attachment = await attachments.attach(WARD, HELLO)
        asking = asyncio.create_task(attachments.ask(WARD, search, 60))
        ask_id = await asked(attachment)
        for _ in range(3):
            attachments.answered(WARD, ask_id, [listing(1000)], last=False, truncated=False)
        with pytest.raises(OutOfResources, match="bounds"):
            await asking

    run(test)


def test_a_ward_that_says_it_can_not_answer_is_believed() -> None:
    async def test(attachments: Attachments) -> None:
        attachment = await attachments.attach(WARD, HELLO)
        asking = asyncio.create_task(attachments.ask(WARD, search, 60))
        attachments.failed(WARD, await asked(attachment), "the index is not there")
        with pytest.raises(Unavailable, match="the index is not there"):
            await asking

    run(test)


def test_the_ledger_gets_every_state_and_may_be_away() -> None:
    async def test(attachments: Attachments) -> None:
        attachment = await attachments.attach(WARD, HELLO)
        await attachments.report(WARD, Report(3))
        attachments.receipted(WARD)
        await attachments.report(WARD, Report(0))
        await attachments.detach(attachment, "gone")

    kept = run(test)
    assert [(state.attached, state.pending) for state in kept] == [
        (True, 0),
        (True, 3),
        (True, 0),
        (False, 0),
    ]
    assert kept[-1].last_receipt_us > 0

    async def away(states: Sequence[WardState]) -> None:
        raise Unavailable("the ledger is away")

    async def without() -> None:
        attachments = Attachments({}, away, lambda: 7)
        await attachments.attach(WARD, HELLO)
        await attachments.report(WARD, Report(3))
        assert attachments.states[WARD].pending == 3

    asyncio.run(without())


def test_the_states_of_many_wards_share_a_transaction() -> None:
    wards, written = [f"h/{number}" for number in range(200)], []

    async def keep(states: Sequence[WardState]) -> None:
        written.append({state.ward: state.pending for state in states})
        await asyncio.sleep(0.001)

    async def test() -> None:
        attachments = Attachments({}, keep, lambda: 7)
        await asyncio.gather(*(attachments.attach(ward, HELLO) for ward in wards))
        await asyncio.gather(*(attachments.report(ward, Report(3)) for ward in wards))

    asyncio.run(test())
    assert len(written) <= 4
    assert {ward: pending for batch in written for ward, pending in batch.items()} == dict.fromkeys(wards, 3)


def test_who_takes_over_knows_what_the_last_hub_kept_and_what_it_was_told_itself() -> None:
    async def test(attachments: Attachments) -> None:
        await attachments.attach(WARD, HELLO)
        await attachments.report(WARD, Report(0, clock_us=7))
        away = WardState("other/ward", epoch=b"o", complete_to_us=5, seen_us=5)
        lost = WardState(WARD, epoch=b"an older disk", complete_to_us=3, seen_us=3, pending=4)
        await attachments.take_over({WARD: lost, "other/ward": away})
        here = attachments.states[WARD]
        assert here.attached and here.pending == 0 and here.complete_to_us > 3
        assert here.lost_note == "up to 4 instances lost with the old disk"
        assert attachments.states["other/ward"] == away

    assert run(test)[-1].lost_note


def test_arrivals_wake_all_who_wait_and_keep_nothing() -> None:
    async def test() -> None:
        arrivals = Arrivals()
        first, second, other = arrivals.expect("1.2"), arrivals.expect("1.2"), arrivals.expect("1.3")
        arrivals.came(["1.2", "1.4"])
        assert first.done() and second.done() and not other.done()
        arrivals.forget("1.3", other)
        arrivals.forget("1.2", first)
        assert arrivals.waiting == 0

    asyncio.run(test())
