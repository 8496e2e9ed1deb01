"""DICOM JSON metadata and bulk data, judged by pydicom, which must read them back as it reads the file."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.sequence import Sequence

from archive.dataset.dicomjson import JsonLimits, bulk, metadata
from archive.dataset.elements import WalkLimits
from archive.errors import CannotUnderstand, MissError, NotFound, TooLarge
from tests.archive.corpora import REFUSED, hostile, needs_hostile, needs_public, storable
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
    native_pixels,
    shipped_files,
)


def uri(path: tuple[str, ...]) -> str:
    return "bulk/" + "/".join(path)


def read(data: bytes, **rest: Any) -> dict[str, Any]:
    """The metadata, which is strict JSON."""
    found = metadata(BytesIO(data), bulk_uri=uri, **rest)
    text = json.dumps(found, allow_nan=False)
    return dict(json.loads(text))


def of(dataset: Dataset, transfer_syntax: str = EXPLICIT, **rest: Any) -> dict[str, Any]:
    return read(instance_of(dataset, transfer_syntax).part10, **rest)


# ---------------------------------------------------------------- the whole data set


def back(data: bytes) -> Dataset:
    """The data set that pydicom makes of the metadata and the bulk data."""

    def fetch(tag: str, vr: str, where: str) -> bytes:
        return b"".join(bulk(BytesIO(data), where.removeprefix("bulk/")))

    return Dataset.from_json(read(data), bulk_data_uri_handler=fetch)


def leaves(dataset: Dataset, path: str = "") -> Iterator[tuple[str, str, Any]]:
    for element in dataset:
        if element.tag.element == 0 or element.tag.group == 2:
            continue
        where = f"{path}/{element.tag}"
        if element.VR == "SQ":
            yield where, "SQ", len(element.value)
            for number, item in enumerate(element.value):
                yield from leaves(item, f"{where}/{number}")
        else:
            yield where, element.VR, plain(element.VR, element.value)


def plain(vr: str, value: Any) -> Any:
    if value is None or value == "" or value == b"":
        return ()
    if isinstance(value, bytes):
        return value
    values = (
        list(value) if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue" else [value]
    )
    if vr in ("IS", "DS", "FL", "FD"):
        return tuple(float(part) if part not in ("", None) else None for part in values)
    if vr == "PN":
        return tuple(str(part).rstrip("= ") for part in values)
    if all(isinstance(part, int) and not isinstance(part, bool) for part in values) and vr != "AT":
        return tuple(values)
    texts = tuple("" if part is None else str(part).strip(" \0") for part in values)
    return texts if any(texts) else ()


# These hold values that pydicom itself refuses to read or to take back from JSON.
_NOT_READ_BACK = {"badVR.dcm", "rtplan_truncated.dcm", "chrX2.dcm", "MR_truncated.dcm"}


@pytest.mark.parametrize(
    "path", [p for p in shipped_files() if p.name not in _NOT_READ_BACK], ids=lambda path: path.name
)
def test_pydicom_reads_back_what_it_reads(path: Path) -> None:
    data = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected: Dataset = dcmread(BytesIO(data))
        pixels = expected.PixelData if "PixelData" in expected else None
        compressed = dcmread(BytesIO(data)).file_meta.TransferSyntaxUID.is_encapsulated
        little = expected.original_encoding[1]
        if pixels is not None:
            del expected.PixelData
        expected = correct_ambiguous_vr(expected, bool(little))
        found = back(data)
    if pixels is not None:
        if compressed:
            assert found.PixelData == b"".join(list(generate_fragments(pixels))[1:])
        elif little:
            assert found.PixelData == pixels
        del found.PixelData
    left, right = list(leaves(found)), list(leaves(expected))
    assert [(where, vr) for where, vr, _ in left] == [(where, vr) for where, vr, _ in right]
    if little:
        assert left == right


@needs_public
def test_every_public_instance_has_metadata() -> None:
    failed = {}
    for path, entry in storable():
        if entry["file"] in REFUSED:
            continue
        try:
            found = read(path.read_bytes())
        except MissError as error:
            failed[entry["file"]] = repr(error)
            continue
        assert found["00080018"]["Value"] == [entry["iuid"]]
    assert not failed


@pytest.mark.parametrize("transfer_syntax", NATIVE)
def test_every_encoding_gives_the_same_metadata(transfer_syntax: str) -> None:
    item = Dataset()
    item.CodeValue = "X"
    item.add_new(0x00081160, "IS", "1")
    dataset = make_dataset(
        study_uid="1.2.3",
        series_uid="1.2.4",
        sop_uid="1.2.5",
        patient_name="Müller^Jürgen=山田=やまだ",
        Rows=512,
        PixelAspectRatio=[1, 2],
        SliceThickness="1.25",
        RecommendedDisplayFrameRateInFloat=None,
        FrameIncrementPointer=[0x00181063, 0x00540010],
        ProcedureCodeSequence=Sequence([item, Dataset()]),
        AcquisitionContextSequence=Sequence(),
        RedPaletteColorLookupTableDescriptor=[256, 0, 16],
        RedPaletteColorLookupTableData=struct.pack("<3H", 1, 2, 3)
        if transfer_syntax != BIG_ENDIAN
        else struct.pack(">3H", 1, 2, 3),
        PatientComments="a\\b",
    )
    dataset.add_new(0x00186020, "SL", -5)
    dataset.add_new(0x00189087, "FD", [0.5, 1e300])
    found = of(dataset, transfer_syntax)
    assert found["00100010"] == {
        "vr": "PN",
        "Value": [{"Alphabetic": "Müller^Jürgen", "Ideographic": "山田", "Phonetic": "やまだ"}],
    }
    assert found["00280010"] == {"vr": "US", "Value": [512]}
    assert found["00280034"] == {"vr": "IS", "Value": [1, 2]}
    assert found["00180050"] == {"vr": "DS", "Value": [1.25]}
    assert found["00280009"] == {"vr": "AT", "Value": ["00181063", "00540010"]}
    assert found["00081032"]["Value"] == [
        {"00080100": {"vr": "SH", "Value": ["X"]}, "00081160": {"vr": "IS", "Value": [1]}},
        {},
    ]
    assert found["00400555"] == {"vr": "SQ"}
    assert found["00281101"] == {"vr": "US", "Value": [256, 0, 16]}
    assert found["00281201"] == {
        "vr": "OW",
        "InlineBinary": base64.b64encode(struct.pack("<3H", 1, 2, 3)).decode(),
    }
    assert found["00104000"] == {"vr": "LT", "Value": ["a\\b"]}
    assert found["00186020"] == {"vr": "SL", "Value": [-5]}
    assert found["00189087"] == {"vr": "FD", "Value": [0.5, 1e300]}
    assert list(found) == sorted(found)


def test_private_elements_are_kept() -> None:
    dataset = make_dataset()
    block = dataset.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    block.add_new(0x08, "CS", "IMAGE NUM 4")
    for syntax in (EXPLICIT, IMPLICIT):
        found = of(dataset, syntax)
        assert found["00290010"] == {"vr": "LO", "Value": ["SIEMENS CSA HEADER"]}
        assert found["00291008"] == {"vr": "CS", "Value": ["IMAGE NUM 4"]}
    unknown = make_dataset()
    unknown.private_block(0x0029, "NOBODY KNOWS", create=True).add_new(0x08, "LO", "AB")
    assert of(unknown, IMPLICIT)["00291008"] == {"vr": "UN", "InlineBinary": base64.b64encode(b"AB").decode()}


def test_the_issuer_in_force_shows_where_the_object_names_none() -> None:
    assert of(make_dataset(), issuer="SANMARTINO")["00100021"] == {"vr": "LO", "Value": ["SANMARTINO"]}
    own = make_dataset(IssuerOfPatientID="OTHER")
    assert of(own, issuer="SANMARTINO")["00100021"] == {"vr": "LO", "Value": ["OTHER"]}
    empty = make_dataset(IssuerOfPatientID="")
    assert of(empty, issuer="SANMARTINO")["00100021"] == {"vr": "LO", "Value": ["SANMARTINO"]}
    assert "00100021" not in of(make_dataset())
    assert list(of(make_dataset(), issuer="X")) == sorted(of(make_dataset(), issuer="X"))


@pytest.mark.parametrize(
    ("vr", "tag", "raw", "value"),
    [
        (b"IS", 0x00200013, b"abc ", ["abc"]),
        (b"IS", 0x00200013, b"1_0 ", ["1_0"]),
        (b"IS", 0x00200013, b"12\\\\3 ", [12, None, 3]),
        (b"DS", 0x00180050, b"1e400 ", ["1e400"]),
        (b"DS", 0x00180050, b"-Infinity ", ["-Infinity"]),
        (b"DS", 0x00180050, b"nan ", ["nan"]),
        (b"DS", 0x00180050, b"1." + b"3" * 80, [1.3333333333333333]),
        (b"IS", 0x00200013, b"9" * 5000, ["9" * 5000]),
        (
            b"FD",
            0x00189087,
            struct.pack("<3d", math.inf, -math.inf, math.nan),
            ["Infinity", "-Infinity", "NaN"],
        ),
        (b"DA", 0x00080020, b"99999999", ["99999999"]),
    ],
)
def test_bad_values_stay_and_the_json_stays_strict(vr: bytes, tag: int, raw: bytes, value: list[Any]) -> None:
    dataset = make_dataset(InstanceNumber=None, StudyDate=None)
    element = struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(raw)) + raw
    instance = make_instance(rows=0)
    plain_dataset = encode(dataset, EXPLICIT)
    part10 = instance.part10[: -len(instance.dataset)] + plain_dataset + element
    assert read(part10)[f"{tag:08X}"] == {"vr": vr.decode(), "Value": value}


def test_the_first_of_two_is_shown() -> None:
    instance = make_instance(rows=0)
    second = struct.pack("<HH2sH", 0x0010, 0x0020, b"LO", 6) + b"SECOND"
    found = read(instance.part10 + second)
    assert found["00100020"]["Value"] == ["123"]


# ---------------------------------------------------------------- bulk data


@pytest.mark.parametrize("transfer_syntax", NATIVE)
def test_native_pixel_data_are_named_and_served_little_endian(transfer_syntax: str) -> None:
    instance = make_instance(transfer_syntax=transfer_syntax, frames=3, rows=32, columns=32)
    found = read(instance.part10)
    assert found["7FE00010"] == {"vr": "OW", "BulkDataURI": "bulk/7FE00010"}
    assert b"".join(bulk(BytesIO(instance.part10), "7FE00010")) == native_pixels(32, 32, 3, 1)


@pytest.mark.parametrize("offset_table", ["basic", "none", "extended"])
def test_encapsulated_pixel_data_are_served_without_item_tags(offset_table: str) -> None:
    frames = [b"\xff\xd8\xff" + bytes([i]) * (101 + 2 * i) for i in range(3)]
    instance = make_instance(
        transfer_syntax="1.2.840.10008.1.2.4.50", encapsulated=frames, offset_table=offset_table
    )
    found = read(instance.part10)
    assert found["7FE00010"] == {"vr": "OB", "BulkDataURI": "bulk/7FE00010"}
    served = b"".join(bulk(BytesIO(instance.part10), "7FE00010"))
    assert served == b"".join(frame + b"\0" * (len(frame) % 2) for frame in frames)


def test_large_values_are_named_at_any_depth() -> None:
    inner = Dataset()
    inner.add_new(0x00480105, "OB", b"\1\2" * 1000)
    inner.CodeValue = "X"
    outer = Dataset()
    outer.add_new(0x52009229, "SQ", [inner])
    dataset = make_dataset()
    dataset.add_new(0x52009229, "SQ", [Dataset(), outer])
    dataset.EncapsulatedDocument = b"%PDF" * 500
    part10 = instance_of(dataset).part10
    found = read(part10)
    path = "52009229/2/52009229/1/00480105"
    nested = found["52009229"]["Value"][1]["52009229"]["Value"][0]
    assert nested["00480105"] == {"vr": "OB", "BulkDataURI": f"bulk/{path}"}
    assert nested["00080100"]["Value"] == ["X"]
    assert b"".join(bulk(BytesIO(part10), path)) == b"\1\2" * 1000
    assert b"".join(bulk(BytesIO(part10), "00420011")) == b"%PDF" * 500


def test_pixel_data_that_end_early_are_not_served_as_if_whole() -> None:
    part10 = make_instance(rows=64, columns=64).part10
    with pytest.raises(CannotUnderstand):
        list(bulk(BytesIO(part10[:-2]), "7FE00010"))


@pytest.mark.parametrize(
    "path",
    [
        "", "x", "7fe00010", "7FE00010/", "00420011", "52009229", "52009229/1", "52009229/0/00480105",
        "52009229/9/00480105", "00080005/1/00080005", "../../etc/passwd", "7FE00010/" * 1000 + "7FE00010",
    ],
)  # fmt: skip
def test_what_is_not_there_is_not_found(path: str) -> None:
    with pytest.raises(NotFound):
        list(bulk(BytesIO(make_instance().part10), path))


def test_big_endian_words_are_swapped_by_their_size() -> None:
    dataset = make_dataset()
    dataset.add_new(0x00281201, "OW", struct.pack(">1000H", *range(1000)))
    dataset.add_new(0x7FE00008, "OF", struct.pack(">500f", *range(500)))
    dataset.add_new(0x00420011, "OB", bytes(range(250)) * 8)
    part10 = instance_of(dataset, BIG_ENDIAN).part10
    assert b"".join(bulk(BytesIO(part10), "00281201")) == struct.pack("<1000H", *range(1000))
    assert b"".join(bulk(BytesIO(part10), "7FE00008")) == struct.pack("<500f", *range(500))
    assert b"".join(bulk(BytesIO(part10), "00420011")) == bytes(range(250)) * 8


class Counting(BytesIO):
    """A file that counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.bytes_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.bytes_read += len(data)
        return data


