"""Two encodings of one content are equal; one element changed anywhere is found."""

from __future__ import annotations

import random
import struct
import subprocess
import warnings
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import UID

from archive.conflicts.comparison import CompareLimits, Comparison, What, compare
from archive.conflicts.pixels import PixelLimits
from tests.datasets import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    NATIVE,
    RLE,
    Instance,
    encode,
    instance_from_file,
    instance_of,
    make_dataset,
    make_instance,
    shipped_files,
)
from tests.peers import dcmtk

J2K, J2K_LOSSY = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
JPEG_LS, JPEG_LOSSLESS, JPEG = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.50"


def compared(first: Instance, second: Instance, **options: Any) -> Comparison:
    return compare(BytesIO(first.part10), BytesIO(second.part10), **options)


def rich() -> Dataset:
    """A data set with sequences in sequences, private elements, text of several values and padding."""
    inner = Dataset()
    inner.CodeValue = "T-D0050"
    inner.CodingSchemeDesignator = "SRT"
    item = Dataset()
    item.ReferencedSOPInstanceUID = UID("1.2.3.4")
    item.PurposeOfReferenceCodeSequence = Sequence([inner, deepcopy(inner)])
    empty = Dataset()
    dataset = make_dataset(
        sop_uid="1.2.3", study_uid="1.2.4", series_uid="1.2.5", patient_name="Müller^Jörg=x",
        ReferencedImageSequence=Sequence([item, empty]), WindowCenter=[40, "400.5"], KVP="120",
        PixelSpacing=[0.5, 0.25], FrameIncrementPointer=0x00181063, PatientComments="odd",
        ContributingEquipmentSequence=Sequence([]),
    )  # fmt: skip
    block = dataset.private_block(0x0019, "MISS TEST", create=True)
    block.add_new(0x01, "LO", "private")
    block.add_new(0x02, "FD", 2.5)
    block.add_new(0x03, "SQ", [deepcopy(inner)])
    block.add_new(0x04, "OW", b"\1\2\3\4")
    dataset.RedPaletteColorLookupTableData = b"\1\2\3\4"
    dataset["RedPaletteColorLookupTableData"].VR = "OW"
    return dataset


