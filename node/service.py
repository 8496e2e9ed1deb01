"""Owns the node as one process: who it is, its signals and limits, how it starts, serves and ends. What it is
composed of is `composition.py`'s."""

from __future__ import annotations

import logging
import resource
import signal
import threading
from contextlib import ExitStack
from queue import SimpleQueue
from types import FrameType
from typing import Self

from archive.archive import Archive
from archive.collecting import collect_seldom
from archive.errors import SettingsError
from archive.ledger import Ledger
from certs import identity as identities
from certs.identity import Identity
from certs.profiles import Profile
from federation.uplink import Uplink
from monitoring import tracing
from node.composition import Parts, running
from node.settings import NodeSettings

log = logging.getLogger(__name__)

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
        self._running = ExitStack()
        self._parts: Parts | None = None
        self.identity: Identity

    @property
    def archive(self) -> Archive:
        return self._started.archive

    @property
    def ledger(self) -> Ledger:
        return self._started.ledger

    @property
    def uplink(self) -> Uplink | None:
        """None when the settings have none."""
        return self._started.uplink

    @property
    def dicom_port(self) -> int:
        return self._started.server.port

    @property
    def dicom_tls_port(self) -> int | None:
        """None when there is no listener for TLS."""
        return self._started.server.tls_port

    @property
    def _started(self) -> Parts:
        if self._parts is None:
            raise RuntimeError("the node is not started")
        return self._parts

    def start(self) -> Self:
        """Open everything and listen. Raises SettingsError when the node is not enrolled."""
        settings = self.settings
        settings.check()
        self.identity = load_identity(settings)
        _allow_descriptors(settings.dimse.associations_max * DESCRIPTORS_EACH + DESCRIPTORS_BESIDE)
        self._parts = self._running.enter_context(running(settings, self.identity))
        server = self._parts.server
        also = "" if server.tls_port is None else f", TLS on {server.tls_port}"
        log.info("%s listens as %s on %s:%d%s", self.identity.ward, settings.dimse.ae_title,
                 settings.dimse.host, server.port, also)
        self.ready.set()
        return self

    def stop(self) -> None:
        """Answer what is under way, then close everything; a second call does nothing."""
        self.ready.clear()
        self._end.put(None)
        self._running.close()

    def run(self) -> None:
        """Start, serve until SIGTERM or SIGINT, stop."""

        def end(signum: int, frame: FrameType | None) -> None:
            self._end.put(None)

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            tracing.start(self.settings.tracing, "miss-node")
            with self:
                collect_seldom()
                self._end.get()
                log.info("stopping")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            tracing.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


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
