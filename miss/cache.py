"""`miss cache`: what a node keeps on its own disk of what the region has too; pins, and studies brought back.
It reads the node's ledger and index; only bringing back needs the node to run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archive.errors import InvalidInput, NotFound
from miss import configuration
from miss.configuration import Process, State
from miss.console import err, out, size, table, when
from miss.ledgers import open_ledger, require_node

if TYPE_CHECKING:
    from archive.archive import Archive
    from archive.ledger import Ledger, Pin

app = typer.Typer(help="What a node keeps on its disk: how it stands, pins, studies that come back.",
                  no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]
Study = Annotated[str, typer.Argument(metavar="STUDY", help="The Study Instance UID.", show_default=False)]
NOTE = "cache"  # by which the running node says how its cache stands
FETCH_S = 60.0


@app.command()
def status(as_json: AsJson = False, state: State = Path(".")) -> None:
    """Says how much is here, how much was given up, what was given up last, and why nothing is.

    \b
    Examples:
      miss cache status --state /srv/miss
      miss cache status --json --state /srv/miss
    """
    require_node(state)
    found = cache_standing(state)
    if as_json:
        out.print_json(json.dumps(found))
        return
    grid = table("", "")
    for name, words in cache_rows(found):
        grid.add_row(name, words)
    out.print(grid)


@app.command("ls")
def ls(as_json: AsJson = False, state: State = Path(".")) -> None:
    """Lists the studies that are pinned, by people or for an appointment, and how much of each is here.

    \b
    Examples:
      miss cache ls --state /srv/miss
      miss cache ls --json --state /srv/miss
    """
    require_node(state)
    now_us = time.time_ns() // 1000
    with open_ledger(state) as ledger:
        pins = ledger.pins()
    archive = _reading(state)
    try:
        counts = archive.index.instance_counts({pin.study_uid for pin in pins})
        rows = [_row(archive, pin, counts.get(pin.study_uid, 0), now_us) for pin in pins]
    finally:
        archive.close()
    if as_json:
        out.print_json(json.dumps(rows))
        return
    if not rows:
        err.print("no study is pinned")
        return
    grid = table("study", "why", "until", "by", ">instances", ">not here")
    for row in rows:
        until = "somebody unpins it" if not row["until_us"] else when(row["until_us"])
        grid.add_row(row["study_uid"], "appointment" if row["kind"] == "prior" else "a person",
                     until if row["holds"] else f"{until}, over", row["by"], str(row["instances"]),
                     str(row["evicted"]))
    out.print(grid)


@app.command()
def pin(
    study: Study,
    until: Annotated[str, typer.Option(metavar="DATE", show_default=False, help=(
        "The last day on which it stays, 2026-12-24; without one it stays until it is unpinned."))] = "",
    state: State = Path("."),
) -> None:
    """Keeps a study's bytes at this node, however short the disk gets. What was given up of it is brought
    back by `miss cache fetch`.

    \b
    Examples:
      miss cache pin 1.2.840.1 --state /srv/miss
      miss cache pin 1.2.840.1 --until 2026-12-24 --state /srv/miss
    """
    from archive.ledger import Pin
    from archive.ledger.keeping import PERSON
    from archive.model import require_uid
    from miss.orders import person

    require_node(state)
    study_uid, now_us = require_uid(study, "the study"), time.time_ns() // 1000
    until_us = _end_of(until, now_us) if until else 0
    with open_ledger(state) as ledger:
        ledger.pin_study(Pin(study_uid, PERSON, until_us, person(), now_us))
        _audit(ledger, "pin", study_uid)
    err.print("pinned: its bytes stay here", style="green")


@app.command()
def unpin(study: Study, state: State = Path(".")) -> None:
    """Takes a person's pin away. What an appointment keeps stays until it is over.

    \b
    Example:
      miss cache unpin 1.2.840.1 --state /srv/miss
    """
    require_node(state)
    with open_ledger(state) as ledger:
        if not ledger.unpin_study(study):
            raise NotFound("nobody had pinned this study")
        _audit(ledger, "unpin", study)
    err.print("no longer pinned", style="green")


@app.command()
def fetch(study: Study, state: State = Path(".")) -> None:
    """Brings back what this node had given up of a study. The node has to run, and to reach the region.

    \b
    Example:
      miss cache fetch 1.2.840.1 --state /srv/miss
    """
    from archive.model import require_uid
    from federation.bringing_orders import BRING
    from miss.orders import archive_of, carry_out, is_held

    require_node(state)
    require_uid(study, "the study")
    if not is_held(archive_of(state)[0]):
        raise InvalidInput("the node does not run: it alone has a line to the region")
    err.print(carry_out(state, BRING, {"study": study}, wait_s=FETCH_S), markup=False)


def cache_standing(state: Path) -> dict[str, Any]:
    """How the cache of the node in `state` stands, by its own last note."""
    with open_ledger(state) as ledger:
        note = ledger.cache_note(NOTE)
        now_us = time.time_ns() // 1000
        pinned = sum(pin.holds(now_us) for pin in ledger.pins())
    if note is None:
        return {"at_us": 0, "pinned_studies": pinned}
    found: dict[str, Any] = json.loads(note[0])
    return found | {"at_us": note[1], "pinned_studies": pinned}


def cache_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people."""
    if not found["at_us"]:
        return [("cache", "the node has not said yet how it stands"),
                ("pinned", f"{found['pinned_studies']} studies")]
    rows = [
        ("here", f"{found['instances']} instances, {size(found['bytes'])}; as of {when(found['at_us'])}"),
        ("given up", f"{found['evicted']} instances, {size(found['evicted_bytes'])}: the region has them"),
    ]
    if found["evictable_bytes"] is not None:
        rows.append(("may go", f"{size(found['evictable_bytes'])}; kept by pins and rules "
                     f"{size(found['pinned_bytes'])}"))
    rows.append(("pinned", f"{found['pinned_studies']} studies"))
    last = "nothing since the node started"
    if found["last_eviction_us"]:
        at = when(found["last_eviction_us"])
        last = f"{found['last_instances']} instances, {size(found['last_bytes'])}, {at}"
    rows.append(("given up last", last))
    if found["why_not"]:
        rows.append(("nothing goes", found["why_not"]))
    if found["waiting"]:
        rows.append(("to be kept again", f"{found['waiting']} studies"))
    done = found["prefetched"]
    if done["at_us"]:
        reason = f"; {done['reason']}" if done["reason"] else ""
        rows.append(("priors", f"{when(done['at_us'])}: {done['steps']} steps, {done['studies']} studies, "
                     f"{done['brought']} instances brought back, {done['copied']} copied, {done['left']} left"
                     f"{reason}"))
    if found["rules_error"]:
        rows.append(("rules", f"not taken: {found['rules_error']}"))
    return rows


