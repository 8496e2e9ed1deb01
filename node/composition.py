"""Owns what a node is composed of: each part is made here, once, from the settings and from the parts it
needs, and shared by whoever else needs it; and the order in which they start. It has no logic of theirs and
knows nothing of the process: signals and limits are `service.py`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from archive.archive import Archive
from archive.backlog_orders import BacklogOrders
from archive.errors import SettingsError
from archive.handlers import handlers_of
from archive.ledger import Ledger
from archive.orders import OrderDesk
from archive.space.scrubber import Scrubber
from certs.identity import Identity
from federation import reconcile_orders
from federation.deliveries import Deliveries
from federation.facts_exchange import FactsExchange
from federation.facts_refusals import refusals_to
from federation.reconciling import Reconciling
from federation.restoring import Restoring
from federation.uplink import Uplink
from federation.window import RegionWindow
from monitoring.measures import Distribution
from monitoring.server import MonitoringServer
from node.admission import Admission
from node.availability import AvailabilityScu
from node.cache import Cache
from node.cache.rules import RulesFile
from node.commitment import StorageCommitment
from node.completion import Completion
from node.destinations import Destinations
from node.dimse.acceptor import Services
from node.dimse.contexts import Offer, ServiceName
from node.dimse.exchange import Service
from node.dimse.messages import Field
from node.dimse.payloads import Payloads
from node.dimse.server import DimseServer, PortTaken
from node.dimse.services.echo import Echo
from node.dimse.services.find import Find
from node.dimse.services.get import Get
from node.dimse.services.move import Move
from node.dimse.services.mpps import PerformedSteps
from node.dimse.services.retrieval import Selection
from node.dimse.services.store import Store, StoreMeasures
from node.dimse.services.suboperations import Turns
from node.dimse.services.worklist import WorklistFind
from node.dimse.tls import ClientCertificates, Listener, TlsFiles
from node.forwarding import Forwarder
from node.metrics import NodeMetrics, Watched
from node.routing.orders import RouteOrders
from node.routing.senders import Senders
from node.routing.service import Routing
from node.settings import NodeSettings, TlsSettings
from node.users import UserCheck, UserPolicy
from node.worklistfolder import WorklistFolder
from node.worklistkeeper import WorklistKeeper

Table = Mapping[tuple[ServiceName, int], Service]


@dataclass(frozen=True, slots=True)
class Parts:
    """A node's parts that somebody outside may ask."""

    ledger: Ledger
    archive: Archive
    uplink: Uplink | None  # None: this node belongs to no region for now, by its settings
    server: DimseServer


@contextmanager
def running(settings: NodeSettings, identity: Identity) -> Iterator[Parts]:
    """All parts, made and started; at the end what is under way is answered, and all is stopped and closed.

    Raises SettingsError when a port can't be had or a file of the settings does not fit, and what archive and
    ledger raise when they can't be opened; then nothing is left open or running."""
    with ExitStack() as held:
        making = _Making(settings, identity, held)
        ledger, archive, uplink, completion = making.ledger, making.archive, making.uplink, making.completion
        commitment = making.commitment()
        routing = making.routing(commitment)
        completion.subscribe(lambda done: routing.study_done(done.study_uid, done.why, done.at_us))
        worklist = making.worklist()
        cache = making.cache
        orders = making.orders(routing.changed)
        server = making.server(commitment.services)

        # Stopped in the other order, and closed after that in the other order of their making. Whoever feeds
        # others starts after them: the rules are read before anything completes a study, and all of them
        # look before devices and other wards send.
        def starts(start: Callable[[], object], stop: Callable[[], object]) -> None:
            held.callback(stop)  # a start that fails half way has something to stop
            start()

        starts(commitment.start, commitment.stop)
        starts(routing.start, routing.stop)
        starts(completion.start, completion.stop)
        starts(worklist.start, worklist.stop)
        starts(cache.start, cache.stop)
        if settings.scrub.enabled:
            starts(making.scrubber.start, making.scrubber.stop)
        starts(orders.start, orders.stop)
        if uplink is not None:
            starts(uplink.start, uplink.stop)
        starts(server.start, lambda: server.stop(settings.dimse.stop_grace_s))
        if settings.monitoring.enabled:
            monitoring = making.monitoring(server)
            starts(monitoring.start, monitoring.stop)
        yield Parts(ledger, archive, uplink, server)


