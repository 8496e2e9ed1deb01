"""Owns the acceptor's side of one connection, from its first octet to its last: A-ASSOCIATE within ARTIM,
admission, negotiation, the loop that hands each command to its service, and the right ending (PS3.8 9.2,
Tables 9-6 to 9-10). It never touches an archive or a ledger: those are behind `Gate` and `Service`."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from pydicom.datadict import tag_for_keyword

from archive.dataset.encoding import DEFLATED_SYNTAXES
from archive.errors import InvalidQuery, MissError
from node.dimse import status as codes
from node.dimse.association import Association, Context, Limits
from node.dimse.closing import await_close
from node.dimse.contexts import Offer, Permitted, ServiceName, negotiate
from node.dimse.errors import (
    AssociationEnded,
    ConnectionLost,
    PeerAborted,
    PeerReleased,
    Stopping,
    TimedOut,
    Violation,
)
from node.dimse.exchange import Caller, Exchange, Log, Service
from node.dimse.messages import Command, Field
from node.dimse.origin import Origin
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
_OF_ONE_SERVICE = {Field.C_ECHO: ServiceName.ECHO, Field.C_STORE: ServiceName.STORE}
TLS_HANDSHAKE = 0x16  # the type of the record that TLS begins with (RFC 8446, 5.1)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a caller is turned away: what it is told, and what its own people are told."""

    rejection: Rejection
    why: str


class Gate(Protocol):
    """Who may come in, how many at once, and the book of who came."""

    def admit(self, request: AssociateRequest, origin: Origin) -> Caller | Refusal: ...

    def leave(self, caller: Caller) -> None: ...

    def record(self, entry: Log) -> None: ...


class Turn(Enum):
    """Where `Acceptor.steps` pauses."""

    BETWEEN = "between two messages: nobody waits but for the peer's next request and for what is owed"
    ENDING = "before the last words, which may wait for the peer"


