"""Owns the requestor's side: connect, propose, and then echo, store and find over the association (PS3.7
9.1), with several C-STOREs open at once where the peer grants a window. It never retries and never chooses
what to send; `sending.py` and the services that forward do."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from node.dimse import contexts, messages
from node.dimse.association import Association, Context, Limits
from node.dimse.closing import await_close
from node.dimse.errors import AssociationEnded, ConnectionLost, PeerAborted, Rejected, Violation
from node.dimse.messages import RESPONSE, Command, Field
from node.dimse.outbox import Outbox
from node.dimse.pdu import (
    ASSOCIATE_BYTES_MAX,
    HEADER_BYTES,
    AbortReason,
    AbortSource,
    AssociateAccept,
    AssociateRequest,
    InvalidPdu,
    PduType,
    ProposedContext,
    Role,
    UserIdentity,
    decode_abort,
    decode_accept,
    decode_rejection,
    encode_abort,
    encode_request,
    parse_header,
)
from node.dimse.status import PENDING, PENDING_UNSUPPORTED_KEYS
from node.dimse.tls import Dialling
from node.dimse.wire import Buffer, Wire

CONNECT_TIMEOUT_S = 10.0
CLOSE_WAIT_S = 1.0  # for a peer that was told by A-ABORT that its answer to A-ASSOCIATE-RQ is none
IDENTIFIER_BYTES_MAX = 4 << 20
ECHO_CONTEXT = ProposedContext(1, contexts.VERIFICATION, (contexts.IMPLICIT_LITTLE,))


@dataclass(frozen=True, slots=True)
class Peer:
    """An application entity that can be called; over TLS when it says how."""

    host: str
    port: int
    called_ae: str
    tls: Dialling | None = None


class Requestor:
    """An association that we asked for. Leaving its `with` block releases it, or aborts it on an error.

    `window` is how many operations may be open at once: 1 unless one was asked for and granted."""

    def __init__(self, association: Association, accept: AssociateAccept, window: int = 1) -> None:
        self.association = association
        self.accept = accept
        self.window = window
        self._message_id = 0
        self._open: set[int] = set()
        self._by_syntaxes = {(context.abstract_syntax, context.transfer_syntax): context
                             for context in association.contexts.values()}

    @classmethod
    def connect(cls, peer: Peer, calling_ae: str, proposed: Sequence[ProposedContext], *,
                limits: Limits | None = None, connect_timeout_s: float = CONNECT_TIMEOUT_S,
                window: int = 1, user_identity: UserIdentity | None = None,
                roles: Sequence[Role] = (), extended: Sequence[tuple[str, bytes]] = ()) -> Self:
        """Connect and associate. `window` asks for that many open operations, `roles` for others than that we
        are the SCU of all (PS3.7 D.3.3.4), `extended` for what a SOP class leaves open (D.3.3.5). Raises
        ConnectionLost, TimedOut, Rejected, PeerAborted or Violation."""
        limits = limits or Limits()
        try:
            sock = socket.create_connection((peer.host, peer.port), connect_timeout_s)
        except OSError as error:
            cause = error.strerror or str(error)
            raise ConnectionLost(f"no connection to {peer.host}:{peer.port}: {cause}") from None
        if peer.tls is not None:
            wire: Wire = peer.tls.wrap(sock, peer.host, timeout_s=limits.artim_s,
                                       buffer_bytes_max=limits.buffer_bytes_max,
                                       send_timeout_s=limits.message_timeout_s)
        else:
            wire = Wire(sock, buffer_bytes_max=limits.buffer_bytes_max,
                        send_timeout_s=limits.message_timeout_s)
        try:
            request = AssociateRequest(peer.called_ae, calling_ae, tuple(proposed), limits.max_pdu_bytes,
                                       asynchronous_window=(window, 1) if window > 1 else None,
                                       user_identity=user_identity, roles=tuple(roles),
                                       extended=tuple(extended))
            accept = _negotiate(wire, request, limits.artim_s)
        except BaseException:
            wire.close()
            raise
        agreed = contexts.agreed(proposed, accept.contexts, accept.roles)
        association = Association(wire, agreed, accept.max_pdu_bytes, limits, requestor=True)
        return cls(association, accept, _granted(window, accept))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.association.release()
        else:
            self.abort()

    def context(self, sop_class_uid: str, transfer_syntax_uid: str) -> Context | None:
        """The context that was agreed on for exactly this pair."""
        return self._by_syntaxes.get((sop_class_uid, transfer_syntax_uid))

    def context_of(self, sop_class_uid: str) -> Context | None:
        """Any context that was agreed on for a SOP class."""
        found = (c for c in self.association.contexts.values() if c.abstract_syntax == sop_class_uid)
        return next(found, None)

    def echo(self) -> int:
        """C-ECHO; the status."""
        context = self._require(contexts.VERIFICATION)
        self.association.send(context, messages.echo_request(self.next_message_id()))
        return self._response().status

    def store(self, context: Context, sop_instance_uid: str, chunks: Iterable[Buffer], *,
              originator: tuple[str, int] | None = None) -> int:
        """C-STORE of a data set that comes in chunks, encoded in the context's transfer syntax; the
        status."""
        request = messages.store_request(self.next_message_id(), context.abstract_syntax, sop_instance_uid,
                                         originator=originator)
        self.association.send_stream(context, request, chunks)
        return self._response().status

    def post(self, context: Context, sop_instance_uid: str, outbox: Outbox, *,
             originator: tuple[str, int] | None = None) -> int:
        """C-STORE of what an outbox has begun, without waiting for the response; its message ID. At most
        `window` may be open. What its source raises when it can't be read to its end leaves only abort."""
        if len(self._open) >= self.window:
            raise ValueError("the window is full")
        message_id = self.next_message_id()
        request = messages.store_request(message_id, context.abstract_syntax, sop_instance_uid,
                                         originator=originator)
        self._open.add(message_id)
        self.association.send_outbox(context, request, outbox)
        return message_id

    def answer(self) -> tuple[int, Command]:
        """Wait for the response to something that was posted: that one's message ID, and the response. With a
        window they come in any order."""
        answer = self.association.receive_response()
        message_id = answer.short(messages.MESSAGE_ID_RESPONDED_TO, -1)
        if message_id not in self._open:
            raise Violation("a response to another message", 0, AbortSource.SERVICE_USER)
        if answer.field != Field.C_STORE | RESPONSE:
            raise Violation("a response of another kind", 0, AbortSource.SERVICE_USER)
        self._open.discard(message_id)
        return message_id, answer

    def find(self, identifier: bytes, sop_class_uid: str = contexts.STUDY_ROOT_FIND, *,
             cancel_after: int | None = None) -> Iterator[tuple[Command, bytes | None]]:
        """C-FIND with an encoded identifier: every response, the final one last, with its encoded
        identifier."""
        context = self._require(sop_class_uid)
        message_id = self.next_message_id()
        request = messages.query_request(Field.C_FIND, message_id, sop_class_uid)
        self.association.send(context, request, identifier)
        count = 0
        while True:
            answer = self._response()
            dataset = None
            if answer.has_dataset:
                dataset = self.association.read_dataset(context, IDENTIFIER_BYTES_MAX)
            yield answer, dataset
            if answer.status not in (PENDING, PENDING_UNSUPPORTED_KEYS):
                return
            count += 1
            if count == cancel_after:
                self.association.send(context, messages.cancel_request(message_id))

    def call(self, context: Context, request: bytes, dataset: bytes | None = None) -> tuple[Command, bytes]:
        """Send a request that was built with `next_message_id`, and wait for its one response: the command,
        and its data set (b"" when it has none)."""
        self.association.send(context, request, dataset)
        answer = self._response()
        octets = self.association.read_dataset(context, IDENTIFIER_BYTES_MAX) if answer.has_dataset else b""
        return answer, octets

    def release(self) -> None:
        """The orderly end."""
        self.association.release()

    def abort(self) -> None:
        """The other end."""
        self.association.abort()
        self.association.wire.close()

    def _require(self, sop_class_uid: str) -> Context:
        context = self.context_of(sop_class_uid)
        if context is None:
            raise Violation(f"the peer accepts no presentation context for {sop_class_uid}")
        return context

    def _response(self) -> Command:
        answer = self.association.receive_response()
        if answer.short(messages.MESSAGE_ID_RESPONDED_TO, -1) != self._message_id:
            raise Violation("a response to another message", 0, AbortSource.SERVICE_USER)
        return answer

    def next_message_id(self) -> int:
        self._message_id = self._message_id % 0xFFFF + 1
        return self._message_id


