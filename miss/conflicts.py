"""`miss conflicts`: several contents under one SOP Instance UID, shown to people, who decide. The values that
`diff` prints are patient data, for the terminal of whoever may see them: they go into no log."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archive.errors import Unavailable
from miss.configuration import State
from miss.console import err, out, plain, table, when

if TYPE_CHECKING:
    from archive.archive import Archive
    from archive.conflicts.comparison import Difference
    from archive.model import ConflictRow, ConflictState, Refusal

app = typer.Typer(help="Several contents under one UID: see them, compare them, decide.",
                  no_args_is_help=True)

DIGITS = 12  # of a digest, as shown: enough to name it
ROWS_MAX = 10_000  # that are looked through for those of a device or a study
INDEX_WAIT_S = 5.0
NONE = "no conflicts of this kind ({}); --show has the others"

Uid = Annotated[str, typer.Argument(metavar="UID", help="The SOP Instance UID.", show_default=False)]
Digest = Annotated[str, typer.Argument(metavar="[DIGEST]", show_default=False,
                                       help="Which content: the first digits of its digest, as `ls` shows "
                                            "them. Not needed when one alone waits.")]


class Which(StrEnum):
    """What `ls` lists."""

    OPEN = "open"
    DECIDED = "decided"
    EQUIVALENT = "equivalent"
    REFUSED = "refused"


@app.command("ls")
def ls(
    which: Annotated[Which, typer.Option("--show", help="Those that wait for a decision; or were decided; "
                                                        "or are the same in another encoding; or were not "
                                                        "taken.")] = Which.OPEN,
    device: Annotated[str, typer.Option(help="Only what came from this device.", show_default=False)] = "",
    study: Annotated[str, typer.Option(metavar="UID", help="Only of this study.", show_default=False)] = "",
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many, newest first.", min=1,
                                       max=10_000)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
    state: State = Path("."),
) -> None:
    """Lists what came under a UID that was here already, with another content.

    \b
    Examples:
      miss conflicts ls --state /srv/miss
      miss conflicts ls --show decided --device CT1 --json --state /srv/miss
    """
    with reading(state) as archive:
        if which is Which.REFUSED:
            refused = archive.index.refusals(ROWS_MAX if device else limit)
            _show_refused([row for row in refused if not device or row.device == device][:limit], as_json)
            return
        rows = archive.index.conflicts(ROWS_MAX if device or study else limit, states=_states(which))
    rows = [row for row in rows
            if (not device or row.device == device)
            and (not study or study in (row.study_uid, row.kept_study_uid))][:limit]
    if as_json:
        out.print_json(json.dumps([_as_dict(row) for row in rows]))
        return
    if not rows:
        err.print(NONE.format(which.value))
        return
    grid = table("SOP Instance UID", "content", "what", "from", "received", "decided")
    for row in rows:
        decided = f"{row.decided_by}, {when(row.decided_us)}" if row.decided_by else "-"
        grid.add_row(row.sop_instance_uid, row.other_digest.hex()[:DIGITS], _words(row), row.device,
                     when(row.received_at_us), decided)
    out.print(grid)


@app.command()
def diff(uid: Uid, digest: Digest = "", state: State = Path(".")) -> None:
    """Says in which elements a kept content differs from the one that is served, with both values: patient
    data. Pixel data are compared, not shown.

    \b
    Examples:
      miss conflicts diff 1.2.840.1 --state /srv/miss
      miss conflicts diff 1.2.840.1 3f0a9c --state /srv/miss
    """
    from archive.conflicts.decisions import choose
    from archive.conflicts.sorting import compare_contents

    with reading(state) as archive:
        row, live = choose(archive.index, uid, digest), archive.index.live(uid)
        if live is None:
            out.print("nothing is served under this UID: there is nothing to compare with")
            return
        found = compare_contents(archive.packs, live, row, show=True)
    if row.study_uid != row.kept_study_uid or row.series_uid != row.kept_series_uid:
        where = "study" if row.study_uid != row.kept_study_uid else "series"
        err.print(f"the other is of another {where}", style="yellow")
    if found.differences:
        grid = table("element", "name", "served", "other")
        for one in found.differences:
            grid.add_row(one.path, _name(one), one.first or "-", one.second or "-")
        out.print(grid)
    if found.truncated:
        err.print("and more: these are the first", style="yellow")
    if found.pixels is not None:
        out.print(f"pixel data: {found.pixels.words}", markup=False)
    if found.undecided:
        err.print(f"not compared to the end: {found.undecided}", style="yellow", markup=False)
    if found.equal:
        out.print("the same content in another encoding")


@app.command()
def accept(uid: Uid, digest: Digest = "", state: State = Path(".")) -> None:
    """Serves another content under this UID from now on: what was served is kept in its place, so that
    accepting it again undoes this. A node or hub that runs does it, else this command.

    \b
    Examples:
      miss conflicts accept 1.2.840.1 --state /srv/miss
      miss conflicts accept 1.2.840.1 3f0a9c --state /srv/miss
    """
    from archive.conflicts.decisions import ACCEPT

    _decide(state, ACCEPT, uid, digest)


@app.command()
def reject(uid: Uid, digest: Digest = "", state: State = Path(".")) -> None:
    """Closes a conflict: the content stays kept and is not asked about again.

    \b
    Example:
      miss conflicts reject 1.2.840.1 --state /srv/miss
    """
    from archive.conflicts.decisions import REJECT

    _decide(state, REJECT, uid, digest)


def _decide(state: Path, kind: str, uid: str, digest: str) -> None:
    from archive.conflicts.decisions import choose
    from miss.orders import carry_out

    with reading(state) as archive:
        row = choose(archive.index, uid, digest)
    words = carry_out(state, kind, {"uid": uid, "digest": row.other_digest.hex()})
    err.print(words, style="green", markup=False, soft_wrap=True)


@contextmanager
def reading(state: Path) -> Iterator[Archive]:
    """The archive beside the process that writes it, as of now as far as that runs."""
    from archive.archive import Archive
    from miss.orders import archive_of

    settings, outbox = archive_of(state)
    with Archive.open(settings, outbox=outbox, read_only=True) as archive:
        with contextlib.suppress(Unavailable):  # one that does not run indexes at its next start
            archive.wait_indexed(INDEX_WAIT_S)
        yield archive


def _states(which: Which) -> list[ConflictState]:
    from archive.model import UNDECIDED, ConflictState

    return {
        Which.OPEN: list(UNDECIDED),
        Which.DECIDED: [ConflictState.REJECTED, ConflictState.REPLACED],
        Which.EQUIVALENT: [ConflictState.EQUIVALENT],
    }[which]


def _words(row: ConflictRow) -> str:
    from archive.model import ConflictState

    words = {
        ConflictState.OPEN: "conflict", ConflictState.PROPOSED: "proposed correction",
        ConflictState.EQUIVALENT: "the same in another encoding", ConflictState.REJECTED: "rejected",
        ConflictState.REPLACED: "was served before",
    }[row.state]  # fmt: skip
    if row.kept_digest and row.study_uid != row.kept_study_uid:
        return f"{words}, in another study"
    if row.kept_digest and row.series_uid != row.kept_series_uid:
        return f"{words}, in another series"
    return words


def _name(difference: Difference) -> str:
    from pydicom.datadict import dictionary_description

    try:
        return dictionary_description(difference.tag)
    except KeyError:
        return "private" if difference.tag >> 16 & 1 else "-"


def _as_dict(row: ConflictRow) -> dict[str, Any]:
    return {
        "sop_instance_uid": row.sop_instance_uid, "digest": row.other_digest.hex(),
        "served_digest": row.kept_digest.hex(), "state": row.state.value, "device": row.device,
        "ward": row.ward, "received_at_us": row.received_at_us, "study_uid": row.study_uid,
        "series_uid": row.series_uid, "served_study_uid": row.kept_study_uid,
        "served_series_uid": row.kept_series_uid,
        "transfer_syntax_uid": row.head.transfer_syntax_uid, "decided_by": row.decided_by,
        "decided_us": row.decided_us,
    }  # fmt: skip


def _show_refused(rows: list[Refusal], as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps([
            {"sop_instance_uid": row.sop_instance_uid, "digest": row.digest.hex(), "device": row.device,
             "ward": row.ward, "at_us": row.at_us} for row in rows]))
        return
    if not rows:
        err.print(NONE.format(Which.REFUSED.value))
        return
    grid = table("SOP Instance UID", "content", "from", "refused")
    for row in rows:
        grid.add_row(row.sop_instance_uid, row.digest.hex()[:DIGITS], plain(row.device), when(row.at_us))
    out.print(grid)
