"""C-FIND identifiers and QIDO-RS results, made from matches and read back by pydicom."""

from __future__ import annotations

import json
import warnings
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from archive.catalog import BY_KEYWORD, CATALOG, COMPUTED
from archive.dataset.attributes import query_from_dataset, to_dataset, to_json
from archive.errors import InvalidQuery
from archive.model import Level, Match
from tests.datasets import BIG_ENDIAN, EXPLICIT, IMPLICIT, encode

STUDY = Match(
    level=Level.STUDY,
    issuer="SANMARTINO",
    patient={
        "PatientName": "Müller^Jürgen=山田",
        "PatientID": "123",
        "PatientBirthDate": "19700101",
    },
    study={
        "StudyInstanceUID": "1.2.3",
        "StudyDate": "20260102",
        "StudyDescription": "Thorax",
        "PatientWeight": "80.5",
        "PatientSize": "tall",
    },
    modalities=("CT", "SR"),
    sop_classes=("1.2.840.10008.5.1.4.1.1.2",),
    series_count=2,
    instance_count=7,
)
SERIES = Match(
    level=Level.SERIES,
    issuer="SANMARTINO",
    patient={"PatientID": "123", "IssuerOfPatientID": "OTHER"},
    study={"StudyInstanceUID": "1.2.3"},
    series={
        "SeriesInstanceUID": "1.2.4",
        "Modality": "CT",
        "SeriesNumber": "3",
        "RequestAttributesSequence.ScheduledProcedureStepID": "A\\B\\",
        "RequestAttributesSequence.RequestedProcedureID": "\\\\R",
    },
    modalities=("CT",),
    instance_count=5,
)
IMAGE = Match(
    level=Level.IMAGE,
    issuer="",
    patient={},
    study={"StudyInstanceUID": "1.2.3"},
    series={"SeriesInstanceUID": "1.2.4"},
    instance={
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": "1.2.5",
        "InstanceNumber": "abc",
        "Rows": "512",
        "ImageType": "ORIGINAL\\PRIMARY",
    },
)


def url(match: Match) -> str:
    return "https://region/studies/" + match.study["StudyInstanceUID"]


def shown(match: Match, include: Any = frozenset(), **rest: Any) -> dict[str, Any]:
    found = to_json(match, include, level=match.level, retrieve_url=url, **rest)
    return dict(json.loads(json.dumps(found, allow_nan=False)))


# ---------------------------------------------------------------- QIDO-RS


def test_a_study_shows_what_the_standard_lists() -> None:
    """PS3.18 Table 10.6.3-3: those without a value are there too, those that are not known are not."""
    assert shown(STUDY) == {
        "00080005": {"vr": "CS", "Value": ["ISO_IR 192"]},
        "00080020": {"vr": "DA", "Value": ["20260102"]},
        "00080030": {"vr": "TM"},
        "00080050": {"vr": "SH"},
        "00080056": {"vr": "CS", "Value": ["ONLINE"]},
        "00080061": {"vr": "CS", "Value": ["CT", "SR"]},
        "00080090": {"vr": "PN"},
        "00081190": {"vr": "UR", "Value": ["https://region/studies/1.2.3"]},
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Müller^Jürgen", "Ideographic": "山田"}]},
        "00100020": {"vr": "LO", "Value": ["123"]},
        "00100021": {"vr": "LO", "Value": ["SANMARTINO"]},
        "00100030": {"vr": "DA", "Value": ["19700101"]},
        "00100040": {"vr": "CS"},
        "0020000D": {"vr": "UI", "Value": ["1.2.3"]},
        "00200010": {"vr": "SH"},
        "00201206": {"vr": "IS", "Value": [2]},
        "00201208": {"vr": "IS", "Value": [7]},
    }


def test_a_series_shows_what_the_standard_lists() -> None:
    assert shown(SERIES) == {
        "00080060": {"vr": "CS", "Value": ["CT"]},
        "00081190": {"vr": "UR", "Value": ["https://region/studies/1.2.3"]},
        "0020000E": {"vr": "UI", "Value": ["1.2.4"]},
        "00200011": {"vr": "IS", "Value": [3]},
        "00201209": {"vr": "IS", "Value": [5]},
        "00400275": {
            "vr": "SQ",
            "Value": [
                {"00400009": {"vr": "SH", "Value": ["A"]}},
                {"00400009": {"vr": "SH", "Value": ["B"]}},
                {"00401001": {"vr": "SH", "Value": ["R"]}},
            ],
        },
    }


def test_an_instance_shows_what_the_standard_lists() -> None:
    assert shown(IMAGE) == {
        "00080016": {"vr": "UI", "Value": ["1.2.840.10008.5.1.4.1.1.2"]},
        "00080018": {"vr": "UI", "Value": ["1.2.5"]},
        "00080056": {"vr": "CS", "Value": ["ONLINE"]},
        "00081190": {"vr": "UR", "Value": ["https://region/studies/1.2.3"]},
        "00200013": {"vr": "IS", "Value": ["abc"]},
        "00280010": {"vr": "US", "Value": [512]},
    }


