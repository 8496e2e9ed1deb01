"""The gate in front of every route: nothing is served to somebody who has not signed in but what is listed
as public here, and nothing that changes anything is taken from another site's page. It knows who, never
what for: rights are `federation/policy.py`."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import quote, urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from archive.errors import Forbidden, MissError, NotAuthenticated
from portal import problems
from portal.settings import PortalSettings
from portal.signin import SignIn, TooManyTries, Visitor
from portal.viewer import is_page

PUBLIC_PATHS = frozenset({"/login"})
PUBLIC_PREFIXES = ("/static/",)
VIEWER = "/viewer/"
DICOMWEB = "/dicom-web"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
TOKEN_CHARS_MAX = 128


def is_public(path: str) -> bool:
    """The sign-in page, and code and style, which are the same for everybody."""
    if path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES):
        return True
    name = path.removeprefix(VIEWER)
    return (
        path.startswith(VIEWER) and name != "" and not is_page(name) and not name.endswith((".html", ".htm"))
    )


def is_dicomweb(path: str) -> bool:
    return path == DICOMWEB or path.startswith(DICOMWEB + "/")


def cookie_name(settings: PortalSettings) -> str:
    """The __Host- prefix binds a cookie to this host over HTTPS; a browser refuses it over plain HTTP."""
    return "__Host-miss-session" if settings.listen.https else "miss-session"


def address_of(request: HTTPConnection) -> str:
    return request.client.host if request.client else ""


def visitor_of(request: HTTPConnection) -> Visitor:
    """Who asks; the gate put it there."""
    visitor = request.scope.get("visitor")
    if not isinstance(visitor, Visitor):
        raise NotAuthenticated("sign in first")
    return visitor


class Gate:
    """Default deny: a route that nobody thought of is closed."""

    def __init__(self, app: ASGIApp, *, settings: PortalSettings, sign_in: SignIn) -> None:
        self._app = app
        self._settings = settings
        self._sign_in = sign_in
        self._cookie = cookie_name(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            refusal = await self._admit(request)
        except TooManyTries as error:
            refusal = problems.problem(
                HTTPStatus.TOO_MANY_REQUESTS, str(error), {"Retry-After": str(error.wait_s)}
            )
        except MissError as error:
            refusal = problems.from_error(error)
        await (refusal or self._app)(scope, receive, send)

    async def _admit(self, request: Request) -> Response | None:
        """None when the request may go on, the refusal otherwise."""
        path = request.scope["path"]
        if request.method not in SAFE_METHODS and not self._is_own_page(request):
            raise Forbidden("this request comes from another site's page")
        if is_public(path):
            return None
        try:
            visitor = await self._visitor(request)
        except TooManyTries:
            raise
        except NotAuthenticated as error:
            return self._challenge(request, str(error))
        if visitor is None:
            return self._challenge(request, "sign in first")
        request.scope["visitor"] = visitor
        return None

    async def _visitor(self, request: Request) -> Visitor | None:
        token = request.cookies.get(self._cookie, "")
        if token and len(token) <= TOKEN_CHARS_MAX:
            visitor = await self._sign_in.visitor(token, touch="miss-refresh" not in request.headers)
            if visitor is not None:
                return visitor
        header = request.headers.get("authorization", "")
        if (
            header[:6].lower() == "basic "
            and self._settings.sign_in.basic_auth
            and is_dicomweb(request.url.path)
        ):
            return await self._sign_in.basic(header, address_of(request))
        return None

    def _is_own_page(self, request: Request) -> bool:
        """Whether a request that changes something comes from our own page, or from no page at all.
        Browsers send Origin with every POST; a tool that sends neither header has no cookie that a page
        could abuse."""
        origin = request.headers.get("origin")
        if origin is not None:
            return origin in self._own_origins(request)
        return request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")

    def _own_origins(self, request: Request) -> set[str]:
        url = urlsplit(self._settings.listen.public_url)
        if url.netloc:
            return {f"{url.scheme}://{url.netloc}"}
        return {f"{request.url.scheme}://{request.headers.get('host', '')}"}

    def _challenge(self, request: Request, words: str) -> Response:
        path = request.scope["path"]
        if is_dicomweb(path):
            # A browser answers Basic with a window of its own, over the viewer: those are sent to the
            # sign-in page.
            browser = "sec-fetch-mode" in request.headers
            basic = self._settings.sign_in.basic_auth and not browser
            scheme = 'Basic realm="MISS", charset="UTF-8"' if basic else 'Session realm="MISS"'
            return problems.problem(HTTPStatus.UNAUTHORIZED, words, {"WWW-Authenticate": scheme})
        target = path + (f"?{request.url.query}" if request.url.query else "")
        login = "/login" if path == "/" else f"/login?next={quote(target, safe='')}"
        if request.headers.get("hx-request"):
            return Response(status_code=HTTPStatus.UNAUTHORIZED, headers={"HX-Redirect": login})
        if request.method not in SAFE_METHODS:
            return problems.problem(
                HTTPStatus.UNAUTHORIZED, words, {"WWW-Authenticate": 'Session realm="MISS"'}
            )
        return RedirectResponse(login, HTTPStatus.SEE_OTHER)
