"""Owns the settings of a node, declared once; `archive/settings.py` reads and documents them. The devices
that may connect are no settings: they live in the ledger and change without a restart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from archive.archive import ArchiveSettings
from archive.database import sqlite_url
from archive.errors import SettingsError
from archive.settings import setting
from federation.settings import StoreSettings, UplinkSettings
from node.dimse.association import Limits

KIB = 1 << 10
AE_LENGTH_MAX = 16


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
    max_pdu_bytes: int = setting(
        256 * KIB, "The longest P-DATA-TF PDU that is taken; 0 is no limit.", "bytes",
        minimum=0, maximum=1 << 30,
    )
    artim_s: float = setting(
        30.0, "How long a connection may be open without an association (ARTIM).", "s",
        minimum=0.1, maximum=600.0,
    )
    idle_timeout_s: float = setting(
        600.0, "How long an association may say nothing between two messages.", "s",
        minimum=0.1, maximum=86_400.0,
    )
    message_timeout_s: float = setting(
        60.0, "How long a peer may fall silent inside a message.", "s", minimum=0.1, maximum=3600.0
    )
    find_responses_max: int = setting(
        10_000, "Matches that one C-FIND answers; past them it fails with A700.", minimum=1, maximum=1_000_000
    )
    stop_grace_s: float = setting(10.0, "What messages under way get when the node stops.", "s", minimum=0.0)


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

    @property
    def ledger_url(self) -> str:
        """The node's ledger: always a file of its own state, so that a ward needs no database server."""
        return sqlite_url(self.state / "ledger.db")

    def archive_settings(self) -> ArchiveSettings:
        return ArchiveSettings(
            state=self.state,
            pack_bytes_max=self.archive.pack_bytes_max,
            memory_budget_bytes=self.archive.memory_budget_bytes,
            object_bytes_max=self.archive.object_bytes_max,
            free_bytes_min=self.archive.free_bytes_min,
        )

    def limits(self) -> Limits:
        """What one association may cost."""
        dimse = self.dimse
        return Limits(
            max_pdu_bytes=dimse.max_pdu_bytes, object_bytes_max=self.archive.object_bytes_max,
            idle_timeout_s=dimse.idle_timeout_s, message_timeout_s=dimse.message_timeout_s,
            artim_s=dimse.artim_s,
        )

    def require_ae_title(self) -> str:
        """The AE title, if it is one (PS3.5 6.2)."""
        title = self.dimse.ae_title
        if not title.strip() == title or not 0 < len(title) <= AE_LENGTH_MAX or "\\" in title:
            raise SettingsError("dimse.ae_title is not an AE title: 1 to 16 characters, no backslash")
        if not title.isascii() or not title.isprintable():
            raise SettingsError("dimse.ae_title is not an AE title: printable ASCII only")
        return title
