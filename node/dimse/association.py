"""Owns an established association (PS3.8 Sta6 and after), for acceptor and requestor alike: it cuts P-DATA
into commands and data set fragments where they lie in the receive buffer, sends messages, releases (also when
both sides ask at once) and aborts. It never decides who may connect and never knows what a message means."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn, Protocol

from node.dimse import messages
from node.dimse.closing import await_close
from node.dimse.errors import (
    AssociationEnded,
    ConnectionLost,
    PeerAborted,
    PeerReleased,
    Stopping,
    TimedOut,
    Violation,
)
from node.dimse.messages import Command, Field
from node.dimse.outbox import COMMAND_BYTES_MAX, Outbox
from node.dimse.pdu import (
    COMMAND_FRAGMENT,
    HEADER_BYTES,
    LAST_FRAGMENT,
    PDV_HEADER_BYTES,
    RELEASE_RP_OCTETS,
    RELEASE_RQ_OCTETS,
    AbortReason,
    AbortSource,
    PduType,
    data_header,
    decode_abort,
    encode_abort,
)
from node.dimse.wire import TICK_S, Buffer, Wire

ROOM_BYTES_MIN = 4096          # of a fragment that is worth a receive of its own
EMPTY_FRAGMENTS_MAX = 1_000    # in a row: they are legal and carry nothing
SEND_BATCH_BYTES = 1 << 20     # gathered before they are sent: memory stays flat whatever the object's size
SEND_BATCH_BUFFERS = 256
CONTROL_PDU_BYTES_MAX = 1024   # of an A-RELEASE or A-ABORT, which have four octets

_OF_FOUR = (PduType.ASSOCIATE_RJ, PduType.RELEASE_RQ, PduType.RELEASE_RP, PduType.ABORT)
_HEADER = struct.Struct(">BxI")
_PDV = struct.Struct(">IBB")


@dataclass(frozen=True, slots=True)
class Context:
    """A presentation context that both sides agreed on, and the roles in it (PS3.7 D.3.3.4)."""

    id: int
    abstract_syntax: str
    transfer_syntax: str
    requestor_is_scu: bool = True
    requestor_is_scp: bool = False


class Ahead(Enum):
    """What lies in the receive buffer when it is no whole message."""

    PARTIAL = "a part of a message, or nothing"
    OTHER = "something else, or more than may be looked at without consuming it"


@dataclass(slots=True)
class _Seen:
    """How far the message that lies ahead in the receive buffer has been looked at."""

    octets: int = 0
    pdu_left: int = 0
    command: Command | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What one association may cost. `max_pdu_bytes` is what we offer to receive; 0 offers no limit, since
    PDUs are taken in pieces as they arrive and their length costs nothing. Inside a message a peer may not be
    silent for `message_timeout_s`, nor send fewer than `bytes_per_s_min` on the average of that time.
    `operations_max` is the largest window of operations that a requestor gets which asks for one."""

    max_pdu_bytes: int = 256 << 10
    send_pdu_bytes_max: int = 256 << 10
    buffer_bytes_max: int = 256 << 10
    command_bytes_max: int = 16 << 10
    object_bytes_max: int = 1 << 40
    idle_timeout_s: float = 600.0
    message_timeout_s: float = 60.0
    bytes_per_s_min: int = 1 << 10
    artim_s: float = 30.0
    operations_max: int = 8


class Sink(Protocol):
    """Takes a data set in pieces."""

    def room(self, size: int) -> memoryview | None:
        """Where some of the next `size` octets may be put, at least one of them; None when they are to be
        written."""

    def filled(self, view: memoryview) -> None:
        """`view`, the beginning of the room that was given, holds the next octets."""

    def write(self, view: memoryview) -> None:
        """The next octets; the view is valid until this returns."""


