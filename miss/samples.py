"""What the demo sends: the real files that the pydicom package installs, computed phantoms, or a folder of
the user's own; which ward gets which study, the same on every run. Sends nothing itself."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pydicom.data

from archive.errors import DatasetMismatch, MissError, TooLarge
from archive.header import scan
from miss import phantom
from miss.files import DicomFile, find
from miss.phantom import Phantom

PYDICOM_FILES = Path(pydicom.data.__file__).parent


class Instance(Protocol):
    """What can be sent by C-STORE, from a file or from memory."""

    @property
    def sop_class_uid(self) -> str: ...

    @property
    def sop_instance_uid(self) -> str: ...

    @property
    def transfer_syntax_uid(self) -> str: ...

    def dataset(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Lot:
    """What goes to one ward over one stretch: `count` instances that `instances()` gives anew each time."""

    ward: int
    count: int
    instances: Callable[[], Iterable[Instance]]
    contexts: Sequence[tuple[str, str]]  # (SOP class, transfer syntax) of all of them, for the negotiation


@dataclass(slots=True)
class Plan:
    """Everything that will be sent, and what will not be, by reason."""

    lots: list[Lot] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return sum(lot.count for lot in self.lots)


def demo_plan(wards: int) -> Plan:
    """pydicom's files spread over the wards by study, the big phantom at the first ward, and Patient ID 123
    at two hospitals: two people. (The last ward is of another hospital than the first.)"""
    plan = folder_plan(PYDICOM_FILES, wards, first_of_each_uid=True)
    for who, ward in ((phantom.TORSO, 0), (phantom.ANNA_PRIOR, 0), (phantom.ANNA, 0),
                      (phantom.BRUNO, wards - 1)):
        plan.lots.append(_phantom_lot(who, ward))
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
    plan.lots += [_file_lot(ward, files) for ward, files in enumerate(by_ward) if files]
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


def _file_lot(ward: int, files: list[DicomFile]) -> Lot:
    contexts = dict.fromkeys((file.sop_class_uid, file.transfer_syntax_uid) for file in files)
    return Lot(ward, len(files), lambda: iter(files), tuple(contexts))


def _phantom_lot(who: Phantom, ward: int) -> Lot:
    def instances() -> Iterator[Instance]:
        return phantom.instances(who)

    return Lot(ward, who.slices, instances, ((phantom.CT, phantom.EXPLICIT),))


def _reason(error: MissError) -> str:
    """A count's key: the kind of error, not the words about one file."""
    match error:
        case DatasetMismatch():
            return "no patient study: study, series or SOP UIDs are missing or wrong"
        case TooLarge():
            return "a header past the archive's bounds"
        case _:
            return "a data set that can't be read"
