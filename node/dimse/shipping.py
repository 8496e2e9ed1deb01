"""Owns objects on their way to one peer by C-STORE: it plans the presentation contexts, opens as many
associations as those and the setting take, reads the next object while those before it await their responses,
and says of each once what became of it. It never knows where objects lie, nor why they are sent."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from archive.errors import MissError
from node.dimse.association import Context
from node.dimse.contexts import plan_classes
from node.dimse.errors import AssociationEnded, TimedOut
from node.dimse.messages import ERROR_COMMENT
from node.dimse.outbox import Source
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from node.dimse.status import CLASS_NOT_SUPPORTED, PROCESSING_FAILURE

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW_MAX = 3  # associations that end before one object was answered: then the peer is given up
EXPECTED_AHEAD = 6         # objects that are told that they come next
NOT_TAKEN = "neither its syntax nor one it can be recoded to is taken"  # an Error Comment has 64 characters


class Parcel(Protocol):
    """One object that is to be sent, and whom to tell. Called by one thread at a time."""

    @property
    def sop_class_uid(self) -> str: ...

    @property
    def sop_instance_uid(self) -> str: ...

    @property
    def syntaxes(self) -> tuple[str, ...]:
        """The transfer syntaxes that it can be had in, as it is stored first."""

    def expect(self) -> None:
        """It is to be opened soon: whatever takes long may begin. Waits for nothing."""

    def open(self, transfer_syntax_uid: str) -> Source:
        """Its data set in one of its syntaxes. OSError or MissError when it can't be had."""

    def done(self, status: int, comment: str, size: int) -> None:
        """The peer's status and comment, or ours where it was not asked; `size` octets were sent."""

    def unreadable(self, error: Exception) -> None:
        """It could not be read (to its end): by an OSError or MissError, or by an error that nobody foresaw,
        whose text may quote a data set."""


class Connect(Protocol):
    """Opens an association; raises AssociationEnded."""

    def __call__(self, proposed: Sequence[ProposedContext]) -> Requestor: ...


@dataclass(slots=True)
class _Group:
    """What goes over associations that propose the same."""

    proposed: tuple[ProposedContext, ...]
    parcels: list[Parcel] = field(default_factory=list)


class Shipment:
    """Parcels to one peer. `stop` and `cut` are for other threads."""

    def __init__(self, connect: Connect, *, associations: int = 1,
                 originator: tuple[str, int] | None = None, stopping: Callable[[], bool] = lambda: False,
                 on_ended: Callable[[int, Exception], None] = lambda stored, error: None) -> None:
        """`associations` at once; `originator` of the C-MOVE that this serves; `stopping` is asked before
        each object, and `on_ended` told of every association that ends early: how many objects it answered,
        and why."""
        self._connect = connect
        self._associations = associations
        self.originator = originator
        self._stopping = stopping
        self._on_ended = on_ended
        self._lock = threading.Lock()
        self._stopped = False
        self._cut = False
        self._live: set[Requestor] = set()
        self._associated = False

    @property
    def stopping(self) -> bool:
        return self._stopped or self._stopping()

    def send(self, parcels: Iterable[Parcel]) -> None:
        """Send each once; returns when all are done, or, stopped, when those under way are: the others hear
        nothing. Raises AssociationEnded when not one association could be had."""
        for group in _grouped(parcels):
            if not self.stopping:
                self._send_group(group)

    def stop(self) -> None:
        """Begin no further object."""
        self._stopped = True

    def cut(self) -> None:
        """End what is under way at once: those objects have failed."""
        self._stopped = True
        with self._lock:
            self._cut = True
            live = list(self._live)
        for requestor in live:
            requestor.association.wire.cut()

    def _send_group(self, group: _Group) -> None:
        waiting = _Waiting(group.parcels)
        try:
            first: Requestor | None = self._open(group)
        except AssociationEnded as ended:
            if not self._associated:
                raise
            self._on_ended(0, ended)
            first = None
        others = [threading.Thread(target=self._send_waiting, args=(group, None, waiting), name="send",
                                   daemon=True)
                  for _ in range(min(self._associations, len(group.parcels)) - 1)]
        for thread in others:
            thread.start()
        self._send_waiting(group, first, waiting)
        for thread in others:
            thread.join()
        if not self.stopping:
            for parcel in waiting.rest():
                parcel.done(PROCESSING_FAILURE, "no association could be had", 0)

    def _open(self, group: _Group) -> Requestor:
        requestor = self._connect(group.proposed)
        with self._lock:
            self._associated = True
            self._live.add(requestor)
            cut = self._cut
        if cut:
            requestor.association.wire.cut()
        return requestor

    def _send_waiting(self, group: _Group, requestor: Requestor | None, waiting: _Waiting) -> None:
        failures = 0
        while failures < FAILURES_IN_A_ROW_MAX and (requestor is not None or waiting) and not (
                requestor is None and self.stopping):
            if requestor is None:
                try:
                    requestor = self._open(group)
                except AssociationEnded as ended:
                    self._on_ended(0, ended)
                    failures += 1
                    continue
            stream = _Stream(requestor, waiting, self)
            try:
                stream.run()
                requestor.release()
            except Exception as error:  # also one that nobody foresaw: every parcel has an outcome
                try:
                    stream.give_up(error)
                finally:
                    requestor.abort()
                self._on_ended(stream.answered, error)
                failures = 0 if stream.answered or stream.broken_off else failures + 1
                if isinstance(error, TimedOut):
                    failures = FAILURES_IN_A_ROW_MAX  # another call would take as long as this one did
            finally:
                with self._lock:
                    self._live.discard(requestor)
            requestor = None


