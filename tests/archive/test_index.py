"""The index on SQLite and PostgreSQL: exactly once, counts, conflicts, facts in any order, scopes, outbox."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete

from archive.database import sqlite_url
from archive.errors import Unavailable
from archive.index.index import Index
from archive.index.remaking import remake
from archive.index.schema import instance
from archive.model import (
    EVERYTHING,
    NOTHING,
    START,
    Fact,
    FactKind,
    IndexEntry,
    Known,
    Level,
    Match,
    PatientKey,
    Position,
    Query,
    RecordKind,
    Scope,
    Totals,
)
from tests.archive.entries import CT, MR, batches, empty, entry, many

END = Position(1, 1)


@pytest.fixture
def index(database_url: str) -> Iterator[Index]:
    opened = Index.open(database_url)
    yield opened
    opened.close()


def put(index: Index, *entries: IndexEntry, outbox: bool = True) -> None:
    index.apply(entries, END, outbox=outbox)


def digest_of(uid: str, content: str = "") -> bytes:
    return hashlib.sha256(f"{uid}/{content}".encode()).digest()


def fact(
    kind: FactKind, uid: str, content: str = "", *, ward: str = "", at_us: int = 50, detail: str = ""
) -> Fact:
    return Fact(kind, uid, digest_of(uid, content), ward, at_us, detail)


def studies(index: Index, *keys: tuple[str, str], **more: object) -> list[Match]:
    return index.search(Query(Level.STUDY, keys, **more))  # type: ignore[arg-type]


def uids(matches: Sequence[Match]) -> list[str]:
    return [match.study["StudyInstanceUID"] for match in matches]


# What is applied is found, once.


def test_an_instance_is_found_at_every_level(index: Index) -> None:
    put(
        index,
        entry(
            "1.1", instance_fields={"InstanceNumber": "7", "Rows": "512", "ImageType": "ORIGINAL\\PRIMARY"}
        ),
    )
    match = studies(index)[0]
    assert match.patient == {"PatientName": "Rossi^Maria", "PatientID": "123", "IssuerOfPatientID": "A"}
    assert match.study == {"StudyInstanceUID": "1.2.3", "StudyDate": "20260102", "StudyTime": "1030"}
    assert (match.issuer, match.modalities, match.sop_classes, match.wards) == (
        "A",
        ("CT",),
        (CT,),
        ("a/one",),
    )
    assert (match.series_count, match.instance_count, match.study_count) == (1, 1, 1)
    series = index.search(Query(Level.SERIES))[0]
    assert series.series == {"SeriesInstanceUID": "1.2.3.1", "Modality": "CT", "SeriesNumber": "1"}
    assert (series.study, series.patient, series.instance_count) == (match.study, match.patient, 1)
    image = index.search(Query(Level.IMAGE, (("SOPInstanceUID", "1.1"),)))[0]
    assert image.instance["Rows"] == "512" and image.instance["SOPClassUID"] == CT
    assert (image.series, image.wards, image.modalities) == (series.series, ("a/one",), ("CT",))
    patient = index.search(Query(Level.PATIENT))[0]
    assert patient.patient == match.patient
    assert (patient.study_count, patient.series_count, patient.instance_count) == (1, 1, 1)
    assert index.lookup("1.1") == Known(digest_of("1.1"), "1.2.3", "1.2.3.1")
    assert index.lookup("1.2") is None


def test_stored_instances_come_by_series_number_and_uid_as_they_were_given(index: Index) -> None:
    given_entries = [
        entry(f"1.{number}", series=f"1.2.3.{number % 2}", sequence=number, at_us=number,
              instance_fields={"InstanceNumber": str(20 - number)})
        for number in range(1, 12)
    ]  # fmt: skip
    put(index, *given_entries)
    stored = index.instances("1.2.3")
    assert [(one.series_uid, int(one.instance["InstanceNumber"])) for one in stored] == sorted(
        (one.attributes.series_uid, int(one.attributes.instance["InstanceNumber"])) for one in given_entries
    )
    first = next(one for one in stored if one.head.sop_instance_uid == "1.1")
    assert first.head == given_entries[0].record.head
    assert first.location == given_entries[0].record.location
    assert first.digest == given_entries[0].record.digest
    assert len(index.instances("1.2.3", "1.2.3.0")) == 5
    assert len(index.instances("1.2.3", "1.2.3.1", "1.1")) == 1
    assert index.instances("1.2.3", "1.2.3.0", "1.1") == []
    assert index.instances("9.9") == []


def test_applying_again_changes_nothing(index: Index) -> None:
    entries = list(many(5, series=2, instances=3)) + [entry("1.1"), entry("1.1", content="other")]
    index.apply(entries, Position(1, 500), outbox=True)
    before = index.dump()
    index.apply(entries, Position(1, 500), outbox=True)
    index.apply(entries[3:9], Position(1, 90), outbox=True)
    assert index.dump() == before
    assert index.positions() == (Position(1, 500), START), "a position never goes back"


def test_batches_may_be_cut_anywhere(index: Index, tmp_path: Path) -> None:
    entries = list(many(6, series=2, instances=4, seed=3))
    random.Random(4).shuffle(entries)
    entries += [entry("1.1"), entry("1.1", content="x"), entry("1.1", content="x"), entry("1.1")]
    whole = Index.open(sqlite_url(tmp_path / "whole.db"))
    whole.apply(entries, END, outbox=True)
    for batch in batches(iter(entries), 3):
        index.apply(batch, END, outbox=True)
    assert index.dump() == whole.dump()
    whole.close()


def test_marks_move_the_position_alone(index: Index) -> None:
    index.apply([entry("1.1", kind=RecordKind.MARK)], Position(2, 7), outbox=True)
    assert index.positions() == (Position(2, 7), START)
    assert index.totals() == Totals(0, 0, 0, 0, 0, 0)
    index.apply([], Position(3, 1), outbox=True)
    index.apply_facts([], Position(1, 9))
    assert index.positions() == (Position(3, 1), Position(1, 9))


def test_counts_and_lists_of_a_study_follow_its_instances(index: Index) -> None:
    put(index, entry("1.1"))
    put(
        index,
        entry("1.2", series="1.2.3.2", sop_class=MR, series_fields={"Modality": "MR"}),
        entry("1.3", series="1.2.3.2", sop_class=MR, series_fields={"Modality": "MR"}),
        entry("1.4"),
    )
    match = studies(index)[0]
    assert (match.series_count, match.instance_count) == (2, 4)
    assert match.modalities == ("CT", "MR") and match.sop_classes == (CT, MR)
    assert uids(studies(index, ("ModalitiesInStudy", "MR"))) == ["1.2.3"]
    assert uids(studies(index, ("Modality", "C*"))) == ["1.2.3"], "asked of studies it is Modalities in Study"
    assert uids(studies(index, ("SOPClassesInStudy", f"1.2\\{MR}"))) == ["1.2.3"]
    assert studies(index, ("ModalitiesInStudy", "US")) == []
    assert index.totals() == Totals(1, 1, 2, 4, 4000, 0)
    assert index.count(Query(Level.IMAGE, (("Modality", "MR"),))) == 2


def test_the_first_value_of_a_field_stays_and_an_empty_one_is_filled(index: Index) -> None:
    put(index, entry("1.1", study_fields={"StudyDate": "20260101"}, series_fields={"Modality": ""}))
    put(index, entry("1.2", study_fields={"StudyDate": "20270101", "StudyDescription": "Thorax"},
                     series_fields={"Modality": "PT", "SeriesNumber": "9"}))  # fmt: skip
    match = studies(index)[0]
    assert (match.study["StudyDate"], match.study["StudyDescription"]) == ("20260101", "Thorax")
    assert match.modalities == ("PT",)
    assert uids(studies(index, ("StudyDescription", "*hora*"))) == ["1.2.3"], "the trigrams follow"
    assert index.search(Query(Level.SERIES))[0].series["SeriesNumber"] == "9"


def test_values_that_no_database_holds_are_made_storable(index: Index) -> None:
    put(index, entry(
        "1.1",
        patient_fields={"PatientID": "1\x002", "PatientName": "A\ud800B", "PatientComments": "x" * 100_000},
        study_fields={"StudyDate": "2026.01.02", "StudyTime": "10:30:00", "AccessionNumber": "é" * 3000},
        instance_fields={"InstanceNumber": "0042"},
    ))  # fmt: skip
    match = studies(index, ("PatientID", "12"), ("StudyDate", "20260102"), ("StudyTime", "1030"))[0]
    assert match.patient["PatientName"] == "A?B"
    assert len(match.patient["PatientComments"]) == 4096
    assert index.search(Query(Level.IMAGE, (("InstanceNumber", "42"),)))


# Patients


def test_equal_ids_of_two_issuers_are_two_patients(index: Index) -> None:
    put(index, entry("1.1"), entry("2.1", study="2.2", series="2.3", issuer="B", ward="b/one"))
    assert index.count(Query(Level.PATIENT, (("PatientID", "123"),))) == 2
    assert uids(studies(index, ("PatientID", "123"), ("IssuerOfPatientID", "B"))) == ["2.2"]
    bound = frozenset({PatientKey("A", "123")})
    assert uids(studies(index, ("PatientID", "123"), person=bound)) == ["1.2.3"]
    assert index.count(Query(Level.IMAGE, person=bound)) == 1
    assert index.count(Query(Level.PATIENT, person=bound)) == 1
    assert studies(index, person=frozenset()) == []
    assert studies(index, person=frozenset({PatientKey("A", "")})) == []


def test_the_issuer_of_the_data_set_is_above_its_senders(index: Index) -> None:
    put(index, entry("1.1", patient_fields={"PatientID": "123", "IssuerOfPatientID": "B"}))
    put(index, entry("2.1", study="2.2", series="2.3", issuer="B"))
    assert [match.issuer for match in studies(index)] == ["B", "B"]
    assert index.totals().patients == 1


def test_patients_without_an_id_are_never_merged(index: Index) -> None:
    for number in range(3):
        put(index, entry(f"1.{number}", study=f"2.{number}", series=f"3.{number}",
                         patient_fields={"PatientName": "Unknown"}))  # fmt: skip
    assert index.totals().patients == 3
    assert [match.study_count for match in index.search(Query(Level.PATIENT))] == [1, 1, 1]


def test_a_study_that_stood_alone_gets_the_first_patient_named_in_it(index: Index) -> None:
    put(index, entry("1.1", patient_fields={"PatientName": "?", "PatientSex": "F"}))
    put(index, entry("1.2", patient_fields={"PatientName": "Rossi", "PatientID": "9"}))
    put(
        index,
        entry("1.3", patient_fields={"PatientName": "Bianchi", "PatientID": "10", "PatientBirthDate": "1"}),
    )
    match = studies(index)[0]
    assert match.patient == {
        "PatientName": "Rossi",
        "PatientID": "9",
        "PatientSex": "F",
        "IssuerOfPatientID": "A",
    }
    assert (match.instance_count, index.totals().patients) == (3, 1)
    assert uids(studies(index, person=frozenset({PatientKey("A", "9")}))) == ["1.2.3"]
    assert studies(index, person=frozenset({PatientKey("A", "10")})) == []


# Conflicts


def test_the_first_content_stays_and_any_other_is_a_conflict(index: Index) -> None:
    put(index, entry("1.1"))
    late = entry("1.1", content="late", study="8.8", series="8.9", ward="a/two", at_us=7)
    marked = entry("1.1", content="marked", kind=RecordKind.CONFLICT, at_us=8)
    put(index, late, marked)
    assert index.lookup("1.1") == Known(digest_of("1.1"), "1.2.3", "1.2.3.1")
    assert index.totals() == Totals(1, 1, 1, 1, 1000, 2)
    assert uids(studies(index)) == ["1.2.3"], "what is set apart opens no study"
    rows = index.conflicts()
    assert [row.other_digest for row in rows] == [marked.record.digest, late.record.digest]
    assert {row.kept_digest for row in rows} == {digest_of("1.1")}
    assert (rows[1].study_uid, rows[1].ward, rows[1].location) == ("8.8", "a/two", late.record.location)
    for content in ("", "late", "marked"):
        assert index.has_content("1.1", digest_of("1.1", content))
    assert not index.has_content("1.1", digest_of("1.1", "none"))
    assert [(one.conflict, one.digest) for one in index.pending(9)] == [
        (False, digest_of("1.1")), (True, marked.record.digest), (True, late.record.digest),
    ]  # fmt: skip


def test_a_conflict_may_come_before_what_it_lost_to(index: Index) -> None:
    put(index, entry("1.1", content="lost", kind=RecordKind.CONFLICT))
    assert index.lookup("1.1") is None
    assert index.conflicts()[0].kept_digest == b""
    put(index, entry("1.1"))
    assert index.conflicts()[0].kept_digest == digest_of("1.1")


def test_a_conflict_that_comes_as_the_only_content_is_live(index: Index) -> None:
    put(index, entry("1.1", content="x", kind=RecordKind.CONFLICT))
    index.apply_facts([fact(FactKind.SET_ASIDE, "1.1", "x", detail="no"),
                       fact(FactKind.COPY, "1.1", "x", ward="b/x")], END)  # fmt: skip
    put(index, entry("1.1", content="x", ward="a/two"))
    assert index.lookup("1.1") == Known(digest_of("1.1", "x"), "1.2.3", "1.2.3.1")
    assert index.conflicts() == [] and studies(index)[0].wards == ("a/two", "b/x")
    assert index.set_aside() == [("1.1", digest_of("1.1", "x"), "no")]


def test_a_patient_is_made_anew_beside_a_study_that_is_emptied_in_the_same_transaction(index: Index) -> None:
    """Two decisions in one batch: the first makes a study of the patient anew when the second has taken the
    instances out of the other."""
    entries = [entry("1.1", study="2.1", series="3.1"), entry("1.2", study="2.2", series="3.2")]
    put(index, *entries)
    attributes = {one.record.head.sop_instance_uid: one.attributes for one in entries}

    def work(connection: Connection) -> None:
        connection.execute(delete(instance).where(instance.c.sop_instance_uid == "1.2"))
        for study_uid in ("2.1", "2.2"):
            remake(connection, [study_uid], lambda record: attributes[record.head.sop_instance_uid])

    index._database.write(work)
    assert [match.study["StudyInstanceUID"] for match in studies(index)] == ["2.1"]
    assert len(index.search(Query(Level.PATIENT))) == 1


# The outbox


def test_the_newest_is_offered_first_and_the_urgent_before_it(index: Index) -> None:
    put(index, *(entry(f"1.{n}", study=f"2.{n // 2}", series="3", at_us=n) for n in range(6)))
    assert [one.head.sop_instance_uid for one in index.pending(3)] == ["1.5", "1.4", "1.3"]
    assert index.mark_urgent("2.0") == 2
    assert index.mark_urgent("2.1", "1.2") == 1
    assert index.mark_urgent("9.9") == 0
    offered = index.pending(10)
    assert [one.head.sop_instance_uid for one in offered] == ["1.2", "1.1", "1.0", "1.5", "1.4", "1.3"]
    assert [one.urgent for one in offered] == [True] * 3 + [False] * 3
    assert offered[0].dataset_bytes == 600
    assert [index.note_try("1.2", digest_of("1.2")) for _ in range(3)] == [1, 2, 3]
    assert index.note_try("1.2", digest_of("none")) == 0
    assert index.pending(1)[0].tries == 3


def test_what_is_known_is_left_out_until_it_becomes_urgent(index: Index) -> None:
    put(index, *(entry(f"1.{n}", study="2.1", series="3", at_us=n) for n in range(4)))
    known = {(f"1.{n}", digest_of(f"1.{n}")): False for n in (3, 2)}
    assert [one.head.sop_instance_uid for one in index.pending(1, known)] == ["1.1"]
    assert [one.head.sop_instance_uid for one in index.pending(9, known)] == ["1.1", "1.0"]
    index.mark_urgent("2.1", "1.2")
    assert [one.head.sop_instance_uid for one in index.pending(9, known)] == ["1.2", "1.1", "1.0"]
    known["1.2", digest_of("1.2")] = True
    assert [one.head.sop_instance_uid for one in index.pending(9, known)] == ["1.1", "1.0"]


def test_a_receipt_takes_it_out_for_good(index: Index) -> None:
    put(index, entry("1.1", at_us=5), entry("1.2", at_us=6), entry("1.2", content="other", at_us=7))
    assert index.pending_summary().count == 3
    index.apply_facts([fact(FactKind.RECEIPT, "1.2"), fact(FactKind.RECEIPT, "1.2", "other")], END)
    summary = index.pending_summary()
    assert (summary.count, summary.bytes, summary.oldest_us, summary.set_aside) == (1, 600, 5, 0)
    put(index, entry("1.2"))
    assert [one.head.sop_instance_uid for one in index.pending(9)] == ["1.1"]


def test_what_is_set_aside_is_not_offered_until_a_person_says_so(index: Index) -> None:
    put(index, entry("1.1"), entry("1.2"))
    index.note_try("1.1", digest_of("1.1"))
    index.apply_facts([fact(FactKind.SET_ASIDE, "1.1", detail="refused")], END)
    assert [one.head.sop_instance_uid for one in index.pending(9)] == ["1.2"]
    assert (index.pending_summary().count, index.pending_summary().set_aside) == (2, 1)
    assert index.set_aside() == [("1.1", digest_of("1.1"), "refused")]
    assert index.pending_studies()[0].set_aside == 1
    index.apply_facts([fact(FactKind.RETRY, "1.1")], Position(1, 2))
    assert {one.head.sop_instance_uid: one.tries for one in index.pending(9)} == {"1.1": 0, "1.2": 0}


def test_without_an_outbox_there_is_none(index: Index) -> None:
    put(index, entry("1.1"), outbox=False)
    assert index.pending(9) == [] and index.pending_summary().count == 0


def test_what_is_pending_can_be_searched_alone(index: Index) -> None:
    put(index, *many(3, series=2, instances=3))
    study, other, _ = sorted(uids(studies(index)))
    receipts = [
        Fact(FactKind.RECEIPT, one.head.sop_instance_uid, one.digest, "", 1)
        for one in index.instances(study)[:4] + index.instances(other)
    ]
    index.apply_facts(receipts, END)
    assert study in uids(studies(index, pending_only=True)) and other not in uids(
        studies(index, pending_only=True)
    )
    match = studies(index, ("StudyInstanceUID", study), pending_only=True)[0]
    assert (match.series_count, match.instance_count, match.truncated) == (1, 2, False)
    assert [len(holding.sop_instance_uids) for holding in match.holdings] == [2]
    left = {one.head.sop_instance_uid for one in index.instances(study)} - {
        one.sop_instance_uid for one in receipts
    }
    assert set(match.holdings[0].sop_instance_uids) == left
    assert match.holdings[0].modality in ("CT", "MR")
    query = Query(Level.IMAGE, (("StudyInstanceUID", study),), pending_only=True)
    assert {one.instance["SOPInstanceUID"] for one in index.search(query)} == left
    assert {one.holdings[0].sop_instance_uids[0] for one in index.search(query)} == left
    assert len(index.search(replace(query, level=Level.SERIES))) == 1
    assert index.count(replace(query, level=Level.SERIES)) == 1
    assert studies(index, pending_only=True, scope=Scope(frozenset({"b/x"}))) == []
    patients = index.search(Query(Level.PATIENT, pending_only=True))
    assert sum(one.instance_count for one in patients) == 8
    assert sum(len(one.sop_instance_uids) for p in patients for one in p.holdings) == 8
    assert studies(index)[0].holdings == ()


def test_lists_of_pending_instances_are_cut_at_a_thousand_and_say_so(index: Index) -> None:
    put(index, *many(1, series=3, instances=400), entry("1.1"))
    matches = {match.instance_count: match for match in studies(index, pending_only=True)}
    assert matches[1200].truncated and not matches[1].truncated
    assert sum(len(one.sop_instance_uids) for one in matches[1200].holdings) == 1000


# Scopes


def three_wards(index: Index) -> None:
    put(
        index,
        entry("1.1", ward="a/one"),
        entry("1.2", ward="a/two", series="1.2.3.2", sop_class=MR, series_fields={"Modality": "MR"}),
        entry("1.3", ward="a/two", series="1.2.3.2", sop_class=MR, series_fields={"Modality": "MR"}),
        entry("2.1", ward="b/one", study="2.2", series="2.3"),
        outbox=False,
    )


def test_a_scope_limits_rows_and_counts(index: Index) -> None:
    three_wards(index)
    two = Scope(frozenset({"a/two"}))
    (match,) = studies(index, scope=two)
    assert (match.series_count, match.instance_count) == (1, 2)
    assert (match.modalities, match.sop_classes, match.wards) == (("MR",), (MR,), ("a/two",))
    assert studies(index, ("ModalitiesInStudy", "CT"), scope=two) == [], "the CT is not theirs"
    assert studies(index, ("SOPClassesInStudy", CT), scope=two) == []
    assert len(studies(index, ("ModalitiesInStudy", "M*"), scope=two)) == 1
    assert [m.series["Modality"] for m in index.search(Query(Level.SERIES, scope=two))] == ["MR"]
    assert index.count(Query(Level.IMAGE, scope=two)) == 2
    assert index.count(Query(Level.STUDY, scope=two)) == 1
    (patient,) = index.search(Query(Level.PATIENT, scope=two))
    assert (patient.instance_count, patient.study_count) == (2, 1)
    assert len(index.instances("1.2.3", scope=two)) == 2
    assert index.instances("2.2", scope=two) == []
    both = Scope(frozenset({"a/one", "a/two"}))
    (match,) = studies(index, scope=both)
    assert (match.series_count, match.instance_count, match.wards) == (2, 3, ("a/one", "a/two"))
    for level in Level:
        assert (
            index.search(Query(level, scope=NOTHING)) == [] and index.count(Query(level, scope=NOTHING)) == 0
        )
    assert index.instances("1.2.3", scope=NOTHING) == []


def test_a_ward_is_not_told_whose_study_it_sent_something_under(index: Index) -> None:
    put(
        index,
        entry("1.1", ward="a/one", issuer="A", patient_fields={"PatientID": "1", "PatientName": "Rossi^A"}),
        entry("1.2", ward="b/one", issuer="B", patient_fields={"PatientID": "1", "PatientName": "Neri^U"}),
        outbox=False,
    )
    theirs, own = Scope(frozenset({"b/one"})), Scope(frozenset({"a/one"}))
    for level in Level:
        assert index.search(Query(level, scope=theirs)) == [] and index.count(Query(level, scope=theirs)) == 0
        assert index.search(Query(level, (("PatientName", "Rossi*"),), theirs)) == [], "nor by asking"
        assert len(index.search(Query(level, scope=own))) == 1
    assert len(index.instances("1.2.3", scope=theirs)) == 1, "what it sent stays its own to read"
    (match,) = studies(index, scope=own)
    assert match.instance_count == 1
    index.apply_facts([fact(FactKind.COPY, "1.1", ward="b/one")], END)
    (match,) = studies(index, scope=theirs)
    assert match.instance_count == 2, "who holds a copy has read the name in it"


def test_a_copy_is_held_by_both_wards_and_counted_once(index: Index) -> None:
    three_wards(index)
    copies = [
        fact(FactKind.COPY, "1.1", ward="b/one"), fact(FactKind.COPY, "1.1", ward="b/one"),
        fact(FactKind.COPY, "1.1", ward="a/one"), fact(FactKind.COPY, "1.1", "other", ward="c/one"),
    ]  # fmt: skip
    index.apply_facts(copies, END)
    index.apply_facts(copies, END)
    held = Scope(frozenset({"b/one"}))
    (match,) = studies(index, ("StudyInstanceUID", "1.2.3"), scope=held)
    assert (match.series_count, match.instance_count, match.wards) == (1, 1, ("b/one",))
    assert [one.head.sop_instance_uid for one in index.instances("1.2.3", scope=held)] == ["1.1"]
    assert index.search(Query(Level.IMAGE, (("SOPInstanceUID", "1.1"),)))[0].wards == ("a/one", "b/one")
    for scope in (EVERYTHING, Scope(frozenset({"a/one", "a/two", "b/one"}))):
        (match,) = studies(index, ("StudyInstanceUID", "1.2.3"), scope=scope)
        assert (match.instance_count, match.wards) == (3, ("a/one", "a/two", "b/one"))
        (patient,) = index.search(Query(Level.PATIENT, scope=scope))
        assert patient.instance_count == 4
        series = index.search(Query(Level.SERIES, (("SeriesInstanceUID", "1.2.3.1"),), scope=scope))[0]
        assert (series.instance_count, series.wards) == (1, ("a/one", "b/one"))


# Order and pages


def test_studies_are_listed_newest_first_and_pages_meet(index: Index) -> None:
    index.apply(list(many(30)), END, outbox=False)
    everything = studies(index)
    keys = [(m.study["StudyDate"], m.study["StudyTime"], m.study["StudyInstanceUID"]) for m in everything]
    assert keys == sorted(keys, reverse=True) and len(keys) == 30
    pages = [studies(index, limit=7, offset=start) for start in range(0, 35, 7)]
    assert [match for page in pages for match in page] == everything
    assert studies(index, offset=28) == everything[28:]
    assert studies(index, limit=0) == []
    assert index.count(Query(Level.STUDY, limit=3, offset=5)) == 30


def test_series_and_instances_are_listed_by_number(index: Index) -> None:
    for number, text in enumerate(("10", "2", "", "-1", "x")):
        put(index, entry(f"1.{number}", series=f"3.{number}", instance_fields={"InstanceNumber": text},
                         series_fields={"Modality": "CT", "SeriesNumber": text}))  # fmt: skip
    series = index.search(Query(Level.SERIES, (("StudyInstanceUID", "1.2.3"),)))
    assert [match.series.get("SeriesNumber", "") for match in series] == ["-1", "2", "10", "", "x"]
    images = index.search(Query(Level.IMAGE, (("StudyInstanceUID", "1.2.3"),)))
    assert [match.instance.get("InstanceNumber", "") for match in images] == ["-1", "2", "10", "", "x"]


# Facts and records in any order: a rebuilt index equals the one it replaces


UIDS = ("1.1", "1.2", "1.3")
CONTENTS = ("", "x")
RECORDS = st.builds(
    lambda uid, content, kind, ward, patient: entry(
        uid, content=content, kind=kind, ward=ward, patient_fields=patient, study=f"7.{uid[-1] in '12'}",
    ),
    st.sampled_from(UIDS), st.sampled_from(CONTENTS),
    st.sampled_from([RecordKind.INSTANCE, RecordKind.INSTANCE, RecordKind.CONFLICT]),
    st.sampled_from(["a/one", "a/two"]),
    st.sampled_from([{"PatientID": "1"}, {"PatientName": "N"}, {"PatientID": "2", "PatientSex": "F"}]),
)  # fmt: skip
FACTS = st.builds(
    lambda kind, uid, content, ward, at: fact(kind, uid, content, ward=ward, at_us=at, detail=f"d{at}"),
    # Those of which the order does not matter; tests/archive/test_acceptance.py has decisions, damage and
    # losses are in tests/archive/test_inventory.py.
    st.sampled_from([FactKind.RECEIPT, FactKind.COPY, FactKind.SET_ASIDE, FactKind.RETRY]),
    st.sampled_from(UIDS), st.sampled_from(CONTENTS),
    st.sampled_from(["a/one", "a/two", "b/one"]), st.integers(1, 9),
)  # fmt: skip


@pytest.fixture(scope="module")
def emptied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    index = Index.open(sqlite_url(tmp_path_factory.mktemp("logs") / "index.db"))
    yield index
    index.close()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(RECORDS, FACTS), max_size=14), st.booleans())
def test_logs_in_any_interleaving_make_the_same_index(
    emptied: Index, events: list[IndexEntry | Fact], outbox: bool
) -> None:
    records = [event for event in events if isinstance(event, IndexEntry)]
    facts = [event for event in events if isinstance(event, Fact)]
    singly: list[list[IndexEntry | Fact]] = [[event] for event in events]
    as_it_came = dump_after(emptied, singly, outbox)
    assert dump_after(emptied, [[*records], [*facts]], outbox) == as_it_came
    assert dump_after(emptied, [[*facts], [*records]], outbox) == as_it_came
    assert dump_after(emptied, [*([one] for one in facts), *([one] for one in records)], outbox) == as_it_came
    assert dump_after(emptied, [*([one] for one in records), *([one] for one in facts)], outbox) == as_it_came


def dump_after(
    index: Index, groups: Sequence[Sequence[IndexEntry | Fact]], outbox: bool
) -> dict[str, list[Any]]:
    """What an empty index holds after groups of records or of facts."""
    empty(index)
    for group in groups:
        if group and isinstance(group[0], Fact):
            index.apply_facts([one for one in group if isinstance(one, Fact)], END)
        else:
            index.apply([one for one in group if isinstance(one, IndexEntry)], END, outbox=outbox)
    return index.dump()


def test_both_databases_hold_the_same(tmp_path: Path, postgresql_url: str) -> None:
    dumps = []
    for url in (sqlite_url(tmp_path / "index.db"), postgresql_url):
        index = Index.open(url)
        for batch in batches(many(20, series=2, instances=3), 17):
            index.apply(batch, END, outbox=True)
        put(index, entry("1.1"), entry("1.1", content="x"))
        index.apply_facts([fact(FactKind.COPY, "1.1", ward="b/x"), fact(FactKind.DAMAGE, "1.1"),
                           fact(FactKind.RECEIPT, "5.5")], END)  # fmt: skip
        dumps.append(index.dump())
        index.close()
    assert dumps[0] == dumps[1]


# Several threads and processes


def test_a_reader_sees_whole_batches_while_another_writes(index: Index, database_url: str) -> None:
    reader = Index.open(database_url, read_only=True)
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            for match in reader.search(Query(Level.STUDY)):
                count = len(reader.instances(match.study["StudyInstanceUID"]))
                if match.instance_count % 10 or count % 10:
                    wrong.append((match.instance_count, count))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for batch in batches(many(4, instances=50), 10):
            index.apply(batch, END, outbox=True)
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert reader.lookup("1.2.826.0.1.3680043.1.0.1.1") is not None
    with pytest.raises(Unavailable):
        reader.mark_urgent("1.2.826.0.1.3680043.1.0")
    reader.close()


def test_writers_of_the_same_study_at_once_count_right(index: Index, database_url: str) -> None:
    other = Index.open(database_url)
    failed: list[BaseException] = []

    def write(into: Index, start: int) -> None:
        try:
            for number in range(start, start + 40):
                put(into, entry(f"1.{number}", series=f"2.{number % 3}"))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(into, n * 30)) for n, into in enumerate((index, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    (match,) = studies(index)
    assert (match.instance_count, match.series_count) == (70, 3), "ten of them came twice"
    assert index.pending_summary().count == 70
    other.close()


def test_a_reader_comes_too_early(tmp_path: Path, postgresql_url: str) -> None:
    for url in (sqlite_url(tmp_path / "none.db"), postgresql_url):
        with pytest.raises(Unavailable):
            Index.open(url, read_only=True)
    assert not (tmp_path / "none.db").exists()


def test_many_uids_in_one_key(index: Index) -> None:
    index.apply(list(many(40)), END, outbox=False)
    wanted = uids(studies(index))[:20] + [f"9.{number}" for number in range(5000)]
    assert len(studies(index, ("StudyInstanceUID", "\\".join(wanted)))) == 20


def test_a_scope_that_leaves_nobody_out_is_answered_as_the_others(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may see all that is here is answered from the rows' own counts."""
    three_wards(index)
    wards = ("a/none", "a/one", "a/two", "b/one", "c/none")
    scopes = [Scope(frozenset(some)) for n in (1, 2, 3, 4, 5) for some in combinations(wards, n)]
    questions = [Query(level, (), scope) for level in Level for scope in scopes]
    answers = [(index.search(question), index.count(question)) for question in questions]
    monkeypatch.setattr("archive.index.queries._widened", lambda connection, query: query)
    assert answers == [(index.search(question), index.count(question)) for question in questions]


