"""Computed images that are nobody's: a CT of a torso to scroll and reformat, and small studies of two people
who share a Patient ID. Same call, same UIDs and same bytes, on any machine; every object says that it is
synthetic. Never touches the network."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

# UIDs are name-based UUIDs under 2.25 (PS3.5 B.2), so that sending a phantom twice is sending it again.
_NAMES = uuid.UUID("8a1f0ae2-6f0e-5d55-9f6c-6d6a7f3c4d10")

AIR, LUNG, FAT, WATER, MUSCLE, LIVER, VESSEL, KIDNEY, BONE = -1000, -840, -95, 8, 52, 68, 290, 190, 640

Slice = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Phantom:
    """One series of one study of one invented person. `size` is rows and columns."""

    key: str
    patient_name: str
    patient_id: str
    birth_date: str
    sex: str
    study_date: str
    study_description: str
    accession: str
    size: int = 512
    slices: int = 200
    spacing_mm: float = 0.75
    slice_mm: float = 2.0

    def uid(self, *parts: object) -> str:
        return f"2.25.{uuid.uuid5(_NAMES, '/'.join([self.key, *map(str, parts)])).int}"


TORSO = Phantom(
    key="torso", patient_name="Phantom^Synthetic", patient_id="PHANTOM-1", birth_date="19700101", sex="O",
    study_date="20260105", study_description="CT chest and abdomen (synthetic phantom)", accession="SYN0001",
)

# Two people, two hospitals, one Patient ID; the first has an earlier study, which is a prior of hers alone.
ANNA = Phantom(
    key="anna", patient_name="Synthetic^Anna", patient_id="123", birth_date="19520314", sex="F",
    study_date="20251118", study_description="CT chest (synthetic)", accession="SYN0101",
    size=256, slices=24, spacing_mm=1.5, slice_mm=16.0,
)
ANNA_PRIOR = Phantom(
    key="anna-prior", patient_name="Synthetic^Anna", patient_id="123", birth_date="19520314", sex="F",
    study_date="20240607", study_description="CT chest, earlier (synthetic)", accession="SYN0100",
    size=256, slices=24, spacing_mm=1.5, slice_mm=16.0,
)
BRUNO = Phantom(
    key="bruno", patient_name="Synthetic^Bruno", patient_id="123", birth_date="19841130", sex="M",
    study_date="20251202", study_description="CT abdomen (synthetic)", accession="SYN0201",
    size=256, slices=24, spacing_mm=1.5, slice_mm=16.0,
)
# Handed on to the other hospital by the first ward's rule.
OPINION = Phantom(
    key="opinion", patient_name="Synthetic^Carla", patient_id="SYN-7", birth_date="19610922", sex="F",
    study_date="20260109", study_description="CT chest, for a second opinion (synthetic)",
    accession="SYN0301", size=128, slices=12, spacing_mm=3.0, slice_mm=32.0,
)


def write(phantom: Phantom, folder: Path) -> None:
    """Writes the slices from the feet upwards as `folder`/001.dcm and on: about a second for 200 of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, dataset in enumerate(datasets(phantom), 1):
        dataset.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)


def datasets(phantom: Phantom) -> Iterator[Dataset]:
    """The slices as a scanner would give them; each is the same object, changed: use one before the next."""
    random = np.random.default_rng(uuid.uuid5(_NAMES, phantom.key).int)
    dataset = _common(phantom)
    for number in range(phantom.slices):
        height = number / max(1, phantom.slices - 1)
        noise = random.standard_normal((phantom.size, phantom.size), dtype=np.float32)
        image = _slice(phantom, height) + np.float32(9) * noise
        _place(phantom, dataset, number, (np.clip(image, AIR - 24, 3000) + 1024).astype("<u2"))
        yield dataset


