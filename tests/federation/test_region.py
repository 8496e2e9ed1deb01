"""The region as a portal sees it: fan-out, coverage, reading promotes, who may see what; with wards that are
there, away, held back, silent, renamed by their certificates, or revoked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from archive.archive import Archive
from archive.errors import Forbidden, NotFound, SettingsError, Unavailable
from archive.index.index import Index
from archive.model import EVERYTHING, Level, Match, PatientKey, Position, Query, Scope, SeriesHolding
from certs.identity import Identity
from certs.registry import revoke
from federation import region_service, serde
from federation.assertion import sign
from federation.coverage import CoverageState, WardCoverage
from federation.fanout import WardMatches
from federation.hub import Hub
from federation.hub_channel import HubChannel
from federation.node_source import NodeSource
from federation.policy import Principal, Role
from federation.receiving import Receiver
from federation.region_source import RegionSource
from protos import region_pb2
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import (
    EVA,
    Node,
    Regional,
    hub_settings,
    node_of,
    open_archive,
)
from tests.waiting import wait_for

IT = Principal("ugo", Role.IT)
STUDIES = Query(Level.STUDY)


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    hub = Hub(hub_settings(region, ask_deadline_s=1.0))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def nodes(region: Region, hub: Hub) -> Iterator[list[Node]]:
    """Two wards of one hospital and one of another."""
    nodes = [
        node_of(region, hub, "San Martino", "Radiology", "SM"),
        node_of(region, hub, "San Martino", "Cardiology", "SM"),
        node_of(region, hub, "Galliera", "Radiology", "GA"),
    ]
    yield nodes
    for node in nodes:
        node.stop()


@pytest.fixture
def source(region: Region, hub: Hub, nodes: list[Node]) -> Iterator[RegionSource]:
    with Regional(region, hub, ask_deadline_s=1.0, promote_deadline_s=20.0) as source:
        yield source


def study(uid: str, count: int, *, start: int = 0, **options: Any) -> list[Instance]:
    options.setdefault("series_uid", f"{uid}.1")
    return [
        make_instance(study_uid=uid, sop_uid=f"{uid}.1.{number}", number=number, **options)
        for number in range(start + 1, start + count + 1)
    ]


def technician(node: Node) -> Principal:
    return Principal("anna", Role.TECHNICIAN, node.ward.id)


def channel_of(source: RegionSource) -> HubChannel:
    assert isinstance(source._hub, HubChannel)
    return source._hub


def by_ward(coverage: list[WardCoverage]) -> dict[str, WardCoverage]:
    return {one.ward: one for one in coverage}


def reported(region: Region, node: Node, pending: int) -> None:
    """Waits for a report that was made from now on."""
    since_us = time.time_ns() // 1000

    def fresh() -> bool:
        state = node.reported(region)
        return state.attached and state.seen_us > since_us and state.pending == pending

    wait_for(fresh, f"{node.ward.id} reports {pending} pending")


def shape(match: Match) -> tuple[str, int, int, tuple[str, ...], tuple[str, ...]]:
    return (
        match.study["StudyInstanceUID"],
        match.series_count,
        match.instance_count,
        match.wards,
        match.pending_at,
    )


def test_what_is_replicated_and_what_is_pending_is_one_row_with_union_counts(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, second, _ = nodes
    first.take(study("1.2.7", 3))
    first.start()
    reported(region, first, 0)
    wait_for(lambda: first.pending == 0, "three are in the region")
    second.take([*study("1.2.7", 2, start=2), *study("1.2.7", 1, series_uid="1.2.7.9", start=9)])
    second.start(hold=True)
    reported(region, second, 3)
    answer = source.search(EVA, STUDIES)
    # 1, 2, 3 are the region's; the second ward has 3 (a copy), 4 and 10 of another series.
    assert [shape(match) for match in answer.matches] == [
        ("1.2.7", 2, 5, (second.ward.id, first.ward.id), (second.ward.id,))
    ]
    assert not answer.more
    series = source.search(EVA, Query(Level.SERIES, (("StudyInstanceUID", "1.2.7"),)))
    assert {match.series["SeriesInstanceUID"]: match.instance_count for match in series.matches} == {
        "1.2.7.1": 4, "1.2.7.9": 1,
    }  # fmt: skip
    images = source.search(EVA, Query(Level.IMAGE, (("StudyInstanceUID", "1.2.7"),)))
    assert [match.instance["SOPInstanceUID"] for match in images.matches] == [
        "1.2.7.1.1", "1.2.7.1.2", "1.2.7.1.3", "1.2.7.1.4", "1.2.7.1.10",
    ]  # fmt: skip
    assert by_ward(answer.coverage)[second.ward.id].state is CoverageState.ANSWERED
    assert by_ward(answer.coverage)[first.ward.id].state is CoverageState.UP_TO_DATE
    assert by_ward(answer.coverage)[nodes[2].ward.id].state is CoverageState.UNKNOWN
    assert not answer.covered


def test_pages_of_a_merge_follow_each_other(region: Region, nodes: list[Node], source: RegionSource) -> None:
    first, second, _ = nodes
    days = {f"1.2.{day}": f"202601{day:02d}" for day in range(10, 20)}
    for place, (uid, day) in enumerate(days.items()):
        (first if place % 2 else second).take(study(uid, 1, StudyDate=day))
    first.start()
    second.start(hold=True)
    wait_for(lambda: first.pending == 0, "one ward is replicated")
    reported(region, second, 5)
    reported(region, first, 0)
    seen, left = [], []
    for offset in range(0, 10, 3):
        answer = source.search(EVA, replace(STUDIES, limit=3, offset=offset))
        seen += [match.study["StudyInstanceUID"] for match in answer.matches]
        left.append(answer.more)
    assert seen == sorted(days, reverse=True)
    assert left == [True, True, True, False]
    patients = source.search(EVA, Query(Level.PATIENT))
    assert [(match.study_count, match.instance_count) for match in patients.matches] == [(10, 10)]
    first.take(study("1.2.30", 1, patient_id="100"))
    wait_for(lambda: first.pending == 0, "another patient is in the region")
    patients = source.search(EVA, Query(Level.PATIENT, limit=1, offset=1))
    assert [(match.study_count, match.instance_count) for match in patients.matches] == [(10, 10)]


def test_keys_are_matched_at_the_ward_too(region: Region, nodes: list[Node], source: RegionSource) -> None:
    first, _, _ = nodes
    first.take(
        [*study("1.2.1", 1, patient_name="Rossi^Maria"), *study("1.2.2", 1, patient_name="Verdi^Anna")]
    )
    first.start(hold=True)
    reported(region, first, 2)
    answer = source.search(EVA, Query(Level.STUDY, (("PatientName", "*verdi*"),)))
    assert [match.study["StudyInstanceUID"] for match in answer.matches] == ["1.2.2"]


def test_equal_patient_ids_of_two_hospitals_are_two_patients(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, second, other = nodes
    for node, uid in ((first, "1.2.1"), (second, "1.2.2"), (other, "1.2.3")):
        node.take(study(uid, 1, patient_id="123"))
    first.start()
    wait_for(lambda: first.pending == 0, "the first is in the region")
    reported(region, first, 0)
    for node in (second, other):
        node.start(hold=True)
        reported(region, node, 1)
    patients = source.search(EVA, Query(Level.PATIENT, (("PatientID", "123"),)))
    assert [(match.issuer, match.study_count) for match in patients.matches] == [("GA", 1), ("SM", 2)]
    person = source.person_of(EVA, "1.2.3")
    assert person == PatientKey("GA", "123")
    priors = source.search(EVA, Query(Level.STUDY, (("PatientID", "123"),), person=frozenset({person})))
    assert [match.study["StudyInstanceUID"] for match in priors.matches] == ["1.2.3"]
    ours = source.person_of(EVA, "1.2.1")
    assert ours is not None
    priors = source.search(EVA, Query(Level.STUDY, (("PatientID", "123"),), person=frozenset({ours})))
    assert {match.study["StudyInstanceUID"] for match in priors.matches} == {"1.2.1", "1.2.2"}


def test_reading_promotes_what_only_a_ward_holds(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, second, _ = nodes
    wanted = study("1.2.7", 30)
    first.take([*study("1.2.8", 20), *wanted])
    first.start(hold=True)
    reported(region, first, 50)
    assert source.at_hand(EVA, "1.2.7") is None
    found = source.instances(EVA, "1.2.7")
    assert {one.head.sop_instance_uid for one in found} == {one.sop_instance_uid for one in wanted}
    for instance in wanted:
        (one,) = source.instances(EVA, "1.2.7", "1.2.7.1", instance.sop_instance_uid)
        with source.open_payload(one) as payload:
            assert payload.read()[one.location.dataset_offset :] == instance.dataset
    wait_for(lambda: first.pending == 20, "nothing else was pushed")
    alone = source.instances(EVA, "1.2.8", None, "1.2.8.1.3")
    assert [one.head.sop_instance_uid for one in alone] == ["1.2.8.1.3"]
    wait_for(lambda: first.pending == 19, "one instance was pushed")


def test_a_study_that_is_half_replicated_is_whole_to_the_reader(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, _, _ = nodes
    first.take(study("1.2.7", 5))
    first.start()
    wait_for(lambda: first.pending == 0, "five are in the region")
    first.leave()
    first.take(study("1.2.7", 5, start=5))
    first.start(hold=True)
    reported(region, first, 5)
    assert len(source.instances(EVA, "1.2.7")) == 10


def test_a_study_larger_than_one_listing_is_promoted_whole(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, _, _ = nodes
    first.take(study("1.2.7", 1100, rows=2, columns=2))
    first.start(hold=True)
    reported(region, first, 1100)
    answer = source.search(EVA, STUDIES)
    assert answer.matches[0].truncated
    coverage = by_ward(answer.coverage)[first.ward.id]
    assert coverage.state is CoverageState.INCOMPLETE
    assert "1,000" in coverage.reason
    assert len(source.instances(EVA, "1.2.7")) == 1100


def test_what_does_not_exist_and_what_is_hidden_look_the_same(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, second, _ = nodes
    first.take(study("1.2.7", 2))
    second.take(study("1.2.8", 2))
    second.start(hold=True)
    first.start()
    wait_for(lambda: first.pending == 0, "the first is in the region")
    reported(region, second, 2)
    words = []
    for uid in ("1.2.7", "1.9.9.9"):
        with pytest.raises(NotFound) as caught:
            source.instances(technician(second), uid)
        words.append(str(caught.value))
    assert words[0] == words[1]
    assert source.person_of(technician(second), "1.2.7") is None


def test_a_technician_sees_the_own_ward_and_its_coverage_alone(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, second, _ = nodes
    shared = study("1.2.7", 1)
    first.take([*shared, *study("1.2.7", 1, start=1)])
    first.start()
    wait_for(lambda: first.pending == 0, "the first is in the region")
    second.take(shared)
    second.start(hold=True)
    reported(region, second, 1)
    answer = source.search(technician(second), STUDIES)
    assert [shape(match) for match in answer.matches] == [
        ("1.2.7", 1, 1, (second.ward.id,), (second.ward.id,))
    ]
    assert [one.ward for one in answer.coverage] == [second.ward.id]
    answer = source.search(technician(first), STUDIES)
    assert [match.instance_count for match in answer.matches] == [2]
    hidden = source.search(technician(second), replace(STUDIES, scope=Scope(frozenset({first.ward.id}))))
    assert hidden.matches == []


def test_a_copy_of_another_ward_is_read_when_the_own_one_is_known(
    region: Region, nodes: list[Node], source: RegionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = nodes
    shared = study("1.2.7", 2)
    first.take(shared)
    first.start()
    wait_for(lambda: first.pending == 0, "the first is in the region")
    second.take(shared)
    second.start(hold=True)
    reported(region, second, 2)
    (listed,) = source.search(technician(second), STUDIES).matches
    assert listed.instance_count == 2
    at_once = Receiver.verdicts

    def late(self: Receiver, *args: Any) -> Any:
        threading.Event().wait(0.5)  # a hub that has much to do
        return at_once(self, *args)

    monkeypatch.setattr(Receiver, "verdicts", late)
    found = source.instances(technician(second), "1.2.7")
    assert len([source.arrived(one) for one in found]) == 2  # what was listed is not "not found"


def test_regional_it_gets_no_images_and_no_names(source: RegionSource) -> None:
    with pytest.raises(Forbidden):
        source.search(IT, STUDIES)
    with pytest.raises(Forbidden):
        source.instances(IT, "1.2.7")
    with pytest.raises(Forbidden):
        source.person_of(IT, "1.2.7")


def test_a_portal_without_a_reader_gets_nothing_from_the_hub(
    region: Region, hub: Hub, nodes: list[Node], source: RegionSource
) -> None:
    first, _, _ = nodes
    first.take(study("1.2.7", 1))
    first.start(hold=True)
    reported(region, first, 1)
    stub = channel_of(source).stub
    query = serde.query_to(STUDIES)
    good = sign(technician(nodes[1]), channel_of(source).identity, time.time_ns() // 1000)
    for assertion in (None, serde.assertion_to(replace(good, role="regional physician"))):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Search(region_pb2.SearchRequest(query=query, assertion=assertion))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    narrow = stub.Search(region_pb2.SearchRequest(query=query, assertion=serde.assertion_to(good)))
    assert list(narrow.matches) == []


def test_the_ward_decides_for_itself_who_may_see(
    region: Region, hub: Hub, nodes: list[Node], source: RegionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that asks more than the reader may see (one whose own decision is taken out) gets no more."""
    first, second, _ = nodes
    first.take(study("1.2.7", 1))
    first.start(hold=True)
    reported(region, first, 1)
    monkeypatch.setattr(region_service, "require", lambda principal, act: EVERYTHING)
    signed = sign(technician(second), channel_of(source).identity, time.time_ns() // 1000)
    assertion = serde.assertion_to(signed)
    request = region_pb2.SearchRequest(query=serde.query_to(STUDIES), assertion=assertion)
    reply = channel_of(source).stub.Search(request)
    assert list(reply.matches) == []
    coverage = by_ward([serde.coverage_from(one) for one in reply.coverage])[first.ward.id]
    assert coverage.state is CoverageState.INCOMPLETE
    assert "may not see" in coverage.reason


def test_a_ward_that_is_away_is_not_waited_for_and_is_as_of(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, _, _ = nodes
    first.take(study("1.2.7", 2))
    first.start()
    wait_for(lambda: first.pending == 0, "it is in the region")
    reported(region, first, 0)
    first.leave()
    wait_for(lambda: not first.reported(region).attached, "it left")
    begun = time.monotonic()
    answer = source.search(EVA, STUDIES)
    assert time.monotonic() - begun < 1.0  # the deadline that nobody waits for
    assert [match.instance_count for match in answer.matches] == [2]
    coverage = by_ward(answer.coverage)[first.ward.id]
    assert coverage.state is CoverageState.AS_OF
    assert coverage.complete_to_us is not None and coverage.seen_at_us is not None
    assert 0 <= coverage.seen_at_us - coverage.complete_to_us < 2_000_000  # it looked, then the report came


def test_a_ward_that_left_with_a_backlog_is_incomplete_by_its_last_word(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, _, _ = nodes
    first.take(study("1.2.7", 4))
    first.start(hold=True)
    reported(region, first, 4)
    first.leave()
    wait_for(lambda: not first.reported(region).attached, "it left")
    answer = source.search(EVA, STUDIES)
    assert answer.matches == []
    coverage = by_ward(answer.coverage)[first.ward.id]
    assert (coverage.state, coverage.pending) == (CoverageState.INCOMPLETE, 4)


def test_what_arrives_while_the_region_is_read_is_counted_once(
    region: Region, nodes: list[Node], source: RegionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = nodes
    first.take(study("1.2.7", 2))
    first.start(hold=True)
    reported(region, first, 2)
    read = source._rows
    reads: list[int] = []

    def moving(query: Query, wards: Sequence[WardMatches]) -> list[Match]:
        rows = read(query, wards)
        if not reads:
            came = [source.arrived(one) for one in source.instances(EVA, "1.2.7")]
            assert len(came) == 2  # they come here just after the rows were read
        reads.append(len(rows))
        return rows

    monkeypatch.setattr(source, "_rows", moving)
    answer = source.search(EVA, STUDIES)
    assert reads == [0, 1]
    assert [shape(match)[:4] for match in answer.matches] == [("1.2.7", 1, 2, (first.ward.id,))]


class Lying(Archive):
    """An archive that lists what has long been in the region as pending, and in another ward's name."""

    def search(self, query: Query) -> list[Match]:
        rows = super().search(replace(query, pending_only=False, scope=EVERYTHING, level=Level.IMAGE))
        uids = tuple(row.instance["SOPInstanceUID"] for row in rows)
        holdings = (SeriesHolding("1.2.7.1", "CT", uids),)
        return [
            replace(
                row,
                level=Level.STUDY,
                holdings=holdings,
                wards=("galliera/radiology",),
                instance_count=len(uids),
            )
            for row in rows[:1]
        ]


def test_what_a_ward_lists_wrongly_delays_and_moves_nothing(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, _, other = nodes
    first.take(study("1.2.7", 2))
    first.start()
    wait_for(lambda: first.pending == 0, "it is in the region")
    first.leave()
    first.take(study("1.2.8", 1))
    first.store.__class__ = Lying
    first.start(hold=True)
    reported(region, first, 1)
    begun = time.monotonic()
    assert len(source.instances(EVA, "1.2.7")) == 2
    assert time.monotonic() - begun < 10  # the deadline is 20 s
    first.take(study("1.2.9", 1))
    (match,) = [one for one in source.search(EVA, STUDIES).matches if one.pending_at]
    assert match.pending_at == (first.ward.id,)
    assert other.ward.id not in match.wards


class Lagging(Archive):
    """An archive whose index does not catch up."""

    def wait_indexed(self, timeout_s: float = 10.0) -> None:
        raise Unavailable("the index has not caught up yet")


def test_a_ward_that_can_not_tell_what_is_pending_says_nothing(
    region: Region, nodes: list[Node], caplog: pytest.LogCaptureFixture
) -> None:
    first, _, _ = nodes
    first.start()
    reported(region, first, 0)
    first.store.__class__ = Lagging
    wait_for(lambda: "no report can be made" in caplog.text, "it knows that it can't tell")
    since_us = first.reported(region).seen_us
    wait_for(lambda: caplog.text.count("no report can be made") >= 3, "it goes on trying")
    assert first.reported(region).seen_us == since_us
    first.store.__class__ = Archive
    reported(region, first, 0)


class Hanging(Archive):
    """An archive that does not answer a search before it is let go."""

    gate: threading.Event

    def search(self, query: Query) -> list[Match]:
        self.gate.wait(30)
        return super().search(query)


def test_a_ward_that_hangs_costs_its_deadline_and_is_named(
    region: Region, nodes: list[Node], source: RegionSource
) -> None:
    first, second, _ = nodes
    for node, uid in ((first, "1.2.7"), (second, "1.2.8")):
        node.take(study(uid, 1))
        node.start(hold=True)
        reported(region, node, 1)
    hanging = first.store
    hanging.__class__ = Hanging
    assert isinstance(hanging, Hanging)
    hanging.gate = threading.Event()
    try:
        begun = time.monotonic()
        answer = source.search(EVA, STUDIES)
        took_s = time.monotonic() - begun
    finally:
        hanging.gate.set()
    assert 0.9 < took_s < 1.9
    assert [match.study["StudyInstanceUID"] for match in answer.matches] == ["1.2.8"]
    coverage = by_ward(answer.coverage)
    assert coverage[first.ward.id].state is CoverageState.INCOMPLETE
    assert "no answer within 1 s" in coverage[first.ward.id].reason
    assert coverage[second.ward.id].state is CoverageState.ANSWERED


def test_what_does_not_fit_in_one_reply_is_named_and_the_rest_is_answered(
    region: Region, nodes: list[Node], source: RegionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = nodes
    for node, uid, count in ((first, "1.2.7", 2), (second, "1.2.8", 100)):
        node.take(study(uid, count))
        node.start(hold=True)
        reported(region, node, count)
    monkeypatch.setattr(region_service, "REPLY_BYTES_MAX", 8_000)  # two images fit, a hundred do not
    answer = source.search(EVA, Query(Level.IMAGE))
    assert {match.study["StudyInstanceUID"] for match in answer.matches} == {"1.2.7"}
    coverage = by_ward(answer.coverage)
    assert coverage[first.ward.id].state is CoverageState.ANSWERED
    assert coverage[second.ward.id].state is CoverageState.INCOMPLETE
    assert "search for less" in coverage[second.ward.id].reason
    (less,) = source.search(EVA, Query(Level.IMAGE, (("SOPInstanceUID", "1.2.8.1.3"),))).matches
    assert less.pending_at == (second.ward.id,)


def test_coverage_survives_the_hub_and_needs_none(
    region: Region, hub: Hub, nodes: list[Node], source: RegionSource
) -> None:
    first, second, _ = nodes
    first.take(study("1.2.7", 2))
    first.start()
    wait_for(lambda: first.pending == 0, "it is in the region")
    reported(region, first, 0)
    second.take(study("1.2.8", 3))
    second.start(hold=True)
    reported(region, second, 3)
    seen_us = first.reported(region).complete_to_us
    for node in (first, second):
        node.leave()
    hub.stop()
    answer = source.search(EVA, STUDIES)
    assert [match.study["StudyInstanceUID"] for match in answer.matches] == ["1.2.7"]
    coverage = by_ward(answer.coverage)
    assert coverage[first.ward.id].state is CoverageState.AS_OF
    assert (coverage[first.ward.id].complete_to_us or 0) >= seen_us
    assert coverage[second.ward.id].state is CoverageState.INCOMPLETE
    left = first.reported(region)
    region.ledger.put_ward_state(replace(left, attached=True))  # as a hub that was killed leaves it
    again = Hub(hub.settings)
    again.start()
    try:
        assert not first.reported(region).attached
        after = by_ward(source.search(EVA, STUDIES).coverage)
        assert after[first.ward.id] == coverage[first.ward.id]
        assert after[second.ward.id].pending == 3
    finally:
        again.stop()


def test_a_hub_that_dies_while_wards_are_attached_is_no_error(
    region: Region, hub: Hub, nodes: list[Node], source: RegionSource
) -> None:
    first, _, _ = nodes
    first.take(study("1.2.7", 2))
    first.start(hold=True)
    reported(region, first, 2)
    source.search(EVA, STUDIES)
    state = first.reported(region)
    hub.stop(grace_s=0)
    region.ledger.put_ward_state(
        replace(state, attached=True, seen_us=time.time_ns() // 1000)
    )  # as kill -9 leaves it
    answer = source.search(EVA, STUDIES)
    assert answer.matches == []
    assert by_ward(answer.coverage)[first.ward.id].state is CoverageState.INCOMPLETE
    for uid in ("1.2.7", "1.9.9.9"):  # nobody can tell whether it exists: that is not "not found"
        with pytest.raises(Unavailable, match="does not answer now"):
            source.instances(EVA, uid)


def test_a_new_disk_is_noted_and_stands(region: Region, nodes: list[Node], source: RegionSource) -> None:
    first, _, _ = nodes
    first.take(study("1.2.7", 4))
    first.start(hold=True)
    reported(region, first, 4)
    first.stop()
    first.folder = first.folder.with_name("a-new-disk")
    first.take(study("1.2.9", 1))
    first.start(hold=False)
    wait_for(lambda: first.pending == 0, "what the new disk has is in the region")
    wait_for(lambda: "4 instances lost" in first.reported(region).lost_note, "the loss is noted")
    coverage = by_ward(source.search(EVA, STUDIES).coverage)[first.ward.id]
    assert coverage.state is CoverageState.INCOMPLETE
    assert "up to 4 instances lost with the old disk" in coverage.reason


def test_a_disk_that_was_empty_at_first_has_its_name_when_it_is_lost(
    region: Region, nodes: list[Node]
) -> None:
    first, _, _ = nodes
    first.start(hold=True)
    reported(region, first, 0)
    first.take(study("1.2.7", 2))
    reported(region, first, 2)
    wait_for(lambda: first.reported(region).epoch == first.store.epoch != b"", "the disk is known")
    assert first.reported(region).lost_note == ""


def test_nothing_pending_moves_complete_to_at_once(region: Region, nodes: list[Node]) -> None:
    first, _, _ = nodes
    first.start()
    reported(region, first, 0)
    before = first.reported(region).complete_to_us
    first.take(study("1.2.7", 3))
    wait_for(lambda: first.pending == 0, "it is in the region")
    wait_for(lambda: first.reported(region).complete_to_us > before, "complete_to moved")
    state = first.reported(region)
    assert (state.pending, state.last_receipt_us > 0) == (0, True)


def test_a_revoked_node_is_cut_within_five_seconds_and_serves_on(region: Region, nodes: list[Node]) -> None:
    first, second, _ = nodes
    for node in (first, second):
        node.start()
        reported(region, node, 0)
    assert revoke(region.ledger, first.ward.id, reason="stolen", who="ugo")
    begun = time.monotonic()
    uplink = first.uplink
    assert uplink is not None
    wait_for(lambda: not first.reported(region).attached, "its attach ended", 5)
    wait_for(lambda: "refused" in uplink.status().reason, "it knows why")
    assert time.monotonic() - begun < 6
    first.take(study("1.2.7", 2))
    assert first.pending == 2
    assert second.reported(region).attached
    second.take(study("1.2.8", 2))
    wait_for(lambda: second.pending == 0, "the other ward is not disturbed")
    assert first.pending == 2


def test_an_error_that_nobody_foresaw_ends_no_uplink_for_good(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federation.uplink.RESTART_S", 0.2)
    node, struck = nodes[0].start(), threading.Event()
    positions = Index.positions

    def failing(index: Index) -> tuple[Position, Position]:
        if threading.current_thread().name.startswith("uplink") and not struck.is_set():
            struck.set()
            raise ZeroDivisionError
        return positions(index)

    monkeypatch.setattr(Index, "positions", failing)
    assert struck.wait(10)
    node.take(study("1.2.99", 3))
    wait_for(lambda: node.pending == 0, "what was stored is in the region")
    node.leave()  # and it ends as any other


def test_an_older_attach_makes_room_for_a_newer_one(region: Region, hub: Hub, nodes: list[Node]) -> None:
    first, _, _ = nodes
    first.start()
    reported(region, first, 0)
    twin = Node(first.ward, first.identity, region.folder / "twin")
    twin.start()
    try:
        twin.take(study("1.2.7", 2))
        first.leave()
        wait_for(lambda: twin.pending == 0, "the newer one replicates")
        wait_for(lambda: twin.reported(region).attached, "the ward is attached")
    finally:
        twin.stop()


def test_a_ward_portal_shows_its_own_node_with_the_region_away(
    region: Region, hub: Hub, nodes: list[Node]
) -> None:
    first, second, _ = nodes
    hub.stop()
    first.take(study("1.2.7", 2))
    first.start()
    with open_archive(first.folder, read_only=True) as archive:
        source = NodeSource(archive, first.ward)
        answer = source.search(EVA, STUDIES)
        assert [shape(match)[:4] for match in answer.matches] == [("1.2.7", 1, 2, (first.ward.id,))]
        (coverage,) = answer.coverage
        assert (coverage.state, coverage.pending) == (CoverageState.ANSWERED, 2)
        assert len(source.instances(technician(first), "1.2.7")) == 2
        assert source.search(technician(second), STUDIES).matches == []
        with pytest.raises(NotFound):
            source.instances(technician(second), "1.2.7")
        with pytest.raises(Forbidden):
            source.instances(IT, "1.2.7")
        assert source.search(EVA, replace(STUDIES, limit=1)).more is False


def test_the_wards_status_is_whole(region: Region, nodes: list[Node], source: RegionSource) -> None:
    first, _, _ = nodes
    first.take(study("1.2.7", 2))
    first.start(hold=True)
    reported(region, first, 2)
    (status,) = [one for one in source.statuses() if one.coverage.ward == first.ward.id]
    assert status.attached
    assert status.report is not None
    assert (status.report.pending, status.report.hold, status.report.ae_title) == (2, True, "WARD")
    assert status.report.free_bytes > 0
    reply = channel_of(source).stub.Wards(region_pb2.WardsRequest())
    assert [serde.status_from(one).coverage.ward for one in reply.wards] == sorted(
        node.ward.id for node in nodes
    )


def test_a_hub_that_stops_and_a_node_that_leaves_do_so_at_once_and_by_their_word(
    region: Region, hub: Hub, nodes: list[Node], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "federation")
    first, second, _ = nodes
    for node in (first, second):
        node.start()
        node.take(study(f"1.2.{node.ward.issuer}".replace("SM", "1").replace("GA", "2"), 1))
        wait_for(lambda node=node: node.pending == 0, "replicated")  # type: ignore[misc]
    first.leave()
    wait_for(lambda: "left: it said goodbye" in caplog.text, "the hub heard it")
    begun = time.monotonic()
    hub.stop(grace_s=10)
    assert time.monotonic() - begun < 3  # push streams that lie open do not keep it
    assert not second.reported(region).attached


def test_a_second_hub_on_the_same_port_says_why_it_does_not_start(region: Region, hub: Hub) -> None:
    with pytest.raises(SettingsError, match="port"):
        Hub(replace(hub.settings, state=region.folder / "other")).start()
    with pytest.raises(Unavailable, match="another process writes"):
        Hub(replace(hub.settings, port=0)).start()


def test_a_renewed_certificate_carries_the_next_attach(region: Region, hub: Hub) -> None:
    ward = region.add_ward("Evangelico", "Radiology", "EV")
    short = region.node(ward, f"127.0.0.1:{hub.settings.port}", life_s=6)
    node = Node(ward, short, region.folder / "nodes" / "short")
    node.start()
    try:
        reported(region, node, 0)
        wait_for(lambda: Identity.load(short.folder).fingerprint != short.fingerprint, "it was renewed")
        uplink = node.uplink
        assert uplink is not None
        wait_for(lambda: time.time_ns() // 1000 > short.not_after_us + 1_500_000, "the first one is over")
        node.take(study("1.2.7", 2))
        wait_for(lambda: node.pending == 0, "replication goes on")
        assert uplink.status().attached
    finally:
        node.stop()
