"""Finds the DICOM files below folders and what a C-STORE needs of each: SOP class, SOP instance, transfer
syntax, and where the data set begins. What can't be sent is counted by reason. Writes nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from archive.dataset.part10 import read_head
from archive.errors import CannotUnderstand, InvalidInstance

FILES_MAX = 5_000_000
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"  # a DICOMDIR is of its media and never sent


@dataclass(frozen=True, slots=True)
class DicomFile:
    """One Part 10 file (PS3.10 7.1); its data set begins at `dataset_offset`."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    dataset_offset: int


@dataclass(slots=True)
class Found:
    """What a walk gave: files that can be sent, in the order of their paths, and the others by reason."""

    files: list[DicomFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def find(paths: Iterable[Path]) -> Found:
    """Everything below `paths` (files or folders, links to folders not followed), sorted."""
    found = Found()
    for path in _walk(paths):
        try:
            with path.open("rb") as file:
                head = read_head(file)
        except (CannotUnderstand, InvalidInstance) as error:
            found.skipped[str(error)] += 1  # their words name no file and no value
        except OSError:
            found.skipped["can't be read from the disk"] += 1
        else:
            if head.sop_class_uid == MEDIA_DIRECTORY:
                found.skipped["a media directory (DICOMDIR)"] += 1
                continue
            found.files.append(DicomFile(path, head.sop_class_uid, head.sop_instance_uid,
                                         head.transfer_syntax_uid, head.dataset_offset))
    return found


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
