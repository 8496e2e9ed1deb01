"""C-FIND identifiers as they come: keys, hierarchy, and what is not supported (PS3.4 C.4.1, C.6)."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from archive.catalog import CATALOG, COMPUTED
from archive.dataset.questions import Kind, Model, Question, read_question, supported_keys
from archive.errors import InvalidQuery
from archive.model import Level
from tests.datasets import BIG_ENDIAN, EXPLICIT, IMPLICIT, encode


def reread(dataset: Dataset, transfer_syntax: str) -> Dataset:
    """The data set as it arrives."""
    data = encode(dataset, transfer_syntax)
    return read_dataset(BytesIO(data), transfer_syntax == IMPLICIT, transfer_syntax != BIG_ENDIAN)


def ask(dataset: Dataset, model: Model = Model.STUDY_ROOT, *, relational: bool = False) -> Question:
    return read_question(dataset, model, relational=relational)



def request(level: str = "STUDY", **elements: Any) -> Dataset:
    dataset = Dataset()
    dataset.QueryRetrieveLevel = level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
    return dataset


@pytest.mark.parametrize("transfer_syntax", [None, IMPLICIT, EXPLICIT, BIG_ENDIAN])
def test_a_request_gives_keys_and_returns(transfer_syntax: str | None) -> None:
    item = Dataset()
    item.ScheduledProcedureStepID = "STEP*"
    dataset = request(
        "SERIES",
        SpecificCharacterSet="ISO_IR 100",
        PatientID="Müll*^?ürgen",
        StudyInstanceUID="1.2.3",
        SeriesDate="20260101-20261231",
        SeriesInstanceUID=["1.2.4", "1.2.5"],
        Modality="",
        SeriesNumber=None,
        NumberOfSeriesRelatedInstances=None,
        RequestAttributesSequence=[item],
        SliceThickness="1",
    )
    dataset.add_new(0x00091001, "LO", "x")
    if transfer_syntax is not None:
        dataset = reread(dataset, transfer_syntax)
    question = ask(dataset)
    assert question.level is Level.SERIES
    assert dict(question.keys) == {
        "PatientID": "Müll*^?ürgen",
        "StudyInstanceUID": "1.2.3",
        "SeriesDate": "20260101-20261231",
        "SeriesInstanceUID": "1.2.4\\1.2.5",
        "RequestAttributesSequence.ScheduledProcedureStepID": "STEP*",
    }
    others = {"Modality", "SeriesNumber", "NumberOfSeriesRelatedInstances"}
    assert set(question.wanted) == {*dict(question.keys), *others}
    assert question.unsupported == ("00091001", "SliceThickness")


def test_an_empty_sequence_asks_for_all_of_it() -> None:
    question = ask(request("SERIES", StudyInstanceUID="1.2", RequestAttributesSequence=[]))
    assert dict(question.keys) == {"StudyInstanceUID": "1.2"}
    assert set(question.wanted) == {
        "StudyInstanceUID",
        "RequestAttributesSequence.ScheduledProcedureStepID",
        "RequestAttributesSequence.RequestedProcedureID",
    }


def test_a_long_list_of_uids_is_not_cut() -> None:
    uids = [f"1.2.{n}" for n in range(5000)]
    question = ask(reread(request(StudyInstanceUID=uids), IMPLICIT))
    assert question.keys == (("StudyInstanceUID", "\\".join(uids)),)


def test_what_is_told_and_not_matched_on_is_unsupported_with_a_value() -> None:
    """FF01; without a value they are asked for like any other."""
    told = {"NumberOfStudyRelatedInstances": "5", "InstanceAvailability": "ONLINE", "RetrieveAETitle": "X"}
    question = ask(request(**told, ModalitiesInStudy="CT"))
    assert question.keys == (("ModalitiesInStudy", "CT"),)
    assert set(question.wanted) == {*told, "ModalitiesInStudy"}
    assert set(question.unsupported) == set(told)
    assert ask(request(**dict.fromkeys(told, ""))).unsupported == ()


def test_attributes_of_lower_levels() -> None:
    """A study is asked for its modality by many; all else below the level is not supported."""
    question = ask(request(Modality="CT", SOPClassUID="1.2.3", SeriesDescription="x", NumberOfFrames=None))
    assert dict(question.keys) == {"Modality": "CT", "SOPClassUID": "1.2.3"}
    assert set(question.unsupported) == {"SeriesDescription", "NumberOfFrames"}
    assert "Modality" in ask(request("PATIENT", Modality="CT"), Model.PATIENT_ROOT).unsupported


def test_the_zone_is_no_key() -> None:
    question = ask(request(StudyDate="20260101", TimezoneOffsetFromUTC="+0100"))
    assert question.keys == (("StudyDate", "20260101"),)
    assert question.timezone == "+0100"


@pytest.mark.parametrize(
    ("dataset", "model"),
    [
        (Dataset(), Model.STUDY_ROOT),
        (request("INSTANCE"), Model.STUDY_ROOT),
        (request("PATIENT"), Model.STUDY_ROOT),
        (request("study"), Model.STUDY_ROOT),
        (request("SERIES"), Model.STUDY_ROOT),
        (request("SERIES", StudyInstanceUID=""), Model.STUDY_ROOT),
        (request("SERIES", StudyInstanceUID=["1.2", "1.3"]), Model.STUDY_ROOT),
        (request("SERIES", StudyInstanceUID="1.*"), Model.STUDY_ROOT),
        (request("SERIES", StudyInstanceUID="1.2", PatientName="A"), Model.STUDY_ROOT),
        (request("SERIES", StudyInstanceUID="1.2", ModalitiesInStudy="CT"), Model.STUDY_ROOT),
        (request("IMAGE", StudyInstanceUID="1.2"), Model.STUDY_ROOT),
        (request("IMAGE", SeriesInstanceUID="1.2"), Model.STUDY_ROOT),
        (request("STUDY", RequestAttributesSequence=[Dataset(), Dataset()]), Model.STUDY_ROOT),
        (request("STUDY", StudyInstanceUID="1.2"), Model.PATIENT_ROOT),
        (request("STUDY", PatientID="1*"), Model.PATIENT_ROOT),
        (request("STUDY", PatientID="1", PatientName="A"), Model.PATIENT_ROOT),
        (request("STUDY", StudyInstanceUID="1.2"), Model.PATIENT_STUDY_ONLY),
        (request("SERIES", PatientID="1", StudyInstanceUID="1.2"), Model.PATIENT_STUDY_ONLY),
        (request("IMAGE", PatientID="1"), Model.PATIENT_STUDY_ONLY),
    ],
)
def test_a_request_against_the_model_is_refused(dataset: Dataset, model: Model) -> None:
    with pytest.raises(InvalidQuery):
        ask(dataset, model)


@pytest.mark.parametrize(
    ("dataset", "model"),
    [
        (request("STUDY", PatientName="A", PatientBirthDate="19700101"), Model.STUDY_ROOT),
        (request("SERIES", StudyInstanceUID="1.2", PatientID="1", PatientName=""), Model.STUDY_ROOT),
        (request("PATIENT", PatientID="1"), Model.PATIENT_ROOT),
        (request("STUDY", PatientID="1", PatientName=""), Model.PATIENT_ROOT),
        (request("PATIENT", PatientName="A*"), Model.PATIENT_STUDY_ONLY),
        (request("STUDY", PatientID="1", StudyDate="20260101"), Model.PATIENT_STUDY_ONLY),
    ],
)
def test_a_request_by_the_model_passes(dataset: Dataset, model: Model) -> None:
    assert ask(dataset, model).level.value == dataset.QueryRetrieveLevel


def test_relational_queries_need_no_higher_keys() -> None:
    question = ask(request("IMAGE", Modality="CT", PatientName="A", StudyDate="20260101"), relational=True)
    assert question.level is Level.IMAGE
    assert {keyword for keyword, _ in question.keys} == {"Modality", "PatientName", "StudyDate"}
    with pytest.raises(InvalidQuery):
        ask(request("PATIENT"), relational=True)  # the model's levels stay


def test_every_supported_key_can_be_asked() -> None:
    dataset = request("IMAGE", StudyInstanceUID="1.2", SeriesInstanceUID="1.3")
    for entry in CATALOG:
        if len(entry.path) == 1 and entry.keyword not in dataset:
            setattr(dataset, entry.keyword, None)
        elif len(entry.path) > 1:
            setattr(dataset, entry.path[0], [])
    for keyword in COMPUTED:
        if keyword != "RetrieveURL":
            setattr(dataset, keyword, None)
    question = ask(dataset)
    assert not question.unsupported
    keys = {keyword for level in Level for keyword in supported_keys(level)}
    assert set(question.wanted) == {*keys, "TimezoneOffsetFromUTC"}


def test_required_and_unique_keys_are_the_standards() -> None:
    """F1, PS3.4 Tables C.6-1 to C.6-5; at the top of Study Root the patient's are the study's."""
    required = {
        Level.PATIENT: {"PatientName"},
        Level.STUDY: {"StudyDate", "StudyTime", "AccessionNumber", "StudyID"},
        Level.SERIES: {"Modality", "SeriesNumber"},
        Level.IMAGE: {"InstanceNumber"},
    }
    for level in Level:
        keys = supported_keys(level)
        assert {keyword for keyword, kind in keys.items() if kind is Kind.REQUIRED} == required[level]
        assert sum(kind is Kind.UNIQUE for kind in keys.values()) == 1
