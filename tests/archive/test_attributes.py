"""QIDO-RS results, made from matches."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from archive.catalog import BY_KEYWORD
from archive.dataset.attributes import to_json
from archive.model import Level, Match
from tests.archive.matches import IMAGE, SERIES, STUDY


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