def with_pixels(dataset: Dataset, *, frames: int = 2, samples: int = 1, bits: int = 16) -> Dataset:
    values = {"SamplesPerPixel": samples, "Rows": 12, "Columns": 10, "BitsAllocated": bits,
              "PhotometricInterpretation": "RGB" if samples == 3 else "MONOCHROME2",
              "BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": 0,
              "NumberOfFrames": frames}  # fmt: skip
    if samples == 3:
        values["PlanarConfiguration"] = 0
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = random.Random(1).randbytes(12 * 10 * samples * frames * bits // 8)
    dataset["PixelData"].VR = "OW"
    return dataset


def as_syntax(dataset: Dataset, syntax: str) -> Instance:
    """In a native transfer syntax; pydicom leaves the words of binary values to us (PS3.5 7.3)."""
    dataset = deepcopy(dataset)
    if syntax == BIG_ENDIAN:
        _swap(dataset)
    return instance_of(dataset, syntax)


def _swap(dataset: Dataset) -> None:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _swap(item)
        elif element.VR == "OW":
            count = len(element.value) // 2
            element.value = struct.pack(f">{count}H", *struct.unpack(f"<{count}H", element.value))


@pytest.mark.parametrize("first", NATIVE)
@pytest.mark.parametrize("second", NATIVE)
def test_native_encodings_of_one_content_are_equal(first: str, second: str) -> None:
    dataset = with_pixels(rich())
    found = compared(as_syntax(dataset, first), as_syntax(dataset, second))
    assert found.equal, found


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_lengths_of_sequences_and_groups_and_padding_are_no_content(syntax: str, length: bool) -> None:
    dataset = rich()
    other = deepcopy(dataset)
    _undefine(other, length)
    other.DataSetTrailingPadding = bytes(100)
    whole = as_syntax(other, syntax)
    group = struct.pack(">HH" if syntax == BIG_ENDIAN else "<HH", 0x0008, 0x0000)
    tail = {IMPLICIT: struct.pack("<II", 4, 999), EXPLICIT: b"UL" + struct.pack("<HI", 4, 999),
            BIG_ENDIAN: b"UL" + struct.pack(">HI", 4, 999)}[syntax]  # fmt: skip
    padded = Instance(whole.sop_class_uid, whole.sop_instance_uid, syntax, whole.study_uid, whole.series_uid,
                      group + tail + whole.dataset)  # fmt: skip
    found = compared(as_syntax(dataset, EXPLICIT), padded)
    assert found.equal, found


def _undefine(dataset: Dataset, undefined: bool) -> None:
    for element in dataset:
        if element.VR == "SQ":
            element.is_undefined_length = undefined
            for item in element.value:
                item.is_undefined_length_sequence_item = undefined
                _undefine(item, undefined)


def test_padding_of_values_is_no_content() -> None:
    first = make_instance(rows=0, sop_uid="1.2.3", study_uid="1.2.4", series_uid="1.2.5")
    second = first.dataset.replace(b"LO\x06\0Thorax", b"LO\x08\0Thorax \0")
    assert second != first.dataset
    other = Instance(first.sop_class_uid, first.sop_instance_uid, EXPLICIT, "", "", second)
    assert compared(first, other).equal
    for wrong in (b"LO\x08\0 Thorax ", b"LO\x08\0Thorax\0x", b"SH\x06\0Thorax"):
        changed = Instance(first.sop_class_uid, first.sop_instance_uid, EXPLICIT, "", "",
                           first.dataset.replace(b"LO\x06\0Thorax", wrong))  # fmt: skip
        (found,) = compared(first, changed).differences
        assert found.path == "(0008,1030)" and found.what is What.CHANGED and found.first == ""


def test_differences_are_named_by_their_place_and_shown_when_asked() -> None:
    first, second = rich(), rich()
    second.PatientName = "Müller^Jürg"
    del second.AccessionNumber
    second.ReferencedImageSequence[0].PurposeOfReferenceCodeSequence[1].CodeValue = "other"
    second.ReferencedImageSequence.append(Dataset())
    second.StudyComments = "new"
    found = compared(as_syntax(first, EXPLICIT), as_syntax(second, IMPLICIT), show=True)
    assert {(one.path, one.what, one.first, one.second) for one in found.differences} == {
        ("(0010,0010)", What.CHANGED, "Müller^Jörg=x", "Müller^Jürg"),
        ("(0008,0050)", What.FIRST_ONLY, "A1", ""),
        ("(0008,1140)[1].(0040,A170)[2].(0008,0100)", What.CHANGED, "T-D0050", "other"),
        ("(0008,1140)[3]", What.SECOND_ONLY, "", "an item"),
        ("(0032,4000)", What.SECOND_ONLY, "", "new"),
    }
    assert not found.truncated and found.pixels is None
    few = compared(as_syntax(first, EXPLICIT), as_syntax(second, IMPLICIT), limits=CompareLimits(2))
    assert len(few.differences) == 2 and few.truncated and not few.equal


def test_pixels_that_differ_are_counted() -> None:
    first = with_pixels(rich())
    second = deepcopy(first)
    changed = bytearray(second.PixelData)
    changed[3] ^= 1
    changed[4] ^= 1
    second.PixelData = bytes(changed)
    for syntax in NATIVE:
        found = compared(as_syntax(first, EXPLICIT), as_syntax(second, syntax))
        assert found.pixels is not None and not found.differences
        assert found.pixels.words == "differs in 1 of 2 frames, 2 of 480 bytes"
    second.PixelData = first.PixelData[:-2]
    assert compared(as_syntax(first, EXPLICIT), as_syntax(second, EXPLICIT)).pixels is not None


# Compressed pixel data


def compressed(dataset: Dataset, syntax: str, frames: list[bytes]) -> Instance:
    dataset = deepcopy(dataset)
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return instance_of(dataset, syntax)


def rle(dataset: Dataset) -> Instance:
    from pydicom.pixels.encoders.base import get_encoder

    samples, frames = dataset.SamplesPerPixel, int(dataset.NumberOfFrames)
    size = len(dataset.PixelData) // frames
    encoder = get_encoder(UID(RLE))
    options: dict[str, Any] = {
        "rows": 12, "columns": 10, "samples_per_pixel": samples, "bits_allocated": dataset.BitsAllocated,
        "bits_stored": dataset.BitsStored, "pixel_representation": 0, "number_of_frames": 1,
        "photometric_interpretation": dataset.PhotometricInterpretation, "planar_configuration": 0,
    }  # fmt: skip
    pieces = [dataset.PixelData[n * size : (n + 1) * size] for n in range(frames)]
    return compressed(dataset, RLE, [encoder.encode(piece, **options) for piece in pieces])


def j2k(dataset: Dataset, syntax: str = J2K, **options: Any) -> Instance:
    frames = int(dataset.NumberOfFrames)
    kind = {8: "u1", 16: "<u2"}[dataset.BitsAllocated]
    whole = numpy.frombuffer(dataset.PixelData, kind).reshape(frames, 12, 10, dataset.SamplesPerPixel)
    streams = []
    for frame in whole:
        out = BytesIO()
        image = Image.fromarray(frame if frame.shape[2] == 3 else frame[:, :, 0])
        image.save(out, "JPEG2000", irreversible=syntax != J2K, no_jp2=True,
                   mct=1 if frame.shape[2] == 3 else 0, **options)  # fmt: skip
        streams.append(out.getvalue())
    result = deepcopy(dataset)
    if dataset.SamplesPerPixel == 3 and syntax == J2K:
        result.PhotometricInterpretation = "YBR_RCT"
    return compressed(result, syntax, streams)


ENCODERS: dict[str, Callable[[Dataset], Instance]] = {"rle": rle, "j2k": j2k}


@pytest.mark.parametrize("samples, bits", [(1, 8), (1, 16), (3, 8)])
@pytest.mark.parametrize("name", ENCODERS)
def test_lossless_encodings_are_decoded_and_compared(name: str, samples: int, bits: int) -> None:
    dataset = with_pixels(rich(), samples=samples, bits=bits)
    packed = ENCODERS[name](dataset)
    for syntax in (EXPLICIT, IMPLICIT, DEFLATED):
        found = compared(as_syntax(dataset, syntax), packed)
        assert found.equal, found
    other = deepcopy(dataset)
    other.PixelData = bytes([other.PixelData[0] ^ 1]) + other.PixelData[1:]
    found = compared(as_syntax(other, EXPLICIT), packed)
    assert found.pixels is not None and found.pixels.words == "differs in 1 of 2 frames"


@pytest.mark.parametrize("samples, bits", [(1, 8), (1, 16), (3, 8)])
def test_two_lossless_compressions_of_one_image_are_equal(samples: int, bits: int) -> None:
    dataset = with_pixels(rich(), samples=samples, bits=bits)
    assert compared(rle(dataset), j2k(dataset)).equal
    assert compared(j2k(dataset), j2k(dataset, num_resolutions=2)).equal, "other streams of the same samples"


def test_planes_and_pixels_of_a_colour_image() -> None:
    dataset = with_pixels(rich(), samples=3, bits=8, frames=1)
    planes = deepcopy(dataset)
    planes.PlanarConfiguration = 1
    pixels = numpy.frombuffer(dataset.PixelData, "u1").reshape(12, 10, 3)
    planes.PixelData = pixels.transpose(2, 0, 1).tobytes()
    assert compared(rle(dataset), as_syntax(planes, EXPLICIT)).equal
    found = compared(as_syntax(dataset, EXPLICIT), as_syntax(planes, EXPLICIT))
    assert found.pixels is not None, "two native images are compared as they stand"


def test_fragments_and_offset_tables_are_no_content() -> None:
    basic = make_instance(transfer_syntax=RLE, frames=3, sop_uid="1.2", study_uid="1.3", series_uid="1.4")
    for table in ("none", "extended"):
        other = make_instance(transfer_syntax=RLE, frames=3, sop_uid="1.2", study_uid="1.3", series_uid="1.4",
                              offset_table=table)  # fmt: skip
        assert compared(basic, other).equal


def test_what_was_compressed_with_loss_is_never_equivalent() -> None:
    flat = with_pixels(rich(), bits=8)
    flat.PixelData = bytes(len(flat.PixelData))
    found = compared(as_syntax(flat, EXPLICIT), j2k(flat, J2K_LOSSY))
    assert found.pixels is not None and "loss" in found.pixels.words, "although its samples are the same"
    assert compared(j2k(flat, J2K_LOSSY), j2k(flat, J2K_LOSSY)).equal, "the very same stream"


@pytest.mark.parametrize("program, syntax, option", [("dcmcjpls", JPEG_LS, "+el"),
                                                     ("dcmcjpeg", JPEG_LOSSLESS, "+e1")])  # fmt: skip
def test_dcmtks_lossless_files(tmp_path: Path, program: str, syntax: str, option: str) -> None:
    dataset = with_pixels(make_dataset(), frames=1)
    plain = as_syntax(dataset, EXPLICIT)
    (tmp_path / "a.dcm").write_bytes(plain.part10)
    subprocess.run([dcmtk(program), option, "+un", tmp_path / "a.dcm", tmp_path / "b.dcm"], check=True,
                   capture_output=True)  # fmt: skip
    packed = instance_from_file(tmp_path / "b.dcm")
    assert packed.transfer_syntax_uid == syntax
    found = compared(plain, packed)
    if get_decoder(UID(syntax)).is_available:
        assert found.equal, found
    else:
        assert not found.equal and "can't be decoded here" in found.undecided


def test_bounds_end_a_comparison_undecided() -> None:
    dataset = with_pixels(rich())
    few = CompareLimits(pixels=PixelLimits(bytes_max=100))
    explicit = as_syntax(dataset, EXPLICIT)
    assert "not compared" in compared(explicit, as_syntax(dataset, IMPLICIT), limits=few).undecided
    assert "not compared" in compared(explicit, rle(dataset), limits=few).undecided
    short = CompareLimits(seconds_max=-1)
    assert "within" in compared(explicit, rle(dataset), limits=short).undecided


def test_what_lies_behind_the_pixels_or_the_end_is_not_passed_over() -> None:
    first = make_instance(sop_uid="1.2", study_uid="1.3", series_uid="1.4")
    for tail in (b"\xff\xff\x01\x00OB\0\0\xff\0\0\0abc", b"\0" * 8 + b"something", b"xyz"):
        other = Instance(first.sop_class_uid, first.sop_instance_uid, EXPLICIT, "", "", first.dataset + tail)
        for one, two in ((first, other), (other, first), (other, other)):
            assert not compared(one, two).equal
    zeros = Instance(first.sop_class_uid, first.sop_instance_uid, EXPLICIT, "", "", first.dataset + bytes(64))
    assert compared(first, zeros).equal


def test_a_private_sequence_that_implicit_vr_does_not_name() -> None:
    dataset = rich()
    explicit, implicit = as_syntax(dataset, EXPLICIT), as_syntax(dataset, IMPLICIT)
    assert compared(explicit, implicit).equal and compared(implicit, explicit).equal
    changed = rich()
    changed.private_block(0x0019, "MISS TEST")[0x03].value[0].CodeValue = "x"
    (found,) = compared(explicit, as_syntax(changed, IMPLICIT)).differences
    assert found.path.startswith("(0019,1003)[1]")


# pydicom encodes the texts of its character set files anew, not as they stood.
REAL = [path for path in shipped_files() if path.parent.name != "charset_files"]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_files_equal_themselves_in_other_encodings(path: Path) -> None:
    original = instance_from_file(path)
    dataset = dcmread(path)
    if original.transfer_syntax_uid == BIG_ENDIAN or not compared(original, original).equal:
        return  # broken ones (cut pixel data): not equal to anything
    syntax = UID(original.transfer_syntax_uid)
    if syntax.is_encapsulated:
        return
    for other in (EXPLICIT, IMPLICIT, DEFLATED):
        try:
            again = encode(dataset, other)
        except Exception:
            continue  # pydicom can't write it
        made = Instance(original.sop_class_uid, original.sop_instance_uid, other, "", "", again)
        try:
            reread = made.read()
            same = encode(reread, EXPLICIT) == encode(dataset, EXPLICIT)
        except Exception:
            continue
        if same:
            found = compared(original, made)
            assert found.equal, (other, found)


# One element anywhere


PLACES = st.sampled_from(["root", "item", "inner", "private"])
TAGS = st.sampled_from(["PatientID", "StudyDescription", "CodeValue", "WindowWidth", "KVP", "Rows",
                        "SliceThickness", "ReferencedSOPInstanceUID", "AcquisitionDate", "LUTData",
                        "ExposureTime", "PatientName", "FloatingPointValue"])  # fmt: skip
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "US": st.integers(0, 65535), "DS": st.integers(-999, 999), "IS": st.integers(-9999, 9999),
    "FD": st.floats(allow_nan=False), "FL": st.floats(width=32, allow_nan=False),
    "DA": st.dates().map(lambda day: f"{day:%Y%m%d}".zfill(8)),
    "UI": st.integers(0, 10**12).map(lambda n: f"1.2.{n}"),
    "US or OW": st.integers(0, 65535),
}  # fmt: skip
TEXT = st.text("abcdefgABCDEFG 0123456789^", max_size=12)


