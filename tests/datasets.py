"""Synthetic instances for every test: real DICOM data sets, written by pydicom, so that what reads them is
judged by another implementation. It never uses the project's own encoders."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from archive.model import InstanceHead, Provenance

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
US = "1.2.840.10008.5.1.4.1.1.6.1"
CR = "1.2.840.10008.5.1.4.1.1.1"
BASIC_TEXT_SR = "1.2.840.10008.5.1.4.1.1.88.11"
ENCAPSULATED_PDF = "1.2.840.10008.5.1.4.1.1.104.1"

IMPLICIT = str(ImplicitVRLittleEndian)
EXPLICIT = str(ExplicitVRLittleEndian)
BIG_ENDIAN = str(ExplicitVRBigEndian)
DEFLATED = str(DeflatedExplicitVRLittleEndian)
RLE = str(RLELossless)
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED)

PROVENANCE = Provenance(
    ward="san-martino/radiology",
    issuer="SANMARTINO",
    device="CT1",
    calling_ae="CT1",
    received_at_us=1_000_000,
)


@dataclass(frozen=True)
class Instance:
    """One instance as a modality would send it: the data set's bytes, without group 2, and what names it."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    study_uid: str
    series_uid: str
    dataset: bytes

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.dataset).digest()

    def head(self, provenance: Provenance = PROVENANCE) -> InstanceHead:
        return InstanceHead(self.sop_class_uid, self.sop_instance_uid, self.transfer_syntax_uid, provenance)

    @cached_property
    def part10(self) -> bytes:
        """A Part 10 file (PS3.10 7.1) of this instance."""
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = UID(self.sop_class_uid)
        meta.MediaStorageSOPInstanceUID = UID(self.sop_instance_uid)
        meta.TransferSyntaxUID = UID(self.transfer_syntax_uid)
        meta.ImplementationClassUID = UID("1.2.3.4")
        out = DicomBytesIO()
        out.write(b"\0" * 128 + b"DICM")
        write_file_meta_info(out, meta, enforce_standard=True)
        return out.getvalue() + self.dataset

    def read(self) -> Dataset:
        """What pydicom reads of it."""
        return dcmread(BytesIO(self.part10))


def encode(dataset: Dataset, transfer_syntax: str) -> bytes:
    """`dataset` as a transfer syntax encodes it, without group 2; PixelData must be as it needs it."""
    out = DicomBytesIO()
    # Whatever else there is, also what pydicom does not know, is explicit little endian (PS3.5 10).
    out.is_little_endian = transfer_syntax != BIG_ENDIAN
    out.is_implicit_VR = transfer_syntax == IMPLICIT
    write_dataset(out, dataset)
    if transfer_syntax != DEFLATED:
        return out.getvalue()
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = deflate.compress(out.getvalue()) + deflate.flush()
    return packed + b"\0" * (len(packed) % 2)


def instance_of(dataset: Dataset, transfer_syntax: str = EXPLICIT) -> Instance:
    """The instance that a data set makes in a transfer syntax."""
    return Instance(
        sop_class_uid=str(dataset.SOPClassUID),
        sop_instance_uid=str(dataset.SOPInstanceUID),
        transfer_syntax_uid=transfer_syntax,
        study_uid=str(dataset.StudyInstanceUID),
        series_uid=str(dataset.SeriesInstanceUID),
        dataset=encode(dataset, transfer_syntax),
    )


def instance_from_file(path: Path) -> Instance:
    """The instance in a Part 10 file, its data set as it stands there."""
    data = path.read_bytes()
    dataset = dcmread(BytesIO(data), stop_before_pixels=True)
    offset = 132 + 12 + dataset.file_meta.FileMetaInformationGroupLength
    return Instance(
        sop_class_uid=str(dataset.SOPClassUID),
        sop_instance_uid=str(dataset.SOPInstanceUID),
        transfer_syntax_uid=str(dataset.file_meta.TransferSyntaxUID),
        study_uid=str(dataset.StudyInstanceUID),
        series_uid=str(dataset.SeriesInstanceUID),
        dataset=data[offset:],
    )


def make_dataset(
    *,
    sop_class: str = CT,
    patient_id: str = "123",
    patient_name: str = "Rossi^Maria",
    study_uid: str | None = None,
    series_uid: str | None = None,
    sop_uid: str | None = None,
    modality: str = "CT",
    number: int = 1,
    **elements: Any,
) -> Dataset:
    """A data set without pixel data. `elements` are keywords with pydicom's values; None leaves one out."""
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": UID(sop_class),
        "SOPInstanceUID": UID(sop_uid or generate_uid()),
        "StudyDate": "20260102",
        "SeriesDate": "20260102",
        "ContentDate": "20260102",
        "StudyTime": "101530",
        "ContentTime": "101531",
        "AccessionNumber": "A1",
        "Modality": modality,
        "Manufacturer": "MISS",
        "InstitutionName": "San Martino",
        "ReferringPhysicianName": "Bianchi^Luca",
        "StudyDescription": "Thorax",
        "SeriesDescription": "Axial",
        "PatientName": patient_name,
        "PatientID": patient_id,
        "PatientBirthDate": "19700101",
        "PatientSex": "F",
        "StudyInstanceUID": UID(study_uid or generate_uid()),
        "SeriesInstanceUID": UID(series_uid or generate_uid()),
        "StudyID": "1",
        "SeriesNumber": 1,
        "InstanceNumber": number,
        **elements,
    }
    dataset = Dataset()
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def native_pixels(rows: int, columns: int, frames: int, seed: int) -> bytes:
    """16-bit pixels that differ by seed and compress little."""
    return random.Random(seed).randbytes(rows * columns * 2 * frames)


