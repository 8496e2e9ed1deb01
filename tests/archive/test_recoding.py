"""Recoding to the native syntaxes: every element and pixel stays what it was, as pydicom reads it (M8)."""

from __future__ import annotations

from io import BytesIO

import numpy
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from archive.dataset import recoding
from archive.dataset.encoding import EXPLICIT_LITTLE, IMPLICIT_LITTLE
from archive.errors import CannotUnderstand, TooLarge
from archive.model import Location, StoredInstance
from archive.packs.records import part10_prefix
from tests.datasets import (
    BIG_ENDIAN,
    CT,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    PROVENANCE,
    RLE,
    Instance,
    instance_of,
    make_dataset,
    make_instance,
)

MIB = 1 << 20
TARGETS = (EXPLICIT_LITTLE, IMPLICIT_LITTLE)


def stored(one: Instance, **fields: str) -> tuple[BytesIO, StoredInstance]:
    """The instance as a pack has it."""
    prefix = part10_prefix(one.head(PROVENANCE))
    location = Location("packs/00000001.pack", 0, len(prefix) + len(one.dataset), len(prefix))
    return (BytesIO(prefix + one.dataset),
            StoredInstance(one.study_uid, one.series_uid, one.head(PROVENANCE), one.digest, location, fields))


def recoded(one: Instance, target: str, bytes_max: int = 16 * MIB) -> Dataset:
    """By whichever way a retrieve takes."""
    payload, instance = stored(one)
    spliced = recoding.spliced(payload, instance, target, bytes_max)
    if spliced is None:
        octets = recoding.recoded(payload, instance, target, bytes_max)
    else:
        octets = spliced.octets + one.dataset[spliced.rest_from:]
    return Instance(one.sop_class_uid, one.sop_instance_uid, target, "", "", octets).read()


def same(dataset: Dataset, other: Dataset) -> None:
    assert [element.tag for element in dataset] == [element.tag for element in other]
    for element in dataset:
        if element.keyword != "PixelData":
            assert element.value == other[element.tag].value, element.tag


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED, RLE])
def test_elements_and_pixels_stay(syntax: str, target: str) -> None:
    one = make_instance(transfer_syntax=syntax, rows=12, columns=10)
    before, after = one.read(), recoded(one, target)
    assert after.file_meta.TransferSyntaxUID == target
    assert (before.pixel_array == after.pixel_array).all()
    if syntax != RLE:
        same(before, after)
    assert "LossyImageCompression" not in after


@pytest.mark.parametrize(("source", "target"), [(EXPLICIT, IMPLICIT_LITTLE), (IMPLICIT, EXPLICIT_LITTLE)])
def test_what_is_hard_about_vrs(source: str, target: str) -> None:
    """Long values under short VRs, private elements, ambiguous VRs, nested sequences, group lengths."""
    item = Dataset()
    item.CodeValue, item.CodeMeaning = "1", "Grün"
    dataset = make_dataset(Rows=2, Columns=2, BitsAllocated=16, BitsStored=16, HighBit=15, SamplesPerPixel=1,
                           PixelRepresentation=1, PhotometricInterpretation="MONOCHROME2",
                           SmallestImagePixelValue=-3, AnatomicRegionSequence=Sequence([item]))
    dataset.private_block(0x0009, "SOMEBODY", create=True).add_new(1, "UN", b"\1\2\3\4")
    if source == IMPLICIT:
        dataset.add_new(0x00081155, "UI", ["1.2.3"] * 1)
        dataset.add_new(0x00204000, "LT", "x" * 10_000)
    dataset.PixelData = bytes(range(8))
    one = instance_of(dataset, source)
    before, after = one.read(), recoded(one, target)
    assert after.SmallestImagePixelValue == -3
    assert after.AnatomicRegionSequence[0].CodeMeaning == "Grün"
    assert after[0x00091001].value == b"\1\2\3\4"
    assert after.PixelData == before.PixelData


def test_pixels_are_not_held_where_only_vrs_change() -> None:
    """The beginning is written anew, and the value of the pixel data is the stored one, past any bound."""
    one = make_instance(transfer_syntax=IMPLICIT, rows=512, columns=512, frames=8)
    payload, instance = stored(one)
    spliced = recoding.spliced(payload, instance, EXPLICIT_LITTLE, MIB)
    assert spliced is not None and len(spliced.octets) < 10_000
    assert len(one.dataset) - spliced.rest_from == 512 * 512 * 2 * 8
    with pytest.raises(TooLarge):
        recoding.recoded(payload, instance, EXPLICIT_LITTLE, MIB)


