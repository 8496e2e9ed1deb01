"""Serves /metrics, /healthz and /readyz over plain HTTP, at a port of its own and from threads of its own: a
process whose event loop hangs still says so.

Bounds: 8 connections at once, more are closed; 5 s for a request, which has no body; one answer for each
connection. Only GET and HEAD, of these three paths.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from archive.errors import SettingsError
from monitoring.checks import Check, Checks
from monitoring.settings import MonitoringSettings

log = logging.getLogger(__name__)

AT_ONCE_MAX = 8
REQUEST_S = 5.0


class Seen(Protocol):
    """What a process shows. `alive` fails where only a new start helps; `ready` where it can't take or answer
    now what it is there for."""

    def families(self) -> Iterable[Metric]: ...

    @property
    def alive(self) -> Mapping[str, Check]: ...

    @property
    def ready(self) -> Mapping[str, Check]: ...


class MonitoringServer:
    """See the module's docstring. `port` is what was bound, when it is made; SettingsError when it can't."""

    def __init__(self, settings: MonitoringSettings, seen: Seen) -> None:
        self._alive, self._ready = Checks(seen.alive), Checks(seen.ready)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(seen.families))
        pages: dict[str, Callable[[], tuple[HTTPStatus, str, bytes]]] = {
            "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry)),
            "/healthz": lambda: _verdict("healthy", self._alive),
            "/readyz": lambda: _verdict("ready", self._ready),
        }
        try:
            self._server = _Server(settings.host, settings.port, pages)
        except OSError as error:
            self._alive.close()
            self._ready.close()
            place = f"{settings.host}:{settings.port}"
            raise SettingsError(
                f"monitoring.host, monitoring.port: {place} can't be had ({error.strerror})"
            ) from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="monitoring", daemon=True
        )
        self._started = False

    def start(self) -> None:
        self._started = True
        self._thread.start()
        log.info("metrics, health and readiness at %s:%d", *self._server.server_address[:2])

    def stop(self) -> None:
        if self._started:
            self._server.shutdown()
            self._thread.join()
            self._started = False
        self._server.server_close()
        self._alive.close()
        self._ready.close()


def _verdict(name: str, checks: Checks) -> tuple[HTTPStatus, str, bytes]:
    """One JSON object for each check that fails, a line each; or one that says that all is well."""
    failed = checks.failed()
    lines: list[dict[str, Any]] = [{"check": check, "reason": words} for check, words in failed.items()]
    lines = lines or [{name: True}]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return HTTPStatus.SERVICE_UNAVAILABLE if failed else HTTPStatus.OK, "application/x-ndjson", body


class _Families(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 16

    def __init__(self, host: str, port: int, pages: Mapping[str, Callable[[], Any]]) -> None:
        self.pages = pages
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._room = threading.BoundedSemaphore(AT_ONCE_MAX)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request for metrics or health broke off")


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S  # of each read and write
    server: _Server
    server_version = "MISS"
    sys_version = ""

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/metrics, /healthz and /readyz are here\n")
            return
        try:
            found = page()
        except Exception:
            log.exception("metrics can't be made")
            found = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b"see the log\n"
        self._answer(*found)

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, media_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Who scrapes is no news."""
