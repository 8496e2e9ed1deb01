"""A ward's window on the region: what its devices may see of other wards, who has to say so, and that bytes
are checked on the way.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from archive.archive import Archive
from archive.errors import Corrupt, NotAuthenticated, NotFound, OutOfResources, TooLarge, Unavailable
from archive.ledger import AuditRow
from archive.model import Level, Match, Query, Scope
from certs.credentials import channel_sync
from federation import serde
from federation.assertion import Assertion, countersign, sign, verify
from federation.coverage import CoverageState, WardCoverage, lacking
from federation.fanout import with_own
from federation.hub import Hub
from federation.passing import Passing
from federation.policy import EVERY_WARD, Act, Principal, Reach, Role, decide, granted
from federation.region_source import RegionSource
from federation.settings import WindowSettings
from federation.source import Answer
from federation.window import AWAY, RegionWindow
from protos import window_pb2
from protos.window_pb2_grpc import WindowStub
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import Node, hub_settings, node_of
from tests.waiting import wait_for

OWN = "san-martino/radiology"
ALL = Query(Level.STUDY, limit=100)


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    hub = Hub(hub_settings(region, ask_deadline_s=1.0, devices_see_region=(OWN,)))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def nodes(region: Region, hub: Hub) -> Iterator[list[Node]]:
    """A ward whose devices may see the region, and one whose devices may not."""
    nodes = [node_of(region, hub, "San Martino", "Radiology", "SM"),
             node_of(region, hub, "Galliera", "Radiology", "GA")]
    yield nodes
    for node in nodes:
        node.stop()


@pytest.fixture
def audited() -> list[AuditRow]:
    return []


@pytest.fixture
def windows(nodes: list[Node], region: Region, audited: list[AuditRow]) -> Iterator[list[RegionWindow]]:
    """The window of each, attached."""
    made = []
    for node in nodes:
        node.start()
        made.append(window_of(node, audit=audited.append))
    wait_for(lambda: all(attached(node, region) for node in nodes), "both wards are attached")
    yield made
    for window in made:
        window.close()


def attached(node: Node, region: Region) -> bool:
    """Whether both ends say so, and the ward's first report of this disk is kept."""
    state = node.reported(region)
    return (node.uplink is not None and node.uplink.status().attached and state.attached
            and state.seen_us >= state.attached_since_us)


def window_of(node: Node, **options: Any) -> RegionWindow:
    assert node.uplink is not None
    settings = options.pop("settings", WindowSettings())
    options.setdefault("free_bytes", node.store.free_bytes)
    return RegionWindow(node.uplink, node.folder, settings, **options)


def device(node: Node, reach: Reach = Reach.REGION) -> Principal:
    return Principal("WORKSTATION", Role.DEVICE, node.ward.id, reach=reach)


def study(uid: str, count: int, **options: Any) -> list[Instance]:
    return [make_instance(study_uid=uid, series_uid=f"{uid}.1", sop_uid=f"{uid}.1.{number}", number=number,
                          **options) for number in range(1, count + 1)]


def replicated(node: Node) -> None:
    wait_for(lambda: node.pending == 0, "all is in the region")


def uids(matches: list[Match]) -> dict[str, int]:
    return {match.study["StudyInstanceUID"]: match.instance_count for match in matches}


def state(coverage: list[WardCoverage], node: Node) -> CoverageState:
    return next(one.state for one in coverage if one.ward == node.ward.id)


# --- who may see what


def test_a_devices_reach_is_the_regions_to_grant() -> None:
    asks = Principal("WS", Role.DEVICE, OWN, reach=Reach.REGION)
    assert granted(asks, (OWN,)).reach is granted(asks, (EVERY_WARD,)).reach is Reach.REGION
    assert granted(asks, ()).reach is granted(asks, ("galliera/radiology",)).reach is Reach.WARD
    assert decide(granted(asks, (OWN,)), Act.READ).scope.wards is None
    assert decide(granted(asks, ()), Act.READ).scope == Scope(frozenset({OWN}))
    person = Principal("eva", Role.TECHNICIAN, OWN, reach=Reach.REGION)
    assert decide(granted(person, (EVERY_WARD,)), Act.READ).scope == Scope(frozenset({OWN}))


