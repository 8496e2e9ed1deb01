"""What the demo sends: the same on every machine, marked as synthetic, whole studies to one ward each."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path

import numpy as np
from pydicom import dcmread

from archive.model import is_uid
from miss import phantom
from miss.console import OneLine
from miss.files import find
from miss.phantom import ANNA, ANNA_PRIOR, BRUNO, TORSO
from miss.samples import PYDICOM_FILES, folder_plan, study_of
from tests.datasets import make_study

SMALL = dataclasses.replace(TORSO, size=64, slices=4)


def test_a_phantom_is_the_same_every_time(tmp_path: Path) -> None:
    phantom.write(SMALL, tmp_path / "one")
    phantom.write(SMALL, tmp_path / "two")
    first, second = (sorted(folder.iterdir()) for folder in (tmp_path / "one", tmp_path / "two"))
    assert [path.name for path in first] == ["001.dcm", "002.dcm", "003.dcm", "004.dcm"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len({file.sop_instance_uid for file in find([tmp_path / "one"]).files}) == 4


def test_a_phantom_is_a_volume_and_says_that_it_is_synthetic(tmp_path: Path) -> None:
    phantom.write(SMALL, tmp_path)
    slices = [dcmread(path) for path in sorted(tmp_path.iterdir())]
    heights = [float(one.ImagePositionPatient[2]) for one in slices]
    assert {after - before for before, after in itertools.pairwise(heights)} == {SMALL.slice_mm}
    for one in slices:
        assert one.PatientName == "Phantom^Synthetic" and one.ImageComments == "synthetic"
        assert "SYNTHETIC" in one.SeriesDescription
        assert "not an image of a person" in one.DerivationDescription
        assert is_uid(one.SOPInstanceUID) and one.SOPInstanceUID.startswith("2.25.")
        hounsfield = one.pixel_array.astype(int) + int(one.RescaleIntercept)
        assert hounsfield[0].max() < -900 and hounsfield.max() > 300  # air above, bone within
        assert 0.05 < np.mean((hounsfield > 0) & (hounsfield < 120)) < 0.8  # and a body of soft tissue


def test_the_two_people_of_one_patient_id_share_nothing_else() -> None:
    assert ANNA.patient_id == BRUNO.patient_id == "123"
    assert ANNA.uid("study") != BRUNO.uid("study") and ANNA.patient_name != BRUNO.patient_name
    assert ANNA.uid("study") != ANNA_PRIOR.uid("study") and ANNA.patient_name == ANNA_PRIOR.patient_name


def test_a_study_goes_to_one_ward_and_the_spread_is_fair() -> None:
    plan = folder_plan(PYDICOM_FILES, 3, first_of_each_uid=True)
    again = folder_plan(PYDICOM_FILES, 3, first_of_each_uid=True)
    assert plan == again and plan.count > 100 and plan.skipped.total() > 0
    wards: dict[str, set[int]] = {}
    for lot in plan.lots:
        for file in lot.files:
            wards.setdefault(study_of(file), set()).add(lot.ward)
    assert all(len(of) == 1 for of in wards.values())
    counts = [sum(of == {ward} for of in wards.values()) for ward in range(3)]
    assert max(counts) - min(counts) <= 1


def test_what_is_no_image_is_counted_by_reason(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(make_study(1)[0].part10)
    (tmp_path / "empty").touch()
    (tmp_path / "text.dcm").write_text("not DICOM at all " * 20)
    (tmp_path / "cut.dcm").write_bytes(make_study(1)[0].part10[:150])
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find([tmp_path])
    assert [file.path.name for file in found.files] == ["image"]
    assert found.skipped.total() == 3


def test_a_log_entry_is_one_line() -> None:
    record = logging.LogRecord("node", logging.INFO, "", 0, "called %s", ("CT1\nfake line",), None)
    line = OneLine().format(record)
    assert "\n" not in line and "CT1\\nfake line" in line and line.split(" ")[0].endswith("Z")