def _common(phantom: Phantom) -> Dataset:
    """What every slice of the series shares (PS3.3 A.3: the CT Image IOD)."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = phantom.study_date
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "093000"
    ds.AccessionNumber = phantom.accession
    ds.Modality = "CT"
    ds.Manufacturer = "MISS"
    ds.ManufacturerModelName = "Computed phantom"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = phantom.study_description
    ds.SeriesDescription = f"SYNTHETIC axial {phantom.slice_mm:g} mm"
    ds.DerivationDescription = "Computed from geometric bodies; not an image of a person"
    ds.PatientName = phantom.patient_name
    ds.PatientID = phantom.patient_id
    ds.PatientBirthDate = phantom.birth_date
    ds.PatientSex = phantom.sex
    ds.BodyPartExamined = "CHEST"
    ds.SliceThickness = f"{phantom.slice_mm:g}"
    ds.KVP = "120"
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = phantom.uid("study")
    ds.SeriesInstanceUID = phantom.uid("study", 1)
    ds.FrameOfReferenceUID = phantom.uid("frame-of-reference")
    ds.PositionReferenceIndicator = ""
    ds.StudyID = "1"
    ds.SeriesNumber = 1
    ds.AcquisitionNumber = 1
    ds.ImageComments = "synthetic"
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows = ds.Columns = phantom.size
    ds.PixelSpacing = [f"{phantom.spacing_mm:g}"] * 2
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth = ["40", "-600"], ["400", "1500"]
    ds.WindowCenterWidthExplanation = ["SOFT TISSUE", "LUNG"]
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    return ds


def _place(phantom: Phantom, ds: Dataset, number: int, stored: NDArray[np.uint16]) -> None:
    half = phantom.size * phantom.spacing_mm / 2
    z = number * phantom.slice_mm
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(phantom.uid("study", 1, number))
    ds.InstanceNumber = number + 1
    ds.ImagePositionPatient = [f"{-half:.4f}", f"{-half:.4f}", f"{z:.4f}"]
    ds.SliceLocation = f"{z:.4f}"
    ds.PixelData = stored.tobytes()


class _Canvas:
    """One slice in Hounsfield units. x grows to the patient's left, y to the back, both from -1 to 1."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.image: Slice = np.full((size, size), AIR, np.float32)
        self.axis = np.linspace(-1, 1, size, dtype=np.float32)

    def ellipse(self, x: float, y: float, rx: float, ry: float, value: float, *, inner: float = 0.0) -> None:
        """Fills an ellipse, or with `inner` (a share of the radii) a ring; only its box is touched."""
        if rx <= 0 or ry <= 0:
            return
        columns, rows = self._span(x, rx), self._span(y, ry)
        dx = ((self.axis[columns] - x) / rx) ** 2
        dy = ((self.axis[rows] - y) / ry) ** 2
        distance = dy[:, None] + dx[None, :]
        mask = distance <= 1 if not inner else (distance <= 1) & (distance >= inner * inner)
        self.image[rows, columns][mask] = value

    def _span(self, centre: float, radius: float) -> slice:
        low, high = ((centre + sign * radius + 1) / 2 * (self.size - 1) for sign in (-1, 1))
        return slice(max(0, int(low)), min(self.size, int(high) + 2))


def _ball(height: float, centre: float, reach: float) -> float:
    """How wide an ellipsoid is at this height: 1 at its centre, 0 beyond its reach."""
    return float(max(0.0, 1 - ((height - centre) / reach) ** 2) ** 0.5)


def _slice(phantom: Phantom, height: float) -> Slice:
    """The body at `height`: 0 at the hips, 1 at the shoulders."""
    canvas = _Canvas(phantom.size)
    _body(canvas, height)
    _skeleton(canvas, height)
    if height > 0.42:
        _chest(canvas, height)
    if height < 0.62:
        _abdomen(canvas, height)
    _vessels(canvas, height)
    return canvas.image


def _body(canvas: _Canvas, h: float) -> None:
    rx, ry = 0.82 + 0.06 * cos(2 * pi * (h - 0.95)), 0.56 + 0.03 * sin(pi * h)
    canvas.ellipse(0, 0, rx, ry, FAT)
    canvas.ellipse(0, 0, rx - 0.06, ry - 0.05, MUSCLE)
    canvas.ellipse(0, 1.42, 1.4, 0.62, 120, inner=0.965)  # the table's curved top


def _skeleton(canvas: _Canvas, h: float) -> None:
    disc = (h * 17) % 1 > 0.78
    canvas.ellipse(0, 0.36, 0.105, 0.085, 95 if disc else BONE - 180)
    if not disc:
        canvas.ellipse(0, 0.36, 0.105, 0.085, BONE + 120, inner=0.86)
        canvas.ellipse(0, 0.50, 0.022, 0.055, BONE)
        for side in (-1, 1):
            canvas.ellipse(side * 0.085, 0.455, 0.05, 0.018, BONE)
    canvas.ellipse(0, 0.44, 0.04, 0.034, WATER + 20)  # spinal canal
    if h > 0.34:  # twelve ribs slope forwards and down: each slice cuts them at other places
        for rib in range(12):
            for side in (-1, 1):
                angle = 2 * pi * ((h * 2.9 + rib / 12) % 1) / 2 - pi / 2
                x, y = side * 0.735 * cos(angle), 0.475 * sin(angle)
                canvas.ellipse(x, y, 0.036, 0.028, BONE)
                canvas.ellipse(x, y, 0.020, 0.014, 220)
    if h > 0.55:
        canvas.ellipse(0, -0.485, 0.07, 0.022, BONE - 120)  # sternum
    if h < 0.2:  # iliac wings
        for side in (-1, 1):
            canvas.ellipse(side * (0.52 - 0.6 * h), 0.16, 0.20, 0.26, BONE, inner=0.80)


