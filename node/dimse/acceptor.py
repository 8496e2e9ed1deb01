"""Owns the acceptor's side of one connection, from its first octet to its last: A-ASSOCIATE within ARTIM,
admission, negotiation, the loop that hands each command to its service, and the right ending (PS3.8 9.2,
Tables 9-6 to 9-10). It never touches an archive or a ledger: those are behind `Gate` and `Service`."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from archive.errors import MissError
from node.dimse import status as codes
from node.dimse.association import Association, Context, Limits
from node.dimse.contexts import Offer, Permitted, ServiceName, negotiate
from node.dimse.errors import AssociationEnded, PeerAborted, PeerReleased, Stopping, TimedOut, Violation
from node.dimse.messages import Command, Field, response
from node.dimse.pdu import (
    APPLICATION_CONTEXT,
    ASSOCIATE_BYTES_MAX,
    HEADER_BYTES,
    RELEASE_RP_OCTETS,
    AbortReason,
    AbortSource,
    AssociateRequest,
    InvalidPdu,
    PduType,
    Rejection,
    decode_request,
    encode_abort,
    encode_accept,
    encode_rejection,
    parse_header,
)
from node.dimse.wire import Wire

log = logging.getLogger(__name__)

APPLICATION_CONTEXT_NOT_SUPPORTED = Rejection(1, 1, 2)
PROTOCOL_VERSION_NOT_SUPPORTED = Rejection(1, 2, 2)
TEMPORARY_CONGESTION = Rejection(2, 3, 1)


@dataclass(frozen=True, slots=True)
class Caller:
    """A device that was let in. `issuer` is of its Patient IDs where it has one of its own; empty
    `sop_classes` and `transfer_syntaxes` are all that the node takes."""

    ae_title: str
    name: str
    issuer: str | None
    services: frozenset[ServiceName]
    on_conflict: str = "keep"
    sop_classes: frozenset[str] = frozenset()
    transfer_syntaxes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a caller is turned away: what it is told, and what its own people are told."""

    rejection: Rejection
    why: str


@dataclass(slots=True)
class Log:
    """What there is to say of one association when it is over; no patient data."""

    at_us: int
    address: str
    calling_ae: str = ""
    called_ae: str = ""
    device: str = ""
    outcome: str = "refused"
    reason: str = ""
    contexts: list[str] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0
    ended: str = ""


class Gate(Protocol):
    """Who may come in, how many at once, and the book of who came."""

    def admit(self, request: AssociateRequest, address: str) -> Caller | Refusal: ...

    def leave(self, caller: Caller) -> None: ...

    def record(self, entry: Log) -> None: ...


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a service sees of the association it serves."""

    association: Association
    caller: Caller
    address: str
    entry: Log

    def respond(self, context: Context, command: Command, status: int, *, comment: str = "",
                dataset: bytes | None = None) -> None:
        """Send a response and, when it is the last one, count it."""
        if status not in (codes.PENDING, codes.PENDING_UNSUPPORTED_KEYS):
            self.entry.operations[f"{command.name} {status:04X}"] += 1
        octets = response(command, status, comment=comment, has_dataset=dataset is not None)
        self.association.send(context, octets, dataset)


class Service(Protocol):
    """Serves one kind of command. It reads or drains the data set and responds, or raises a MissError, which
    is answered by the table in `status.py`."""

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What is served: by command field, the service's name and its code."""

    offer: Offer
    table: Mapping[int, tuple[ServiceName, Service]]