def now_us() -> int:
    return time.time_ns() // 1000


def checked(region: Region, assertion: Assertion) -> Principal:
    return verify(assertion, region.authority.bundle.roots_pem, region.authority.region, now_us())


def test_a_node_says_which_of_its_devices_asks_and_not_how_far_it_looks(region: Region) -> None:
    identity = region.node(region.add_ward("San Martino", "Radiology", "SM"), "127.0.0.1:1")
    signed = sign(Principal("WS", Role.DEVICE, OWN, reach=Reach.REGION), identity, now_us(), correlation="c1")
    assert checked(region, signed) == Principal("WS", Role.DEVICE, OWN)  # its ward alone
    for who in (Principal("WS", Role.DEVICE, "galliera/radiology"), Principal("eva", Role.PHYSICIAN)):
        with pytest.raises(NotAuthenticated):
            checked(region, sign(who, identity, now_us()))
    with pytest.raises(NotAuthenticated):
        checked(region, replace(signed, correlation="c2"))
    with pytest.raises(NotAuthenticated):  # nor does a portal speak for devices
        checked(region, sign(Principal("WS", Role.DEVICE, OWN), region.portal(), now_us()))


def test_only_a_hub_countersigns_and_only_what_the_node_asked(region: Region, hub: Hub) -> None:
    identity = region.node(region.add_ward("San Martino", "Radiology", "SM"), "127.0.0.1:1")
    asks = sign(Principal("WS", Role.DEVICE, OWN, reach=Reach.REGION), identity, now_us())
    modest = sign(Principal("WS", Role.DEVICE, OWN), identity, now_us())
    held = hub._identity()
    assert checked(region, countersign(asks, held)).reach is Reach.REGION
    assert checked(region, countersign(modest, held)).reach is Reach.WARD  # a hub widens nothing by itself
    second = Principal("WS2", Role.DEVICE, OWN, reach=Reach.REGION)
    other = countersign(sign(second, identity, now_us()), held)
    for forged in (countersign(asks, identity), countersign(asks, region.portal()),
                   replace(asks, countersignature=other.countersignature, counter_chain=other.counter_chain)):
        with pytest.raises(NotAuthenticated):
            checked(region, forged)


def test_a_device_finds_what_another_ward_holds_and_reads_it(
    region: Region, nodes: list[Node], windows: list[RegionWindow], audited: list[AuditRow]
) -> None:
    mine, theirs = nodes
    instances = study("1.2.7", 3)
    theirs.take(instances)
    replicated(theirs)
    answer = windows[0].search(device(mine), ALL)
    assert uids(answer.matches) == {"1.2.7": 3}
    assert answer.matches[0].wards == (theirs.ward.id,)
    assert answer.covered and {one.ward for one in answer.coverage} == {mine.ward.id, theirs.ward.id}
    found = windows[0].instances(device(mine), "1.2.7")
    assert [each.evicted for each in found] == [True] * 3
    by_uid = {each.sop_instance_uid: each for each in instances}
    for each in found:
        with windows[0].fetch(device(mine), each) as file:
            assert file.read() == by_uid[each.head.sop_instance_uid].dataset
            assert windows[0].spooled_bytes == len(by_uid[each.head.sop_instance_uid].dataset)
    assert windows[0].spooled_bytes == 0
    assert list(mine.folder.glob("tmp*")) == []
    # AU3: here and at the hub under one id; reading three instances of a listed study is no further act
    rows = [row for row in region.ledger.audit_rows(who="WORKSTATION")]
    assert [(row.act, row.ward, row.role) for row in rows] == [("retrieve", mine.ward.id, "device"),
                                                               ("search", mine.ward.id, "device")]
    assert [row.correlation for row in reversed(rows)] == [row.correlation for row in audited]


