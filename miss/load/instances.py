"""Synthetic instances to load a server with: the same number gives the same bytes on any machine. An instance
is a head of its own and pixels that all share, as references: a thousand of them, or one of 6 GB, cost the
memory of a few frames. Writes no files and opens no connection."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
)

Buffer = bytes | memoryview

ROOT = "2.25.7391"
NUMBERS_MAX = 10**9           # numbers are written as ten digits, the first a 1: no UID has a leading zero
INSTANCES_EACH_STUDY = 20
INSTANCES_EACH_SERIES = 10
BANK_FRAMES = 8               # different frames that take turns
FRAGMENT_BYTES = 512 << 10

# What a head says of its own, in its template: ten digits each.
_STUDY, _SERIES, _INSTANCE = "1900000001", "1900000002", "1900000003"
_MARK = re.compile(f"{_STUDY}|{_SERIES}|{_INSTANCE}".encode())
_PIXEL_DATA = struct.Struct("<HH2sHI")
_ITEM = struct.Struct("<HHI")
_UNDEFINED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Instance:
    """One data set, ready to be sent. `body` are references to what others hold too."""

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    transfer_syntax_uid: str
    head: bytes = field(repr=False)
    body: tuple[Buffer, ...] = field(repr=False)
    size: int

    def chunks(self) -> Iterator[Buffer]:
        yield self.head
        yield from self.body

    def part10_head(self) -> bytes:
        """What comes before the data set in a file (PS3.10 7.1)."""
        meta = FileMetaDataset()
        meta.FileMetaInformationVersion = b"\0\1"
        meta.MediaStorageSOPClassUID = UID(self.sop_class_uid)
        meta.MediaStorageSOPInstanceUID = UID(self.sop_instance_uid)
        meta.TransferSyntaxUID = UID(self.transfer_syntax_uid)
        meta.ImplementationClassUID = UID(f"{ROOT}.1")
        buffer = DicomBytesIO()
        write_file_meta_info(buffer, meta)
        return b"\0" * 128 + b"DICM" + buffer.getvalue()


class Numbered(Protocol):
    """Instances by number, 0 and on, of one SOP class in one transfer syntax."""

    @property
    def name(self) -> str: ...

    @property
    def sop_class_uid(self) -> str: ...

    @property
    def transfer_syntax_uid(self) -> str: ...

    def instance(self, number: int) -> Instance: ...


class Corpus:
    """All instances of one kind, by number."""

    def __init__(self, name: str, kind: int, template: Dataset, before_pixels: bytes,
                 pixels: Sequence[Buffer], *, transfer_syntax_uid: str = ExplicitVRLittleEndian,
                 each_study: int = INSTANCES_EACH_STUDY) -> None:
        """A data set is `template`, `before_pixels`, then all of `pixels`, or when the template is of a
        single frame one of them by turns. `kind` keeps the UIDs of two corpora apart; `each_study` is how
        many make a study."""
        self.name = name
        self._each_study = each_study
        self.sop_class_uid = str(template.SOPClassUID)
        self.transfer_syntax_uid = str(transfer_syntax_uid)
        self._root = f"{ROOT}.{kind}"
        _number(template, self._root)
        octets = _encode(template) + before_pixels
        marks = [mark.group().decode() for mark in _MARK.finditer(octets)]
        self._order = tuple((_STUDY, _SERIES, _INSTANCE).index(mark) for mark in marks)
        self._template = _MARK.sub(b"%b", octets.replace(b"%", b"%%"))
        self._multiframe = "NumberOfFrames" in template
        self._pixels = tuple(pixels)
        self._pixel_bytes = sum(map(len, pixels)) if self._multiframe else len(pixels[0])

    def instance(self, number: int) -> Instance:
        """Number 0 and on; ten make a series."""
        if not 0 <= number < NUMBERS_MAX:
            raise ValueError(f"instances are numbered from 0 to {NUMBERS_MAX - 1}")
        study = b"1%09d" % (number // self._each_study)
        series = b"1%09d" % (number // INSTANCES_EACH_SERIES)
        values = (study, series, b"1%09d" % number)
        head = self._template % tuple([values[which] for which in self._order])
        body = self._pixels if self._multiframe else (self._pixels[number % len(self._pixels)],)
        study_uid = f"{self._root}.{study.decode()}"
        return Instance(self.sop_class_uid, f"{study_uid}.{series.decode()}.{values[2].decode()}", study_uid,
                        self.transfer_syntax_uid, head, body, len(head) + self._pixel_bytes)


def small() -> Corpus:
    """64 x 64 of 16 bits: 8 KB of pixels and what a CT says of itself. All overhead."""
    return Corpus("8 KB", 2, _ct(64, 64), _native(64 * 64), _frames(64, 64))


def ct() -> Corpus:
    """A CT slice of 512 x 512: 0.5 MB."""
    return Corpus("CT", 3, _ct(512, 512), _native(512 * 512), _frames(512, 512))


def ct_studies(each_study: int) -> Corpus:
    """The same slices, in studies of that many."""
    return Corpus("CT studies", 7, _ct(512, 512), _native(512 * 512), _frames(512, 512),
                  each_study=each_study)


def mammogram() -> Corpus:
    """4096 x 3680: 30 MB."""
    template = _ct(4096, 3680)
    template.SOPClassUID, template.Modality = DigitalMammographyXRayImageStorageForPresentation, "MG"
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "RescaleIntercept", "RescaleSlope",
                    "RescaleType", "KVP", "SliceLocation", "SliceThickness"):
        delattr(template, keyword)
    template.ImageLaterality, template.PresentationIntentType = "L", "FOR PRESENTATION"
    return Corpus("MG", 4, template, _native(4096 * 3680), _frames(4096, 3680, count=2))


def native_frames(count: int = 4200) -> Corpus:
    """One object of `count` native frames of 0.5 MB: 2.2 GB by default, in one element."""
    bank = _frames(512, 512)
    return Corpus("native", 5, _enhanced(count), _native(count * 512 * 512),
                  [bank[number % len(bank)] for number in range(count)])


def fragments(count: int = 11_500) -> Corpus:
    """One object of `count` encapsulated frames, a fragment of 0.5 MB each: 6 GB by default, more than an
    element of defined length could hold. The basic offset table is empty (PS3.5 A.4)."""
    bank = [_codestream(frame) for frame in _frames(512, 512)]
    start = _PIXEL_DATA.pack(0x7FE0, 0x0010, b"OB", 0, _UNDEFINED) + _ITEM.pack(0xFFFE, 0xE000, 0)
    pixels: list[Buffer] = []
    item = _ITEM.pack(0xFFFE, 0xE000, FRAGMENT_BYTES)
    for number in range(count):
        pixels += (item, bank[number % len(bank)])
    pixels.append(_ITEM.pack(0xFFFE, 0xE0DD, 0))
    return Corpus("encapsulated", 6, _enhanced(count), start, pixels, transfer_syntax_uid=JPEG2000Lossless)


def _frames(rows: int, columns: int, *, count: int = BANK_FRAMES) -> list[Buffer]:
    """Noise of 12 bits around a disc: nothing that a file system could fold away."""
    random = np.random.default_rng(rows * columns)
    y, x = np.ogrid[-1:1:rows * 1j, -1:1:columns * 1j]
    disc = np.where(x * x + y * y < 0.7, 1060, 24).astype("<u2")
    return [memoryview((disc + random.integers(0, 256, (rows, columns), dtype="<u2")).tobytes())
            for _ in range(count)]


def _codestream(pixels: Buffer) -> Buffer:
    """The marks of a JPEG 2000 code stream around what is none: no receiver decodes while it stores."""
    return memoryview(b"\xff\x4f\xff\x51" + bytes(pixels[:FRAGMENT_BYTES - 6]) + b"\xff\xd9")


def _ct(rows: int, columns: int) -> Dataset:
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20260301"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "101500"
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "CT", "MISS", "Synthetic load"
    ds.InstitutionName, ds.InstitutionalDepartmentName, ds.StationName = "Nowhere", "Load", "LOAD1"
    ds.ReferringPhysicianName = "Load^Doctor"
    ds.StudyDescription, ds.SeriesDescription = "Synthetic load", "Axial 1.0 mm"
    ds.PatientBirthDate, ds.PatientSex = "19700101", "O"
    ds.BodyPartExamined, ds.ProtocolName, ds.PatientPosition = "HEAD", "Load", "HFS"
    ds.KVP, ds.SliceThickness, ds.SliceLocation = "120", "1.0", "0"
    ds.StudyID, ds.SeriesNumber, ds.AcquisitionNumber = "1", 1, 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-120, -120, 0], [1, 0, 0, 0, 1, 0]
    ds.PositionReferenceIndicator = ""
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns, ds.PixelSpacing = rows, columns, ["0.46875", "0.46875"]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth = "40", "80"
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
    return ds


def _enhanced(frames: int) -> Dataset:
    ds = _ct(512, 512)
    ds.SOPClassUID, ds.NumberOfFrames = EnhancedCTImageStorage, frames
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceLocation",
                    "SliceThickness", "KVP"):
        delattr(ds, keyword)
    measures, orientation, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = ["0.46875", "0.46875"], "1.0"
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([orientation])
    ds.SharedFunctionalGroupsSequence = Items([shared])
    ds.PerFrameFunctionalGroupsSequence = Items([_frame_place(number) for number in range(frames)])
    return ds


def _frame_place(number: int) -> Dataset:
    place, group = Dataset(), Dataset()
    place.ImagePositionPatient = [-120, -120, number]
    group.PlanePositionSequence = Items([place])
    return group


def _native(words: int) -> bytes:
    """The header of Pixel Data, the last element, of 16 bit words."""
    return _PIXEL_DATA.pack(0x7FE0, 0x0010, b"OW", 0, 2 * words)


def _number(template: Dataset, root: str) -> None:
    study = f"{root}.{_STUDY}"
    template.StudyInstanceUID = template.FrameOfReferenceUID = study
    template.SeriesInstanceUID = f"{study}.{_SERIES}"
    template.SOPInstanceUID = f"{study}.{_SERIES}.{_INSTANCE}"
    template.PatientID, template.PatientName = f"L{_STUDY}", f"Load^{_STUDY}"
    template.AccessionNumber, template.InstanceNumber = f"A{_STUDY}", _INSTANCE


def _encode(template: Dataset) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, template)
    return buffer.getvalue()
