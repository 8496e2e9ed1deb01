"""Routing rules over a real archive, with devices that receive by C-STORE: what goes where, what waits, and
what becomes of it when a destination is away, refuses, or the node is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

from archive.database import sqlite_url
from archive.ledger import (
    CompleteStudy,
    Destination,
    Device,
    Ledger,
    RouteChoice,
    Routed,
    RouteKind,
    RouteState,
)
from node.dimse.errors import AssociationEnded
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.routing import service
from node.routing.following import BATCH_RECORDS, Following
from node.routing.rulefile import parse_rules
from tests.datasets import CT, EXPLICIT, MR, Instance, make_instance
from tests.forked import begin
from tests.node.receiving import Receiver, receiver
from tests.node.routed import device, routing, serve_routing
from tests.node.serving import AE_TITLE
from tests.node.storing import WARD, Storing, store, storing
from tests.waiting import wait_for

PLANNING = """
[[rule]]
name = "planning"
to = "ONCO"
[rule.match]
Modality = "CT"
StudyDescription = ["*RT*PLAN*", "*planning*"]
[rule.not]
PatientID = "TEST*"
"""
ALL = '[[rule]]\nname = "all"\nto = "ONCO"\n'


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


def have(peer: Receiver, *instances: Instance) -> None:
    """Returns when the peer has these."""
    uids = {one.sop_instance_uid for one in instances}
    wait_for(lambda: uids <= set(peer.received), f"{len(uids)} instances at the destination")


def test_what_meets_all_conditions_and_no_exception_goes(served: Storing) -> None:
    wanted = [make_instance(StudyDescription=words) for words in ("CT RT - PLAN 2", "planning")]
    others = [
        make_instance(StudyDescription="Thorax"),
        make_instance(StudyDescription="planning", modality="MR", sop_class=MR),
        make_instance(StudyDescription="planning", patient_id="TEST7"),
    ]
    with receiver() as peer:
        device(served, "ONCO", peer.port)
        with routing(served, PLANNING) as running:
            assert served.send(*wanted, *others) == [0] * 5
            have(peer, *wanted)
            last = make_instance(StudyDescription="planning")
            served.send(last)
            have(peer, last)
            wait_for(lambda: not running.queue(), "an empty queue")
    assert set(peer.received) == {one.sop_instance_uid for one in (*wanted, last)}
    assert {uid: got.dataset for uid, got in peer.received.items()} == {
        one.sop_instance_uid: one.dataset for one in (*wanted, last)}


@pytest.mark.parametrize(("condition", "goes"), [
    ('device = "CT*"', True),
    ('calling_ae = ["MR1", "CT1"]', True),
    ('calling_ae = "MR1"', False),
    ('sop_class = "CTImageStorage"', True),
    (f'sop_class = "{MR}"', False),
    ('transfer_syntax = "ExplicitVRLittleEndian"', True),
    ('transfer_syntax = "JPEG2000Lossless"', False),
    ('PatientName = "rossi*"', True),
    ('StudyDate = "20260101-20260131"', True),
    ('StudyDate = "-20251231"', False),
    ('StudyTime = "10-11"', True),
    ('ModalitiesInStudy = "CT"', True),
    ('SOPClassUID = "CTImageStorage"', True),
    ('Rows = 16', True),
    ('Rows = 512', False),
    ('PatientComments = "x*"', False),  # what is unknown meets nothing
])  # fmt: skip
def test_conditions(served: Storing, condition: str, goes: bool) -> None:
    """Asked of what the index says of a stored instance."""
    rule, = parse_rules(f'{ALL}[rule.match]\n{condition}\n')
    one = make_instance()
    served.send(one)
    served.archive.wait_indexed()
    described, = served.archive.index.described([one.sop_instance_uid])
    assert rule.takes(described) is goes
    assert bool(rule.may_take(described.stored.head) and rule.takes(described)) is goes


def test_hours_of_arrival_and_of_sending(served: Storing) -> None:
    now = datetime.now().astimezone()
    open_now = f"{now.hour:02d}:00-{(now.hour + 2) % 24:02d}:00"
    closed = f"{(now.hour + 3) % 24:02d}:00-{(now.hour + 4) % 24:02d}:00"
    rules = f"""
