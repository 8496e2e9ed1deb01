"""The uplink: the one outbound connection set of a node. It attaches to a hub, says how the ward stands,
answers what readers ask, and delivers the outbox. It runs in a thread of its own beside the DICOM services
and can't harm them: a region that is away, or refuses this node, is logged, and modalities are served on.

A node dials out only. Each attempt makes a channel of its own, so that the back-off (exponential, with
jitter, capped) is this module's and a renewed certificate is used from the next channel on. A report is made
only after the index has what was acknowledged before it: "nothing pending" is a promise about coverage, not
a guess.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import grpc
import grpc.aio

from archive.archive import Archive
from archive.backoff import Backoff
from archive.errors import MissError, SettingsError, Unavailable
from archive.ledger import DeliveryStanding
from certs.authority import clock_us
from certs.credentials import channel
from certs.identity import Identity
from certs.renewal import RenewalThread, renew
from federation import abilities, serde
from federation import status as errors_on_the_wire
from federation.asks import Asks, Audit
from federation.coverage import REPORT_INTERVAL_S, Report
from federation.deliveries_taking import Taking
from federation.delivery import Delivery, raise_if_ours
from federation.line import Line, LinePart, RegionPolicy
from federation.replicator import Limits, Replicator
from federation.settings import DeliverySettings, UplinkSettings
from federation.version import software_version
from protos import uplink_pb2
from protos.uplink_pb2_grpc import UplinkStub

if TYPE_CHECKING:
    from protos.uplink_pb2_grpc import UplinkAsyncStub  # a type of the stubs alone

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PROTOCOL = 1
GOODBYE_S = 0.5
LASTING_S = 10.0
WELCOME_WAIT_S = 10.0
START_WAIT_S = 30.0
RESTART_S = 10.0  # after an error that nobody foresaw
REPORT_GAP_S = 0.05  # between two reports, however often the backlog comes and goes
REFUSED = frozenset({grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED})


@dataclass(frozen=True, slots=True)
class UplinkStatus:
    """How the uplink stands, for the node's status. `reason` says why it is not attached."""

    attached: bool
    hub: str
    since_us: int | None
    reason: str
    rate_bytes_per_s: float


