"""Retrieve Capabilities (PS3.18 8.9): what this service offers, as WADL, made from the routes themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.sax.saxutils import quoteattr

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from portal.dicomweb import base_url
from portal.negotiate import DICOM, DICOM_JSON, DICOM_XML, OCTETS

WADL = "application/vnd.sun.wadl+xml"

# What a resource answers, by how its path ends; the first that fits.
REPRESENTATIONS: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"/(rendered|thumbnail)$"), ("image/jpeg", "image/png")),
    (re.compile(r"/(frames/\{frames\}|bulk/\{path\})$"), (f'multipart/related; type="{OCTETS}"', OCTETS)),
    (
        re.compile(r"/(metadata|studies|series|instances)$"),
        (DICOM_JSON, f'multipart/related; type="{DICOM_XML}"'),
    ),
    (re.compile(r"/\{instance\}$"), (f'multipart/related; type="{DICOM}"', DICOM)),
    (re.compile(r"/\{(study|series)\}$"), (f'multipart/related; type="{DICOM}"',)),
)


class Capabilities:
    """`services` are the routes that are described; their paths begin with `root`."""

    def __init__(self, root: str, services: Iterable[BaseRoute]) -> None:
        self._root = root
        described = (r for r in services if isinstance(r, Route) and "GET" in (r.methods or ()))
        self._paths = sorted({route.path.replace(":path}", "}") for route in described})

    def routes(self) -> list[BaseRoute]:
        return [
            Route(path, self.capabilities, methods=["OPTIONS"]) for path in (self._root, f"{self._root}/")
        ]

    async def capabilities(self, request: Request) -> Response:
        resources = "".join(self._resource(path) for path in self._paths)
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><application xmlns="http://wadl.dev.java.net/2009/02">'
            f"<resources base={quoteattr(base_url(request) + self._root)}>{resources}</resources>"
            "</application>"
        )
        return Response(body, media_type=WADL, headers={"Allow": "GET, HEAD, OPTIONS"})

    def _resource(self, path: str) -> str:
        relative = path.removeprefix(self._root)
        names = re.findall(r"\{(\w+)\}", relative)
        parameters = "".join(f'<param name={quoteattr(name)} style="template"/>' for name in names)
        types = next(types for pattern, types in REPRESENTATIONS if pattern.search(relative))
        answers = "".join(f"<representation mediaType={quoteattr(t)}/>" for t in types)
        return (
            f"<resource path={quoteattr(relative.removeprefix('/'))}>{parameters}"
            f'<method name="GET"><response>{answers}</response></method></resource>'
        )
