"""Matching by PS3.4 C.2.2.2: what keys mean, and that SQL on both databases means the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from archive.catalog import CATALOG
from archive.database import sqlite_url
from archive.errors import InvalidQuery
from archive.folding import comparable, fold
from archive.index.conditions import literal_run
from archive.index.index import Index
from archive.index.rows import fields_of, row_of
from archive.matching import fits, matches, parse, predicate_of
from archive.model import LITERAL, Level, Position, Query, Rules
from tests.archive.entries import empty, entry


def asked(keyword: str, value: str, stored: str, *, level: Level = Level.IMAGE) -> bool:
    """Whether a row with `stored` matches a query with `value`."""
    return all(matches(p, lambda _: stored) for p in parse(Query(level, ((keyword, value),))))


@pytest.mark.parametrize(
    ("keyword", "value", "stored", "expected"),
    [
        # single value: case-sensitive and whole (F5)
        ("PatientID", "P1", "P1", True),
        ("PatientID", "p1", "P1", False),
        ("PatientID", "P", "P1", False),
        ("PatientID", " P1 ", "P1", True),
        ("PatientID", "P1", "", False),
        # universal: an empty value and stars alone, also for what is unknown
        ("PatientID", "", "", True),
        ("PatientID", "*", "", True),
        ("StudyDate", "*", "20260101", True),
        ("InstanceNumber", "", "", True),
        # wildcards where the VR allows them (OH2: at both ends)
        ("PatientID", "*001*", "P0012", True),
        ("PatientID", "P?1", "P01", True),
        ("PatientID", "P?1", "P1", False),
        ("StudyDescription", "*brain*", "CT Brain", False),
        ("StudyDescription", "*Brain*", "CT Brain", True),
        ("StudyDescription", "100%*", "100% rest", True),
        ("StudyDescription", "100%*", "1000 rest", False),
        ("StudyDescription", "a_b*", "axb", False),
        ("StudyDescription", "a/b*", "a/b c", True),
        ("StudyDescription", "*", "", True),
        # lists of UIDs, joined by a backslash
        ("StudyInstanceUID", "1.2\\1.3", "1.3", True),
        ("StudyInstanceUID", "1.2\\1.3", "1.4", False),
        ("StudyInstanceUID", "1.2\\", "1.2", True),
        # codes: lists match when one does
        ("Modality", "CT\\MR", "MR", True),
        ("Modality", "C?", "CT", True),
        ("Modality", "CT\\M*", "MR", True),
        # any of several stored values
        ("ImageType", "PRIMARY", "ORIGINAL\\PRIMARY", True),
        ("ImageType", "PRI", "ORIGINAL\\PRIMARY", False),
        ("ImageType", "O*Y", "ORIGINAL\\PRIMARY", False),
        ("ImageType", "P*M*Y", "ORIGINAL\\PRIMARY\\AXIAL", True),
        ("OtherPatientIDs", "*2", "A1\\A2", True),
        # integers by value
        ("InstanceNumber", "007", "7", True),
        ("Rows", "512", "512", True),
        # dates
        ("StudyDate", "20260102", "20260102", True),
        ("StudyDate", "2026.01.02", "20260102", True),
        ("StudyDate", "20260101-20260131", "20260101", True),
        ("StudyDate", "20260101-20260131", "20260131", True),
        ("StudyDate", "20260101-20260131", "20260201", False),
        ("StudyDate", "-20260131", "19990101", True),
        ("StudyDate", "20260101-", "20251231", False),
        ("StudyDate", "-20260131", "", False),
        ("StudyDate", "2026.01.01-2026.01.31", "20260115", True),
        # times, in every precision
        ("StudyTime", "10", "103059.5", True),
        ("StudyTime", "10", "11", False),
        ("StudyTime", "10-1030", "10", True),
        ("StudyTime", "10-1030", "103059.999999", True),
        ("StudyTime", "10-1030", "1031", False),
        ("StudyTime", "10-1030", "0959", False),
        ("StudyTime", "100000.000-", "10", True),
        ("StudyTime", "103015-", "1030", False),
        ("StudyTime", "103000-", "1030", True),
        ("StudyTime", "-103000", "1030", True),
        ("StudyTime", "-00", "", False),
        ("StudyTime", "00-", "000000", True),
        ("StudyTime", "10:30:00-10:31", "103100", True),
        ("StudyTime", "101010.5", "101010.59", True),
        ("StudyTime", "101010.5", "101010.6", False),
        ("StudyTime", "235960", "235960", True),
        # names: no case, no accents, any component group
        ("PatientName", "ROSSI^maria", "Rossi^Maria", True),
        ("PatientName", "Rossi^Maria", "Rossi^Maria^^", True),
        ("PatientName", "Rossi", "Rossi^Maria", False),
        ("PatientName", "Rossi*", "Rossi^Maria", True),
        ("PatientName", "*mull*", "Müller^Jörg", True),
        ("PatientName", "*MÜLL*", "Muller^Jorg", True),
        ("PatientName", "weiss*", "Weiß", True),
        ("PatientName", "*solvei*", "Ødegård^Sølvei", True),
        ("PatientName", "oedeg*", "Ødegård", False),
        ("PatientName", "山田*", "Yamada^Tarou=山田^太郎=やまだ^たろう", True),
        ("PatientName", "yamada^tarou", "Yamada^Tarou=山田^太郎", True),
        ("PatientName", "Yamada*=山田*", "Yamada^Tarou=山田^太郎", True),
        ("PatientName", "Yamada*=鈴木*", "Yamada^Tarou=山田^太郎", False),
        ("PatientName", "Yama*太郎", "Yamada^Tarou=山田^太郎", False),
        ("PatientName", "r?ssi*", "Rossi", True),
        ("PatientName", "*smith*", "Goldsmith^Ann", True),
        ("OperatorsName", "bob*", "Alice\\Bob^B", True),
        ("OperatorsName", "al*bob", "Alice\\Bob", False),
        ("PatientName", "*a*a*a*a*a*a*a*a*a*b*", "a" * 60, False),
        # text in which a backslash is a character
        ("PatientComments", "*a\\b*", "x a\\b y", True),
        ("RequestAttributesSequence.ScheduledProcedureStepID", "S2", "S1\\S2", True),
    ],
)  # fmt: skip
def test_a_key_matches(keyword: str, value: str, stored: str, expected: bool) -> None:
    assert asked(keyword, value, stored) is expected


@pytest.mark.parametrize(
    ("value", "stored", "expected"),
    [
        ("20260101", "20260101120000", True),
        ("20260101", "2026010212", False),
        ("2026", "20261231235960.999999", True),
        ("2026-2027", "20271231", True),
        ("2026-2027", "2028", False),
        ("-20260101", "202601012359", True),
        ("202605-", "20260430", False),
        ("20260101000000", "20260101", True),
        ("20260101120000.5", "20260101120000.59", True),
        ("20260101120000+0100", "20260101110000", True),
        ("20260101120000", "20260101130000+0100", True),
        ("20260101000000+0100", "20251231230000+0000", True),
        ("202601011200-0500-202601011300-0500", "202601011730+0000", True),
        ("202601011200-0500", "202601011700+0000", True),
        ("202601011200-0500-", "202601011659+0000", False),
        ("20260101", "", False),
    ],
)
def test_a_date_and_time_in_one(value: str, stored: str, expected: bool) -> None:
    """DT, which the worklist has: ranges beside offsets from UTC (PS3.4 C.2.2.2.5.3)."""
    predicate = predicate_of("ScheduledProcedureStepStartDateTime", "DT", value)
    assert predicate is not None
    assert matches(predicate, lambda _: comparable("DT", stored)) is expected


@pytest.mark.parametrize("value", ["-", "2026-2027-2028", "20261", "202613", "2026010112000", "now"])
def test_no_date_and_time(value: str) -> None:
    with pytest.raises(InvalidQuery):
        predicate_of("X", "DT", value)


def test_a_predicate_needs_no_catalogue() -> None:
    assert predicate_of("ScheduledStationAETitle", "AE", "*") is None
    predicate = predicate_of("ScheduledStationAETitle", "AE", "CT?", multiple=True)
    assert predicate is not None
    assert matches(predicate, lambda _: "MR1\\CT1")
    assert not matches(predicate, lambda _: "MR1\\CT12")


@pytest.mark.parametrize(
    ("level", "keyword", "value"),
    [
        (Level.STUDY, "Nonsense", ""),
        (Level.STUDY, "00100010", "x"),
        (Level.STUDY, "StudyDate", "20260132"),
        (Level.STUDY, "StudyDate", "2026"),
        (Level.STUDY, "StudyDate", "-"),
        (Level.STUDY, "StudyDate", "20260101-20260102-20260103"),
        (Level.STUDY, "StudyDate", "2026*"),
        (Level.STUDY, "StudyDate", "20260101\\20260102"),
        (Level.STUDY, "StudyTime", "25"),
        (Level.STUDY, "StudyTime", "103"),
        (Level.STUDY, "StudyTime", "10300"),
        (Level.STUDY, "StudyInstanceUID", "1.2.*"),
        (Level.STUDY, "PatientID", "A\\B"),
        (Level.STUDY, "PatientName", "="),
        (Level.STUDY, "PatientName", "x" * 2000),
        (Level.STUDY, "SeriesDescription", "x"),
        (Level.PATIENT, "StudyDate", "20260101"),
        (Level.PATIENT, "ModalitiesInStudy", "CT"),
        (Level.STUDY, "NumberOfStudyRelatedInstances", "5"),
        (Level.STUDY, "RetrieveURL", "x"),
        (Level.IMAGE, "InstanceNumber", "one"),
        (Level.IMAGE, "Rows", "5*"),
    ],
)
def test_what_is_no_key_or_no_value_is_refused_without_repeating_it(
    level: Level, keyword: str, value: str
) -> None:
    with pytest.raises(InvalidQuery) as caught:
        parse(Query(level, ((keyword, value),)))
    assert len(value) < 5 or value not in str(caught.value)


def test_keys_are_bounded() -> None:
    with pytest.raises(InvalidQuery):
        parse(Query(Level.STUDY, (("PatientID", ""),) * 101))
    with pytest.raises(InvalidQuery):
        parse(Query(Level.STUDY, (("StudyInstanceUID", "\\".join(["1"] * 10_001)),)))


def test_empty_keys_ask_nothing_at_any_level() -> None:
    for attribute in CATALOG:
        if attribute.level is Level.PATIENT:
            assert parse(Query(Level.PATIENT, ((attribute.keyword, ""),))) == ()
    assert parse(Query(Level.STUDY, (("SeriesDescription", ""), ("NumberOfStudyRelatedSeries", "")))) == ()


def test_every_indexed_attribute_can_be_matched() -> None:
    samples = {"DA": "20260101", "TM": "10", "IS": "1", "US": "1", "UI": "1.2", "PN": "A"}
    for attribute in CATALOG:
        value = samples.get(attribute.vr, "A")
        assert parse(Query(Level.IMAGE, ((attribute.keyword, value),))), attribute.keyword
        assert asked(attribute.keyword, value, value), attribute.keyword


@pytest.mark.parametrize(
    ("date", "time", "stored", "combined", "apart"),
    [
        ("20260101-20260103", "10-12", ("20260102", "23"), True, False),
        ("20260101-20260103", "10-12", ("20260101", "09"), False, False),
        ("20260101-20260103", "10-12", ("20260101", "10"), True, True),
        ("20260101-20260103", "10-12", ("20260103", "1230"), True, True),
        ("20260101-20260103", "10-12", ("20260103", "13"), False, False),
        ("20260101-20260103", "10-12", ("20260103", ""), False, False),
        ("20260101-20260103", "10-12", ("20260102", ""), True, False),
        ("20260101-", "10-", ("20260102", "01"), True, False),
        ("-20260103", "-12", ("20251231", "23"), True, False),
        ("-20260103", "10-", ("20260103", "01"), True, False),
        ("20260101", "10-12", ("20260101", "11"), True, True),
        ("20260101", "10-12", ("20260101", "13"), False, False),
    ],
)  # fmt: skip
def test_date_and_time_are_one_range_only_when_asked(
    date: str, time: str, stored: tuple[str, str], combined: bool, apart: bool
) -> None:
    row = {"StudyDate": stored[0], "StudyTime": stored[1]}
    keys = (("StudyDate", date), ("StudyTime", time))
    for together, expected in ((True, combined), (False, apart)):
        predicates = parse(Query(Level.STUDY, keys, combine_datetime=together))
        assert all(matches(predicate, row.__getitem__) for predicate in predicates) is expected


@pytest.mark.parametrize(
    ("key", "stored", "expected"),
    [
        ("maria rossi", "Rossi^Maria", True),
        ("rossi^maria", "Rossi^Anna Maria", True),
        ("Mar Ros", "Rossi^Maria", True),
        ("rossi,m", "Rossi^Maria", True),
        ("muller", "Müller^Jörg", True),
        ("weiss jorg", "Weiß^Jörg", True),
        ("taro", "Yamada^Tarou=山田^太郎=やまだ^たろう", True),
        ("太 yamada", "Yamada^Tarou=山田^太郎=やまだ^たろう", True),
        ("marie", "Curie^Anne-Marie", True),
        ("ossi", "Rossi^Maria", False),
        ("*ossi", "Rossi^Maria", True),
        ("*ossi mar*", "Rossi^Maria", True),
        ("r?ssi", "Rossi^Maria", True),
        ("ros*ia", "Rossi^Maria", True),  # as it matches literally
        ("rossi bianchi", "Rossi^Maria", False),
        ("rossi", "", False),
    ],
)
def test_fuzzy_names(key: str, stored: str, expected: bool) -> None:
    query = Query(Level.STUDY, (("PatientName", key),), rules=Rules(fuzzy_names=True))
    assert all(matches(predicate, lambda _: stored) for predicate in parse(query)) is expected


def test_two_quotation_marks_ask_for_what_has_no_value() -> None:
    """PS3.4 C.2.2.2.7, and only where that was agreed on."""
    agreed = predicate_of("AccessionNumber", "SH", '""', rules=Rules(empty_values=True))
    literal = predicate_of("AccessionNumber", "SH", '""')
    assert agreed is not None and literal is not None
    assert [matches(agreed, lambda _, v=value: v) for value in ("", "A")] == [True, False]  # type: ignore[misc]
    assert [matches(literal, lambda _, v=value: v) for value in ("", '""')] == [False, True]  # type: ignore[misc]


def test_each_of_several_values_is_to_be_there() -> None:
    """PS3.4 C.2.2.2.8: of an attribute that may have several; else a list of codes is a choice."""
    keys = (("ModalitiesInStudy", "CT\\PT"),)
    expectations = ((LITERAL, [True, True, False]), (Rules(multiple_values=True), [False, True, False]))
    for rules, expected in expectations:
        predicates = parse(Query(Level.STUDY, keys, rules=rules))
        stored = ["CT", "CT\\MR\\PT", "MR"]
        assert [all(matches(p, lambda _, v=v: v) for p in predicates) for v in stored] == expected  # type: ignore[misc]
    for key in ("CT\\P*", "CT\\P?"):
        with pytest.raises(InvalidQuery):
            parse(Query(Level.STUDY, (("ModalitiesInStudy", key),), rules=Rules(multiple_values=True)))


def test_keys_into_a_sequence_are_met_by_one_item() -> None:
    """PS3.4 C.2.2.2.6"""
    step = "RequestAttributesSequence.ScheduledProcedureStepID"
    procedure = "RequestAttributesSequence.RequestedProcedureID"
    row = {step: "S1\\S2\\S3", procedure: "R1\\R2\\"}
    for first, second, expected in (
        ("S1", "R1", True), ("S2", "R*", True), ("S1", "R2", False), ("S3", "R*", False),
    ):  # fmt: skip
        predicates = parse(Query(Level.SERIES, ((step, first), (procedure, second))))
        assert all(matches(predicate, row.__getitem__) for predicate in predicates) is expected


@pytest.mark.parametrize(
    ("keys", "stored", "expected"),
    [
        # asked in +0100; what is stored in +0900 has clocks that are 8 hours ahead
        ({"StudyDate": "20260101"}, ("20260102", "0759", "+0900"), True),
        ({"StudyDate": "20260101"}, ("20260102", "0800", "+0900"), False),
        ({"StudyDate": "20260101"}, ("20260101", "0759", "+0900"), False),
        ({"StudyDate": "20260101"}, ("20260101", "08", "+0900"), True),
        ({"StudyDate": "20260101-20260102"}, ("20260103", "07", "+0900"), True),
        ({"StudyDate": "20260102-"}, ("20260102", "07", "+0900"), False),
        ({"StudyDate": "20260101"}, ("20260101", "2300", "+0100"), True),
        ({"StudyDate": "20260101"}, ("20260101", "", "+0100"), True),
        ({"StudyDate": "20260101"}, ("20260101", "0100", ""), True),
        ({"StudyDate": "20260101"}, ("20260101", "0100", "nonsense"), True),
        ({"StudyTime": "20-23"}, ("20260101", "05", "+0900"), True),
        ({"StudyTime": "20-23"}, ("20260101", "20", "+0900"), False),
        ({"StudyTime": "12-20"}, ("20260101", "21", "+0900"), True),
        ({"StudyTime": "12-20"}, ("20260101", "0430", "+0900"), True),
        ({"StudyTime": "12-20"}, ("20260101", "0530", "+0900"), False),
        ({"StudyTime": "12-20"}, ("20260101", "", "+0900"), False),
        ({"StudyTime": "1015"}, ("20260101", "1445", "+0530"), True),
    ],
)  # fmt: skip
def test_dates_and_times_in_a_zone(
    keys: dict[str, str], stored: tuple[str, str, str], expected: bool
) -> None:
    row = dict(zip(("StudyDate", "StudyTime", "TimezoneOffsetFromUTC"), stored, strict=True))
    predicates = parse(Query(Level.STUDY, tuple(keys.items()), rules=Rules(timezone="+0100")))
    assert all(matches(predicate, row.__getitem__) for predicate in predicates) is expected


def test_folding() -> None:
    assert fold("ÀÉÎÕÜ Ñç ŁódŹ") == "aeiou nc lodz"
    assert fold("ﾔﾏﾀﾞ") == fold("ヤマダ")
    assert fold("ヤマタ") != fold("ヤマダ"), "marks of kana are letters of their own"
    assert fold("김") == "김"


@given(st.text("ab*?", max_size=8), st.text("ab", max_size=8))
def test_patterns_fit_as_defined(pattern: str, value: str) -> None:
    def slow(pattern: str, value: str) -> bool:
        if not pattern:
            return not value
        if pattern[0] == "*":
            return slow(pattern[1:], value) or (bool(value) and slow(pattern, value[1:]))
        return bool(value) and pattern[0] in ("?", value[0]) and slow(pattern[1:], value[1:])

    assert fits(pattern, value) == slow(pattern, value)


# SQL says what Python says.

TEXT = st.text("abAB1é%_/\\=^*? .-\"'(ß", max_size=6)
ONE = TEXT.map(lambda text: text.replace("\\", "").strip())
MANY = st.lists(ONE, max_size=3).map("\\".join)
NAME = st.text("abAÉé^= øß%_\\", max_size=10)
DATE = st.sampled_from(
    ["20260101", "20260102", "20260131", "20260201", "19991231", "2026.01.02", "", "20269999"]
)
TIME = st.sampled_from(
    ["10", "1000", "1030", "103000", "103000.5", "10:30", "103059.999999", "11", "00", "", "235960"]
)
CODES = st.lists(st.sampled_from(["CT", "MR", "C", "", "CT1"]), max_size=3).map("\\".join)
UIDS = st.sampled_from(["1.2", "1.2.3", "1.20", "", "1.2.840"])
NUMBER = st.sampled_from(["1", "01", "-3", "12", "", "x"])

STORED: dict[str, st.SearchStrategy[str]] = {
    "PatientName": NAME,
    "PatientID": ONE,
    "PatientComments": TEXT,
    "OtherPatientIDs": MANY,
    "StudyDate": DATE,
    "StudyTime": TIME,
    "StudyDescription": ONE,
    "ReferringPhysicianName": NAME,
    "NameOfPhysiciansReadingStudy": NAME,
    "Modality": st.sampled_from(["CT", "MR", ""]),
    "SeriesNumber": NUMBER,
    "OperatorsName": NAME,
    "FrameOfReferenceUID": UIDS,
    "ImageType": CODES,
    "InstanceNumber": NUMBER,
    "ContentDate": DATE,
    "ContentTime": TIME,
    "Rows": NUMBER,
    "RequestAttributesSequence.ScheduledProcedureStepID": MANY,
    "RequestAttributesSequence.RequestedProcedureID": MANY,
}
LEVELS = {attribute.keyword: attribute.level for attribute in CATALOG}


@contextmanager
def fresh_index(url: str) -> Iterator[Callable[[list[dict[str, str]]], Index]]:
    """An index that can be emptied and filled again: a database for each example would take too long."""
    index = Index.open(url)

    def fill(rows: list[dict[str, str]]) -> Index:
        empty(index)
        entries = []
        for number, row in enumerate(rows):
            by_level = {level: {k: v for k, v in row.items() if LEVELS[k] is level} for level in Level}
            entries.append(entry(
                f"1.9.{number}", study=f"1.7.{number}", series=f"1.8.{number}", sequence=number,
                patient_fields=by_level[Level.PATIENT], study_fields={"StudyID": "", **by_level[Level.STUDY]},
                series_fields={"Laterality": "", **by_level[Level.SERIES]},
                instance_fields={"CompletionFlag": "", **by_level[Level.IMAGE]},
            ))  # fmt: skip
        index.apply(entries, Position(1, 1), outbox=False)
        return index

    try:
        yield fill
    finally:
        index.close()


def expected_rows(query: Query, rows: list[dict[str, str]]) -> set[int]:
    predicates = parse(query)
    found = set()
    for number, row in enumerate(rows):
        # What the index keeps is compared: dates without dots, integers without leading zeros.
        kept: dict[str, str] = {}
        for level in Level:
            fields = {k: v for k, v in row.items() if LEVELS[k] is level}
            kept |= fields_of(level, row_of(level, fields))
        if query.level is Level.STUDY:
            kept["ModalitiesInStudy"] = kept.get("Modality", "")
        if all(matches(predicate, partial(_value, kept)) for predicate in predicates):
            found.add(number)
    return found


def _value(row: dict[str, str], keyword: str) -> str:
    return row.get(keyword, "")


@pytest.fixture(scope="module")
def filled_sqlite(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[list[dict[str, str]]], Index]]:
    with fresh_index(sqlite_url(Path(tmp_path_factory.mktemp("matching")) / "index.db")) as fill:
        yield fill


@st.composite
def questions(draw: st.DrawFn) -> tuple[Query, list[dict[str, str]]]:
    """A few rows, and keys made from what is stored in them, so that many match and as many nearly do."""
    level = draw(st.sampled_from([Level.IMAGE, Level.STUDY]))
    agreed = Rules(fuzzy_names=True, empty_values=True, multiple_values=True)
    rules = draw(st.sampled_from([LITERAL, LITERAL, agreed, replace(agreed, timezone="-0530")]))
    usable = [k for k in STORED if level is Level.IMAGE or LEVELS[k] in (Level.PATIENT, Level.STUDY)]
    names = draw(st.lists(st.sampled_from([*usable, "Modality"]), min_size=1, max_size=2, unique=True))
    dated = draw(st.sampled_from([None, None, ("StudyDate", "StudyTime"), ("ContentDate", "ContentTime")]))
    if dated is not None and (level is Level.IMAGE or dated[0] == "StudyDate"):
        names = list(dated)
    if level is Level.IMAGE and draw(st.integers(0, 7)) == 0:
        names = [keyword for keyword in STORED if keyword.startswith("Request")]
    kept = {name: STORED[name] for name in names}
    if rules.timezone:
        kept["TimezoneOffsetFromUTC"] = st.sampled_from(["", "+0100", "-0530", "+1400", "-1200", "0100"])
    rows = draw(st.lists(st.fixed_dictionaries(kept), min_size=1, max_size=4))
    keys = tuple((name, draw(keys_near(name, [row[name] for row in rows]))) for name in names)
    return Query(level, keys, combine_datetime=draw(st.booleans()), rules=rules), rows


@st.composite
def keys_near(draw: st.DrawFn, keyword: str, stored: list[str]) -> str:
    value = draw(st.one_of(st.sampled_from(stored), st.sampled_from(stored), STORED[keyword]))
    vr = next(attribute.vr for attribute in CATALOG if attribute.keyword == keyword)
    if vr in ("DA", "TM"):
        return draw(st.sampled_from(["{0}", "{0}-{1}", "{0}-", "-{1}"])).format(value, draw(STORED[keyword]))
    if vr in ("UI", "IS", "US"):
        return value
    if draw(st.integers(0, 9)) == 0:
        return '""'
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(value)))
        end = draw(st.integers(start, len(value)))
        part = draw(st.sampled_from(["*", "?" * (end - start), value[start:end].swapcase(), "a", "\\"]))
        value = value[:start] + part + value[end:]
    return value


def check(fill: Callable[[list[dict[str, str]]], Index], query: Query, rows: list[dict[str, str]]) -> None:
    try:
        expected = expected_rows(query, rows)
    except InvalidQuery:
        return
    index = fill(rows)
    found = index.search(query)
    assert {int(match.study["StudyInstanceUID"].rpartition(".")[2]) for match in found} == expected
    assert index.count(query) == len(found)


# No pattern runs across the values of one attribute, nor across the component groups of a name.
ACROSS = (
    (
        Query(Level.IMAGE, (("OperatorsName", "a*d"),)),
        [{"OperatorsName": v} for v in ("ab\\cd", "abd", "a=d")],
    ),
    (Query(Level.IMAGE, (("OperatorsName", "a?d"),)), [{"OperatorsName": v} for v in ("a\\d", "abd", "a=d")]),
    (Query(Level.IMAGE, (("ImageType", "C*R"),)), [{"ImageType": v} for v in ("CT\\MR", "CAR", "X\\CR\\Y")]),
    (
        Query(Level.STUDY, (("PatientName", "*b?c*"),)),
        [{"PatientName": v} for v in ("ab=cd", "abxcd", "b=c=bxc")],
    ),
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(questions())
@example(ACROSS[0])
@example(ACROSS[1])
@example(ACROSS[2])
@example(ACROSS[3])
def test_sqlite_matches_as_python_does(
    filled_sqlite: Callable[[list[dict[str, str]]], Index], question: tuple[Query, list[dict[str, str]]]
) -> None:
    check(filled_sqlite, *question)


def test_postgresql_matches_as_python_does(postgresql_url: str) -> None:
    with fresh_index(postgresql_url) as fill:

        @settings(deadline=None, max_examples=150)
        @given(questions())
        def every_question(question: tuple[Query, list[dict[str, str]]]) -> None:
            check(fill, *question)

        for question in ACROSS:
            check(fill, *question)
        every_question()


@given(st.text("abAÉ^= *?", min_size=1, max_size=8), NAME, st.booleans())
def test_what_trigrams_look_for_is_in_every_match(pattern: str, stored: str, fuzzy: bool) -> None:
    try:
        rules = Rules(fuzzy_names=fuzzy)
        predicates = parse(Query(Level.STUDY, (("PatientName", pattern),), rules=rules))
    except InvalidQuery:
        return
    folded = row_of(Level.PATIENT, {"PatientName": stored})["patient_name_folded"]
    for predicate in predicates:
        run = literal_run(predicate)
        if run is not None and matches(predicate, lambda _: stored):
            assert run in folded
