"""`miss region backed-up`: says to the region that a backup has everything that it confirmed up to a time, so
that its nodes may give those bytes up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from archive.errors import InvalidInput
from miss import configuration
from miss.configuration import Process, State
from miss.console import err, when
from miss.ledgers import open_ledger, require_region

app = typer.Typer(help="The region as a whole: its backups.", no_args_is_help=True)


@app.callback()
def region() -> None:
    """The region as a whole: its backups."""


@app.command("backed-up")
def backed_up(
    as_of: Annotated[str, typer.Option(metavar="TIME", help=(
        "When the backup began, or the moment of its snapshot: 2026-11-22T02:00, local time, or `now`."))
    ] = "now",
    state: State = Path("."),
) -> None:
    """Declares a backup of the region: everything that was confirmed to a ward up to that time is in it.

    Say it only of a backup that was tried, and that lies elsewhere: with protection.by = "backup" nodes rely
    on it when they give bytes up.

    \b
    Examples:
      miss region backed-up --as-of 2026-11-22T02:00 --state region
    """
    from archive.ledger import AuditRow, DeclaredBackup
    from miss.orders import person
    from miss.packs import time_us

    require_region(state)
    now_us = time.time_ns() // 1000
    as_of_us = time_us(as_of)
    if as_of_us > now_us + 1_000_000:
        raise InvalidInput("no backup has what is still to come")
    with open_ledger(state) as ledger:
        ledger.declare_backup(DeclaredBackup(as_of_us, person(), now_us))
        ledger.audit(AuditRow(at_us=now_us, who=person(), act="backed up", subject=when(as_of_us),
                              outcome="success"))
    settings = configuration.hub(state / Process.HUB.file)
    words = "" if settings.protection.by == "backup" else (
        '; it does not count as long as protection.by is "age"')
    err.print(f"declared: the region is in a backup as of {when(as_of_us)}{words}", style="green",
              markup=False)