def test_a_resource_adds_the_attributes_of_its_levels() -> None:
    found = shown(SERIES, levels=(Level.STUDY, Level.SERIES))
    assert found["00100020"] == {"vr": "LO", "Value": ["123"]}
    assert found["00100021"] == {"vr": "LO", "Value": ["OTHER"]}
    assert found["0020000D"] == {"vr": "UI", "Value": ["1.2.3"]}
    assert found["00080061"] == {"vr": "CS", "Value": ["CT"]}
    assert "00201208" not in found  # of the study nothing is known here
    assert found["00201209"] == {"vr": "IS", "Value": [5]}


def test_includefield_adds() -> None:
    found = shown(STUDY, {"StudyDescription", "PatientWeight", "PatientSize", "SOPClassesInStudy"})
    assert found["00081030"] == {"vr": "LO", "Value": ["Thorax"]}
    assert found["00101030"] == {"vr": "DS", "Value": [80.5]}
    assert found["00101020"] == {"vr": "DS", "Value": ["tall"]}
    assert found["00080062"] == {"vr": "UI", "Value": ["1.2.840.10008.5.1.4.1.1.2"]}
    assert set(shown(STUDY)) < set(found)
    assert shown(SERIES, {"PatientID"})["00100020"]["Value"] == ["123"]
    assert "00400275" in shown(SERIES, {"RequestAttributesSequence"})


def test_what_lies_below_the_level_is_not_shown_and_no_error() -> None:
    assert shown(STUDY, {"Modality", "InstanceNumber", "NumberOfSeriesRelatedInstances"}) == shown(STUDY)


def test_all_is_everything_that_is_known() -> None:
    found = shown(IMAGE, "all")
    assert found["00080008"] == {"vr": "CS", "Value": ["ORIGINAL", "PRIMARY"]}
    assert found["0020000E"] == {"vr": "UI", "Value": ["1.2.4"]}
    assert "00081030" not in found