@settings(deadline=None, max_examples=150)
@given(PLACES, TAGS, st.data(), st.sampled_from(NATIVE), st.sampled_from(NATIVE))
def test_one_element_changed_anywhere_is_found(
    place: str, keyword: str, data: st.DataObject, first: str, second: str
) -> None:
    dataset = rich()
    other = deepcopy(dataset)
    strategy = VALUES.get(dictionary_VR(keyword), TEXT)
    was, now = data.draw(strategy), data.draw(strategy)
    for one, value in ((dataset, was), (other, now)):
        target = {"root": one, "item": one.ReferencedImageSequence[1],
                  "inner": one.ReferencedImageSequence[0].PurposeOfReferenceCodeSequence[1],
                  "private": one.private_block(0x0019, "MISS TEST")[0x03].value[0]}[place]  # fmt: skip
        setattr(target, keyword, value)
        if keyword == "LUTData":
            target["LUTData"].VR = "US"
    encoded = [_bytes_of(one) for one in (dataset, other)]
    found = compared(as_syntax(dataset, first), as_syntax(other, second))
    assert not found.undecided
    assert found.equal == (encoded[0] == encoded[1]), found
    assert len(found.differences) <= 1


def _bytes_of(dataset: Dataset) -> bytes:
    """One encoding that tells two contents apart: pydicom's, with trailing spaces taken for padding."""
    dataset = deepcopy(dataset)
    for element in dataset.iterall():
        if isinstance(element.value, str) and element.VR != "UI":
            element.value = element.value.rstrip(" ")
        elif element.VR == "PN":
            element.value = str(element.value).rstrip(" ")
    return encode(dataset, EXPLICIT)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60), st.integers(0, 4000))
def test_bytes_changed_anywhere_never_make_an_equal(noise: bytes, place: int) -> None:
    """Whatever is broken, comparing ends, without an exception."""
    first = as_syntax(with_pixels(rich()), EXPLICIT)
    whole = bytearray(first.dataset)
    place %= len(whole)
    whole[place : place + len(noise)] = noise
    other = Instance(first.sop_class_uid, first.sop_instance_uid, EXPLICIT, "", "", bytes(whole))
    found = compared(first, other)
    if found.equal:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Expected explicit VR")
                mine = _bytes_of(other.read())
        except (NotImplementedError, UserWarning):  # pydicom: a VR that nobody knows, before the same value
            return
        assert mine == _bytes_of(first.read())
