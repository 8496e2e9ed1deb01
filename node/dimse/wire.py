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
from node.dimse.origin import PLAIN, Origin

Buffer = bytes | bytearray | memoryview

QUIET_BUFFER_BYTES = 16 << 10   # what an association that says little costs
TICK_S = 5.0                    # a blocked receive looks at its limits this often
VECTOR_MAX = 64                 # buffers of one sendmsg; IOV_MAX is 1,024

_TIMEVAL = struct.Struct("@ll")


class _Pace:
    """How much came of waiting for a peer."""

    __slots__ = ("octets", "waited_s")

    def __init__(self) -> None:
        self.waited_s = 0.0
        self.octets = 0

    def add(self, waited_s: float, octets: int) -> None:
        self.waited_s += waited_s
        self.octets += octets

    def require(self, per_s_min: int, words: str) -> None:
        if self.octets < per_s_min * self.waited_s:
            amount = f"{self.octets} octets in {self.waited_s:.0f} s, fewer than {per_s_min} a second"
            raise TimedOut(words.format(amount))


class Wire:
    """A blocking socket. Time limits are the kernel's (SO_RCVTIMEO): Python's own would poll before every
    receive.

    A receive ends after `patience_s` of silence or, while `deadline` is set, at that moment (ARTIM), even
    when octets keep trickling in. `busy` says that a PDU or message has begun: then every receive re-arms
    TCP_QUICKACK, as a sender with Nagle on waits for our acknowledgement and we for the rest of its message
    (40 ms each time).

    Inside a message a peer owes `bytes_per_s_min` (0: nothing) on the average of each `pace_window_s` that we
    wait for it, and so does one that reads what we send; what we take ourselves, for the disk or the budget,
    is not held against it.
    """

    transport = PLAIN
    can_be_watched = True  # what is readable shows at the descriptor: nothing is kept in between

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
        self.bytes_per_s_min = 0
        self.pace_window_s = patience_s
        self._received = _Pace()
        self._sent = _Pace()
        self._deadline: float | None = None
        self._deadline_of = ""
        self._receive_timeout_s = 0.0
        self.stopping = False
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(send_timeout_s))
        self._set_receive_timeout(self.tick_s)

    def arrive(self, address: str, timeout_s: float) -> Origin:
        """Agree on the transport with a peer that has connected, within `timeout_s`; where it comes from."""
        return Origin(address)

    def set_deadline(self, deadline: float | None, what: str = "the peer did not finish in time") -> None:
        """Bound everything received from now on by a moment of `time.monotonic`, or (None) by patience alone;
        `what` is said when it has passed."""
        self._deadline = deadline
        self._deadline_of = what
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

    def take_into(self, room: memoryview) -> int:
        """Put octets into `room`, which is not empty: what is held, else what one receive brings. How
        many."""
        held = min(self._end - self.start, len(room))
        if not held:
            return self._receive_some(room)
        room[:held] = self._view[self.start:self.start + held]
        self.start += held
        return held

    @property
    def held(self) -> int:
        """How many octets lie in `buffer` from `start` on."""
        return self._end - self.start

    def fileno(self) -> int:
        return self._sock.fileno()

    def readable(self, patience_s: float = 0.0) -> bool:
        """Whether a receive would not wait, now or within `patience_s`; an end of the connection counts."""
        if self.start < self._end:
            return True
        poll = select.poll()  # select() ends at 1,024 descriptors
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(patience_s * 1000))

    def fill(self) -> bool:
        """Take what has arrived into `buffer`, without waiting. False when there is nothing, no room, or the
        connection has ended: the next receive says which."""
        if self.start == self._end:
            self.start = self._end = 0
        elif self._end == len(self.buffer):
            self._make_room(min(self.held + 1, len(self.buffer)))
        try:
            count = self._receive_now(self._view[self._end:])
        except OSError:
            return False
        self.bytes_in += count
        self._end += count
        if self._end == len(self.buffer) and self._end < self._buffer_bytes_max:
            self._replace_buffer(self._buffer_bytes_max)
        return count > 0

    def rest(self) -> None:
        """Nothing has come for a while: a buffer that nothing lies in becomes a small one."""
        if self.start == self._end and len(self.buffer) > QUIET_BUFFER_BYTES:
            self._replace_buffer(QUIET_BUFFER_BYTES)

    def send_now(self, octets: bytes) -> int:
        """Send what goes without waiting; how many octets went."""
        try:
            sent = self._send_now(octets)
        except OSError:
            return 0  # the next blocking send says what is wrong
        self.bytes_out += sent
        return sent

    def send(self, octets: Buffer) -> None:
        began_s = time.monotonic()
        try:
            self._send_whole(octets)
        except BlockingIOError:
            raise TimedOut("the peer does not read what it is sent") from None
        except OSError as error:
            raise ConnectionLost(f"the connection is lost ({_name(error)})") from None
        self.bytes_out += len(octets)
        self._hold_reader_to_pace(time.monotonic() - began_s, len(octets))

    def send_vector(self, buffers: Sequence[Buffer]) -> None:
        """Send several buffers as one, without joining them."""
        rest = list(buffers)
        try:
            while rest:
                began_s = time.monotonic()
                sent = self._send_some(rest[:VECTOR_MAX])
                self.bytes_out += sent
                self._hold_reader_to_pace(time.monotonic() - began_s, sent)
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

    def stop(self) -> None:
        """From another thread: end with Stopping as soon as no message is under way. One that begins just now
        is cut as well: its sender hears no success."""
        self.stopping = True
        if not self.busy:
            with contextlib.suppress(OSError):
                self._shutdown(socket.SHUT_RD)

    def cut(self) -> None:
        """From another thread: end the connection in both directions at once."""
        with contextlib.suppress(OSError):
            self._shutdown(socket.SHUT_RDWR)

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
        self._end += self._receive_some(self._view[self._end:])
        if self._end == len(self.buffer) and self._end < self._buffer_bytes_max:
            self._replace_buffer(self._buffer_bytes_max)  # the peer is faster: read in larger pieces

    def _receive_some(self, room: memoryview) -> int:
        """One receive into `room`, within every limit; how many octets."""
        waited_s = 0.0
        while True:
            if self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise TimedOut(self._deadline_of)
                self._set_receive_timeout(max(left, 0.001))
            inside = self.busy or self.start != self._end
            if inside:
                self.acknowledge_at_once()
                began_s = time.monotonic()
            try:
                count = self._receive_into(room)
                break
            except BlockingIOError:
                waited_s += self._receive_timeout_s
                if self.stopping and not self.busy:
                    raise self._lost("") from None
                if self._deadline is None and waited_s >= self.patience_s:
                    raise TimedOut(f"the peer was silent for {waited_s:.0f} s") from None
                if not self.busy and self.start == self._end and len(self.buffer) > QUIET_BUFFER_BYTES:
                    self._replace_buffer(QUIET_BUFFER_BYTES)
                    room = self._view
            except OSError as error:
                raise self._lost(f"the connection is lost ({_name(error)})") from None
        if count == 0:
            raise self._lost("the peer closed the connection")
        if inside:
            self._hold_to_pace(waited_s + time.monotonic() - began_s, count)
        self.bytes_in += count
        return count

    def begin_message(self) -> None:
        """What comes next is another message: the pace counts anew."""
        self._received = _Pace()

    def _hold_to_pace(self, waited_s: float, count: int) -> None:
        pace = self._received
        pace.add(waited_s, count)
        if pace.waited_s >= self.pace_window_s:
            pace.require(self.bytes_per_s_min, "the peer is too slow: {} of a message")
            self._received = _Pace()

    def _hold_reader_to_pace(self, waited_s: float, count: int) -> None:
        pace = self._sent
        pace.add(waited_s, count)
        if pace.waited_s >= self.pace_window_s:
            pace.require(self.bytes_per_s_min, "the peer reads too slowly: {}")
            self._sent = _Pace()

    def _lost(self, what: str) -> ConnectionLost | Stopping:
        return Stopping("this side is being stopped") if self.stopping else ConnectionLost(what)

    def _replace_buffer(self, size: int) -> None:
        """Another buffer, not another size: views of the old one may be in use."""
        held = bytes(self._view[self.start:self._end])
        self.buffer = bytearray(max(size, len(held)))
        self._view = memoryview(self.buffer)
        self._view[:len(held)] = held
        self.start, self._end = 0, len(held)

    def acknowledge_at_once(self) -> None:
        """A message has begun and is not whole: its sender may wait for our acknowledgement."""
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    # The rest is what another transport does otherwise (`tls.py`).

    def _receive_into(self, view: memoryview) -> int:
        """One receive; 0 at the end. BlockingIOError when nothing came within the receive timeout."""
        return self._sock.recv_into(view)

    def _receive_now(self, view: memoryview) -> int:
        """What is there, without waiting; OSError when there is nothing."""
        return self._sock.recv_into(view, 0, socket.MSG_DONTWAIT)

    def _send_now(self, octets: Buffer) -> int:
        """What goes without waiting; OSError when nothing does."""
        return self._sock.send(octets, socket.MSG_DONTWAIT)

    def _shutdown(self, how: int) -> None:
        """From another thread."""
        self._sock.shutdown(how)

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
