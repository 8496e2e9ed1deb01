"""Owns the push model of storage commitment on associations that others opened (PS3.4 Annex J): as SCP it
takes N-ACTION requests, and reports on them over the same association where the peer waits for that; as SCU
it takes the N-EVENT-REPORTs on what this node asked for. It never verifies, keeps or retries anything
itself: `node/commitment/` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from archive.budget import ByteBudget
from archive.errors import InvalidInput, MissError, OtherContent, OutOfResources, TooLarge
from node.dimse import commitments
from node.dimse import status as codes
from node.dimse.association import Association, Context
from node.dimse.commitments import INFORMATION_BYTES_MAX, Information
from node.dimse.contexts import STORAGE_COMMITMENT
from node.dimse.exchange import Caller, Exchange, Heard
from node.dimse.messages import (
    ACTION_TYPE_ID,
    AFFECTED_SOP_CLASS_UID,
    EVENT_TYPE_ID,
    REQUESTED_SOP_CLASS_UID,
    Command,
    Field,
    normalized_request,
    short,
)

HELD_BYTES_MAX = 64 << 20  # of information that is being received, of all devices together
POLL_S = 0.02              # how often it is looked whether there is something to report
POLL_LONG_S = 0.25

# What an N-ACTION is answered (PS3.7 10.1.4.1.10) and, but for the action's type, an N-EVENT-REPORT too.
STATUSES: Mapping[int, str] = {
    codes.SUCCESS: "the request is on disk; whether it is committed is reported later",
    codes.PROCESSING_FAILURE: "an error that is not foreseen",
    codes.NO_SUCH_INSTANCE: "the SOP instance is not 1.2.840.10008.1.20.1.1",
    codes.NO_SUCH_EVENT: "the event type is neither 1 nor 2",
    codes.INVALID_ARGUMENT: "no Transaction UID, no instance, a UID that is none, an instance listed twice; "
                            "a Transaction UID in use for other instances; a report on what was not asked",
    codes.NO_SUCH_CLASS: "the SOP class is not 1.2.840.10008.1.20.1",
    codes.NO_SUCH_ACTION: "the action type is not 1",
    codes.RESOURCE_LIMITATION: "too many requests of this device are open, or too many instances in one: "
                               "later, or in parts",
}


class Refused(Exception):
    """How a request or report is answered that is none."""

    def __init__(self, status: int, comment: str) -> None:
        super().__init__(comment)
        self.status = status


class Report(Protocol):
    """A report that may be sent now, by whoever holds it, and by nobody else meanwhile."""

    @property
    def information(self) -> Information: ...

    def answered(self, status: int | None, error: str = "") -> None:
        """What the device answered; None, and why not, when it did not. Then it is somebody else's again."""


class Desk(Protocol):
    """Where requests are kept and verified, and reports made."""

    def accept(self, device: str, information: Information) -> str:
        """The request's id, once it is durable. OtherContent when its Transaction UID is in use for something
        else, OutOfResources when too many are open."""

    def is_settled(self, request_id: str) -> bool:
        """Whether there is a report on it; cheap."""

    def reports(self, device: str) -> Sequence[Report]:
        """All reports to a device, each to be sent, or answered with None; none while the ledger does not
        answer."""

    def here_for(self, device: str) -> AbstractContextManager[float]:
        """While it is open, an association of the device waits for reports, and no other is opened for them;
        for how many seconds to wait at the most."""


@dataclass(frozen=True, slots=True)
class CommitmentRequests:
    """N-ACTION: storage commitment SCP."""

    desk: Desk
    held: ByteBudget = field(default_factory=lambda: ByteBudget(HELD_BYTES_MAX))

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        return False  # it waits for the ledger's sync

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        with ExitStack() as memory:
            self._serve(exchange, context, command, memory)

    def _serve(self, exchange: Exchange, context: Context, command: Command, memory: ExitStack) -> None:
        """`memory` is closed as soon as the request is kept: decoded ones that wait for the ledger count."""
        device = exchange.caller.ae_title
        try:
            _require_ours(command, REQUESTED_SOP_CLASS_UID, command.requested_sop_instance_uid)
            if command.short(ACTION_TYPE_ID, 0) != commitments.REQUEST:
                raise Refused(codes.NO_SUCH_ACTION, "the one action type is 1")
            information = memory.enter_context(
                _information(exchange.association, context, command, self.held))
            if not information.referenced:
                raise Refused(codes.INVALID_ARGUMENT, "no instance is named in (0008,1199)")
        except Refused as refused:
            _refuse(exchange, context, command, refused)
            return
        with self.desk.here_for(device) as patience_s:
            try:
                request_id = _accept(self.desk, device, information)
            except Refused as refused:
                _refuse(exchange, context, command, refused)
                return
            del information
            memory.close()
            exchange.respond(context, command, codes.SUCCESS)
            if _await(self.desk, request_id, exchange, patience_s):
                _send(exchange, context, self.desk.reports(device))


class Taker(Protocol):
    """Takes a device's report; False when nothing was asked of it by that Transaction UID."""

    def __call__(self, device: str, information: Information) -> bool: ...


