"""What the index holds after people decided: the two contents change places, and all counts follow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, select, text

from archive.database import sqlite_url
from archive.index.index import Index
from archive.index.rows import split
from archive.index.schema import (
    conflict,
    holding,
    instance,
    outbox,
    patient,
    removed,
    series,
    series_ward,
    study,
)
from archive.model import (
    Attributes,
    ConflictState,
    Fact,
    FactKind,
    IndexEntry,
    Level,
    Position,
    Query,
    Record,
    RecordKind,
)
from tests.archive.entries import empty, entry

END = Position(1, 1 << 40)
_numbers = itertools.count(1)


class Known:
    """The packs, as far as an index reads them: attributes by content."""

    def __init__(self) -> None:
        self.attributes: dict[tuple[str, bytes], Attributes] = {}

    def add(self, entries: Sequence[IndexEntry]) -> None:
        for one in entries:
            self.attributes[(one.record.head.sop_instance_uid, one.record.digest)] = one.attributes

    def read(self, record: Record) -> Attributes | None:
        return self.attributes.get((record.head.sop_instance_uid, record.digest))


@pytest.fixture
def index(database_url: str) -> Iterator[Index]:
    opened = Index.open(database_url)
    yield opened
    opened.close()


def put(index: Index, *entries: IndexEntry, outbox: bool = True) -> None:
    known = Known()
    known.add(entries)
    old = index._read

    def read(record: Record) -> Attributes | None:
        return known.read(record) or old(record)

    index.read_attributes_with(read)
    index.apply(entries, END, outbox=outbox)


def fact_about(kind: FactKind, one: IndexEntry, **rest: Any) -> Fact:
    return Fact(kind, one.record.head.sop_instance_uid, one.record.digest, rest.get("ward", "a/one"),
                rest.get("at_us", 50), rest.get("detail", "anna"))  # fmt: skip


WRONG = {"PatientName": "Rossi^Mario", "PatientID": "123"}
RIGHT = {"PatientName": "Rossi^Maria", "PatientID": "124", "PatientSex": "F"}


def test_accepting_gives_the_study_to_the_right_patient_and_back(index: Index) -> None:
    other = entry("1.2", at_us=2, patient_fields=RIGHT)
    first = entry("1.1", at_us=1, patient_fields=WRONG)
    second = entry("1.1", content="x", kind=RecordKind.CONFLICT, at_us=3, patient_fields=RIGHT)
    put(index, first, other)
    before = index.dump()
    put(index, second)
    index.apply_facts([fact_about(FactKind.ACCEPTED, second)], END, outbox=True)
    assert consistent(index) == []
    (found,) = index.search(Query(Level.STUDY, (("PatientID", "124"),)))
    assert found.patient["PatientName"] == "Rossi^Maria" and found.instance_count == 2
    assert index.search(Query(Level.STUDY, (("PatientID", "123"),))) == []
    assert [m.patient["PatientID"] for m in index.search(Query(Level.PATIENT))] == ["124"]
    (row,) = index.conflicts(states=[ConflictState.REPLACED])
    assert row.other_digest == first.record.digest and row.decided_by == "anna" and row.decided_us == 50
    assert index.conflicts() == [] and index.totals().conflicts == 0
    assert index.lookup("1.1").digest == second.record.digest  # type: ignore[union-attr]
    index.apply_facts([fact_about(FactKind.ACCEPTED, first)], END, outbox=True)
    assert consistent(index) == []
    again = index.dump()
    for table in ("patient", "study", "series", "series_ward", "instance"):
        assert again[table] == before[table], table


def test_accepting_moves_an_instance_to_another_study_and_empties_the_first(index: Index) -> None:
    first = entry("1.1", study="7.1", series="7.1.1")
    moved = entry("1.1", content="x", kind=RecordKind.CONFLICT, study="7.2", series="7.2.1",
                  patient_fields=RIGHT, series_fields={"Modality": "MR"})  # fmt: skip
    put(index, first, moved)
    index.apply_facts([fact_about(FactKind.ACCEPTED, moved)], END, outbox=True)
    assert consistent(index) == []
    (found,) = index.search(Query(Level.STUDY))
    assert found.study["StudyInstanceUID"] == "7.2" and found.modalities == ("MR",)
    assert index.instances("7.1") == [] and len(index.instances("7.2")) == 1
    totals = index.totals()
    assert (totals.patients, totals.studies, totals.series, totals.instances) == (1, 1, 1, 1)
    name = (("PatientName", "*Mari*"),)  # long enough for the table of trigrams
    assert len(index.search(Query(Level.STUDY, name))) == 1
    index.apply_facts([fact_about(FactKind.ACCEPTED, first)], END, outbox=True)
    assert [m.study["StudyInstanceUID"] for m in index.search(Query(Level.STUDY))] == ["7.1"]


def test_a_patient_of_several_studies_keeps_what_the_others_say(index: Index) -> None:
    put(index, entry("1.1", at_us=1, study="7.1", patient_fields={"PatientID": "1", "PatientName": "Wrong"}),
        entry("2.1", at_us=2, study="7.2", patient_fields={"PatientID": "1", "PatientName": "Right"}),
        entry("3.1", at_us=3, study="7.3", patient_fields={"PatientID": "1", "PatientSex": "F"}))  # fmt: skip
    better = entry("1.1", content="x", kind=RecordKind.CONFLICT, at_us=4, study="7.1",
                   patient_fields={"PatientID": "9", "PatientName": "Other"})  # fmt: skip
    put(index, better)
    index.apply_facts([fact_about(FactKind.ACCEPTED, better)], END)
    assert consistent(index) == []
    people = {m.patient["PatientID"]: m for m in index.search(Query(Level.PATIENT))}
    assert people["1"].patient["PatientName"] == "Right" and people["1"].patient["PatientSex"] == "F"
    assert people["1"].study_count == 2 and people["9"].study_count == 1


def test_copies_at_other_wards_are_of_a_content(index: Index) -> None:
    first = entry("1.1")
    second = entry("1.1", content="x", kind=RecordKind.CONFLICT, ward="a/two")
    put(index, first, second, outbox=False)
    index.apply_facts([fact_about(FactKind.COPY, first, ward="b/one"),
                       fact_about(FactKind.COPY, second, ward="c/one")], END)  # fmt: skip
    assert index.search(Query(Level.STUDY))[0].wards == ("a/one", "b/one")
    index.apply_facts([fact_about(FactKind.ACCEPTED, second)], END)
    assert index.search(Query(Level.STUDY))[0].wards == ("a/two", "c/one")
    assert consistent(index) == []
    index.apply_facts([fact_about(FactKind.ACCEPTED, first)], END)
    assert index.search(Query(Level.STUDY))[0].wards == ("a/one", "b/one")
    assert consistent(index) == []


def test_the_region_is_told_what_was_accepted(index: Index) -> None:
    first, second = entry("1.1"), entry("1.1", content="x", kind=RecordKind.CONFLICT)
    put(index, first, second)
    receipts = [fact_about(FactKind.RECEIPT, one, detail="") for one in (first, second)]
    index.apply_facts(receipts, END, outbox=True)
    assert index.pending(10) == []
    index.apply_facts([fact_about(FactKind.ACCEPTED, second, at_us=77)], END, outbox=True)
    (row,) = index.pending(10)
    assert row.digest == second.record.digest and not row.conflict and row.accepted_us == 77
    index.apply_facts([fact_about(FactKind.RECEIPT, second, detail="")], END, outbox=True)
    assert len(index.pending(10)) == 1, "a receipt of what was sent before the decision does not settle it"
    index.apply_facts([fact_about(FactKind.RECEIPT, second, detail="accepted 77")], END, outbox=True)
    assert index.pending(10) == []


def test_what_was_never_sent_goes_as_what_it_is_now(index: Index) -> None:
    first, second = entry("1.1"), entry("1.1", content="x", kind=RecordKind.CONFLICT)
    put(index, first, second)
    index.apply_facts([fact_about(FactKind.ACCEPTED, second, at_us=77)], END, outbox=True)
    rows = {row.digest: row for row in index.pending(10)}
    assert rows[first.record.digest].conflict and rows[first.record.digest].accepted_us == 0
    assert not rows[second.record.digest].conflict and rows[second.record.digest].accepted_us == 77


def test_states_follow_the_facts_and_a_decision_is_not_taken_back_by_a_machine(index: Index) -> None:
    first, second = entry("1.1"), entry("1.1", content="x", kind=RecordKind.CONFLICT)
    put(index, first, second)
    key = ("1.1", second.record.digest)
    assert index.kept_state(*key) is ConflictState.OPEN and index.kept_state("1.1", b"") is None
    index.apply_facts([fact_about(FactKind.PROPOSED, second, detail="CT1")], END)
    assert index.kept_state(*key) is ConflictState.PROPOSED
    assert (index.totals().conflicts, index.totals().proposed) == (0, 1)
    index.apply_facts([fact_about(FactKind.REJECTED, second)], END)
    for kind in (FactKind.PROPOSED, FactKind.EQUIVALENT):
        index.apply_facts([fact_about(kind, second)], END)
        assert index.kept_state(*key) is ConflictState.REJECTED
    (row,) = index.conflicts(states=[ConflictState.REJECTED])
    assert row.decided_by == "anna"


def test_equivalents_stay_equivalent_when_they_change_places(index: Index) -> None:
    first, second = entry("1.1"), entry("1.1", content="x", kind=RecordKind.CONFLICT)
    put(index, first, second)
    index.apply_facts([fact_about(FactKind.EQUIVALENT, second, detail="")], END)
    assert (index.totals().conflicts, index.totals().equivalents) == (0, 1)
    index.apply_facts([fact_about(FactKind.ACCEPTED, second)], END)
    assert index.kept_state("1.1", first.record.digest) is ConflictState.EQUIVALENT


def test_refusals_are_kept_once_a_content(index: Index) -> None:
    one = entry("1.1", content="x")
    for at_us in (5, 6):
        index.apply_facts([fact_about(FactKind.REFUSED, one, at_us=at_us, detail="CT1")], END)
    (row,) = index.refusals()
    assert (row.sop_instance_uid, row.device, row.at_us) == ("1.1", "CT1", 5)
    assert index.was_refused("1.1", one.record.digest) and not index.was_refused("1.1", b"")


def test_a_decision_that_came_before_its_content_waits_for_it(index: Index) -> None:
    first, second = entry("1.1"), entry("1.1", content="x", kind=RecordKind.CONFLICT)
    index.apply_facts([fact_about(FactKind.ACCEPTED, second, at_us=77)], END, outbox=True)
    put(index, first, second)
    assert index.lookup("1.1").digest == second.record.digest  # type: ignore[union-attr]
    assert consistent(index) == []


def test_what_comes_behind_a_content_that_was_accepted_early_meets_the_decision(index: Index) -> None:
    second = entry("1.1", content="x", kind=RecordKind.CONFLICT, at_us=1)
    first = entry("1.1", at_us=2)
    dumps = []
    for groups in ([[second], [first]], [[second, first]]):
        empty(index)
        index.apply_facts([fact_about(FactKind.ACCEPTED, second, at_us=77)], END, outbox=True)
        for group in groups:
            put(index, *group)
        assert index.lookup("1.1").digest == second.record.digest  # type: ignore[union-attr]
        assert index.kept_state("1.1", first.record.digest) is ConflictState.OPEN, "nobody saw this one"
        dumps.append(index.dump())
    assert dumps[0] == dumps[1]


# Any history, in batches of any size, gives one index that agrees with itself.

UIDS, CONTENTS = ("1.1", "1.2", "1.3"), ("", "x", "y")


def made(uid: str, content: str, kind: RecordKind) -> IndexEntry:
    """A content's attributes are its own: what it says follows from its name."""
    number = UIDS.index(uid) * 3 + CONTENTS.index(content)
    return entry(
        uid, content=content, kind=kind, at_us=number + 1, ward=("a/one", "a/two")[number % 2],
        study=f"7.{number % 3}", series=f"7.{number % 3}.{number % 2}",
        patient_fields=({"PatientID": "1"}, {"PatientName": "N"}, {"PatientID": "2", "PatientSex": "F"},
                        {"PatientID": "1", "PatientName": "M"})[number % 4],
        series_fields={"Modality": ("CT", "MR")[number % 2]},
    )  # fmt: skip


