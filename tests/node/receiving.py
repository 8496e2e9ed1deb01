"""A storage SCP for the tests that answers, delays, refuses and breaks off as it is told: by hand, on the
project's PDUs, so that it can do what no well-behaved library does."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydicom.dataset import Dataset

from node.dimse import messages, pdu
from node.dimse.messages import Field
from tests.datasets import Instance
from tests.node.serving import Raw, data


@dataclass(frozen=True)
class Received:
    """One instance as it came."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    dataset: bytes
    originator: str
    originator_message_id: int

    def read(self) -> Dataset:
        return Instance(self.sop_class_uid, self.sop_instance_uid, self.transfer_syntax_uid, "", "",
                        self.dataset).read()


@dataclass
class Receiver:
    """`takes` are syntaxes by class (None: everything); `status` by SOP Instance UID; `abort_at` the ordinal
    numbers of C-STOREs in the middle of which it aborts; `window` what it grants, and `hold` how many it lets
    be open before it answers; `gate`, where given, is waited for before each answer."""

    listener: socket.socket
    takes: Mapping[str, tuple[str, ...]] | None = None
    status: Callable[[str], int] = lambda uid: 0
    comment: str = ""
    abort_at: frozenset[int] = frozenset()
    window: int = 1
    hold: int = 1
    gate: threading.Event | None = None
    max_pdu_bytes: int = 65_536
    received: dict[str, Received] = field(default_factory=dict)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    associations: int = 0
    open_at_once: int = 0
    octets: int = 0  # of data sets, also of those that broke off
    proposed: list[tuple[pdu.ProposedContext, ...]] = field(default_factory=list)
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _socks: list[socket.socket] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self._socks.append(sock)
                threading.Thread(target=self._guarded, args=(sock,), daemon=True).start()

    def kill(self) -> None:
        """As the end of its process: the port and every connection."""
        for sock in (self.listener, *self._socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _guarded(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, AssertionError), Raw.of(sock, timeout_s=20.0) as raw:
            self._serve(raw)

    def _answer(self, proposed: pdu.ProposedContext) -> pdu.AnsweredContext:
        taken = proposed.transfer_syntaxes
        if self.takes is not None:
            of_class = self.takes.get(proposed.abstract_syntax, ())
            taken = tuple(uid for uid in taken if uid in of_class)
        if not taken:
            return pdu.AnsweredContext(proposed.id, 4, proposed.transfer_syntaxes[0])
        return pdu.AnsweredContext(proposed.id, 0, taken[0])

    def _serve(self, raw: Raw) -> None:
        kind, body = raw.receive()
        assert kind == pdu.PduType.ASSOCIATE_RQ
        request = pdu.decode_request(memoryview(body))
        with self._lock:
            self.associations += 1
            self.proposed.append(request.contexts)
        answers = tuple(self._answer(each) for each in request.contexts)
        syntaxes = {answer.id: answer.transfer_syntax for answer in answers}
        window = (self.window, 1) if self.window > 1 and request.asynchronous_window else None
        raw.send(pdu.encode_accept(pdu.AssociateAccept(
            request.called_ae, request.calling_ae, answers, self.max_pdu_bytes, asynchronous_window=window)))
        owed: list[tuple[int, messages.Command]] = []
        while True:
            message = self._message(raw, owed)
            if message is None:
                return
            context_id, command, dataset = message
            got = Received(command.affected_sop_class_uid, command.affected_sop_instance_uid,
                           syntaxes[context_id], dataset, command.text(messages.MOVE_ORIGINATOR_AE),
                           command.short(messages.MOVE_ORIGINATOR_MESSAGE_ID, 0))
            with self._lock:
                self.received[got.sop_instance_uid] = got
                owed.append((context_id, command))
                self.open_at_once = max(self.open_at_once, len(owed))
            self.arrived.release()
            if len(owed) >= self.hold:
                self._respond(raw, owed)

    def _respond(self, raw: Raw, owed: list[tuple[int, messages.Command]]) -> None:
        if self.gate is not None:
            self.gate.wait(20.0)
        for context_id, command in reversed(owed):
            status = self.status(command.affected_sop_instance_uid)
            raw.send(data(context_id, 3, messages.response(command, status, comment=self.comment)))
        owed.clear()

    def _message(self, raw: Raw, owed: list[tuple[int, messages.Command]]
                 ) -> tuple[int, messages.Command, bytes] | None:
        """The next C-STORE; None when the association is over."""
        command_octets, dataset = b"", b""
        command: messages.Command | None = None
        while True:
            kind, body = raw.receive()
            if kind == pdu.PduType.RELEASE_RQ:
                if owed:
                    self._respond(raw, owed)
                raw.send(pdu.RELEASE_RP_OCTETS)
                return None
            if kind != pdu.PduType.P_DATA_TF:
                return None
            at = 0
            while at < len(body):
                length = int.from_bytes(body[at:at + 4], "big")
                context_id, control = body[at + 4], body[at + 5]
                piece = body[at + 6:at + 4 + length]
                at += 4 + length
                if control & 1:
                    command_octets += piece
                    if control & 2:
                        command = messages.parse(command_octets)
                        assert command.field == Field.C_STORE
                        with self._lock:
                            self._count += 1
                            aborts = self._count in self.abort_at
                        if aborts:
                            raw.send(pdu.encode_abort(0, 0))
                            return None
                else:
                    dataset += piece
                    self.octets += len(piece)
                    if control & 2:
                        assert command is not None
                        return context_id, command, dataset


@contextmanager
def receiver(*, takes: Mapping[str, tuple[str, ...]] | None = None,
             status: Callable[[str], int] = lambda uid: 0, comment: str = "",
             abort_at: set[int] | None = None, window: int = 1, hold: int = 1,
             gate: threading.Event | None = None) -> Iterator[Receiver]:
    """A storage SCP on a free port, for as long as its block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = Receiver(listener, takes, status, comment, frozenset(abort_at or ()), window, hold, gate)
        threading.Thread(target=running.serve, daemon=True).start()
        try:
            yield running
        finally:
            if gate is not None:
                gate.set()
            running.kill()