class _Making:
    """Makes parts. Those that several others share are attributes; what each holds open, `held` closes."""

    def __init__(self, settings: NodeSettings, identity: Identity, held: ExitStack) -> None:
        self._settings = settings
        self._identity = identity
        self._held = held
        self._ae_title = settings.require_ae_title()
        self._limits = settings.limits()
        self.ledger = Ledger.open(settings.ledger_url)
        held.callback(self.ledger.close)
        self.archive = Archive.open(settings.archive_settings(), outbox=True)
        held.callback(self.archive.close)
        self._stores, self._finds = StoreMeasures(), Distribution()
        self.restoring = Restoring(self.archive, identity.ward, bytes_per_s=settings.cache.bring_bytes_per_s)
        self.reconciling = Reconciling(
            self.archive, identity.ward, settings.reconcile, restoring=self.restoring,
            policy=lambda: None if self.uplink is None else self.uplink.policy)
        self.scrubber = Scrubber(
            self.archive, interval_s=settings.scrub.interval_days * 86_400.0,
            bytes_per_s_max=settings.scrub.bytes_per_s_max,
            found=lambda _: self.reconciling.damage_found())
        self.uplink = self._uplink() if settings.uplink.enabled else None
        self._window = None if self.uplink is None else self._region(self.uplink)
        self.cache = self._cache(self.uplink)
        self._payloads = Payloads(self.archive, self._window, on_read=self.cache.read,
                                  decoded_bytes_max=settings.retrieve.decoded_bytes_max)
        held.callback(self._payloads.close)
        if self._window is not None:
            held.callback(self._window.close)  # before payloads are, which wait for what they fetch
        self._destinations = Destinations(self.ledger, settings.dimse.tls, identity.current_roots_path)
        self._forwarder = Forwarder(
            self.archive, self._destinations, self._ae_title, ward=identity.ward, payloads=self._payloads,
            limits=self._limits, window=settings.retrieve.window,
            associations=settings.retrieve.associations)
        self.completion = Completion(self.archive, self.ledger, quiet_s=settings.completion.quiet_s,
                                     step_timeout_s=settings.completion.step_timeout_s)

    def commitment(self) -> StorageCommitment:
        settings = self._settings
        offer = Offer(settings.dimse.accept_private_classes)
        return StorageCommitment(
            self.archive, self.ledger, self._destinations, settings.commitment, self._limits,
            ae_title=self._ae_title, ward=self._identity.ward, by_region=settings.commits_by_region,
            takes_class=lambda uid: offer.service(uid) is ServiceName.STORE,
            on_request=self.completion.commitment_asked)

    def routing(self, commitment: StorageCommitment) -> Routing:
        settings, ward = self._settings, self._identity.ward
        # Without an uplink nothing can be handed to another ward.
        deliveries = None if self.uplink is None else Deliveries(self.archive, ward, self.uplink)
        senders = Senders(
            self.archive, self._forwarder, AvailabilityScu(self._destinations, self._ae_title, self._limits),
            deliveries=deliveries, commitment=commitment.scu,
            steps_of=lambda uid: [step for step, _ in self.ledger.performed_of([uid]).get(uid, ())])
        return Routing(self.archive, self.ledger, ward, settings.routing, settings.routes_path, senders,
                       on_urgent=self._urgent)

    def _urgent(self) -> None:
        """Something is to be pushed before everything else."""
        if self.uplink is not None:
            self.uplink.ordered()

    def worklist(self) -> WorklistKeeper:
        settings = self._settings.worklist
        folder = None if settings.folder is None else WorklistFolder(settings.folder, self.ledger)
        return WorklistKeeper(self.ledger, folder, poll_s=settings.folder_poll_s,
                              keep_days=settings.keep_days, performed_keep_days=settings.performed_keep_days)

    def orders(self, routes_changed: Callable[[], None]) -> OrderDesk:
        settings = self._settings
        routes = RouteOrders(self.archive, self.ledger, self._identity.ward, settings.routes_path,
                             settings.routing.queue_max, routes_changed)
        mending = reconcile_orders.handlers_at_node(self.reconciling, self.scrubber)
        held = (lambda: False) if self.uplink is None else self.reconciling.held
        handlers = (mending | handlers_of(self.archive, self._identity.ward, held=held) | routes.handlers()
                    | self.cache.handlers()
                    | BacklogOrders(self.archive, self._identity.ward, self._urgent).handlers())
        return OrderDesk(self.ledger, handlers)

    def server(self, commitment: Table) -> DimseServer:
        """The listener, bound: PortTaken and what its TLS files say is a SettingsError."""
        dimse = self._settings.dimse
        offer = Offer(dimse.accept_private_classes, frozenset((ServiceName.STORE, ServiceName.COMMIT)))
        services = Services(offer, {**self._archive_services(), **self._worklist_services(), **commitment})
        tls = tls_listener(dimse.tls, self._identity)
        gate = self._gate()
        self._held.callback(gate.close)
        try:
            server = DimseServer(dimse.host, dimse.port, gate, services, self._limits, tls=tls,
                                 pending_per_address_max=dimse.connections_per_address_max)
        except PortTaken as taken:
            setting = "dimse.port" if taken.port == dimse.port else "dimse.tls.port"
            raise SettingsError(f"dimse.host, {setting}: {dimse.host}:{taken.port} can't be had "
                                f"({taken.strerror})") from None
        self._held.callback(server.stop, 0.0)  # it listens already, and something may fail before it starts
        return server

    def monitoring(self, server: DimseServer) -> MonitoringServer:
        settings = self._settings.monitoring
        watched = Watched(
            self.archive, self.ledger, self.uplink, server, self.scrubber, self.reconciling,
            stores=self._stores, finds=self._finds,
            certificate_until_us=self._certificate_until_us)
        return MonitoringServer(settings, NodeMetrics(watched, settings.read_every_s))

    def _certificate_until_us(self) -> int:
        """Of the one in use: an uplink renews it."""
        identity = self._identity if self.uplink is None else self.uplink.identity
        return identity.not_after_us

    def _archive_services(self) -> Table:
        dimse, retrieve = self._settings.dimse, self._settings.retrieve
        ward, issuer = self._identity.ward, self._identity.issuer
        selection = Selection(self.archive, ward, issuer, self._window)
        turns = Turns(retrieve.at_once_max, retrieve.per_device_max, retrieve.wait_s)
        find = Find(self.archive, ward, self._ae_title, dimse.find_responses_max, self._window,
                    seconds=self._finds)
        return {
            (ServiceName.ECHO, Field.C_ECHO): Echo(),
            (ServiceName.STORE, Field.C_STORE): Store(self.archive.intake, ward, issuer, self._stores),
            (ServiceName.FIND, Field.C_FIND): find,
            (ServiceName.RETRIEVE, Field.C_MOVE): Move(selection, self._forwarder, turns),
            (ServiceName.RETRIEVE, Field.C_GET): Get(selection, self._payloads, turns),
        }

    def _worklist_services(self) -> Table:
        settings = self._settings.worklist
        steps = PerformedSteps(self.ledger, self.completion.performed)
        find = WorklistFind(self.ledger, self._identity.ward, settings.responses_max, settings.own_steps_only)
        return {(ServiceName.WORKLIST, Field.C_FIND): find,
                **{(ServiceName.MPPS, field): steps for field in (Field.N_CREATE, Field.N_SET, Field.N_GET)}}

    def _gate(self) -> Admission:
        dimse, identity = self._settings.dimse, self._identity
        return Admission(
            self.ledger, self._ae_title, associations_max=dimse.associations_max,
            associations_per_device_max=dimse.associations_per_device_max, region=identity.region,
            ward=identity.ward, certificates_required=dimse.tls.client_certificates == "require",
            users=UserCheck(self.ledger, UserPolicy(dimse.user_identity)),
        )

    def _uplink(self) -> Uplink:
        settings = self._settings
        facts = FactsExchange(self.archive, self._identity.ward, refusals_to(self.ledger.audit))
        parts = (self.restoring, facts, self.reconciling)
        return Uplink(self.archive, self._identity, settings.uplink, ae_title=self._ae_title,
                      audit=self.ledger.audit, deliveries=settings.deliveries,
                      on_standings=self.ledger.note_standings, parts=parts)

    def _cache(self, uplink: Uplink | None) -> Cache:
        settings, identity = self._settings, self._identity
        return Cache(
            self.archive, self.ledger, settings.cache, RulesFile(settings.cache_rules_path),
            ward=identity.ward, issuer=identity.issuer,
            restoring=None if uplink is None else self.restoring, window=self._window,
            policy=lambda: None if uplink is None else uplink.policy,
            held=(lambda: False) if uplink is None else self.reconciling.held)

    def _region(self, uplink: Uplink) -> RegionWindow:
        settings = self._settings
        return RegionWindow(
            uplink, settings.state, settings.window, free_bytes=self.archive.free_bytes,
            free_bytes_min=settings.archive.free_bytes_min, audit=self.ledger.audit)


def tls_listener(tls: TlsSettings, identity: Identity) -> tuple[int, Listener] | None:
    """The port for DICOM over TLS and its files; None when there is to be none."""
    if not tls.enabled or tls.certificate is None or tls.key is None:
        return None
    files = TlsFiles(tls.certificate, tls.key, tls.trust or identity.current_roots_path)
    try:
        return tls.port, Listener(files, ClientCertificates(tls.client_certificates))
    except SettingsError as error:
        raise SettingsError(f"dimse.tls: {error}") from None
