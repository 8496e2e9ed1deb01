"""`miss deliveries`: what wards of a region hand to each other, what waits, and what failed. It reads the
ledger and needs no process to run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from miss.backlog import duration
from miss.configuration import Process, State
from miss.console import err, out, table, when
from miss.ledgers import open_ledger, require_known_ward, require_region

if TYPE_CHECKING:
    from archive.ledger import Delivery, DeliveryStanding

app = typer.Typer(help="What wards hand to each other by routing rules: what waits, and what failed.",
                  no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]
From = Annotated[str, typer.Option("--from", metavar="WARD", help="Of this ward alone.", show_default=False)]
To = Annotated[str, typer.Option("--to", metavar="WARD", help="To this ward alone.", show_default=False)]


@app.command("ls")
def ls(as_json: AsJson = False, state: State = Path(".")) -> None:
    """Shows the deliveries from ward to ward. DIR is the region's folder, or a node's: that knows of its own,
    as the hub told it last.

    \b
    Examples:
      miss deliveries ls --state region
      miss deliveries ls --state /srv/miss --json
    """
    with open_ledger(state) as ledger:
        is_region = (state / Process.HUB.file).exists()
        now_us = time.time_ns() // 1000
        found = ledger.delivery_standings(now_us) if is_region else ledger.told_standings()
    if as_json:
        out.print_json(json.dumps([asdict(one) for one in found]))
        return
    out.print(standing_table(found))


@app.command()
def failed(
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many, the last first.", min=1,
                                       max=1000)] = 100,
    as_json: AsJson = False,
    state: State = Path("."),
) -> None:
    """Lists, at the region, each instance that a ward refused, why, and when it is tried again.

    \b
    Example:
      miss deliveries failed --state region
    """
    require_region(state)
    with open_ledger(state) as ledger:
        rows = ledger.troubled_deliveries(limit)
    if as_json:
        out.print_json(json.dumps([_as_dict(row) for row in rows]))
        return
    grid = table("from", "to", "SOP Instance UID", ">tries", "again at", "reason")
    for row in rows:
        again = "given up" if row.done_us else when(row.due_us)
        grid.add_row(row.key.from_ward, row.key.to_ward, row.key.sop_instance_uid, str(row.tries), again,
                     row.reason)
    out.print(grid)


@app.command()
def retry(from_ward: From = "", to_ward: To = "", state: State = Path(".")) -> None:
    """Has the region try again what was given up.

    \b
    Examples:
      miss deliveries retry --state region
      miss deliveries retry --to galliera/oncology --state region
    """
    require_region(state)
    with open_ledger(state) as ledger:
        for ward in (from_ward, to_ward):
            require_known_ward(ledger, ward)
        count = ledger.retry_deliveries(from_ward=from_ward or None, to_ward=to_ward or None)
    err.print(f"tried again: {count}", style="green" if count else "yellow")


def standing_table(standings: Sequence[DeliveryStanding], *, title: str = "") -> Any:
    """The deliveries from ward to ward, a line each."""
    grid = table("from", "to", ">waiting", ">not in the region", "the oldest for", ">delivered in a day",
                 ">failed", "last reason", title=title or None)
    for one in standings:
        age = duration(time.time() - one.oldest_us / 1e6) if one.oldest_us else "-"
        grid.add_row(one.from_ward, one.to_ward, str(one.waiting), str(one.awaited), age, str(one.delivered),
                     Text(str(one.failed), "red" if one.failed else ""), one.reason)
    return grid


def _as_dict(row: Delivery) -> dict[str, Any]:
    return {"from_ward": row.key.from_ward, "to_ward": row.key.to_ward,
            "sop_instance_uid": row.key.sop_instance_uid, "digest": row.key.digest.hex(),
            "state": row.state.value, "tries": row.tries, "ordered_us": row.ordered_us,
            "again_us": row.due_us if not row.done_us else 0, "reason": row.reason}
