"""`miss ca`: the region's certificate authority and who may join. Works on the region's folder alone."""

from __future__ import annotations

import getpass
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archive.errors import InvalidInput, SettingsError
from miss import configuration
from miss.configuration import Process, State
from miss.console import err, out, program, table, when
from miss.ledgers import open_ledger, require_known_ward, require_region
from miss.peers import require_ae_title

if TYPE_CHECKING:
    from archive.ledger import CertificateRow

app = typer.Typer(help="The region's certificate authority, and who may join.", no_args_is_help=True)

DURATION = re.compile(r"(\d+)([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where; made when it is not there.",
                                           show_default=False)],
    region: Annotated[str, typer.Option(help="The region's name, in every certificate.", show_default=False)],
    host: Annotated[str, typer.Option(help="The name or address where nodes find the hub.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The hub's port for nodes and portals (gRPC).")] = 7443,
    enrol_port: Annotated[int, typer.Option(help="The hub's port where new members enrol (HTTPS).")] = 7444,
    passphrase: Annotated[bool, typer.Option(
        "--passphrase", help="Ask for a passphrase that encrypts the root key.")] = False,
) -> None:
    """Makes a region: its root and issuing CA, the ledger, and a hub.toml with every setting written out.

    The root key signs issuing CAs only: take `ca/root.key` offline when the region is real.

    \b
    Examples:
      miss ca init region --region liguria
      miss ca init /srv/miss --region liguria --host hub.miss.example --passphrase
    """
    from miss.region import create_region

    secret = None
    if passphrase:
        secret = typer.prompt("Passphrase of the root key", hide_input=True, confirmation_prompt=True,
                              err=True)
    authority = create_region(folder, region, host=host, port=port, enrol_port=enrol_port, passphrase=secret)
    err.print(f"the region {authority.region} is in {folder}", style="green", markup=False)
    err.print(f"next: {program()} hub run --settings {folder / Process.HUB.file}", markup=False)
    err.print(f"and:  {program()} ca invite --hospital ... --ward ... --issuer ... --state {folder}",
              markup=False)


@app.command()
def invite(
    hospital: Annotated[str, typer.Option(help="The hospital's name.", show_default=False)] = "",
    ward: Annotated[str, typer.Option(help="The ward's name.", show_default=False)] = "",
    issuer: Annotated[str, typer.Option(
        help="The assigning authority of the hospital's Patient IDs: with the ID it says who a patient is.",
        show_default=False)] = "",
    portal: Annotated[str, typer.Option(help="Invite a portal of this name, in place of a ward.",
                                        show_default=False)] = "",
    ttl: Annotated[str, typer.Option(help="How long the invite is good: 30m, 24h, 7d.")] = "24h",
    state: State = Path("."),
) -> None:
    """Prints a one-time invite: the line to give, over a channel you trust, to whoever sets the node up.

    It holds a secret and the pin of the region's root, so that the new member knows whom to believe. The
    names in the certificate come from here, never from the new member.

    \b
    Examples:
      miss ca invite --hospital "San Martino" --ward Radiology --issuer SAN-MARTINO --state region
      miss ca invite --portal portal1 --ttl 1h --state region
    """
    from miss.region import make_invite

    if bool(portal) == bool(ward or hospital or issuer):
        raise InvalidInput("give --hospital, --ward and --issuer for a ward, or --portal for a portal")
    with open_ledger(state) as ledger:
        line = make_invite(ledger, state, hospital=hospital, ward=ward, issuer=issuer, portal=portal,
                           life_s=duration_s(ttl), who=getpass.getuser())
    command = ("miss portal enrol INVITE --region HUB-FOLDER --state DIR" if portal else
               "miss node enrol INVITE --state DIR")
    err.print(f"good for {ttl} and for one key; where the new member is to run:\n\n  {command}\n",
              markup=False, soft_wrap=True)
    out.print(line, markup=False, soft_wrap=True)