def test_what_is_not_granted_looks_like_what_does_not_exist(
    nodes: list[Node], windows: list[RegionWindow], region: Region
) -> None:
    mine, theirs = nodes
    mine.take(study("1.2.7", 2))
    replicated(mine)
    (hidden,) = windows[0].instances(device(mine), "1.2.7", None, "1.2.7.1.1")
    answer = windows[1].search(device(theirs), ALL)
    assert answer.matches == [] and [one.ward for one in answer.coverage] == [theirs.ward.id]
    nothing = region.ledger.audit_rows(who="WORKSTATION")[0]
    assert "does not let" in nothing.subject
    for unknown in ("1.2.7", "1.2.99"):
        with pytest.raises(NotFound, match="no such study, series or instance"):
            windows[1].instances(device(theirs), unknown)
    with pytest.raises(NotFound):
        windows[1].fetch(device(theirs), hidden)
    # a device of a granted ward whose own node gives it the ward alone
    theirs.take(study("1.2.8", 1))
    replicated(theirs)
    assert uids(windows[0].search(device(mine, Reach.WARD), ALL).matches) == {"1.2.7": 2}
    with pytest.raises(NotFound):
        windows[0].instances(device(mine, Reach.WARD), "1.2.8")


def test_nobody_asks_in_another_wards_name(nodes: list[Node], windows: list[RegionWindow], hub: Hub) -> None:
    mine, theirs = nodes
    with channel_sync(theirs.identity, hub.address) as channel:
        stub = WindowStub(channel)
        others = sign(device(mine), mine.identity, now_us(), correlation="c")
        own = sign(device(theirs), theirs.identity, now_us())
        for assertion in (others, own):  # another ward's; one without a correlation id
            request = window_pb2.WindowSearchRequest(query=serde.query_to(ALL),
                                                     assertion=serde.assertion_to(assertion))
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Search(request, timeout=5))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


# --- what only a ward holds


def test_what_only_a_ward_holds_is_found_and_brought(
    region: Region, nodes: list[Node], hub: Hub, audited: list[AuditRow]
) -> None:
    mine, theirs = nodes
    instances = study("1.2.7", 2)
    theirs.take(instances)
    theirs.start(hold=True)
    mine.start()
    wait_for(lambda: attached(mine, region) and theirs.reported(region).pending == 2,
             "two are pending at the other ward")
    window = window_of(mine, audit=audited.append)
    answer = window.search(device(mine), ALL)
    assert uids(answer.matches) == {"1.2.7": 2}
    found = window.instances(device(mine), "1.2.7")
    assert len(found) == 2
    with window.fetch(device(mine), found[0]) as file:
        assert hashlib.sha256(file.read()).digest() == found[0].digest
    window.close()
    # AU3: each that answered has it, under the id of the question
    assert [(row.who, row.act, row.ward) for row in theirs.audited] == [
        ("WORKSTATION", "search", mine.ward.id), ("WORKSTATION", "read", mine.ward.id)]
    assert [row.correlation for row in theirs.audited] == [row.correlation for row in audited]


# --- bytes


