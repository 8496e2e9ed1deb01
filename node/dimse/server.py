"""Owns the listening socket and the threads that serve its connections: one for each, with a small stack. The
loop that accepts never waits for a peer. It never speaks DICOM itself; `acceptor.py` does."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import Self

from node.dimse.acceptor import Acceptor, Gate, Services
from node.dimse.association import Limits
from node.dimse.wire import Wire

log = logging.getLogger(__name__)

STACK_BYTES = 512 << 10   # of address space; what is not touched costs no memory
BACKLOG = 1024
PENDING_MAX = 1000        # connections without an association; past it the oldest gives way to the newest
PAUSE_S = 0.1             # after accept() failed (no descriptor left)

_stack_size = threading.Lock()


class _Connection:
    """One connection and its thread."""

    def __init__(self, wire: Wire, address: str) -> None:
        self.wire = wire
        self.address = address
        self.thread: threading.Thread | None = None


class DimseServer:
    """Listens on one address. `port` is what was bound, also when 0 was asked for."""

    def __init__(self, host: str, port: int, gate: Gate, services: Services, limits: Limits) -> None:
        self._gate = gate
        self._services = services
        self._limits = limits
        self._lock = threading.Lock()
        self._pending: dict[_Connection, None] = {}    # in order of arrival
        self._associated: dict[_Connection, None] = {}
        self._cut: dict[_Connection, None] = {}        # their threads are about to end
        self._stopping = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG,
                                              dualstack_ipv6=host == "::")
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="dimse-accept", daemon=True)

    def start(self) -> Self:
        self._accepting.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def connections(self) -> int:
        """How many connections are open, associated or not."""
        return len(self._open())

    def stop(self, grace_s: float = 10.0) -> None:
        """Take no more, let every message under way be answered within `grace_s`, then cut what is left."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if self._accepting.is_alive():
            self._accepting.join()
        self._listener.close()
        for connection in self._open():
            connection.wire.stop()
        self._join(time.monotonic() + grace_s)
        for connection in self._open():
            connection.wire.cut()
        self._join(time.monotonic() + grace_s)

    def _open(self) -> list[_Connection]:
        with self._lock:
            return [*self._pending, *self._associated, *self._cut]

    def _join(self, until: float) -> None:
        while True:
            threads = [connection.thread for connection in self._open()]
            alive = [thread for thread in threads if thread is not None and thread.is_alive()]
            left = until - time.monotonic()
            if not alive or left <= 0:
                return
            alive[0].join(left)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._stopping.is_set():
                    log.warning("a connection could not be taken: %s", error)
                    self._stopping.wait(PAUSE_S)
                continue
            self._begin(sock, str(address[0]))

    def _begin(self, sock: socket.socket, address: str) -> None:
        connection: _Connection | None = None
        try:
            wire = Wire(sock, buffer_bytes_max=self._limits.buffer_bytes_max,
                        send_timeout_s=self._limits.message_timeout_s)
            connection = _Connection(wire, address)
            connection.thread = threading.Thread(target=self._serve, args=(connection,), name="dimse",
                                                 daemon=True)
            self._enter(connection)
            with _stack_size:
                before = threading.stack_size(STACK_BYTES)
                try:
                    connection.thread.start()
                finally:
                    threading.stack_size(before)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread to be had
            log.warning("a connection could not be served: %s", error)
            sock.close()
            if connection is not None:
                self._leave(connection)

    def _serve(self, connection: _Connection) -> None:
        def settled(associated: bool) -> None:
            if associated:
                with self._lock:
                    self._pending.pop(connection, None)
                    self._associated[connection] = None
            else:
                self._enter(connection)

        try:
            Acceptor(connection.wire, connection.address, self._gate, self._services, self._limits,
                     settled).run()
        finally:
            self._leave(connection)

    def _enter(self, connection: _Connection) -> None:
        with self._lock:
            self._associated.pop(connection, None)
            self._pending[connection] = None
            oldest = next(iter(self._pending)) if len(self._pending) > PENDING_MAX else None
            if oldest is not None:
                del self._pending[oldest]
                self._cut[oldest] = None
        if oldest is not None:
            oldest.wire.cut()

    def _leave(self, connection: _Connection) -> None:
        with self._lock:
            self._pending.pop(connection, None)
            self._associated.pop(connection, None)
            self._cut.pop(connection, None)