@dataclass(frozen=True, slots=True)
class CommitmentReports:
    """N-EVENT-REPORT: the reports of others on what was forwarded to them."""

    take: Taker
    held: ByteBudget = field(default_factory=lambda: ByteBudget(HELD_BYTES_MAX))

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        return False

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        try:
            information = read_report(exchange.association, context, command, self.held)
            if not self.take(exchange.caller.ae_title, information):
                raise Refused(codes.INVALID_ARGUMENT, "nothing was asked under this Transaction UID")
        except Refused as refused:
            _refuse(exchange, context, command, refused)
            return
        exchange.respond(context, command, codes.SUCCESS)


def read_report(association: Association, context: Context, command: Command,
                held: ByteBudget) -> Information:
    """The event information of an N-EVENT-REPORT. Raises Refused."""
    _require_ours(command, AFFECTED_SOP_CLASS_UID, command.affected_sop_instance_uid)
    if command.short(EVENT_TYPE_ID, 0) not in (commitments.ALL_COMMITTED, commitments.SOME_FAILED):
        raise Refused(codes.NO_SUCH_EVENT, "the event types are 1 and 2")
    with _information(association, context, command, held) as information:
        return information


def event_request(information: Information) -> Callable[[int], bytes]:
    """The N-EVENT-REPORT-RQ of a report, given its message ID."""

    def build(message_id: int) -> bytes:
        return normalized_request(Field.N_EVENT_REPORT, message_id, STORAGE_COMMITMENT, commitments.INSTANCE,
                                  has_dataset=True, more=short(EVENT_TYPE_ID, information.event_type))

    return build


def _require_ours(command: Command, class_element: int, sop_instance_uid: str) -> None:
    if command.text(class_element) != STORAGE_COMMITMENT:
        raise Refused(codes.NO_SUCH_CLASS, "the SOP class is not that of the presentation context")
    if sop_instance_uid != commitments.INSTANCE:
        raise Refused(codes.NO_SUCH_INSTANCE, "the SOP instance is not the well-known one of the push model")
    if not command.has_dataset:
        raise Refused(codes.INVALID_ARGUMENT, "the information is missing")


@contextmanager
def _information(association: Association, context: Context, command: Command,
                 held: ByteBudget) -> Iterator[Information]:
    """Receive and decode it, within the memory that all of them share while they are looked at."""
    octets = bytearray()
    taken = 0
    try:
        for view in association.fragments(context):
            if len(octets) + len(view) > INFORMATION_BYTES_MAX or not held.take(len(view)):
                raise Refused(codes.RESOURCE_LIMITATION, "the information is larger than can be held now")
            taken += len(view)
            octets += view
        information = commitments.decode(bytes(octets), context.transfer_syntax)
        octets.clear()
        yield information
    except InvalidInput as error:
        raise Refused(codes.INVALID_ARGUMENT, str(error)) from None
    except TooLarge as error:
        raise Refused(codes.RESOURCE_LIMITATION, str(error)) from None
    finally:
        octets.clear()  # before it is given back: who answers a refusal still holds this frame, and drains
        held.give_back(taken)


def _accept(desk: Desk, device: str, information: Information) -> str:
    try:
        return desk.accept(device, information)
    except OtherContent as error:
        raise Refused(codes.INVALID_ARGUMENT, str(error)) from None
    except OutOfResources as error:
        raise Refused(codes.RESOURCE_LIMITATION, str(error)) from None
    except MissError as error:  # the ledger does not answer
        raise Refused(codes.PROCESSING_FAILURE, str(error)) from None


def _refuse(exchange: Exchange, context: Context, command: Command, refused: Refused) -> None:
    exchange.association.drain(context)
    exchange.respond(context, command, refused.status, comment=str(refused))


def _await(desk: Desk, request_id: str, exchange: Exchange, patience_s: float) -> bool:
    """Whether there is a report while the peer says nothing: with a request of its own, or when it goes, the
    wait is over. It must not be overtaken by its own next request."""
    began_s = time.monotonic()
    while True:
        waited_s = time.monotonic() - began_s
        if desk.is_settled(request_id):
            return True
        if waited_s >= patience_s:
            return False
        poll_s = POLL_S if waited_s < 5.0 else POLL_LONG_S
        if exchange.association.wire.readable(min(poll_s, patience_s - waited_s)):
            return False


def _send(exchange: Exchange, context: Context, reports: Sequence[Report]) -> None:
    left = list(reports)
    try:
        while left:
            information = left[0].information
            octets = commitments.encode(information, context.transfer_syntax)
            exchange.ask(context, event_request(information), octets, _heard(exchange, left[0]))
            del left[0]
    finally:
        for report in left:
            report.answered(None)


def _heard(exchange: Exchange, report: Report) -> Heard:
    def heard(command: Command | None) -> None:
        if command is None:
            report.answered(None)
            return
        exchange.entry.operations[f"N-EVENT-REPORT {command.status:04X}"] += 1
        report.answered(command.status)

    return heard
