"""A line that can be cut one way or both: a TCP proxy that forwards, and goes silent without a word."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Listens on a port of its own in front of `target`. `up` is what the one who dialled sends, `down` what
    it is sent; each goes on while True, and else waits unread, as on a line that loses everything."""

    target: int
    up: bool = True
    down: bool = True
    port: int = 0
    _pairs: list[tuple[socket.socket, socket.socket]] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            thread = threading.Thread(target=self._pass_on, args=(near, far), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, selectors.DefaultSelector() as ready, contextlib.suppress(OSError):
            ready.register(near, selectors.EVENT_READ, far)
            ready.register(far, selectors.EVENT_READ, near)
            while not self._ended.is_set():
                if not (self.up and self.down):
                    self._ended.wait(0.005)
                for key, _ in ready.select(0.05):
                    source, sink = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    if not (self.up if source is near else self.down):
                        continue
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    sink.sendall(data)
