"""The settings of the hub and of a node's uplink, declared once; `archive/settings.py` reads them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from archive.archive import ArchiveSettings
from archive.database import sqlite_url
from archive.errors import InvalidInput, SettingsError
from archive.hours import Hours
from archive.retention import RemovalSettings, RetentionSettings
from archive.settings import setting
from archive.space.scrubber import ScrubSettings
from certs.invites import split_address
from certs.settings import EnrolmentSettings
from federation.budget import BudgetEntry, parse_days
from monitoring.settings import MonitoringSettings, TracingSettings

MIB = 1 << 20
GIB = 1 << 30
ADDRESSES_MAX = 8  # of hubs: a node attaches to each


@dataclass(frozen=True)
class StoreSettings:
    """The bounds of an archive, the region's or a node's."""

    pack_bytes_max: int = setting(GIB, "A pack is sealed at this size.", "bytes", minimum=MIB)
    memory_budget_bytes: int = setting(
        256 * MIB, "What all half-received objects may take of the memory together.", "bytes", minimum=4 * MIB
    )
    object_bytes_max: int = setting(16 * GIB, "The largest object that is taken.", "bytes", minimum=MIB)
    free_bytes_min: int = setting(
        GIB, "With less free disk than this nothing is taken until there is room.", "bytes", minimum=0
    )
    pack_age_s_max: float = setting(
        86_400.0, "A pack is sealed at this age, also when nothing arrives.", "s", minimum=60.0
    )
    drop_delay_s: float = setting(
        3600.0, "A pack whose instances were moved stays so long for those who read it just now.", "s",
        minimum=0.0, maximum=30 * 86_400.0,
    )
    upkeep_bytes_per_s: float = setting(
        100e6, "At most so much is read and written for evictions and compactions.", "bytes/s", minimum=1e5
    )
    set_aside_bytes_max: int = setting(
        10 * GIB, "What crashes left, and nobody was promised, is kept up to this; the oldest goes first.",
        "bytes", minimum=0,
    )
    set_aside_age_s_max: float = setting(30 * 86_400.0, "And for so long.", "s", minimum=0.0)
    partial_bytes_max: int = setting(
        64 * GIB, "What has come of large objects whose sender was cut off is kept up to this, so that they "
        "go on where they were; the oldest goes first, all of it when the disk is short.", "bytes", minimum=0,
    )
    partial_ward_bytes_max: int = setting(
        16 * GIB, "Of that at most so much is one ward's.", "bytes", minimum=0
    )
    partial_age_s_max: float = setting(24 * 3600.0, "And for so long.", "s", minimum=0.0)

    def bounds(self) -> dict[str, Any]:
        """The same as an archive's own settings name them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class ProtectionSettings:
    """What nodes may evict: what the region would still have, were it restored from its backup."""

    by: str = setting(
        "age", "Receipts count once they are older than protection.hours, or up to the last backup that was "
        "declared (`miss region backed-up`); without one nothing is evicted then.", choices=("age", "backup"),
    )
    hours: float = setting(
        48.0, "By age: how old a receipt has to be; longer than the time between two backups and what one "
        "takes, so that a backup which failed costs nothing.", "h", minimum=0.0, maximum=10_000.0,
    )