def test_pixel_data_are_not_read_for_metadata() -> None:
    file = Counting(make_instance(rows=1024, columns=1024, frames=8).part10)
    metadata(file, bulk_uri=uri)
    assert file.bytes_read < 200_000


def test_bulk_data_come_in_pieces() -> None:
    instance = make_instance(rows=1024, columns=1024, frames=2)
    pieces = list(bulk(BytesIO(instance.part10), "7FE00010"))
    assert sum(map(len, pieces)) == 4 << 20
    assert max(map(len, pieces)) <= 1 << 20


# ---------------------------------------------------------------- bounds


def _deep(depth: int) -> bytes:
    head = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    head += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    tail = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    return head * depth + tail * depth


def test_nesting_has_a_bound() -> None:
    instance = make_instance(rows=0)
    prefix = instance.part10[: -len(instance.dataset)]
    assert read(prefix + _deep(100))["00081140"]
    for depth in (101, 100_000):
        with pytest.raises(CannotUnderstand, match="nest"):
            read(prefix + _deep(depth))


def test_elements_have_a_bound() -> None:
    with pytest.raises(TooLarge):
        read(make_instance().part10, limits=JsonLimits(walk=WalkLimits(elements_max=10)))


def test_inline_values_have_a_bound() -> None:
    dataset = make_dataset()
    for number in range(20):
        dataset.add_new(0x00100010 + 0x10000 * 2 * number + 0x9000, "OB", bytes(1000))
    with pytest.raises(TooLarge):
        of(dataset, limits=JsonLimits(inline_bytes_max=10_000))


