"""Composes the portal: settings, source and ledger become one ASGI application, and `run` serves it. It
owns the order of the layers (headers, room, gate, routes) and holds no logic of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from archive.errors import MissError, SettingsError
from archive.ledger import Ledger
from federation.policy import Act
from federation.source import Source
from monitoring import tracing
from portal import problems
from portal.access import Gate, is_dicomweb, is_public
from portal.assets import ASSETS
from portal.audit import Audit
from portal.capabilities import Capabilities
from portal.context import Context
from portal.dicomweb import allow
from portal.frames import Frames
from portal.health import local_zone
from portal.metadata import Metadata
from portal.negotiate import NotAcceptable
from portal.opening import open_source
from portal.pages import Pages
from portal.qido import Qido
from portal.rendered import Rendered
from portal.retrieve import Retrieve
from portal.security import SecurityHeaders
from portal.settings import ListenSettings, PortalSettings
from portal.signin import SignIn
from portal.traced import Traced
from portal.viewer import Viewer
from portal.workers import DECODING_AT_ONCE, Workers

log = logging.getLogger(__name__)

ROOT = "/dicom-web"
BOUND_ROOT = "/dicom-web/for/{opened}"

KEEP_ALIVE_S = 30
BACKLOG = 2048  # uvicorn's own
SHUTDOWN_S = 5
PUBLIC_S_MAX = 120.0  # the viewer's largest file over a thin line
REQUEST_HEAD_BYTES_MAX = 128 << 10  # a list of a thousand UIDs fits


def clock_us() -> int:
    return time.time_ns() // 1_000


def create_app(
    settings: PortalSettings,
    source: Source,
    ledger: Ledger,
    *,
    clock: Callable[[], int] = clock_us,
    site: str = "regional archive",
) -> Starlette:
    """The application. `site` is what the header calls it: the region, or the ward of a node."""
    ledger_work = Workers("ledger", 4, settings.waiting_max)
    sign_in = SignIn(ledger, settings.sign_in, ledger_work, clock)
    context = Context(
        settings,
        source,
        ledger,
        sign_in,
        Audit(ledger, ledger_work, clock),
        search=Workers("search", settings.threads, settings.waiting_max),
        fetch=Workers("fetch", settings.threads, settings.waiting_max),
        read=Workers("read", settings.threads, settings.waiting_max),
        decode=Workers("decode", DECODING_AT_ONCE, settings.waiting_max),
        clock=clock,
        zone=local_zone(),
        site=site,
    )
    assets = settings.assets or ASSETS
    pages, viewer = Pages(context, assets), Viewer(assets)
    if not viewer.installed:
        log.warning("the viewer is not installed: run `python -m portal.assets`")

    async def on_error(request: Request, error: Exception) -> Response:
        if is_dicomweb(request.url.path) or isinstance(error, NotAcceptable):
            return problems.from_error(error)
        if isinstance(error, HTTPException):
            return problems.from_error(error)
        return pages.error(request, error)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for part in (sign_in, context.search, context.fetch, context.read, context.decode, ledger_work):
            part.close()

    app = Starlette(
        routes=[*pages.routes(), *viewer.routes(), *dicomweb_routes(context)],
        middleware=[
            Middleware(Traced),
            Middleware(SecurityHeaders, https=settings.listen.https),
            Middleware(Room, requests_max=settings.listen.requests_at_once_max),
            Middleware(Gate, settings=settings, sign_in=sign_in),
        ],
        exception_handlers={
            MissError: on_error,
            NotAcceptable: on_error,
            HTTPException: on_error,
            Exception: on_error,
        },
        lifespan=lifespan,
    )
    app.state.context = context
    return app


def dicomweb_routes(context: Context) -> list[BaseRoute]:
    """Every DICOMweb service, at its root and once more below the root that is bound to an opened study."""
    services = (Qido(context), Rendered(context), Frames(context), Metadata(context), Retrieve(context))
    routes: list[BaseRoute] = []
    for root in (ROOT, BOUND_ROOT):
        routes += [Route(root + path, store, methods=["POST"]) for path in ("/studies", "/studies/{study}")]
        for service in services:
            routes += service.routes(root)
        if root == ROOT:
            routes += Capabilities(ROOT, routes).routes()
    return routes


async def store(request: Request) -> Response:
    """STOW-RS is not served by this release; the viewer shows these words when somebody saves a
    measurement."""
    context: Context = request.app.state.context
    await allow(context, request, Act.READ, "store by DICOMweb", {"refused": "not served"})
    return problems.problem(
        HTTPStatus.FORBIDDEN,
        "nothing can be stored by DICOMweb yet: images come in by C-STORE at their ward's node",
    )


def run(settings: PortalSettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    tracing.start(settings.tracing, "miss-portal")
    with contextlib.ExitStack() as stack:
        stack.callback(tracing.stop)
        opened = open_source(settings, stack)
        app = create_app(settings, opened.source, opened.ledger, site=opened.site)
        serve(app, settings)


def serve(app: Starlette, settings: PortalSettings) -> None:
    listen = settings.listen
    config = uvicorn.Config(
        app,
        host=listen.host,
        port=listen.port,
        ssl_certfile=listen.tls_certificate,
        ssl_keyfile=listen.tls_key,
        proxy_headers=bool(listen.trusted_proxies),
        forwarded_allow_ips=list(listen.trusted_proxies),
        log_config=None,
        access_log=False,  # a query string holds names: who asked what is in the audit log
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
        h11_max_incomplete_event_size=REQUEST_HEAD_BYTES_MAX,
    )
    listening = _listening(listen)
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    if threading.current_thread() is threading.main_thread():
        # uvicorn ends on these and then raises them once more: by then everything is to be closed in order.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    log.info("portal on %s://%s:%d", "https" if listen.https else "http", listen.host, listen.port)
    uvicorn.Server(config).run(sockets=[listening])


def _listening(listen: ListenSettings) -> socket.socket:
    """Bound here: uvicorn ends the process by itself, without our words, when it can't have the port."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        return socket.create_server((listen.host, listen.port), family=family, backlog=BACKLOG)
    except OSError as error:
        place = f"{listen.host}:{listen.port}"
        raise SettingsError(f"listen.host, listen.port: {place} can't be had ({error.strerror})") from None


class Room:
    """Bounds the requests that are served at once; those past the bound are answered at once. What is public
    has a room and a time of its own: who can't sign in can't keep out those who have, and a stranger who
    reads nothing of what was asked for keeps nobody from signing in for long."""

    def __init__(self, app: ASGIApp, *, requests_max: int, public_s_max: float = PUBLIC_S_MAX) -> None:
        self._app = app
        self._requests_max = requests_max
        self._public_s_max = public_s_max
        self._served = {True: 0, False: 0}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        public = is_public(scope["path"])
        if self._served[public] >= self._requests_max:
            busy = problems.problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "too many requests at once",
                {"Retry-After": str(problems.RETRY_AFTER_S)},
            )
            await busy(scope, receive, send)
            return
        self._served[public] += 1
        try:
            async with asyncio.timeout(self._public_s_max if public else None) as bound:
                await self._app(scope, receive, send)
        except TimeoutError:
            if not bound.expired():
                raise
            log.info("a client took more than %g s for %s: cut", self._public_s_max, scope["method"])
        finally:
            self._served[public] -= 1
