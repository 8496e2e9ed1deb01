"""`miss settings`: what a process would run with, and whether its file is good. Starts nothing."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from archive.settings import load, render_toml
from miss.configuration import Overrides, Process, SettingsFile, flags, found, settings_class
from miss.console import err, out

app = typer.Typer(help="Show and check settings: the file < the environment < flags.", no_args_is_help=True)

Which = Annotated[Process, typer.Argument(help="Whose settings.", show_default=False)]


@app.command()
def show(
    process: Which, settings: SettingsFile = None, overrides: Overrides = None,
    comments: Annotated[bool, typer.Option(help="With what each setting means.")] = True,
) -> None:
    """Prints every setting that a process would run with, as a file that can be used; secrets left out.

    \b
    Examples:
      miss settings show node --settings /srv/miss/node.toml
      MISS_DIMSE_PORT=104 miss settings show node --settings node.toml --no-comments
    """
    effective = load(settings_class(process), found(settings, process), os.environ, flags(overrides))
    out.print(render_toml(effective, comments=comments, secrets=False), markup=False, soft_wrap=True, end="")


@app.command()
def check(process: Which, settings: SettingsFile = None, overrides: Overrides = None) -> None:
    """Reads the settings and says whether a process could start with them; an unknown key is named.

    \b
    Examples:
      miss settings check hub --settings region/hub.toml
      miss settings check node && systemctl restart miss-node
    """
    path = found(settings, process)
    effective = load(settings_class(process), path, os.environ, flags(overrides))
    if process is not Process.PORTAL:
        effective.check()
    if process is Process.NODE:
        from node.composition import tls_listener
        from node.service import load_identity

        if effective.dimse.tls.enabled:
            tls_listener(effective.dimse.tls, load_identity(effective))
    err.print(f"{path}: good", style="green")
