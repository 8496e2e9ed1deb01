"""`miss reconcile` and `miss scrub`: that a ward and the region compare what they have, that everything on a
disk is read again, and what came of either. The node or the hub that runs does it; what came of it is read
from the folder alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archive.errors import InvalidInput
from miss.configuration import Process, State
from miss.console import EXIT_ERROR, err, out, size, when
from miss.ledgers import open_ledger, require_known_ward

if TYPE_CHECKING:
    from federation.reconcile_notes import Outcome

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]


def reconcile(
    ward: Annotated[str, typer.Option(metavar="WARD", show_default=False, help=(
        "At the region: the ward (hospital/ward) that is asked; else every one that is attached."))] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help=(
        "At a node: only say what would be done."))] = False,
    last: Annotated[bool, typer.Option("--last", help="Only say what came of the last ones.")] = False,
    as_json: AsJson = False,
    state: State = Path("."),
) -> None:
    """Compares what a ward gave with what the region has of it, and has what differs mended on both sides.
    Ends with 1 when something needs a person. DIR is the node's, or the region's.

    \b
    Examples:
      miss reconcile --state /srv/miss
      miss reconcile --dry-run --state /srv/miss
      miss reconcile --ward san-martino/radiology --state region
      miss reconcile --last --state region
    """
    from federation.reconcile_notes import Notes
    from federation.reconcile_orders import RECONCILE
    from miss.orders import archive_of

    settings, is_node = archive_of(state)
    if not last:
        if ward and is_node:
            raise InvalidInput("--ward is for the region's folder: a node compares itself")
        if dry_run and not is_node:
            raise InvalidInput("--dry-run is for a node's folder")
        _require_running(state)
        detail = {"ward": ward} if ward else {}
        err.print(_order(state, RECONCILE, detail | ({"dry_run": "yes"} if dry_run else {})), markup=False)
        return
    if ward and not is_node:
        with open_ledger(state) as ledger:
            require_known_ward(ledger, ward)
    noted = Notes(settings.state).now
    found = {"": noted.last} if is_node and noted.last is not None else dict(noted.wards)
    if ward:
        found = {name: outcome for name, outcome in found.items() if name == ward}
    if as_json:
        told = {name or "here": asdict(one) for name, one in found.items() if one}
        out.print_json(json.dumps({"held": noted.held, "last": told}))
    else:
        for name, outcome in found.items():
            if outcome is not None:
                _tell(name, outcome)
        if noted.held:
            err.print("nothing is evicted until the region was compared: its store came from a backup",
                      style="yellow", markup=False)
        if not found:
            err.print("nothing was compared yet", markup=False)
    if any(outcome is not None and outcome.alarms for outcome in found.values()):
        raise typer.Exit(EXIT_ERROR)


def scrub(
    now: Annotated[bool, typer.Option("--now", help="Begin to read everything again now.")] = False,
    as_json: AsJson = False,
    state: State = Path("."),
) -> None:
    """Says how far everything on the disk was read again, and what was found. What is damaged is brought from
    the other copy; `miss packs verify` reads packs at once, in a process of its own, and flags nothing.

    \b
    Examples:
      miss scrub --state /srv/miss
      miss scrub --now --state region
    """
    from archive.space.scrubber import read_note
    from federation.reconcile_orders import SCRUB
    from miss.orders import archive_of

    settings, _ = archive_of(state)
    if now:
        _require_running(state)
        err.print(_order(state, SCRUB, {}), markup=False)
        return
    note = read_note(settings.state)
    if as_json:
        out.print_json(json.dumps(asdict(note)))
        return
    if note.full_us:
        out.print(f"all was read until {when(note.full_us)}: {size(note.full_bytes)}, "
                  f"{note.full_found} damaged", markup=False)
    else:
        out.print("not all was read yet", markup=False)
    if note.began_us:
        where = f"pack {note.pack} and those before it are read" if note.pack else "in the first pack"
        out.print(f"a pass goes on since {when(note.began_us)}: {where}, {note.found} damaged", markup=False,
                  soft_wrap=True)
    out.print(f"{note.ever} found damaged in all", markup=False)


def _tell(ward: str, outcome: Outcome) -> None:
    words = f"{when(outcome.ended_us or outcome.began_us)} ({outcome.reason}): {outcome.words()}"
    out.print(f"{ward}: {words}" if ward else words, markup=False, soft_wrap=True)
    for alarm in outcome.listed_alarms:
        err.print(f"  {alarm.sop_instance_uid}: {alarm.words}", style="red", markup=False, soft_wrap=True)


def _order(state: Path, kind: str, detail: dict[str, Any]) -> str:
    from miss.orders import carry_out

    return carry_out(state, kind, detail)


def _require_running(state: Path) -> None:
    from miss.orders import archive_of, is_held

    if not is_held(archive_of(state)[0]):
        what = "hub" if (state / Process.HUB.file).exists() else "node"
        raise InvalidInput(f"the {what} does not run: only it has a line; start it with `miss {what} run`")
