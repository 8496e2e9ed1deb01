"""Times the calls that a hub answers, and makes each one a span of the trace that it came with. Stands behind
the gate: what it sees was admitted. Calls that come with no trace, as pushes do, are no spans.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from opentelemetry.trace import SpanKind

from certs.gate import RPCS, shape
from monitoring.measures import Distribution
from monitoring.tracing import span, traceparent_in

# Streams that stay open: how long is no measure of anything.
UNTIMED = frozenset({"/miss.v1.Uplink/Attach", "/miss.v1.Uplink/Push", "/miss.v1.Region/Gather"})


class WatchedCalls(grpc.aio.ServerInterceptor):
    """`seconds` is by method, without the package's name."""

    def __init__(self) -> None:
        self.seconds = {_short(method): Distribution() for method in RPCS if method not in UNTIMED}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        parent = traceparent_in(handler_call_details.invocation_metadata)
        timed = self.seconds.get(_short(method))
        if handler is None or (timed is None and not parent):
            return handler
        make, behaviour = shape(handler)

        async def watched(request: Any, context: Any) -> Any:
            begun_s = time.perf_counter()
            try:
                if not parent:
                    return await behaviour(request, context)
                with span(_short(method), parent, kind=SpanKind.SERVER):
                    return await behaviour(request, context)
            finally:
                if timed is not None:
                    timed.observe(time.perf_counter() - begun_s)

        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            watched, handler.request_deserializer, handler.response_serializer
        )
        return wrapped


def _short(method: str) -> str:
    return method.removeprefix("/miss.v1.")
