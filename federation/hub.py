"""The hub: a process that the region's nodes and portals dial. It has the gate, the attaches and the
enrolment port; the one of them that holds the lock of the regional store has the archive and the services
over it as well (`federation/hub_writer.py`), and the others, set up as standby, wait for that lock. A hub
dials nobody, and holds nothing that its archive and ledger do not: kill it at any point.

Its event loop runs in a thread of its own, so that a process, a demo and a test start and stop it alike.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from queue import SimpleQueue
from types import TracebackType

import grpc
import grpc.aio

from archive.archive import Archive, lock_state
from archive.collecting import collect_seldom
from archive.errors import MissError, SettingsError, Unavailable
from archive.ledger import Ledger, WardState
from certs.authority import Authority, clock_us, hub_identity
from certs.credentials import SERVER_OPTIONS, server_credentials
from certs.enrolment import EnrolmentServer
from certs.gate import Gate
from certs.identity import Identity
from certs.profiles import slug
from certs.reissue import CertificatesServicer
from certs.renewal import RenewalThread
from federation.attach_service import ATTACH, AttachService, attach_handler
from federation.attachments import Attachments
from federation.coverage import departed
from federation.hub_metrics import HubMetrics, HubWatched
from federation.hub_writer import HubWriter, Standing
from federation.laying_down import Rules, tell_for_ever
from federation.methods import STANDS_BY, Methods
from federation.pools import Pools
from federation.protection import Protection
from federation.settings import HubSettings
from federation.version import software_version
from federation.watched_calls import WatchedCalls
from monitoring import tracing
from monitoring.server import MonitoringServer
from protos import uplink_pb2_grpc

log = logging.getLogger(__name__)

START_WAIT_S = 60.0
LOOK_S = 0.25  # how often a hub that stands by tries for the writer's lock
OPEN_AGAIN_S = 2.0


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
        self._writer: HubWriter | None = None
        self._grace_s = settings.stop_grace_s
        self.port = 0
        self.enrolment_port = 0
        self.monitoring_port = 0

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
        tracing.start(self.settings.tracing, "miss-hub")
        try:
            self.start()
            collect_seldom()
            try:
                ended.get()
            finally:
                self.stop()
        finally:
            tracing.stop()

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
        settings.check()
        settings.state.mkdir(parents=True, exist_ok=True)
        authority = Authority.open(settings.ca, clock=self._clock)
        identity = self._identity_now = self._identity()
        self._ledger = await asyncio.to_thread(Ledger.open, settings.ledger)
        self._pools = Pools(settings.workers, self._clock)
        try:
            archive = await asyncio.to_thread(self._open_archive)
            await self._serve(authority, identity, archive)
        finally:
            await asyncio.to_thread(self._pools.shutdown)
            if self._writer is not None:
                await self._writer.close()
                self._writer = None
            self._ledger.close()

    async def _serve(self, authority: Authority, identity: Identity, archive: Archive | None) -> None:
        settings, ledger, version = self.settings, self._ledger, software_version()
        protection = Protection(ledger, settings.protection, self._clock)
        self._rules = Rules(
            self._clock, settings.addresses, protected_to_us=protection.protected_to_us
        )
        self._attachments = Attachments({}, self._keep, self._clock)
        attaching = AttachService(settings, self._attachments, self._rules, version)
        self._standing = Standing(
            settings, ledger, identity, self._pools, self._attachments, attaching, self._clock, version
        )
        self._methods = Methods()
        self._methods.add(ATTACH, attach_handler(attaching))
        certificates = CertificatesServicer(
            authority, ledger, life_s=settings.enrolment.certificate_life_s, clock=self._clock
        )
        uplink_pb2_grpc.add_CertificatesServicer_to_server(certificates, self._methods.server)
        gate = Gate(ledger, clock=self._clock)
        watched = WatchedCalls()
        server = grpc.aio.server(interceptors=[gate, watched], options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((self._methods,))
        if archive is not None:
            await self._write(archive)
        self.port = self._bind(server, identity)
        async with AsyncExitStack() as parts:
            await gate.start()
            parts.push_async_callback(gate.stop)
            parts.push_async_callback(self._stop_writer)
            await server.start()
            parts.push_async_callback(self._stop_serving, server)
            watching = asyncio.create_task(protection.watch(self._pools))
            parts.callback(watching.cancel)
            telling = asyncio.create_task(tell_for_ever(self._rules, self._attachments))
            parts.callback(telling.cancel)
            enrolment = EnrolmentServer(authority, ledger, identity, settings.enrolment, clock=self._clock)
            await enrolment.start()
            parts.push_async_callback(enrolment.stop)
            renewal = RenewalThread(identity, renew=lambda _: self._renewed(), clock=self._clock)
            renewal.start()
            parts.push_async_callback(asyncio.to_thread, renewal.stop)
            self.enrolment_port = enrolment.port
            region, ports = authority.region, (self.port, self.enrolment_port)
            log.info("the hub of %s takes calls on port %d, invites on %d", region, *ports)
            if settings.monitoring.enabled:
                await self._show(parts, watched, gate, identity)
            if archive is None:
                log.warning("%s; it waits for the store of %s", STANDS_BY, region)
                taking_over = asyncio.create_task(self._take_over())
                parts.push_async_callback(self._end_waiting, taking_over)
            self._ready.set()
            await self._stopping_event.wait()

    async def _show(
        self, parts: AsyncExitStack, watched: WatchedCalls, gate: Gate, identity: Identity
    ) -> None:
        """Metrics, health and readiness, from a thread of their own."""
        monitoring = self.settings.monitoring
        seen = HubMetrics(
            HubWatched(
                asyncio.get_running_loop(), self._ledger, lambda: self._writer, watched, gate,
                certificate_until_us=lambda: self._identity_now.not_after_us, clock=self._clock,
            ),
            monitoring.read_every_s,
        )  # fmt: skip
        server = await asyncio.to_thread(MonitoringServer, monitoring, seen)
        server.start()
        self.monitoring_port = server.port
        parts.push_async_callback(asyncio.to_thread, server.stop)

    # Who writes the region's store.

    @property
    def standing_by(self) -> bool:
        """Whether another hub writes the region's store."""
        return self._writer is None

    def _open_archive(self) -> Archive | None:
        """The region's archive to write; None for a hub that may stand by when another writes."""
        settings = self.settings
        if settings.standby:
            try:  # the lock alone first: what follows may change the index's schema
                os.close(lock_state(settings.state))
            except Unavailable:
                return None
        return Archive.open(settings.archive_settings(), outbox=False)

    async def _write(self, archive: Archive) -> None:
        """This hub is the one that writes from here on."""
        writer = self._writer = HubWriter(self._standing, archive)
        await self._attachments.take_over(await _all_away(self._ledger, self._pools))
        self._rules.archive = archive
        writer.start()
        writer.add_to(self._methods)

    async def _take_over(self) -> None:
        """Waits for the lock, which goes with the process that held it, and becomes the writer."""
        while not self._stopping_event.is_set():
            begun_s = time.monotonic()
            try:
                if (archive := await asyncio.to_thread(self._open_archive)) is not None:
                    await self._write(archive)
                    self._attachments.lay_down(self._rules.current())
                    log.warning("this hub writes the region's store now (%.2f s)", time.monotonic() - begun_s)
                    return
            except Exception:  # whatever it is: the next try may find it mended
                log.exception("the region's store is free, but can't be opened")
                await asyncio.sleep(OPEN_AGAIN_S)
            await asyncio.sleep(LOOK_S)

    async def _end_waiting(self, taking_over: asyncio.Task[None]) -> None:
        await taking_over  # not cancelled: it may be opening the archive, in a thread

    async def _keep(self, states: Sequence[WardState]) -> None:
        """Into the ledger, by the one hub that writes: one that stands by would note as away whom the other
        has attached."""
        if not self.standing_by:
            await self._pools.ledger(self._ledger.put_ward_states, states)

    @property
    def _stopping_event(self) -> asyncio.Event:
        assert self._stopping is not None
        return self._stopping

    async def _stop_serving(self, server: grpc.aio.Server) -> None:
        stopped = asyncio.create_task(server.stop(self._grace_s))  # takes no new calls from here on
        await asyncio.sleep(0)
        self._attachments.end_all("the hub stops")
        if self._writer is not None:
            self._writer.stop_taking()
        await stopped

    async def _stop_writer(self) -> None:
        if self._writer is not None:
            await self._writer.stop()

    def _bind(self, server: grpc.aio.Server, identity: Identity) -> int:
        host, port = self.settings.host, self.settings.port
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            return server.add_secure_port(place, server_credentials(identity))
        except RuntimeError:  # gRPC's only word for it
            raise SettingsError(f"host, port: {place} can't be had") from None

    def _renewed(self) -> Identity:
        self._identity_now = self._identity()
        return self._identity_now

    def _identity(self) -> Identity:
        settings = self.settings
        return hub_identity(
            settings.ca,
            # Each hub has its own key: one that may stand by shares the folder with others.
            settings.state / (f"identity-{slug(settings.name)}" if settings.standby else "identity"),
            name=settings.name,
            life_s=settings.enrolment.certificate_life_s,
            clock=self._clock,
        )


async def _all_away(ledger: Ledger, pools: Pools) -> dict[str, WardState]:
    """The ward states of the ledger. Whoever the last hub left attached is not attached to this one."""
    states = await pools.ledger(ledger.ward_states)
    away = {ward: departed(state) for ward, state in states.items()}
    changed = [state for ward, state in away.items() if state != states[ward]]
    try:
        await pools.ledger(ledger.put_ward_states, changed)
    except MissError as error:
        log.error("the states of the wards can't be kept: %s", error)
    return away
