"""The portal's settings. What they mean is said here once; `docs/` is made from it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from archive.settings import setting
from monitoring.settings import TracingSettings

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK_NAMES


@dataclass(frozen=True)
class ListenSettings:
    """Where browsers and DICOMweb clients connect."""

    host: str = setting(
        "127.0.0.1", "The address to listen on; beyond loopback only with TLS or behind a proxy."
    )
    port: int = setting(8080, "The port to listen on; 0 takes a free one.", minimum=0, maximum=65535)
    tls_certificate: Path | None = setting(None, "The certificate chain for HTTPS, PEM.")
    tls_key: Path | None = setting(None, "The private key of tls_certificate, PEM.")
    public_url: str = setting(
        "",
        "Where users reach the portal (https://images.region.example) when a proxy stands in front; with an "
        "https address cookies are Secure though the portal itself speaks HTTP.",
    )
    trusted_proxies: tuple[str, ...] = setting(
        (), "The addresses of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed."
    )
    requests_at_once_max: int = setting(
        200, "Requests served at once; more are answered 503.", minimum=1, maximum=10_000
    )

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key are set together or not at all")
        url = urlsplit(self.public_url)
        if self.public_url and (url.scheme not in ("http", "https") or not url.netloc or url.path.strip("/")):
            raise ValueError("public_url is a scheme and a host: https://images.region.example")
        if not is_loopback(self.host) and self.tls_certificate is None and not self.trusted_proxies:
            raise ValueError(
                f"{self.host} is not a loopback address: set tls_certificate and tls_key, or, when a proxy "
                "that speaks HTTPS stands in front, trusted_proxies and public_url"
            )
        if self.trusted_proxies and url.scheme != "https":
            raise ValueError("trusted_proxies goes with a public_url that is https")

    @property
    def https(self) -> bool:
        """Whether users reach the portal by HTTPS, here or at a proxy."""
        return self.tls_certificate is not None or self.public_url.startswith("https://")


@dataclass(frozen=True)
class SignInSettings:
    """How long somebody stays signed in."""

    idle_s: int = setting(1_800, "A session ends after this long without a request.", "s", minimum=60)
    absolute_s: int = setting(43_200, "A session ends this long after sign-in.", "s", minimum=60)
    basic_auth: bool = setting(
        False, "Accept HTTP Basic below /dicom-web, for DICOMweb clients that have no browser session."
    )


@dataclass(frozen=True)
class RegionSettings:
    """The region whose packs and index this portal reads, and the hub through which it asks wards."""

    state: Path | None = setting(None, "The hub's state folder: the regional packs, facts and index.")
    index_url: str = setting(
        "", "The regional index (postgresql://...); empty is a SQLite file in the state folder.", secret=True
    )
    hub_address: str = setting("", "The hub to dial, host:port; empty is the one that the invite named.")
    identity: Path | None = setting(None, "The folder of the portal's own certificate and key.")


@dataclass(frozen=True)
class NodeSettings:
    """One ward's node, when the portal serves its pages alone (`miss portal run --node`)."""

    state: Path | None = setting(None, "The node's state folder; set, the portal serves this one ward alone.")
    identity: Path | None = setting(None, "The folder of the node's certificate; empty is identity in state.")


@dataclass(frozen=True)
class DicomWebSettings:
    """Bounds of DICOMweb answers."""

    results_default: int = setting(100, "Results of a QIDO-RS query that gives no limit.", minimum=1)
    results_max: int = setting(1_000, "Most results of one QIDO-RS answer.", minimum=1, maximum=100_000)
    decoded_bytes_max: int = setting(
        256 << 20,
        "The largest instance that is decoded or written anew on request; stored bytes have no bound.",
        "bytes",
        minimum=1 << 20,
    )


@dataclass(frozen=True)
class PortalSettings:
    """All of it: the TOML file's sections are these names."""

    ledger_url: str = setting(
        "",
        "The database of users, sessions and the audit log, sqlite:///PATH or postgresql://...; empty is the "
        "ledger in the region's or the node's state folder.",
        secret=True,
    )
    threads: int = setting(
        16, "Threads that search, as many that wait for wards, as many that read.", minimum=2, maximum=256
    )
    waiting_max: int = setting(500, "Calls that may wait for a thread; more are answered 503.", minimum=1)
    assets: Path | None = setting(
        None, "The folder that `python -m portal.assets` made; empty is the package's own."
    )
    listen: ListenSettings = setting(ListenSettings)
    sign_in: SignInSettings = setting(SignInSettings)
    dicomweb: DicomWebSettings = setting(DicomWebSettings)
    region: RegionSettings = setting(RegionSettings)
    node: NodeSettings = setting(NodeSettings)
    tracing: TracingSettings = setting(TracingSettings)

    def __post_init__(self) -> None:
        if self.region.state is not None and self.node.state is not None:
            raise ValueError(
                "region.state and node.state exclude each other: a portal serves a region or a ward"
            )