class _Waiting:
    """Parcels that several associations take from."""

    def __init__(self, parcels: Iterable[Parcel]) -> None:
        self._parcels = deque(parcels)
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._parcels)

    def take(self) -> Parcel | None:
        """The next one; those behind it are told that they are next."""
        with self._lock:
            if not self._parcels:
                return None
            taken = self._parcels.popleft()
            ahead = [self._parcels[n] for n in range(min(EXPECTED_AHEAD, len(self._parcels)))]
        for parcel in ahead:
            parcel.expect()
        return taken

    def put_back(self, parcel: Parcel) -> None:
        with self._lock:
            self._parcels.appendleft(parcel)

    def rest(self) -> list[Parcel]:
        """All of them, taken."""
        with self._lock:
            rest = list(self._parcels)
            self._parcels.clear()
        return rest


@dataclass(frozen=True, slots=True)
class _Ready:
    """A parcel whose first part is in the outbox."""

    parcel: Parcel
    context: Context
    source: Source


class _Stream:
    """Parcels on their way over one association."""

    def __init__(self, requestor: Requestor, waiting: _Waiting, shipment: Shipment) -> None:
        self._requestor = requestor
        self._waiting = waiting
        self._shipment = shipment
        self._outbox = requestor.association.outbox()
        self._open: dict[int, tuple[Parcel, int]] = {}
        self._ready: _Ready | None = None
        self.answered = 0
        self.broken_off = False  # inside an object that could not be read to its end: no word of the peer

    def run(self) -> None:
        """Send what is waiting. Raises AssociationEnded, and what a source raises in the middle of its data
        set: then `give_up`."""
        requestor = self._requestor
        self._ready = self._next()
        while (ready := self._ready) is not None and not self._shipment.stopping:
            if len(self._open) >= requestor.window:
                self._collect()
                continue
            self._ready = None
            try:
                message_id = requestor.post(ready.context, ready.parcel.sop_instance_uid, self._outbox,
                                            originator=self._shipment.originator)
            except AssociationEnded as ended:
                ready.parcel.done(PROCESSING_FAILURE, str(ended), 0)
                raise
            except Exception as error:
                ready.parcel.unreadable(error)
                self.broken_off = True
                self._hear_the_others()
                raise
            finally:
                ready.source.close()
            self._open[message_id] = ready.parcel, ready.source.length
            self._ready = self._next()
        while self._open:
            self._collect()
        self._lay_back()

    def give_up(self, error: Exception) -> None:
        """What was not answered has failed; what was only read goes back to those that wait."""
        words = str(error) if isinstance(error, OSError | MissError) else type(error).__name__
        log.info("an association ended early: %s", words)
        for parcel, _ in self._open.values():
            parcel.done(PROCESSING_FAILURE, words, 0)
        self._open.clear()
        self._lay_back()

    def _hear_the_others(self) -> None:
        """Those that were sent whole before the one that broke off have responses on their way."""
        with suppress(AssociationEnded):
            while self._open:
                self._collect()

    def _lay_back(self) -> None:
        if self._ready is not None:
            ready, self._ready = self._ready, None
            ready.source.close()
            self._waiting.put_back(ready.parcel)

    def _collect(self) -> None:
        message_id, answer = self._requestor.answer()
        parcel, size = self._open.pop(message_id)
        self.answered += 1
        parcel.done(answer.status, answer.text(ERROR_COMMENT), size)

    def _next(self) -> _Ready | None:
        """Read the beginning of the next parcel that the peer takes."""
        while not self._shipment.stopping and (parcel := self._waiting.take()) is not None:
            context = self._context_of(parcel)
            if context is None:
                parcel.done(CLASS_NOT_SUPPORTED, NOT_TAKEN, 0)
                continue
            try:
                source = parcel.open(context.transfer_syntax)
                try:
                    self._outbox.begin(source, context.id)
                    self._outbox.load()
                except BaseException:
                    source.close()
                    raise
            except Exception as error:
                parcel.unreadable(error)
                continue
            return _Ready(parcel, context, source)
        return None

    def _context_of(self, parcel: Parcel) -> Context | None:
        found = (self._requestor.context(parcel.sop_class_uid, syntax) for syntax in parcel.syntaxes)
        return next((context for context in found if context is not None), None)


def _grouped(parcels: Iterable[Parcel]) -> Iterator[_Group]:
    """Parcels by the associations that they need: each class is proposed once with each syntax that
    something of it is stored in, and once with the others that it can be had in."""
    parcels = list(parcels)
    stored: dict[str, dict[str, None]] = {}
    others: dict[str, dict[str, None]] = {}
    for parcel in parcels:
        first, *rest = parcel.syntaxes
        stored.setdefault(parcel.sop_class_uid, {})[first] = None
        others.setdefault(parcel.sop_class_uid, {}).update(dict.fromkeys(rest))
    classes = [(uid, tuple(firsts), tuple(s for s in others[uid] if s not in firsts))
               for uid, firsts in stored.items()]
    group_of: dict[tuple[str, str], _Group] = {}
    groups: list[_Group] = []
    for proposed in plan_classes(classes):
        group = _Group(proposed)
        groups.append(group)
        for context in proposed:
            if len(context.transfer_syntaxes) == 1:
                group_of.setdefault((context.abstract_syntax, context.transfer_syntaxes[0]), group)
    for parcel in parcels:
        group_of[parcel.sop_class_uid, parcel.syntaxes[0]].parcels.append(parcel)
    return (group for group in groups if group.parcels)
