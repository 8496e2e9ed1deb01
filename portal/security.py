"""The response headers that every route carries: what a browser may load, embed, remember and tell others
(OWASP ASVS 3.4). One middleware sets them, so that no route can forget; it decides nothing about people."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Pages: our own style and script, nothing inline, nothing foreign. htmx's own indicator style is switched
# off.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
# Script responses: the decode workers are emscripten code that calls `new Function`, and a worker's policy is
# its script's own. Without this line JPEG 2000, JPEG-LS and HTJ2K stay black while uncompressed images work.
SCRIPT_POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' 'unsafe-eval'; connect-src 'self' blob: data:"
)
# Data: DICOMweb answers are never documents.
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"

HSTS = "max-age=31536000; includeSubDomains"


def viewer_policy(script_hashes: list[str]) -> str:
    """The policy of the viewer's page, tried against the real bundle with compressed images."""
    return (
        f"default-src 'none'; script-src 'self' 'wasm-unsafe-eval' {' '.join(script_hashes)}; "
        "worker-src 'self' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "font-src 'self' data:; connect-src 'self' blob: data:; media-src 'self' blob:; "
        "frame-src 'self' blob:; "
        "manifest-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'; object-src 'none'"
    )


class SecurityHeaders:
    """Adds what the response has not said itself. `https` also when a proxy ends TLS in front of the
    portal."""

    def __init__(self, app: ASGIApp, *, https: bool) -> None:
        self._app = app
        self._https = https

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._complete(MutableHeaders(scope=message), scope["path"])
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _complete(self, headers: MutableHeaders, path: str) -> None:
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "same-origin"
        headers["Cross-Origin-Opener-Policy"] = "same-origin"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
        headers["Permissions-Policy"] = "camera=(), geolocation=(), microphone=(), payment=(), usb=()"
        headers.setdefault("Content-Security-Policy", _policy(headers.get("content-type", "")))
        headers.setdefault("Cache-Control", "no-store")
        if self._https:
            headers["Strict-Transport-Security"] = HSTS


def _policy(content_type: str) -> str:
    if content_type.startswith("text/html"):
        return PAGE_POLICY
    if "javascript" in content_type:
        return SCRIPT_POLICY
    return DATA_POLICY
