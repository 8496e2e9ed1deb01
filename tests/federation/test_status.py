"""The table of errors is complete, and every class comes back as itself through a real call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest

from archive import errors
from archive.errors import MissError
from federation.status import CODES, FALLBACK, METADATA_KEY, abort, code_of, restored


def every_error(kind: type[MissError] = MissError) -> Iterator[type[MissError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from every_error(below)


def ours() -> list[type[MissError]]:
    return sorted(
        (kind for kind in every_error() if kind.__module__ == errors.__name__), key=lambda kind: kind.__name__
    )


def test_the_table_has_every_error_and_no_other() -> None:
    assert set(CODES) == set(ours())
    assert grpc.StatusCode.OK not in CODES.values()


def test_an_error_made_below_ours_takes_the_status_above_it() -> None:
    class Narrow(errors.NotFound):
        pass

    assert code_of(Narrow) is grpc.StatusCode.NOT_FOUND


class Failing(grpc.GenericRpcHandler):
    """Raises the error that the request names, as a servicer does."""

    def service(self, call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def handle(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            name = request.decode()
            error: Exception = (
                getattr(errors, name)("why") if name in vars(errors) else ValueError("Rossi^Maria")
            )
            await abort(context, error)

        return grpc.unary_unary_rpc_method_handler(handle)


def call(name: str) -> grpc.aio.AioRpcError:
    """The failed call that a client sees."""

    async def go() -> grpc.aio.AioRpcError:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Failing(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                fail: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test/Fail")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await fail(name.encode())
                return caught.value
        finally:
            await server.stop(0)

    return asyncio.run(go())


@pytest.mark.parametrize("kind", ours(), ids=lambda kind: kind.__name__)
def test_each_error_comes_back_as_the_same_class_with_its_words(kind: type[MissError]) -> None:
    error = restored(call(kind.__name__))
    assert type(error) is kind
    assert str(error) == "why"


def test_a_surprise_is_answered_blandly() -> None:
    failed = call("surprise")
    assert failed.code() is grpc.StatusCode.INTERNAL
    assert "Rossi" not in (failed.details() or "")
    assert type(restored(failed)) is MissError


class Bare:
    """A failure that gRPC made itself: no name of ours travels with it."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return None

    def trailing_metadata(self) -> None:
        return None


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_without_a_name_is_some_error_of_ours(code: grpc.StatusCode) -> None:
    assert type(restored(Bare(code))) is FALLBACK.get(code, MissError)
    assert METADATA_KEY not in str(restored(Bare(code)))