class Association:
    """One association after A-ASSOCIATE-AC. Only its own thread calls it, but for `Wire.stop` and `cut`.

    `window` is how many requests the peer may have open at once (PS3.7 D.3.3.3), `invokes` how many we may;
    1 without negotiation."""

    def __init__(self, wire: Wire, contexts: Mapping[int, Context], peer_max_pdu_bytes: int, limits: Limits,
                 *, requestor: bool, window: int = 1, invokes: int = 1) -> None:
        self.wire = wire
        self.contexts = contexts
        self.limits = limits
        self.window = window
        self.invokes = invokes
        self.crowded = False  # more had come when a whole window was answered
        self._requestor = requestor
        bound = limits.send_pdu_bytes_max
        pdu_bytes = min(peer_max_pdu_bytes, bound) if peer_max_pdu_bytes else bound
        # Fragments have an even length (PS3.8 Annex E.1): DCMTK aborts on an odd one. A peer that asks for
        # less than a header and two octets is given them all the same.
        self._fragment_bytes = max(pdu_bytes - PDV_HEADER_BYTES, 2) & ~1
        self._pdu_left = 0
        self._pdv_left = 0
        self._pdv_last = True
        self._dataset_bytes = 0
        self._empty_fragments = 0
        self._waiting: list[tuple[Context, Command]] = []
        self._seen: _Seen | None = None
        wire.bytes_per_s_min = limits.bytes_per_s_min
        wire.pace_window_s = limits.message_timeout_s
        wire.tick_s = min(TICK_S, limits.idle_timeout_s, limits.message_timeout_s)
        wire.set_deadline(None)

    @property
    def pdu_left(self) -> int:
        """What is still to come of the PDU under way, for `await_close`."""
        return self._pdu_left

    @property
    def keeps(self) -> bool:
        """Whether a request that came while another was served is to be served next: nothing more need come
        for `receive` to return."""
        return bool(self._waiting)

    # --- receiving

    def receive(self) -> tuple[Context, Command]:
        """Wait for the next command. When it has a data set, that is to be read or drained before the next
        one."""
        if self._waiting:
            return self._waiting.pop(0)
        return self._receive_command(self.limits.idle_timeout_s)

    def ahead(self) -> Command | Ahead:
        """What lies in the receive buffer; nothing is consumed. A command when it and its data set are there
        to the last octet, so that reading them waits for nobody."""
        if self._waiting or self._pdu_left or not self._pdv_last:
            return Ahead.OTHER
        seen = self._seen
        if seen is None:
            seen = self._seen = _Seen()
        buffer, start, held = self.wire.buffer, self.wire.start, self.wire.held
        while not seen.whole:
            at = start + seen.octets
            left = held - seen.octets
            if left < HEADER_BYTES:
                return Ahead.PARTIAL
            if not seen.pdu_left:
                kind, length = _HEADER.unpack_from(buffer, at)
                longest = self.limits.max_pdu_bytes or length
                if kind != PduType.P_DATA_TF or not PDV_HEADER_BYTES <= length <= longest:
                    return Ahead.OTHER
                seen.pdu_left = length
                seen.octets += HEADER_BYTES
                continue
            length, _, control = _PDV.unpack_from(buffer, at)
            if length < 2 or length + 4 > seen.pdu_left:
                return Ahead.OTHER
            if length + 4 > left:
                return Ahead.PARTIAL
            if seen.command is not None:
                seen.whole = bool(control & LAST_FRAGMENT)
            elif control != COMMAND_FRAGMENT | LAST_FRAGMENT:
                return Ahead.OTHER  # commands in several fragments are rare
            else:
                try:
                    seen.command = messages.parse(bytes(buffer[at + PDV_HEADER_BYTES:at + 4 + length]))
                except Violation:
                    return Ahead.OTHER
                seen.whole = not seen.command.has_dataset
            seen.octets += length + 4
            seen.pdu_left -= length + 4
        assert seen.command is not None
        return seen.command

    def receive_response(self) -> Command:
        """The next response; requests that the peer makes meanwhile are kept (PS3.7 allows them both
        ways)."""
        while True:
            context, command = self._receive_command(self.limits.message_timeout_s)
            if command.is_response:
                return command
            if command.has_dataset:
                raise Violation("a request with a data set in place of a response", 0,
                                AbortSource.SERVICE_USER)
            self._keep(context, command)

    def receive_store_response(self, message_id: int) -> Command | None:
        """The next response while the C-GET `message_id` is served; None for the C-CANCEL of that. Other
        requests are kept for later."""
        while True:
            context, command = self._receive_command(self.limits.message_timeout_s)
            if command.is_response:
                return command
            if command.field == Field.C_CANCEL:
                if command.short(messages.MESSAGE_ID_RESPONDED_TO, -1) == message_id:
                    return None
                continue
            if command.has_dataset:
                raise Violation("a request with a data set while a C-GET is served", 0,
                                AbortSource.SERVICE_USER)
            self._keep(context, command)

    def fragments(self, context: Context) -> Iterator[memoryview]:
        """The data set of the command just received, as pieces in the receive buffer: use each before the
        next. Left before its end, it can be taken up again, or drained."""
        while not self._dataset_waits:  # else what lies ahead is of a later command
            while self._pdv_left:
                view = self.wire.take(self._pdv_left)
                self._pdv_left -= len(view)
                self._pdu_left -= len(view)
                yield view
            if self._pdv_last:
                self.wire.busy = False
                return
            self._next_data_fragment(context)

    def pour(self, context: Context, sink: Sink) -> None:
        """The data set of the command just received, into `sink`: received straight into its room where it
        has some."""
        while not self._dataset_waits:
            while self._pdv_left:
                room = sink.room(self._pdv_left) if self._pdv_left >= ROOM_BYTES_MIN else None
                view = self.wire.take(self._pdv_left) if room is None else room[:self.wire.take_into(room)]
                self._pdv_left -= len(view)
                self._pdu_left -= len(view)
                if room is None:
                    sink.write(view)
                else:
                    sink.filled(view)
            if self._pdv_last:
                self.wire.busy = False
                return
            self._next_data_fragment(context)

    def drain(self, context: Context) -> None:
        """Pass over what is left of a data set that was refused, so that the association lives on."""
        for _ in self.fragments(context):
            pass

    def read_dataset(self, context: Context, bytes_max: int) -> bytes:
        """A whole small data set (an identifier); past `bytes_max` the association ends, as AS8 has it."""
        octets = bytearray()
        for view in self.fragments(context):
            if len(octets) + len(view) > bytes_max:
                raise Violation("an identifier is larger than its bound", 0, AbortSource.SERVICE_USER)
            octets += view
        return bytes(octets)

    def cancelled(self, message_id: int) -> bool:
        """Whether the peer has sent C-CANCEL for `message_id`; never waits for a peer that says nothing. It
        looks no further than a request whose data set lies in the way, and without a window no further than
        any request: that peer should have waited, and is served in turn."""
        while not self._dataset_waits and (self.window > 1 or not self._waiting) and self.wire.readable():
            context, command = self._receive_command(self.limits.message_timeout_s)
            if command.field == Field.C_CANCEL:
                if command.short(messages.MESSAGE_ID_RESPONDED_TO, -1) == message_id:
                    return True
                continue
            self._keep(context, command)
        return False

    @property
    def _dataset_waits(self) -> bool:
        """Whether the last request that is kept for later has a data set, which lies ahead in the wire."""
        return bool(self._waiting) and self._waiting[-1][1].has_dataset

    def _keep(self, context: Context, command: Command) -> None:
        """Keep a request that came while another is answered: one fewer than the window, but one."""
        if len(self._waiting) >= max(self.window - 1, 1):
            raise Violation("more operations at once than its window allows", 0, AbortSource.SERVICE_USER)
        self._waiting.append((context, command))

    def _receive_command(self, patience_s: float) -> tuple[Context, Command]:
        wire = self.wire
        wire.patience_s = patience_s
        wire.busy = False
        wire.begin_message()
        seen, self._seen = self._seen, None
        octets = b""
        context_id = 0
        while True:
            found_id, control, length = self._next_pdv()
            if not control & COMMAND_FRAGMENT:
                raise Violation("a data set fragment in place of a command", AbortReason.UNEXPECTED_PARAMETER)
            if octets and found_id != context_id:
                raise Violation("a command goes on in another presentation context")
            if not octets:
                wire.set_deadline(time.monotonic() + self.limits.message_timeout_s,
                                  "a command set was not whole in time")
            context_id = found_id
            if len(octets) + length > self.limits.command_bytes_max:
                raise Violation("a command set is larger than its bound", 0, AbortSource.SERVICE_USER)
            octets += wire.read(length)
            self._pdu_left -= length
            if control & LAST_FRAGMENT:
                break
        wire.set_deadline(None)
        command = messages.parse(octets) if seen is None or seen.command is None else seen.command
        self._pdv_left = 0
        self._pdv_last = not command.has_dataset
        self._dataset_bytes = 0
        wire.busy = command.has_dataset
        return self.contexts[context_id], command

    def _next_data_fragment(self, context: Context) -> None:
        context_id, control, length = self._next_pdv()
        if context_id != context.id or control & COMMAND_FRAGMENT:
            raise Violation("another message begins inside a data set", AbortReason.UNEXPECTED_PARAMETER)
        self._dataset_bytes += length
        if self._dataset_bytes > self.limits.object_bytes_max:
            raise Violation("a data set is larger than its bound", 0, AbortSource.SERVICE_USER)
        self._pdv_left = length
        self._pdv_last = bool(control & LAST_FRAGMENT)

    def _next_pdv(self) -> tuple[int, int, int]:
        """Context ID, control header and length of the next fragment, which lies ahead in the wire."""
        if not self._pdu_left:
            self._open_data_pdu()
        if self._pdu_left < PDV_HEADER_BYTES:
            raise Violation("a P-DATA-TF PDU ends inside a presentation data value's header")
        wire = self.wire
        start = wire.need(PDV_HEADER_BYTES)  # before `buffer` is looked at: to receive may replace it
        length, context_id, control = _PDV.unpack_from(wire.buffer, start)
        if length < 2 or length + 4 > self._pdu_left:
            raise Violation("a presentation data value does not fit in its PDU")
        if context_id not in self.contexts:
            raise Violation("a presentation context that was not accepted")
        wire.start += PDV_HEADER_BYTES
        self._pdu_left -= PDV_HEADER_BYTES
        self._empty_fragments = self._empty_fragments + 1 if length == 2 else 0
        if self._empty_fragments > EMPTY_FRAGMENTS_MAX:
            raise Violation("nothing but empty fragments", 0, AbortSource.SERVICE_USER)
        return context_id, control, length - 2

    def _pdu_header(self) -> tuple[int, int]:
        """Type and length of the next PDU, consumed."""
        wire = self.wire
        start = wire.need(HEADER_BYTES)
        wire.start = start + HEADER_BYTES
        kind, length = _HEADER.unpack_from(wire.buffer, start)
        return kind, length

    def _open_data_pdu(self) -> None:
        wire = self.wire
        kind, length = self._pdu_header()
        wire.busy = True
        wire.patience_s = self.limits.message_timeout_s
        if kind != PduType.P_DATA_TF:
            self._control_pdu(kind, length)
        self._pdu_left = length
        if self.limits.max_pdu_bytes and length > self.limits.max_pdu_bytes:
            raise Violation("a P-DATA-TF PDU is longer than the maximum that was agreed on")
        if length < PDV_HEADER_BYTES:
            raise Violation("a P-DATA-TF PDU holds no presentation data value")

    def _control_pdu(self, kind: int, length: int) -> NoReturn:
        """In Sta6 every PDU but P-DATA-TF ends the association (PS3.8 Table 9-10)."""
        if kind == PduType.RELEASE_RQ and length == 4:
            self.wire.read(4)
            raise PeerReleased("the peer released the association")  # AR-2
        self.refuse_pdu(kind, length)

    def refuse_pdu(self, kind: int, length: int) -> NoReturn:
        """End over a PDU that has no place where it came: AA-3 for A-ABORT, AA-8 for all else."""
        if kind == PduType.ABORT and length <= CONTROL_PDU_BYTES_MAX:
            raise PeerAborted(*decode_abort(memoryview(self.wire.read(length))))
        self._pdu_left = length
        if kind in _OF_FOUR and length != 4:
            raise Violation("an A-RELEASE, A-ABORT or A-ASSOCIATE-RJ PDU has a wrong length")
        if 1 <= kind <= 7:
            raise Violation("a PDU that has no place here", AbortReason.UNEXPECTED_PDU)
        raise Violation("a PDU of no known type", AbortReason.UNRECOGNIZED_PDU)

    def refuse_what_came(self) -> None:
        """Where the peer has to wait for us (Sta3, Sta8): whatever it sent all the same ends the association
        as above. Its closing is for the next send or receive to find."""
        if self.wire.readable():
            self.refuse_pdu(*self._pdu_header())

    # --- sending

    def send(self, context: Context, command: bytes, dataset: bytes | None = None) -> None:
        """A message with a small data set, or none, in one piece."""
        self.wire.send(self.encode(context, command, dataset))

    def encode(self, context: Context, command: bytes, dataset: bytes | None = None) -> bytes:
        """The PDUs of a command set, and of the data set that goes with it."""
        if len(command) <= self._fragment_bytes:
            octets = data_header(context.id, COMMAND_FRAGMENT | LAST_FRAGMENT, len(command)) + command
        else:
            octets = b"".join(self._pdus(context.id, COMMAND_FRAGMENT, command))
        return octets if dataset is None else octets + b"".join(self._pdus(context.id, 0, dataset))

    def send_stream(self, context: Context, command: bytes, chunks: Iterable[Buffer]) -> None:
        """A message whose data set comes in chunks, sent without a copy; the last fragment is known when they
        end."""
        step = self._fragment_bytes
        vector: list[Buffer] = list(self._pdus(context.id, COMMAND_FRAGMENT, command))
        fragment: list[Buffer] = []
        filled = gathered = 0
        for chunk in chunks:
            view = memoryview(chunk)
            at = 0
            while at < len(view):
                if filled == step:  # only now it is known that this fragment is not the last
                    vector += (data_header(context.id, 0, filled), *fragment)
                    gathered += filled
                    fragment, filled = [], 0
                    if gathered >= SEND_BATCH_BYTES or len(vector) >= SEND_BATCH_BUFFERS:
                        self.wire.send_vector(vector)
                        vector, gathered = [], 0
                piece = view[at:at + step - filled]
                fragment.append(piece)
                filled += len(piece)
                at += len(piece)
        vector += (data_header(context.id, LAST_FRAGMENT, filled), *fragment)
        self.wire.send_vector(vector)

    def outbox(self) -> Outbox:
        """A buffer for data sets that are sent here."""
        return Outbox(self._fragment_bytes)

    def send_outbox(self, context: Context, command: bytes, outbox: Outbox, *, before: bytes = b"") -> None:
        """A message, `before` it other PDUs, whose data set comes from an outbox, of which the first part is
        loaded. Raises what its source does when the rest can't be read: then the association is to be
        aborted."""
        octets = before + self.encode(context, command)
        if len(octets) <= COMMAND_BYTES_MAX:
            outbox.put_before(octets)
        else:
            self.wire.send(octets)
        self.wire.send(outbox.octets)
        while outbox.left:
            outbox.load()
            self.wire.send(outbox.octets)

    def _pdus(self, context_id: int, kind: int, octets: bytes) -> Iterator[bytes]:
        step = self._fragment_bytes
        for at in range(0, len(octets) or 1, step):
            fragment = octets[at:at + step]
            last = LAST_FRAGMENT if at + step >= len(octets) else 0
            yield data_header(context_id, kind | last, len(fragment)) + fragment

    # --- ending

    def release(self) -> None:
        """Ask to release and wait for the answer within ARTIM; always closes."""
        try:
            self.wire.set_deadline(time.monotonic() + self.limits.artim_s)
            self.wire.send(RELEASE_RQ_OCTETS)
            self._await_release_answer()
        except Violation as violation:  # AA-8
            self.abort(violation.source, violation.reason)
            await_close(self.wire, self.limits.artim_s, self._pdu_left)
        except TimedOut:
            self.abort()  # AA-1
        except (ConnectionLost, PeerAborted, Stopping):
            pass
        finally:
            self.wire.close()

    def _await_release_answer(self) -> None:
        """Sta7: data that is still under way is passed over (AR-6). When both ask at once (AR-8) the
        requestor answers and then waits for its answer (Sta9, Sta11); the acceptor waits for the answer to
        its own request first and then answers (Sta10, Sta12)."""
        kind: int = PduType.P_DATA_TF
        length = self._pdu_left
        while kind == PduType.P_DATA_TF:
            self._pdu_left = length
            self._skip_pdu_rest()
            kind, length = self._pdu_header()
        if length == 4 and kind in (PduType.RELEASE_RP, PduType.RELEASE_RQ):
            self.wire.read(4)
        else:
            self.refuse_pdu(kind, length)
        if kind == PduType.RELEASE_RP:
            return  # AR-3
        if self._requestor:
            self.wire.send(RELEASE_RP_OCTETS)  # AR-9
            self._await_release_response()     # AR-3
        else:
            self._await_release_response()     # AR-10
            self.wire.send(RELEASE_RP_OCTETS)  # AR-4
            await_close(self.wire, self.limits.artim_s)

    def _await_release_response(self) -> None:
        kind, length = self._pdu_header()
        if kind != PduType.RELEASE_RP or length != 4:
            self.refuse_pdu(kind, length)
        self.wire.read(4)

    def _skip_pdu_rest(self) -> None:
        while self._pdu_left:
            self._pdu_left -= len(self.wire.take(self._pdu_left))

    def abort(self, source: int = AbortSource.SERVICE_USER, reason: int = AbortReason.NOT_SPECIFIED) -> None:
        """Send A-ABORT; the caller waits for the peer to close, or closes."""
        with contextlib.suppress(AssociationEnded):
            self.wire.send(encode_abort(source, reason))
