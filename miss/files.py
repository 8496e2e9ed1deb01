"""Finds the DICOM files below folders and reads what a C-STORE needs of each (PS3.10 7.1): SOP class, SOP
instance, transfer syntax, and where the data set begins. What can't be sent is counted by reason. Never
writes."""

from __future__ import annotations

import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from archive.model import is_uid

PREFIX_BYTES_MAX = 64 << 10  # a file meta group that is longer is nobody's
FILES_MAX = 5_000_000
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
_LONG_FORM = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")


@dataclass(frozen=True, slots=True)
class DicomFile:
    """One Part 10 file. Its data set follows `dataset_offset`, encoded by the transfer syntax."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    dataset_offset: int
    size: int

    @property
    def dataset_bytes(self) -> int:
        return self.size - self.dataset_offset

    def dataset(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.dataset_offset)
            return file.read()


@dataclass(slots=True)
class Found:
    """What a walk gave: files that can be sent, in the order of their paths, and the others by reason."""

    files: list[DicomFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


class NotSendable(Exception):
    """Why a file is skipped, in words that a count can be kept under."""


def find(paths: Iterable[Path]) -> Found:
    """Everything below `paths` (files or folders, links to folders not followed), sorted."""
    found = Found()
    for path in _walk(paths):
        try:
            found.files.append(read(path))
        except NotSendable as reason:
            found.skipped[str(reason)] += 1
        except OSError:
            found.skipped["can't be read from the disk"] += 1
    return found


def read(path: Path) -> DicomFile:
    """The file's own word about itself; NotSendable when it is no DICOM file or lacks what C-STORE needs."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(PREFIX_BYTES_MAX)
    if start[128:132] != b"DICM":
        raise NotSendable("no DICOM file (no DICM mark)" if size else "empty file")
    meta, offset = _file_meta(start)
    sop_class, instance, syntax = (_text(meta.get(element, b"")) for element in (0x0002, 0x0003, 0x0010))
    if sop_class == MEDIA_DIRECTORY or path.name == "DICOMDIR":
        raise NotSendable("a media directory (DICOMDIR)")
    if not is_uid(syntax):
        raise NotSendable("no transfer syntax in the file's header")
    if not is_uid(sop_class) or not is_uid(instance):
        sop_class, instance = _from_dataset(path)
    return DicomFile(path, sop_class, instance, syntax, offset, size)


def _walk(paths: Iterable[Path]) -> Iterator[Path]:
    count = 0
    for path in paths:
        if path.is_file():
            yield path
            continue
        for folder, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                if (count := count + 1) > FILES_MAX:
                    return
                if (file := Path(folder, name)).is_file():
                    yield file


def _file_meta(start: bytes) -> tuple[dict[int, bytes], int]:
    """The elements of group 2, always explicit VR little endian, and the offset after them."""
    at, meta = 132, dict[int, bytes]()
    while start[at : at + 2] == b"\x02\x00":
        if len(start) < at + 12:
            raise NotSendable("a file header that is cut off")
        element = struct.unpack_from("<H", start, at + 2)[0]
        if start[at + 4 : at + 6] in _LONG_FORM:
            length, value = struct.unpack_from("<I", start, at + 8)[0], at + 12
        else:
            length, value = struct.unpack_from("<H", start, at + 6)[0], at + 8
        at = value + length
        if at > len(start):
            raise NotSendable("a file header that is cut off or too long")
        meta[element] = start[value:at]
    return meta, at


def _text(value: bytes) -> str:
    return value.rstrip(b"\0 ").decode("ascii", "replace")


def _from_dataset(path: Path) -> tuple[str, str]:
    """Some writers leave the UIDs out of the file's header: the data set has them too."""
    from pydicom import dcmread

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"])
        sop_class, instance = str(head.get("SOPClassUID", "")), str(head.get("SOPInstanceUID", ""))
    except Exception:  # pydicom raises whatever its parts raise on broken input
        raise NotSendable("a data set that can't be read") from None
    if not is_uid(sop_class):
        raise NotSendable("no SOP Class UID")
    if not is_uid(instance):
        raise NotSendable("no SOP Instance UID")
    return sop_class, instance
