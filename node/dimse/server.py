"""Owns the listening sockets, plain and TLS, and the threads that serve their connections: one with a small
stack for each that is inside a message, none for those that pause between two, which the pump has. The loops
that accept never wait for a peer. It never speaks DICOM itself; `acceptor.py` does."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Self

from node.dimse.acceptor import Acceptor, Gate, Services, Turn, log_unexpected
from node.dimse.association import Limits
from node.dimse.errors import AssociationEnded
from node.dimse.pump import PARTIAL_BYTES_MAX, Connection, Pump
from node.dimse.tls import Listener, TlsWire
from node.dimse.wire import Wire

log = logging.getLogger(__name__)

STACK_BYTES = 512 << 10   # of address space; what is not touched costs no memory
BACKLOG = 1024
PENDING_MAX = 2500        # connections without an association; past it the address with most loses one
PENDING_PER_ADDRESS_MAX = 2000  # as many of these may be of one address; then its own oldest gives way
ENDING_MAX = 4000         # associations that are over and whose peer has not closed yet
PAUSE_S = 0.1             # after accept() failed (no descriptor left)
NEXT_WAIT_S = 0.25        # after a message that the pump could not serve its thread waits for the next one

_stack_size = threading.Lock()


class DimseServer:
    """Listens on one address: on `port`, and with `tls` on the port that is given with it. `port` and
    `tls_port` are what was bound, also when 0 was asked for."""

    def __init__(self, host: str, port: int, gate: Gate, services: Services, limits: Limits, *,
                 tls: tuple[int, Listener] | None = None,
                 pending_per_address_max: int = PENDING_PER_ADDRESS_MAX) -> None:
        self._gate = gate
        self._services = services
        self._limits = limits
        self._lock = threading.Lock()
        self._pending = _Waiting(PENDING_MAX, pending_per_address_max)
        self._ending = _Waiting(ENDING_MAX, ENDING_MAX)
        self._associated: dict[Connection, None] = {}
        self._cut: dict[Connection, None] = {}        # their threads are about to end
        self._left = threading.Condition(self._lock)
        self._stopping = threading.Event()
        self._pump = Pump(limits, self._start_thread)
        plain = _listen(host, port)
        self.port: int = plain.getsockname()[1]
        self._doors: list[tuple[socket.socket, Listener | None]] = [(plain, None)]
        self.tls_port: int | None = None
        if tls is not None:
            try:
                self._doors.append((_listen(host, tls[0]), tls[1]))
            except OSError:
                plain.close()
                raise
            self.tls_port = self._doors[-1][0].getsockname()[1]
        self._accepting = [threading.Thread(target=self._accept, args=door, name="dimse-accept", daemon=True)
                           for door in self._doors]

    def start(self) -> Self:
        self._pump.start()
        for thread in self._accepting:
            thread.start()
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
        for (door, _), thread in zip(self._doors, self._accepting, strict=True):
            with contextlib.suppress(OSError):
                door.shutdown(socket.SHUT_RDWR)  # wakes accept()
            if thread.is_alive():
                thread.join()
            door.close()
        for connection in self._open():
            connection.wire.stop()
        self._await_all(grace_s)
        for connection in self._open():
            connection.wire.cut()
        self._await_all(grace_s)
        self._pump.close()

    def _open(self) -> list[Connection]:
        with self._lock:
            return list(self._everybody())

    def _everybody(self) -> Iterator[Connection]:
        """Under the lock."""
        return chain(self._pending, self._associated, self._ending, self._cut)

    def _await_all(self, seconds: float) -> None:
        with self._left:
            self._left.wait_for(lambda: next(self._everybody(), None) is None, seconds)

    def _accept(self, door: socket.socket, tls: Listener | None) -> None:
        while not self._stopping.is_set():
            try:
                sock, address = door.accept()
            except OSError as error:
                if not self._stopping.is_set():
                    log.warning("a connection could not be taken: %s", error)
                    self._stopping.wait(PAUSE_S)
                continue
            try:
                self._begin(sock, str(address[0]), tls)
            except Exception as error:  # no one connection ends the listener
                log_unexpected("a connection", error)
                sock.close()

    def _begin(self, sock: socket.socket, address: str, tls: Listener | None) -> None:
        buffer_bytes_max, send_timeout_s = self._limits.buffer_bytes_max, self._limits.message_timeout_s
        try:
            if tls is None:
                wire = Wire(sock, buffer_bytes_max=buffer_bytes_max, send_timeout_s=send_timeout_s)
            else:  # the handshake is the connection's own thread's: nobody waits for it here
                wire = TlsWire(sock, tls.context(), buffer_bytes_max=buffer_bytes_max,
                               send_timeout_s=send_timeout_s)
        except OSError as error:
            log.warning("a connection could not be served: %s", error)
            sock.close()
            return
        acceptor = Acceptor(wire, address, self._gate, self._services, self._limits,
                            lambda associated: self._settled(connection, associated))
        connection = Connection(wire, acceptor, address)
        self._enter(connection)
        self._start_thread(connection)

    def _start_thread(self, connection: Connection, ended: AssociationEnded | None = None) -> None:
        """Let a thread of its own go on with a connection; with `ended`, its association ends by that."""
        thread = threading.Thread(target=self._serve, args=(connection, ended), name="dimse", daemon=True)
        try:
            with _stack_size:
                before = threading.stack_size(STACK_BYTES)
                try:
                    thread.start()
                finally:
                    threading.stack_size(before)
        except RuntimeError as error:  # no thread to be had
            log.warning("a connection could not be served: %s", error)
            connection.steps.close()
            connection.wire.close()
            self._leave(connection)

    def _serve(self, connection: Connection, ended: AssociationEnded | None) -> None:
        """A thread's turn with a connection: to its end, or until the pump can have it."""
        try:
            if self._go_on(connection, ended):
                self._pump.park(connection)
                return
        except Exception as error:
            log_unexpected("a connection", error)
            connection.steps.close()
        self._leave(connection)

    def _go_on(self, connection: Connection, ended: AssociationEnded | None) -> bool:
        """Serve until the connection is closed (False) or pauses with nothing owed (True)."""
        wire = connection.wire
        received = wire.bytes_in
        if connection.unsent and ended is None:
            octets, connection.unsent = connection.unsent, b""
            ended = _problem(lambda: wire.send(octets))
        while (turn := connection.step(ended)) is not None:
            ended, exchange = None, connection.acceptor.exchange
            if turn is Turn.ENDING or exchange is None:
                continue
            if exchange.owed and not exchange.reads_on():
                ended = _problem(exchange.settle)
            if ended is None and not (exchange.owed or wire.held or exchange.association.keeps):
                # The first message is this thread's too: an echo waits for no disk that the pump waits for.
                stays = connection.is_new or wire.bytes_in - received > PARTIAL_BYTES_MAX
                connection.is_new = False
                watchable = wire.can_be_watched and not wire.stopping
                if watchable and not (stays and wire.readable(NEXT_WAIT_S)):
                    return True
            received = wire.bytes_in
        return False

    def _settled(self, connection: Connection, associated: bool) -> None:
        """It is associated, or not any more."""
        cut: Connection | None = None
        with self._lock:
            if associated:
                self._pending.leave(connection)
                self._associated[connection] = None
            elif self._associated.pop(connection, self) is None:
                cut = self._ending.enter(connection)
            self._note_cut(cut)
        self._cut_now(cut)

    def _enter(self, connection: Connection) -> None:
        with self._lock:
            cut = self._pending.enter(connection)
            self._note_cut(cut)
        self._cut_now(cut)

    def _note_cut(self, connection: Connection | None) -> None:
        """Under the lock."""
        if connection is not None:
            self._cut[connection] = None

    def _cut_now(self, connection: Connection | None) -> None:
        if connection is not None:
            connection.wire.cut()

    def _leave(self, connection: Connection) -> None:
        with self._lock:
            self._pending.leave(connection)
            self._ending.leave(connection)
            self._associated.pop(connection, None)
            self._cut.pop(connection, None)
            self._left.notify_all()


