"""What the demo sends: the real files that the pydicom package installs, computed phantoms, or a folder of
the user's own; which ward gets which study, the same on every run. Sends nothing itself."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pydicom.data

from archive.dataset.header import scan
from archive.errors import DatasetMismatch, MissError, TooLarge
from miss import phantom
from miss.demo import OTHER_HOSPITAL
from miss.files import DicomFile, find

PYDICOM_FILES = Path(pydicom.data.__file__).parent


@dataclass(frozen=True, slots=True)
class Lot:
    """Files that go to one ward, by its number."""

    ward: int
    files: Sequence[DicomFile]


@dataclass(slots=True)
class Plan:
    """Everything that will be sent, and what will not be, by reason."""

    lots: list[Lot] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return sum(len(lot.files) for lot in self.lots)


def demo_plan(wards: int, folder: Path) -> Plan:
    """pydicom's files spread over the wards by study, and phantoms, which are written to `folder`: the big
    one at the first ward, Patient ID 123 at two hospitals, where it is two people, and one that a rule of
    the first ward hands on (`demowork.py`)."""
    plan = folder_plan(PYDICOM_FILES, wards, first_of_each_uid=True)
    placed = [(phantom.TORSO, 0), (phantom.ANNA_PRIOR, 0), (phantom.ANNA, 0), (phantom.OPINION, 0)]
    if wards > 1:  # of one hospital alone the two would be one person
        placed.append((phantom.BRUNO, OTHER_HOSPITAL))
    for who, ward in placed:
        phantom.write(who, folder / who.key)
        plan.lots.append(Lot(ward, find([folder / who.key]).files))
    return plan


def folder_plan(folder: Path, wards: int, *, first_of_each_uid: bool = False) -> Plan:
    """Every instance below `folder`, whole studies to one ward each, in turn."""
    found = find([folder])
    plan = Plan(skipped=found.skipped)
    studies: dict[str, list[DicomFile]] = {}
    seen: set[str] = set()
    for file in found.files:
        if first_of_each_uid and file.sop_instance_uid in seen:
            plan.skipped["another version of an instance that is sent (same SOP Instance UID)"] += 1
            continue
        try:
            study = study_of(file)
        except MissError as error:
            plan.skipped[_reason(error)] += 1
            continue
        seen.add(file.sop_instance_uid)
        studies.setdefault(study, []).append(file)
    by_ward: list[list[DicomFile]] = [[] for _ in range(wards)]
    # In the order of their UIDs, which says nothing of size or kind: a fair spread that no run changes.
    for number, study in enumerate(sorted(studies)):
        by_ward[number % wards] += studies[study]
    plan.lots += [Lot(ward, files) for ward, files in enumerate(by_ward) if files]
    return plan


def study_of(file: DicomFile) -> str:
    """The Study Instance UID, by the scanner that intake uses; its errors say why a file is no instance."""
    with file.path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        dataset = view[file.dataset_offset :]
        try:
            return scan(dataset, file.transfer_syntax_uid).study_uid
        finally:
            dataset.release()
            view.release()


def _reason(error: MissError) -> str:
    """A count's key: the kind of error, not the words about one file."""
    match error:
        case DatasetMismatch():
            return "no patient study: study, series or SOP UIDs are missing or wrong"
        case TooLarge():
            return "a header past the archive's bounds"
        case _:
            return "a data set that can't be read"
