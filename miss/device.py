"""`miss device`: the modalities and workstations that may connect to a node. Writes the node's ledger, which
the node reads at every association: nothing needs a restart."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archive.errors import InvalidInput, NotFound, Unavailable
from archive.model import (
    DEVICE_MAX_AGE_S,
    DEVICE_REACHES,
    DEVICE_SERVICES,
    ON_INCOMPLETE,
    ConflictPolicy,
    is_uid,
)
from miss.configuration import State
from miss.console import err, out, table
from miss.ledgers import open_ledger, require_node
from miss.peers import parse_peer, require_ae_title

if TYPE_CHECKING:
    from archive.ledger import Device
    from node.dimse.requestor import Peer

app = typer.Typer(help="The devices that may connect to a node; changes count at once.", no_args_is_help=True)

TRANSPORTS = ("any", "plain", "tls")
ON_CONFLICT = tuple(policy.value for policy in ConflictPolicy)

AeTitle = Annotated[str, typer.Argument(metavar="AE-TITLE", help="The device's AE title, as it calls itself.",
                                        show_default=False)]


@app.command()
def add(
    ae_title: AeTitle,
    address: Annotated[str, typer.Argument(metavar="ADDRESS", show_default=False,
                                           help="Its IP address, a network (10.2.0.0/16), or * for any.")],
    name: Annotated[str, typer.Option(help="What people call it.")] = "",
    port: Annotated[int | None, typer.Option(help="Where it listens, if it can be called.", min=1, max=65535,
                                             show_default=False)] = None,
    host: Annotated[str, typer.Option(
        help="Where it listens, if that is not ADDRESS: a name or an IP address.", show_default=False)] = "",
    issuer: Annotated[str | None, typer.Option(
        help="The issuer of the Patient IDs that it sends, when it is not the ward's.",
        show_default=False)] = None,
    services: Annotated[str, typer.Option(
        help=f"What it may do, comma-separated, of {', '.join(DEVICE_SERVICES)}; all of it.",
        show_default=False)] = ",".join(DEVICE_SERVICES),
    transport: Annotated[str, typer.Option(
        help=f"How it may come: {', '.join(TRANSPORTS)}.")] = TRANSPORTS[0],
    certificate: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Its certificate: it must hold this key, and comes over TLS alone.",
        show_default=False)] = None,
    sop_class: Annotated[list[str] | None, typer.Option(
        metavar="UID", help="A SOP class that it may store, and no other; repeatable.",
        show_default=False)] = None,
    transfer_syntax: Annotated[list[str] | None, typer.Option(
        metavar="UID", help="A transfer syntax that it may store in, and no other; repeatable.",
        show_default=False)] = None,
    on_conflict: Annotated[str, typer.Option(
        help=f"What becomes of other content for a UID that is here: {', '.join(ON_CONFLICT)}."
    )] = ConflictPolicy.KEEP.value,
    reach: Annotated[str, typer.Option(
        help=f"How far it searches and retrieves: {', '.join(DEVICE_REACHES)}; the region has to grant it, "
        "too (devices_see_region of hub.toml).")] = DEVICE_REACHES[0],
    on_incomplete: Annotated[str, typer.Option(
        help=f"How a search of the region ends that lacks a ward: {', '.join(ON_INCOMPLETE)}."
    )] = ON_INCOMPLETE[0],
    max_age: Annotated[str, typer.Option(
        help="How old may be what the region knows of a ward that is away: 12h, 30m."
    )] = "12h",
    state: State = Path("."),
) -> None:
    """Lets a device connect, or changes the one of that AE title: as a whole, so that what
    is not said is as it comes again.

    \b
    Examples:
      miss device add CT1 10.2.4.17 --name "CT, room 3" --state /srv/miss
      miss device add WORKSTATION 10.2.0.0/16 --services find --port 104
      miss device add MR1 10.2.4.18 --transport tls --certificate mr1/certificate.pem --services store
      miss device add PACS 10.2.4.30 --services find,retrieve --port 104 --reach region --on-incomplete fail
    """
    from miss.ca import duration_s

    require_node(state)
    device = make_device(ae_title, address, name=name, port=port, host=host, issuer=issuer,
                         services=tuple(filter(None, map(str.strip, services.split(",")))),
                         transport=transport, certificate=certificate, sop_classes=sop_class or (),
                         transfer_syntaxes=transfer_syntax or (), on_conflict=on_conflict, reach=reach,
                         on_incomplete=on_incomplete, max_age_s=duration_s(max_age))
    with open_ledger(state) as ledger:
        ledger.add_device(device)
    err.print(f"{device.ae_title} may connect from {device.address}", style="green", markup=False)


@app.command("ls")
def ls(state: State = Path(".")) -> None:
    """Lists the devices that may connect.

    \b
    Example:
      miss device ls --state /srv/miss
    """
    require_node(state)
    grid = table("AE title", "address", ">port", "may", "over", "issuer", "name", "enabled")
    with open_ledger(state) as ledger:
        for device in ledger.devices():
            grid.add_row(device.ae_title, device.address, str(device.port or "-"),
                         _may(device), _over(device), device.issuer or "the ward's", device.name,
                         "yes" if device.enabled else "no")
    out.print(grid)


@app.command()
def rm(ae_title: AeTitle, state: State = Path(".")) -> None:
    """Takes a device off the list: the next association is refused.

    \b
    Example:
      miss device rm CT1 --state /srv/miss
    """
    require_node(state)
    with open_ledger(state) as ledger:
        if not ledger.remove_device(ae_title):
            raise NotFound(f"there is no device {ae_title}; `miss device ls` lists them")
    err.print(f"{ae_title} may not connect any more", style="green", markup=False)


@app.command()
def echo(
    device: Annotated[str, typer.Argument(
        metavar="AE-TITLE|AE@HOST:PORT", show_default=False,
        help="A device of the list that has a port, or any AE title with its address.")],
    calling: Annotated[str, typer.Option(help="The AE title to call as; else the node's own.")] = "",
    timeout_s: Annotated[float, typer.Option(help="How long to wait.", min=0.1, max=300)] = 10.0,
    state: State = Path("."),
) -> None:
    """Asks a device whether it is there (C-ECHO) and says how long it took.

    \b
    Examples:
      miss device echo CT1 --state /srv/miss
      miss device echo ORTHANC@10.2.4.20:4242 --state /srv/miss
    """
    from node.dimse.requestor import echo as c_echo

    peer = parse_peer(device) if "@" in device else _listed(device, state)
    started = time.monotonic()
    status = c_echo(peer, calling or _own_ae_title(state), timeout_s=timeout_s)
    if status:
        raise Unavailable(f"{device} answered with status {status:04X}")
    out.print(f"{device} answered in {1000 * (time.monotonic() - started):.0f} ms", markup=False)


def make_device(ae_title: str, address: str, *, name: str = "", port: int | None = None,
                host: str = "", issuer: str | None = None, services: tuple[str, ...] = DEVICE_SERVICES,
                transport: str = TRANSPORTS[0], certificate: Path | None = None,
                sop_classes: Sequence[str] = (), transfer_syntaxes: Sequence[str] = (),
                on_conflict: str = ConflictPolicy.KEEP.value, reach: str = DEVICE_REACHES[0],
                on_incomplete: str = ON_INCOMPLETE[0], max_age_s: int = DEVICE_MAX_AGE_S) -> Device:
    """A device by the rules of PS3.5 6.2 (AE) and of addresses; InvalidInput says which is broken."""
    from archive.ledger import Device

    require_ae_title(ae_title)
    if host and (port is None or not host.isascii() or not host.isprintable() or " " in host):
        raise InvalidInput("--host is a name or an IP address, and goes with --port")
    if address != "*":
        try:
            address = str(ipaddress.ip_network(address) if "/" in address else ipaddress.ip_address(address))
        except ValueError:
            raise InvalidInput(f"{address} is neither an IP address, nor a network such as 10.2.0.0/16, nor *"
                               ) from None
    if unknown := [service for service in services if service not in DEVICE_SERVICES]:
        raise InvalidInput(f"no service {unknown[0]}; there are: {', '.join(DEVICE_SERVICES)}")
    if transport not in TRANSPORTS:
        raise InvalidInput(f"no transport {transport}; there are: {', '.join(TRANSPORTS)}")
    if on_conflict not in ON_CONFLICT:
        raise InvalidInput(f"no policy {on_conflict}; there are: {', '.join(ON_CONFLICT)}")
    if reach not in DEVICE_REACHES:
        raise InvalidInput(f"no reach {reach}; there are: {', '.join(DEVICE_REACHES)}")
    if on_incomplete not in ON_INCOMPLETE:
        raise InvalidInput(f"--on-incomplete {on_incomplete} is none of {', '.join(ON_INCOMPLETE)}")
    for uid in (*sop_classes, *transfer_syntaxes):
        if not is_uid(uid):
            raise InvalidInput(f"{uid} is no UID")
    if certificate is not None and transport == "plain":
        raise InvalidInput("a certificate is shown over TLS: --transport tls, or any")
    pin = ""
    if certificate is not None:
        from certs.devices import spki_of_file

        pin = spki_of_file(certificate)
    return Device(ae_title.strip(), address, name, issuer, True, port, frozenset(services), transport, pin,
                  frozenset(sop_classes), frozenset(transfer_syntaxes), on_conflict, host, reach,
                  on_incomplete, max_age_s)


def _may(device: Device) -> str:
    """What it may do, and within what."""
    lists = ((device.sop_classes, "SOP class", "SOP classes"),
             (device.transfer_syntaxes, "transfer syntax", "transfer syntaxes"))
    within = [f"{len(uids)} {one if len(uids) == 1 else many}" for uids, one, many in lists if uids]
    policy = [] if device.on_conflict == ConflictPolicy.KEEP.value else [f"conflicts: {device.on_conflict}"]
    reach = ["the whole region"] if device.reach == "region" else []
    return "; ".join((", ".join(sorted(device.services)), *within, *policy, *reach))


def _over(device: Device) -> str:
    """By which transport it may come, and with which key."""
    return f"tls, key {device.certificate[:12]}" if device.certificate else device.transport


def _listed(ae_title: str, state: Path) -> Peer:
    from node.dimse.requestor import Peer

    require_node(state)
    with open_ledger(state) as ledger:
        device = ledger.device(ae_title)
    if device is None:
        raise NotFound(f"there is no device {ae_title}; `miss device ls` lists them, or give AE@HOST:PORT")
    if device.callable_at is None:
        raise InvalidInput(f"{ae_title} has no address and port to call: give AE@HOST:PORT, or "
                           f"`miss device add {ae_title} ADDRESS --port PORT`")
    return Peer(*device.callable_at, ae_title)


def _own_ae_title(state: Path) -> str:
    from miss import configuration

    file = state / configuration.Process.NODE.file
    return configuration.node(file).dimse.ae_title if file.exists() else "MISS-SEND"