def test_the_way_to_an_answer_does_not_change_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite is told whether many studies match: both ways are tried, of names and of wards."""
    for ward, seed in (("a/one", 1), ("b/one", 2)):
        entries = list(many(40, series=2, seed=seed))
        head = [replace(one.record.head.provenance, ward=ward) for one in entries]
        moved = [
            replace(one, record=replace(one.record, head=replace(one.record.head, provenance=source)))
            for one, source in zip(entries, head, strict=True)
        ]
        index.apply(moved, END, outbox=True)
    questions = [
        Query(level, keys, scope=scope, limit=limit, offset=offset, pending_only=pending)
        for level in (Level.STUDY, Level.SERIES, Level.PATIENT)
        for keys in ((("PatientName", "*smith*"),), (("PatientName", "*oss*"), ("PatientID", "*1*")), ())
        for scope in (EVERYTHING, Scope(frozenset({"a/one"})), Scope(frozenset({"b/one", "c/none"})))
        for limit, offset in ((None, 0), (5, 3))
        for pending in (False, True)
    ]
    answers = []
    for threshold in (0, 20_000):
        monkeypatch.setattr("archive.index.queries.COMMON_MIN", threshold)
        answers.append([(index.search(question), index.count(question)) for question in questions])
    assert answers[0] == answers[1]
    assert sum(bool(matches) for matches, _ in answers[0]) > len(questions) // 2
