"""`miss portal`: the web process, over the region or over one node alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archive.errors import InvalidInput
from miss import configuration
from miss.configuration import Overrides, Process, SettingsFile, State
from miss.console import err, program, set_up_logging
from miss.hub import LogLevel
from miss.node import Invite, Replace

app = typer.Typer(help="Pages, viewer and DICOMweb.", no_args_is_help=True)


@app.command()
def run(
    settings: SettingsFile = None,
    node: Annotated[Path | None, typer.Option(
        "--node", metavar="DIR", file_okay=False, show_default=False,
        help="Serve the one node with this folder, and no region: for when the WAN is down.")] = None,
    overrides: Overrides = None,
    log_level: LogLevel = "INFO",
) -> None:
    """Runs the portal until SIGTERM or Ctrl-C.

    Over the region it searches the regional archive and asks attached wards for what is still pending there.
    With --node it shows what one ward's node holds, on the node's own machine, without any network.

    \b
    Examples:
      miss portal run --settings portal/portal.toml
      miss portal run --node /srv/miss --set listen.port=8081
    """
    from portal.app import run as run_portal

    given = list(overrides or ())
    if node is not None:
        given.append(f"node.state={configuration.node(node / Process.NODE.file).state}")
        effective = configuration.portal(settings, given)
    else:
        effective = configuration.portal(configuration.found(settings, Process.PORTAL), given)
        if effective.region.state is None and effective.node.state is None:
            raise InvalidInput("the settings name neither region.state nor node.state: what is to be served?")
    set_up_logging(log_level.upper())
    run_portal(effective)


@app.command()
def enrol(
    invite: Invite,
    region: Annotated[Path, typer.Option(
        "--region", metavar="DIR", file_okay=False, exists=True, show_default=False,
        help="The hub's state folder, which the portal reads.")],
    replace: Replace = False,
    state: State = Path("."),
) -> None:
    """Makes the portal's key, trades the invite for a certificate and writes a portal.toml.

    \b
    Example:
      miss portal enrol miss1.MTI3... --region /srv/miss/region --state portal
    """
    from miss.region import enrol_portal

    identity = enrol_portal(invite, state, region, replace=replace)
    err.print(f"enrolled as {identity.uri}", style="green", markup=False)
    err.print(f"next: {program()} portal run --settings {state / Process.PORTAL.file}", markup=False)