def test_what_stands_behind_the_pixels_is_not_lost() -> None:
    """Then it can't be spliced."""
    dataset = dcmread(BytesIO(make_instance(rows=4, columns=4).part10))
    dataset.add_new(0xFFFCFFFC, "OB", b"\0" * 6)
    one = instance_of(dataset, EXPLICIT)
    payload, instance = stored(one)
    assert recoding.spliced(payload, instance, IMPLICIT_LITTLE, MIB) is None
    assert recoded(one, IMPLICIT_LITTLE)[0xFFFCFFFC].value == b"\0" * 6


def jpeg(dataset: Dataset, quality: int = 90) -> bytes:
    pil = pytest.importorskip("PIL.Image")
    out = BytesIO()
    pixels = numpy.arange(dataset.Rows * dataset.Columns * 3, dtype=numpy.uint8)
    pil.fromarray(pixels.reshape(dataset.Rows, dataset.Columns, 3)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def test_lossy_pixels_come_out_as_any_reader_decodes_them_and_say_so() -> None:
    baseline = "1.2.840.10008.1.2.4.50"
    if not recoding.can_decode(baseline):
        pytest.skip("no decoder for JPEG baseline is installed")
    one = instance_of(_colour(baseline), baseline)
    after = recoded(one, EXPLICIT_LITTLE)
    assert after.PhotometricInterpretation == "RGB"
    assert after.LossyImageCompression == "01"
    assert after.SOPInstanceUID == one.sop_instance_uid
    from pydicom.pixels.utils import pixel_array

    assert (after.pixel_array == pixel_array(one.read())).all()


def _colour(syntax: str) -> Dataset:
    dataset = make_dataset(Rows=16, Columns=16, BitsAllocated=8, BitsStored=8, HighBit=7, SamplesPerPixel=3,
                           PixelRepresentation=0, PlanarConfiguration=0,
                           PhotometricInterpretation="YBR_FULL_422")
    frame = jpeg(dataset)
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    return dataset


def test_an_icon_that_is_compressed_too_is_decoded() -> None:
    one = dcmread(BytesIO(make_instance(transfer_syntax=RLE, rows=8, columns=8).part10))
    icon = Dataset()
    for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel",
                    "PixelRepresentation", "PhotometricInterpretation"):
        setattr(icon, keyword, one[keyword].value)
    icon.PixelData = one.PixelData
    icon["PixelData"].VR, icon["PixelData"].is_undefined_length = "OB", True
    one.IconImageSequence = Sequence([icon])
    after = recoded(instance_of(one, RLE), IMPLICIT_LITTLE)
    assert after.IconImageSequence[0].PixelData == after.PixelData
    assert len(after.PixelData) == 8 * 8 * 2


def test_what_can_not_be_recoded_is_refused() -> None:
    one = make_instance(transfer_syntax=RLE, rows=64, columns=64)
    payload, instance = stored(one, Rows="64", Columns="64", BitsAllocated="16")
    with pytest.raises(TooLarge):
        recoding.recoded(payload, instance, EXPLICIT_LITTLE, 10_000)
    broken = Instance(CT, one.sop_instance_uid, RLE, "", "", one.dataset[:-2_000])
    payload, instance = stored(broken)
    with pytest.raises(CannotUnderstand):
        recoding.recoded(payload, instance, EXPLICIT_LITTLE, MIB)
    item = b"\xfe\xff\x00\xe0"
    frame = one.dataset.index(item, one.dataset.index(item) + 4) + 8  # behind the offset table
    segments = b"\xff" * 64  # an RLE header of nonsense (PS3.5 G.5)
    garbled = one.dataset[:frame] + segments + one.dataset[frame + 64 :]
    payload, instance = stored(Instance(CT, one.sop_instance_uid, RLE, "", "", garbled))
    with pytest.raises(CannotUnderstand, match="can't be decoded here"):
        recoding.recoded(payload, instance, EXPLICIT_LITTLE, MIB)
    assert not recoding.can_decode("1.2.840.10008.1.2.4.100")  # MPEG-2


