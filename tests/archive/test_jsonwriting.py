"""Small data sets into octets: as pydicom reads them, in every syntax and character set, whatever the
values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from archive.dataset.jsonsets import from_octets, text_of
from archive.dataset.jsonwriting import encoded
from node.dimse.contexts import EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE
from node.dimse.identifiers import read_identifier, write_identifier

SYNTAXES = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG)


def sample() -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodeMeaning = "X1", "Schädel"
    empty = Dataset()
    made = Dataset()
    made.SpecificCharacterSet = "ISO_IR 192"
    made.PatientName = "Müller^Jürgen=山田^太郎"
    made.PatientWeight = "70.5"
    made.PatientComments = "a\\b\nc"
    made.ScheduledStationAETitle = ["CT1", "CT2"]
    made.PregnancyStatus = 4
    made.ReferencedStudySequence = []
    made.RequestedProcedureCodeSequence = [code, empty]
    made.add_new(0x00189306, "FD", 1.25)
    made.add_new(0x00280009, "AT", 0x00181063)
    made.add_new(0x00420011, "OB", b"\1\2\3\4")
    made.add_new(0x00081190, "UR", "http://a/b")
    made.InstanceNumber = "7"
    return made


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("read", SYNTAXES)
def test_a_data_set_is_what_it_was(syntax: str, read: str) -> None:
    attributes = from_octets(write_identifier(sample(), read), read)
    written = encoded(attributes, syntax)
    assert from_octets(written, syntax) == attributes
    found = read_identifier(written, syntax)
    found.decode()
    assert found.to_json_dict() == sample().to_json_dict()


@pytest.mark.parametrize(("asked", "name", "written"), [
    (b"ISO_IR 100", "Müller", "ISO_IR 100"),
    (b"ISO_IR 100", "山田", "ISO_IR 192"),
    (b"", "Müller", "ISO_IR 192"),
    (b"\\ISO 2022 IR 87", "Yamada=山田", "\\ISO 2022 IR 87"),
    (b"GB18030", "王", "GB18030"),
    (b"nonsense", "Müller", "ISO_IR 192"),
    (b"ISO_IR 100", "Smith", ""),
])  # fmt: skip
def test_character_sets(asked: bytes, name: str, written: str) -> None:
    octets = encoded({"00100010": {"vr": "PN", "Value": [{"Alphabetic": name}]}}, EXPLICIT_LITTLE, asked)
    found = read_identifier(octets, EXPLICIT_LITTLE)
    terms = found.get("SpecificCharacterSet", "")
    assert (terms if isinstance(terms, str) else "\\".join(terms)) == written
    assert str(found.PatientName) == name


@pytest.mark.parametrize("element", [
    {"vr": "US", "Value": [70_000]}, {"vr": "US", "Value": ["x"]}, {"vr": "AT", "Value": ["nothing"]},
    {"vr": "OB", "InlineBinary": "x"}, {"vr": "SH", "Value": ["y" * 70_000]},
], ids=str)  # fmt: skip
def test_what_a_vr_cant_hold_goes_out_empty(element: dict[str, Any]) -> None:
    octets = encoded({"00100010": element, "00100020": {"vr": "LO", "Value": ["P1"]}}, EXPLICIT_LITTLE)
    found = read_identifier(octets, EXPLICIT_LITTLE)
    assert found[0x00100010].is_empty and found.PatientID == "P1"


VALUES = st.one_of(st.text(max_size=40), st.integers(), st.floats(), st.none(),
                   st.dictionaries(st.sampled_from(["Alphabetic", "Ideographic"]), st.text(max_size=9)))
VRS = st.sampled_from(["AE", "AT", "CS", "DA", "DS", "FD", "IS", "LO", "LT", "OB", "PN", "SH", "SL", "TM",
                       "UI", "UN", "US", "UT"])
TAGS = st.integers(0x00100000, 0x0040FFFF).filter(lambda tag: tag & 0xFFFF).map(lambda tag: f"{tag:08X}")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(TAGS, st.fixed_dictionaries({"vr": VRS, "Value": st.lists(VALUES, max_size=3)}),
                       max_size=6),
       st.sampled_from(SYNTAXES))
def test_whatever_the_values_the_octets_are_a_data_set(attributes: dict[str, Any], syntax: str) -> None:
    octets = encoded(attributes, syntax, b"ISO_IR 100")
    found = from_octets(octets, syntax)
    assert set(found) == set(attributes)
    for tag, element in attributes.items():
        values = element["Value"]
        alone = values[0] if len(values) == 1 else None
        if element["vr"] == "LO" and isinstance(alone, str) and alone.isalpha() and syntax != IMPLICIT_LITTLE:
            assert text_of(found, tag) == alone
