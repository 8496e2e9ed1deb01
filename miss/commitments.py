"""`miss commitments`: what devices asked a node to commit, and what it asked of others, as its ledger has it:
also while the node does not run. It changes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archive.errors import NotFound
from miss.configuration import State
from miss.console import err, out, table, when
from miss.ledgers import open_ledger, require_node

if TYPE_CHECKING:
    from archive.ledger import Commitment, CommitmentItem
    from archive.ledger.commitments import CommitmentCounts


def commitments(
    uid: Annotated[str, typer.Argument(metavar="[UID]", show_default=False,
                                       help="A Transaction UID: lists its instances that are not "
                                            "committed.")] = "",
    failed: Annotated[bool, typer.Option("--failed", help="Only those with an instance that is not "
                                                          "committed, or with a report that did not "
                                                          "arrive.")] = False,
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many, newest first.", min=1,
                                       max=10_000)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
    state: State = Path("."),
) -> None:
    """Shows storage commitment: who asked for what, what became of it, and whether they heard.

    \b
    Examples:
      miss commitments --state /srv/miss
      miss commitments --failed --json --state /srv/miss
      miss commitments 2.25.4711 --state /srv/miss
    """
    require_node(state)
    with open_ledger(state) as ledger:
        if not uid:
            _show(ledger.commitments(limit, failed_only=failed), as_json)
            return
        found = [one for one in ledger.commitments(10_000) if one.transaction_uid == uid]
        if not found:
            raise NotFound("no storage commitment transaction has this UID, or it was over long ago")
        _show(found, as_json, [item for one in found for item in ledger.commitment_items(one.id)])


def counted(counts: CommitmentCounts) -> str:
    """How a node stands with what its devices asked, in words."""
    parts = [f"{counts.open} being verified", f"{counts.answering} to be reported"]
    if counts.failing:
        parts.append(f"{counts.failing} of them tried in vain")
    if counts.given_up:
        parts.append(f"{counts.given_up} never heard")
    return ", ".join(parts)


def _show(found: list[Commitment], as_json: bool, items: list[CommitmentItem] | None = None) -> None:
    if as_json:
        rows = [asdict(one) for one in found]
        if items is not None:
            rows[0]["not_committed"] = [
                {"sop_class_uid": one.sop_class_uid, "sop_instance_uid": one.sop_instance_uid,
                 "why": _why(one)} for one in items if one.reason]
        out.print_json(json.dumps(rows))
        return
    if not found:
        err.print("no storage commitment requests of this kind")
        return
    grid = table("asked at", "by", ">instances", ">failed", "state", ">tries", "Transaction UID",
                 "last error")
    for one in found:
        by = f"us, of {one.device}" if one.role == "scu" else one.device
        grid.add_row(when(one.asked_us), by, str(one.instances), str(one.failed), _words(one),
                     str(one.tries), one.transaction_uid, one.last_error or "-")
    out.print(grid)
    if items:
        grid = table("SOP Instance UID", "why it is not committed")
        for item in items:
            if item.reason:
                grid.add_row(item.sop_instance_uid, _why(item))
        out.print(grid)


def _why(item: CommitmentItem) -> str:
    from node.dimse.commitments import REASONS

    if item.reason < 0:
        return "verified, waits for the region" if item.digest else "not verified yet"
    return f"{item.reason:04X} {REASONS.get(item.reason, 'a reason that PS3.3 does not name')}"


def _words(one: Commitment) -> str:
    """Where it stands: the same states mean other things on the two sides."""
    from archive.ledger.commitments import SCU

    if one.role == SCU:
        return {"open": "to be asked", "answering": "its report is awaited"}.get(one.state, one.state)
    return {"open": "being verified", "answering": "to be reported"}.get(one.state, one.state)
