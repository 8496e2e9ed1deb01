"""`miss routes`: the routing rules of a node, what waits by them, and what people do about it. What changes
the queue goes to the process that runs, as an order."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archive.errors import InvalidInput
from miss import configuration
from miss.backlog import duration
from miss.configuration import Process, State
from miss.console import err, out, table, when
from miss.ledgers import open_ledger, require_node

if TYPE_CHECKING:
    from archive.ledger import Destination, Ledger, RouteChoice, Routed, RouteSummary
    from node.routing.rules import Rule

app = typer.Typer(help="What a node sends on by itself: rules, queue, and what was set aside.",
                  no_args_is_help=True)

To = Annotated[str, typer.Option("--to", metavar="DESTINATION", show_default=False,
                                 help="An AE title, \"ward hospital/ward\", or \"notice AE-TITLE\".")]
ByRule = Annotated[str, typer.Option("--rule", metavar="NAME", help="Queued by this rule.",
                                     show_default=False)]
OfStudy = Annotated[str, typer.Option("--study", metavar="UID", help="Of this study.", show_default=False)]
SetAside = Annotated[bool, typer.Option("--set-aside", help="Only what was given up.")]


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of routing rules (TOML).",
                                         show_default=False)],
    state: Annotated[Path | None, typer.Option(
        "--state", "-d", metavar="DIR", file_okay=False, show_default=False,
        help="The node's folder: says too which destinations it can't call.")] = None,
) -> None:
    """Says what each rule of a file does, or in which line and rule it is wrong.

    \b
    Examples:
      miss routes check routes.toml
      miss routes check routes.toml --state /srv/miss
    """
    from node.routing.rulefile import read_rules

    rules = read_rules(file)
    for rule in rules:
        out.print(f"{rule.name}: {rule}", markup=False, soft_wrap=True)
    err.print(f"{len(rules)} rules, all good", style="green")
    if state is not None:
        require_node(state)
        with open_ledger(state) as ledger:
            for words in _uncallable(rules, ledger):
                err.print(words, style="yellow", markup=False, soft_wrap=True)


@app.command("ls")
def ls(state: State = Path(".")) -> None:
    """Lists a node's rules, and since when each counts: what was stored before goes by `apply` alone.

    \b
    Example:
      miss routes ls --state /srv/miss
    """
    from node.routing.rulefile import read_rules

    require_node(state)
    path = configuration.node(state / Process.NODE.file).routes_path
    if not path.exists():
        err.print(f"no rules: there is no {path}", markup=False)
        return
    rules = read_rules(path)
    with open_ledger(state) as ledger:
        marks = ledger.rule_marks()
        grid = table("rule", "since", "what it does")
        for rule in rules:
            mark = marks.get(rule.name)
            grid.add_row(rule.name, when(mark.since_us) if mark else "not read by the node yet", str(rule))
        out.print(grid)
        for words in _uncallable(rules, ledger):
            err.print(words, style="yellow", markup=False, soft_wrap=True)


@app.command()
def queue(
    to: To = "",
    rule: ByRule = "",
    study: OfStudy = "",
    set_aside: SetAside = False,
    rows: Annotated[bool, typer.Option("--rows", help="Each instance that waits, not counts.")] = False,
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many rows, what goes first first.", min=1,
                                       max=10_000)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
    state: State = Path("."),
) -> None:
    """Shows what waits for which destination, why, and what was set aside; also of a node that does not run.

    \b
    Examples:
      miss routes queue --state /srv/miss
      miss routes queue --rows --set-aside --to ONCO --json --state /srv/miss
    """
    require_node(state)
    choice = _choice(to, rule, study, set_aside)
    with open_ledger(state) as ledger:
        if rows or rule or study or set_aside:
            _show_rows(ledger.routes(limit, choice), as_json)
            return
        summaries = [one for one in ledger.route_summaries() if choice.to in (None, one.to)]
    if as_json:
        out.print_json(json.dumps([summary_dict(one) for one in summaries]))
        return
    if not summaries:
        err.print("nothing waits")
        return
    out.print(summary_table(summaries))


@app.command()
def apply(
    rule: Annotated[str, typer.Argument(metavar="RULE", help="The rule's name.", show_default=False)],
    since: Annotated[str, typer.Option(
        metavar="DATE", show_default=False,
        help="What was received from here on: 2026-11-22, or 2026-11-22T14:30.")],
    again: Annotated[bool, typer.Option("--again", help="Send also what was sent before.")] = False,
    state: State = Path("."),
) -> None:
    """Sends what a rule takes of what was stored before the rule was there.

    \b
    Examples:
      miss routes apply "planning CT" --since 2026-11-01 --state /srv/miss
      miss routes apply all --since 2026-11-22T08:00 --again --state /srv/miss
    """
    detail = {"rule": rule, "since_us": str(_moment_us(since)), "again": "yes" if again else "no"}
    _order("routes apply", detail, state)


@app.command()
def retry(to: To = "", rule: ByRule = "", study: OfStudy = "", set_aside: SetAside = False,
          state: State = Path(".")) -> None:
    """Tries now what waits and what was set aside, as if it had just come.

    \b
    Examples:
      miss routes retry --state /srv/miss
      miss routes retry --to ONCO --set-aside --state /srv/miss
    """
    _order("routes retry", _detail(to, rule, study, set_aside), state)


@app.command()
def drop(to: To = "", rule: ByRule = "", study: OfStudy = "", set_aside: SetAside = False,
         state: State = Path(".")) -> None:
    """Takes what waits out of the queue, unsent: the instances themselves stay stored.

    \b
    Examples:
      miss routes drop --set-aside --state /srv/miss
      miss routes drop --to ONCO --study 1.2.840.1 --state /srv/miss
    """
    _order("routes drop", _detail(to, rule, study, set_aside), state)


def summary_table(summaries: Sequence[RouteSummary], title: str | None = None) -> Any:
    """What waits, destination by destination, for people."""
    grid = table("destination", ">waiting", ">to commit", ">set aside", ">tries", "oldest", "last error",
                 title=title)
    now_us = time.time_ns() // 1000
    for one in summaries:
        oldest = "-" if one.oldest_us is None else duration((now_us - one.oldest_us) / 1e6)
        failing = one.state is not None and one.state.failures > 0
        grid.add_row(str(one.to), str(one.waiting), str(one.committing), str(one.set_aside), str(one.tries),
                     oldest, _error(one) if failing else "-")
    return grid


def summary_dict(one: RouteSummary) -> dict[str, object]:
    """The same for scripts."""
    return {
        "kind": str(one.to.kind), "destination": one.to.name, "waiting": one.waiting,
        "committing": one.committing, "set_aside": one.set_aside, "tries": one.tries,
        "oldest_us": one.oldest_us, "failures": one.state.failures if one.state else 0,
        "last_error": one.state.error if one.state else "",
        "next_try_us": one.state.resume_us if one.state and one.state.failures else None,
    }


def _error(one: RouteSummary) -> str:
    assert one.state is not None
    return f"{one.state.error} ({one.state.failures} times; next try {when(one.state.resume_us)})"


def _show_rows(rows: Sequence[Routed], as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps([_row_dict(row) for row in rows]))
        return
    if not rows:
        err.print("nothing waits")
        return
    grid = table("destination", "rule", "what", "state", ">tries", "next try", "why")
    for row in rows:
        what = row.sop_instance_uid or f"study {row.study_uid}"
        grid.add_row(str(row.to), row.rule, what, str(row.state), str(row.tries),
                     "-" if row.state == "set aside" else when(row.next_try_us), row.comment or "-")
    out.print(grid)


def _row_dict(row: Routed) -> dict[str, object]:
    return {
        "kind": str(row.to.kind), "destination": row.to.name, "rule": row.rule, "study": row.study_uid,
        "series": row.series_uid, "sop_instance_uid": row.sop_instance_uid, "state": str(row.state),
        "tries": row.tries, "status": f"{row.status:04X}", "comment": row.comment,
        "queued_us": row.queued_us, "next_try_us": row.next_try_us, "expires_us": row.expires_us,
    }


def _uncallable(rules: Sequence[Rule], ledger: Ledger) -> Iterator[str]:
    """The devices that rules name and that can't be called."""
    from archive.ledger import RouteKind

    for name in sorted({to.name for rule in rules for to in rule.to if to.kind is not RouteKind.WARD}):
        device = ledger.device(name)
        if device is None or not device.enabled:
            yield f"{name} is no device of this node: what is for it waits until it is added"
        elif device.callable_at is None:
            yield f"nobody said where {name} listens: `miss device add {name} ... --port`"


