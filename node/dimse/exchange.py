"""Owns what a service sees of the association that it serves: who calls, the responses that it owes the peer,
in the order of the requests, what it asked the peer itself, and the book of what was answered. A response to
something that was written goes out when that is on disk and not before. It never receives; `acceptor.py`
does."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from archive.errors import MissError
from federation.policy import Principal, Role, reach_named
from node.dimse import status as codes
from node.dimse.association import Association, Context
from node.dimse.contexts import ServiceName
from node.dimse.errors import Violation
from node.dimse.messages import MESSAGE_ID_RESPONDED_TO, Command, Field, response
from node.dimse.origin import PLAIN
from node.dimse.pdu import AbortSource

log = logging.getLogger(__name__)

DURABLE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Caller:
    """A device that was let in. `issuer` is of its Patient IDs where it has one of its own; empty
    `sop_classes` and `transfer_syntaxes` are all that the node takes. `user` is who was verified, if anybody,
    and `identity_answer` what is said to that (PS3.7 D.3.3.7). `reach` ("ward", "region") is how far it
    looks; an answer that lacks a ward, or is older than `max_age_s` seconds in one, ends as `on_incomplete`
    says ("succeed", "fail")."""

    ae_title: str
    name: str
    issuer: str | None
    services: frozenset[ServiceName]
    on_conflict: str = "keep"
    sop_classes: frozenset[str] = frozenset()
    transfer_syntaxes: frozenset[str] = frozenset()
    user: str = ""
    identity_answer: bytes | None = None
    reach: str = "ward"
    on_incomplete: str = "succeed"
    max_age_s: int = 43_200

    def principal(self, ward: str) -> Principal:
        """Who asks, for `federation/policy.py`: this device, of the node's ward."""
        return Principal(self.ae_title, Role.DEVICE, ward, reach=reach_named(self.reach))


@dataclass(slots=True)
class Log:
    """What there is to say of one association when it is over; no patient data."""

    at_us: int
    address: str
    transport: str = PLAIN
    certificate: str = ""
    calling_ae: str = ""
    called_ae: str = ""
    device: str = ""
    user: str = ""
    outcome: str = "refused"
    reason: str = ""
    contexts: list[str] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0
    ended: str = ""


class Durable(Protocol):
    """Something that was written."""

    def wait_durable(self, timeout_s: float) -> None:
        """Return when it is on disk; MissError when it never will be, or not in time."""


@dataclass(frozen=True, slots=True)
class _Owed:
    """A final response that was not sent yet."""

    context: Context
    command: Command
    status: int
    comment: str
    stored: Durable | None
    offending: int


