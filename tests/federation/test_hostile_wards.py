"""Wards whose node was taken over: what they say over the real wire with a good certificate, by raw calls.
They change nothing of another ward's, and stop nobody else."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from archive.corrections import Correction, fact_of
from archive.errors import MissError
from archive.model import Fact, FactKind, Level
from archive.removals import Removal, Restoration, fact_of_restoration
from archive.removals import fact_of as removal_fact
from certs.credentials import channel_sync
from federation import serde_facts, status
from federation.facts_rules import DECIDED_ELSEWHERE, OTHERS_HOLD, UNREADABLE
from federation.hub import Hub
from federation.inventory_service import LEAVES_MAX
from federation.reconcile_notes import Notes
from federation.restoring_service import FETCHES_PER_WARD_MAX
from protos import facts_pb2, inventory_pb2, restore_pb2, uplink_pb2
from protos.facts_pb2_grpc import FactsStub
from protos.inventory_pb2_grpc import InventoryStub
from protos.restore_pb2_grpc import RestoreStub
from protos.uplink_pb2_grpc import UplinkStub
from tests.datasets import make_instance
from tests.federation.regions import Region
from tests.federation.test_facts import GALLIERA, MARTINO, in_region, patient_id, regional, undoing
from tests.federation.thin import ThinLine
from tests.federation.wards import EVA, Node, Regional, hub_settings, node_of
from tests.waiting import wait_for

STUDY, SERIES = "1.2.3", "1.2.3.1"


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    hub = Hub(hub_settings(region, promote_deadline_s=3.0))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def martino(region: Region, hub: Hub) -> Iterator[Node]:
    """The ward that is wronged: it has given the region a study."""
    node = node_of(region, hub, "San Martino", "Radiology", "SM").start()
    in_region(hub, node, [make_instance(study_uid=STUDY, series_uid=SERIES, sop_uid="1.2.3.1.1")])
    yield node
    node.stop()


@pytest.fixture
def galliera(region: Region, hub: Hub) -> Iterator[Node]:
    """The ward that was taken over."""
    node = node_of(region, hub, "Galliera", "Oncology", "GA")
    yield node
    node.stop()


@pytest.fixture
def channel(galliera: Node, hub: Hub) -> Iterator[Any]:
    """What its certificate opens."""
    with channel_sync(galliera.identity, f"127.0.0.1:{hub.settings.port}") as opened:
        yield opened


def tell(channel: Any, *facts: Fact) -> list[str]:
    """What the region says to each of these, "" where it takes it."""
    request = facts_pb2.TellFacts(log=b"log", facts=map(serde_facts.fact_to, facts))
    refused = {one.index: one.reason for one in FactsStub(channel).Tell(request, timeout=20).refused}
    return [refused.get(number, "") for number in range(len(facts))]


def removal(removal_id: str, uid: str, ward: str, level: Level = Level.STUDY) -> Removal:
    return Removal(removal_id, level, uid, STUDY, "113001", "maria", "blurred", time.time_ns() // 1000, ward)


def test_a_decision_of_others_is_not_taken_back_by_one_whose_id_begins_with_its_own(
    hub: Hub, martino: Node, channel: Any
) -> None:
    archive = regional(hub)
    wrong = Correction("ab" * 8, STUDY, (("PatientID", "999"),), "maria", "wrong", 1000, "")
    hidden = removal("cd" * 16, SERIES, "", Level.SERIES)
    archive.record_facts([fact_of(wrong)])
    ours = replace(wrong, id=wrong.id + "0", study_uid="1.9.9", ward=GALLIERA)
    assert tell(channel, fact_of(ours)) == [""]
    assert tell(channel, replace(undoing(wrong, GALLIERA), sop_instance_uid="1.9.9")) == [DECIDED_ELSEWHERE]
    assert patient_id(archive) == "999"
    archive.record_facts([removal_fact(hidden)])
    mine = removal(hidden.id + "0", "1.9.9", GALLIERA)
    assert tell(channel, removal_fact(mine)) == [""]
    back = Restoration(hidden.id, "1.9.9", "luca", 2000, GALLIERA)
    assert tell(channel, fact_of_restoration(back)) == [DECIDED_ELSEWHERE]
    # Nor by one of the same id, which would count instead of it.
    assert tell(channel, removal_fact(removal(hidden.id, "1.9.9", GALLIERA))) == [DECIDED_ELSEWHERE]
    assert patient_id(archive) == "none"


def test_a_ward_that_puts_one_image_into_another_s_study_removes_none_of_the_others(
    hub: Hub, martino: Node, galliera: Node, channel: Any
) -> None:
    galliera.start()
    in_region(hub, galliera, [make_instance(study_uid=STUDY, series_uid="1.8", sop_uid="1.8.1")])
    assert tell(channel, removal_fact(removal("ab" * 16, STUDY, GALLIERA))) == [OTHERS_HOLD]
    assert tell(channel, removal_fact(removal("ac" * 16, "1.8", GALLIERA, Level.SERIES))) == [""]
    shown = [one.head.provenance.ward for one in regional(hub).instances(STUDY)]
    assert shown == [MARTINO]


def test_a_removal_of_a_guessed_uid_hides_nothing_that_another_ward_gives_later(
    hub: Hub, martino: Node, channel: Any
) -> None:
    planted = removal("ab" * 16, "1.2.4", GALLIERA)
    planted = replace(planted, at_us=planted.at_us + 3_600_000_000)
    assert tell(channel, removal_fact(planted)) == [""]
    in_region(hub, martino, [make_instance(study_uid="1.2.4", series_uid="1.2.4.1", sop_uid="1.2.4.1.1")])
    assert len(regional(hub).instances("1.2.4")) == 1
    # Nor is the ward told of it, whose own images it would cover.
    decided = removal("ac" * 16, "1.2.9", "")
    regional(hub).record_facts([removal_fact(decided)])
    with channel_sync(martino.identity, f"127.0.0.1:{hub.settings.port}") as line:
        pages = list(FactsStub(line).Next(facts_pb2.NextFacts(), timeout=20))
    told = [serde_facts.fact_from(fact).sop_instance_uid for page in pages for fact in page.facts]
    assert told == ["1.2.9"]


@pytest.mark.parametrize("detail", [
    {"id": "\ud800", "level": "STUDY", "study": "", "code": "", "by": "", "reason": ""},
    {"id": "a\0b", "level": "STUDY", "study": "", "code": "", "by": "", "reason": ""},
    {"id": "a" * 9_000, "level": "STUDY", "study": "", "code": "", "by": "", "reason": ""},
    {"id": "abcdef01", "level": "STUDY", "study": "\ud800", "code": "", "by": "", "reason": ""},
    "[" * 15_000,
])  # fmt: skip
def test_a_decision_that_no_index_can_keep_is_refused_and_the_region_goes_on(
    hub: Hub, martino: Node, channel: Any, detail: Any
) -> None:
    body = detail if isinstance(detail, str) else json.dumps(detail)
    ours = Correction("ab" * 8, "1.9.9", (("PatientID", "7"),), "maria", "wrong", 1000, GALLIERA)
    kinds = [FactKind.REMOVED, FactKind.CORRECTED]
    facts = [Fact(kind, "1.9.9", b"", GALLIERA, 1000, body) for kind in kinds]
    assert tell(channel, *facts, fact_of(ours)) == [UNREADABLE, UNREADABLE, ""]
    in_region(hub, martino, [make_instance(study_uid="1.2.4", sop_uid="1.2.4.1")])


def refused(call: Callable[..., Any], request: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        reply = call(request, timeout=20)
        list(reply if hasattr(reply, "__next__") else ())
    code: grpc.StatusCode = caught.value.code()
    return code


def test_what_another_ward_gave_is_neither_given_back_nor_described(
    hub: Hub, martino: Node, channel: Any
) -> None:
    theirs = make_instance(study_uid=STUDY, series_uid=SERIES, sop_uid="1.2.3.1.1")
    keys = [inventory_pb2.ContentKey(sop_instance_uid=theirs.sop_instance_uid, digest=theirs.digest)]
    wanted = [restore_pb2.RestoreKey(sop_instance_uid=theirs.sop_instance_uid, digest=theirs.digest)]
    assert not list(RestoreStub(channel).Fetch(restore_pb2.RestoreRequest(keys=wanted), timeout=20))
    described = InventoryStub(channel).Describe(inventory_pb2.ContentKeys(keys=keys), timeout=20)
    assert not described.series


def test_a_comparison_has_bounds_in_its_first_message_too(hub: Hub, martino: Node, channel: Any) -> None:
    question = inventory_pb2.InventoryQuestion
    begin = question(begin=question.Begin(salt=b"s" * 16, count=1))
    split = question(split=question.Split(level=-1, nodes=[0]))
    many = question(leaves=question.Leaves(leaves=range(LEAVES_MAX + 1), last=True))
    odd = question(leaves=question.Leaves(leaves=[0], hashes=b"12345", last=True))
    for asked in ([split], [begin, begin], [begin, split], [begin, many], [begin, odd], [question()]):
        code = refused(InventoryStub(channel).Compare, iter(asked))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_the_outcome_of_a_comparison_says_counts_and_nothing_else_in_the_log(
    hub: Hub, martino: Node, channel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    note = InventoryStub(channel).Note
    good: dict[str, Any] = {"reason": "r", "began_us": 1, "alarms": 2, "failure": "Rossi^Mario\n\x1b[2J"}
    alarm = {"sop_instance_uid": "1.2", "digest": "", "words": "w" * 400}
    for bad in (
        {"alarms": "Rossi"}, {"here": -1}, {"here": [1]}, {"dry_run": "x"}, {"began_us": 1 << 80},
        {"listed_alarms": [{**alarm, "sop_instance_uid": "../x"}]}, {"listed_alarms": [{"words": 1}]},
        {"listed_alarms": [{**alarm, "words": "\u00e9" * 200}] * 100},
    ):  # fmt: skip
        outcome = inventory_pb2.InventoryOutcome(json=json.dumps({**good, **bad}, ensure_ascii=False))
        code = refused(note, outcome)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, bad
    with caplog.at_level(logging.INFO):
        note(inventory_pb2.InventoryOutcome(json=json.dumps(good)), timeout=20)
    assert "2 contents need a person" in caplog.text and "Rossi" not in caplog.text
    kept = Notes(hub.settings.state).now.wards[GALLIERA]  # as a hub that starts again reads it
    assert kept.alarms == 2 and kept.failure == "Rossi^Mario  [2J"


def test_hostile_pushes_are_refused_and_the_next_one_is_taken(hub: Hub, martino: Node, channel: Any) -> None:
    head = make_instance(study_uid="1.9", sop_uid="1.9.1")
    begin = uplink_pb2.PushBegin(size=20 << 20, offset=1 << 20, digest=b"d" * 32)
    begin.head.sop_instance_uid, begin.head.sop_class_uid = "1.9.1", head.sop_class_uid
    begin.head.transfer_syntax_uid = head.transfer_syntax_uid
    request = uplink_pb2.PushRequest

    def changed(**changes: Any) -> uplink_pb2.PushRequest:
        copy = uplink_pb2.PushBegin()
        copy.CopyFrom(begin)
        for name, value in changes.items():
            setattr(copy, name, value)
        return request(begin=copy)

    invalid, away = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE
    for messages, code in (
        ([changed(offset=-1)], invalid), ([changed(offset=21 << 20)], invalid),
        ([changed(offset=5, digest=b"")], invalid), ([changed(digest=b"x")], invalid),
        ([changed(size=-1, offset=0)], invalid),
        ([changed()], away),  # nothing of it is here to go on with
        ([request(zstd_group=b"\x28\xb5\x2f\xfd" + b"\xff" * 40)], invalid),
        ([request(zstd_chunk=b"")], invalid), ([request()], invalid),
    ):  # fmt: skip
        assert refused(UplinkStub(channel).Push, iter(messages)) is code
    in_region(hub, martino, [make_instance(study_uid="1.2.5", sop_uid="1.2.5.1")])


def test_what_was_removed_is_not_passed_on_while_it_arrives(region: Region, hub: Hub) -> None:
    with ThinLine(hub.settings.port, 16 << 20) as line:
        ward = region.add_ward("Galliera", "Oncology", "GA")
        folder = region.folder / "nodes" / "far"
        node = Node(ward, region.node(ward, f"127.0.0.1:{line.port}"), folder)
        node.take([make_instance(study_uid=STUDY, series_uid=SERIES, sop_uid="1.7", padding=24 << 20)])
        regional(hub).record_facts([removal_fact(removal("ab" * 16, STUDY, ""))])
        try:
            node.start(hold=True)
            wait_for(lambda: node.reported(region).pending == 1, "the ward has reported")
            with Regional(region, hub, promote_deadline_s=3.0) as source:
                (found,) = source.instances(EVA, STUDY)
                got = 0
                with pytest.raises(MissError):
                    for chunk in source.passing(EVA, found):
                        got += len(chunk)
                assert got == found.location.dataset_offset  # what the listing said already
        finally:
            node.stop()


def test_who_asks_and_reads_nothing_loses_its_place(
    hub: Hub, galliera: Node, channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "WRITE_S", 1.0)
    galliera.start()
    own = make_instance(study_uid="1.8", sop_uid="1.8.1", padding=64 << 20)
    in_region(hub, galliera, [own])
    key = restore_pb2.RestoreKey(sop_instance_uid=own.sop_instance_uid, digest=own.digest)
    request = restore_pb2.RestoreRequest(keys=[key])
    held = [RestoreStub(channel).Fetch(request, timeout=60) for _ in range(FETCHES_PER_WARD_MAX)]
    assert all(next(one).WhichOneof("message") == "begin" for one in held)
    assert refused(RestoreStub(channel).Fetch, request) is grpc.StatusCode.RESOURCE_EXHAUSTED

    def whole() -> bool:
        try:
            return bool(list(RestoreStub(channel).Fetch(request, timeout=20)))
        except grpc.RpcError:
            return False

    wait_for(whole, "there is a place again")
    for one in held:
        one.cancel()