class Acceptor:
    """One connection. `settled` is called when it is associated and (False) when it is not any more, so that
    the server can bound those that are not."""

    def __init__(self, wire: Wire, address: str, gate: Gate, services: Services, limits: Limits,
                 settled: Callable[[bool], None]) -> None:
        self._wire = wire
        self._gate = gate
        self._services = services
        self._limits = limits
        self._settled = settled
        self._entry = Log(int(time.time() * 1e6), address)

    def run(self) -> None:
        """Serve the connection until it is closed; never raises."""
        try:
            request = self._await_request()
            if request is not None:
                self._answer(request)
        except AssociationEnded as ended:
            log.debug("%s: %s before an association", self._entry.address, ended)
        except Exception as error:
            log_unexpected("a connection", error)
        finally:
            self._wire.close()

    def _await_request(self) -> AssociateRequest | None:
        """Sta2: nothing but A-ASSOCIATE-RQ has a place here, and ARTIM is running."""
        wire = self._wire
        wire.set_deadline(time.monotonic() + self._limits.artim_s)
        start = wire.need(HEADER_BYTES)
        kind, length = parse_header(memoryview(wire.buffer)[start:start + HEADER_BYTES])
        wire.start += HEADER_BYTES
        if kind == PduType.ASSOCIATE_RQ and length <= ASSOCIATE_BYTES_MAX:
            try:
                return decode_request(memoryview(wire.read(length)))
            except InvalidPdu as invalid:
                log.info("%s: an A-ASSOCIATE-RQ that is none: %s", self._entry.address, invalid)
        elif not 1 <= kind <= 7:
            return None  # no DICOM at all (a browser, a port scanner): closed without a word
        elif kind == PduType.ABORT:
            return None  # AA-2
        self._say_and_linger(encode_abort(AbortSource.SERVICE_USER, AbortReason.NOT_SPECIFIED))  # AA-1
        return None

    def _answer(self, request: AssociateRequest) -> None:
        entry = self._entry
        entry.calling_ae, entry.called_ae = request.calling_ae, request.called_ae
        verdict = self._admit(request)
        if isinstance(verdict, Refusal):
            entry.reason = verdict.why
            entry.ended = f"rejected {verdict.rejection.triple}"
            with contextlib.suppress(AssociationEnded):
                self._wire.send(encode_rejection(verdict.rejection))
            self._record()
            self._wire.linger(self._limits.artim_s)  # Sta13
            return
        entry.device = verdict.name or verdict.ae_title
        try:
            last_words = self._associate(request, verdict)
        finally:
            # Before the last word: a peer that hears it may come again at once, and finds its place free.
            self._gate.leave(verdict)
            self._settled(False)
        with contextlib.suppress(AssociationEnded):
            self._wire.send(last_words)
        self._record()
        if last_words:
            self._wire.linger(self._limits.artim_s)  # Sta13; after the peer's own A-ABORT we close (AA-3)

    def _admit(self, request: AssociateRequest) -> Caller | Refusal:
        if not request.protocol_version & 1:
            return Refusal(PROTOCOL_VERSION_NOT_SUPPORTED, "it does not speak version 1 of the protocol")
        if request.application_context != APPLICATION_CONTEXT:
            return Refusal(APPLICATION_CONTEXT_NOT_SUPPORTED, "its application context is not DICOM's")
        try:
            return self._gate.admit(request, self._entry.address)
        except Exception as error:
            log_unexpected("admission", error)
            return Refusal(TEMPORARY_CONGESTION, "the list of devices could not be read")

    def _associate(self, request: AssociateRequest, caller: Caller) -> bytes:
        """Serve the association to its end; what is still to be said to the peer afterwards, if anything."""
        entry = self._entry
        entry.outcome = "accepted"
        permitted = Permitted(caller.services, caller.sop_classes, caller.transfer_syntaxes)
        accept, contexts = negotiate(request, self._services.offer, permitted, self._limits.max_pdu_bytes)
        for proposed, answer in zip(request.contexts, accept.contexts, strict=True):
            verdict = answer.transfer_syntax if answer.id in contexts else f"refused {answer.result}"
            entry.contexts.append(f"{proposed.abstract_syntax[:64]} {verdict}")
        try:
            self._wire.send(encode_accept(accept))
            association = Association(self._wire, contexts, request.max_pdu_bytes, self._limits,
                                      requestor=False)
            self._settled(True)
            self._serve(Exchange(association, caller, entry.address, entry))
        except PeerReleased:
            entry.ended = "released"
            return RELEASE_RP_OCTETS
        except PeerAborted as aborted:
            entry.ended = str(aborted)
        except Violation as violation:
            entry.ended = f"aborted by us: {violation}"
            return encode_abort(violation.source, violation.reason)
        except (TimedOut, Stopping) as ended:
            entry.ended = f"aborted by us: {ended}"
            return encode_abort(AbortSource.SERVICE_USER, AbortReason.NOT_SPECIFIED)
        except AssociationEnded as ended:
            entry.ended = str(ended)
        except Exception as error:
            log_unexpected("an association", error)
            entry.ended = "aborted by us: an unexpected error"
            return encode_abort(AbortSource.SERVICE_USER, AbortReason.NOT_SPECIFIED)
        return b""

    def _serve(self, exchange: Exchange) -> None:
        association = exchange.association
        while True:
            if association.wire.stopping:
                raise Stopping("this side is being stopped")
            context, command = association.receive()
            if command.is_response:
                raise Violation("a response to nothing", source=AbortSource.SERVICE_USER, reason=0)
            self._perform(exchange, context, command)

    def _perform(self, exchange: Exchange, context: Context, command: Command) -> None:
        name, service = self._services.table.get(command.field, (None, None))
        if service is None or name is not self._services.offer.service(context.abstract_syntax):
            exchange.association.drain(context)
            if command.field != Field.C_CANCEL:  # else of an operation that is over: nothing to say
                exchange.respond(context, command, codes.UNRECOGNIZED_OPERATION)
            return
        try:
            service.serve(exchange, context, command)
        except AssociationEnded:
            raise
        except MissError as error:
            self._fail(exchange, context, command, codes.status_of(error), str(error))
        except Exception as error:
            log_unexpected(command.name, error)
            self._fail(exchange, context, command, codes.PROCESSING_FAILURE, "")

    def _fail(self, exchange: Exchange, context: Context, command: Command, status: int,
              comment: str) -> None:
        log.info("%s from %s: %04X %s", command.name, exchange.caller.ae_title, status, comment)
        exchange.association.drain(context)
        exchange.respond(context, command, status, comment=comment)

    def _say_and_linger(self, octets: bytes) -> None:
        with contextlib.suppress(AssociationEnded):
            self._wire.send(octets)
        self._wire.linger(self._limits.artim_s)

    def _record(self) -> None:
        self._entry.bytes_in, self._entry.bytes_out = self._wire.bytes_in, self._wire.bytes_out
        try:
            self._gate.record(self._entry)
        except Exception as error:
            log_unexpected("the connection log", error)


def log_unexpected(what: str, error: Exception) -> None:
    """Where an error came from, without its text: a library's message may quote a data set."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed: %s\n%s", what, type(error).__name__, trace)