def make_instance(
    *,
    sop_class: str = CT,
    transfer_syntax: str = EXPLICIT,
    patient_id: str = "123",
    patient_name: str = "Rossi^Maria",
    study_uid: str | None = None,
    series_uid: str | None = None,
    sop_uid: str | None = None,
    modality: str = "CT",
    rows: int = 16,
    columns: int = 16,
    number: int = 1,
    frames: int = 1,
    padding: int = 0,
    encapsulated: Sequence[bytes] | None = None,
    offset_table: str = "basic",
    seed: int | None = None,
    **elements: Any,
) -> Instance:
    """One instance with 16-bit pixel data (`rows=0`: none).

    Compressed transfer syntaxes take their frames from `encapsulated`; RLE encodes its own. `offset_table` is
    basic, extended or none. `padding` adds that many bytes (rounded up to even) of (FFFC,FFFC), which
    compress little.
    """
    dataset = make_dataset(
        sop_class=sop_class, patient_id=patient_id, patient_name=patient_name, study_uid=study_uid,
        series_uid=series_uid, sop_uid=sop_uid, modality=modality, number=number,
    )  # fmt: skip
    syntax = UID(transfer_syntax)
    seed = number if seed is None else seed
    if rows:
        pixels: dict[str, Any] = {
            "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
            "Rows": rows, "Columns": columns,
            "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0,
        }  # fmt: skip
        if frames > 1 or (encapsulated is not None and len(encapsulated) > 1):
            pixels["NumberOfFrames"] = frames if encapsulated is None else len(encapsulated)
        for keyword, value in pixels.items():
            setattr(dataset, keyword, value)
        native = native_pixels(rows, columns, frames, seed)
        if syntax.is_encapsulated:
            if encapsulated is None:
                if syntax != RLELossless:
                    raise ValueError("give the frames of a compressed instance")
                encapsulated = rle_frames(native, rows, columns)
            _encapsulate(dataset, encapsulated, offset_table)
        else:
            if not syntax.is_little_endian:
                native = struct.pack(f">{len(native) // 2}H", *struct.unpack(f"<{len(native) // 2}H", native))
            dataset.PixelData = native
            dataset["PixelData"].VR = "OW"
    if padding:
        dataset.DataSetTrailingPadding = random.Random(seed).randbytes(padding + padding % 2)
    for keyword, value in elements.items():
        if value is None:
            if keyword in dataset:
                delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return Instance(
        sop_class_uid=sop_class if "SOPClassUID" not in dataset else str(dataset.SOPClassUID),
        sop_instance_uid=str(dataset.get("SOPInstanceUID", sop_uid or "")),
        transfer_syntax_uid=transfer_syntax,
        study_uid=str(dataset.get("StudyInstanceUID", "")),
        series_uid=str(dataset.get("SeriesInstanceUID", "")),
        dataset=encode(dataset, transfer_syntax),
    )


def _encapsulate(dataset: Dataset, frames: Sequence[bytes], offset_table: str) -> None:
    if offset_table == "extended":
        dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = (
            encapsulate_extended(list(frames))
        )
    else:
        dataset.PixelData = encapsulate(list(frames), has_bot=offset_table == "basic")
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True


def rle_frames(pixels: bytes, rows: int, columns: int) -> list[bytes]:
    """Each 16-bit frame in RLE (PS3.5 Annex G): two byte planes, most significant first, in literal runs."""
    size = rows * columns * 2
    frames = []
    for start in range(0, len(pixels), size):
        frame = pixels[start : start + size]
        planes = [_literal_runs(frame[1::2]), _literal_runs(frame[0::2])]
        header = struct.pack("<16I", 2, 64, 64 + len(planes[0]), *[0] * 13)
        frames.append(header + planes[0] + planes[1])
    return frames


def _literal_runs(plane: bytes) -> bytes:
    out = b"".join(
        bytes([len(run) - 1]) + run for run in (plane[i : i + 128] for i in range(0, len(plane), 128))
    )
    return out + b"\0" * (len(out) % 2)


def make_study(
    instances: int = 3, *, series: int = 1, study_uid: str | None = None, **rest: Any
) -> list[Instance]:
    """The instances of one study, dealt to its series in turn, numbered from 1."""
    study = study_uid or str(generate_uid())
    series_uids = [str(generate_uid()) for _ in range(series)]
    return [
        make_instance(
            study_uid=study,
            series_uid=series_uids[i % series],
            number=i + 1,
            **{"SeriesNumber": i % series + 1, **rest},
        )
        for i in range(instances)
    ]


SHIPPED = Path(pydicom.__file__).parent / "data"


def shipped_files(*, identified: bool = True) -> list[Path]:
    """The real Part 10 files that the pydicom package installs; `identified`: only those that are
    instances."""
    found = []
    for path in sorted([*SHIPPED.glob("test_files/*.dcm"), *SHIPPED.glob("charset_files/*.dcm")]):
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                continue
        dataset = dcmread(path, stop_before_pixels=True)
        uids = [dataset.get(name) for name in _IDENTITY]
        if not identified or ("TransferSyntaxUID" in dataset.file_meta and all(uids)):
            found.append(path)
    return found


_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
