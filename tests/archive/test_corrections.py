"""Corrections: what they say as facts, what they change in the index, and what a reader gets of the bytes;
those in the packs stay as they came."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from archive.archive import Archive
from archive.correction_orders import CorrectionOrders
from archive.corrections import (
    CORRECTABLE,
    Correction,
    Withdrawal,
    correction_of,
    fact_of,
    overlay_of,
    withdrawal_fact,
)
from archive.dataset import recoding
from archive.errors import CannotUnderstand, InvalidInput, NotFound
from archive.model import Fact, Level, Overlay, PatientKey, Query
from archive.rebuild import rebuild
from tests.archive.archives import settings_for, store, stored_bytes
from tests.datasets import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    NATIVE,
    PROVENANCE,
    Instance,
    instance_of,
    make_dataset,
    make_instance,
)

STUDY = "1.2.3"


def correction(number: int = 1, *, study: str = STUDY, at_us: int | None = None, **values: str) -> Correction:
    changes = tuple(sorted((values or {"PatientID": "999"}).items()))
    return Correction(f"{number:016x}", study, changes, "maria", "wrong patient", at_us or 1000 + number, "")


def withdrawn(one: Correction, at_us: int = 5000) -> Fact:
    return withdrawal_fact(one.id, one.study_uid, Withdrawal("luca", "was right", at_us, ""))


@pytest.fixture
def archive(tmp_path: Path) -> Any:
    with Archive.open(settings_for(tmp_path), outbox=True) as opened:
        yield opened


def the_study(archive: Archive, study: str = STUDY) -> Any:
    (match,) = archive.search(Query(Level.STUDY, (("StudyInstanceUID", study),)))
    return match


def read(archive: Archive, instance: Instance) -> Dataset:
    (found,) = archive.instances(instance.study_uid, None, instance.sop_instance_uid)
    with archive.open_instance(found) as payload:
        return pydicom.dcmread(BytesIO(payload.read()))


# What they say.


def test_a_correction_is_a_fact_and_comes_back_from_it() -> None:
    one = correction(PatientName="Rossi^Mária=山田", StudyDate="20260101", AccessionNumber="")
    assert correction_of(fact_of(one)) == one
    told = correction_of(withdrawn(one))
    assert (told.id, told.changes, told.undone) == (one.id, (), Withdrawal("luca", "was right", 5000, ""))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("StudyDate", "2026-01-01"), ("StudyDate", "20261301"), ("StudyTime", "2561"), ("PatientAge", "12"),
        ("PatientSex", "f"), ("PatientID", "a\\b"), ("PatientID", "x" * 65), ("PatientName", "a=b=c=d"),
        ("PatientName", "a^b^c^d^e^f"), ("PatientName", "x" * 65), ("AccessionNumber", "x" * 17),
        ("PatientID", "a\nb"), ("PatientWeight", "12kg"), ("TimezoneOffsetFromUTC", "CET"),
        ("StudyInstanceUID", "1.2"), ("SeriesDescription", "x"), ("Modality", "MR"), ("Nothing", "x"),
        ("PatientID", "\ud800"), ("PatientComments", "a\0b"),
    ],
)  # fmt: skip
def test_what_can_t_be_a_value_or_be_corrected_is_refused_and_not_quoted(keyword: str, value: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        correction_of(fact_of(replace(correction(), changes=((keyword, value),))))
    assert len(value) < 4 or value not in str(caught.value)


def test_no_uid_and_nothing_below_the_study_can_be_corrected() -> None:
    assert {entry.level for entry in CORRECTABLE.values()} == {Level.PATIENT, Level.STUDY}
    assert not any(keyword.endswith("UID") for keyword in CORRECTABLE)


def test_the_later_of_two_counts_for_each_attribute_and_a_withdrawn_one_for_none() -> None:
    first = correction(1, PatientID="1", StudyID="1")
    second = correction(2, PatientID="2")
    tied = replace(correction(3, PatientID="3"), at_us=second.at_us)
    for order in itertools.permutations([first, second, tied]):
        overlay = overlay_of(order)
        assert overlay is not None and dict(overlay.values) == {"PatientID": "3", "StudyID": "1"}
    undone = replace(tied, undone=Withdrawal("x", "", 1, ""))
    overlay = overlay_of([first, second, undone])
    assert overlay is not None and dict(overlay.values)["PatientID"] == "2"
    assert overlay_of([undone]) is None


# What they change in the index.


def test_a_study_is_found_under_its_corrected_patient_and_no_longer_under_the_old(archive: Archive) -> None:
    ours = make_instance(study_uid=STUDY, patient_id="123", patient_name="Rossi^Maria")
    other = make_instance(study_uid="1.2.4", patient_id="123", patient_name="Rossi^Maria")
    store(archive, ours)
    store(archive, other)
    archive.wait_indexed()
    archive.record_facts([fact_of(correction(PatientID="999", PatientName="Verdi^Anna"))])
    assert the_study(archive).patient["PatientID"] == "999"
    assert the_study(archive).patient["PatientName"] == "Verdi^Anna"
    assert the_study(archive, "1.2.4").patient["PatientName"] == "Rossi^Maria"
    found = archive.search(Query(Level.STUDY, (("PatientName", "*erdi*"),)))
    assert [match.study["StudyInstanceUID"] for match in found] == [STUDY]
    found = archive.search(Query(Level.STUDY, (("PatientName", "*ross*"),)))
    assert [match.study["StudyInstanceUID"] for match in found] == ["1.2.4"]
    people = archive.search(Query(Level.PATIENT))
    assert {(one.patient["PatientID"], one.study_count) for one in people} == {("123", 1), ("999", 1)}
    bound = frozenset({PatientKey(PROVENANCE.issuer, "999")})
    (image,) = archive.search(Query(Level.IMAGE, person=bound))
    assert image.instance["SOPInstanceUID"] == ours.sop_instance_uid


def test_what_arrives_later_is_as_corrected_and_so_is_a_rebuilt_index(tmp_path: Path) -> None:
    with Archive.open(settings_for(tmp_path), outbox=True) as archive:
        archive.record_facts([fact_of(correction(PatientID="999", StudyDescription=""))])
        for number in range(3):
            store(archive, make_instance(study_uid=STUDY, number=number))
        archive.wait_indexed()
        assert the_study(archive).patient["PatientID"] == "999"
        assert "StudyDescription" not in the_study(archive).study
        later = correction(2, PatientID="777")
        archive.record_facts([fact_of(later)])
        store(archive, make_instance(study_uid=STUDY, number=9))
        archive.wait_indexed()
        assert the_study(archive).patient["PatientID"] == "777"
        assert the_study(archive).instance_count == 4
        archive.record_facts([withdrawn(later)])
        assert the_study(archive).patient["PatientID"] == "999"
        before = archive.index.dump()
    rebuild(settings_for(tmp_path), outbox=True)
    with Archive.open(settings_for(tmp_path), outbox=True) as archive:
        assert archive.index.dump() == before


def test_undone_is_as_it_came_also_when_the_withdrawal_is_heard_of_first(archive: Archive) -> None:
    store(archive, make_instance(study_uid=STUDY))
    archive.wait_indexed()
    before = archive.index.dump()
    one = correction(PatientID="999", PatientName="X^Y", StudyDate="20200101")
    archive.record_facts([withdrawn(one)])
    archive.record_facts([fact_of(one)])
    after = archive.index.dump()
    for table in ("patient", "study", "series", "instance", "series_ward"):
        assert after[table] == before[table]
    archive.record_facts([fact_of(one)])
    assert archive.index.dump() == after


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(range(7)))
def test_facts_and_instances_in_any_order_make_the_same_index(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    ones = [correction(1, PatientID="9"), correction(2, PatientName="A^B"), correction(3, PatientID="8")]
    instances = [
        make_instance(study_uid=STUDY, number=n, sop_uid=f"1.9.{n}", series_uid="1.8") for n in (1, 2)
    ]
    steps: list[Any] = [*map(fact_of, ones), withdrawn(ones[2]), withdrawn(ones[1], 6000), *instances]
    with Archive.open(settings_for(tmp_path_factory.mktemp("a")), outbox=True) as archive:
        for number in order:
            step = steps[number]
            if isinstance(step, Fact):
                archive.record_facts([step])
            else:
                store(archive, step)
                archive.wait_indexed()
        dump = archive.index.dump()
        assert the_study(archive).patient["PatientID"] == "9"
        assert the_study(archive).patient["PatientName"] == "Rossi^Maria"
    for table in ("patient", "study", "series", "correction", "known_fact"):
        rows = _DUMPS.setdefault(table, dump[table])
        assert dump[table] == rows


_DUMPS: dict[str, Any] = {}


# What a reader gets.


@pytest.mark.parametrize("syntax", NATIVE)
def test_a_reader_gets_the_corrected_values_and_the_original_ones_beside_them(
    archive: Archive, syntax: str
) -> None:
    ours = make_instance(study_uid=STUDY, transfer_syntax=syntax)
    store(archive, ours)
    archive.wait_indexed()
    one = correction(PatientID="999", PatientName="Verdi^Ännä", OtherPatientIDs="a\\b", StudyDescription="")
    archive.record_facts([fact_of(one)])
    came, got = ours.read(), read(archive, ours)
    assert (got.PatientID, got.PatientName, got.StudyDescription) == ("999", "Verdi^Ännä", "")
    assert list(got.OtherPatientIDs) == ["a", "b"]
    (original,) = got.OriginalAttributesSequence
    (modified,) = original.ModifiedAttributesSequence
    assert (modified.PatientID, modified.PatientName) == (came.PatientID, came.PatientName)
    assert modified.StudyDescription == came.StudyDescription
    assert original.ReasonForTheAttributeModification == "CORRECT"
    assert original.ModifyingSystem == "MISS region"
    assert original.AttributeModificationDateTime.startswith("19700101000000.001001")
    assert original.SourceOfPreviousValues is None or original.SourceOfPreviousValues == ""
    for each in came:
        if each.keyword not in dict(one.changes):
            assert got[each.tag] == each
    assert stored_bytes(archive, ours) == ours.dataset  # in the packs and to other archives: as it came
    tags = [each.tag for each in got]
    assert tags == sorted(tags)


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED])
@pytest.mark.parametrize("undefined", [False, True])
def test_original_attributes_that_are_there_are_kept_and_one_is_added(
    archive: Archive, syntax: str, undefined: bool
) -> None:
    dataset = make_dataset(study_uid=STUDY)
    earlier, within = Dataset(), Dataset()
    within.PatientName = "Before^It"
    earlier.ModifiedAttributesSequence = Sequence([within])
    earlier.ReasonForTheAttributeModification = "COERCE"
    dataset.OriginalAttributesSequence = Sequence([earlier])
    dataset["OriginalAttributesSequence"].is_undefined_length = undefined
    dataset.PixelData = random.Random(1).randbytes(4096)
    dataset["PixelData"].VR = "OW"
    ours = instance_of(dataset, syntax)
    store(archive, ours)
    archive.wait_indexed()
    archive.record_facts([fact_of(correction())])
    got = read(archive, ours)
    first, second = got.OriginalAttributesSequence
    assert first.ModifiedAttributesSequence[0].PatientName == "Before^It"
    assert second.ModifiedAttributesSequence[0].PatientID == "123"
    assert got.PixelData == ours.read().PixelData


@pytest.mark.parametrize(
    ("declared", "raw", "value", "expected"),
    [
        ("ISO_IR 192", "Rossi", "山田^太郎", "ISO_IR 192"),
        ("ISO_IR 100", "Müller", "Jürgen", "ISO_IR 100"),
        ("ISO_IR 100", "Müller", "Łukasz", ["ISO 2022 IR 100", "ISO 2022 IR 101"]),
        ("ISO_IR 100", "Müller", "Иванов", ["ISO 2022 IR 100", "ISO 2022 IR 144"]),
        ("ISO_IR 100", "Müller", "山田", ["ISO 2022 IR 100", "ISO 2022 IR 87"]),
        (None, "Rossi", "Müller", ["", "ISO 2022 IR 100"]),
        (None, "Rossi", "Müller Иванов 山田", "ISO_IR 192"),
    ],
)
def test_a_value_is_written_in_the_data_set_s_characters_or_those_are_extended(
    archive: Archive, declared: str | None, raw: str, value: str, expected: Any
) -> None:
    ours = instance_of(make_dataset(
        study_uid=STUDY, patient_name=raw, SpecificCharacterSet=declared, StudyDescription=raw
    ))  # fmt: skip
    store(archive, ours)
    archive.wait_indexed()
    archive.record_facts([fact_of(correction(PatientName=value))])
    got = read(archive, ours)
    assert got.PatientName == value
    assert got.StudyDescription == raw  # what was there reads as it did
    assert got.OriginalAttributesSequence[0].ModifiedAttributesSequence[0].PatientName == raw
    assert got.SpecificCharacterSet == expected


def test_a_value_that_no_character_set_of_its_holds_is_refused(archive: Archive) -> None:
    ours = instance_of(make_dataset(study_uid=STUDY, SpecificCharacterSet="ISO_IR 100"))
    store(archive, ours)
    archive.wait_indexed()
    archive.record_facts([fact_of(correction(PatientName="Łukasz א"))])
    with pytest.raises(CannotUnderstand):
        read(archive, ours)
    assert the_study(archive).patient["PatientName"] == "Łukasz א"


def test_what_says_so_already_leaves_as_it_came(archive: Archive) -> None:
    ours = make_instance(study_uid=STUDY, patient_id="999")
    store(archive, ours)
    archive.wait_indexed()
    archive.record_facts([fact_of(correction(PatientID="999", PatientComments=""))])
    (found,) = archive.instances(STUDY)
    with archive.open_instance(found) as payload:
        assert payload.read()[found.location.dataset_offset :] == ours.dataset


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("rows", [16, 600])
def test_a_data_set_is_read_into_memory_as_the_stream_has_it(
    archive: Archive, syntax: str, rows: int
) -> None:
    ours = make_instance(study_uid=STUDY, transfer_syntax=syntax, rows=rows, columns=600)
    store(archive, ours)
    archive.wait_indexed()
    archive.record_facts([fact_of(correction(PatientName="Verdi^Anna", PatientComments="new"))])
    (found,) = archive.instances(STUDY)
    with archive.open_instance(found) as payload:
        whole = payload.read()[found.location.dataset_offset :]
    assert whole != ours.dataset
    opened = archive.open_dataset(found)
    assert opened.length == len(whole)
    got, chance = bytearray(opened.length), random.Random(2)
    at = 0
    while at < len(got):
        size = min(chance.choice([1, 7, 100, 60_000]), len(got) - at)
        view = memoryview(got)[at : at + size]
        cut = chance.randint(0, size)
        at += opened.read_into([part for part in (view[:cut], view[cut:]) if part], at)
    opened.confirm()
    opened.close()
    assert bytes(got) == whole


@pytest.mark.parametrize(("stored", "target"), [(IMPLICIT, EXPLICIT), (EXPLICIT, IMPLICIT)])
def test_what_is_recoded_is_recoded_as_corrected(archive: Archive, stored: str, target: str) -> None:
    ours = make_instance(study_uid=STUDY, transfer_syntax=stored)
    store(archive, ours)
    archive.wait_indexed()
    archive.record_facts([fact_of(correction(PatientID="999"))])
    (found,) = archive.instances(STUDY)
    with archive.open_instance(found) as payload:
        spliced = recoding.spliced(payload, found, target, 1 << 20)
        assert spliced is not None
        payload.seek(found.location.dataset_offset + spliced.rest_from)
        octets = spliced.octets + payload.read()
    got = replace(ours, transfer_syntax_uid=target, dataset=octets).read()
    assert got.PatientID == "999" and len(got.OriginalAttributesSequence) == 1
    assert got.PixelData == ours.read().PixelData


def test_everything_before_it_is_stepped_over_whatever_it_holds(archive: Archive) -> None:
    """Sequences of undefined length within each other, and one whose items switch to implicit VR."""
    dataset = make_dataset(study_uid=STUDY)
    inner, outer = Dataset(), Dataset()
    inner.CodeValue = "T-1"
    outer.ConceptNameCodeSequence = Sequence([inner, inner])
    outer["ConceptNameCodeSequence"].is_undefined_length = True
    outer.is_undefined_length_sequence_item = True
    dataset.ContentSequence = Sequence([outer, Dataset(), outer])
    dataset["ContentSequence"].is_undefined_length = True
    ours = instance_of(dataset)
    store(archive, ours)
    archive.wait_indexed()
    archive.record_facts([fact_of(correction(PatientID="999"))])
    got = read(archive, ours)
    assert got.ContentSequence == ours.read().ContentSequence
    assert [each.tag for each in got][-1] == 0x0040A730 or got.OriginalAttributesSequence
    assert got.PatientID == "999"


def test_an_instance_carries_what_is_corrected_of_it_wherever_it_is_found(archive: Archive) -> None:
    ours = make_instance(study_uid=STUDY)
    store(archive, ours)
    archive.wait_indexed()
    one = correction()
    archive.record_facts([fact_of(one)])
    overlay = Overlay((("PatientID", "999"),), one.at_us, "")
    uid = ours.sop_instance_uid
    live = archive.index.live(uid)
    assert live is not None and live.corrections == overlay
    assert [each.corrections for each in archive.instances(STUDY)] == [overlay]
    assert [each.stored.corrections for each in archive.index.described([uid])] == [overlay]
    assert archive.index.described([uid])[0].value_of("PatientID") == "999"


# Orders.


def test_an_order_corrects_once_and_its_undoing_takes_it_back(archive: Archive) -> None:
    store(archive, make_instance(study_uid=STUDY))
    archive.wait_indexed()
    orders = CorrectionOrders(archive, "san-martino/radiology")
    detail = {"study": STUDY, "id": "ab" * 8, "reason": "wrong patient", "at_us": "1000",
              "set": '{"PatientID": "999"}'}  # fmt: skip
    for _ in range(2):  # a process that ended before it could answer does it again
        orders.correct(detail, "maria")
    (one,) = archive.index.corrections.listed()
    assert (one.by, one.reason, one.ward) == ("maria", "wrong patient", "san-martino/radiology")
    assert the_study(archive).patient["PatientID"] == "999"
    for _ in range(2):
        orders.undo({"id": "abab", "reason": "was right"}, "luca")
    assert the_study(archive).patient["PatientID"] == "123"
    (one,) = archive.index.corrections.listed(study_uid=STUDY)
    assert one.undone is not None and one.undone.by == "luca"
    assert sum(len(batch.facts) for batch in archive.facts.read()) == 2
    with pytest.raises(NotFound):
        orders.undo({"id": "ffff", "reason": "x"}, "luca")
    with pytest.raises(NotFound):
        orders.correct(detail | {"study": "1.2.99", "id": "cd" * 8}, "maria")
    with pytest.raises(InvalidInput):
        orders.correct(detail | {"reason": "", "id": "cd" * 8}, "maria")
