"""`miss hub`: the region's central process."""

from __future__ import annotations

from typing import Annotated

import typer

from miss import configuration
from miss.allocator import keep_buffers
from miss.configuration import Overrides, Process, SettingsFile
from miss.console import set_up_logging

app = typer.Typer(help="The region's hub: what every node dials.", no_args_is_help=True)

LogLevel = Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")]


@app.command()
def run(settings: SettingsFile = None, overrides: Overrides = None, log_level: LogLevel = "INFO") -> None:
    """Runs the hub until SIGTERM or Ctrl-C: nodes attach to it, push to it, and enrol at its second port.

    \b
    Examples:
      miss hub run --settings region/hub.toml
      miss hub run --settings region/hub.toml --set port=8443 --log-level DEBUG
    """
    keep_buffers()
    from federation.hub import Hub

    effective = configuration.hub(configuration.found(settings, Process.HUB), overrides)
    set_up_logging(log_level.upper())
    Hub(effective).run()
