"""Makes each request a span: of the trace that its `traceparent` names, else of a new one. The answer says
which, so that a person can name a request to those who read the logs. A span is called by its route, never by
its path or query: they hold UIDs and names.
"""

from __future__ import annotations

from opentelemetry.trace import SpanKind
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitoring import tracing

TRACE_HEADER = b"miss-trace"
UNKNOWN = "other"


class Traced:
    """The outermost layer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (TRACE_HEADER, trace)]
            await send(message)

        with tracing.span(scope["method"], _parent(scope), kind=SpanKind.SERVER) as span:
            trace = tracing.trace_id().encode()
            try:
                await self._app(scope, receive, told)
            finally:
                if span.is_recording():
                    span.update_name(f"{scope['method']} {route_of(scope)}")
                    span.set_attribute("http.response.status_code", status)


def _parent(scope: Scope) -> str | None:
    """The header, where there is exactly one."""
    found = [value for name, value in scope["headers"] if name == tracing.HEADER.encode()]
    return found[0].decode("latin-1") if len(found) == 1 else None


def route_of(scope: Scope) -> str:
    """The path with the names of what stands in it: /dicom-web/studies/{study}."""
    if "endpoint" not in scope:
        return UNKNOWN
    path = str(scope["path"])
    names = {str(value): name for name, value in scope.get("path_params", {}).items()}
    for value, name in names.items():
        if "/" in value:
            path = path.replace(value, "{" + name + "}")
    return "/".join(
        "{" + names[part] + "}" if part in names else part for part in path.split("/")
    )