[[rule]]
name = "came now"
to = "ONCO"
[rule.match]
received = "{open_now}"
[[rule]]
name = "came at another time"
to = "PACS"
[rule.match]
received = "{closed}"
[[rule]]
name = "later"
to = "NIGHT"
hours = "{closed}"
"""
    with receiver() as onco, receiver() as pacs, receiver() as night:
        for ae_title, peer in (("ONCO", onco), ("PACS", pacs), ("NIGHT", night)):
            device(served, ae_title, peer.port)
        with routing(served, rules) as running:
            one = make_instance()
            served.send(one)
            have(onco, one)
            waiting = wait_for(running.queue, "the row of the closed window")
            wait_for(lambda: len(running.queue()) == 1, "one row")
    row, = waiting if len(waiting) == 1 else running.queue()
    assert row.to.name == "NIGHT" and row.tries == 0
    opens = datetime.fromtimestamp(row.next_try_us / 1e6).astimezone()
    assert opens.hour == (now.hour + 3) % 24 and opens > now
    assert not pacs.received and not night.received


def test_nothing_goes_back_to_whom_it_came_from(served: Storing) -> None:
    """The device that sends is one of the destinations."""
    with receiver() as sender, receiver() as peer:
        served.ledger.add_device(Device("CT1", "127.0.0.1", port=sender.port))
        device(served, "ONCO", peer.port)
        with routing(served, '[[rule]]\nname = "all"\nto = ["CT1", "ONCO"]\n') as running:
            one = make_instance()
            served.send(one)
            have(peer, one)
            wait_for(lambda: not running.queue(), "an empty queue")
            rows = [state.to.name for state in served.ledger.destinations_of_routes()]
    assert rows == ["ONCO"]
    assert not sender.received


def test_once_whichever_rules_and_orders_say_so(served: Storing) -> None:
    two = ALL + '[[rule]]\nname = "also"\nto = "ONCO"\npriority = "high"\n'
    with receiver() as peer:
        device(served, "ONCO", peer.port)
        with routing(served, two) as running:
            one = make_instance()
            served.send(one)
            served.send(one)  # a duplicate: nothing new is stored
            have(peer, one)
            wait_for(lambda: not running.queue(), "an empty queue")
            answer = running.orders.apply({"rule": "also", "since_us": "0"}, "anna")
            assert answer == "0 queued; 1 were in the queue, or sent, before"
            assert peer.arrived.acquire(timeout=0) and not peer.arrived.acquire(timeout=0)
            answer = running.orders.apply({"rule": "also", "since_us": "0", "again": "yes"}, "anna")
            assert answer == "1 queued; 0 were in the queue, or sent, before"
            assert peer.arrived.acquire(timeout=20)
            wait_for(lambda: not running.queue(), "an empty queue")


def test_what_was_stored_before_goes_by_order_alone(served: Storing) -> None:
    before, after = make_instance(), make_instance()
    served.send(before)
    with receiver() as peer:
        device(served, "ONCO", peer.port)
        with routing(served, ALL) as running:
            served.send(after)
            have(peer, after)
            assert before.sop_instance_uid not in peer.received
            running.orders.apply({"rule": "all", "since_us": "0"}, "anna")
            have(peer, before)


def test_what_waits_for_one_that_is_away_goes_when_it_is_back(served: Storing) -> None:
    sent = [make_instance(number=n) for n in range(5)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    device(served, "ONCO", port)
    with routing(served, ALL) as running:
        served.send(*sent)
        wait_for(lambda: len(running.queue()) == 5, "five rows")
        wait_for(lambda: (state := running.summary("ONCO").state) and state.failures >= 3, "three failures")
        summary = running.summary("ONCO")
        assert (summary.waiting, summary.set_aside, summary.tries) == (5, 0, 0)  # rows count no try
        assert summary.state is not None and "no connection" in summary.state.error
        with receiver() as peer:
            device(served, "ONCO", peer.port)  # it listens elsewhere now: the list counts at once
            have(peer, *sent)
            wait_for(lambda: not running.queue(), "an empty queue")
            wait_for(lambda: not served.ledger.route_summaries(), "nothing to show")


def test_an_unknown_destination_waits_with_the_reason(served: Storing) -> None:
    one = make_instance()
    with routing(served, ALL) as running:
        served.send(one)
        wait_for(lambda: (state := running.summary("ONCO").state) and state.failures, "a failure")
        state = running.summary("ONCO").state
        assert state is not None
        assert "no device has this AE title" in state.error
        with receiver() as peer:
            device(served, "ONCO", peer.port)
            have(peer, one)


def test_refusals_are_set_aside_while_the_others_pass(
    served: Storing, caplog: pytest.LogCaptureFixture
) -> None:
    """MR is not taken at all, one CT is refused for good, one as often as it is tried."""
    good, bad, flaky = (make_instance(number=n) for n in range(3))
    mr = make_instance(modality="MR", sop_class=MR)
    answers = {bad.sop_instance_uid: 0xA900, flaky.sop_instance_uid: 0x0110}
    with receiver(takes={CT: (good.transfer_syntax_uid,)}, status=lambda uid: answers.get(uid, 0),
                  comment="its own words") as peer:
        device(served, "ONCO", peer.port)
        with routing(served, ALL, tries_max=3) as running:
            served.send(bad, mr, flaky, good)
            have(peer, good)
            wait_for(lambda: running.summary("ONCO").set_aside == 3, "three set aside")
            rows = {row.sop_instance_uid: row for row in running.queue()}
            assert {uid: (row.status, row.tries) for uid, row in rows.items()} == {
                bad.sop_instance_uid: (0xA900, 1), mr.sop_instance_uid: (0x0122, 1),
                flaky.sop_instance_uid: (0x0110, 3)}
            assert "its own words" in rows[bad.sop_instance_uid].comment
            assert "set aside" in caplog.text and "its own words" not in caplog.text  # it may name a patient
            assert "3 times" in rows[flaky.sop_instance_uid].comment
            answers.clear()
            assert running.orders.retry({"state": "set aside"}, "anna") == "3 will be tried now"
            wait_for(lambda: len(running.queue()) == 1, "what is not taken at all")
            assert running.orders.drop({"rule": "all"}, "anna") == "1 dropped"
            assert not running.queue()


def test_one_that_has_no_room_is_left_alone(served: Storing) -> None:
    one = make_instance()
    full = [True]
    with receiver(status=lambda uid: 0xA700 if full[0] else 0) as peer:
        device(served, "ONCO", peer.port)
        with routing(served, ALL, tries_max=2) as running:
            served.send(one)
            wait_for(lambda: running.queue() and running.queue()[0].tries >= 4, "more tries than are counted")
            assert running.queue()[0].state is RouteState.WAITING
            full[0] = False
            wait_for(lambda: not running.queue(), "an empty queue")


def test_urgent_first_then_the_oldest(served: Storing) -> None:
    rules = """
