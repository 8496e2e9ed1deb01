"""Owns sending files by C-STORE: it groups them by presentation context, opens as many associations as that
takes, and says of every file what became of it. It never changes a data set and never transcodes."""

from __future__ import annotations

import logging
import queue
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Protocol

from archive.dataset.header import scan
from archive.errors import CannotUnderstand, MissError
from archive.model import is_uid
from node.dimse import contexts
from node.dimse.association import Limits
from node.dimse.errors import AssociationEnded
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.dimse.status import CLASS_NOT_SUPPORTED, PROCESSING_FAILURE, is_stored

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
BATCH_FILES_MAX = 5_000       # whose headers are known ahead: they decide which contexts are proposed
META_BYTES_MAX = 64 << 10     # of a file's group 2
UID_BYTES_MAX = 128           # 64 and what careless writers pad
FAILURES_IN_A_ROW_MAX = 3     # associations that end before one file was stored: then the peer is given up
_LONG_VRS = (b"OB", b"UN", b"UT", b"OW", b"SQ", b"UC", b"UR", b"OD", b"OF", b"OL", b"OV", b"SV", b"UV")


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
    class or syntax, 0110 when the association ended; `skipped` were not tried."""

    sent: int = 0
    bytes: int = 0
    failed: list[tuple[Path, int]] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Progress:
    """One file is done: how many of how many known so far, and its status (None when it was skipped)."""

    path: Path
    status: int | None
    bytes: int


def read_meta(path: Path) -> Part10File:
    """Read what a C-STORE says of a file; CannotUnderstand says why it can't be sent.

    Class and instance are the data set's own, as the receiver compares them with it; the file's meta
    information stands in for what can't be read, and is wrong more often than one would think.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        values, offset = _meta(content)
        transfer_syntax = values.get(0x10, "")
        if not is_uid(transfer_syntax):
            raise CannotUnderstand("the file meta information names no transfer syntax")
        sop_class, instance = values.get(0x02, ""), values.get(0x03, "")
        with memoryview(content) as view, view[offset:] as dataset, suppress(MissError):
            found = scan(dataset, transfer_syntax).instance
            sop_class = found.get("SOPClassUID", sop_class)
            instance = found.get("SOPInstanceUID", instance)
    if not is_uid(sop_class) or not instance:
        raise CannotUnderstand("neither file meta information nor data set say what it is an instance of")
    return Part10File(path, sop_class, instance, transfer_syntax, offset)


def _meta(content: mmap) -> tuple[dict[int, str], int]:
    """The short values of group 2, which is always Explicit VR Little Endian, and the offset after it."""
    head = content[:META_BYTES_MAX]
    if head[128:132] != b"DICM":
        raise CannotUnderstand("no DICOM file: no DICM mark after the preamble")
    at = 132
    values: dict[int, str] = {}
    while head[at:at + 2] == b"\x02\x00":
        if len(head) < at + 12:
            raise CannotUnderstand("the file meta information is cut short")
        element, = struct.unpack_from("<H", head, at + 2)
        wide = head[at + 4:at + 6] in _LONG_VRS
        length, = struct.unpack_from("<I" if wide else "<H", head, at + (8 if wide else 6))
        at += 12 if wide else 8
        if length > len(head) - at:
            raise CannotUnderstand("the file meta information is cut short")
        if length <= UID_BYTES_MAX:
            values[element] = head[at:at + length].decode("ascii", "replace").strip(" \0")
        at += length
    return values, at


def send_files(target: Peer, calling_ae: str, files: Iterable[Path | Sendable],
               on_progress: Callable[[Progress], None] | None = None, *, associations: int = 1,
               limits: Limits | None = None) -> SendReport:
    """Send every file. Raises what `Requestor.connect` raises when the first association can't be had; a
    later end of an association costs the file under way, and the rest goes on over another."""
    report = _Report(on_progress)
    iterator = iter(files)
    while batch := list(islice(iterator, BATCH_FILES_MAX)):
        ready = list(_readable(batch, report))
        pairs = [(file.sop_class_uid, file.transfer_syntax_uid) for file in ready]
        for proposed in contexts.plan(pairs):
            wanted = {(context.abstract_syntax, context.transfer_syntaxes[0]) for context in proposed}
            chosen = [file for file, pair in zip(ready, pairs, strict=True) if pair in wanted]
            _send_group(target, calling_ae, proposed, chosen, report, associations, limits or Limits())
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
        except CannotUnderstand as error:
            report.skip(entry, str(error))
        except ValueError:  # from mmap
            report.skip(entry, "the file is empty")
        except OSError:
            report.skip(entry, "the file can't be read")


def _send_group(target: Peer, calling_ae: str, proposed: Sequence[ProposedContext],
                files: Sequence[Sendable], report: _Report, associations: int, limits: Limits) -> None:
    """Send files that share one set of contexts, over one or several associations at once."""
    waiting: queue.SimpleQueue[Sendable] = queue.SimpleQueue()
    for file in files:
        waiting.put(file)
    first = Requestor.connect(target, calling_ae, proposed, limits=limits)

    def work(requestor: Requestor | None) -> None:
        _send_waiting(lambda: Requestor.connect(target, calling_ae, proposed, limits=limits), requestor,
                      waiting, report)

    others = [threading.Thread(target=work, args=(None,), name="send", daemon=True)
              for _ in range(min(associations, len(files)) - 1)]
    for thread in others:
        thread.start()
    work(first)
    for thread in others:
        thread.join()
    while not waiting.empty():
        report.done(waiting.get().path, PROCESSING_FAILURE, 0)


def _send_waiting(connect: Callable[[], Requestor], requestor: Requestor | None,
                  waiting: queue.SimpleQueue[Sendable], report: _Report) -> None:
    failures = 0
    while failures < FAILURES_IN_A_ROW_MAX:
        try:
            file = waiting.get_nowait()
        except queue.Empty:
            break
        try:
            requestor = requestor or connect()
        except AssociationEnded as ended:
            log.info("no association: %s", ended)
            waiting.put(file)
            failures += 1
            continue
        try:
            status, size = _send(requestor, file)
            failures = 0
            report.done(file.path, status, size)
        except OSError:
            report.skip(file.path, "the file can't be read")
            requestor.abort()  # its data set was begun
            requestor = None
        except AssociationEnded as ended:
            log.info("the association ended: %s", ended)
            report.done(file.path, PROCESSING_FAILURE, 0)
            requestor.abort()
            requestor = None
            failures += 1
    if requestor is not None:
        requestor.release()


def _send(requestor: Requestor, file: Sendable) -> tuple[int, int]:
    context = requestor.context(file.sop_class_uid, file.transfer_syntax_uid)
    if context is None:
        return CLASS_NOT_SUPPORTED, 0
    before = requestor.association.wire.bytes_out
    with file.path.open("rb", buffering=0) as data:
        data.seek(file.dataset_offset)
        status = requestor.store(context, file.sop_instance_uid, iter(lambda: data.read(CHUNK_BYTES), b""))
    return status, requestor.association.wire.bytes_out - before