def _negotiate(wire: Wire, request: AssociateRequest, artim_s: float) -> AssociateAccept:
    """Sta5: A-ASSOCIATE-AC, -RJ or A-ABORT; the answer has to be there within ARTIM."""
    octets = encode_request(request)
    wire.set_deadline(time.monotonic() + artim_s)
    wire.send(octets)
    start = wire.need(HEADER_BYTES)
    kind, length = parse_header(memoryview(wire.buffer)[start:start + HEADER_BYTES])
    wire.start += HEADER_BYTES
    if kind in (PduType.ASSOCIATE_AC, PduType.ASSOCIATE_RJ, PduType.ABORT) and length <= ASSOCIATE_BYTES_MAX:
        body = memoryview(wire.read(length))
        try:
            if kind == PduType.ASSOCIATE_AC:
                return decode_accept(body)
            if kind == PduType.ASSOCIATE_RJ:
                raise Rejected(decode_rejection(body))
            raise PeerAborted(*decode_abort(body))
        except InvalidPdu as invalid:
            violation = Violation(f"the answer to A-ASSOCIATE-RQ can't be read: {invalid}", invalid.reason)
            length = 0
    elif 1 <= kind <= 7:
        violation = Violation("a PDU that does not answer A-ASSOCIATE-RQ", AbortReason.UNEXPECTED_PDU)
    else:
        violation = Violation("the peer does not speak DICOM", AbortReason.UNRECOGNIZED_PDU)
    with contextlib.suppress(AssociationEnded):
        wire.send(encode_abort(violation.source, violation.reason))
        await_close(wire, min(artim_s, CLOSE_WAIT_S), length)
    raise violation


def _granted(asked: int, accept: AssociateAccept) -> int:
    """The window that was agreed on: absent is 1, 0 unlimited, more than was asked for is what was asked
    for (PS3.7 D.3.3.3)."""
    invoked = 1 if accept.asynchronous_window is None else accept.asynchronous_window[0]
    return min(invoked or asked, asked)


def echo(peer: Peer, calling_ae: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> int:
    """Associate, C-ECHO, release; the status."""
    limits = Limits(artim_s=timeout_s, message_timeout_s=timeout_s)
    with Requestor.connect(peer, calling_ae, [ECHO_CONTEXT], limits=limits,
                           connect_timeout_s=timeout_s) as requestor:
        return requestor.echo()