def test_bytes_that_do_not_match_their_digest_never_count(
    nodes: list[Node], windows: list[RegionWindow], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = nodes
    theirs.take(study("1.2.7", 1))
    replicated(theirs)
    (found,) = windows[0].instances(device(mine), "1.2.7")
    real = Archive.dataset_chunks

    def flipped(self: Archive, *args: Any, **kwargs: Any) -> Iterator[bytes]:
        for chunk in real(self, *args, **kwargs):
            yield bytes((chunk[0] ^ 1,)) + chunk[1:]

    monkeypatch.setattr(Archive, "dataset_chunks", flipped)
    with pytest.raises(Corrupt, match="a stored instance"):  # the hub held the last chunk back
        windows[0].fetch(device(mine), found)

    async def unchecked(*_: Any) -> AsyncIterator[bytes]:
        yield bytes(found.location.length)

    monkeypatch.setattr(Passing, "chunks", unchecked)
    with pytest.raises(Corrupt, match="fetched from the region"):  # a hub that does not check
        windows[0].fetch(device(mine), found)
    assert windows[0].spooled_bytes == 0


def test_another_content_under_the_same_uid_is_not_what_was_asked_for(
    nodes: list[Node], windows: list[RegionWindow]
) -> None:
    mine, theirs = nodes
    theirs.take(study("1.2.7", 1))
    replicated(theirs)
    (found,) = windows[0].instances(device(mine), "1.2.7")
    with pytest.raises(NotFound, match="digest"):
        windows[0].fetch(device(mine), replace(found, digest=bytes(32)))


def test_what_is_fetched_has_a_budget_and_leaves_room_on_the_disk(
    nodes: list[Node], windows: list[RegionWindow]
) -> None:
    mine, theirs = nodes
    theirs.take(study("1.2.7", 2))
    replicated(theirs)
    first, second = windows[0].instances(device(mine), "1.2.7")
    size = max(each.location.length for each in (first, second))
    window = window_of(mine, settings=WindowSettings(spool_bytes_max=size))
    with window.fetch(device(mine), first), pytest.raises(OutOfResources, match="spool_bytes_max"):
        window.fetch(device(mine), second)
    window.fetch(device(mine), second).close()
    window.close()
    tight = window_of(mine, settings=WindowSettings(spool_bytes_max=1))
    with pytest.raises(TooLarge):
        tight.fetch(device(mine), first)
    tight.close()
    full = window_of(mine, free_bytes=lambda: 1000, free_bytes_min=1000)
    with pytest.raises(OutOfResources, match="disk is full"):
        full.fetch(device(mine), first)
    full.close()


def test_the_hub_takes_so_many_questions_of_one_ward_at_once(
    region: Region, nodes: list[Node], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = nodes
    entered, leave = threading.Semaphore(0), threading.Event()

    def held_up(self: RegionSource, principal: Principal, query: Query) -> Answer:
        entered.release()
        leave.wait(10)
        return Answer([], [])

    monkeypatch.setattr(RegionSource, "search", held_up)
    assertion = serde.assertion_to(sign(device(mine), mine.identity, now_us(), correlation="c"))
    request = window_pb2.WindowSearchRequest(query=serde.query_to(ALL), assertion=assertion)
    with channel_sync(mine.identity, hub.address) as channel:
        stub = WindowStub(channel)
        calls = [stub.Search(request, timeout=20) for _ in range(hub.settings.window_per_ward_max)]
        for _ in calls:
            assert entered.acquire(timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Search(request, timeout=5))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        leave.set()
        assert all(list(call)[-1].last for call in calls)
        assert list(stub.Search(request, timeout=5))[-1].last  # their places are free again


def test_a_search_without_a_bound_is_refused(region: Region, nodes: list[Node], hub: Hub) -> None:
    mine, _ = nodes
    assertion = serde.assertion_to(sign(device(mine), mine.identity, now_us(), correlation="c"))
    request = window_pb2.WindowSearchRequest(query=serde.query_to(Query(Level.STUDY)), assertion=assertion)
    with channel_sync(mine.identity, hub.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(WindowStub(channel).Search(request, timeout=5))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# --- who is away


def test_a_region_that_is_away_holds_nobody_up_and_is_named(
    hub: Hub, nodes: list[Node], windows: list[RegionWindow], region: Region
) -> None:
    mine, theirs = nodes
    fresh = window_of(mine)
    assert windows[0].search(device(mine), ALL).covered
    hub.stop()
    assert mine.uplink is not None
    uplink = mine.uplink
    wait_for(lambda: not uplink.status().attached, "the line is gone")
    begun = time.monotonic()
    answer = windows[0].search(device(mine), ALL)
    assert time.monotonic() - begun < 1
    assert answer.matches == []
    assert state(answer.coverage, mine) is CoverageState.ANSWERED
    assert state(answer.coverage, theirs) is CoverageState.INCOMPLETE
    (unknown,) = fresh.search(device(mine), ALL).coverage
    assert not unknown.covered and unknown.reason == AWAY
    with pytest.raises(Unavailable, match=AWAY):
        windows[0].instances(device(mine), "1.2.7")
    fresh.close()


def test_a_ward_that_is_away_is_as_of_its_last_report(
    region: Region, nodes: list[Node], windows: list[RegionWindow]
) -> None:
    mine, theirs = nodes
    theirs.take(study("1.2.7", 1))
    replicated(theirs)
    theirs.leave()
    wait_for(lambda: not theirs.reported(region).attached, "the other ward is away")
    answer = windows[0].search(device(mine), ALL)
    assert uids(answer.matches) == {"1.2.7": 1}
    assert state(answer.coverage, theirs) is CoverageState.AS_OF
    assert lacking(answer.coverage, windows[0].clock_us(), 3600) == []
    (late,) = lacking(answer.coverage, windows[0].clock_us() + 3601 * 1_000_000, 3600)
    assert late.ward == theirs.ward.id


def test_a_renewed_certificate_is_used_from_the_next_question_on(
    nodes: list[Node], windows: list[RegionWindow], region: Region
) -> None:
    mine, _ = nodes
    assert windows[0].search(device(mine), ALL).covered
    assert mine.uplink is not None
    before = mine.uplink.identity.certificate.serial
    renewed = mine.uplink._renew(mine.uplink.identity)
    mine.uplink._renewed_in_thread(renewed)
    uplink = mine.uplink
    wait_for(lambda: uplink.status().attached and uplink.identity.certificate.serial != before,
             "it is in use")
    assert windows[0].search(device(mine), ALL).covered


def test_a_ward_whose_clock_is_set_asks_and_answers_as_before(
    nodes: list[Node], windows: list[RegionWindow], region: Region
) -> None:
    mine, theirs = nodes
    theirs.leave()
    theirs.take(study("1.2.7", 1))
    theirs.start(hold=True)
    wait_for(lambda: theirs.reported(region).attached and theirs.reported(region).pending == 1,
             "the hub knows of what it holds back")
    assert mine.uplink is not None and theirs.uplink is not None
    mine.uplink._clock = lambda: now_us() - 3600 * 1_000_000
    theirs.uplink._clock = lambda: now_us() + 3600 * 1_000_000
    answer = windows[0].search(device(mine), ALL)
    assert uids(answer.matches) == {"1.2.7": 1}
    assert answer.covered


# --- joining


def row(uid: str, count: int, **options: Any) -> Match:
    return Match(Level.STUDY, "SM", {"PatientID": "1"}, {"StudyInstanceUID": uid, "StudyDate": "20260101"},
                 instance_count=count, series_count=1, **options)


def test_a_row_of_both_is_one_and_says_what_is_not_here() -> None:
    region = [row("1.1", 5, wards=("b",)), row("1.2", 2, wards=("a",)), row("1.4", 2, wards=("b",))]
    own = [row("1.1", 3, wards=("a",)), row("1.2", 2, wards=("a",)), row("1.3", 4, wards=("a",))]
    joined = with_own(Level.STUDY, region, own)
    assert {m.study["StudyInstanceUID"]: (m.instance_count, m.wards, m.nearline) for m in joined} == {
        "1.1": (5, ("a", "b"), True), "1.2": (2, ("a",), False), "1.3": (4, ("a",), False),
        "1.4": (2, ("b",), True)}
    assert [m.study["StudyInstanceUID"] for m in joined] == ["1.4", "1.3", "1.2", "1.1"]
    assert len(with_own(Level.STUDY, region, own, limit=2)) == 2


def test_patients_without_an_id_are_not_taken_for_each_other() -> None:
    def patient(name: str) -> Match:
        return Match(Level.PATIENT, "SM", {"PatientName": name, "PatientID": ""}, instance_count=1)

    joined = with_own(Level.PATIENT, [patient("A"), patient("B")], [patient("A"), patient("C")])
    assert sorted(m.patient["PatientName"] for m in joined) == ["A", "B", "C"]
