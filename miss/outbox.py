"""`miss backlog`: what a node has that the region lacks, what replication gave up on, and what people do
about it. Reads the node's own disk; what changes the backlog goes to the process that runs, as an order."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from miss import configuration
from miss.backlog import duration
from miss.configuration import Process, State
from miss.console import err, out, size, table
from miss.ledgers import require_node

app = typer.Typer(help="What a node still has to push to the region.", no_args_is_help=True)

ROWS_MAX = 10_000
INDEX_WAIT_S = 5.0

Study = Annotated[str, typer.Argument(metavar="STUDY", help="A Study Instance UID.", show_default=False)]


@app.command("ls")
def ls(
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many studies, the oldest first.", min=1,
                                       max=ROWS_MAX)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
    state: State = Path("."),
) -> None:
    """Lists the studies of which the region lacks something, and what was set aside, with the reason.

    \b
    Examples:
      miss backlog ls --state /srv/miss
      miss backlog ls --json --state /srv/miss
    """
    from archive.archive import Archive

    require_node(state)
    settings = configuration.node(state / Process.NODE.file)
    archive = Archive.open(settings.archive_settings(), outbox=True, read_only=True)
    try:
        studies, given_up = archive.index.pending_studies(limit), archive.index.set_aside(limit)
    finally:
        archive.close()
    if as_json:
        out.print_json(json.dumps({
            "studies": [{"study_uid": one.study_uid, "instances": one.count, "bytes": one.bytes,
                         "oldest_us": one.oldest_us, "set_aside": one.set_aside} for one in studies],
            "set_aside": [{"sop_instance_uid": uid, "digest": digest.hex(), "reason": reason}
                          for uid, digest, reason in given_up],
        }))  # fmt: skip
        return
    if not studies:
        err.print("nothing: the region has everything")
        return
    grid = table("Study Instance UID", ">instances", ">size", ">set aside", "oldest")
    for one in studies:
        oldest = "-" if one.oldest_us is None else duration(time.time() - one.oldest_us / 1e6)
        grid.add_row(one.study_uid, str(one.count), size(one.bytes), str(one.set_aside), oldest)
    out.print(grid)
    if given_up:
        grid = table("set aside: SOP Instance UID", "reason")
        for uid, _, reason in given_up:
            grid.add_row(uid, reason)
        out.print(grid)


@app.command()
def urgent(study: Study, state: State = Path(".")) -> None:
    """Pushes a study to the region before everything else.

    \b
    Example:
      miss backlog urgent 1.2.840.1 --state /srv/miss
    """
    from archive.backlog_orders import URGENT

    _order(URGENT, {"study": study}, state)


@app.command()
def retry(
    uid: Annotated[str, typer.Option("--uid", metavar="UID", help="This instance alone.",
                                     show_default=False)] = "",
    state: State = Path("."),
) -> None:
    """Tries again what was set aside, as if it had just come.

    \b
    Examples:
      miss backlog retry --state /srv/miss
      miss backlog retry --uid 1.2.840.1.5 --state /srv/miss
    """
    from archive.backlog_orders import RETRY

    _order(RETRY, {"uid": uid} if uid else {}, state)


def _order(kind: str, detail: dict[str, str], state: Path) -> None:
    from miss.orders import carry_out

    require_node(state)
    err.print(carry_out(state, kind, detail), markup=False, soft_wrap=True)
