"""Makes what a region, a node and a portal need on disk before they can run: the authority, the ledger,
settings files with every value written out, identities by invite. Runs nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from archive.database import sqlite_url
from archive.errors import InvalidInput, SettingsError
from archive.ledger import Ledger
from archive.settings import render_toml
from certs.authority import Authority
from certs.identity import Identity
from certs.invites import create_invite, split_address
from certs.joining import enrol
from certs.profiles import Profile
from miss import configuration
from miss.configuration import Process
from miss.ledgers import LEDGER
from miss.peers import AE_LENGTH_MAX

if TYPE_CHECKING:
    from federation.settings import HubSettings
    from node.settings import NodeSettings
    from portal.settings import PortalSettings

AUTHORITY = "ca"
IDENTITY = "identity"


def create_region(folder: Path, region: str, *, host: str, port: int, enrol_port: int,
                  listen_host: str = "0.0.0.0", passphrase: str | None = None) -> Authority:
    """The region's folder: `ca/`, the ledger, hub.toml. An existing region is never overwritten."""
    from certs.settings import EnrolmentSettings
    from federation.settings import HubSettings

    settings = folder / Process.HUB.file
    if settings.exists():
        raise SettingsError(f"{settings} is there already: a region is never overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    authority = Authority.init(folder / AUTHORITY, region, passphrase)
    Ledger.open(sqlite_url(folder.absolute() / LEDGER)).close()
    write_settings(settings, HubSettings(
        state=Path("."), ca=Path(AUTHORITY), host=listen_host, port=port,
        enrolment=EnrolmentSettings(
            host=listen_host, port=enrol_port, hub_addresses=[join_address(host, port)])))
    return authority


def make_invite(ledger: Ledger, state: Path, *, hospital: str = "", ward: str = "", issuer: str = "",
                portal: str = "", life_s: int, who: str) -> str:
    """The line of a one-time invite for a ward's node, or for a portal."""
    settings = hub_settings(state)
    return create_invite(
        ledger, profile=Profile.PORTAL if portal else Profile.NODE, hospital=hospital, ward=portal or ward,
        issuer=issuer, address=enrolment_address(settings),
        pin=Authority.open(settings.ca).pin, life_s=life_s, who=who)


def enrol_node(invite: str, state: Path, *, ae_title: str = "", host: str = "0.0.0.0", port: int = 11112,
               replace: bool = False, private_classes: bool = False) -> Identity:
    """A node's folder: identity/, node.toml (kept when it is there). Safe to repeat until it returns."""
    state.mkdir(parents=True, exist_ok=True)
    os.chmod(state, 0o700)
    identity = enrol(invite, state / IDENTITY, replace=replace)
    if identity.profile is not Profile.NODE:
        raise InvalidInput(f"the invite was for {identity.uri}: use `miss portal enrol`")
    if not (state / Process.NODE.file).exists():
        write_node_settings(identity, state, ae_title=ae_title, host=host, port=port,
                            private_classes=private_classes)
    return identity


def write_node_settings(identity: Identity, state: Path, *, ae_title: str = "", host: str, port: int,
                        private_classes: bool) -> None:
    """The node.toml of a ward that has its identity."""
    from node.settings import DimseSettings, NodeSettings

    write_settings(state / Process.NODE.file, NodeSettings(
        state=Path("."), dimse=DimseSettings(
            host=host, port=port, ae_title=ae_title or default_ae_title(identity),
            accept_private_classes=private_classes)))


def enrol_portal(invite: str, state: Path, region: Path, *, port: int = 8080,
                 basic_auth: bool = False, replace: bool = False) -> Identity:
    """A portal's folder: identity/ and portal.toml over the regional store in `region`."""
    state.mkdir(parents=True, exist_ok=True)
    os.chmod(state, 0o700)
    identity = enrol(invite, state / IDENTITY, replace=replace)
    if identity.profile is not Profile.PORTAL:
        raise InvalidInput(f"the invite was for {identity.uri}: use `miss node enrol`")
    if not (state / Process.PORTAL.file).exists():
        write_portal_settings(state, region, port=port, basic_auth=basic_auth)
    return identity


def write_portal_settings(state: Path, region: Path, *, port: int, basic_auth: bool) -> None:
    """The portal.toml of a portal over the region in `region`."""
    from portal.settings import ListenSettings, PortalSettings, RegionSettings, SignInSettings

    hub = hub_settings(region)
    write_settings(state / Process.PORTAL.file, PortalSettings(
        ledger_url=hub.ledger, listen=ListenSettings(port=port),
        sign_in=SignInSettings(basic_auth=basic_auth),
        region=RegionSettings(state=hub.state, index_url=hub.index_url, hub_address=hub_address(hub),
                              identity=Path(IDENTITY))))


def hub_settings(state: Path) -> HubSettings:
    return configuration.hub(configuration.found(state / Process.HUB.file, Process.HUB))


def hub_address(settings: HubSettings) -> str:
    """Where the hub is dialled, as whoever enrols is told."""
    if not settings.enrolment.hub_addresses:
        raise SettingsError("enrolment.hub_addresses is empty: nobody could be told where the hub is")
    return settings.enrolment.hub_addresses[0]


def enrolment_address(settings: HubSettings) -> str:
    """Where invites are redeemed: the hub's own name, at the enrolment port."""
    return join_address(split_address(hub_address(settings))[0], settings.enrolment.port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def default_ae_title(identity: Identity) -> str:
    """SM-RADIOLOGY of San Martino's Radiology: the initials of a hospital of several words, or its start."""
    words = identity.hospital.split()
    hospital = "".join(word[0] for word in words) if len(words) > 1 else identity.hospital[:4]
    plain = "".join(char if char.isascii() and char.isalnum() else "-"
                    for char in f"{hospital}-{identity.ward_name}".upper())
    return plain[:AE_LENGTH_MAX].strip("-")


def write_settings(path: Path, settings: HubSettings | NodeSettings | PortalSettings) -> None:
    """Every value with what it means, readable by its owner alone: URLs may hold passwords."""
    staged = path.with_suffix(".new")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(render_toml(settings))
        file.flush()
        os.fsync(file.fileno())
    os.rename(staged, path)
