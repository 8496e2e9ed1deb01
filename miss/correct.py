"""`miss correct`: says what attributes of a study or its patient are to be, and takes that back. Deciding is
`archive/correction_orders.py`'s; the process that runs does it, else this command. Values are patient data,
for the terminal of whoever may see them: they go into no log but the audit log."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archive.errors import InvalidInput
from miss.configuration import State
from miss.conflicts import reading
from miss.console import err, out, plain, table, when

if TYPE_CHECKING:
    from archive.corrections import Correction

app = typer.Typer(help="Correct a study's or its patient's attributes, and take that back.",
                  no_args_is_help=True)

DIGITS = 8  # of an id, as shown
ID_BYTES = 8
REFUSALS_MAX = 1_000
NONE = "nothing is corrected here"

Reason = Annotated[str, typer.Option(help="Why; kept with the correction: no patient's name.",
                                     show_default=False)]
Set = Annotated[list[str], typer.Option("--set", metavar="KEYWORD=VALUE", show_default=False,
                                        help="What the attribute is to be; nothing after = takes its value "
                                             "away. May be given several times.")]


@app.command()
def study(
    uid: Annotated[str, typer.Argument(metavar="UID", help="The Study Instance UID.", show_default=False)],
    changes: Set, reason: Reason, state: State = Path("."),
) -> None:  # fmt: skip
    """Corrects attributes of a study and of its patient, for what is here and what arrives later. What came
    stays as it came in the packs; who reads it gets the corrected values, and the original ones beside them
    in the Original Attributes Sequence.

    \b
    Examples:
      miss correct study 1.2.840.1 --set PatientID=4711 --set PatientName=Rossi^Maria \\
          --reason "wrong worklist entry" --state /srv/miss
      miss correct study 1.2.840.1 --set AccessionNumber= --reason "of another study" --state /srv/miss
    """
    from archive.correction_orders import CORRECT
    from archive.corrections import checked_changes
    from miss.orders import carry_out

    body = dict(checked_changes(_changes(changes)))  # before it is asked: what is wrong is said at once
    detail = {
        "study": uid, "id": secrets.token_hex(ID_BYTES), "at_us": str(time.time_ns() // 1000),
        "reason": reason, "set": json.dumps(body),
    }  # fmt: skip
    err.print(carry_out(state, CORRECT, detail), style="green", markup=False, soft_wrap=True)


@app.command()
def undo(
    id: Annotated[str, typer.Argument(metavar="ID", show_default=False,
                                      help="The correction, as `miss correct ls` shows it, or how its id "
                                           "begins.")],
    reason: Reason, state: State = Path("."),
) -> None:  # fmt: skip
    """Takes a correction back: what it set is again what came, or what another correction says. What was
    decided in the region is taken back there.

    \b
    Example:
      miss correct undo 3f0a9c12 --reason "it was right" --state /srv/miss
    """
    from archive.correction_orders import UNDO
    from miss.orders import carry_out

    words = carry_out(state, UNDO, {"id": id, "reason": reason})
    err.print(words, style="green", markup=False, soft_wrap=True)


@app.command("ls")
def ls(
    study: Annotated[str, typer.Option(metavar="UID", help="Of this study alone.", show_default=False)] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    state: State = Path("."),
) -> None:
    """Lists what was corrected, by whom and why, newest first, with the values: patient data. What the region
    did not take of a ward says so.

    \b
    Examples:
      miss correct ls --state /srv/miss
      miss correct ls --study 1.2.840.1 --json --state /srv/miss
    """
    from miss.ledgers import open_ledger

    with reading(state) as archive:
        found = archive.index.corrections.listed(limit, study_uid=study or None)
    with open_ledger(state) as ledger:
        refused = _refused(ledger)
    rows = [_as_dict(one, refused.get(one.id, "")) for one in found]
    if as_json:
        out.print_json(json.dumps(rows))
        return
    if not rows:
        err.print(NONE)
        return
    grid = table("id", "study", "set", "by", "why", "at", "stands")
    for one, row in zip(found, rows, strict=True):
        values = "; ".join(f"{keyword}={value}" for keyword, value in one.changes)
        grid.add_row(one.id[:DIGITS], one.study_uid, plain(values), plain(_who(one.by, one.ward)),
                     plain(one.reason), when(one.at_us), plain(row["stands"]))  # fmt: skip
    out.print(grid)


def _changes(texts: list[str]) -> dict[str, str]:
    changes: dict[str, str] = {}
    for text in texts:
        keyword, is_set, value = text.partition("=")
        if not is_set or keyword in changes:
            raise InvalidInput("--set is KEYWORD=VALUE, each keyword once")
        changes[keyword] = value
    return changes


def _refused(ledger: Any) -> dict[str, str]:
    """Why the region did not take a correction of this ward, by its id."""
    from federation.facts_refusals import ACT, refused_of

    return {one.decision: one.reason for one in refused_of(ledger.audit_rows(REFUSALS_MAX, act=ACT))}


def _who(by: str, ward: str) -> str:
    return f"{by}, {ward or 'region'}"


def _as_dict(one: Correction, refused: str) -> dict[str, Any]:
    stands = "counts"
    if one.undone is not None:
        undone = one.undone
        stands = f"undone by {_who(undone.by, undone.ward)}, {when(undone.at_us)}: {undone.reason}"
    if refused:
        stands += f"; the region does not take it: {refused}"
    return {
        "id": one.id, "study_uid": one.study_uid, "set": dict(one.changes), "by": one.by, "ward": one.ward,
        "reason": one.reason, "at_us": one.at_us, "undone": one.undone is not None, "stands": stands,
        "refused": refused,
    }  # fmt: skip
