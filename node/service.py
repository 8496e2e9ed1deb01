"""Owns the node as one process: it composes archive, ledger, DICOM listener and uplink, starts them in the
order in which they need each other and stops them in the other. It holds no logic of theirs."""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import signal
import threading
from queue import SimpleQueue
from types import FrameType
from typing import Self

from archive.archive import Archive
from archive.errors import SettingsError
from archive.handlers import handlers_of
from archive.ledger import Ledger
from archive.orders import OrderDesk
from certs import identity as identities
from certs.identity import Identity
from certs.profiles import Profile
from federation.deliveries import Deliveries
from federation.uplink import Uplink
from federation.window import RegionWindow
from node.admission import Admission
from node.availability import AvailabilityScu
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
from node.dimse.services.store import Store
from node.dimse.services.suboperations import Turns
from node.dimse.services.worklist import WorklistFind
from node.dimse.tls import ClientCertificates, Listener, TlsFiles
from node.forwarding import Forwarder
from node.routing.orders import RouteOrders
from node.routing.senders import Senders
from node.routing.service import Routing
from node.settings import NodeSettings, TlsSettings
from node.users import UserCheck, UserPolicy
from node.worklistfolder import WorklistFolder
from node.worklistkeeper import WorklistKeeper

log = logging.getLogger(__name__)

GC_THRESHOLDS = (20_000, 20, 50)
DESCRIPTORS_EACH = 4      # a socket, and while an association stores, its thread's view of the index
DESCRIPTORS_BESIDE = 512  # of packs, databases and the uplink