@dataclass(frozen=True, slots=True)
class Services:
    """What is served: each service's code by the service's name and the command field."""

    offer: Offer
    table: Mapping[tuple[ServiceName, int], Service]


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
        self.exchange: Exchange | None = None  # from the first pause on
        self._inflates = False

    def steps(self) -> Generator[Turn]:
        """Serve the connection until it is closed; never raises. It pauses where another thread may go on
        with it, or throw in how the association ends."""
        try:
            origin = self._arrive()
            request = self._await_request()
            if request is not None:
                yield from self._answer(request, origin)
        except AssociationEnded as ended:
            self._never_associated(str(ended))
        except Exception as error:
            log_unexpected("a connection", error)
        finally:
            self._wire.close()

    def _arrive(self) -> Origin:
        """Sta1 to Sta2: the transport is agreed on, within ARTIM as well."""
        self._entry.transport = self._wire.transport
        origin = self._wire.arrive(self._entry.address, self._limits.artim_s)
        self._entry.transport = origin.transport
        self._entry.certificate = "" if origin.certificate is None else str(origin.certificate)
        return origin

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
            length = 0
            self._never_associated("an A-ASSOCIATE-RQ that can't be read")
        elif kind == PduType.ABORT:
            self._never_associated("it aborted before an association")
            return None  # AA-2
        elif kind == TLS_HANDSHAKE:
            self._never_associated("it speaks TLS, and this is the plain port")
        elif 1 <= kind <= 7:
            self._never_associated("its first PDU is no A-ASSOCIATE-RQ, or too long")
        else:
            self._never_associated("it does not speak DICOM")
        with contextlib.suppress(AssociationEnded):  # AA-1, also to a browser or a port scanner
            wire.send(encode_abort(AbortSource.SERVICE_USER, AbortReason.NOT_SPECIFIED))
        await_close(wire, self._limits.artim_s, length)
        return None

    def _answer(self, request: AssociateRequest, origin: Origin) -> Generator[Turn]:
        entry = self._entry
        entry.calling_ae, entry.called_ae = request.calling_ae, request.called_ae
        verdict = self._admit(request, origin)
        if isinstance(verdict, Refusal):
            entry.reason = verdict.why
            entry.ended = f"rejected {verdict.rejection.triple}"
            with contextlib.suppress(AssociationEnded):
                self._wire.send(encode_rejection(verdict.rejection))
            self._record()
            await_close(self._wire, self._limits.artim_s)
            return
        entry.device = verdict.name or verdict.ae_title
        entry.user = verdict.user
        try:
            last_words = yield from self._associate(request, verdict)
        finally:
            # Before the last word: a peer that hears it may come again at once, and finds its place free.
            self._gate.leave(verdict)
            self._settled(False)
            if self.exchange is not None:
                self.exchange.hear_no_more()
        yield Turn.ENDING
        exchange = self.exchange
        with contextlib.suppress(AssociationEnded):
            if exchange is not None and last_words:
                exchange.settle()  # also to a peer that asked to release before it had its answers (AR-7)
            elif exchange is not None:
                exchange.forgo()
            self._wire.send(last_words)
        self._record()
        if last_words:  # after the peer's own A-ABORT we close (AA-3)
            left = 0 if exchange is None else exchange.association.pdu_left
            await_close(self._wire, self._limits.artim_s, left)

    def _admit(self, request: AssociateRequest, origin: Origin) -> Caller | Refusal:
        if not request.protocol_version & 1:
            return Refusal(PROTOCOL_VERSION_NOT_SUPPORTED, "it does not speak version 1 of the protocol")
        if request.application_context != APPLICATION_CONTEXT:
            return Refusal(APPLICATION_CONTEXT_NOT_SUPPORTED, "its application context is not DICOM's")
        try:
            return self._gate.admit(request, origin)
        except Exception as error:
            log_unexpected("admission", error)
            return Refusal(TEMPORARY_CONGESTION, "the list of devices could not be read")

    def _associate(self, request: AssociateRequest, caller: Caller) -> Generator[Turn, None, bytes]:
        """Serve the association to its end; what is still to be said to the peer afterwards, if anything."""
        entry = self._entry
        entry.outcome = "accepted"
        permitted = Permitted(caller.services, caller.sop_classes, caller.transfer_syntaxes)
        accept, contexts = negotiate(request, self._services.offer, permitted, self._limits.max_pdu_bytes,
                                     operations_max=self._limits.operations_max)
        for proposed, answer in zip(request.contexts, accept.contexts, strict=True):
            verdict = answer.transfer_syntax if answer.id in contexts else f"refused {answer.result}"
            entry.contexts.append(f"{proposed.abstract_syntax[:64]} {verdict}")
        try:
            window = accept.asynchronous_window
            association = Association(self._wire, contexts, request.max_pdu_bytes, self._limits,
                                      requestor=False, window=window[0] if window else 1,
                                      invokes=window[1] if window else 1)
            self.exchange = Exchange(association, caller, entry.address, entry, dict(accept.extended))
            # A few kilobytes may inflate to half a second's work: that is its own thread's, never the pump's.
            self._inflates = any(each.transfer_syntax in DEFLATED_SYNTAXES for each in contexts.values())
            association.refuse_what_came()  # Sta3
            self._wire.send(encode_accept(replace(accept, identity_answer=caller.identity_answer)))
            self._settled(True)
            yield from self._serve(self.exchange)
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

    def _serve(self, exchange: Exchange) -> Generator[Turn, None, None]:
        """Sta6, until the peer asks to release."""
        association = exchange.association
        try:
            while True:
                yield Turn.BETWEEN
                if association.wire.stopping and not association.wire.busy:
                    raise Stopping("this side is being stopped")
                context, command = association.receive()
                if command.is_response:
                    exchange.hear(context, command)
                    continue
                exchange.hold_to_window(command)
                self._perform(exchange, context, command)
        except PeerReleased:
            with contextlib.suppress(ConnectionLost):  # it need not wait for our answer
                association.refuse_what_came()  # Sta8

    def is_prompt(self, command: Command) -> bool:
        """Whether a whole message of this kind is served without waiting."""
        name = _OF_ONE_SERVICE.get(command.field)  # type: ignore[call-overload]
        service = None if name is None else self._services.table.get((name, command.field))
        exchange = self.exchange
        return (service is not None and exchange is not None and service.is_prompt(exchange.caller, command)
                and not self._inflates)

    def _perform(self, exchange: Exchange, context: Context, command: Command) -> None:
        name = self._services.offer.service(context.abstract_syntax)
        service = None if name is None else self._services.table.get((name, command.field))
        # An event is what an SCP reports, all else what an SCU asks for (PS3.7 10.1).
        reports = command.field == Field.N_EVENT_REPORT
        if service is None or not (context.requestor_is_scp if reports else context.requestor_is_scu):
            exchange.association.drain(context)
            if command.field != Field.C_CANCEL:  # else of an operation that is over: nothing to say
                exchange.answer(context, command, codes.UNRECOGNIZED_OPERATION)
            return
        if command.field != Field.C_STORE:
            exchange.settle()  # what is asked now may be about what was sent before
        try:
            service.serve(exchange, context, command)
        except AssociationEnded:
            raise
        except MissError as error:
            self._fail(exchange, context, command, codes.status_of(error), str(error), _offending(error))
        except Exception as error:
            log_unexpected(command.name, error)
            self._fail(exchange, context, command, codes.PROCESSING_FAILURE, "")

    def _fail(self, exchange: Exchange, context: Context, command: Command, status: int, comment: str,
              offending: int = 0) -> None:
        log.info("%s from %s: %04X %s", command.name, exchange.caller.ae_title, status, comment)
        exchange.association.drain(context)
        exchange.answer(context, command, status, comment=comment, offending=offending)

    def _never_associated(self, why: str) -> None:
        """The connection ends without an association; `why` is one of few texts, and names no peer."""
        if not self._wire.stopping:
            self._entry.outcome, self._entry.ended = "failed", why
            self._record()

    def _record(self) -> None:
        self._entry.bytes_in, self._entry.bytes_out = self._wire.bytes_in, self._wire.bytes_out
        try:
            self._gate.record(self._entry)
        except Exception as error:
            log_unexpected("the connection log", error)


def _offending(error: MissError) -> int:
    """The tag of what a query or retrieve is refused for (PS3.4 Tables C.4-1 to C.4-3): of a dotted path the
    sequence's, 0 where it is no single element."""
    keyword = error.keyword if isinstance(error, InvalidQuery) else ""
    return tag_for_keyword(keyword.partition(".")[0]) or 0


def log_unexpected(what: str, error: Exception) -> None:
    """Where an error came from, without its text: a library's message may quote a data set."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed: %s\n%s", what, type(error).__name__, trace)