def _chest(canvas: _Canvas, h: float) -> None:
    wide = _ball(h, 0.72, 0.285)
    for side in (-1, 1):
        canvas.ellipse(side * 0.375, -0.02, 0.285 * wide, 0.40 * wide, LUNG)
    _bronchi(canvas, h)
    heart = _ball(h, 0.60, 0.14)
    canvas.ellipse(0.10, -0.14, 0.235 * heart, 0.22 * heart, MUSCLE)
    canvas.ellipse(0.16, -0.10, 0.12 * heart, 0.12 * heart, VESSEL - 60)
    canvas.ellipse(0.00, -0.20, 0.09 * heart, 0.10 * heart, VESSEL - 110)
    nodule = _ball(h, 0.79, 0.022)
    canvas.ellipse(-0.47, 0.06, 0.032 * nodule, 0.032 * nodule, 35)  # something to find in the right lung


def _bronchi(canvas: _Canvas, h: float) -> None:
    """The airway: a trachea, two main bronchi, then tubes that wind through the lungs beside vessels."""
    if h > 0.80:
        canvas.ellipse(0, 0.10, 0.045, 0.042, MUSCLE)
        canvas.ellipse(0, 0.10, 0.034, 0.031, AIR)
        return
    depth = (0.80 - h) / 0.30  # 0 at the carina, 1 at the bases
    for side in (-1, 1):
        branches = 1 if depth < 0.12 else 6
        for branch in range(branches):
            turn = 2 * pi * (branch / branches + 1.6 * depth)
            spread = 0.0 if branches == 1 else min(1.0, (depth - 0.12) * 3.2)
            x = side * (0.05 + min(1.0, depth * 4) * 0.27 + 0.155 * spread * cos(turn))
            y = 0.06 + 0.20 * spread * sin(turn)
            bore = 0.026 * (1 - 0.62 * depth)
            canvas.ellipse(x, y, bore * 1.45, bore * 1.45, MUSCLE)
            canvas.ellipse(x, y, bore, bore, AIR)
            canvas.ellipse(x + bore * 2.1, y, bore * 0.9, bore * 0.9, VESSEL - 90)


def _abdomen(canvas: _Canvas, h: float) -> None:
    liver = _ball(h, 0.46, 0.15)
    canvas.ellipse(-0.36, -0.06, 0.36 * liver, 0.36 * liver, LIVER + 22)
    canvas.ellipse(-0.10, -0.22, 0.26 * liver, 0.16 * liver, LIVER + 22)
    for angle in range(3):  # hepatic veins, seen as a fan
        canvas.ellipse(-0.30 + 0.12 * cos(angle * 1.1 + h * 9), -0.05 + 0.13 * sin(angle * 1.1 + h * 9),
                       0.022 * liver, 0.022 * liver, 155)
    gall = _ball(h, 0.40, 0.05)
    canvas.ellipse(-0.22, -0.30, 0.075 * gall, 0.06 * gall, WATER)
    stomach = _ball(h, 0.47, 0.10)
    canvas.ellipse(0.30, -0.22, 0.20 * stomach, 0.15 * stomach, 30)
    canvas.ellipse(0.30, -0.28, 0.15 * stomach, 0.06 * stomach, AIR + 40)
    spleen = _ball(h, 0.49, 0.09)
    canvas.ellipse(0.56, 0.12, 0.13 * spleen, 0.20 * spleen, LIVER + 50)
    for side in (-1, 1):
        kidney = _ball(h, 0.37 + 0.012 * side, 0.085)
        canvas.ellipse(side * 0.30, 0.26, 0.125 * kidney, 0.105 * kidney, KIDNEY)
        canvas.ellipse(side * 0.27, 0.26, 0.06 * kidney, 0.045 * kidney, 25)
    if h < 0.34:  # the gut winds around the middle; gas and contents take turns
        for loop in range(9):
            turn = 2 * pi * (loop / 9 + 1.3 * h)
            reach = 0.20 + 0.26 * (loop % 3) / 2
            x, y = reach * 1.15 * cos(turn), -0.12 + reach * 0.62 * sin(turn)
            canvas.ellipse(x, y, 0.088, 0.075, 45)
            canvas.ellipse(x, y, 0.068, 0.055, AIR + 60 if (loop + int(h * 40)) % 4 == 0 else 18)
    bladder = _ball(h, 0.03, 0.07)
    canvas.ellipse(0, -0.18, 0.22 * bladder, 0.16 * bladder, WATER)


def _vessels(canvas: _Canvas, h: float) -> None:
    if h > 0.16:
        canvas.ellipse(0.075, 0.235 - 0.02 * sin(7 * h), 0.048, 0.048, VESSEL)  # aorta, left
        canvas.ellipse(-0.085, 0.205, 0.052, 0.040, 150)  # inferior vena cava
    else:  # the aorta divides above the hips
        for side in (-1, 1):
            canvas.ellipse(0.02 + side * (0.05 + 1.2 * (0.16 - h)), 0.20, 0.034, 0.034, VESSEL)
    arch = _ball(h, 0.855, 0.03)
    canvas.ellipse(0.04, 0.05, 0.07 * arch, 0.20 * arch, VESSEL)
