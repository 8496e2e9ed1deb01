"""The pages that people see: sign-in, studies, wards, health. Rendered here, complete without JavaScript;
htmx only saves reloads. A page shows what `federation/policy.py` allows and says what its answer does not
cover."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from archive.errors import Forbidden, InvalidInput, MissError, NotAuthenticated
from federation.policy import Act, decide
from portal import health, removals, studies
from portal.access import address_of, cookie_name, visitor_of
from portal.context import Context
from portal.files import Files
from portal.problems import NOT_FOUND_DETAIL, status_of
from portal.signin import TooManyTries, Visitor

HERE = Path(__file__).parent
FORM_BYTES_MAX = 16 << 10
FORM_S_MAX = 10.0
NEXT_CHARS_MAX = 2_000
REMOVALS_SHOWN = 100
CONFLICTS_SHOWN = 50
POLICY_NOTE = (
    "Care relations come later: until then a regional physician sees every ward, "
    "and every search and view is logged."
)


@dataclass(frozen=True, slots=True)
class Statics:
    """Our own files and the fetched ones behind one URL prefix, named with a digest so that they cache."""

    own: Files
    fetched: Files | None

    def url(self, name: str) -> str:
        files = self.own if name in self.own or self.fetched is None else self.fetched
        return f"/static/{name}?v={files.fingerprint(name)}" if name in files else f"/static/{name}"


class Pages:
    """The routes of every page."""

    def __init__(self, context: Context, assets: Path) -> None:
        self._context = context
        self._cookie = cookie_name(context.settings)
        self._login_cookie = self._cookie.replace("session", "login")
        page_files = assets / "page"
        self._statics = Statics(Files(HERE / "static"), Files(page_files) if page_files.is_dir() else None)
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            static=self._statics.url, has_style=self._statics.fetched is not None, site=context.site
        )

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/", self.home),
            Route("/login", self.login_form),
            Route("/login", self.login, methods=["POST"]),
            Route("/logout", self.logout, methods=["POST"]),
            Route("/studies", self.studies),
            Route("/wards", self.wards),
            Route("/health", self.health),
            Route("/static/{name}", self.static),
        ]

    async def home(self, request: Request) -> Response:
        searches = decide(visitor_of(request).principal, Act.SEARCH).allowed
        return RedirectResponse("/studies" if searches else "/health", HTTPStatus.SEE_OTHER)

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        immutable = bool(request.query_params.get("v"))
        for files in (self._statics.own, self._statics.fetched):
            answer = files.answer(request, name, immutable=immutable) if files is not None else None
            if answer is not None:
                return answer
        return Response("no such file", HTTPStatus.NOT_FOUND, media_type="text/plain")

    async def login_form(self, request: Request) -> Response:
        return self._login_page(request, next_page=own_path(request.query_params.get("next", "")))

    async def login(self, request: Request) -> Response:
        form = await read_form(request)
        name, next_page = form.get("name", ""), own_path(form.get("next", ""))
        # Nobody has a session yet: the token lies in a cookie of its own and in the form (double submit).
        token = request.cookies.get(self._login_cookie, "")
        if not token or not secrets.compare_digest(token.encode(), form.get("csrf", "").encode()):
            return self._login_page(
                request, next_page, name, "The page was open for too long. Try again.", HTTPStatus.FORBIDDEN
            )
        try:
            session = await self._context.sign_in.sign_in(
                name, form.get("password", ""), address_of(request), request.cookies.get(self._cookie)
            )
        except TooManyTries as error:
            words = f"Too many wrong passwords. Try again in {error.wait_s} seconds."
            response = self._login_page(request, next_page, name, words, HTTPStatus.TOO_MANY_REQUESTS)
            response.headers["Retry-After"] = str(error.wait_s)
            return response
        except NotAuthenticated as error:
            return self._login_page(request, next_page, name, str(error), HTTPStatus.UNAUTHORIZED)
        response = RedirectResponse(next_page or "/", HTTPStatus.SEE_OTHER)
        response.delete_cookie(self._login_cookie, secure=self._https, httponly=True, samesite="lax")
        response.set_cookie(
            self._cookie, session, httponly=True, samesite="lax", secure=self._https, path="/"
        )
        return response

    async def logout(self, request: Request) -> Response:
        visitor = visitor_of(request)
        check_token(visitor, await read_form(request))
        await self._context.sign_in.sign_out(visitor, address_of(request))
        response = RedirectResponse("/login", HTTPStatus.SEE_OTHER)
        response.delete_cookie(self._cookie, secure=self._https, httponly=True, samesite="lax")
        return response

    async def studies(self, request: Request) -> Response:
        visitor = visitor_of(request)
        search = studies.read_search(request.query_params)
        await self._allow(request, visitor, Act.SEARCH, "search studies", search.criteria())
        answer = await self._context.search.run(
            self._context.source.search, visitor.principal, search.query()
        )
        listing = studies.listing(answer, search, self._context.clock(), self._context.zone)
        response = self._page(
            request,
            "studies.html",
            search=search,
            answer=listing,
            modalities=studies.MODALITIES,
            policy_note=POLICY_NOTE,
        )
        response.headers["HX-Replace-Url"] = search.url()
        return response

    async def wards(self, request: Request) -> Response:
        coverage = await self._context.search.run(self._context.source.coverage)
        principal = visitor_of(request).principal
        scope = decide(principal, Act.SEARCH).scope
        health_allowed = decide(principal, Act.HEALTH).allowed
        shown = [ward for ward in coverage if health_allowed or scope.allows(ward.ward)]
        rows = [health.ward_row(ward, self._context.clock(), self._context.zone) for ward in shown]
        waiting = await self._context.search.run(self._context.source.conflicts, principal, CONFLICTS_SHOWN)
        lines = [health.conflict_line(row, self._context.clock(), self._context.zone) for row in waiting]
        gone = await self._context.search.run(self._context.source.removals, principal, REMOVALS_SHOWN)
        return self._page(request, "wards.html", wards=rows, conflicts=lines, most=CONFLICTS_SHOWN,
                          removals=removals.lines(gone, self._context.zone))

    async def health(self, request: Request) -> Response:
        visitor = visitor_of(request)
        if "miss-refresh" not in request.headers or not decide(visitor.principal, Act.HEALTH).allowed:
            await self._allow(request, visitor, Act.HEALTH, "see health", {})
        report = await self._context.search.run(
            health.gather,
            self._context.source,
            self._context.ledger,
            self._context.clock(),
            self._context.zone,
        )
        return self._page(
            request,
            "health.html",
            wards=report.rows,
            warnings=report.warnings,
            caption=report.caption,
            now=report.now,
        )

    def error(self, request: Request, error: Exception) -> Response:
        """A page that says what went wrong; what is not ours to explain is logged and answered blandly."""
        status = status_of(error) if isinstance(error, MissError) else HTTPStatus.INTERNAL_SERVER_ERROR
        detail = str(error) if isinstance(error, MissError) else "It is in the portal's log."
        if status is HTTPStatus.NOT_FOUND:
            detail = NOT_FOUND_DETAIL
        return self._page(request, "error.html", status, title=status.phrase, detail=detail)

    async def _allow(
        self, request: Request, visitor: Visitor, act: Act, words: str, subject: dict[str, str]
    ) -> None:
        decision = decide(visitor.principal, act)
        outcome = "success" if decision.allowed else "denied"
        await self._context.audit.record(visitor, words, subject, outcome, address_of(request))
        if not decision.allowed:
            raise Forbidden(decision.reason)

    @property
    def _https(self) -> bool:
        return self._context.settings.listen.https

    def _login_page(
        self,
        request: Request,
        next_page: str,
        name: str = "",
        message: str = "",
        status: HTTPStatus = HTTPStatus.OK,
    ) -> Response:
        token = request.cookies.get(self._login_cookie) or secrets.token_urlsafe(24)
        response = self._page(
            request, "login.html", status, csrf=token, next=next_page, name=name[:128], message=message
        )
        response.set_cookie(
            self._login_cookie,
            token,
            httponly=True,
            samesite="strict",
            secure=self._https,
            path="/",
            max_age=3_600,
        )
        return response

    def _page(
        self, request: Request, template: str, status: HTTPStatus = HTTPStatus.OK, **values: object
    ) -> Response:
        visitor = request.scope.get("visitor")
        menu = menu_of(visitor) if isinstance(visitor, Visitor) else []
        html = self._templates.get_template(template).render(
            visitor=visitor, menu=menu, here=request.url.path, **values
        )
        return HTMLResponse(html, status)


def menu_of(visitor: Visitor) -> list[tuple[str, str]]:
    entries = [(Act.SEARCH, "/studies", "Studies"), (Act.HEALTH, "/health", "Health")]
    menu = [(href, words) for act, href, words in entries if decide(visitor.principal, act).allowed]
    return [*menu, ("/wards", "Wards")]


def own_path(path: str) -> str:
    """`path` when it leads into this portal, "" otherwise: a link must not send people elsewhere after
    sign-in."""
    plain = path.startswith("/") and path[1:2] not in ("/", "\\") and path.isprintable()
    return path if plain and "\\" not in path and len(path) <= NEXT_CHARS_MAX else ""


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a posted form: small, text only."""
    body = b""
    try:
        async with asyncio.timeout(FORM_S_MAX):
            async for chunk in request.stream():
                body += chunk
                if len(body) > FORM_BYTES_MAX:
                    raise Forbidden("a form that is too large")
    except TimeoutError:
        raise InvalidInput("a form that did not come in time") from None
    except ClientDisconnect:  # not our error: a stranger who hangs up fills no log with it
        raise InvalidInput("a form that was not sent to its end") from None
    request._body = body
    form = await request.form(max_files=0, max_fields=20)
    return {name: value for name, value in form.items() if isinstance(value, str)}


def check_token(visitor: Visitor, form: dict[str, str]) -> None:
    """The form must come from a page of this session (OWASP ASVS 3.5.1)."""
    if not visitor.csrf or not secrets.compare_digest(visitor.csrf.encode(), form.get("csrf", "").encode()):
        raise Forbidden("this form belongs to another session: go back, reload the page and try again")