@dataclass(frozen=True)
class HubSettings:
    """The hub: what the region's nodes and portals dial."""

    state: Path = setting(
        Path("."), "The folder of the regional store: packs, facts, index, the hub's identity."
    )
    ca: Path = setting(Path("ca"), "The folder of the region's authority (`miss ca init`).")
    ledger_url: str = setting(
        "",
        "The region's ledger, sqlite:///PATH or postgresql://...; empty is a SQLite file in the state.",
        secret=True,
    )
    index_url: str = setting(
        "", "The regional index; empty is a SQLite file in the state folder.", secret=True
    )
    host: str = setting("0.0.0.0", "The address that nodes and portals dial; both sides show certificates.")
    port: int = setting(7443, "Its port; 0 takes a free one.", minimum=0, maximum=65535)
    name: str = setting("hub", "This hub's name in its certificate; several hubs have one each.")
    addresses: tuple[str, ...] = setting(
        (), "Where all hubs of the region can be dialled, host:port, at most 8: a node attaches to each, a "
        "portal turns to the next when one is away. Nodes hear of a change at once.",
    )
    standby: bool = setting(
        False, "Stand by while another hub writes the region's store, and take over when it dies; a hub "
        "without this does not start then. For hubs that share state, ledger and ca: set it on all of them.",
    )
    report_interval_s: float = setting(5.0, "How often each ward reports.", "s", minimum=0.1, maximum=5.0)
    ask_deadline_s: float = setting(
        2.0, "How long a search waits for one ward.", "s", minimum=0.1, maximum=60.0
    )
    promote_deadline_s: float = setting(
        60.0, "How long a reader waits for what only a ward holds.", "s", minimum=1.0, maximum=600.0
    )
    devices_see_region: tuple[str, ...] = setting(
        (), "The wards whose devices may search and retrieve in the whole region, where their own node lets "
        'them (`miss device add --reach region`): ids such as "san-martino/radiology"; "*" is every ward.',
    )
    window_questions_max: int = setting(
        32, "Searches and listings at once of wards' devices that look into the region, of all wards.",
        minimum=1, maximum=256,
    )
    window_fetches_max: int = setting(
        64, "Instances at once on their way to wards' devices, of all wards.", minimum=1, maximum=1024
    )
    window_per_ward_max: int = setting(
        8, "At most so many of the former, and of the latter, are one ward's.", minimum=1, maximum=256
    )
    pushes_max: int = setting(64, "Push streams at once, of all wards.", minimum=1, maximum=1024)
    pushes_per_ward_max: int = setting(12, "Push streams at once, of one ward.", minimum=1, maximum=64)
    workers: int = setting(8, "Threads that work on the archive.", minimum=1, maximum=256)
    stop_grace_s: float = setting(5.0, "What open calls get to end when the hub stops.", "s", minimum=0.0)
    deliveries: tuple[str, ...] = setting(
        ("* > *",),
        'Which ward may hand its images to which: "FROM > TO", each a ward (hospital/ward) or "*". None may '
        "when the list is empty.",
    )
    protection: ProtectionSettings = setting(ProtectionSettings)
    enrolment: EnrolmentSettings = setting(EnrolmentSettings)
    archive: StoreSettings = setting(StoreSettings)
    scrub: ScrubSettings = setting(ScrubSettings)
    retention: RetentionSettings = setting(RetentionSettings)
    removal: RemovalSettings = setting(RemovalSettings)
    monitoring: MonitoringSettings = setting(MonitoringSettings)
    tracing: TracingSettings = setting(TracingSettings)

    @property
    def ledger(self) -> str:
        """The URL of the region's ledger."""
        return self.ledger_url or sqlite_url(self.state / "ledger.db")

    def check(self) -> None:
        """What no single value shows. Raises SettingsError."""
        self.retention.check()
        if len(self.addresses) > ADDRESSES_MAX:
            raise SettingsError(f"addresses: at most {ADDRESSES_MAX}")
        for address in self.addresses:
            try:
                split_address(address)
            except InvalidInput as error:
                raise SettingsError(f"addresses: {address!r}: {error}") from error

    def archive_settings(self) -> ArchiveSettings:
        """The regional archive's settings."""
        return ArchiveSettings(
            state=self.state, index_url=self.index_url, **self.archive.bounds(), retention=self.retention,
            removal=self.removal,
        )


@dataclass(frozen=True)
class DeliverySettings:
    """What other wards of the region hand to a node."""

    accept_from: tuple[str, ...] = setting(
        ("*",), 'The wards (hospital/ward) whose deliveries are taken; "*" is every ward of the region.'
    )
    on_conflict: str = setting(
        "keep", "What becomes of a delivered instance whose SOP Instance UID is here with another content: "
        "kept apart for people to decide, or refused.", choices=("keep", "refuse"),
    )
    streams: int = setting(2, "Deliveries fetched at once.", minimum=1, maximum=4)