def _destination(text: str) -> Destination:
    from archive.ledger import Destination, RouteKind

    kind, space, name = text.partition(" ")
    if space and kind in (RouteKind.WARD, RouteKind.NOTICE):
        return Destination(RouteKind(kind), name.strip())
    return Destination(RouteKind.DEVICE, text)


def _choice(to: str, rule: str, study: str, set_aside: bool) -> RouteChoice:
    from archive.ledger import RouteChoice, RouteState

    return RouteChoice(_destination(to) if to else None, rule or None, study or None,
                       RouteState.SET_ASIDE if set_aside else None)


def _detail(to: str, rule: str, study: str, set_aside: bool) -> dict[str, str]:
    choice = _choice(to, rule, study, set_aside)
    detail = {"rule": choice.rule, "study": choice.study_uid, "state": choice.state}
    if choice.to is not None:
        detail |= {"to": choice.to.name, "kind": str(choice.to.kind)}
    return {key: str(value) for key, value in detail.items() if value is not None}


def _moment_us(text: str) -> int:
    try:
        return int(datetime.fromisoformat(text).astimezone().timestamp() * 1e6)
    except (ValueError, OverflowError, OSError):
        raise InvalidInput(f"--since {text}: a date is needed, for example 2026-11-22") from None


def _order(kind: str, detail: dict[str, str], state: Path) -> None:
    from miss.orders import carry_out

    require_node(state)
    err.print(carry_out(state, kind, detail), style="green", markup=False)
