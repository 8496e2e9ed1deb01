"""`miss node`: what a ward runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miss import configuration
from miss.allocator import keep_buffers
from miss.configuration import Overrides, Process, SettingsFile, State
from miss.console import err, out, program, set_up_logging, size, table, when
from miss.hub import LogLevel
from miss.ledgers import open_ledger, require_node

if TYPE_CHECKING:
    from archive.ledger import Connection

app = typer.Typer(help="A ward's node: enrol it, run it, look after it.", no_args_is_help=True)

Invite = Annotated[str, typer.Argument(metavar="INVITE", show_default=False,
                                       help="The line that `miss ca invite` printed.")]

Replace = Annotated[bool, typer.Option(
    "--replace", help="Take a new identity in place of one that was revoked or lapsed.")]


@app.command()
def enrol(
    invite: Invite,
    ae_title: Annotated[str, typer.Option(help="The node's AE title; else made of hospital and ward.",
                                          show_default=False)] = "",
    host: Annotated[str, typer.Option(help="The address that modalities connect to.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="The port that modalities connect to.")] = 11112,
    replace: Replace = False,
    state: State = Path("."),
) -> None:
    """Makes the node's key, trades the invite for a certificate and writes a node.toml.

    The pin in the invite is checked before the secret is sent. The key never leaves this folder. If
    something breaks on the way, run it again: the same invite gives the same certificate.

    \b
    Examples:
      miss node enrol miss1.MTI3... --state /srv/miss
      miss node enrol miss1.MTI3... --state /srv/miss --ae-title SM-RADIOLOGY --port 104
    """
    from miss.peers import require_ae_title
    from miss.region import enrol_node

    title = require_ae_title(ae_title) if ae_title else ""
    identity = enrol_node(invite, state, ae_title=title, host=host, port=port, replace=replace)
    err.print(f"enrolled as {identity.uri}, certificate until {when(identity.not_after_us)}", style="green",
              markup=False)
    err.print(f"next: {program()} device add AE-TITLE ADDRESS --state {state}\n"
              f"then: {program()} node run --settings {state / Process.NODE.file}", markup=False)


@app.command()
def run(settings: SettingsFile = None, overrides: Overrides = None, log_level: LogLevel = "INFO") -> None:
    """Runs the node until SIGTERM or Ctrl-C: it takes instances in, answers queries, and replicates.

    \b
    Examples:
      miss node run --settings /srv/miss/node.toml
      miss node run --settings node.toml --set uplink.hold=true
    """
    keep_buffers()
    from node.service import Node

    effective = configuration.node(configuration.found(settings, Process.NODE), overrides)
    set_up_logging(log_level.upper())
    Node(effective).run()


@app.command()
def status(
    state: State = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Says what the node holds and what the region does not have yet, from its own disk: also when it is not
    running, and when the WAN is down.

    \b
    Examples:
      miss node status --state /srv/miss
      miss node status --state /srv/miss --json
    """
    from miss.backlog import node_backlog
    from miss.cache import cache_rows, cache_standing
    from miss.commitments import counted
    from miss.deliveries import standing_table
    from miss.routes import summary_table

    require_node(state)
    found = node_backlog(state)
    if as_json:
        out.print_json(json.dumps(found.as_dict() | {"cache": cache_standing(state)}))
        return
    grid = table("", "")
    grid.add_row("ward", f"{found.ward}, AE title {found.ae_title}")
    grid.add_row("running", f"yes, port {found.port} answers" if found.listening
                 else f"no: nothing answers at port {found.port}")
    grid.add_row("holds", f"{found.instances} instances of {found.studies} studies, {size(found.bytes)}")
    grid.add_row("pending", found.words)
    grid.add_row("set aside", str(found.set_aside))
    grid.add_row("conflicts", f"{found.conflicts} open, {found.proposed} proposed corrections"
                 f"; {found.equivalents} the same in another encoding")
    grid.add_row("worklist", f"{found.scheduled_steps} scheduled steps, {found.steps_in_progress} performed "
                 "steps in progress")
    grid.add_row("commitment", counted(found.commitments))
    for name, words in cache_rows(cache_standing(state)):
        grid.add_row(name if name == "cache" else f"cache: {name}", words)
    grid.add_row("certificate", f"until {when(found.certificate_until_us)}")
    out.print(grid)
    if found.routes:
        out.print(summary_table(found.routes, title="\nwhat waits by routing rules"))
    if found.deliveries:
        out.print(standing_table(found.deliveries, title="\ndeliveries from and to other wards"))


@app.command()
def log(
    refused: Annotated[bool, typer.Option(
        "--refused", help="Only callers that were turned away or came to nothing.")] = False,
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many, newest first.", min=1,
                                       max=100_000)] = 20,
    state: State = Path("."),
) -> None:
    """Shows who connected, and of who was refused why, with the line that would admit them.

    A connection that came to no association is in it too; many alike share a row, which counts them.

    \b
    Examples:
      miss node log --state /srv/miss
      miss node log --refused -n 5 --state /srv/miss
    """
    from node.admission import remedy

    require_node(state)
    with open_ledger(state) as ledger:
        entries = ledger.connections(limit, refused_only=refused)
    grid = table("at", "from", "over", "calling", "called", "what", "in", ">lasted")
    lines = dict[str, None]()
    for entry in entries:
        grid.add_row(when(entry.at_us), entry.address, entry.transport, entry.calling_ae, entry.called_ae,
                     _words(entry), size(entry.bytes_in), _lasted(entry))
        if line := remedy(entry):
            lines[f"{line} --state {state}"] = None
    out.print(grid)
    for line in lines:
        err.print(f"to admit: {line}", style="yellow", markup=False, soft_wrap=True)


def _lasted(entry: Connection) -> str:
    return "-" if entry.times > 1 else f"{(entry.ended_us - entry.at_us) / 1e6:.1f} s"


def _words(entry: Connection) -> str:
    often = f" ({entry.times} times, the last at {when(entry.ended_us)})" if entry.times > 1 else ""
    shown = f"; certificate {entry.certificate}" if entry.certificate else ""
    if entry.outcome == "failed":
        return f"no association: {entry.ended}{often}{shown}"
    if entry.outcome == "refused":
        return f"refused: {entry.reason}{often}{shown}"
    done = ", ".join(f"{count} x {what}" for what, count in json.loads(entry.operations).items())
    who = f"{entry.user_name}: " if entry.user_name else ""
    return f"{who}{done or 'nothing asked'}{f'; {entry.ended}' if entry.ended else ''}"
