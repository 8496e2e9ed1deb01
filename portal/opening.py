"""Opens what a portal reads: the region's archive, ledger and hub, or one node's archive and ledger.
Everything is opened to read but the ledger, and closed in order by the stack it is given."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from archive.archive import Archive, ArchiveSettings
from archive.database import sqlite_url
from archive.errors import SettingsError, Unavailable
from archive.ledger import Ledger
from archive.model import Ward
from certs.identity import Identity
from federation.bringing_orders import NodeReader
from federation.hub_channel import HubChannel
from federation.node_source import NodeSource
from federation.region_source import RegionSource
from federation.source import Source
from portal.settings import PortalSettings

log = logging.getLogger(__name__)

LEDGER_FILE = "ledger.db"
ARCHIVE_WAIT_S = 30.0
POLL_S = 0.25


@dataclass(frozen=True)
class Opened:
    """What `create_app` needs, and what the pages call the place."""

    source: Source
    ledger: Ledger
    site: str


def open_source(settings: PortalSettings, stack: ExitStack) -> Opened:
    """The source that the settings name: one node's when `node.state` is set, else the region's."""
    if settings.node.state is not None:
        return _open_node(settings, settings.node.state, stack)
    if settings.region.state is not None:
        return _open_region(settings, settings.region.state, stack)
    raise SettingsError("neither region.state nor node.state is set: there is nothing to show")


def _open_node(settings: PortalSettings, state: Path, stack: ExitStack) -> Opened:
    identity = Identity.load(settings.node.identity or state / "identity")
    ward = Ward(identity.ward, identity.hospital, identity.ward_name, identity.issuer)
    archive = _open_archive(ArchiveSettings(state=state), stack, outbox=True)
    ledger = _open_ledger(settings, state, stack)
    source = NodeSource(archive, ward, reader=NodeReader(archive, ledger))
    return Opened(source, ledger, f"{ward.hospital} {ward.name}, this ward alone")


def _open_region(settings: PortalSettings, state: Path, stack: ExitStack) -> Opened:
    if settings.region.identity is None:
        raise SettingsError("region.identity is not set: the portal shows a certificate to the hub")
    identity = Identity.load(settings.region.identity)
    archive = _open_archive(
        ArchiveSettings(state=state, index_url=settings.region.index_url), stack, outbox=False
    )
    ledger = _open_ledger(settings, state, stack)
    hub = stack.enter_context(HubChannel(identity, settings.region.hub_address))
    return Opened(RegionSource(archive, ledger, hub), ledger, f"{identity.certificate.member.region} region")


def _open_ledger(settings: PortalSettings, state: Path, stack: ExitStack) -> Ledger:
    return stack.enter_context(closing(Ledger.open(settings.ledger_url or sqlite_url(state / LEDGER_FILE))))


def _open_archive(settings: ArchiveSettings, stack: ExitStack, *, outbox: bool) -> Archive:
    """The archive, once its writer has made it: a portal may be started first."""
    deadline = time.monotonic() + ARCHIVE_WAIT_S
    while True:
        try:
            return stack.enter_context(Archive.open(settings, outbox=outbox, read_only=True))
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            log.info("waiting for the archive: %s", error)
            time.sleep(POLL_S)