@pytest.mark.parametrize("match", [STUDY, SERIES, IMAGE])
@pytest.mark.parametrize("include", ["all", frozenset()])
def test_results_are_the_dicom_json_model(match: Match, include: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = shown(match, include)
        found.pop("00200013", None)  # "abc" is no number; pydicom refuses what JSON may say
        found.pop("00101020", None)
        dataset = Dataset.from_json(found)
    assert len(dataset) == len(found)


@given(st.dictionaries(st.sampled_from(sorted(BY_KEYWORD)), st.text(max_size=30)), st.sampled_from(Level))
def test_any_text_makes_strict_json(values: dict[str, str], level: Level) -> None:
    match = Match(level, "", values, values, values, values)
    found = to_json(match, "all", level=level, retrieve_url=lambda match: "")
    json.dumps(found, allow_nan=False)


# ---------------------------------------------------------------- C-FIND responses


def reread(dataset: Dataset, transfer_syntax: str) -> Dataset:
    """The data set as a peer reads it."""
    data = encode(dataset, transfer_syntax)
    return read_dataset(BytesIO(data), transfer_syntax == IMPLICIT, transfer_syntax != BIG_ENDIAN)


@pytest.mark.parametrize("transfer_syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
def test_a_response_holds_what_was_asked(transfer_syntax: str) -> None:
    asked = [
        "PatientName", "PatientID", "IssuerOfPatientID", "StudyInstanceUID", "StudyDate", "AccessionNumber",
        "ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances", "PatientWeight",
        "PatientSize", "InstanceAvailability",
    ]  # fmt: skip
    found = reread(to_dataset(STUDY, asked, level=Level.STUDY, retrieve_ae="MISS"), transfer_syntax)
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


def test_a_response_holds_no_more_than_was_asked() -> None:
    found = to_dataset(STUDY, ["StudyDate"], level=Level.STUDY)
    assert [str(element.keyword) for element in found] == ["StudyDate", "QueryRetrieveLevel"]


def test_items_come_back_as_items() -> None:
    found = reread(to_dataset(SERIES, ["RequestAttributesSequence"], level=Level.SERIES), EXPLICIT)
    items = found.RequestAttributesSequence
    assert [item.get("ScheduledProcedureStepID", "") or "" for item in items] == ["A", "B", ""]
    assert [item.get("RequestedProcedureID", "") or "" for item in items] == ["", "", "R"]
    empty = to_dataset(STUDY, ["RequestAttributesSequence"], level=Level.SERIES)
    assert len(empty.RequestAttributesSequence) == 0


def test_attributes_below_the_level_are_empty() -> None:
    assert to_dataset(STUDY, ["Modality", "Rows"], level=Level.STUDY).Modality == ""


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(sorted(BY_KEYWORD)), st.text(max_size=70)), st.sampled_from(Level))
def test_any_text_makes_a_response_without_a_warning(values: dict[str, str], level: Level) -> None:
    match = Match(level, "", values, values, values, values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = to_dataset(match, [*BY_KEYWORD, *COMPUTED], level=level)
        encode(found, EXPLICIT)


# ---------------------------------------------------------------- C-FIND requests


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
        PatientName="Müll*^?ürgen",
        StudyInstanceUID="1.2.3",
        StudyDate="20260101-20261231",
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
    level, keys, requested, unsupported = query_from_dataset(dataset)
    assert level is Level.SERIES
    assert dict(keys) == {
        "PatientName": "Müll*^?ürgen",
        "StudyInstanceUID": "1.2.3",
        "StudyDate": "20260101-20261231",
        "SeriesInstanceUID": "1.2.4\\1.2.5",
        "RequestAttributesSequence.ScheduledProcedureStepID": "STEP*",
    }
    assert set(requested) == {*dict(keys), "Modality", "SeriesNumber", "NumberOfSeriesRelatedInstances"}
    assert unsupported == ["00091001", "SliceThickness"]


def test_an_empty_sequence_asks_for_all_of_it() -> None:
    _, keys, requested, _ = query_from_dataset(
        request("SERIES", StudyInstanceUID="1.2", RequestAttributesSequence=[])
    )
    assert dict(keys) == {"StudyInstanceUID": "1.2"}
    assert set(requested) == {
        "StudyInstanceUID",
        "RequestAttributesSequence.ScheduledProcedureStepID",
        "RequestAttributesSequence.RequestedProcedureID",
    }


def test_a_long_list_of_uids_is_not_cut() -> None:
    uids = [f"1.2.{n}" for n in range(5000)]
    _, keys, _, _ = query_from_dataset(reread(request(StudyInstanceUID=uids), IMPLICIT))
    assert keys == (("StudyInstanceUID", "\\".join(uids)),)


def test_counts_are_returned_and_never_matched() -> None:
    _, keys, requested, _ = query_from_dataset(
        request(NumberOfStudyRelatedInstances="5", InstanceAvailability="ONLINE", ModalitiesInStudy="CT")
    )
    assert keys == (("ModalitiesInStudy", "CT"),)
    assert set(requested) == {"NumberOfStudyRelatedInstances", "InstanceAvailability", "ModalitiesInStudy"}


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset(),
        request("INSTANCE"),
        request("PATIENT"),
        request("study"),
        request("SERIES"),
        request("SERIES", StudyInstanceUID=""),
        request("SERIES", StudyInstanceUID=["1.2", "1.3"]),
        request("SERIES", StudyInstanceUID="1.*"),
        request("IMAGE", StudyInstanceUID="1.2"),
        request("IMAGE", SeriesInstanceUID="1.2"),
        request("STUDY", RequestAttributesSequence=[Dataset(), Dataset()]),
    ],
)
def test_a_request_against_the_hierarchy_is_refused(dataset: Dataset) -> None:
    with pytest.raises(InvalidQuery):
        query_from_dataset(dataset)


def test_relational_queries_need_no_higher_keys() -> None:
    level, keys, _, _ = query_from_dataset(request("IMAGE", Modality="CT"), relational=True)
    assert (level, keys) == (Level.IMAGE, (("Modality", "CT"),))


def test_the_patient_root_has_a_level_more() -> None:
    assert query_from_dataset(request("PATIENT", PatientID="1"), patient_root=True)[0] is Level.PATIENT
    assert query_from_dataset(request("STUDY", PatientID="1"), patient_root=True)[0] is Level.STUDY
    for wrong in ("", "1*"):
        with pytest.raises(InvalidQuery):
            query_from_dataset(request("STUDY", PatientID=wrong), patient_root=True)


def test_every_entry_of_the_catalogue_can_be_asked_and_shown() -> None:
    dataset = request("IMAGE", StudyInstanceUID="1.2", SeriesInstanceUID="1.3")
    for entry in CATALOG:
        if len(entry.path) == 1 and entry.keyword not in dataset:
            setattr(dataset, entry.keyword, None)
        elif len(entry.path) > 1:
            setattr(dataset, entry.path[0], [])
    for keyword in COMPUTED:
        if keyword != "RetrieveURL":
            setattr(dataset, keyword, None)
    _, _, requested, unsupported = query_from_dataset(dataset)
    assert not unsupported
    assert set(requested) == {*BY_KEYWORD, *COMPUTED} - {"RetrieveURL", "TimezoneOffsetFromUTC"}
    assert len(to_dataset(IMAGE, requested, level=Level.IMAGE)) > 50
