"""Owns one TCP connection: its socket options, its only receive buffer, its time limits and its byte counts.
It never interprets what it carries; `association.py` does, straight in the buffer."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Sequence

from node.dimse.errors import ConnectionLost, Stopping, TimedOut

Buffer = bytes | bytearray | memoryview

QUIET_BUFFER_BYTES = 16 << 10   # what an association that says little costs
TICK_S = 5.0                    # a blocked receive looks at its limits this often
VECTOR_MAX = 64                 # buffers of one sendmsg; IOV_MAX is 1,024
LINGER_BYTES_MAX = 1 << 20      # what a peer may still send after it was told that the association is over

_TIMEVAL = struct.Struct("@ll")


class Wire:
    """A blocking socket. Time limits are the kernel's (SO_RCVTIMEO): Python's own would poll before every
    receive.

    A receive ends after `patience_s` of silence or, while `deadline` is set, at that moment (ARTIM), even
    when octets keep trickling in. `busy` says that a PDU or message has begun: then every receive re-arms
    TCP_QUICKACK, as a sender with Nagle on waits for our acknowledgement and we for the rest of its message
    (40 ms each time).
    """

    def __init__(self, sock: socket.socket, *, buffer_bytes_max: int = 256 << 10, patience_s: float = 60.0,
                 send_timeout_s: float = 60.0) -> None:
        self._sock = sock
        self._buffer_bytes_max = buffer_bytes_max
        self.buffer = bytearray(min(QUIET_BUFFER_BYTES, buffer_bytes_max))
        self._view = memoryview(self.buffer)
        self.start = 0
        self._end = 0
        self.patience_s = patience_s
        self.tick_s = min(TICK_S, patience_s)
        self.busy = False
        self.bytes_in = 0
        self.bytes_out = 0
        self._deadline: float | None = None
        self._receive_timeout_s = 0.0
        self.stopping = False
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(send_timeout_s))
        self._set_receive_timeout(self.tick_s)

    def set_deadline(self, deadline: float | None) -> None:
        """Bound everything received from now on by a moment of `time.monotonic`, or (None) by patience
        alone."""
        self._deadline = deadline
        if deadline is None:
            self._set_receive_timeout(self.tick_s)

    def need(self, count: int) -> int:
        """Wait until `count` octets lie in one piece in `buffer`; where they begin. `count` was bounded
        before."""
        while self._end - self.start < count:
            self._make_room(count)
            self._receive()
        return self.start

    def read(self, count: int) -> bytes:
        """The next `count` octets, copied and consumed."""
        start = self.need(count)
        self.start = start + count
        return bytes(self._view[start:start + count])

    def take(self, count: int) -> memoryview:
        """At most `count` octets of what is there, without a copy, consumed; valid until the next receive."""
        start = self.start
        if start == self._end:
            self._make_room(1)
            self._receive()
            start = self.start
        end = min(start + count, self._end)
        self.start = end
        return self._view[start:end]

    def readable(self) -> bool:
        """Whether a receive would not wait; an end of the connection counts."""
        if self.start < self._end:
            return True
        poll = select.poll()  # select() ends at 1,024 descriptors
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, octets: Buffer) -> None:
        try:
            self._send_whole(octets)
        except BlockingIOError:
            raise TimedOut("the peer does not read what it is sent") from None
        except OSError as error:
            raise ConnectionLost(f"the connection is lost ({_name(error)})") from None
        self.bytes_out += len(octets)

    def send_vector(self, buffers: Sequence[Buffer]) -> None:
        """Send several buffers as one, without joining them."""
        rest = list(buffers)
        try:
            while rest:
                sent = self._send_some(rest[:VECTOR_MAX])
                self.bytes_out += sent
                done = 0
                while done < len(rest) and sent >= len(rest[done]):
                    sent -= len(rest[done])
                    done += 1
                del rest[:done]
                if sent:
                    rest[0] = memoryview(rest[0])[sent:]
        except BlockingIOError:
            raise TimedOut("the peer does not read what it is sent") from None
        except OSError as error:
            raise ConnectionLost(f"the connection is lost ({_name(error)})") from None

    def linger(self, seconds: float) -> None:
        """Wait for the peer to close, as closing first with octets unread would reset the connection and take
        our last PDU from it (PS3.8 Sta13); what still comes is passed over, up to a bound."""
        left = LINGER_BYTES_MAX
        self.busy = False
        self.set_deadline(time.monotonic() + seconds)
        with contextlib.suppress(ConnectionLost, TimedOut, Stopping):
            while left > 0:
                left -= len(self.take(left))

    def stop(self) -> None:
        """From another thread: end with Stopping as soon as no message is under way. One that begins just now
        is cut as well: its sender hears no success."""
        self.stopping = True
        if not self.busy:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)

    def cut(self) -> None:
        """From another thread: end the connection in both directions at once."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _make_room(self, count: int) -> None:
        size = len(self.buffer)
        if self.start == self._end:
            self.start = self._end = 0
        if count > size:
            self._replace_buffer(count)
        elif self.start + count > size:
            held = self._end - self.start
            self._view[:held] = bytes(self._view[self.start:self._end])
            self.start, self._end = 0, held

    def _receive(self) -> None:
        """One receive behind what is held; there is room for at least one octet."""
        waited_s = 0.0
        while True:
            if self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise TimedOut("the peer did not finish in time")
                self._set_receive_timeout(max(left, 0.001))
            if self.busy or self.start != self._end:
                self._acknowledge_at_once()
            try:
                count = self._receive_into(self._view[self._end:])
                break
            except BlockingIOError:
                waited_s += self._receive_timeout_s
                if self.stopping and not self.busy:
                    raise self._lost("") from None
                if self._deadline is None and waited_s >= self.patience_s:
                    raise TimedOut(f"the peer was silent for {waited_s:.0f} s") from None
                if self.start == self._end and len(self.buffer) > QUIET_BUFFER_BYTES:
                    self._replace_buffer(QUIET_BUFFER_BYTES)
            except OSError as error:
                raise self._lost(f"the connection is lost ({_name(error)})") from None
        if count == 0:
            raise self._lost("the peer closed the connection")
        self.bytes_in += count
        self._end += count
        if self._end == len(self.buffer) and self._end < self._buffer_bytes_max:
            self._replace_buffer(self._buffer_bytes_max)  # the peer is faster: read in larger pieces

    def _lost(self, what: str) -> ConnectionLost | Stopping:
        return Stopping("this side is being stopped") if self.stopping else ConnectionLost(what)

    def _replace_buffer(self, size: int) -> None:
        """Another buffer, not another size: views of the old one may be in use."""
        held = bytes(self._view[self.start:self._end])
        self.buffer = bytearray(max(size, len(held)))
        self._view = memoryview(self.buffer)
        self._view[:len(held)] = held
        self.start, self._end = 0, len(held)

    def _acknowledge_at_once(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    # The rest is what another transport does otherwise (`tls.py`).

    def _receive_into(self, view: memoryview) -> int:
        """One receive; 0 at the end. BlockingIOError when nothing came within the receive timeout."""
        return self._sock.recv_into(view)

    def _send_some(self, buffers: Sequence[Buffer]) -> int:
        """How many octets of these were sent, at least one. BlockingIOError when the peer does not read."""
        return self._sock.sendmsg(buffers)

    def _send_whole(self, octets: Buffer) -> None:
        self._sock.sendall(octets)

    def _set_receive_timeout(self, seconds: float) -> None:
        if seconds != self._receive_timeout_s:
            self._receive_timeout_s = seconds
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return _TIMEVAL.pack(whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))


def _name(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else "unknown cause"
