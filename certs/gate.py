"""The check on every call. gRPC itself revokes nothing: open streams, and new calls on an open channel, go
on after a certificate has expired or was revoked. So each call is admitted here, by four questions in this
order: TLS 1.3, a certificate of a member that has not expired, a profile that may make this call, an active
row in the registry; and each admitted call stays listed until it ends, so that revocation and expiry end it
too.

The registry is asked once for each certificate and then again when its revocation counter moves, which is
read every second by threads of the gate's own: a busy archive must not make a revocation late. While the
registry can't be read, calls go on for 30 s and are then refused as unavailable. Decides nothing about
patients or wards' data.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio

from archive.errors import InvalidInput, NotAuthenticated
from archive.ledger import Ledger
from certs.authority import Clock, clock_us
from certs.certificate import read_pem
from certs.profiles import Profile

log = logging.getLogger(__name__)

POLL_S = 1.0
REGISTRY_STALE_S_MAX = 30.0
STANDINGS_MAX = 10_000       # certificates whose standing is kept: past it all are asked again
HANDLER_ENDS_S_MAX = 1.0     # what a cancelled handler gets to put things away

_NODE = frozenset({Profile.NODE})
_PORTAL = frozenset({Profile.PORTAL})

RPCS: dict[str, frozenset[Profile]] = {
    "/miss.v1.Uplink/Attach": _NODE,
    "/miss.v1.Uplink/Offer": _NODE,
    "/miss.v1.Uplink/Push": _NODE,
    "/miss.v1.Uplink/Answer": _NODE,
    "/miss.v1.Certificates/Renew": _NODE | _PORTAL,
    "/miss.v1.Deliveries/Order": _NODE,
    "/miss.v1.Deliveries/Next": _NODE,
    "/miss.v1.Deliveries/Fetch": _NODE,
    "/miss.v1.Deliveries/Done": _NODE,
    "/miss.v1.Deliveries/Standing": _NODE,
    "/miss.v1.Restore/Fetch": _NODE,
    "/miss.v1.Facts/Tell": _NODE,
    "/miss.v1.Facts/Next": _NODE,
    "/miss.v1.Inventory/Compare": _NODE,
    "/miss.v1.Inventory/Look": _NODE,
    "/miss.v1.Inventory/Describe": _NODE,
    "/miss.v1.Inventory/Note": _NODE,
    "/miss.v1.Window/Search": _NODE,
    "/miss.v1.Window/Instances": _NODE,
    "/miss.v1.Window/Fetch": _NODE,
    "/miss.v1.Region/Search": _PORTAL,
    "/miss.v1.Region/Promote": _PORTAL,
    "/miss.v1.Region/Gather": _PORTAL,
    "/miss.v1.Region/Fetch": _PORTAL,
    "/miss.v1.Region/Wards": _PORTAL,
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who calls, by its certificate alone. `ward` is a node's "hospital/ward" and empty for others."""

    uri: str
    profile: Profile
    region: str
    ward: str
    fingerprint: str
    not_after_us: int


class HasAuthContext(Protocol):
    """What `peer` needs of a servicer's context, that of grpc or of grpc.aio."""

    def auth_context(self) -> Any: ...


