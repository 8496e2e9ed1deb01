"""Owns sending files by C-STORE: it reads what they are, ships them and says of every file what became of it.
It never changes a data set and never transcodes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from archive.dataset.part10 import read_head
from archive.errors import CannotUnderstand, InvalidInstance
from node.dimse.association import Limits
from node.dimse.outbox import BUFFER_BYTES, FileSource
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.dimse.shipping import Shipment
from node.dimse.status import is_stored

BATCH_FILES_MAX = 5_000  # whose headers are known ahead: they decide which contexts are proposed


class Sendable(Protocol):
    """What is known of a file before it is sent."""

    @property
    def path(self) -> Path: ...
    @property
    def sop_class_uid(self) -> str: ...
    @property
    def sop_instance_uid(self) -> str: ...
    @property
    def transfer_syntax_uid(self) -> str: ...
    @property
    def dataset_offset(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Part10File:
    """A file as its meta information has it (PS3.10 7.1)."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    dataset_offset: int


@dataclass(slots=True)
class SendReport:
    """What became of the files. `failed` have the DIMSE status that the peer gave, 0122 when it takes no such
    class or syntax, 0110 when the association ended before it answered; `skipped` were not sent. `ended` says
    of each association that ended early how, and how many of its instances were stored by then."""

    sent: int = 0
    bytes: int = 0
    failed: list[tuple[Path, int]] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Progress:
    """One file is done: how many of how many known so far, and its status (None when it was skipped)."""

    path: Path
    status: int | None
    bytes: int


def read_meta(path: Path) -> Part10File:
    """Read what a C-STORE says of a file; CannotUnderstand or InvalidInstance say why it can't be sent."""
    with path.open("rb") as file:
        head = read_head(file)
    return Part10File(path, head.sop_class_uid, head.sop_instance_uid, head.transfer_syntax_uid,
                      head.dataset_offset)


def send_files(target: Peer, calling_ae: str, files: Iterable[Path | Sendable],
               on_progress: Callable[[Progress], None] | None = None, *, associations: int = 1,
               window: int = 1, limits: Limits | None = None) -> SendReport:
    """Send every file once. `window` asks the peer for that many open operations on each association. Raises
    what `Requestor.connect` raises when the first association can't be had; a later end of an association
    costs the files that it had not answered, and the rest goes on over another."""

    def connect(proposed: Sequence[ProposedContext]) -> Requestor:
        return Requestor.connect(target, calling_ae, proposed, limits=limits, window=window)

    report = _Report(on_progress)
    shipment = Shipment(connect, associations=associations, on_ended=report.end)
    iterator = iter(files)
    while batch := list(islice(iterator, BATCH_FILES_MAX)):
        shipment.send([_FileParcel(file, report) for file in _readable(batch, report)])
    return report.result


class _Report:
    """A SendReport that several threads fill."""

    def __init__(self, on_progress: Callable[[Progress], None] | None) -> None:
        self.result = SendReport()
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def done(self, path: Path, status: int, size: int) -> None:
        with self._lock:
            if is_stored(status):
                self.result.sent += 1
                self.result.bytes += size
            else:
                self.result.failed.append((path, status))
            self._tell(Progress(path, status, size))

    def skip(self, path: Path, reason: str) -> None:
        with self._lock:
            self.result.skipped.append((path, reason))
            self._tell(Progress(path, None, 0))

    def end(self, stored: int, error: Exception) -> None:
        with self._lock:
            self.result.ended.append(f"after {stored} instances: {error}")

    def _tell(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress)


def _readable(batch: Sequence[Path | Sendable], report: _Report) -> Iterator[Sendable]:
    for entry in batch:
        if not isinstance(entry, Path):
            yield entry
            continue
        try:
            yield read_meta(entry)
        except (CannotUnderstand, InvalidInstance) as error:
            report.skip(entry, str(error))
        except OSError:
            report.skip(entry, "the file can't be read")


@dataclass(frozen=True, slots=True)
class _FileParcel:
    """A file on its way."""

    file: Sendable
    report: _Report

    @property
    def sop_class_uid(self) -> str:
        return self.file.sop_class_uid

    @property
    def sop_instance_uid(self) -> str:
        return self.file.sop_instance_uid

    @property
    def syntaxes(self) -> tuple[str, ...]:
        return (self.file.transfer_syntax_uid,)

    def expect(self) -> None:
        """A file is opened at once."""

    def open(self, transfer_syntax_uid: str) -> FileSource:
        fd = os.open(self.file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset = self.file.dataset_offset
            size = max(os.fstat(fd).st_size - offset, 0)
            if size > BUFFER_BYTES:
                os.posix_fadvise(fd, offset, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            os.close(fd)
            raise
        return FileSource(fd, offset, size)

    def done(self, status: int, comment: str, size: int) -> None:
        self.report.done(self.file.path, status, size)

    def unreadable(self, error: Exception) -> None:
        self.report.skip(self.file.path, "the file can't be read")