Heard = Callable[[Command | None], None]  # the peer's response; None when the association ended without it


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a service sees of the association it serves. `extended` is what was agreed on by SOP class (PS3.7
    D.3.3.5); `owed` are final responses in the order of their requests, `asked` our own requests of the peer
    by message ID."""

    association: Association
    caller: Caller
    address: str
    entry: Log
    extended: Mapping[str, bytes] = field(default_factory=dict)
    owed: list[_Owed] = field(default_factory=list)
    asked: dict[int, Heard] = field(default_factory=dict)

    def ask(self, context: Context, request: Callable[[int], bytes], dataset: bytes, heard: Heard) -> None:
        """Send a request of our own, which `request` builds with a message ID, and go on: the peer may be
        sending one itself just now. `heard` is told of its response, whenever that comes, by the thread that
        serves the association then."""
        message_id = next(number for number in range(1, 0x10000) if number not in self.asked)
        self.asked[message_id] = heard
        self.association.send(context, request(message_id), dataset)

    def hear(self, context: Context, command: Command) -> None:
        """A response of the peer: to something that we asked, or the association ends."""
        heard = self.asked.pop(command.short(MESSAGE_ID_RESPONDED_TO, -1), None)
        if heard is None:
            raise Violation("a response to nothing", source=AbortSource.SERVICE_USER, reason=0)
        self.association.drain(context)
        heard(command)

    def hear_no_more(self) -> None:
        """The association is over: what was asked stays without a response."""
        while self.asked:
            self.asked.popitem()[1](None)

    def respond(self, context: Context, command: Command, status: int, *, comment: str = "",
                dataset: bytes | None = None, more: bytes = b"", sop_instance_uid: str = "",
                error_id: int = 0, offending: int = 0) -> None:
        """Send a response and, when it is the last one, count it. `more` are further elements of the command
        set, above (0000,1000); `sop_instance_uid` names what the request did not, `error_id` goes into
        (0000,0903), `offending` is the tag of an element that was found wrong (0000,0901)."""
        self.settle()
        answer = self._answer(command, status, comment, dataset is not None, more, sop_instance_uid, error_id,
                              offending)
        self.association.send(context, answer, dataset)

    def pending(self, context: Context, command: Command, more: bytes = b"", *, status: int = codes.PENDING,
                dataset: bytes | None = None) -> bytes:
        """A pending response as octets, to be sent together with what comes next."""
        answer = self._answer(command, status, "", dataset is not None, more)
        return self.association.encode(context, answer, dataset)

    def answer(self, context: Context, command: Command, status: int, *, comment: str = "",
               stored: Durable | None = None, offending: int = 0) -> None:
        """Owe the peer the final response to `command`: sent at the next pause, in order, and only when
        `stored` is on disk. Where it does not get there, the response says so."""
        self.owed.append(_Owed(context, command, status, comment, stored, offending))

    def settle(self) -> None:
        """Send what is owed, waiting for the disk and for the peer."""
        if self.owed:
            association = self.association
            association.crowded = self._is_full() and association.wire.readable()
            association.wire.send(self.answers())

    def forgo(self) -> None:
        """The peer is gone: what it sent whole is kept all the same, and nobody hears of it."""
        if self.owed:
            self.answers()

    def reads_on(self) -> bool:
        """Whether the next request is to be read before what is owed is sent: the peer has a window
        (PS3.7 D.3.3.3), room in it, and has sent something."""
        window = self.association.window
        return 0 < len(self.owed) < window and self.association.wire.readable()

    def hold_to_window(self, command: Command) -> None:
        """End over a request that came while a whole window of others was not answered. Without a window a
        peer that does not wait is served all the same, one after the other."""
        crowded, self.association.crowded = self.association.crowded, False
        if command.field != Field.C_CANCEL and (crowded or self._is_full()):
            raise Violation("more operations at once than its window allows", 0, AbortSource.SERVICE_USER)

    def _is_full(self) -> bool:
        return len(self.owed) >= self.association.window > 1

    def answers(self, until_s: float | None = None) -> bytes:
        """What is owed, as octets to be sent: one wait for the disk serves all that were written by then. It
        ends at `until_s`, a moment of `time.monotonic`; by default after DURABLE_TIMEOUT_S."""
        if until_s is None:
            until_s = time.monotonic() + DURABLE_TIMEOUT_S
        owed, self.owed[:] = self.owed[:], ()
        return b"".join(self.association.encode(each.context, self._outcome(each, until_s)) for each in owed)

    def _outcome(self, owed: _Owed, until_s: float) -> bytes:
        status, comment = owed.status, owed.comment
        try:
            if owed.stored is not None:
                owed.stored.wait_durable(max(until_s - time.monotonic(), 0.0))
        except MissError as error:
            status, comment = codes.status_of(error), str(error)
            log.info("%s from %s: %04X %s", owed.command.name, self.caller.ae_title, status, comment)
        return self._answer(owed.command, status, comment, False, offending=owed.offending)

    def _answer(self, command: Command, status: int, comment: str, has_dataset: bool, more: bytes = b"",
                sop_instance_uid: str = "", error_id: int = 0, offending: int = 0) -> bytes:
        if status not in (codes.PENDING, codes.PENDING_UNSUPPORTED_KEYS):
            self.entry.operations[f"{command.name} {status:04X}"] += 1
        return response(command, status, comment=comment, has_dataset=has_dataset, more=more,
                        sop_instance_uid=sop_instance_uid, error_id=error_id, offending=offending)


class Service(Protocol):
    """Serves one kind of command. It reads or drains the data set and responds, or raises a MissError, which
    is answered by the table in `status.py`."""

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None: ...

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        """Whether a message of this caller that has arrived whole is served at once, waiting for nothing but
        its owed response's sync."""