def peer(context: HasAuthContext) -> Peer:
    """Who makes this call; NotAuthenticated when its certificate is not a member's."""
    presented = context.auth_context().get("x509_pem_cert")
    if not presented:
        raise NotAuthenticated("the caller has no certificate")
    try:
        held = read_pem(presented[0])
    except InvalidInput as error:
        raise NotAuthenticated(f"the caller's certificate is not a member's: {error}") from error
    member = held.member
    return Peer(
        member.uri, member.profile, member.region, member.ward or "", held.fingerprint, held.not_after_us)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call may not be, or may not go on."""

    code: grpc.StatusCode
    reason: str


@dataclass(eq=False, slots=True)
class _LiveCall:
    peer: Peer
    method: str
    ended: asyncio.Future[Refusal] = field(repr=False)

    def end(self, refusal: Refusal) -> None:
        if not self.ended.done():
            self.ended.set_result(refusal)


EXPIRED = Refusal(grpc.StatusCode.UNAUTHENTICATED, "certificate expired")
REVOKED = Refusal(grpc.StatusCode.PERMISSION_DENIED, "certificate revoked")
UNKNOWN = Refusal(grpc.StatusCode.PERMISSION_DENIED, "certificate not in the region's registry")
OLD_TLS = Refusal(grpc.StatusCode.UNAUTHENTICATED, "TLS 1.3 is needed")
NOT_ALLOWED = Refusal(grpc.StatusCode.PERMISSION_DENIED, "not a call for this kind of member")
STALE = Refusal(grpc.StatusCode.UNAVAILABLE, "the registry of certificates can't be read")


class Gate(grpc.aio.ServerInterceptor):
    """Interceptor for a grpc.aio server. `start` before the server starts, `stop` after it has stopped."""

    def __init__(self, ledger: Ledger, *, clock: Clock = clock_us, poll_s: float = POLL_S) -> None:
        self._ledger = ledger
        self._clock = clock
        self._poll_s = poll_s
        self._threads = ThreadPoolExecutor(2, "gate")
        self._standings: dict[str, Refusal | None] = {}
        self._live: dict[str, set[_LiveCall]] = {}
        self._version = -1
        self._read_at_s = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self.refusals: Counter[str] = Counter()  # by reason, for the hub's health

    async def start(self) -> None:
        self._version = await self._in_thread(self._ledger.revocation_version)
        self._read_at_s = time.monotonic()
        self._tasks = [
            asyncio.create_task(self._watch_registry(), name="gate: registry"),
            asyncio.create_task(self._watch_clock(), name="gate: clock"),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def live_calls(self) -> int:
        return sum(len(calls) for calls in self._live.values())

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        make, behaviour = shape(handler)

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            return await self._guard(method, behaviour, request, context)

        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            guarded, handler.request_deserializer, handler.response_serializer)
        return wrapped

    async def _guard(
        self, method: str, behaviour: Callable[[Any, Any], Awaitable[Any]], request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Any:
        try:
            caller = peer(context)
        except NotAuthenticated as error:
            await self._refuse(context, method, "?", Refusal(grpc.StatusCode.UNAUTHENTICATED, str(error)))
        call = _LiveCall(caller, method, asyncio.get_running_loop().create_future())
        # Listed before the check: a revocation in between finds it.
        self._live.setdefault(caller.fingerprint, set()).add(call)
        try:
            if refusal := await self._question(caller, method, context):
                await self._refuse(context, method, caller.uri, refusal)
            return await self._run(call, behaviour(request, context), context)
        finally:
            calls = self._live[caller.fingerprint]
            calls.discard(call)
            if not calls:
                del self._live[caller.fingerprint]

    async def _question(self, caller: Peer, method: str, context: Any) -> Refusal | None:
        if context.auth_context().get("ssl_tls_version") != [b"TLSv1.3"]:
            return OLD_TLS
        if caller.not_after_us <= self._clock():
            return EXPIRED
        if caller.profile not in RPCS.get(method, frozenset()):
            return NOT_ALLOWED
        if time.monotonic() - self._read_at_s > REGISTRY_STALE_S_MAX:
            return STALE
        try:
            return await self._standing(caller.fingerprint)
        except Exception as error:  # whatever the database's driver raises
            log.error("the registry of certificates can't be read: %s", type(error).__name__)
            return STALE

    async def _run(self, call: _LiveCall, behaviour: Awaitable[Any], context: Any) -> Any:
        """The handler's result, unless the call has to end first."""
        work = asyncio.ensure_future(behaviour)
        try:
            await asyncio.wait((work, call.ended), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
        finally:
            if not work.done():  # the call has to end, or its client has left
                work.cancel()
                await asyncio.wait((work,), timeout=HANDLER_ENDS_S_MAX)
                if work.done() and not work.cancelled():
                    work.exception()  # looked at: what it raised on its way out is nobody's any more
        await self._refuse(context, call.method, call.peer.uri, call.ended.result())

    async def _refuse(self, context: Any, method: str, who: str, refusal: Refusal) -> None:
        self.refusals[refusal.reason] += 1
        log.warning("refused %s of %s from %s: %s", method, who, context.peer(), refusal.reason)
        await context.abort(refusal.code, refusal.reason)

    async def _standing(self, fingerprint: str) -> Refusal | None:
        if fingerprint in self._standings:
            return self._standings[fingerprint]
        version = self._version
        row = await self._in_thread(self._ledger.certificate, fingerprint)
        refusal = UNKNOWN if row is None else REVOKED if row.state == "revoked" else None
        if version == self._version and refusal is not UNKNOWN:  # one that is unknown may be added yet
            if len(self._standings) >= STANDINGS_MAX:
                self._standings.clear()
            self._standings[fingerprint] = refusal
        return refusal

    async def _watch_registry(self) -> None:
        while True:
            try:
                version = await self._in_thread(self._ledger.revocation_version)
                if version != self._version:
                    self._version = version
                    self._standings.clear()
                    await self._end_revoked()
                self._read_at_s = time.monotonic()
            except Exception as error:
                log.error("the registry of certificates can't be read: %s", type(error).__name__)
                self._version = -1  # what was missed is looked up when it can be read again
            await asyncio.sleep(self._poll_s)

    async def _watch_clock(self) -> None:
        """Apart from the registry's, so that a database that hangs keeps no expired call alive."""
        while True:
            now_us = self._clock()
            for calls in self._live.values():
                for call in calls:
                    if call.peer.not_after_us <= now_us:
                        call.end(EXPIRED)
            await asyncio.sleep(self._poll_s)

    async def _end_revoked(self) -> None:
        for fingerprint in list(self._live):
            if await self._standing(fingerprint) is REVOKED:
                for call in list(self._live.get(fingerprint, ())):
                    call.end(REVOKED)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def shape(handler: Any) -> tuple[Callable[..., Any], Callable[[Any, Any], Awaitable[Any]]]:
    """The maker of a handler of the same kind, and the handler's behaviour as one coroutine."""
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler, _writing(handler.stream_stream)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler, _answering(handler.stream_unary)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler, _writing(handler.unary_stream)
    return grpc.unary_unary_rpc_method_handler, _answering(handler.unary_unary)


def _answering(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[Any]]:
    if not asyncio.iscoroutinefunction(behaviour):
        raise TypeError("the gate guards coroutines: a handler in a thread can't be ended")
    return behaviour


def _writing(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[Any]]:
    """A handler that writes its replies, made of one that yields them; one that writes already stays."""
    if asyncio.iscoroutinefunction(behaviour):
        return behaviour

    async def write_all(request: Any, context: Any) -> None:
        async with aclosing(behaviour(request, context)) as replies:
            async for reply in replies:
                await context.write(reply)

    return write_all
