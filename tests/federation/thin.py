"""A thin, far line: a TCP proxy that lets through so many bytes a second of what who dialled sends, and holds
everything back for half a round trip."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from dataclasses import dataclass, field

_PIECE = 16 << 10


@dataclass
class ThinLine:
    """Listens on a port of its own in front of `target`. `cut` ends every connection and takes no other."""

    target: int
    bytes_per_s: float = 0.0  # 0: as fast as it goes
    delay_s: float = 0.0
    port: int = 0
    _socks: list[socket.socket] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free_s: float = 0.0
    _is_cut: bool = False

    def __enter__(self) -> ThinLine:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        self._is_cut = True
        for sock in list(self._socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_cut:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.target))
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socks += [near, far]
                self._carry(near, far, metered=True)
                self._carry(far, near, metered=False)

    def _carry(self, source: socket.socket, sink: socket.socket, *, metered: bool) -> None:
        under_way: queue.Queue[tuple[float, bytes]] = queue.Queue(4096)

        def read() -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(_PIECE):
                    if metered and self.bytes_per_s:
                        self._wait_for_turn(len(data))
                    under_way.put((time.monotonic() + self.delay_s, data))
            under_way.put((0.0, b""))

        def write() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due_s, data = under_way.get()
                    if not data:
                        break
                    time.sleep(max(due_s - time.monotonic(), 0))
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

        for work in (read, write):
            threading.Thread(target=work, daemon=True).start()

    def _wait_for_turn(self, size: int) -> None:
        """All connections share the line."""
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic()) + size / self.bytes_per_s
            wait_s = self._free_s - time.monotonic()
        time.sleep(max(wait_s, 0))