[[rule]]
name = "urgent"
to = "ONCO"
priority = "high"
match = { SeriesDescription = "STROKE" }
[[rule]]
name = "all"
to = "ONCO"
"""
    slow = [make_instance(number=n) for n in range(3)]
    urgent = make_instance(SeriesDescription="STROKE")
    with routing(served, rules) as running:
        served.send(*slow)
        wait_for(lambda: len(running.queue()) == 3, "three rows")
        served.send(urgent)
        wait_for(lambda: len(running.queue()) == 4, "four rows")
        to = Destination(RouteKind.DEVICE, "ONCO")
        due = served.ledger.due_routes(to, 2**62, 10)
    assert [row.sop_instance_uid for row in due][0] == urgent.sop_instance_uid
    assert [row.queued_us for row in due[1:]] == sorted(row.queued_us for row in due[1:])


def test_a_changed_file_counts_and_a_broken_one_does_not(
    served: Storing, caplog: pytest.LogCaptureFixture
) -> None:
    with receiver() as onco, receiver() as pacs:
        device(served, "ONCO", onco.port)
        device(served, "PACS", pacs.port)
        with routing(served, ALL) as running:
            running.rewrite(ALL + "[rule.match]\nModalty = 'CT'\n")
            wait_for(lambda: "did you mean 'Modality'" in caplog.text, "the mistake in the log")
            assert "line 5, rule 1 'all': match.Modalty" in caplog.text
            first, second = make_instance(), make_instance()
            served.send(first)
            have(onco, first)
            running.rewrite('[[rule]]\nname = "other"\nto = "PACS"\n')
            wait_for(lambda: "other" in served.ledger.rule_marks(), "the new rule")
            served.send(second)
            have(pacs, second)
    assert set(onco.received) == {first.sop_instance_uid}
    assert set(pacs.received) == {second.sop_instance_uid}


def test_a_file_that_is_broken_at_the_start_misses_nothing_once_it_is_right(tmp_path: Path) -> None:
    one = make_instance()
    with receiver() as peer:
        with storing(tmp_path) as served:
            device(served, "ONCO", peer.port)
            with routing(served, ALL):
                pass
        with storing(tmp_path) as served, routing(served, "[[rule]\n") as running:
            served.send(one)
            served.archive.wait_indexed()
            assert not running.queue()
            running.rewrite(ALL)
            have(peer, one)


def test_a_file_of_rules_that_is_missing_or_goes_is_told(
    served: Storing, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FILE_POLL_S", 0.02)
    monkeypatch.setattr(service, "MISSING_S", 0.1)
    caplog.set_level("INFO")
    path = served.archive.settings.state / "routes.toml"
    with routing(served, None, rules=path) as running:
        assert f"no routing rules: there is no file {path}" in caplog.text
        running.rewrite(ALL)
        wait_for(lambda: f"1 routing rules from {path}" in caplog.text, "the rules are read")
        path.unlink()
        wait_for(lambda: f"0 routing rules from {path}" in caplog.text, "the end of the rules is told")


def test_without_rules_nothing_is_kept(served: Storing) -> None:
    with routing(served, None):
        served.send(make_instance())
        served.archive.wait_indexed()
    assert served.ledger.rule_marks() == {} and served.ledger.destinations_of_routes() == []


def test_a_ward_waits_for_an_uplink_with_the_reason(served: Storing) -> None:
    with routing(served, '[[rule]]\nname = "ward"\nward = "galliera/oncology"\n'):
        served.send(make_instance())
        wait_for(lambda: served.ledger.route_summaries()
                 and served.ledger.route_summaries()[0].state.failures, "a failure")  # type: ignore[union-attr]
        summary, = served.ledger.route_summaries()
    assert str(summary.to) == "ward galliera/oncology"
    assert summary.waiting == 1 and summary.state is not None and "uplink" in summary.state.error


def test_a_full_queue_stops_its_rules_and_misses_nothing(served: Storing) -> None:
    rules = ALL + '[[rule]]\nname = "other"\nto = "PACS"\n'
    sent = [make_instance(number=n) for n in range(6)]
    with receiver() as onco, receiver() as pacs:
        device(served, "PACS", pacs.port)
        with routing(served, rules, queue_max=1) as running:
            for one in sent:  # one at a time: each is a batch of its own
                served.send(one)
                have(pacs, one)
            assert running.summary("ONCO").waiting < 6
            device(served, "ONCO", onco.port)
            have(onco, *sent)


def test_what_comes_after_the_clock_was_set_back_is_the_rules(served: Storing) -> None:
    """It is received before the moment at which the rule began, by a clock that was wrong then."""
    hour_us = 3600 * 1_000_000
    now_us = [time.time_ns() // 1000 + hour_us]
    following = Following(served.archive, served.ledger, WARD, queue_max=10, clock=lambda: now_us[0])
    following.use(parse_rules(ALL))
    began_us = served.ledger.rule_marks()["all"].since_us
    now_us[0] -= hour_us
    sent = make_instance(rows=0)
    served.send(sent)
    served.archive.wait_indexed()
    following.step()
    assert [one.sop_instance_uid for one in served.ledger.routes(10)] == [sent.sop_instance_uid]
    assert served.ledger.rule_marks()["all"].since_us < began_us


def test_following_in_batches(served: Storing) -> None:
    """More records than one batch: each is queued once, and the marks move."""
    following = Following(served.archive, served.ledger, WARD, queue_max=10**6, clock=lambda: 1)
    following.use(parse_rules(ALL))
    count = BATCH_RECORDS + 20
    sent = [make_instance(rows=0, number=n) for n in range(count)]
    served.send(*sent)
    served.archive.wait_indexed()
    while following.step():
        pass
    assert len(served.ledger.routes(10_000)) == count
    assert served.ledger.rule_marks()["all"].position == served.archive.index.positions()[0]


def test_killed_in_the_middle_everything_arrives(tmp_path: Path) -> None:
    """SIGKILL while 200 instances come in and go out, twice: the queue and the rules' marks are on disk."""
    sent = [make_instance(rows=0, number=n) for n in range(200)]
    answered: Counter[str] = Counter()

    def status(uid: str) -> int:
        answered[uid] += 1
        return 0

    acknowledged: set[str] = set()
    with receiver(status=status) as peer:
        with storing(tmp_path) as served, routing(served, ALL):
            device(served, "ONCO", peer.port)
        for arrived in (60, 130, 200):
            process, pipe, port = begin(serve_routing, tmp_path)
            assert port is not None
            storing_on = threading.Thread(target=store_all, args=(port, sent, acknowledged))
            storing_on.start()
            wait_for(lambda arrived=arrived: len(answered) >= arrived, f"{arrived} instances")  # type: ignore[misc]
            if arrived == len(sent):
                storing_on.join()
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            storing_on.join()
            pipe.close()
    assert set(answered) == {one.sop_instance_uid for one in sent} == acknowledged
    assert sum(answered.values()) <= 200 + 2 * 60  # again at most what was not yet written as sent