def test_a_deflated_bomb_costs_its_bound() -> None:
    instance = make_instance(transfer_syntax=DEFLATED, rows=0)
    plain_dataset = zlib.decompress(instance.dataset, wbits=-15)
    deflate = zlib.compressobj(wbits=-15)
    bomb = deflate.compress(plain_dataset + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, 300 << 20))
    for _ in range(300):
        bomb += deflate.compress(bytes(1 << 20))
    bomb += deflate.flush()
    started = time.perf_counter()
    found = read(instance.part10[: -len(instance.dataset)] + bomb)
    assert found["7FE00010"]["BulkDataURI"]
    assert time.perf_counter() - started < 3
    limits = WalkLimits(inflated_bytes_max=10 << 20)
    with pytest.raises(TooLarge):
        for _ in bulk(BytesIO(instance.part10[: -len(instance.dataset)] + bomb), "7FE00010", limits=limits):
            pass


@needs_hostile
def test_the_hostile_set_costs_little() -> None:
    slow = {}
    for path, _ in hostile():
        started = time.thread_time()
        with contextlib.suppress(MissError):
            read(path.read_bytes())
        elapsed = time.thread_time() - started
        if elapsed > (3 if "elements" in path.name else 0.5):
            slow[path.name] = elapsed
    assert not slow