RECORDS = st.builds(made, st.sampled_from(UIDS), st.sampled_from(CONTENTS),
                    st.sampled_from([RecordKind.INSTANCE, RecordKind.CONFLICT]))  # fmt: skip
KINDS = [FactKind.RECEIPT, FactKind.COPY, FactKind.SET_ASIDE, FactKind.RETRY, FactKind.DAMAGE,
         FactKind.ACCEPTED, FactKind.ACCEPTED, FactKind.ACCEPTED, FactKind.REJECTED, FactKind.PROPOSED,
         FactKind.EQUIVALENT, FactKind.REFUSED]  # fmt: skip
FACTS = st.builds(
    lambda kind, uid, content, ward, at, detail: fact_about(
        kind, made(uid, content, RecordKind.INSTANCE), ward=ward, at_us=at, detail=detail
    ),
    st.sampled_from(KINDS), st.sampled_from(UIDS), st.sampled_from(CONTENTS),
    st.sampled_from(["a/one", "b/one"]), st.integers(1, 9), st.sampled_from(["", "accepted 5"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def emptied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    opened = Index.open(sqlite_url(tmp_path_factory.mktemp("decisions") / "index.db"))
    yield opened
    opened.close()


@settings(deadline=None, max_examples=150)
@example(
    [fact_about(FactKind.ACCEPTED, made("1.1", "x", RecordKind.INSTANCE)),
     made("1.1", "x", RecordKind.CONFLICT), made("1.1", "", RecordKind.INSTANCE)],
    True,
)  # fmt: skip
@given(st.lists(st.one_of(RECORDS, FACTS), max_size=20), st.booleans())
def test_any_history_of_decisions_gives_one_index_that_agrees_with_itself(
    emptied: Index, events: list[IndexEntry | Fact], queued: bool
) -> None:
    known = Known()
    known.add([one for one in events if isinstance(one, IndexEntry)])
    emptied.read_attributes_with(known.read)
    grouped = [list(group) for _, group in itertools.groupby(events, lambda one: isinstance(one, Fact))]
    dumps = []
    for groups in ([[one] for one in events], grouped):
        empty(emptied)
        for group in groups:
            if isinstance(group[0], Fact):
                facts = [one for one in group if isinstance(one, Fact)]
                emptied.apply_facts(facts, END, outbox=queued)
            else:
                emptied.apply([one for one in group if isinstance(one, IndexEntry)], END, outbox=queued)
        assert consistent(emptied) == []
        dumps.append(emptied.dump())
    assert dumps[0] == dumps[1]


def consistent(index: Index) -> list[str]:
    """What in the index contradicts its instances."""
    return index._database.read(_contradictions)


def _contradictions(connection: Connection) -> list[str]:
    wrong: list[str] = []

    def rows(table: Any) -> list[Any]:
        return list(connection.execute(select(table)))

    instances, conflicts, gone = rows(instance), rows(conflict), rows(removed)
    hidden = {(row.sop_instance_uid, bytes(row.digest)) for row in gone}
    if {uid for uid, _ in hidden} & {row.sop_instance_uid for row in instances}:
        wrong.append("a UID is live and removed")
    live = {(row.sop_instance_uid, bytes(row.digest)) for row in instances}
    kept = {(row.sop_instance_uid, bytes(row.digest)) for row in conflicts}
    if live & kept:
        wrong.append("a content is live and kept")
    for row in rows(outbox):
        home = kept if row.conflict else hidden if row.hidden else live
        if (row.sop_instance_uid, bytes(row.digest)) not in home:
            wrong.append("the outbox mistakes a conflict")
        if row.accepted_us and row.conflict:
            wrong.append("a conflict is told to be accepted")
    holders: dict[str, set[str]] = {row.sop_instance_uid: {row.ward} for row in instances}
    for row in rows(holding):
        if row.sop_instance_uid in {uid for uid, _ in hidden}:
            continue
        if row.sop_instance_uid not in holders:
            wrong.append("a holding of nothing")
            continue
        holders[row.sop_instance_uid].add(row.ward)
    for table, key in ((study, 1), (series, 2)):
        found = {tuple(row._mapping[n] for n in _KEYS[:key]): row for row in rows(table)}
        wanted: dict[tuple[str, ...], list[Any]] = {}
        for row in instances:
            wanted.setdefault((row.study_instance_uid, row.series_instance_uid)[:key], []).append(row)
        if found.keys() != wanted.keys():
            wrong.append(f"{table.name}: rows")
            continue
        for name, members in wanted.items():
            row = found[name]
            wards = set().union(*(holders[one.sop_instance_uid] for one in members))
            if row.instance_count != len(members) or set(split(row.wards)) != wards:
                wrong.append(f"{table.name}: counts")
            if set(split(row.sop_classes)) != {one.sop_class_uid for one in members}:
                wrong.append(f"{table.name}: classes")
            if table is study and row.bytes != sum(one.payload_length for one in members):
                wrong.append("study: bytes")
    counts: dict[tuple[str, str, str], int] = {}
    for row in instances:
        for ward in holders[row.sop_instance_uid]:
            place = (row.study_instance_uid, row.series_instance_uid, ward)
            counts[place] = counts.get(place, 0) + 1
    if counts != {(*(row[:3]),): row.instance_count for row in rows(series_ward)}:
        wrong.append("series_ward")
    by_study: dict[str, list[Any]] = {}
    for row in rows(series):
        by_study.setdefault(row.study_instance_uid, []).append(row)
    for row in rows(study):
        parts = by_study.get(row.study_instance_uid, [])
        if row.series_count != len(parts) or set(split(row.modalities)) != {
            part.modality for part in parts if part.modality
        }:
            wrong.append("study: series")
    if {bytes(row.patient_hash) for row in rows(study)} != {bytes(row.patient_hash) for row in rows(patient)}:
        wrong.append("patients")
    return wrong


_KEYS = ("study_instance_uid", "series_instance_uid")


def test_an_index_from_before_decisions_comes_forward(database_url: str) -> None:
    """What the step adds is taken out again, as an older release would have left it."""
    index = Index.open(database_url)
    put(index, entry("1.1"), entry("1.1", content="x", kind=RecordKind.CONFLICT))

    def undo(connection: Connection) -> None:
        for statement in (
            "DROP INDEX conflict_state", "DROP TABLE refusal", "ALTER TABLE outbox DROP COLUMN accepted_us",
            *(f"ALTER TABLE conflict DROP COLUMN {name}"
              for name in ("state", "decided_by", "decided_us", "compared")),
            "UPDATE schema_version SET version = 2",
        ):  # fmt: skip
            connection.execute(text(statement))

    index._database.write(undo)
    index.close()
    index = Index.open(database_url)
    try:
        (row,) = index.conflicts()
        assert row.state is ConflictState.OPEN and row.decided_us == 0 and index.refusals() == []
        assert {one.accepted_us for one in index.pending(10)} == {0} and index.has_uncompared()
    finally:
        index.close()