class Uplink:
    """A node's uplink, as an object with a start and a stop."""

    def __init__(
        self,
        archive: Archive,
        identity: Identity,
        settings: UplinkSettings,
        *,
        clock: Callable[[], int] = clock_us,
        ae_title: str = "",
        audit: Audit | None = None,
        deliveries: DeliverySettings | None = None,
        on_standings: Callable[[Sequence[DeliveryStanding]], None] = lambda told: None,
        parts: Sequence[LinePart] = (),
    ) -> None:
        """`audit` writes who was answered from here into the node's own log; `on_standings` keeps how
        deliveries from and to this ward stand; `parts` is what else rides on the line."""
        self.settings = settings
        self._audit = audit
        self._archive = archive
        self._identity = identity
        self._clock = clock
        self._ae_title = ae_title
        self._deliveries = deliveries or DeliverySettings()
        self._on_standings = on_standings
        self._parts = tuple(parts)
        self._policy: RegionPolicy | None = None
        self._line: grpc.aio.Channel | None = None
        self._chance = random.Random()
        self._backoff = Backoff(settings.backoff_first_s, settings.backoff_cap_s, self._chance)
        self._epoch = b""
        self._welcomed: tuple[int, float] | None = None  # the hub's clock, and ours that is never set
        self._reported: Report | None = None
        self._rate = _Rate()
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main_task: asyncio.Task[None] | None = None
        self._status = UplinkStatus(False, self._address(0), None, "not started", 0.0)

    def start(self) -> None:
        """Starts dialling; returns at once, whether a hub is there or not."""
        if not self.settings.enabled or self._thread is not None:
            return
        self._ready.clear()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_WAIT_S):
            raise Unavailable("the uplink did not start")

    def stop(self) -> None:
        """Leaves the hub and ends. What was under way is found again in the outbox."""
        thread, loop, task = self._thread, self._loop, self._main_task
        if thread is None or loop is None or task is None:
            return
        self._stopping.set()
        loop, task = self._loop or loop, self._main_task or task  # those of a restart, if there was one
        with contextlib.suppress(RuntimeError):  # the loop has ended by an error
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        self._thread = None

    def wake(self) -> None:
        """Something was stored: look now, not at the next poll. Any thread may call it."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._woken)

    def ordered(self) -> None:
        """Something was ordered for another ward: what waits for it is urgent, how deliveries stand has
        changed. Any thread may call it."""
        if self._loop is not None and self._thread is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._urgent)
                self._loop.call_soon_threadsafe(self._taking.told)

    def call(self, ask: Callable[[grpc.aio.Channel], Awaitable[T]], timeout_s: float) -> T:
        """The result of `ask` over the channel of the current attach. Any thread may call it but the uplink's
        own. Raises Unavailable when there is none or no answer in time, else what the hub raised."""
        loop = self._loop
        if loop is None or self._thread is None:
            raise Unavailable("the hub is away")
        asking = self._over_line(ask)
        try:
            answer = asyncio.run_coroutine_threadsafe(asking, loop)
        except RuntimeError:  # the loop has ended
            asking.close()
            raise Unavailable("the hub is away") from None
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            answer.cancel()
            raise Unavailable(f"no answer of the hub within {timeout_s:g} s") from None
        except concurrent.futures.CancelledError:
            raise Unavailable("the uplink stops") from None

    async def _over_line(self, ask: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T:
        if self._line is None:
            raise Unavailable("the hub is away")
        try:
            return await ask(self._line)
        except grpc.aio.AioRpcError as error:
            raise errors_on_the_wire.restored(error) from None
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:  # the channel was closed
            raise_if_ours(error)
            raise Unavailable("the hub is away") from None

    def status(self) -> UplinkStatus:
        """How it stands now. Any thread may ask."""
        return replace(self._status, rate_bytes_per_s=self._rate.bytes_per_s)

    @property
    def identity(self) -> Identity:
        """Who this node is, by the certificate that is in use now."""
        return self._identity

    @property
    def policy(self) -> RegionPolicy | None:
        """What the region laid down last, also while no hub is there; None when none said anything since the
        start. Any thread may ask."""
        return self._policy

    def hub_clock_us(self) -> int:
        """The hub's time, as far as it is known here, whatever this machine's clock is set to meanwhile: else
        its devices' questions, and the region's to it, would seem expired until the next attach."""
        if self._welcomed is None:
            return self._clock()
        hub_us, at_s = self._welcomed
        return hub_us + int((time.monotonic() - at_s) * 1e6)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    asyncio.run(self._main())
                except asyncio.CancelledError:
                    return
                except Exception:
                    # A fault nobody foresaw: what waits is in the outbox, so a fresh start loses nothing.
                    log.exception("the uplink ended by an error; it starts again in %g s", RESTART_S)
                    reason = "it ended by an error and will start again; see the log"
                    self._status = replace(self._status, attached=False, since_us=None, reason=reason)
                self._ready.set()
                self._stopping.wait(RESTART_S)
        finally:
            self._ready.set()

    async def _main(self) -> None:
        settings = self.settings
        self._loop = asyncio.get_running_loop()
        self._main_task = asyncio.current_task()
        if self._stopping.is_set():
            return
        self._pool = ThreadPoolExecutor(settings.workers, "uplink")
        self._report_now = asyncio.Event()
        self._attach_anew = asyncio.Event()
        limits = Limits(
            window=settings.window,
            offer_items=settings.offer_items,
            tries_max=settings.tries_max,
            backoff_first_s=settings.backoff_first_s,
            backoff_cap_s=settings.backoff_cap_s,
        )
        replicator = Replicator(self._identity.ward, limits, self._chance, hold=settings.hold)
        self._delivery = Delivery(
            self._archive,
            replicator,
            self._pool,
            self._clock,
            streams=settings.push_streams,
            on_recorded=self._recorded,
        )
        self._delivery.line_down()
        self._taking = Taking(
            self._archive,
            self._identity.ward,
            self._deliveries,
            self._pool,
            self._clock,
            self._on_standings,
        )
        renewal = RenewalThread(
            self._identity, on_renewed=self._renewed_in_thread, renew=self._renew, clock=self._clock
        )
        renewal.start()
        self._ready.set()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._delivery.run())
                group.create_task(self._taking.run())
                for part in self._parts:
                    group.create_task(part.run())
                group.create_task(self._watch())
                group.create_task(self._attach_for_ever())
        finally:
            await asyncio.to_thread(renewal.stop)
            await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)
            self._status = replace(self._status, attached=False, since_us=None, reason="stopped")

    # Attach.

    async def _attach_for_ever(self) -> None:
        failures = 0
        while True:
            address, begun_s = self._address(failures), time.monotonic()
            self._attach_anew.clear()
            try:
                await self._attach(address)
                reason = "the hub ended the attach"
            except (Exception, asyncio.CancelledError) as error:
                # Whatever it is: modalities are served, and it is tried again.
                raise_if_ours(error)
                reason = self._log_failure(address, error)
            self._status = UplinkStatus(False, address, None, reason, 0.0)
            if self._attach_anew.is_set():
                continue
            # An attach that did not last counts as a failure too: two nodes with one identity, a hub that
            # falls over.
            failures = 1 if time.monotonic() - begun_s >= LASTING_S else failures + 1
            await asyncio.sleep(self._backoff.pause_s(failures))

    async def _attach(self, address: str) -> None:
        """One attach, from hello to its end."""
        if not address:
            raise SettingsError("no hub is known: neither the invite nor uplink.hub_address names one")
        identity = self._identity
        async with channel(identity, address) as line:
            stub: UplinkAsyncStub = UplinkStub(line)
            call = stub.Attach()
            try:
                # The deadline is for the connection too: a handshake that hangs is not waited for.
                async with asyncio.timeout(WELCOME_WAIT_S):
                    await call.write(uplink_pb2.NodeMessage(hello=self._hello()))
                    welcome = await self._welcome(call)
                asks = Asks(
                    self._archive,
                    identity,
                    self._pool,
                    self.hub_clock_us,
                    self._make_report,
                    self._urgent,
                    self._audit,
                )
                self._begin(address, welcome, stub, line)
                try:
                    await self._converse(call, stub, asks, welcome.report_interval_s)
                finally:
                    asks.cancel_all()
                    self._line = None
                    self._delivery.line_down()
                    self._taking.line_down()
                    for part in self._parts:
                        part.line_down()
            finally:
                call.cancel()

    def _begin(
        self, address: str, welcome: uplink_pb2.Welcome, stub: UplinkAsyncStub, line: grpc.aio.Channel
    ) -> None:
        self._lay_down(welcome.policy if welcome.HasField("policy") else None, welcome.clock_us)
        self._status = UplinkStatus(True, address, self._clock(), "", 0.0)
        log.info("attached to the hub at %s (version %s)", address, welcome.version)
        self._report_now.set()
        self._line = line
        self._delivery.line_up(stub)
        self._taking.line_up(line)
        for part in self._parts:
            part.line_up(Line(address, line, abilities.shared(welcome.abilities)))

    def _lay_down(self, message: uplink_pb2.Policy | None, clock_us: int) -> None:
        """A hub said what the region lays down, or, of an older release, its time alone."""
        if message is not None:
            self._policy = serde.policy_from(message)
            clock_us = self._policy.clock_us
        self._welcomed = clock_us, time.monotonic()

    async def _converse(self, call: Any, stub: UplinkAsyncStub, asks: Asks, interval_s: float) -> None:
        """Reports and hears until the hub ends the attach, the line breaks, or a new certificate is there."""
        writing = asyncio.Lock()

        def fail(ask_id: str, reason: str) -> None:
            message = uplink_pb2.NodeMessage(ask_failed=uplink_pb2.AskFailed(ask_id=ask_id, reason=reason))
            task = asyncio.create_task(_write(call, writing, message))
            failing.add(task)
            task.add_done_callback(failing.discard)

        failing: set[asyncio.Task[None]] = set()
        ends = [
            asyncio.create_task(self._hear(call, stub, asks, fail)),
            asyncio.create_task(self._report_for_ever(call, writing, interval_s or REPORT_INTERVAL_S)),
            asyncio.create_task(self._attach_anew.wait()),
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
        self, call: Any, stub: UplinkAsyncStub, asks: Asks, fail: Callable[[str, str], None]
    ) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("message")
            if kind == "search":
                asks.search(message.search, stub, fail)
            elif kind == "promote":
                asks.promote(message.promote, stub, fail)
            elif kind == "cancel":
                asks.cancel(message.cancel.ask_id)
            elif kind == "deliveries":
                self._taking.told()
            elif kind == "policy":
                self._lay_down(message.policy, 0)
            elif kind == "come":
                for part in self._parts:
                    part.come(message.come)

    async def _welcome(self, call: Any) -> uplink_pb2.Welcome:
        message = await call.read()
        if message is grpc.aio.EOF or message.WhichOneof("message") != "welcome":
            raise Unavailable("the hub did not say welcome")
        welcome: uplink_pb2.Welcome = message.welcome
        return welcome

    def _hello(self) -> uplink_pb2.Hello:
        self._epoch = self._archive.epoch
        return uplink_pb2.Hello(
            version=software_version(), protocol=PROTOCOL, epoch=self._epoch, abilities=abilities.OURS
        )

    # Reports.

    async def _report_for_ever(self, call: Any, writing: asyncio.Lock, interval_s: float) -> None:
        while True:
            self._report_now.clear()
            try:
                report = await self._make_report()
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
                    report = serde.report_to(await self._make_report())
                    await _write(call, writing, uplink_pb2.NodeMessage(report=report))
                    await call.done_writing()
                    await call.code()

    async def _make_report(self) -> Report:
        return await self._in_pool(self._report)

    def _report(self) -> Report:
        archive = self._archive
        archive.wait_indexed()
        summary, totals = archive.index.pending_summary(), archive.index.totals()
        return Report(
            pending=summary.count - summary.set_aside,
            pending_bytes=summary.bytes,
            oldest_pending_us=summary.oldest_us,
            set_aside=summary.set_aside,
            conflicts=totals.conflicts,
            instances=totals.instances,
            free_bytes=archive.free_bytes(),
            clock_us=self._clock(),
            certificate_not_after_us=self._identity.not_after_us,
            rate_bytes_per_s=self._rate.measure(self._delivery.bytes_sent),
            ae_title=self._ae_title,
            hold=self.settings.hold,
            bytes=totals.bytes,
        )

    # What makes it look.

    async def _watch(self) -> None:
        """Sees that the index moved on: the node's intake does not know of the uplink."""
        seen: object = None
        while True:
            try:
                now = await self._in_pool(self._archive.index.positions)
            except MissError as error:
                log.warning("the index can't be read: %s", error)
            else:
                if now != seen:
                    seen = now
                    self._woken()
            if self._status.attached and self._archive.epoch != self._epoch:
                self._attach_anew.set()  # the first pack of a new disk: the hub has to know it by its name
            await asyncio.sleep(self.settings.poll_s)

    def _woken(self) -> None:
        self._delivery.woken()
        if self._reported is None or self._reported.pending == 0:
            self._report_now.set()

    def _urgent(self) -> None:
        self._delivery.woken(urgent=True)

    def _recorded(self) -> None:
        if self._delivery.drained:
            self._report_now.set()

    # Certificates.

    def _renew(self, identity: Identity) -> Identity:
        addresses = (self.settings.hub_address,) if self.settings.hub_address else identity.hub_addresses
        return renew(
            replace(identity, assignment=replace(identity.assignment, hub_addresses=addresses)),
            clock=self._clock,
        )

    def _renewed_in_thread(self, identity: Identity) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._renewed, identity)

    def _renewed(self, identity: Identity) -> None:
        self._identity = identity
        self._attach_anew.set()

    # Small things.

    def _address(self, attempt: int) -> str:
        """The hub to dial: the settings' own, else those of the invite in turn."""
        if self.settings.hub_address:
            return self.settings.hub_address
        addresses = self._identity.hub_addresses
        return addresses[attempt % len(addresses)] if addresses else ""

    def _log_failure(self, address: str, error: BaseException) -> str:
        """Says why, loudly when it is news; returns it in words."""
        if isinstance(error, grpc.aio.AioRpcError):
            refused = error.code() in REFUSED
            words = f"{error.code().name}: {error.details()}"
        else:
            refused, words = False, str(error) or f"no answer within {WELCOME_WAIT_S:g} s"
            if not isinstance(
                error, (MissError, TimeoutError, asyncio.InvalidStateError, asyncio.CancelledError)
            ):
                log.error("the attach broke", exc_info=error)
        reason = f"refused by the hub ({words})" if refused else f"no hub at {address} ({words})"
        news = reason != self._status.reason
        if refused:
            level = logging.ERROR if news else logging.DEBUG
            log.log(level, "%s; modalities are served on, nothing is replicated", reason)
        else:
            log.log(logging.WARNING if news else logging.DEBUG, "%s; trying again", reason)
        return reason

    def _in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))


class _Rate:
    """Bytes a second since the last measure."""

    def __init__(self) -> None:
        self._at_s = time.monotonic()
        self._sent = 0
        self.bytes_per_s = 0.0

    def measure(self, sent: int) -> float:
        now_s = time.monotonic()
        if now_s - self._at_s >= 0.5:
            self.bytes_per_s = (sent - self._sent) / (now_s - self._at_s)
            self._at_s, self._sent = now_s, sent
        return self.bytes_per_s


async def _write(call: Any, writing: asyncio.Lock, message: uplink_pb2.NodeMessage) -> None:
    async with writing:
        await call.write(message)
