"""What a hub can be asked at this moment. gRPC wants to know its methods before a server starts; a hub that
stands by has most of them only when it becomes the one that writes. So the server is given this one table,
and services are added to it as they would be to the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from archive.errors import Unavailable
from federation import status

STANDS_BY = "this hub stands by: another one writes the region's store"

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # a generic in its stubs alone


class Methods(grpc.GenericRpcHandler):
    """The table. While `standing_by`, what is not in it is refused as unavailable, so that who asked turns to
    another hub; afterwards gRPC says that it does not know it."""

    def __init__(self) -> None:
        self.standing_by = True
        self._handlers: dict[str, Handler] = {}

    @property
    def server(self) -> grpc.aio.Server:
        """Stands for the server in the generated `add_..._to_server`."""
        return cast(grpc.aio.Server, self)

    def add(self, method: str, handler: Handler) -> None:
        self._handlers[method] = handler

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """The generated code says everything twice; this way needs no more."""

    def add_registered_method_handlers(self, service_name: str, handlers: Mapping[str, Handler]) -> None:
        for name, handler in handlers.items():
            self._handlers[f"/{service_name}/{name}"] = handler

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        found = self._handlers.get(str(handler_call_details.method))
        return _REFUSING if found is None and self.standing_by else found


async def _refuse(requests: Any, context: Any) -> None:
    await status.abort(context, Unavailable(STANDS_BY))


# On the wire a call of one message is a stream of one: this shape refuses every other.
_REFUSING: Handler = grpc.stream_stream_rpc_method_handler(_refuse)
