"""C-FIND responses' identifiers, made from matches and read back by pydicom."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from archive.catalog import BY_KEYWORD, COMPUTED
from archive.dataset.answers import Answers
from archive.dataset.questions import Question
from archive.model import Level, Match
from tests.archive.matches import IMAGE, SERIES, STUDY
from tests.datasets import BIG_ENDIAN, EXPLICIT, IMPLICIT

SYNTAXES = (IMPLICIT, EXPLICIT, BIG_ENDIAN)


def octets_of(match: Match, wanted: list[str], *, level: Level, syntax: str = EXPLICIT,
              character_set: str = "", retrieve_ae: str = "", timezone: str = "",
              keys: tuple[tuple[str, str], ...] = ()) -> bytes:  # fmt: skip
    question = Question(level, keys, tuple(wanted), (), character_set.encode())
    answers = Answers(question, retrieve_ae, implicit=syntax == IMPLICIT, little=syntax != BIG_ENDIAN,
                      timezone=timezone)  # fmt: skip
    return answers.encode(match)


def answer(match: Match, wanted: list[str], *, level: Level, syntax: str = EXPLICIT, **rest: Any) -> Dataset:
    """The identifier as a peer reads it."""
    octets = octets_of(match, wanted, level=level, syntax=syntax, **rest)
    found = read_dataset(BytesIO(octets), syntax == IMPLICIT, syntax != BIG_ENDIAN)
    assert [element.tag for element in found] == sorted(element.tag for element in found)
    return found


@pytest.mark.parametrize("transfer_syntax", SYNTAXES)
def test_a_response_holds_what_was_asked(transfer_syntax: str) -> None:
    asked = [
        "PatientName", "PatientID", "IssuerOfPatientID", "StudyInstanceUID", "StudyDate", "AccessionNumber",
        "ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances", "PatientWeight",
        "PatientSize", "InstanceAvailability",
    ]  # fmt: skip
    found = answer(STUDY, asked, level=Level.STUDY, retrieve_ae="MISS", syntax=transfer_syntax)
    assert found.QueryRetrieveLevel == "STUDY"
    assert found.SpecificCharacterSet == "ISO_IR 192"
    assert found.RetrieveAETitle == "MISS"
    assert found.PatientName == "Müller^Jürgen=山田"
    assert found.IssuerOfPatientID == "SANMARTINO"
    assert found.AccessionNumber == ""
    assert list(found.ModalitiesInStudy) == ["CT", "SR"]
    assert (found.NumberOfStudyRelatedSeries, found.NumberOfStudyRelatedInstances) == (2, 7)
    assert found.PatientWeight == 80.5
    assert found.PatientSize is None  # "tall" can't be sent as a number
    assert found.InstanceAvailability == "ONLINE"
    assert len(found) == len(asked) + 3


@pytest.mark.parametrize("transfer_syntax", SYNTAXES)
def test_numbers_are_written_in_the_byte_order(transfer_syntax: str) -> None:
    found = answer(IMAGE, ["Rows", "ImageType", "InstanceNumber"], level=Level.IMAGE, syntax=transfer_syntax)
    assert (found.Rows, list(found.ImageType), found.InstanceNumber) == (512, ["ORIGINAL", "PRIMARY"], None)


def test_a_response_holds_no_more_than_was_asked() -> None:
    """F4: the level, the availability, and no character set where it is all ASCII."""
    found = answer(STUDY, ["StudyDate"], level=Level.STUDY)
    expected = ["StudyDate", "QueryRetrieveLevel", "InstanceAvailability"]
    assert [str(element.keyword) for element in found] == expected
    assert "InstanceAvailability" not in answer(STUDY, ["PatientID"], level=Level.PATIENT)


def test_what_has_to_be_fetched_is_nearline() -> None:
    away = Match(Level.SERIES, "", {}, nearline=True)
    assert answer(away, [], level=Level.SERIES).InstanceAvailability == "NEARLINE"


def test_a_study_tells_its_one_modality_where_a_series_attribute_is_asked_for() -> None:
    assert answer(STUDY, ["Modality"], level=Level.STUDY).Modality == ""  # CT and SR
    one = Match(Level.STUDY, "", {}, modalities=("CT",), sop_classes=("1.2.3",))
    found = answer(one, ["Modality", "SOPClassUID"], level=Level.STUDY)
    assert (found.Modality, found.SOPClassUID) == ("CT", "1.2.3")


def test_lists_of_the_study_are_not_told_of_a_series() -> None:
    assert not answer(SERIES, ["ModalitiesInStudy"], level=Level.SERIES).ModalitiesInStudy


def test_items_come_back_as_items() -> None:
    found = answer(SERIES, ["RequestAttributesSequence"], level=Level.SERIES)
    items = found.RequestAttributesSequence
    assert [item.get("ScheduledProcedureStepID", "") or "" for item in items] == ["A", "B", ""]
    assert [item.get("RequestedProcedureID", "") or "" for item in items] == ["", "", "R"]
    empty = answer(STUDY, ["RequestAttributesSequence"], level=Level.SERIES)
    assert len(empty.RequestAttributesSequence) == 0


def test_items_that_do_not_match_are_left_out() -> None:
    """PS3.4 C.2.2.2.6"""
    step = "RequestAttributesSequence.ScheduledProcedureStepID"
    found = answer(SERIES, [step], level=Level.SERIES, keys=((step, "B*"),))
    assert [item.ScheduledProcedureStepID for item in found.RequestAttributesSequence] == ["B"]


@pytest.mark.parametrize(
    ("asked", "name", "expected"),
    [
        ("ISO_IR 100", "Müller^Jörg", "ISO_IR 100"),
        ("ISO_IR 100", "Wałęsa^Lech", "ISO_IR 192"),
        ("ISO_IR 101", "Wałęsa^Lech", "ISO_IR 101"),
        ("", "Müller^Jörg", "ISO_IR 192"),
        ("ISO_IR 999", "Müller^Jörg", "ISO_IR 192"),
        ("\\ISO 2022 IR 87", "Yamada^Tarou=山田^太郎=やまだ^たろう", ["", "ISO 2022 IR 87"]),
        ("\\ISO 2022 IR 149", "Hong^Gildong=洪^吉洞=홍^길동", ["", "ISO 2022 IR 149"]),
        ("GB18030", "Wang^XiaoDong=王^小东", "GB18030"),
        ("ISO_IR 144", "Люк", "ISO_IR 144"),
        ("ISO_IR 192", "Rossi^Maria", None),
    ],
)
def test_text_goes_out_as_it_was_asked_or_in_unicode(asked: str, name: str, expected: object) -> None:
    match = Match(Level.STUDY, "", {"PatientName": name}, {"StudyDescription": "plain"})
    found = answer(match, ["PatientName", "StudyDescription"], level=Level.STUDY, character_set=asked)
    character_set = found.get("SpecificCharacterSet")
    assert (list(character_set) if isinstance(expected, list) else character_set) == expected
    assert str(found.PatientName) == name


def test_dates_and_times_are_told_in_the_zone_that_was_asked_for() -> None:
    study = {"StudyDate": "20260101", "StudyTime": "233000.5", "TimezoneOffsetFromUTC": "+0100"}
    match = Match(Level.SERIES, "", {"PatientBirthDate": "19700101"}, study, {"SeriesDate": "20260101"})
    asked = ["StudyDate", "StudyTime", "SeriesDate", "PatientBirthDate"]
    found = answer(match, asked, level=Level.SERIES, timezone="+0530")
    assert (found.StudyDate, found.StudyTime) == ("20260102", "040000.5")
    assert (found.SeriesDate, found.PatientBirthDate) == ("20260101", "19700101")
    assert found.TimezoneOffsetFromUTC == "+0530"
    unknown = Match(Level.SERIES, "", {}, {**study, "TimezoneOffsetFromUTC": ""})
    found = answer(unknown, asked, level=Level.SERIES, timezone="+0530")
    assert (found.StudyDate, found.StudyTime) == ("20260101", "233000.5")
    assert "TimezoneOffsetFromUTC" not in found


@settings(max_examples=400)
@given(
    st.dictionaries(st.sampled_from(sorted(BY_KEYWORD)), st.text(max_size=70)),
    st.sampled_from(Level), st.sampled_from(SYNTAXES),
    st.sampled_from(["", "ISO_IR 100", "\\ISO 2022 IR 87", "GBK", "ISO_IR 13"]),
)  # fmt: skip
def test_any_text_makes_a_response(
    values: dict[str, str], level: Level, syntax: str, character_set: str
) -> None:
    match = Match(level, "", values, values, values, values)
    wanted = [*BY_KEYWORD, *COMPUTED]
    octets = octets_of(match, wanted, level=level, syntax=syntax, character_set=character_set,
                       timezone="+0100")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, over values that break their VR
        found = read_dataset(BytesIO(octets), syntax == IMPLICIT, syntax != BIG_ENDIAN)
    assert found.QueryRetrieveLevel == level.value
    assert len(found) > 50


def test_the_largest_value_of_a_vr_of_two_length_bytes_is_kept_to() -> None:
    match = Match(Level.STUDY, "", {}, {"StudyDescription": "x" * 70_000})
    assert answer(match, ["StudyDescription"], level=Level.STUDY).StudyDescription == ""
