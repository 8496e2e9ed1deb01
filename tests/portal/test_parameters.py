"""QIDO-RS query strings (dicom-rules Q1 to Q8, OH1 to OH6)."""

from __future__ import annotations

import pytest

from archive.errors import InvalidQuery
from archive.model import LITERAL, Level, Rules
from portal.parameters import read


def test_keywords_tags_and_dotted_paths_are_one_thing() -> None:
    asked = read(
        [
            ("PatientName", "*Synth*"),
            ("00100020", "*P001*"),
            ("0040a730.00080100", "x"),
            ("RequestAttributesSequence.00400009", "S1"),
        ],
        Level.SERIES,
    )
    assert asked.keys == (
        ("PatientName", "*Synth*"),
        ("PatientID", "*P001*"),
        ("RequestAttributesSequence.ScheduledProcedureStepID", "S1"),
    )
    assert asked.warnings == [
        "The attribute ContentSequence.CodeValue is not supported for matching here and was ignored."
    ]


def test_uid_lists_by_comma_and_backslash() -> None:
    asked = read([("StudyInstanceUID", "1.2,1.3\\1.4"), ("StudyDescription", "a,b")], Level.STUDY)
    assert dict(asked.keys) == {"StudyInstanceUID": "1.2\\1.3\\1.4", "StudyDescription": "a,b"}


def test_include_fields_repeat_and_list() -> None:
    asked = read([("includefield", "00081030,00080060"), ("includefield", "PatientBirthDate")], Level.STUDY)
    assert asked.includefield == {"StudyDescription", "Modality", "PatientBirthDate"}
    assert read([("includefield", "all")], Level.STUDY).includefield == "all"


def test_paging_and_switches() -> None:
    asked = read([("limit", "101"), ("offset", "5"), ("fuzzymatching", "true")], Level.STUDY)
    assert (asked.limit, asked.offset, asked.warnings) == (101, 5, [])
    assert asked.rules == Rules(fuzzy_names=True)
    assert read([("fuzzymatching", "false")], Level.STUDY).rules == LITERAL
    both = [("emptyvaluematching", "true"), ("multiplevaluematching", "true")]
    assert read(both, Level.STUDY).rules == Rules(empty_values=True, multiple_values=True)


def test_known_but_unsupported_keys_match_nothing_and_warn() -> None:
    asked = read([("Modality", "CT"), ("00091001", "x"), ("PixelData", "")], Level.STUDY)
    assert asked.keys == ()
    assert len(asked.warnings) == 2  # an empty value asks for the attribute, and filters nothing


@pytest.mark.parametrize(
    "parameters",
    [
        [("NoSuchAttribute", "1")],
        [("PatientName", "a"), ("00100010", "b")],
        [("PatientName", "a"), ("PatientName", "b")],
        [("limit", "1"), ("limit", "2")],
        [("limit", "-1")],
        [("offset", "x")],
        [("limit", "٣")],
        [("fuzzymatching", "maybe")],
        [("includefield", "all,PatientName")],
        [("includefield", "NoSuchAttribute")],
        [("StudyInstanceUID", ",".join(["1.2"] * 1_001))],
        [("PatientName", "x" * 100_000)],
        [("<script>", "1")],
    ],
)
def test_wrong_syntax_is_refused(parameters: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidQuery):
        read(parameters, Level.STUDY)