@dataclass(frozen=True)
class ReconcileSettings:
    """The comparison of what a ward gave with what the region has of it."""

    at_hour: float = setting(
        3.0, "When it begins each night, in hours of the local day; 1.5 is half past one.", "h",
        minimum=0.0, maximum=23.99,
    )
    jitter_s: float = setting(
        3600.0, "It begins at random within so much after that, so that wards don't all begin at once.", "s",
        minimum=0.0, maximum=12 * 3600.0,
    )
    refill_days: float = setting(
        7.0, "A node on a new disk fetches again what it had received in the last days; the rest is listed, "
        "and lies in the region.", "days", minimum=0.0, maximum=36_500.0,
    )


@dataclass(frozen=True)
class WindowSettings:
    """What a node fetches from the region for its devices."""

    spool_bytes_max: int = setting(
        8 * GIB, "What is fetched from the region lies on the node's disk until it is passed on, at most so "
        "much at once.", "bytes", minimum=MIB,
    )


@dataclass(frozen=True)
class BudgetSettings:
    """One entry of `[[uplink.budget]]`."""

    bytes_per_s: float = setting(help="At most so much goes.", unit="bytes/s", minimum=0.0)
    days: str = setting("", "The days, for example mon-fri or sat, sun; empty is every day.")
    hours: str = setting("", "From when to when, HH:MM-HH:MM; empty is the whole day.")

    def __post_init__(self) -> None:
        self.entry()

    def entry(self) -> BudgetEntry:
        """What it says. ValueError when it can't be read."""
        hours = Hours.parse(self.hours) if self.hours.strip() else None
        return BudgetEntry(parse_days(self.days), hours, self.bytes_per_s)


@dataclass(frozen=True)
class UplinkSettings:
    """The uplink: the outbound connection of a node to its hub."""

    enabled: bool = setting(True, "Whether the node dials its hub at all.")
    hub_address: str = setting("", "The hub to dial, host:port; empty is the one that the invite named.")
    hold: bool = setting(False, "Keep replication back and push only what a reader in the region asks for.")
    push_streams: int = setting(
        12, "Push streams at once, at most: few, and more while the line is what they wait for. One of them "
        "is kept for what is urgent.", minimum=1, maximum=16,
    )
    channels: int = setting(
        12, "TCP connections that the push streams are spread over, beside the one that the node is attached "
        "by.", minimum=1, maximum=16,
    )
    budget: tuple[BudgetSettings, ...] = setting(
        (), "What pushes may take of the line, by the hour of the week: tables `[[uplink.budget]]` with "
        '`days` ("mon-fri, sun"; every day when left out), `hours` ("07:00-19:00", local time; the whole day '
        "when left out) and `bytes_per_s` (0: only what is urgent). The lowest of those that hold "
        "counts; where none holds there is no cap.",
    )
    zstd: bool = setting(
        True, "Compress uncompressed images on the way while the line is slower than compressing them."
    )
    window: int = setting(
        2000, "Instances of the backlog that are looked at together.", minimum=1, maximum=10_000
    )
    offer_items: int = setting(500, "Instances in one offer.", minimum=1, maximum=1000)
    tries_max: int = setting(
        5, "After this many refusals an instance is set aside, with the reason.", minimum=1, maximum=100
    )
    backoff_first_s: float = setting(0.25, "The first pause after a failure; it doubles.", "s", minimum=0.01)
    backoff_cap_s: float = setting(10.0, "The longest pause after failures.", "s", minimum=0.05)
    poll_s: float = setting(
        0.1, "How often the node looks whether something was stored.", "s", minimum=0.01, maximum=5.0
    )
    workers: int = setting(4, "Threads that read the archive for the uplink.", minimum=1, maximum=32)
