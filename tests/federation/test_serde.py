"""Every domain object comes through the wire as it was, and what another process may not say is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archive.errors import InvalidInput, InvalidInstance, InvalidQuery
from archive.model import (
    InstanceHead,
    Level,
    Match,
    Outcome,
    PatientKey,
    Provenance,
    Query,
    Rules,
    Scope,
    SeriesHolding,
    StudyPlace,
)
from federation import serde
from federation.assertion import Assertion
from federation.coverage import CoverageState, Report, WardCoverage, WardStatus
from federation.replicator import Received, Refused
from protos import common_pb2, uplink_pb2

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
COUNT = st.integers(0, 2**31 - 1)
TIME = st.none() | st.integers(1, 2**53)
UID = st.lists(st.integers(0, 99), min_size=1, max_size=8).map(lambda parts: ".".join(map(str, parts)))
FIELDS = st.dictionaries(TEXT, TEXT, max_size=3)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
DIGEST = st.binary(min_size=32, max_size=32)
HOLDINGS = st.lists(st.builds(SeriesHolding, UID, TEXT, TEXTS), max_size=2).map(tuple)

QUERIES = st.builds(
    Query,
    level=st.sampled_from(Level),
    keys=st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
    scope=st.builds(Scope, st.none() | st.frozensets(TEXT, max_size=3)),
    person=st.none() | st.frozensets(st.builds(PatientKey, TEXT, TEXT), max_size=2),
    combine_datetime=st.booleans(),
    rules=st.builds(Rules, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["", "+0100"])),
    pending_only=st.booleans(),
    limit=st.none() | st.integers(1, 1000),
    offset=COUNT,
    after=st.none() | st.builds(StudyPlace, TEXT, TEXT, UID),
)
MATCHES = st.builds(
    Match,
    st.sampled_from(Level),
    TEXT,
    FIELDS,
    FIELDS,
    FIELDS,
    FIELDS,
    TEXTS,
    TEXTS,
    COUNT,
    COUNT,
    COUNT,
    TEXTS,
    HOLDINGS,
    st.booleans(),
    TEXTS,
)
COVERAGES = st.builds(
    WardCoverage, TEXT, TEXT, TEXT, st.sampled_from(CoverageState), TIME, COUNT, COUNT, TIME, TEXT
)
REPORTS = st.builds(
    Report,
    COUNT,
    COUNT,
    TIME,
    COUNT,
    COUNT,
    COUNT,
    COUNT,
    COUNT,
    COUNT,
    st.floats(0, 1e9),
    TEXT,
    st.booleans(),
)
STATUSES = st.builds(
    WardStatus,
    COVERAGES,
    TEXT,
    st.booleans(),
    TIME,
    TEXT,
    st.integers(-(2**40), 2**40),
    st.none() | REPORTS,
    TIME,
)
HEADS = st.builds(
    InstanceHead, UID, UID, UID, st.builds(Provenance, st.just("a/ct"), TEXT, TEXT, TEXT, COUNT)
)
ASSERTIONS = st.builds(
    Assertion,
    TEXT,
    TEXT,
    TEXT,
    TEXT,
    COUNT,
    st.binary(max_size=8),
    st.lists(st.binary(max_size=4), max_size=3).map(tuple),
)


@given(QUERIES)
def test_query(query: Query) -> None:
    assert serde.query_from(serde.query_to(query)) == query


@given(MATCHES)
def test_match(match: Match) -> None:
    assert serde.match_from(serde.match_to(match)) == match


@given(COVERAGES, REPORTS, STATUSES)
def test_coverage_report_and_status(coverage: WardCoverage, report: Report, status: WardStatus) -> None:
    assert serde.coverage_from(serde.coverage_to(coverage)) == coverage
    assert serde.report_from(serde.report_to(report)) == report
    assert serde.status_from(serde.status_to(status)) == status


@given(HEADS)
def test_head_is_held_by_the_ward_of_the_certificate(head: InstanceHead) -> None:
    message = serde.head_to(head)
    assert serde.head_from(message, ward="a/ct") == head
    assert serde.head_from(message, ward="b/mr").provenance.ward == "b/mr"


@given(ASSERTIONS)
def test_assertion(assertion: Assertion) -> None:
    assert serde.assertion_from(serde.assertion_to(assertion)) == assertion


@given(UID, DIGEST, COUNT, st.sampled_from(Outcome), TEXT, st.booleans())
def test_verdicts(
    uid: str, digest: bytes, at_us: int, outcome: Outcome, reason: str, permanent: bool
) -> None:
    received = Received(uid, digest, at_us, outcome)
    assert serde.receipt_from(serde.receipt_to(received)) == received
    refused = Refused(uid, digest, reason, permanent)
    assert serde.refusal_from(serde.refusal_to(refused)) == refused


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Query, common_pb2.Query),
        (Rules, common_pb2.Rules),
        (Match, common_pb2.Match),
        (WardCoverage, common_pb2.WardCoverage),
        (Report, uplink_pb2.WardReport),
        (Assertion, common_pb2.Assertion),
    ],
)
def test_no_field_of_the_wire_is_forgotten(kind: Any, message: Any) -> None:
    ours = {field.name for field in fields(kind)}
    wire = set(message.DESCRIPTOR.fields_by_name)
    ours_only = {"scope": {"every_ward", "wards"}, "person": {"person", "bound_to_person"}}
    assert {name for ours_name in ours for name in ours_only.get(ours_name, {ours_name})} == wire


def test_what_is_out_of_bounds_is_refused() -> None:
    with pytest.raises(InvalidQuery):
        serde.query_from(common_pb2.Query(level="GALAXY"))
    with pytest.raises(InvalidQuery):
        serde.query_from(common_pb2.Query(level="STUDY", limit=-1))
    for place in (common_pb2.StudyPlace(uid="x"), common_pb2.StudyPlace(date="2" * 300, uid="1.2")):
        with pytest.raises(InvalidInput):
            serde.query_from(common_pb2.Query(level="STUDY", after=place))
    with pytest.raises(InvalidQuery):
        serde.query_from(common_pb2.Query(level="STUDY", keys=[common_pb2.Key()] * (serde.KEYS_MAX + 1)))
    with pytest.raises(InvalidInstance):
        serde.head_from(common_pb2.InstanceHead(sop_class_uid="1.2", sop_instance_uid="../x"), ward="a/ct")
    with pytest.raises(InvalidInput):
        serde.report_from(uplink_pb2.WardReport(pending=-1))
    for clock_us in (-1, -(1 << 63), (1 << 63) - 1):
        with pytest.raises(InvalidInput):
            serde.report_from(uplink_pb2.WardReport(clock_us=clock_us))
    with pytest.raises(InvalidInput):
        serde.receipt_from(uplink_pb2.Receipt(sop_instance_uid="1.2", digest=b"short", outcome="stored"))
    with pytest.raises(InvalidInput):
        serde.receipt_from(uplink_pb2.Receipt(sop_instance_uid="1.2", digest=b"x" * 32, outcome="eaten"))


def test_a_state_of_a_newer_release_is_not_taken_for_covered() -> None:
    coverage = serde.coverage_from(common_pb2.WardCoverage(ward="a/ct", state="wonderful"))
    assert coverage.state is CoverageState.UNKNOWN
    assert not coverage.covered


def test_a_wards_row_is_that_wards_and_complete() -> None:
    row = common_pb2.Match(level="STUDY", wards=["somebody/else"])
    with pytest.raises(InvalidInstance):
        serde.match_of_ward(row, "a/ct")
    row.study.values["StudyInstanceUID"] = "1.2"
    assert serde.match_of_ward(row, "a/ct").wards == ("a/ct",)
    row.level = "IMAGE"
    with pytest.raises(InvalidInstance):
        serde.match_of_ward(row, "a/ct")
