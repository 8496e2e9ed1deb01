"""A hub and wards for the tests of this folder: real archives, gRPC and TLS, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from archive.archive import Archive, ArchiveSettings
from archive.ledger import AuditRow, DeliveryStanding, WardState
from archive.model import Provenance, Ward
from certs.identity import Identity
from certs.settings import EnrolmentSettings
from federation.hub import Hub
from federation.hub_channel import HubChannel
from federation.line import LinePart
from federation.policy import Principal, Role
from federation.region_source import RegionSource
from federation.settings import DeliverySettings, HubSettings, StoreSettings, UplinkSettings
from federation.uplink import Uplink
from miss.processes import free_ports
from tests.datasets import Instance
from tests.federation.regions import Region

EVA = Principal("eva", Role.PHYSICIAN)
QUICK = UplinkSettings(backoff_first_s=0.05, backoff_cap_s=0.3, poll_s=0.02)


def free_port() -> int:
    [port] = free_ports(1)
    return port


def hub_settings(region: Region, **changes: Any) -> HubSettings:
    settings = HubSettings(
        state=region.folder / "hub",
        ca=region.ca_folder,
        ledger_url=region.ledger_url,
        host="127.0.0.1",
        port=free_port(),
        report_interval_s=0.5,
        stop_grace_s=0.5,
        enrolment=EnrolmentSettings(host="127.0.0.1", port=0),
        archive=StoreSettings(free_bytes_min=1 << 20),
    )
    return replace(settings, **changes)


@dataclass
class Node:
    """A ward's archive and uplink: a node without its DICOM services."""

    ward: Ward
    identity: Identity
    folder: Path
    settings: UplinkSettings = QUICK
    archive: Archive | None = None
    uplink: Uplink | None = None
    audited: list[AuditRow] = field(default_factory=list)  # who was answered from here
    deliveries: DeliverySettings = field(default_factory=DeliverySettings)
    standings: Sequence[DeliveryStanding] = ()
    parts: Callable[[Archive, Identity], Sequence[LinePart]] = lambda archive, identity: ()

    def start(self, **changes: Any) -> Node:
        self.settings = replace(self.settings, **changes)
        if self.archive is None:
            self.archive = open_archive(self.folder)
        self.uplink = Uplink(
            self.archive, self.identity, self.settings, ae_title="WARD", audit=self.audited.append,
            deliveries=self.deliveries, on_standings=self._note,
            parts=self.parts(self.archive, self.identity),
        )  # fmt: skip
        self.uplink.start()
        return self

    def _note(self, standings: Sequence[DeliveryStanding]) -> None:
        self.standings = tuple(standings)

    def stop(self) -> None:
        self.leave()
        if self.archive is not None:
            self.archive.close()
            self.archive = None

    def leave(self) -> None:
        """The line goes; the archive stays open."""
        if self.uplink is not None:
            self.uplink.stop()
            self.uplink = None

    @property
    def store(self) -> Archive:
        if self.archive is None:
            self.archive = open_archive(self.folder)
        return self.archive

    @property
    def pending(self) -> int:
        self.store.wait_indexed()
        return self.store.index.pending_summary().count

    def reported(self, region: Region) -> WardState:
        """What the hub keeps of this ward."""
        return region.ledger.ward_states().get(self.ward.id) or WardState(self.ward.id)

    def take(self, instances: Iterable[Instance], *, at_us: int | None = None) -> None:
        """Stores as a modality would have it stored: durable when this returns."""
        for instance in instances:
            where = Provenance(self.ward.id, self.ward.issuer, "CT1", "CT1", at_us or time.time_ns() // 1000)
            reception = self.store.intake.begin(instance.head(where))
            reception.write(instance.dataset)
            reception.commit().wait_durable()


def open_archive(folder: Path, *, outbox: bool = True, read_only: bool = False) -> Archive:
    return Archive.open(
        ArchiveSettings(state=folder, free_bytes_min=1 << 20), outbox=outbox, read_only=read_only
    )


def node_of(region: Region, hub: Hub, hospital: str, name: str, issuer: str) -> Node:
    ward = region.add_ward(hospital, name, issuer)
    address = f"127.0.0.1:{hub.settings.port}"
    return Node(ward, region.node(ward, address), region.folder / "nodes" / ward.id.replace("/", "-"))


class Regional:
    """What a portal has: the regional archive to read, the ledger, a channel to the hub."""

    def __init__(self, region: Region, hub: Hub, **options: Any) -> None:
        self.archive = Archive.open(hub.settings.archive_settings(), outbox=False, read_only=True)
        self.channel = HubChannel(region.portal(f"127.0.0.1:{hub.settings.port}"))
        self.source = RegionSource(self.archive, region.ledger, self.channel, **options)

    def __enter__(self) -> RegionSource:
        return self.source

    def __exit__(self, *exc: object) -> None:
        self.channel.stop()
        self.archive.close()


def stored_bytes(archive: Archive, instance: Instance) -> bytes:
    """The data set of an instance as the archive gives it back."""
    (found,) = archive.instances(instance.study_uid, None, instance.sop_instance_uid)
    with archive.open_payload(found.location) as payload:
        return payload.read()[found.location.dataset_offset :]
