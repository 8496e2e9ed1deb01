"""Errors on the wire: `archive/errors.py` to gRPC status codes by one table, and back. The class's name
travels in trailing metadata, so that the caller catches the same class as if the call had been local. What
was not raised on purpose is logged in full here and answered blandly, since its text may hold anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, Protocol

import grpc

from archive import errors
from archive.errors import MissError

log = logging.getLogger(__name__)

METADATA_KEY = "miss-error"
MESSAGE_LENGTH_MAX = 500
WRITE_S = 300.0  # for one message of an answer: 1 MiB at 30 kbit/s

CODES: Mapping[type[MissError], grpc.StatusCode] = {
    errors.MissError: grpc.StatusCode.INTERNAL,
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidInstance: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DatasetMismatch: grpc.StatusCode.INVALID_ARGUMENT,
    errors.CannotUnderstand: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedClass: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidQuery: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Gone: grpc.StatusCode.NOT_FOUND,
    errors.OtherContent: grpc.StatusCode.ALREADY_EXISTS,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotAuthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.OutOfResources: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Evicted: grpc.StatusCode.UNAVAILABLE,
    errors.TooLarge: grpc.StatusCode.OUT_OF_RANGE,
    errors.Corrupt: grpc.StatusCode.DATA_LOSS,
    errors.SyncFailed: grpc.StatusCode.ABORTED,
    errors.SchemaTooNew: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SettingsError: grpc.StatusCode.FAILED_PRECONDITION,
}

# What a status means when no name came with it: another release's error, the gate, or gRPC itself.
FALLBACK: Mapping[grpc.StatusCode, type[MissError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.OtherContent,
    grpc.StatusCode.PERMISSION_DENIED: errors.Forbidden,
    grpc.StatusCode.UNAUTHENTICATED: errors.NotAuthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OutOfResources,
    grpc.StatusCode.OUT_OF_RANGE: errors.TooLarge,
    grpc.StatusCode.DATA_LOSS: errors.Corrupt,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Unavailable,
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.ABORTED: errors.Unavailable,
}

_BY_NAME = {kind.__name__: kind for kind in CODES}


class AbortableContext(Protocol):
    """What is needed of a call to end it."""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> NoReturn: ...


class FailedCall(Protocol):
    """What a failed call tells; `grpc.RpcError` of a synchronous call and `grpc.aio.AioRpcError` both do."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


class WritableContext(Protocol):
    """What is needed of a call to answer it."""

    async def write(self, message: Any) -> None: ...


async def write(context: WritableContext, message: Any) -> None:
    """Writes one message of an answer. Unavailable when its reader takes nothing for so long: it would hold
    the call's place for ever."""
    try:
        async with asyncio.timeout(WRITE_S):
            await context.write(message)
    except TimeoutError:
        raise errors.Unavailable("nobody takes what was asked for") from None


async def abort(context: AbortableContext, error: Exception) -> NoReturn:
    """Ends the call with `error`'s status. The caller gets the words of an error of ours and of no other."""
    code, name, words = told(error)
    await context.abort(code, words, ((METADATA_KEY, name),))


def told(error: Exception) -> tuple[grpc.StatusCode, str, str]:
    """The status code, class name and words by which another process learns of `error`."""
    if isinstance(error, MissError):
        return code_of(type(error)), type(error).__name__, str(error)[:MESSAGE_LENGTH_MAX]
    log.error("an unexpected error ended a call", exc_info=error)
    return grpc.StatusCode.INTERNAL, MissError.__name__, "an unexpected error; the hub's log has it"


def code_of(kind: type[MissError]) -> grpc.StatusCode:
    """The table's code for the class, or for the nearest one above it."""
    return next(CODES[above] for above in kind.__mro__ if above in CODES)


def restored(call: FailedCall) -> MissError:
    """The error that the other side raised, as the same class."""
    code, words = call.code(), call.details() or "no reason was given"
    name = next((_text(value) for key, value in call.trailing_metadata() or () if key == METADATA_KEY), "")
    kind = _BY_NAME.get(name) or FALLBACK.get(code, MissError)
    return kind(f"{words} ({code.name})" if not name else words)


def is_named(call: FailedCall) -> bool:
    """Whether the other side ended the call with an error of its own, and not gRPC in between."""
    return any(key == METADATA_KEY for key, _ in call.trailing_metadata() or ())


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("ascii", "replace")
