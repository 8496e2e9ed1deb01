"""The hub: the one process that the region's nodes and portals dial. It composes the regional archive and
ledger, the gate, and the services of `uplink_service.py`, `region_service.py` and `certs/reissue.py`, and
has the enrolment port beside them. It dials nobody, and holds nothing that its archive and ledger do not:
kill it at any point.

Its event loop runs in a thread of its own, so that a process, a demo and a test start and stop it alike.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from queue import SimpleQueue
from types import TracebackType

import grpc
import grpc.aio

from archive.archive import Archive
from archive.errors import MissError, SettingsError, Unavailable
from archive.handlers import handlers_of
from archive.ledger import Ledger, WardState
from archive.orders import OrderDesk
from certs.authority import Authority, clock_us, hub_identity
from certs.credentials import SERVER_OPTIONS, server_credentials
from certs.enrolment import EnrolmentServer
from certs.gate import Gate
from certs.identity import Identity
from certs.reissue import CertificatesServicer
from certs.renewal import RenewalThread
from federation.arrivals import Arrivals
from federation.asking import WardAsking
from federation.attachments import Attachments
from federation.coverage import departed
from federation.deliveries_desk import DeliveryDesk
from federation.deliveries_grants import DeliveryGrants
from federation.deliveries_service import DeliveriesService
from federation.laying_down import Rules, tell_for_ever
from federation.pools import Pools
from federation.receiving import Receiver
from federation.region_service import RegionService
from federation.restoring_service import RestoreService
from federation.settings import HubSettings
from federation.uplink_service import UplinkService
from federation.version import software_version
from federation.window_service import WindowService
from protos import (
    delivery_pb2_grpc,
    region_pb2_grpc,
    restore_pb2_grpc,
    uplink_pb2_grpc,
    window_pb2_grpc,
)

log = logging.getLogger(__name__)

START_WAIT_S = 60.0


class Hub:
    """The hub's process, as an object with a start and a stop."""

    def __init__(self, settings: HubSettings, *, clock: Callable[[], int] = clock_us) -> None:
        self.settings = settings
        self._clock = clock
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._failure: Exception | None = None
        self._grace_s = settings.stop_grace_s
        self.port = 0
        self.enrolment_port = 0

    @property
    def address(self) -> str:
        """Where the hub can be dialled from this machine."""
        host = self.settings.host
        return f"{'127.0.0.1' if host in ('0.0.0.0', '', '::') else host}:{self.port}"

    def start(self) -> None:
        """Starts and returns when the hub takes calls; raises what kept it from starting."""
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_WAIT_S):
            raise Unavailable(f"the hub did not start within {START_WAIT_S:g} s")
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self, grace_s: float | None = None) -> None:
        """Ends the attaches, lets open calls end within the grace, and closes everything."""
        if grace_s is not None:
            self._grace_s = grace_s
        loop, stopping = self._loop, self._stopping
        if self._thread is None or loop is None or stopping is None:
            return
        loop.call_soon_threadsafe(stopping.set)
        self._thread.join()
        self._thread = None

    def run(self) -> None:
        """Runs until SIGINT or SIGTERM."""
        ended = SimpleQueue[None]()  # no Event: the thread that a handler interrupts may hold its lock
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.put(None))
        self.start()
        try:
            ended.get()
        finally:
            self.stop()

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:
            if self._ready.is_set():
                log.exception("the hub ended")
            self._failure = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        settings = self.settings
        settings.state.mkdir(parents=True, exist_ok=True)
        authority = Authority.open(settings.ca, clock=self._clock)
        identity = self._identity()
        ledger = await asyncio.to_thread(Ledger.open, settings.ledger)
        archive = await asyncio.to_thread(Archive.open, settings.archive_settings(), outbox=False)
        pools = Pools(settings.workers, self._clock)
        desk = OrderDesk(ledger, handlers_of(archive))
        desk.start()
        try:
            await self._serve(authority, identity, ledger, archive, pools)
        finally:
            await asyncio.to_thread(pools.shutdown)
            await asyncio.to_thread(desk.stop)
            await asyncio.to_thread(archive.close)
            ledger.close()

    async def _serve(
        self, authority: Authority, identity: Identity, ledger: Ledger, archive: Archive, pools: Pools
    ) -> None:
        settings = self.settings

        async def keep(state: WardState) -> None:
            await pools.ledger(ledger.put_ward_state, state)

        attachments = Attachments(await _all_away(ledger, pools), keep, self._clock)
        arrivals, version = Arrivals(), software_version()
        rules = Rules(archive, self._clock)
        uplinks = UplinkService(
            settings, attachments, Receiver(archive, self._clock), arrivals, pools, version, rules
        )
        asking = WardAsking(settings, attachments, arrivals, archive, pools)
        windows = WindowService(settings, asking, archive, ledger, identity, pools)
        regions = RegionService(asking, attachments, ledger, identity.roots_pem, pools, version)
        certificates = CertificatesServicer(
            authority, ledger, life_s=settings.enrolment.certificate_life_s, clock=self._clock
        )
        desk = DeliveryDesk(archive, ledger, DeliveryGrants.of(settings.deliveries), self._clock)
        deliveries = DeliveriesService(desk, attachments, arrivals, pools)
        gate = Gate(ledger, clock=self._clock)
        server = grpc.aio.server(interceptors=[gate], options=SERVER_OPTIONS)
        uplink_pb2_grpc.add_UplinkServicer_to_server(uplinks, server)
        region_pb2_grpc.add_RegionServicer_to_server(regions, server)
        window_pb2_grpc.add_WindowServicer_to_server(windows, server)
        delivery_pb2_grpc.add_DeliveriesServicer_to_server(deliveries, server)
        restore_pb2_grpc.add_RestoreServicer_to_server(RestoreService(archive, pools), server)
        uplink_pb2_grpc.add_CertificatesServicer_to_server(certificates, server)
        self.port = self._bind(server, identity)
        async with AsyncExitStack() as parts:
            await gate.start()
            parts.push_async_callback(gate.stop)
            parts.callback(windows.stop)
            deliveries.start()
            parts.push_async_callback(deliveries.stop)
            await server.start()
            parts.push_async_callback(self._stop_serving, server, attachments, uplinks)
            telling = asyncio.create_task(tell_for_ever(rules, attachments))
            parts.callback(telling.cancel)
            enrolment = EnrolmentServer(authority, ledger, identity, settings.enrolment, clock=self._clock)
            await enrolment.start()
            parts.push_async_callback(enrolment.stop)
            renewal = RenewalThread(identity, renew=lambda _: self._identity(), clock=self._clock)
            renewal.start()
            parts.push_async_callback(asyncio.to_thread, renewal.stop)
            self.enrolment_port = enrolment.port
            region, ports = authority.region, (self.port, self.enrolment_port)
            log.info("the hub of %s takes calls on port %d, invites on %d", region, *ports)
            self._ready.set()
            assert self._stopping is not None
            await self._stopping.wait()

    async def _stop_serving(
        self, server: grpc.aio.Server, attachments: Attachments, uplinks: UplinkService
    ) -> None:
        stopped = asyncio.create_task(server.stop(self._grace_s))  # takes no new calls from here on
        await asyncio.sleep(0)
        attachments.end_all("the hub stops")
        uplinks.stop()
        await stopped

    def _bind(self, server: grpc.aio.Server, identity: Identity) -> int:
        host, port = self.settings.host, self.settings.port
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            return server.add_secure_port(place, server_credentials(identity))
        except RuntimeError:  # gRPC's only word for it
            raise SettingsError(f"host, port: {place} can't be had") from None

    def _identity(self) -> Identity:
        settings = self.settings
        return hub_identity(
            settings.ca,
            settings.state / "identity",
            name=settings.name,
            life_s=settings.enrolment.certificate_life_s,
            clock=self._clock,
        )


async def _all_away(ledger: Ledger, pools: Pools) -> dict[str, WardState]:
    """The ward states of the ledger. Whoever the last hub left attached is not attached to this one."""
    states = await pools.ledger(ledger.ward_states)
    away = {ward: departed(state) for ward, state in states.items()}
    for ward, state in away.items():
        if state != states[ward]:
            try:
                await pools.ledger(ledger.put_ward_state, state)
            except MissError as error:
                log.error("the state of %s can't be kept: %s", ward, error)
    return away
