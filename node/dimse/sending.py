"""Owns sending files by C-STORE: it groups them by presentation context, opens as many associations as that
takes, and says of every file what became of it. It never changes a data set and never transcodes."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from archive.dataset.part10 import read_head
from archive.errors import CannotUnderstand, InvalidInstance
from node.dimse import contexts
from node.dimse.association import Context, Limits
from node.dimse.errors import AssociationEnded
from node.dimse.outbox import BUFFER_BYTES, Outbox
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.dimse.status import CLASS_NOT_SUPPORTED, PROCESSING_FAILURE, is_stored

log = logging.getLogger(__name__)

BATCH_FILES_MAX = 5_000       # whose headers are known ahead: they decide which contexts are proposed
FAILURES_IN_A_ROW_MAX = 3     # associations that end before one file was stored: then the peer is given up


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
    report = _Report(on_progress)
    iterator = iter(files)
    while batch := list(islice(iterator, BATCH_FILES_MAX)):
        ready = list(_readable(batch, report))
        pairs = [(file.sop_class_uid, file.transfer_syntax_uid) for file in ready]
        for proposed in contexts.plan(pairs):
            wanted = {(context.abstract_syntax, context.transfer_syntaxes[0]) for context in proposed}
            chosen = [file for file, pair in zip(ready, pairs, strict=True) if pair in wanted]

            def connect(proposed: Sequence[ProposedContext] = proposed) -> Requestor:
                return Requestor.connect(target, calling_ae, proposed, limits=limits, window=window)

            _send_group(connect, chosen, report, associations)
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


def _send_group(connect: Callable[[], Requestor], files: Sequence[Sendable], report: _Report,
                associations: int) -> None:
    """Send files that share one set of contexts, over one or several associations at once."""
    waiting: queue.SimpleQueue[Sendable] = queue.SimpleQueue()
    for file in files:
        waiting.put(file)
    first = connect()
    others = [threading.Thread(target=_send_waiting, args=(connect, None, waiting, report), name="send",
                               daemon=True)
              for _ in range(min(associations, len(files)) - 1)]
    for thread in others:
        thread.start()
    _send_waiting(connect, first, waiting, report)
    for thread in others:
        thread.join()
    while not waiting.empty():
        report.done(waiting.get().path, PROCESSING_FAILURE, 0)


def _send_waiting(connect: Callable[[], Requestor], requestor: Requestor | None,
                  waiting: queue.SimpleQueue[Sendable], report: _Report) -> None:
    failures = 0
    while failures < FAILURES_IN_A_ROW_MAX and (requestor is not None or not waiting.empty()):
        try:
            requestor = requestor or connect()
        except AssociationEnded as ended:
            report.end(0, ended)
            failures += 1
            continue
        stream = _Stream(requestor, waiting, report)
        try:
            stream.run()
            requestor.release()
        except (AssociationEnded, OSError) as error:
            stream.give_up(error)
            requestor.abort()
            failures = 0 if stream.answered else failures + 1
        requestor = None


@dataclass(frozen=True, slots=True)
class _Ready:
    """A file whose first part is in the outbox."""

    file: Sendable
    context: Context
    fd: int
    size: int


class _Stream:
    """Files on their way over one association: the next one is read while those before it await their
    responses."""

    def __init__(self, requestor: Requestor, waiting: queue.SimpleQueue[Sendable], report: _Report) -> None:
        self._requestor = requestor
        self._waiting = waiting
        self._report = report
        self._outbox: Outbox = requestor.association.outbox()
        self._open: dict[int, tuple[Path, int]] = {}
        self._ready: _Ready | None = None
        self.answered = 0

    def run(self) -> None:
        """Send what is waiting. AssociationEnded, and OSError when a file can't be read to its end: then
        `give_up`."""
        requestor, report = self._requestor, self._report
        self._ready = self._next()
        while (ready := self._ready) is not None:
            if len(self._open) >= requestor.window:
                self._collect()
            self._ready = None
            try:
                message_id = requestor.post(ready.context, ready.file.sop_instance_uid, self._outbox)
            except OSError:
                report.skip(ready.file.path, "the file can't be read")
                raise
            except AssociationEnded:
                report.done(ready.file.path, PROCESSING_FAILURE, 0)
                raise
            finally:
                os.close(ready.fd)
            self._open[message_id] = ready.file.path, ready.size
            self._ready = self._next()
        while self._open:
            self._collect()

    def give_up(self, error: Exception) -> None:
        """What was not answered has failed; what was only read goes back to those that wait."""
        self._report.end(self.answered, error)
        log.info("an association ended early: %s", error)
        for path, _ in self._open.values():
            self._report.done(path, PROCESSING_FAILURE, 0)
        if self._ready is not None:
            os.close(self._ready.fd)
            self._waiting.put(self._ready.file)

    def _collect(self) -> None:
        message_id, status = self._requestor.outcome()
        path, size = self._open.pop(message_id)
        self.answered += 1
        self._report.done(path, status, size)

    def _next(self) -> _Ready | None:
        """Read the beginning of the next file that the peer takes."""
        while True:
            try:
                file = self._waiting.get_nowait()
            except queue.Empty:
                return None
            context = self._requestor.context(file.sop_class_uid, file.transfer_syntax_uid)
            if context is None:
                self._report.done(file.path, CLASS_NOT_SUPPORTED, 0)
                continue
            try:
                return self._read(file, context)
            except OSError:
                self._report.skip(file.path, "the file can't be read")

    def _read(self, file: Sendable, context: Context) -> _Ready:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = max(os.fstat(fd).st_size - file.dataset_offset, 0)
            if size > BUFFER_BYTES:
                os.posix_fadvise(fd, file.dataset_offset, 0, os.POSIX_FADV_SEQUENTIAL)
            self._outbox.begin(fd, file.dataset_offset, size, context.id)
            self._outbox.load()
        except BaseException:
            os.close(fd)
            raise
        return _Ready(file, context, fd, size)
