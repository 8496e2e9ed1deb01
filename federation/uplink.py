"""The uplink: what a node reaches the region by. It attaches to each hub that it knows of, says how the ward
stands, answers what readers ask, and lets what rides on the line (the outbox's delivery, what other wards
deliver, and more) ride on that of the hub that writes the region's store. It runs in a thread of its own
beside the DICOM services and can't harm them: a region that is away, or refuses this node, is logged, and
modalities are served on.

A node dials out only. The hubs that it knows of are that of the settings, or else those of the invite, and
those that the hubs tell; at most eight.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import grpc
import grpc.aio

from archive.archive import Archive
from archive.backoff import Backoff
from archive.errors import MissError, Unavailable
from archive.ledger import DeliveryStanding
from certs.authority import clock_us
from certs.credentials import channel
from certs.identity import Identity
from certs.renewal import RenewalThread, renew
from federation import status as errors_on_the_wire
from federation.asks import Audit
from federation.attaching import NOT_YET, Attaching, NodeSide
from federation.calls import raise_if_ours
from federation.coverage import Report
from federation.deliveries_taking import Taking
from federation.delivery import Delivery
from federation.leading import Leading
from federation.line import Line, LinePart, RegionPolicy
from federation.replicator import Limits, Replicator
from federation.reporting import Reporter, Sent
from federation.settings import DeliverySettings, UplinkSettings
from protos import uplink_pb2

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

START_WAIT_S = 30.0
RESTART_S = 10.0  # after an error that nobody foresaw
NO_HUB = "no hub is known: neither the invite nor uplink.hub_address names one"


@dataclass(frozen=True, slots=True)
class UplinkStatus:
    """How the uplink stands, for the node's status: whether the region is reached, over which hub, since when
    without a break. `reason` says why it is not."""

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
        self._deliveries = deliveries or DeliverySettings()
        self._on_standings = on_standings
        self._parts = tuple(parts)
        self._chance = random.Random()
        self._epoch = b""
        self._leading = self._new_leading()
        self._hubs: dict[str, tuple[Attaching, asyncio.Task[None]]] = {}
        self._reporter = Reporter(
            archive, lambda: self._identity, self.sent, lambda: self._clock(), self.hub_clock_us,
            ae_title=ae_title, hold=settings.hold,
        )
        self._delivery: Delivery | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main_task: asyncio.Task[None] | None = None
        self._since_us: int | None = None
        self._stopped = "not started"

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
        """The result of `ask` over the channel of the hub that writes. Any thread may call it but the
        uplink's own. Raises Unavailable when there is none or no answer in time, else what the hub raised."""
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
        if (line := self._leading.lead) is None:
            raise Unavailable("the hub is away")
        try:
            return await ask(line.channel)
        except grpc.aio.AioRpcError as error:
            raise errors_on_the_wire.restored(error) from None
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:  # the channel was closed
            raise_if_ours(error)
            raise Unavailable("the hub is away") from None

    def status(self) -> UplinkStatus:
        """How it stands now. Any thread may ask."""
        rate, line = self._reporter.bytes_per_s, self._leading.lead
        if line is not None:
            return UplinkStatus(True, line.hub, self._since_us, "", rate)
        hubs = [hub for hub, _ in list(self._hubs.values())]
        address = hubs[0].address if hubs else next(iter(self._own_addresses()), "")
        return UplinkStatus(False, address, None, self._stopped or self._why(hubs), rate)

    def _why(self, hubs: Sequence[Attaching]) -> str:
        if not self._own_addresses():
            return NO_HUB
        if self._leading.any_standing:
            return "the hub that answers stands by, and the one that writes is away"
        return "; ".join(dict.fromkeys(hub.reason for hub in hubs if hub.reason)) or NOT_YET

    def responds(self, timeout_s: float) -> bool:
        """Whether its event loop comes to what it is given. Any thread may ask."""
        loop = self._loop
        if loop is None or self._thread is None:
            return False
        came = threading.Event()
        try:
            loop.call_soon_threadsafe(came.set)
        except RuntimeError:  # the loop has ended
            return False
        return came.wait(timeout_s)

    def sent(self) -> Sent:
        """What went over the line since the start. Any thread may ask."""
        delivery = self._delivery
        return Sent() if delivery is None else Sent(delivery.bytes_sent, delivery.wire_bytes)

    @property
    def identity(self) -> Identity:
        """Who this node is, by the certificate that is in use now."""
        return self._identity

    @property
    def policy(self) -> RegionPolicy | None:
        """What the region laid down last, also while no hub is there; None when none said anything since the
        start. Any thread may ask."""
        return self._leading.policy

    def hub_clock_us(self) -> int:
        """The region's time, as far as it is known here. Any thread may ask."""
        return self._leading.hub_clock_us()

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
                    self._stopped = "it ended by an error and will start again; see the log"
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
        self._leading, known = self._new_leading(), self._leading.policy
        self._leading.policy = known
        self._hubs = {}
        self._delivery = self._new_delivery()
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
        self._stopped = ""
        self._ready.set()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._delivery.run())
                group.create_task(self._taking.run())
                for part in self._parts:
                    group.create_task(part.run())
                group.create_task(self._watch())
                group.create_task(self._attach_to_each(group))
        finally:
            await asyncio.to_thread(renewal.stop)
            await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)
            self._stopped = "stopped"

    def _new_delivery(self) -> Delivery:
        settings = self.settings
        limits = Limits(
            window=settings.window,
            offer_items=settings.offer_items,
            tries_max=settings.tries_max,
            backoff_first_s=settings.backoff_first_s,
            backoff_cap_s=settings.backoff_cap_s,
        )
        delivery = Delivery(
            self._archive,
            Replicator(self._identity.ward, limits, self._chance, hold=settings.hold),
            self._pool,
            self._clock,
            settings,
            on_recorded=self._recorded,
            open_channel=lambda address: channel(self._identity, address),
        )
        delivery.line_down()
        return delivery

    # The hubs.

    def _own_addresses(self) -> tuple[str, ...]:
        """The hubs that this node was given: that of the settings, else those of the invite."""
        return (self.settings.hub_address,) if self.settings.hub_address else self._identity.hub_addresses

    def _new_leading(self) -> Leading:
        return Leading(self._own_addresses, self._line_up, self._line_down, lambda: self._clock())

    async def _attach_to_each(self, group: asyncio.TaskGroup) -> None:
        """Keeps one attach going for each hub that is known of."""
        settings = self.settings
        node = NodeSide(
            archive=self._archive,
            identity=lambda: self._identity,
            pool=self._pool,
            audit=self._audit,
            greet=self._greet,
            make_report=self._make_report,
            on_urgent=self._urgent,
            told=self._taking.told,
            come=self._come,
        )
        while True:
            known = self._leading.addresses()
            if not known:
                log.error(NO_HUB)
            for address in known:
                if address not in self._hubs:
                    backoff = Backoff(settings.backoff_first_s, settings.backoff_cap_s, self._chance)
                    hub = Attaching(address, node, self._leading, backoff)
                    self._hubs = {**self._hubs, address: (hub, group.create_task(hub.run()))}
            for address in self._hubs.keys() - set(known):
                self._hubs[address][1].cancel()
                self._hubs = {other: hub for other, hub in self._hubs.items() if other != address}
            await self._leading.changed()

    def _line_up(self, line: Line) -> None:
        assert self._delivery is not None
        self._since_us = self._clock()
        self._delivery.line_up(line)
        self._taking.line_up(line.channel)
        for part in self._parts:
            part.line_up(line)

    def _line_down(self) -> None:
        assert self._delivery is not None
        self._delivery.line_down()
        self._taking.line_down()
        for part in self._parts:
            part.line_down()

    def _come(self, come: uplink_pb2.Come) -> None:
        for part in self._parts:
            part.come(come)

    def _greet(self) -> bytes:
        self._epoch = self._archive.epoch
        return self._epoch

    # Reports.

    async def _make_report(self) -> Report:
        return await self._in_pool(self._reporter.make)

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
            if self._leading.any_standing and self._archive.epoch != self._epoch:
                self._attach_anew()  # the first pack of a new disk: the hubs have to know it by its name
            await asyncio.sleep(self.settings.poll_s)

    def _woken(self) -> None:
        if self._delivery is not None:
            self._delivery.woken()
        for hub, _ in self._hubs.values():
            hub.report_now(if_drained=True)

    def _urgent(self) -> None:
        if self._delivery is not None:
            self._delivery.woken(urgent=True)

    def _recorded(self) -> None:
        if self._delivery is not None and self._delivery.drained:
            for hub, _ in self._hubs.values():
                hub.report_now()

    def _attach_anew(self) -> None:
        for hub, _ in self._hubs.values():
            hub.anew()

    # Certificates.

    def _renew(self, identity: Identity) -> Identity:
        addresses = tuple(self._leading.addresses())
        return renew(
            replace(identity, assignment=replace(identity.assignment, hub_addresses=addresses)),
            clock=self._clock,
        )

    def _renewed_in_thread(self, identity: Identity) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._renewed, identity)

    def _renewed(self, identity: Identity) -> None:
        self._identity = identity
        self._attach_anew()

    def _in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))
