"""Who a node calls, at next to no cost: each a process that takes every object and every report, reads no
faster than it is told to, answers 0000 and keeps nothing."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from ctypes import c_ulonglong
from multiprocessing.process import BaseProcess
from typing import Self

from miss.load.sender import PDU_BYTES_MAX
from miss.load.temporary_node import HOST
from node.dimse import messages
from node.dimse.pdu import (
    COMMAND_FRAGMENT,
    HEADER_BYTES,
    LAST_FRAGMENT,
    PDV_HEADER_BYTES,
    RELEASE_RP_OCTETS,
    AnsweredContext,
    AssociateAccept,
    ContextResult,
    PduType,
    data_header,
    decode_request,
    encode_accept,
    parse_header,
)

CREDIT_S_MAX = 0.5  # what was not read for that long may be read faster afterwards


class Receiver:
    """One destination, as long as its `with` block. `bytes_per_s` is of all its associations together; 0
    reads as fast as it can."""

    def __init__(self, ae_title: str, bytes_per_s: float = 0) -> None:
        self.ae_title = ae_title
        self._pace = Pace(bytes_per_s)
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        context = multiprocessing.get_context("fork")
        self._counts = context.RawArray(c_ulonglong, 2)
        self._process: BaseProcess = context.Process(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._listener.close()

    @property
    def instances(self) -> int:
        """How many, objects and reports, were answered 0000 so far."""
        return self._counts[0]

    @property
    def received_bytes(self) -> int:
        """Of data sets, so far."""
        return self._counts[1]

    def _run(self) -> None:
        lock = threading.Lock()
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(sock, lock), daemon=True).start()

    def _serve(self, sock: socket.socket, lock: threading.Lock) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        command = b""
        with sock, contextlib.suppress(OSError), sock.makefile("rb", PDU_BYTES_MAX) as stream:
            while True:
                kind, length = parse_header(memoryview(stream.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0")))
                body = stream.read(length)
                if kind == PduType.ASSOCIATE_RQ:
                    sock.sendall(_accept(body))
                elif kind == PduType.P_DATA_TF:
                    command = self._take(sock, body, command, lock)
                else:
                    if kind == PduType.RELEASE_RQ:
                        sock.sendall(RELEASE_RP_OCTETS)
                    return

    def _take(self, sock: socket.socket, body: bytes, command: bytes, lock: threading.Lock) -> bytes:
        """The values of one PDU; the command that is being served from then on."""
        at = 0
        while at < len(body):
            end = at + 4 + int.from_bytes(body[at:at + 4], "big")
            context_id, control = body[at + 4], body[at + 5]
            if control & COMMAND_FRAGMENT:
                command = body[at + PDV_HEADER_BYTES:end]
            else:
                with lock:
                    self._counts[1] += end - at - PDV_HEADER_BYTES
                self._pace.wait(end - at)
                if control & LAST_FRAGMENT:
                    answer = messages.response(messages.parse(command), 0)
                    control = COMMAND_FRAGMENT | LAST_FRAGMENT
                    sock.sendall(data_header(context_id, control, len(answer)) + answer)
                    with lock:
                        self._counts[0] += 1
            at = end
        return command


class Pace:
    """Not more than so much a second."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._due = 0.0
        self._lock = threading.Lock()

    def wait(self, count: int) -> None:
        """Returns when the time for `count` more bytes has come."""
        if not self._bytes_per_s:
            return
        with self._lock:
            now = time.monotonic()
            self._due = max(self._due, now - CREDIT_S_MAX) + count / self._bytes_per_s
            pause = self._due - now
        if pause > 0:
            time.sleep(pause)  # the pace that is measured


def _accept(body: bytes) -> bytes:
    """Every context, with the first transfer syntax that was proposed for it, and every role."""
    request = decode_request(memoryview(body))
    return encode_accept(AssociateAccept(
        request.called_ae, request.calling_ae,
        tuple(AnsweredContext(one.id, ContextResult.ACCEPTANCE, one.transfer_syntaxes[0])
              for one in request.contexts),
        PDU_BYTES_MAX, roles=request.roles, as_received=request.as_received))