class _Waiting:
    """Connections that wait for their peers, within two bounds. It locks nothing."""

    def __init__(self, in_all_max: int, per_address_max: int) -> None:
        self._in_all_max = in_all_max
        self._per_address_max = per_address_max
        self._count = 0
        self._of: dict[str, dict[Connection, None]] = {}  # by address, in order of arrival

    def __iter__(self) -> Iterator[Connection]:
        return chain.from_iterable(self._of.values())

    def enter(self, connection: Connection) -> Connection | None:
        """Take one in; the one that has to give way for it, if any: the oldest of the same address when that
        has too many, or of the address that has most, so that nobody loses a place to one who has more."""
        own = self._of.setdefault(connection.address, {})
        own[connection] = None
        self._count += 1
        if len(own) > self._per_address_max:
            most = own
        elif self._count > self._in_all_max:
            most = max(self._of.values(), key=len)
        else:
            return None
        oldest = next(iter(most))
        self.leave(oldest)
        return oldest

    def leave(self, connection: Connection) -> None:
        own = self._of.get(connection.address)
        if own is not None and own.pop(connection, self) is None:
            self._count -= 1
            if not own:
                del self._of[connection.address]


class PortTaken(OSError):
    """A port that can't be listened on."""

    def __init__(self, port: int, error: OSError) -> None:
        super().__init__(error.errno, error.strerror)
        self.port = port


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG,
                                    dualstack_ipv6=host == "::")
    except OSError as error:
        raise PortTaken(port, error) from None


def _problem(act: Callable[[], None]) -> AssociationEnded | None:
    """How an association ends by an act, if it does."""
    try:
        act()
    except AssociationEnded as ended:
        return ended
    return None