@app.command()
def device(
    ae_title: Annotated[str, typer.Argument(metavar="AE-TITLE", show_default=False,
                                            help="The AE title that the certificate is good for.")],
    folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", show_default=False,
                                         help="Where key, certificate and trust go; made when not there.")],
    listener: Annotated[bool, typer.Option(
        "--listener", help="For a node's own DICOM TLS port; wants --dns or --ip.")] = False,
    ward: Annotated[str, typer.Option(help="Good at this ward's node alone, hospital/ward.",
                                      show_default=False)] = "",
    dns: Annotated[list[str] | None, typer.Option(help="A name by which others dial it; repeatable.",
                                                  show_default=False)] = None,
    ip: Annotated[list[str] | None, typer.Option(help="An address by which others dial it; repeatable.",
                                                 show_default=False)] = None,
    days: Annotated[int, typer.Option(help="Life of the certificate.", min=1, max=730)] = 365,
    use_rsa: Annotated[bool, typer.Option(
        "--rsa", help="An RSA key of 2,048 bits, for machines that know no elliptic curves.")] = False,
    passphrase: Annotated[bool, typer.Option(
        "--passphrase", help="Ask for the root key's passphrase: needed once, in a region made by a release "
                             "without DICOM TLS.")] = False,
    state: State = Path("."),
) -> None:
    """Makes a key and certificate for a machine that speaks DICOM over TLS: a modality, or a node's own port.

    The folder gets key.pem, certificate.pem (with its chain) and trust.pem (the region's root, for the peer).
    The key is nowhere else: hand the folder over by a way you trust, and remove it here.

    \b
    Examples:
      miss ca device CT1 --out ct1 --state region
      miss ca device MISS --listener --dns miss.radiology.example --ip 10.1.2.1 --out listener --state region
      miss ca device OLDMR --rsa --days 730 --ward san-martino/radiology --out oldmr --state region
    """
    from certs.devices import CERTIFICATE, KEY, DeviceName, issue_device

    require_region(state)
    if listener and not (dns or ip):
        raise InvalidInput("a listener needs the names or addresses that modalities dial: --dns, --ip")
    secret = typer.prompt("Passphrase of the root key", hide_input=True, err=True) if passphrase else None
    name = DeviceName(require_ae_title(ae_title).strip(), ward, tuple(dns or ()), tuple(ip or ()))
    with open_ledger(state) as ledger:
        require_known_ward(ledger, ward)
        row = issue_device(configuration.hub(state / Process.HUB.file).ca, ledger, name, folder,
                           use_rsa=use_rsa, life_s=days * SECONDS["d"], passphrase=secret,
                           who=getpass.getuser())
    err.print(f"{folder} holds the key and certificate of {row.identity}, until {when(row.not_after_us)}",
              style="green", markup=False, soft_wrap=True)
    if listener:
        err.print("carry it beside node.toml, and write there, in the section that it has:\n\n[dimse.tls]\n"
                  f"certificate = \"{folder.name}/{CERTIFICATE}\"\nkey = \"{folder.name}/{KEY}\"\n",
                  markup=False)
    else:
        err.print(f"where the node is: miss device add {name.ae_title} ADDRESS --transport tls", markup=False)


@app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Also what was superseded or revoked.")] = False,
    state: State = Path("."),
) -> None:
    """Lists the region's certificates and the invites that are still open.

    \b
    Examples:
      miss ca list --state region
      miss ca list --all --state region
    """
    with open_ledger(state) as ledger:
        grid = table("identity", "state", "until", "serial", title="certificates")
        for row in ledger.certificates():
            if everything or row.state == "active":
                grid.add_row(row.identity, row.state, when(row.not_after_us), row.serial)
        out.print(grid)
        waiting = [one for one in ledger.invites()
                   if one.state == "open" and one.expires_us > time.time() * 1e6]
    if waiting:
        grid = table("invite", "for", "until", title="\ninvites")
        for one in waiting:
            grid.add_row(one.id, f"{one.profile} {one.ward_id}", when(one.expires_us))
        out.print(grid)


@app.command()
def show(
    name: Annotated[str, typer.Argument(
        metavar="[WARD|IDENTITY|SERIAL]", help="Whose certificate; the authority itself when not given.",
        show_default=False)] = "",
    state: State = Path("."),
) -> None:
    """Shows the authority, or the certificates of one member.

    \b
    Examples:
      miss ca show --state region
      miss ca show san-martino/radiology --state region
    """
    from certs.authority import Authority

    if not name:
        authority = Authority.open(configuration.hub(state / Process.HUB.file).ca)
        for label, certificate in (("root", authority.root), ("issuing CA", authority.issuing)):
            out.print(f"{label}: {certificate.subject.rfc4514_string()}\n"
                      f"  serial {certificate.serial_number:x}, until "
                      f"{certificate.not_valid_after_utc:%Y-%m-%d}", markup=False)
        out.print(f"pin of the root: {authority.pin}", markup=False)
        return
    with open_ledger(state) as ledger:
        rows = [row for row in ledger.certificates()
                if name in (row.ward, row.identity, row.serial, row.fingerprint)]
    if not rows:
        raise InvalidInput(f"no certificate of {name!r}; `miss ca list --all` has them all")
    for row in rows:
        _show(row)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="WARD|IDENTITY|SERIAL", show_default=False,
                                        help="Whose certificates to take back.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit log.", show_default=False)],
    state: State = Path("."),
) -> None:
    """Takes a member's certificates back: its calls are refused and its open streams end within seconds.

    The member comes back with a new invite, enrolled with --replace.

    \b
    Examples:
      miss ca revoke galliera/radiology --reason "disk stolen" --state region
      miss ca revoke spiffe://liguria/portal/portal1 --reason "machine retired" --state region
    """
    from certs.registry import revoke as take_back

    with open_ledger(state) as ledger:
        rows = take_back(ledger, name, reason=reason, who=getpass.getuser())
    if not rows:
        err.print("nothing to do: it was revoked already", style="yellow")
    for row in rows:
        err.print(f"revoked {row.identity}, serial {row.serial}", style="green", markup=False,
                  soft_wrap=True)
    if rows and rows[0].profile == "device":
        err.print("nodes have no list of revoked certificates: take the device off theirs, `miss device rm`")
    elif rows:
        err.print("it comes back with a new invite, enrolled with --replace")


def duration_s(text: str) -> int:
    """30m, 24h, 7d, in seconds."""
    matched = DURATION.fullmatch(text.strip())
    if matched is None or int(matched[1]) == 0:
        raise SettingsError(f"{text!r}: write a number and s, m, h or d, for example 24h")
    return int(matched[1]) * SECONDS[matched[2]]


def _show(row: CertificateRow) -> None:
    out.print(f"{row.identity}\n  {row.state}{f' ({row.reason})' if row.reason else ''}, "
              f"{when(row.not_before_us)} to {when(row.not_after_us)}\n"
              f"  serial {row.serial}\n  fingerprint {row.fingerprint}", markup=False, soft_wrap=True)
