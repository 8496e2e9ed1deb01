"""A relay between a node and its hub, for tests: counts what passes, slows it down, falls silent, cuts."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType

PIECE_BYTES = 64 << 10


class Relay:
    """Listens on a port of its own and passes what comes on to `port`, both ways. `rate` is bytes a second
    towards the hub, of all connections together, None for no bound; `passed` counts those bytes."""

    def __init__(self, port: int, rate: float | None = None) -> None:
        self.rate = rate
        self.passed = 0
        self.opened = 0
        self.silent = False
        self._to = port
        self._owed_until_s = 0.0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        if rate is not None:  # what waits on the line waits at its sender
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE_BYTES)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Every connection ends at once; new ones are taken."""
        with self._lock:
            ended, self._sockets = self._sockets, set()
        for one in ended:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                if self._listener.fileno() < 0:
                    return
                near.close()
                continue
            with self._lock:
                self._sockets |= {near, far}
                self.opened += 1
            for source, sink, counted in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass, args=(source, sink, counted), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                if counted:
                    self._pace(len(piece))
                if not self.silent:
                    sink.sendall(piece)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _pace(self, size: int) -> None:
        with self._lock:
            self.passed += size
            if self.rate is None:
                return
            now_s = time.monotonic()
            self._owed_until_s = max(self._owed_until_s, now_s) + size / self.rate
            wait_s = self._owed_until_s - now_s
        time.sleep(wait_s)
