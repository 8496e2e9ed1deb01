"""Owns the settings of a node, declared once; `archive/settings.py` reads and documents them. The devices
that may connect are no settings: they live in the ledger and change without a restart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from archive.archive import ArchiveSettings
from archive.database import sqlite_url
from archive.errors import SettingsError
from archive.retention import RemovalSettings, RetentionSettings
from archive.settings import setting
from archive.space.scrubber import ScrubSettings
from federation.deliveries_grants import Accepted
from federation.settings import (
    DeliverySettings,
    ReconcileSettings,
    StoreSettings,
    UplinkSettings,
    WindowSettings,
)
from monitoring.settings import MonitoringSettings, TracingSettings
from node.dimse.association import Limits

KIB = 1 << 10
AE_LENGTH_MAX = 16
PDU_BYTES_MIN = 4 * KIB  # with less, headers and turns cost more than what they carry


@dataclass(frozen=True)
class TlsSettings:
    """DICOM over TLS, on a port of its own: it listens when it has a certificate (`miss ca device`)."""

    port: int = setting(2762, "The port for DICOM over TLS; 0 takes a free one.", minimum=0, maximum=65535)
    certificate: Path | None = setting(
        None, "The listener's certificate with its chain, in PEM; a renewed file counts without a restart.")
    key: Path | None = setting(None, "Its private key, in PEM, without a passphrase.")
    trust: Path | None = setting(
        None, "The authorities that sign the devices' certificates, in PEM; the region's root when not set.")
    client_certificates: str = setting(
        "require", "Whether a device has to show a certificate: require, ask (those that have one show it), "
        "none.", choices=("require", "ask", "none"))

    @property
    def enabled(self) -> bool:
        """Whether there is to be a listener. Raises SettingsError when it is configured by half."""
        if (self.certificate is None) is not (self.key is None):
            there, missing = ("certificate", "key") if self.key is None else ("key", "certificate")
            raise SettingsError(f"dimse.tls.{there} is set and dimse.tls.{missing} is not: DICOM over TLS "
                                "needs both")
        return self.certificate is not None


@dataclass(frozen=True)
class DimseSettings:
    """The DICOM listener."""

    host: str = setting("0.0.0.0", "The address that modalities and workstations dial.")
    port: int = setting(11112, "Its port; 0 takes a free one.", minimum=0, maximum=65535)
    ae_title: str = setting("MISS", "This node's AE title; callers of another one are refused (1/1/7).")
    accept_private_classes: bool = setting(
        False, "Take private SOP classes and transfer syntaxes, and storage classes newer than this release."
    )
    associations_max: int = setting(4000, "Associations at once, of all devices.", minimum=1, maximum=30_000)
    associations_per_device_max: int = setting(
        2500, "Associations at once, of one device; past it 2/3/2, and other devices are still served.",
        minimum=1, maximum=30_000,
    )
    connections_per_address_max: int = setting(
        2000, "Connections without an association of one address; past it its oldest gives way.",
        minimum=1, maximum=2500,
    )
    max_pdu_bytes: int = setting(
        256 * KIB, "The longest P-DATA-TF PDU that is taken, 4096 or more; 0 is no limit.", "bytes",
        minimum=0, maximum=1 << 30,
    )
    operations_max: int = setting(
        8, "Requests that a peer which asks for an asynchronous operations window may have open at once; 1 "
        "grants no window.", minimum=1, maximum=64,
    )
    user_identity: str = setting(
        "ignore", "What becomes of the user that a requestor names (PS3.7 D.3.3.7): passed over, checked "
        "against this node's users where one is named, or required of everybody. A name without a passcode "
        "proves nothing.", choices=("ignore", "check", "require"),
    )
    artim_s: float = setting(
        30.0, "How long a connection may be open without an association (ARTIM); as long for a TLS "
        "handshake before.", "s",
        minimum=0.1, maximum=600.0,
    )
    idle_timeout_s: float = setting(
        600.0, "How long an association may say nothing between two messages.", "s",
        minimum=0.1, maximum=86_400.0,
    )
    message_timeout_s: float = setting(
        60.0, "How long a peer may fall silent inside a message.", "s", minimum=0.1, maximum=3600.0
    )
    bytes_per_s_min: int = setting(
        1 * KIB, "What a peer has to send inside a message, on the average of each dimse.message_timeout_s "
        "that is waited for it; 0 asks for nothing.", "bytes/s", minimum=0, maximum=1 << 30,
    )
    find_responses_max: int = setting(
        10_000, "Matches that one C-FIND answers; past them it fails with A700.", minimum=1, maximum=1_000_000
    )
    stop_grace_s: float = setting(10.0, "What messages under way get when the node stops.", "s", minimum=0.0)
    tls: TlsSettings = setting(TlsSettings)


@dataclass(frozen=True)
class RoutingSettings:
    """What goes by itself to whom."""

    rules: Path | None = setting(
        None, "The file of routing rules (TOML), read again when it changes; routes.toml in the node's state "
        "when not set. No file is no rules.")
    queue_max: int = setting(
        100_000, "What may wait for one destination; its rules go on when there is room again.",
        minimum=1, maximum=10_000_000)
    destinations_at_once: int = setting(
        4, "Destinations that are sent to beside each other.", minimum=1, maximum=64)
    tries_max: int = setting(
        10, "After so many refusals an instance is set aside, with the reason.", minimum=1, maximum=1000)
    backoff_first_s: float = setting(
        10.0, "The first pause after a failure; it doubles.", "s", minimum=0.01, maximum=3600.0)
    backoff_cap_s: float = setting(
        3600.0, "The longest pause after failures.", "s", minimum=0.01, maximum=86_400.0)
    poll_s: float = setting(
        0.25, "How often the rules look whether something was stored.", "s", minimum=0.01, maximum=60.0)
    remember_days: float = setting(
        400.0, "How long it is remembered what was sent, so that it is not sent again.", "days",
        minimum=1.0, maximum=36_500.0)


@dataclass(frozen=True)
class CommitmentSettings:
    """Storage commitment: when an instance counts as safe, and how its sender hears of that."""

    means: str = setting(
        "auto", "What committed means: durable at this node, or in the region too; auto is the region where "
        "uplink.enabled, else the node.", choices=("auto", "region", "node"),
    )
    timeout_s: float = setting(
        86_400.0, "How long a request may wait for the region's receipts; what has none then is reported as "
        "failed (0213).", "s", minimum=0.0, maximum=30 * 86_400.0,
    )
    same_association_s: float = setting(
        2.0, "How long an association that stays open after its request is looked at for the report to go "
        "over it; later ones go over one of their own. A device that can't be called is waited for as long "
        "as dimse.idle_timeout_s.", "s", minimum=0.0, maximum=600.0,
    )
    open_per_device_max: int = setting(
        200, "Requests of one device that are not reported yet; past it 0213.", minimum=1, maximum=100_000
    )
    retry_first_s: float = setting(
        10.0, "When a report that a device did not take is tried again; twice as long each time after.", "s",
        minimum=0.01, maximum=3600.0,
    )
    retry_max_s: float = setting(1800.0, "And at least so often.", "s", minimum=0.01, maximum=86_400.0)
    report_days: float = setting(
        7.0, "How long it is tried at all; as long are reports that came to an end remembered.", "days",
        minimum=0.0, maximum=365.0,
    )
    verify_bytes_per_s: float = setting(
        200e6, "At most so much is read from the disk to be hashed again.", "bytes/s", minimum=1e5
    )
    answer_timeout_s: float = setting(
        172_800.0, "How long this node waits for the report on what it asked a destination to commit.", "s",
        minimum=1.0, maximum=30 * 86_400.0,
    )


@dataclass(frozen=True)
class RetrieveSettings:
    """C-MOVE, C-GET, and what the routes send: sub-operations, and what they may cost."""

    at_once_max: int = setting(
        32, "Retrieves that go on at once; the next one waits for its turn.", minimum=1, maximum=1000)
    per_device_max: int = setting(
        16, "And of one device.", minimum=1, maximum=1000)
    wait_s: float = setting(
        30.0, "How long one waits for its turn; then A702.", "s", minimum=0.0, maximum=3600.0)
    window: int = setting(
        8, "C-STOREs that a destination is asked to let be open at once on one association.",
        minimum=1, maximum=64)
    associations: int = setting(
        1, "Associations to a destination at once for one retrieve or route; some destinations take one "
        "only.", minimum=1, maximum=16)
    decoded_bytes_max: int = setting(
        512 * KIB * KIB, "The largest instance, decoded, that is recoded for who does not take it as it is "
        "stored; two at once. From implicit to explicit VR and back goes without a bound.", "bytes",
        minimum=KIB * KIB)


@dataclass(frozen=True)
class WorklistSettings:
    """The modality worklist, and how long steps are kept."""

    folder: Path | None = setting(
        None, "A folder of worklist files (*.wl, *.dcm) that is followed into the worklist; none when not "
        "set.")
    folder_poll_s: float = setting(2.0, "How often it is looked at.", "s", minimum=0.05, maximum=3600.0)
    own_steps_only: bool = setting(
        False, "Show a device only the steps that name its own AE title, or none; else every step of the "
        "ward.")
    responses_max: int = setting(
        2000, "Matches that one worklist query answers; past them it fails with A700.", minimum=1,
        maximum=100_000)
    keep_days: float = setting(
        14.0, "How long a scheduled step stays after the day on which it was to begin.", "days", minimum=1.0,
        maximum=3650.0)
    performed_keep_days: float = setting(
        400.0, "How long a performed step stays after its last change.", "days", minimum=1.0,
        maximum=36_500.0)


@dataclass(frozen=True)
class CompletionSettings:
    """When a study counts as complete, where no performed step and no storage commitment says so."""

    quiet_s: float = setting(
        300.0, "Nothing came for the study for so long.", "s", minimum=0.1, maximum=7 * 86_400.0)
    step_timeout_s: float = setting(
        14_400.0, "The same, while a performed step of the study is in progress.", "s", minimum=0.1,
        maximum=30 * 86_400.0)


@dataclass(frozen=True)
class CacheSettings:
    """What a node keeps on its disk of what the region has too."""

    evicts: bool = setting(
        True, "Give up bytes that the region has, by itself, when the disk gets short or nobody wants them; "
        "without it only `miss packs evict` does.")
    free_percent_low: float = setting(
        10.0, "With less of the disk free than this, room is made.", "%", minimum=0.0, maximum=75.0)
    free_percent_high: float = setting(
        15.0, "Until so much is free; a study that is wanted again is kept again only above this.", "%",
        minimum=0.0, maximum=75.0)
    free_bytes_low: int = setting(
        0, "And room is made with less free than this.", "bytes", minimum=0)
    unused_days: float = setting(
        0.0, "Give up what nobody received or retrieved for so long, also when there is room; 0 never does.",
        "days", minimum=0.0, maximum=36_500.0)
    rules: Path | None = setting(
        None, "The file of the cache's rules (TOML), read again when it changes: what is kept, which priors "
        "are fetched; cache.toml in the node's state when not set. No file is no rules.")
    look_s: float = setting(1.0, "How often the disk is looked at.", "s", minimum=0.05, maximum=60.0)
    keeps_again: bool = setting(
        True, "Keep a study again that was given up and then retrieved, as far as there is room.")
    bring_bytes_per_s: float = setting(
        20e6, "At most so much is brought back that nobody waits for; 0 is no bound.", "bytes/s", minimum=0.0)


@dataclass(frozen=True)
class NodeSettings:
    """A ward's node: archive, DICOM services, uplink."""

    state: Path = setting(Path("."), "The node's folder: packs, facts, index, ledger.")
    identity: Path = setting(
        Path("identity"), "The folder of the node's key and certificate, made by `miss node enrol`."
    )
    dimse: DimseSettings = setting(DimseSettings)
    archive: StoreSettings = setting(StoreSettings)
    uplink: UplinkSettings = setting(UplinkSettings)
    deliveries: DeliverySettings = setting(DeliverySettings)
    window: WindowSettings = setting(WindowSettings)
    reconcile: ReconcileSettings = setting(ReconcileSettings)
    scrub: ScrubSettings = setting(ScrubSettings)
    retrieve: RetrieveSettings = setting(RetrieveSettings)
    commitment: CommitmentSettings = setting(CommitmentSettings)
    routing: RoutingSettings = setting(RoutingSettings)
    worklist: WorklistSettings = setting(WorklistSettings)
    completion: CompletionSettings = setting(CompletionSettings)
    cache: CacheSettings = setting(CacheSettings)
    retention: RetentionSettings = setting(RetentionSettings)
    removal: RemovalSettings = setting(RemovalSettings)
    monitoring: MonitoringSettings = setting(MonitoringSettings)
    tracing: TracingSettings = setting(TracingSettings)

    @property
    def routes_path(self) -> Path:
        """The file of routing rules."""
        return self.routing.rules or self.state / "routes.toml"

    @property
    def cache_rules_path(self) -> Path:
        """The file of the cache's rules."""
        return self.cache.rules or self.state / "cache.toml"

    @property
    def ledger_url(self) -> str:
        """The node's ledger: always a file of its own state, so that a ward needs no database server."""
        return sqlite_url(self.state / "ledger.db")

    @property
    def commits_by_region(self) -> bool:
        """Whether an instance is committed only once the region has it."""
        means = self.commitment.means
        return self.uplink.enabled if means == "auto" else means == "region"

    def archive_settings(self) -> ArchiveSettings:
        return ArchiveSettings(state=self.state, **self.archive.bounds(), retention=self.retention,
                               removal=self.removal)

    def limits(self) -> Limits:
        """What one association may cost."""
        dimse = self.dimse
        if 0 < dimse.max_pdu_bytes < PDU_BYTES_MIN:
            raise SettingsError(f"dimse.max_pdu_bytes: 0, or {PDU_BYTES_MIN} or more is needed")
        return Limits(
            max_pdu_bytes=dimse.max_pdu_bytes, object_bytes_max=self.archive.object_bytes_max,
            idle_timeout_s=dimse.idle_timeout_s, message_timeout_s=dimse.message_timeout_s,
            bytes_per_s_min=dimse.bytes_per_s_min, artim_s=dimse.artim_s,
            operations_max=dimse.operations_max,
        )

    def check(self) -> None:
        """What no single value shows. Raises SettingsError."""
        self.require_ae_title()
        self.limits()
        _ = self.dimse.tls.enabled
        Accepted.of(self.deliveries.accept_from)
        self.retention.check()

    def require_ae_title(self) -> str:
        """The AE title, if it is one (PS3.5 6.2)."""
        title = self.dimse.ae_title
        if not title.strip() == title or not 0 < len(title) <= AE_LENGTH_MAX or "\\" in title:
            raise SettingsError("dimse.ae_title is not an AE title: 1 to 16 characters, no backslash")
        if not title.isascii() or not title.isprintable():
            raise SettingsError("dimse.ae_title is not an AE title: printable ASCII only")
        return title