def survives(data: bytes) -> None:
    try:
        found = read(data)
    except MissError:
        return
    for path in _uris(found):
        with contextlib.suppress(MissError):
            for _ in bulk(BytesIO(data), path):
                pass


def _uris(item: dict[str, Any]) -> Iterator[str]:
    for element in item.values():
        if "BulkDataURI" in element:
            yield element["BulkDataURI"].removeprefix("bulk/")
        if element["vr"] == "SQ":
            for nested in element.get("Value", ()):
                yield from _uris(nested)


@given(st.binary(max_size=1000), st.sampled_from([*NATIVE, RLE]))
@settings(max_examples=200, deadline=None)
def test_survives_any_bytes(data: bytes, transfer_syntax: str) -> None:
    instance = make_instance(transfer_syntax=transfer_syntax, rows=0)
    survives(instance.part10[: len(instance.part10) - len(instance.dataset)] + data)


_SEEDS = [make_instance(transfer_syntax=syntax, rows=4, columns=4) for syntax in [*NATIVE, RLE]] + [
    instance_from_file(path)
    for path in shipped_files()
    if path.name in ("test-SR.dcm", "rtplan.dcm", "chrH31.dcm", "waveform_ecg.dcm", "liver_1frame.dcm")
]


@given(
    st.sampled_from(_SEEDS),
    st.lists(st.tuples(st.integers(0, 20_000), st.binary(max_size=4), st.integers(0, 6)), max_size=8),
)
@settings(max_examples=250, deadline=None)
def test_survives_mutated_data_sets(seed: Instance, changes: list[tuple[int, bytes, int]]) -> None:
    data = bytearray(seed.dataset)
    for at, new, old in changes:
        at %= len(data) + 1
        data[at : at + old] = new
    survives(seed.part10[: -len(seed.dataset)] + bytes(data))
