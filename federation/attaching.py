"""One hub, as a node dials it: attach, hear, report, and again. Each attempt makes a channel of its own, so
that the back-off (exponential, with jitter, capped) is this module's and a renewed certificate is used from
the next channel on. Whatever goes wrong is logged, once when it is news, and tried again; modalities are
served meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from archive.archive import Archive
from archive.backoff import Backoff
from archive.errors import MissError, SettingsError, Unavailable
from certs.credentials import channel
from certs.identity import Identity
from federation import abilities, serde
from federation.asks import Asks, Audit
from federation.calls import raise_if_ours
from federation.coverage import REPORT_INTERVAL_S, STALE_AFTER_S, Report
from federation.leading import Leading
from federation.line import Line
from federation.version import PROTOCOL, PROTOCOL_OLDEST, software_version
from protos import uplink_pb2
from protos.uplink_pb2_grpc import UplinkStub

if TYPE_CHECKING:
    from protos.uplink_pb2_grpc import UplinkAsyncStub  # a type of the stubs alone

log = logging.getLogger(__name__)

NOT_YET = "not attached yet"
GOODBYE_S = 0.5
LASTING_S = 10.0
WELCOME_WAIT_S = 10.0
REPORT_GAP_S = 0.05  # between two reports, however often the backlog comes and goes
REFUSED = frozenset({
    grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class NodeSide:
    """What an attach needs of its node. `greet` gives the epoch of the node's disk, `told` passes on that
    deliveries wait, `come` that something else does."""

    archive: Archive
    identity: Callable[[], Identity]
    pool: Executor
    audit: Audit | None
    greet: Callable[[], bytes]
    make_report: Callable[[], Awaitable[Report]]
    on_urgent: Callable[[], None]
    told: Callable[[], None]
    come: Callable[[uplink_pb2.Come], None]


class Attaching:
    """A node's attach to the hub at one address, over and over. `reason` says why there is none now."""

    def __init__(self, address: str, node: NodeSide, leading: Leading, backoff: Backoff) -> None:
        self.address = address
        self.reason = NOT_YET
        self._node = node
        self._leading = leading
        self._backoff = backoff
        self._hub = b""  # its own name, as it told it last
        self._anew = asyncio.Event()
        self._report_now = asyncio.Event()
        self._reported: Report | None = None

    def anew(self) -> None:
        """The certificate or the disk is another one: attach again, at once."""
        self._anew.set()

    def report_now(self, *, if_drained: bool = False) -> None:
        """Report now; with `if_drained` only where the last report said that nothing was pending."""
        if not if_drained or self._reported is None or self._reported.pending == 0:
            self._report_now.set()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        failures = 0
        while True:
            await self._leading.until_wanted(self.address, self._hub)
            begun_s = time.monotonic()
            self._anew.clear()
            try:
                await self._attach()
                self.reason = "the hub ended the attach"
            except (Exception, asyncio.CancelledError) as error:
                # Whatever it is: modalities are served, and it is tried again.
                raise_if_ours(error)
                self.reason = self._log_failure(error)
            if self._anew.is_set():
                continue
            # An attach that did not last counts as a failure too: two nodes with one identity, a hub that
            # falls over.
            failures = 1 if time.monotonic() - begun_s >= LASTING_S else failures + 1
            await asyncio.sleep(self._backoff.pause_s(failures))

    async def _attach(self) -> None:
        """One attach, from hello to its end."""
        identity, leading = self._node.identity(), self._leading
        async with channel(identity, self.address) as line:
            stub: UplinkAsyncStub = UplinkStub(line)
            call = stub.Attach()
            try:
                # The deadline is for the connection too: a handshake that hangs is not waited for.
                async with asyncio.timeout(WELCOME_WAIT_S):
                    await call.write(uplink_pb2.NodeMessage(hello=self._hello()))
                    welcome = await _welcome(call)
                asks = Asks(
                    self._node.archive,
                    identity,
                    self._node.pool,
                    leading.hub_clock_us,
                    self._node.make_report,
                    self._node.on_urgent,
                    self._node.audit,
                )
                policy = serde.policy_from(welcome.policy) if welcome.HasField("policy") else None
                self._hub, self.reason = policy.hub if policy is not None else b"", ""
                log.info("attached to the hub at %s (version %s)", self.address, welcome.version)
                ours = Line(self.address, line, abilities.shared(welcome.abilities))
                leading.up(self.address, ours, policy, welcome.clock_us)
                try:
                    await self._converse(call, stub, asks, welcome.report_interval_s, ours.abilities)
                finally:
                    asks.cancel_all()
                    leading.down(self.address)
            finally:
                call.cancel()

    def _hello(self) -> uplink_pb2.Hello:
        return uplink_pb2.Hello(
            version=software_version(), protocol=PROTOCOL, epoch=self._node.greet(), abilities=abilities.OURS
        )

    async def _converse(
        self, call: Any, stub: UplinkAsyncStub, asks: Asks, interval_s: float, can: frozenset[str]
    ) -> None:
        """Reports and hears until the hub ends the attach, the line breaks, or a new certificate is there."""
        writing = asyncio.Lock()

        def fail(ask_id: str, reason: str) -> None:
            message = uplink_pb2.NodeMessage(ask_failed=uplink_pb2.AskFailed(ask_id=ask_id, reason=reason))
            task = asyncio.create_task(_write(call, writing, message))
            failing.add(task)
            task.add_done_callback(failing.discard)

        failing: set[asyncio.Task[None]] = set()
        self._report_now.set()
        ends = [
            asyncio.create_task(self._hear(call, stub, asks, fail, abilities.PULSE in can)),
            asyncio.create_task(self._report_for_ever(call, writing, interval_s or REPORT_INTERVAL_S)),
            asyncio.create_task(self._anew.wait()),
        ]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await self._say_goodbye(call, writing)  # before who reads is cancelled: that cancels the call
            for other in (*ends, *failing):
                other.cancel()
            await asyncio.gather(*ends, *failing, return_exceptions=True)

    async def _hear(
        self, call: Any, stub: UplinkAsyncStub, asks: Asks, fail: Callable[[str, str], None], has_pulse: bool
    ) -> None:
        while True:
            try:
                async with asyncio.timeout(STALE_AFTER_S if has_pulse else None):
                    message = await call.read()
            except TimeoutError:
                raise Unavailable(f"it was silent for {STALE_AFTER_S:g} s") from None
            if message is grpc.aio.EOF:
                return
            kind = message.WhichOneof("message")
            if kind == "search":
                asks.search(message.search, stub, fail)
            elif kind == "promote":
                asks.promote(message.promote, stub, fail)
            elif kind == "cancel":
                asks.cancel(message.cancel.ask_id)
            elif kind == "deliveries":
                self._node.told()
            elif kind == "policy":
                self._leading.laid_down(self.address, serde.policy_from(message.policy), 0)
            elif kind == "come":
                self._node.come(message.come)

    # Reports.

    async def _report_for_ever(self, call: Any, writing: asyncio.Lock, interval_s: float) -> None:
        while True:
            self._report_now.clear()
            try:
                report = await self._node.make_report()
            except (MissError, OSError) as error:
                # Silence is the honest report: the hub counts this ward as away when it lasts.
                log.warning("no report can be made: %s", error)
            else:
                message = uplink_pb2.NodeMessage(report=serde.report_to(report))
                await _write(call, writing, message)
                self._reported = report
            await asyncio.sleep(REPORT_GAP_S)
            try:
                async with asyncio.timeout(max(interval_s - REPORT_GAP_S, 0.01)):
                    await self._report_now.wait()
            except TimeoutError:
                pass

    async def _say_goodbye(self, call: Any, writing: asyncio.Lock) -> None:
        """A last report and a word, so that coverage is as of now and the ward counts as away at once. Nobody
        waits long for it."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(GOODBYE_S):
                if not call.done():
                    report = serde.report_to(await self._node.make_report())
                    await _write(call, writing, uplink_pb2.NodeMessage(report=report))
                    await call.done_writing()
                    await call.code()

    # Failures.

    def _log_failure(self, error: BaseException) -> str:
        """Says why, loudly when it is news; returns it in words."""
        refused = isinstance(error, SettingsError)
        if isinstance(error, grpc.aio.AioRpcError):
            refused = error.code() in REFUSED
            words = f"{error.code().name}: {error.details()}"
        else:
            words = str(error) or f"no answer within {WELCOME_WAIT_S:g} s"
            if not isinstance(
                error, (MissError, TimeoutError, asyncio.InvalidStateError, asyncio.CancelledError)
            ):
                log.error("the attach broke", exc_info=error)
        reason = f"refused by the hub ({words})" if refused else f"no hub at {self.address} ({words})"
        news = reason != self.reason
        if refused:
            level = logging.ERROR if news else logging.DEBUG
            log.log(level, "%s; modalities are served on, nothing is replicated over it", reason)
        else:
            log.log(logging.WARNING if news else logging.DEBUG, "%s; trying again", reason)
        return reason


async def _welcome(call: Any) -> uplink_pb2.Welcome:
    message = await call.read()
    if message is grpc.aio.EOF or message.WhichOneof("message") != "welcome":
        raise Unavailable("the hub did not say welcome")
    welcome: uplink_pb2.Welcome = message.welcome
    if not PROTOCOL_OLDEST <= welcome.protocol <= PROTOCOL:
        older = "node" if welcome.protocol > PROTOCOL else "hub"
        raise SettingsError(
            f"the hub (version {welcome.version[:40]}) speaks protocol {welcome.protocol}, this node "
            f"{PROTOCOL_OLDEST} to {PROTOCOL}: update the {older}"
        )
    return welcome


async def _write(call: Any, writing: asyncio.Lock, message: uplink_pb2.NodeMessage) -> None:
    async with writing:
        await call.write(message)
