"""`miss remove`: takes a study, a series or an instance out of sight, undoes that, and purges it. Deciding is
`archive/removing.py`'s; the process that runs does it, else this command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miss.configuration import State
from miss.conflicts import reading
from miss.console import err, out, plain, table, when

if TYPE_CHECKING:
    from archive.index.removed import Tombstone

app = typer.Typer(help="Take a study, a series or an instance out of sight, undo that, or purge it.",
                  no_args_is_help=True)

NONE = "nothing is removed here"

Uid = Annotated[str, typer.Argument(metavar="UID", help="Its UID.", show_default=False)]
Id = Annotated[str, typer.Argument(metavar="ID", show_default=False,
                                   help="The removal, as `miss remove ls` shows it, or how its id begins.")]
Reason = Annotated[str, typer.Option(help="Why; kept with the removal and shown to everybody who may see it: "
                                          "no patient's name.", show_default=False)]
Code = Annotated[str, typer.Option(help="A rejection instead of a deletion: 113001 quality, 113037 patient "
                                        "safety, 113038 wrong worklist entry; or 113039, retention has "
                                        "expired. A rejection only hides, also inside retention.",
                                   show_default=False)]


@app.command()
def study(uid: Uid, reason: Reason, code: Code = "", state: State = Path(".")) -> None:
    """Removes what was received of a study until now: nobody finds it any more, here and at the other side
    of the line. It can be undone until it is purged.

    \b
    Examples:
      miss remove study 1.2.840.1 --reason "sent twice" --state /srv/miss
      miss remove study 1.2.840.1 --reason "wrong patient" --code 113038 --state /srv/miss
    """
    _remove(state, "study", uid, reason, code)


@app.command()
def series(uid: Uid, reason: Reason, code: Code = "", state: State = Path(".")) -> None:
    """Removes what was received of a series until now.

    \b
    Example:
      miss remove series 1.2.840.1.7 --reason "phantom" --state /srv/miss
    """
    _remove(state, "series", uid, reason, code)


@app.command()
def instance(uid: Uid, reason: Reason, code: Code = "", state: State = Path(".")) -> None:
    """Removes one instance, also one that is still to come.

    \b
    Example:
      miss remove instance 1.2.840.1.7.3 --reason "blurred" --code 113001 --state /srv/miss
    """
    _remove(state, "instance", uid, reason, code)


@app.command()
def undo(id: Id, state: State = Path(".")) -> None:
    """Shows again what was removed; of a rejection note, all that it rejected. Purged is purged.

    \b
    Example:
      miss remove undo 3f0a9c12 --state /srv/miss
    """
    from archive.removing import UNDO
    from miss.orders import carry_out

    err.print(carry_out(state, UNDO, {"id": id}), style="green", markup=False, soft_wrap=True)


@app.command()
def purge(
    id: Id,
    yes: Annotated[bool, typer.Option("--yes", help="Without it only what would go is said.")] = False,
    state: State = Path("."),
) -> None:
    """Gives back the bytes of what was removed, for good: refused inside retention. Without this command it
    happens by itself, `removal.undo_days` after the removal.

    \b
    Example:
      miss remove purge 3f0a9c12 --yes --state /srv/miss
    """
    from archive.removing import PURGE, named
    from miss.orders import carry_out

    if yes:
        err.print(carry_out(state, PURGE, {"id": id}), style="green", markup=False, soft_wrap=True)
        return
    with reading(state) as archive:
        found = [one for one in named(archive.index, id) if one.in_force]
    out.print(f"{sum(one.kept for one in found)} instances would be purged; --yes does it")


@app.command("ls")
def ls(
    everything: Annotated[bool, typer.Option("--all", help="Those that were undone, too.")] = False,
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many, newest first.", min=1,
                                       max=10_000)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
    state: State = Path("."),
) -> None:
    """Lists what was removed or rejected: by whom, why, and whether its bytes are still here.

    \b
    Examples:
      miss remove ls --state /srv/miss
      miss remove ls --all --json --state /srv/miss
    """
    with reading(state) as archive:
        found = archive.index.removals(limit, in_force=not everything)
    if as_json:
        out.print_json(json.dumps([_as_dict(one) for one in found]))
        return
    if not found:
        err.print(NONE)
        return
    grid = table("id", "what", "UID", "why", "by", "when", "instances", "state")
    for one in found:
        removal = one.removal
        grid.add_row(removal.order, removal.level.value.lower(), removal.uid, plain(_why(one)),
                     plain(removal.by), when(removal.at_us), str(one.hidden), _state(one))
    out.print(grid)


def _remove(state: Path, level: str, uid: str, reason: str, code: str) -> None:
    from archive.removing import REMOVE
    from miss.orders import carry_out

    detail = {"level": level, "uid": uid, "reason": reason}
    if code:
        detail["code"] = code
    err.print(carry_out(state, REMOVE, detail), style="green", markup=False, soft_wrap=True)


def _why(one: Tombstone) -> str:
    from archive.removals import CODES

    code = one.removal.code
    return f"{one.removal.reason} ({code}, {CODES.get(code, 'unknown')})" if code else one.removal.reason


def _state(one: Tombstone) -> str:
    if not one.in_force:
        return f"undone {when(one.restored_us)}"
    if one.purged:
        return f"purged {when(one.purged_us)}" + (f", {one.kept} kept by retention" if one.kept else "")
    return "hidden"


def _as_dict(one: Tombstone) -> dict[str, object]:
    removal = one.removal
    return {
        "id": removal.id, "level": removal.level.value, "uid": removal.uid, "study_uid": removal.study_uid,
        "code": removal.code, "by": removal.by, "reason": removal.reason, "at_us": removal.at_us,
        "ward": removal.ward, "in_force": one.in_force, "purged": one.purged, "final": one.final,
        "restored_us": one.restored_us, "restored_by": one.restored_by, "purged_us": one.purged_us,
        "purged_by": one.purged_by, "purged_ward": one.purged_ward, "instances": one.hidden,
        "with_bytes": one.kept,
    }  # fmt: skip