def store_all(port: int, sent: list[Instance], acknowledged: set[str]) -> None:
    """Store what is not acknowledged yet, until the node is killed."""
    peer, proposed = Peer("127.0.0.1", port, AE_TITLE), [ProposedContext(1, CT, (EXPLICIT,))]
    with suppress(AssociationEnded), Requestor.connect(peer, "CT1", proposed) as requestor:
        for one in sent:
            if one.sop_instance_uid not in acknowledged and store(requestor, one) == 0:
                acknowledged.add(one.sop_instance_uid)


def test_a_rule_without_room_goes_on_without_anything_new(served: Storing) -> None:
    """Its destination is full in the very batch that is the last: what was passed over is not forgotten."""
    following = Following(served.archive, served.ledger, WARD, queue_max=1, clock=lambda: 1)
    following.use(parse_rules(ALL + '[[rule]]\nname = "other"\nto = "PACS"\n'))
    full = Routed("all", Destination(RouteKind.DEVICE, "ONCO"), "1.2", "1.3", "1.4", b"d", 1, 1, 2)
    served.ledger.queue_routes([full])
    served.send(make_instance(), make_instance(number=2))
    served.archive.wait_indexed()
    following.step()
    assert {row.to.name: row.rule for row in served.ledger.routes(10)} == {"ONCO": "all", "PACS": "other"}
    assert served.ledger.route_count(full.to) == 1
    served.ledger.drop_routes(RouteChoice(to=full.to))
    following.step()
    assert served.ledger.route_count(full.to) == 2


