"""Serves fixed files: the viewer, the pages' style and script. The files are listed once at start, and a
name from outside is only ever looked up in that list: it never becomes a path. Whatever was compressed when
the assets were made is sent compressed; nothing is compressed on the fly."""

from __future__ import annotations

import hashlib
import mimetypes
import re
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

# Names that carry a digest of the content: a browser may keep them for ever.
FINGERPRINTED = re.compile(r"(\.bundle\.[0-9a-f]{16}\.js|^[0-9a-f]{16}\.\w+)$")
IMMUTABLE = "public, max-age=31536000, immutable"
REVALIDATE = "no-cache"
TYPES = {
    ".js": "text/javascript",
    ".wasm": "application/wasm",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".woff2": "font/woff2",
}


@dataclass(frozen=True, slots=True)
class Served:
    """One file as it can be sent."""

    path: Path
    compressed: Path | None
    media_type: str
    tag: str
    fingerprinted: bool


class Files:
    """The files below `folder`, by the name that a URL uses."""

    def __init__(self, folder: Path) -> None:
        self._files = {
            path.relative_to(folder).as_posix(): _served(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".gz"
        }

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def fingerprint(self, name: str) -> str:
        """A short digest of the file's content, for its URL."""
        return hashlib.sha256(self._files[name].path.read_bytes()).hexdigest()[:12]

    def answer(
        self, request: Request, name: str, *, immutable: bool = False, headers: dict[str, str] | None = None
    ) -> Response | None:
        """The file called `name`, None when there is none."""
        served = self._files.get(name)
        if served is None:
            return None
        headers = {
            "Cache-Control": IMMUTABLE if immutable or served.fingerprinted else REVALIDATE,
            "ETag": served.tag,
            "Vary": "Accept-Encoding",
            **(headers or {}),
        }
        if request.headers.get("if-none-match") == served.tag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        if served.compressed is not None and "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return FileResponse(served.compressed, headers=headers, media_type=served.media_type)
        return FileResponse(served.path, headers=headers, media_type=served.media_type)


def _served(path: Path) -> Served:
    compressed = path.with_name(path.name + ".gz")
    stat = path.stat()
    media_type = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    tag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
    return Served(
        path,
        compressed if compressed.is_file() else None,
        media_type,
        tag,
        FINGERPRINTED.search(path.name) is not None,
    )
