"""Owns the associations that are between two messages: one thread watches all of them, so that an idle one
costs no thread, and serves the small messages that have arrived whole. All that are ready in one round share
one sync of the disk and one thread's turn: 4 associations that send 8 KB each cost a third less of the
processor than 4 threads that hand the interpreter's lock to each other. Whatever might wait for a peer
(large or slow messages, queries, the end of an association) goes to a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Generator
from itertools import chain
from typing import Concatenate, ParamSpec

from node.dimse.acceptor import Acceptor, Turn, log_unexpected
from node.dimse.association import Ahead, Limits
from node.dimse.errors import AssociationEnded, Stopping, TimedOut
from node.dimse.exchange import DURABLE_TIMEOUT_S
from node.dimse.wire import Wire

log = logging.getLogger(__name__)

P = ParamSpec("P")

PARTIAL_BYTES_MAX = 64 << 10  # of a message that is waited for here; a larger one gets a thread
MESSAGES_MAX = 32             # of one association in one round, as many as its window has; one without
EVENTS_MAX = 256              # associations in one round
SWEEP_S = 1.0                 # how often the silent are looked for
REST_S = 5.0                  # of silence, then a large receive buffer is given back


class Connection:
    """One connection while it is served, by whichever thread has it: `steps` is where it stands."""

    def __init__(self, wire: Wire, acceptor: Acceptor, address: str) -> None:
        self.wire = wire
        self.address = address
        self.acceptor = acceptor
        self.steps: Generator[Turn] = acceptor.steps()
        self.unsent = b""           # of answers, when the peer does not take them at once
        self.is_new = True          # nothing was asked yet
        self.since_s = 0.0          # when it paused, or its message began
        self.partial = False        # a message has begun
        self.more = False           # its buffer holds what no round has looked at, and no descriptor shows

    def step(self, ended: AssociationEnded | None = None) -> Turn | None:
        """Go on to the next pause; None when the connection is closed."""
        try:
            return next(self.steps) if ended is None else self.steps.throw(ended)
        except StopIteration:
            return None


class Pump:
    """`serve` gives a connection to a thread; with an error, its association is to end by that."""

    def __init__(self, limits: Limits, serve: Callable[[Connection, AssociationEnded | None], None]) -> None:
        self._limits = limits
        self._serve = serve
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._parked: dict[int, Connection] = {}
        self._more: list[Connection] = []  # parked, with what the next round is to look at
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="dimse-pump", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread. Connections that are still parked stay where they are."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._epoll.close()
        os.close(self._wake)

    def park(self, connection: Connection) -> None:
        """Take a connection that pauses between two messages and owes nothing; from any thread, which must
        not touch it any more."""
        connection.since_s = time.monotonic()
        connection.partial = connection.more = False
        fd = connection.wire.fileno()
        self._parked[fd] = connection
        try:
            self._epoll.register(fd, select.EPOLLIN)
        except BaseException:  # the kernel has a bound (epoll's max_user_watches), or this is closed
            del self._parked[fd]
            raise

    # The thread

    def _run(self) -> None:
        swept_s = time.monotonic()
        while not self._closing:
            wait_s = 0.0 if self._more else SWEEP_S
            ready = [self._parked[fd] for fd, _ in self._epoll.poll(wait_s, EVENTS_MAX) if fd != self._wake]
            due = list(dict.fromkeys(chain(self._more, ready)))
            advanced = [self._guarded(self._advance, connection) for connection in due]
            owing = [connection for connection in advanced if connection is not None]
            # One patience for all: a disk that does not answer is not waited for once for each of them.
            until_s = time.monotonic() + DURABLE_TIMEOUT_S
            for connection in owing:
                self._guarded(self._answer, connection, until_s)
            if time.monotonic() - swept_s > SWEEP_S:
                swept_s = time.monotonic()
                self._sweep(swept_s)
            # At the end: whoever was given away is another thread's.
            self._more = [each for each in due
                          if each.more and self._parked.get(each.wire.fileno()) is each]

    def _guarded(self, act: Callable[Concatenate[Connection, P], Connection | None], connection: Connection,
                 *others: P.args, **named: P.kwargs) -> Connection | None:
        """No one connection's error ends the others."""
        try:
            return act(connection, *others, **named)
        except Exception as error:
            log_unexpected("an association", error)
            if connection.wire.fileno() in self._parked:
                self._give_away(connection, Stopping("an unexpected error"))
            return None

    def _advance(self, connection: Connection) -> Connection | None:
        """Serve what has arrived whole; the connection when it owes answers then."""
        wire, acceptor, exchange = connection.wire, connection.acceptor, connection.acceptor.exchange
        assert exchange is not None
        if not connection.more and not wire.fill():
            self._give_away(connection)
            return None
        connection.more = False
        # One more than the window, so that who does not keep to it is found out. Who has none and does not
        # wait is served in turn, one in each round: it must not keep the others waiting.
        window = exchange.association.window
        for _ in range(min(window + 1, MESSAGES_MAX) if window > 1 else 1):
            ahead = exchange.association.ahead()
            if ahead is Ahead.PARTIAL and wire.held < PARTIAL_BYTES_MAX:
                if wire.held and not connection.partial:
                    connection.partial, connection.since_s = True, time.monotonic()
                if wire.held:
                    wire.busy = True
                    wire.acknowledge_at_once()
                break
            if isinstance(ahead, Ahead) or not acceptor.is_prompt(ahead):
                self._give_away(connection)
                return None
            connection.partial, connection.since_s = False, time.monotonic()
            if connection.step() is not Turn.BETWEEN:
                self._give_away(connection)
                return None
        else:
            connection.more = wire.held > 0
        if exchange.owed:
            return connection
        if wire.stopping and not wire.busy:
            self._give_away(connection)
        return None

    def _answer(self, connection: Connection, until_s: float) -> None:
        """Wait for the disk, and send what is owed as far as it goes."""
        exchange = connection.acceptor.exchange
        assert exchange is not None
        octets = exchange.answers(until_s)
        sent = connection.wire.send_now(octets)
        connection.since_s = time.monotonic()
        if sent < len(octets):
            connection.unsent = octets[sent:]
        if connection.unsent or connection.wire.stopping:
            self._give_away(connection)

    def _sweep(self, now_s: float) -> None:
        """End associations that were silent for too long, between messages or inside one; who rests gives
        back the buffer that its last messages had."""
        for connection in list(self._parked.values()):
            if now_s - connection.since_s > REST_S:
                connection.wire.rest()
            limit_s = self._limits.message_timeout_s if connection.partial else self._limits.idle_timeout_s
            if now_s - connection.since_s > limit_s:
                what = "silent, or too slow with a message," if connection.partial else "silent"
                self._give_away(connection, TimedOut(f"the peer was {what} for {limit_s:.0f} s"))

    def _give_away(self, connection: Connection, ended: AssociationEnded | None = None) -> None:
        fd = connection.wire.fileno()
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        del self._parked[fd]
        self._serve(connection, ended)