class Node:
    """A running ward node. `ready` is set when it listens; `dicom_port` is what was bound."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.ready = threading.Event()
        # A signal handler may not set an Event: it would wait for ever for the lock that the very thread it
        # interrupted holds. It may put into a SimpleQueue.
        self._end: SimpleQueue[None] = SimpleQueue()
        self._parts = contextlib.ExitStack()
        self._server: DimseServer | None = None
        self.archive: Archive
        self.ledger: Ledger
        self.identity: Identity
        self.uplink: Uplink | None = None
        self.payloads: Payloads
        self.window: RegionWindow | None = None
        self.commitment: StorageCommitment
        self.routing: Routing

    @property
    def dicom_tls_port(self) -> int | None:
        """None when there is no listener for TLS."""
        return None if self._server is None else self._server.tls_port

    @property
    def dicom_port(self) -> int:
        if self._server is None:
            raise RuntimeError("the node is not started")
        return self._server.port

    def start(self) -> Self:
        """Open everything and listen. Raises SettingsError when the node is not enrolled."""
        settings = self.settings
        settings.check()
        ae_title = settings.require_ae_title()
        self.identity = load_identity(settings)
        _allow_descriptors(settings.dimse.associations_max * DESCRIPTORS_EACH + DESCRIPTORS_BESIDE)
        with contextlib.ExitStack() as parts:
            self.ledger = Ledger.open(settings.ledger_url)
            parts.callback(self.ledger.close)
            self.archive = Archive.open(settings.archive_settings(), outbox=True)
            parts.callback(self.archive.close)
            if settings.uplink.enabled:
                self.uplink = Uplink(self.archive, self.identity, settings.uplink, ae_title=ae_title,
                                     audit=self.ledger.audit, deliveries=settings.deliveries,
                                     on_standings=self.ledger.note_standings)
                self.window = self._window(self.uplink)
                parts.callback(self.window.close)
            self.completion = self._completion()
            self.payloads = Payloads(self.archive, self.window,
                                     decoded_bytes_max=settings.retrieve.decoded_bytes_max)
            parts.callback(self.payloads.close)
            self.commitment = self._commitment(ae_title)
            self.commitment.start()
            parts.callback(self.commitment.stop)
            self.routing = self._routing(ae_title)
            self.routing.start()
            parts.callback(self.routing.stop)
            self.completion.subscribe(
                lambda done: self.routing.study_done(done.study_uid, done.why, done.at_us))
            self.completion.start()
            parts.callback(self.completion.stop)
            keeper = self._worklist_keeper()
            keeper.start()
            parts.callback(keeper.stop)
            desk = OrderDesk(self.ledger, handlers_of(self.archive) | self._route_orders().handlers())
            desk.start()
            parts.callback(desk.stop)
            gate = self._gate(ae_title)
            parts.callback(gate.close)
            server = self._listen(ae_title, gate)
            parts.callback(server.stop, settings.dimse.stop_grace_s)
            if self.uplink is not None:
                self.uplink.start()
                parts.callback(self.uplink.stop)
            server.start()
            self._server = server
            self._parts = parts.pop_all()
        also = "" if server.tls_port is None else f", TLS on {server.tls_port}"
        log.info("%s listens as %s on %s:%d%s", self.identity.ward, ae_title, settings.dimse.host,
                 server.port, also)
        self.ready.set()
        return self

    def stop(self) -> None:
        """Answer what is under way, then close everything; a second call does nothing."""
        self.ready.clear()
        self._end.put(None)
        self._parts.close()

    def run(self) -> None:
        """Start, serve until SIGTERM or SIGINT, stop."""

        def end(signum: int, frame: FrameType | None) -> None:
            self._end.put(None)

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with self:
                # What was made so far stays: looking at it for cycles again and again, as often as small
                # objects come and go here, seemed to cost 5 to 8 % of the rate of small instances.
                gc.freeze()
                gc.set_threshold(*GC_THRESHOLDS)
                self._end.get()
                log.info("stopping")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _routing(self, ae_title: str) -> Routing:
        settings, ward = self.settings, self.identity.ward
        destinations = Destinations(self.ledger, settings.dimse.tls, self.identity.current_roots_path)
        senders = Senders(
            self.archive, self._forwarder(ae_title),
            AvailabilityScu(destinations, ae_title), deliveries=self._deliveries(),
            commitment=self.commitment.scu,
            steps_of=lambda uid: [step for step, _ in self.ledger.performed_of([uid]).get(uid, ())])
        return Routing(self.archive, self.ledger, ward, settings.routing, settings.routes_path, senders)

    def _deliveries(self) -> Deliveries | None:
        """Without an uplink nothing can be handed to another ward."""
        return None if self.uplink is None else Deliveries(self.archive, self.identity.ward, self.uplink)

    def _route_orders(self) -> RouteOrders:
        settings = self.settings
        return RouteOrders(self.archive, self.ledger, self.identity.ward, settings.routes_path,
                           settings.routing.queue_max, self.routing.changed)

    def _commitment(self, ae_title: str) -> StorageCommitment:
        settings = self.settings
        offer = Offer(settings.dimse.accept_private_classes)
        return StorageCommitment(
            self.archive, self.ledger,
            Destinations(self.ledger, settings.dimse.tls, self.identity.current_roots_path),
            settings.commitment, settings.limits(), ae_title=ae_title, ward=self.identity.ward,
            by_region=settings.commits_by_region,
            takes_class=lambda uid: offer.service(uid) is ServiceName.STORE,
            on_request=self.completion.commitment_asked)

    def _completion(self) -> Completion:
        settings = self.settings.completion
        return Completion(self.archive, self.ledger, quiet_s=settings.quiet_s,
                          step_timeout_s=settings.step_timeout_s)

    def _worklist_keeper(self) -> WorklistKeeper:
        settings = self.settings.worklist
        folder = None if settings.folder is None else WorklistFolder(settings.folder, self.ledger)
        return WorklistKeeper(self.ledger, folder, poll_s=settings.folder_poll_s,
                              keep_days=settings.keep_days, performed_keep_days=settings.performed_keep_days)

    def _worklist(self) -> dict[tuple[ServiceName, int], Service]:
        settings = self.settings.worklist
        steps = PerformedSteps(self.ledger, self.completion.performed)
        find = WorklistFind(self.ledger, self.identity.ward, settings.responses_max, settings.own_steps_only)
        return {(ServiceName.WORKLIST, Field.C_FIND): find,
                **{(ServiceName.MPPS, field): steps for field in (Field.N_CREATE, Field.N_SET, Field.N_GET)}}

    def _window(self, uplink: Uplink) -> RegionWindow:
        settings = self.settings
        return RegionWindow(
            uplink, settings.state, settings.window, free_bytes=self.archive.free_bytes,
            free_bytes_min=settings.archive.free_bytes_min, audit=self.ledger.audit)

    def _forwarder(self, ae_title: str) -> Forwarder:
        settings = self.settings
        return Forwarder(
            self.archive, Destinations(self.ledger, settings.dimse.tls, self.identity.current_roots_path),
            ae_title, ward=self.identity.ward, payloads=self.payloads, limits=settings.limits(),
            window=settings.retrieve.window, associations=settings.retrieve.associations)

    def _retrieve(self, ae_title: str) -> dict[tuple[ServiceName, int], Service]:
        settings = self.settings.retrieve
        selection = Selection(self.archive, self.identity.ward, self.identity.issuer, self.window)
        turns = Turns(settings.at_once_max, settings.per_device_max, settings.wait_s)
        return {(ServiceName.RETRIEVE, Field.C_MOVE): Move(selection, self._forwarder(ae_title), turns),
                (ServiceName.RETRIEVE, Field.C_GET): Get(selection, self.payloads, turns)}

    def _gate(self, ae_title: str) -> Admission:
        dimse = self.settings.dimse
        return Admission(
            self.ledger, ae_title, associations_max=dimse.associations_max,
            associations_per_device_max=dimse.associations_per_device_max, region=self.identity.region,
            ward=self.identity.ward, certificates_required=dimse.tls.client_certificates == "require",
            users=UserCheck(self.ledger, UserPolicy(dimse.user_identity)),
        )

    def _listen(self, ae_title: str, gate: Admission) -> DimseServer:
        dimse, ward = self.settings.dimse, self.identity.ward
        offer = Offer(dimse.accept_private_classes, frozenset((ServiceName.STORE, ServiceName.COMMIT)))
        services = Services(offer, {
            (ServiceName.ECHO, Field.C_ECHO): Echo(),
            (ServiceName.STORE, Field.C_STORE): Store(self.archive.intake, ward, self.identity.issuer),
            (ServiceName.FIND, Field.C_FIND): Find(self.archive, ward, ae_title, dimse.find_responses_max,
                                                      self.window),
            **self._retrieve(ae_title),
            **self.commitment.services,
            **self._worklist(),
        })
        try:
            return DimseServer(dimse.host, dimse.port, gate, services, self.settings.limits(),
                               tls=tls_listener(self.settings.dimse.tls, self.identity),
                               pending_per_address_max=dimse.connections_per_address_max)
        except PortTaken as taken:
            setting = "dimse.port" if taken.port == dimse.port else "dimse.tls.port"
            raise SettingsError(f"dimse.host, {setting}: {dimse.host}:{taken.port} can't be had "
                                f"({taken.strerror})") from None


def tls_listener(tls: TlsSettings, identity: Identity) -> tuple[int, Listener] | None:
    """The port for DICOM over TLS and its files; None when there is to be none."""
    if not tls.enabled or tls.certificate is None or tls.key is None:
        return None
    files = TlsFiles(tls.certificate, tls.key, tls.trust or identity.current_roots_path)
    try:
        return tls.port, Listener(files, ClientCertificates(tls.client_certificates))
    except SettingsError as error:
        raise SettingsError(f"dimse.tls: {error}") from None


def load_identity(settings: NodeSettings) -> Identity:
    """Who this node is: the ward and the issuer of its Patient IDs come from its certificate's folder."""
    if not identities.exists(settings.identity):
        raise SettingsError(f"{settings.identity} holds no certificate: this node belongs to no region yet; "
                            "enrol it with `miss node enrol INVITE`")
    identity = Identity.load(settings.identity)
    if identity.profile is not Profile.NODE or not identity.ward:
        raise SettingsError(f"{settings.identity} is not the identity of a node")
    return identity


def _allow_descriptors(count: int) -> None:
    """Raise the soft limit, which is often 1,024: every association is a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < count:
        log.warning("only %d open files are allowed: associations beyond them are not taken", wanted)