def _row(archive: Archive, pin: Pin, instances: int, now_us: int) -> dict[str, Any]:
    return {
        "study_uid": pin.study_uid, "kind": pin.kind, "until_us": pin.until_us, "by": pin.by,
        "holds": pin.holds(now_us), "instances": instances,
        "evicted": len(archive.index.cached.evicted_of(pin.study_uid)),
    }  # fmt: skip


def _reading(state: Path) -> Archive:
    from archive.archive import Archive

    settings = configuration.node(state / Process.NODE.file)
    return Archive.open(settings.archive_settings(), outbox=True, read_only=True)


def _end_of(day: str, now_us: int) -> int:
    """The end of a day as people write it."""
    from datetime import datetime, timedelta

    try:
        begins = datetime.strptime(day, "%Y-%m-%d")
    except ValueError:
        raise InvalidInput(f"{day} is not a day such as 2026-12-24") from None
    until_us = int((begins + timedelta(days=1)).timestamp() * 1e6)
    if until_us <= now_us:
        raise InvalidInput("that day is over")
    return until_us


def _audit(ledger: Ledger, act: str, subject: str) -> None:
    from archive.ledger import AuditRow
    from miss.orders import person

    ledger.audit(AuditRow(at_us=time.time_ns() // 1000, who=person(), act=act, subject=subject,
                          outcome="success"))
