"""Serves the viewer (OHIF) below /viewer/ from the assets that `make setup` laid out. It changes nothing in
them and answers with words when they are not there: the pages work without the viewer."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from archive.errors import NotFound, Unavailable
from portal.assets import read_manifest
from portal.files import Files
from portal.security import viewer_policy

CONFIG = Path(__file__).parent / "static" / "app-config.js"
MISSING = "The viewer is not installed here: run `make setup`, or `python -m portal.assets`, and start again."


class Viewer:
    """`assets` is the folder that `portal.assets` made."""

    def __init__(self, assets: Path) -> None:
        manifest = read_manifest(assets)
        self._files = Files(assets / "viewer") if manifest is not None else None
        self._policy = viewer_policy(manifest["script_hashes"]) if manifest is not None else ""
        self._config = CONFIG.read_text("utf-8")

    @property
    def installed(self) -> bool:
        return self._files is not None

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/viewer/app-config.js", self.config),
            Route("/viewer", self.to_studies),
            Route("/viewer/{path:path}", self.file),
        ]

    async def config(self, request: Request) -> Response:
        return Response(self._config, media_type="text/javascript", headers={"Cache-Control": "no-store"})

    async def to_studies(self, request: Request) -> Response:
        """The portal's own page is the only list of studies."""
        return RedirectResponse("/studies", HTTPStatus.SEE_OTHER)

    async def file(self, request: Request) -> Response:
        if self._files is None:
            raise Unavailable(MISSING)
        name = request.path_params["path"]
        if not name:
            return await self.to_studies(request)
        if is_page(name):  # a route inside the viewer
            name = "index.html"
        page = {"Content-Security-Policy": self._policy} if name.endswith(".html") else None
        answer = self._files.answer(request, name, headers=page)
        if answer is None:
            raise NotFound("no such file of the viewer")
        return answer


def is_page(name: str) -> bool:
    """Whether a path below /viewer/ is one of the viewer's own routes and not a file."""
    return "." not in name.rpartition("/")[2]