def test_a_complete_study_waits_for_room_and_holds_no_other_up(served: Storing) -> None:
    rule = '[[rule]]\nname = "{0}"\nwhen = "study complete"\nto = "{0}"\n[rule.match]\nModality = "{1}"\n'
    rules = parse_rules(rule.format("ONCO", "CT") + rule.format("PACS", "MR"))
    following = Following(served.archive, served.ledger, WARD, queue_max=2, clock=lambda: 1)
    following.use(rules)
    onco, pacs = (Destination(RouteKind.DEVICE, name) for name in ("ONCO", "PACS"))
    ct, mr = make_instance(), make_instance(modality="MR", sop_class=MR)
    served.send(ct, mr)
    served.ledger.queue_routes([
        Routed("ONCO", onco, "1.2", "1.3", f"1.4.{n}", b"d", 1, 1, 2) for n in range(2)])
    for one in (ct, mr):
        served.ledger.note_complete(CompleteStudy(one.study_uid, "quiet", 5))
    assert not following.complete()
    assert (served.ledger.route_count(onco), served.ledger.route_count(pacs)) == (2, 1)
    assert [one.study_uid for one in served.ledger.complete_studies(10)] == [ct.study_uid]
    served.ledger.drop_routes(RouteChoice(to=onco))
    following.complete()
    assert (served.ledger.route_count(onco), served.ledger.route_count(pacs)) == (1, 1)
    assert not served.ledger.has_complete_studies()


