"""Heads of Part 10 files: ours, other writers', and what is none."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archive.dataset.part10 import read_head, read_meta
from archive.errors import CannotUnderstand, InvalidInstance, MissError
from tests.archive.corpora import needs_public, storable
from tests.datasets import DEFLATED, EXPLICIT, NATIVE, instance_from_file, make_instance, shipped_files


def meta(*elements: tuple[int, bytes, bytes]) -> bytes:
    out = b""
    for number, vr, value in elements:
        head = struct.pack("<HH2s", 2, number, vr)
        long = vr in (b"OB", b"UN")
        out += head + (struct.pack("<HI", 0, len(value)) if long else struct.pack("<H", len(value))) + value
    return out


INSTANCE = make_instance()
CLASS = (2, b"UI", INSTANCE.sop_class_uid.encode() + b"\0")
NAME = (3, b"UI", INSTANCE.sop_instance_uid.encode() + b"\0" * (len(INSTANCE.sop_instance_uid) % 2))
SYNTAX = (0x10, b"UI", EXPLICIT.encode() + b"\0")
PREFIX = bytes(128) + b"DICM"


@pytest.mark.parametrize("transfer_syntax", NATIVE)
def test_reads_what_pydicom_writes(transfer_syntax: str) -> None:
    instance = make_instance(transfer_syntax=transfer_syntax)
    head = read_head(BytesIO(instance.part10))
    assert head.sop_class_uid == instance.sop_class_uid
    assert head.sop_instance_uid == instance.sop_instance_uid
    assert head.transfer_syntax_uid == transfer_syntax
    assert instance.part10[head.dataset_offset :] == instance.dataset


@pytest.mark.parametrize("path", shipped_files(), ids=lambda path: path.name)
def test_reads_real_files_as_pydicom_does(path: Path) -> None:
    instance = instance_from_file(path)
    with path.open("rb") as file:
        head = read_head(file)
        assert (head.sop_class_uid, head.sop_instance_uid, head.transfer_syntax_uid) == (
            instance.sop_class_uid,
            instance.sop_instance_uid,
            instance.transfer_syntax_uid,
        )
        file.seek(head.dataset_offset)
        assert file.read() == instance.dataset


@needs_public
def test_the_data_set_says_who_it_is() -> None:
    refused = []
    for path, entry in storable():
        try:
            with path.open("rb") as file:
                head = read_head(file)
        except InvalidInstance:
            refused.append(path.name)
            continue
        assert (head.sop_instance_uid, head.sop_class_uid) == (entry["iuid"], entry["cls"])
        assert head.transfer_syntax_uid == entry["ts"]
    assert sorted(refused) == ["3gb-bulk-data-truncated", "bad_sequence.dcm"]


@pytest.mark.parametrize(
    "start",
    [
        PREFIX + meta(CLASS, NAME, SYNTAX),
        PREFIX + meta((0, b"UL", struct.pack("<I", 4)), CLASS, NAME, SYNTAX),
        PREFIX + meta((0, b"UL", struct.pack("<I", 60000)), CLASS, NAME, SYNTAX),
        PREFIX + meta((1, b"OB", b"\0\1"), SYNTAX, (0x102, b"OB", bytes(500))),
        b"DICM" + meta(CLASS, NAME, SYNTAX),
        meta(CLASS, NAME, SYNTAX),
        b"MZ" + PREFIX[2:] + meta(CLASS, NAME, SYNTAX),
    ],
)
def test_forgives_what_writers_do(start: bytes) -> None:
    head = read_head(BytesIO(start + INSTANCE.dataset))
    assert (start + INSTANCE.dataset)[head.dataset_offset :] == INSTANCE.dataset
    assert head.sop_instance_uid == INSTANCE.sop_instance_uid
    assert head.sop_class_uid == INSTANCE.sop_class_uid
    assert head.transfer_syntax_uid == EXPLICIT


def test_the_meta_information_alone_is_not_corrected() -> None:
    other = (3, b"UI", b"1.2.3\0")
    data = PREFIX + meta(CLASS, other, SYNTAX) + INSTANCE.dataset
    assert read_meta(BytesIO(data)).sop_instance_uid == "1.2.3"
    assert read_head(BytesIO(data)).sop_instance_uid == INSTANCE.sop_instance_uid


def test_the_meta_information_stands_in_for_what_can_t_be_read() -> None:
    name = (3, b"UI", b"1.2.3\0")
    syntax = (0x10, b"UI", DEFLATED.encode())
    head = read_head(BytesIO(PREFIX + meta(CLASS, name, syntax) + b"this does not inflate"))
    assert head.sop_instance_uid == "1.2.3"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(124),
        bytes(200),
        b"<html>" * 100,
        PREFIX,
        PREFIX + b"\xff" * 4096,
        PREFIX + meta(CLASS, NAME) + INSTANCE.dataset,
        PREFIX + meta(CLASS, NAME, (0x10, b"UI", b"../../x\0")) + INSTANCE.dataset,
        PREFIX + meta(CLASS, NAME, SYNTAX)[:-4],
        PREFIX + meta(*[(0x100 + n, b"SH", b"") for n in range(300)]),
        PREFIX + meta((0x102, b"OB", b""))[:-4] + struct.pack("<I", 1 << 30) + bytes(100),
    ],
)
def test_says_clearly_what_is_no_part_10(data: bytes) -> None:
    with pytest.raises(CannotUnderstand):
        read_head(BytesIO(data))


@pytest.mark.parametrize("uid", [b"", b"../../../../etc/passwd", b"1.02.3", b"1" * 65])
def test_refuses_a_name_that_is_no_uid(uid: bytes) -> None:
    data = PREFIX + meta(CLASS, (3, b"UI", uid + b"\0" * (len(uid) % 2)), SYNTAX)
    with pytest.raises(InvalidInstance):
        read_head(BytesIO(data))


@given(st.binary(max_size=600), st.integers(0, 500), st.binary(max_size=6))
def test_survives_anything(data: bytes, at: int, change: bytes) -> None:
    part10 = bytearray(INSTANCE.part10)
    part10[at : at + len(change)] = change
    for candidate in (data, PREFIX + data, bytes(part10)):
        try:
            head = read_head(BytesIO(candidate))
        except MissError:
            continue
        assert head.dataset_offset <= len(candidate)