def test_pages_of_studies_that_wait_for_room_hide_no_other_and_cost_a_count_each(
        served: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.routing.following.STUDIES_AT_ONCE", 3)
    rule = '[[rule]]\nname = "{0}"\nwhen = "study complete"\nto = "{0}"\n[rule.match]\nModality = "{1}"\n'
    following = Following(served.archive, served.ledger, WARD, queue_max=1, clock=lambda: 1)
    following.use(parse_rules(rule.format("ONCO", "CT") + rule.format("PACS", "MR")))
    onco, pacs = (Destination(RouteKind.DEVICE, name) for name in ("ONCO", "PACS"))
    served.ledger.queue_routes([Routed("ONCO", onco, "1.2", "1.3", "1.4", b"d", 1, 1, 2)])
    cts, mr = [make_instance() for _ in range(7)], make_instance(modality="MR", sop_class=MR)
    served.send(*cts, mr)
    for at_us, one in enumerate((*cts, mr), 5):
        served.ledger.note_complete(CompleteStudy(one.study_uid, "quiet", at_us))
    assert [following.complete() for _ in range(3)] == [True, True, False]
    assert served.ledger.route_count(pacs) == 1
    assert len(served.ledger.complete_studies(10)) == 7
    counted: list[Destination] = []
    count = served.ledger.route_count

    def counting(to: Destination) -> int:
        counted.append(to)
        return count(to)

    monkeypatch.setattr(served.ledger, "route_count", counting)
    assert [following.complete() for _ in range(3)] == [True, True, False]
    assert counted == [onco] * 3


@pytest.mark.skipif(shutil.which("storescp") is None, reason="DCMTK is not installed")
def test_storescp_as_a_destination(served: Storing, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    process = subprocess.Popen(["storescp", "--accept-all", "-od", str(inbox), "-aet", "ONCO", str(port)])
    try:
        device(served, "ONCO", port)
        sent = [make_instance(number=n) for n in range(20)]
        with routing(served, ALL) as running:
            served.send(*sent)
            wait_for(lambda: len(list(inbox.iterdir())) == 20 and not running.queue(), "20 files")
    finally:
        process.kill()
        process.wait()


def test_a_ledger_that_another_reads(tmp_path: Path) -> None:
    """Rows of a node that does not run are seen as they stand."""
    with storing(tmp_path) as served, routing(served, ALL) as running:
        served.send(make_instance())
        wait_for(running.queue, "a row")
    ledger = Ledger.open(sqlite_url(tmp_path / "ledger.db"))
    try:
        assert [row.rule for row in ledger.routes(10)] == ["all"]
    finally:
        ledger.close()
