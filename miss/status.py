"""`miss status`: the whole region at a glance, from the ledger, the regional index and, for nodes on this
machine, their own disks. Needs no process to run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from archive.errors import MissError, SettingsError
from archive.model import Totals
from miss import configuration
from miss.configuration import Process, State
from miss.console import err, out, plain, size, table
from miss.ledgers import open_ledger
from miss.processes import listening

if TYPE_CHECKING:
    from federation.coverage import WardStatus
    from miss.backlog import Backlog

DEMO = "demo.json"
DEMO_STATE = "demo-state"
REGION = "region"


def status(
    state: State = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Shows the region: is the hub there, which wards are attached, what is missing and since when.

    DIR is the region's folder, a demo's, or a node's. With the hub stopped it says what is known as of when;
    the backlog of nodes on this machine is read from their own disks.

    \b
    Examples:
      miss status --state region
      miss status --state demo-state --json
    """
    from miss.backlog import node_backlog

    folder = _folder(state)
    if (folder / DEMO).exists():
        region = folder / REGION
        nodes = [Path(ward["settings"]).parent for ward in json.loads((folder / DEMO).read_text())["wards"]]
    elif (folder / Process.NODE.file).exists():
        from miss.node import status as node_status

        node_status(folder, as_json)
        return
    else:
        region, nodes = folder, []
    report = Report(region)
    backlogs = [node_backlog(node) for node in nodes]
    if as_json:
        out.print_json(json.dumps(report.as_dict() | {"nodes": [backlog.as_dict() for backlog in backlogs]}))
        return
    report.show()
    if backlogs:
        _show_backlogs(backlogs)


class Report:
    """What `miss status` knows of a region."""

    def __init__(self, region: Path) -> None:
        from archive.space.scrubber import read_note
        from certs.invites import split_address
        from federation.coverage import status_of
        from federation.reconcile_notes import Notes
        from federation.troubles import troubles
        from miss.region import hub_address

        settings = configuration.hub(region / Process.HUB.file)
        self.now_us = int(time.time() * 1e6)
        self.hub = hub_address(settings)
        self.hub_answers = listening(*split_address(self.hub)) is not None
        with open_ledger(region) as ledger:
            states = ledger.ward_states()
            self.wards = [status_of(ward, states.get(ward.id), self.now_us) for ward in ledger.wards()]
            rows = [row for row in ledger.certificates() if row.ward]
            self.deliveries = ledger.delivery_standings(self.now_us)
        self.reconciled = Notes(settings.state).now.wards
        self.scrub = read_note(settings.state)
        self.wards.sort(key=lambda ward: (not troubles(ward, self.now_us), ward.coverage.ward))
        active = {row.ward for row in rows if row.state == "active"}
        self.revoked = {row.ward for row in rows if row.state == "revoked"} - active
        self.totals = _totals(settings.archive_settings())

    def as_dict(self) -> dict[str, Any]:
        from federation.coverage import plain_words
        from federation.troubles import certificate_days, eta_s, oldest_s, troubles

        return {
            "hub": {"address": self.hub, "answers": self.hub_answers},
            "held": None if self.totals is None else {
                "patients": self.totals.patients, "studies": self.totals.studies,
                "instances": self.totals.instances, "bytes": self.totals.bytes,
                "conflicts": self.totals.conflicts},
            "wards": [{
                "ward": ward.coverage.ward, "hospital": ward.coverage.hospital, "name": ward.coverage.name,
                "issuer": ward.issuer, "attached": self._attached(ward),
                "revoked": ward.coverage.ward in self.revoked, "state": ward.coverage.state.value,
                "words": plain_words(ward.coverage, self.now_us), "pending": ward.coverage.pending,
                "set_aside": ward.coverage.set_aside, "complete_to_us": ward.coverage.complete_to_us,
                "seen_at_us": ward.coverage.seen_at_us, "version": ward.version,
                "attached_since_us": ward.attached_since_us if self._attached(ward) else None,
                "clock_skew_us": ward.skew_us, "last_receipt_us": ward.last_receipt_us,
                "oldest_pending_s": oldest_s(ward, self.now_us), "eta_s": eta_s(ward),
                "certificate_days": certificate_days(ward, self.now_us),
                "report": None if ward.report is None else asdict(ward.report),
                "reconciled": self._reconciled(ward), "troubles": troubles(ward, self.now_us),
            } for ward in self.wards],
            "scrub": asdict(self.scrub),
            "deliveries": [asdict(pair) for pair in self.deliveries],
        }

    def show(self) -> None:
        from federation.coverage import plain_words
        from miss.deliveries import standing_table

        out.print(f"hub {self.hub}: " + ("[green]answers[/]" if self.hub_answers else
                                         "[red]does not answer: what follows is as of its last word[/]"))
        if self.totals is not None:
            held = self.totals
            out.print(f"the region holds {held.instances} instances of {held.studies} studies of "
                      f"{held.patients} patients, {size(held.bytes)}, {held.conflicts} conflicts\n")
        if self.scrub.ever:
            out.print(f"scrubbing found {self.scrub.ever} damaged instances here\n", style="red")
        self._show_troubles()
        for ward in self.wards:
            words = plain_words(ward.coverage, self.now_us, _zone())
            out.print(Text(plain(words), "" if ward.coverage.covered else "yellow"))
        if self.wards:
            self._show_lines()
            self._show_nodes()
        if not self.wards:
            err.print("no ward was invited yet: miss ca invite --help")
        if self.deliveries:
            out.print(standing_table(self.deliveries, title="\ndeliveries from ward to ward"))

    def _show_troubles(self) -> None:
        from federation.troubles import troubles

        for ward in self.wards:
            for words in troubles(ward, self.now_us):
                out.print(Text(plain(f"{ward.coverage.ward}: {words}"), "yellow"))
            last = self.reconciled.get(ward.coverage.ward)
            if last is not None and (last.alarms or last.failure):
                out.print(Text(plain(f"{ward.coverage.ward}: comparison: {last.words()}"), "yellow"))

    def _show_lines(self) -> None:
        """Who is attached, and what is on its way. Narrow enough for 80 columns, as what follows is."""
        from federation.troubles import duration_words, eta_s, oldest_s

        grid = table("ward", "link", ">pending", ">bytes", ">oldest", ">rate", ">ETA",
                     title="\nthe line: since when, and what waits")
        for ward in self.wards:
            report, waited_s, left_s = ward.report, oldest_s(ward, self.now_us), eta_s(ward)
            rate = report.rate_bytes_per_s if report is not None else 0
            grid.add_row(
                ward.coverage.ward, self._link(ward), str(ward.coverage.pending),
                size(report.pending_bytes) if report is not None and ward.coverage.pending else "-",
                "-" if waited_s is None else duration_words(waited_s), f"{size(rate)}/s" if rate else "-",
                "-" if left_s is None else duration_words(left_s))
        out.print(grid)

    def _show_nodes(self) -> None:
        """What each node said of itself last."""
        from federation.coverage import clock_words
        from federation.troubles import certificate_days

        held = table("ward", "last receipt", ">set aside", ">conflicts", ">holds", ">evicted",
                     title="\nwhat each has")
        node = table("ward", "version", ">clock", ">disk free", ">cert.", ">zstd", "compared",
                     title="\nthe nodes, as each said last")
        for ward in self.wards:
            report, coverage = ward.report, ward.coverage
            receipt = clock_words(ward.last_receipt_us, self.now_us, _zone())
            if report is None:
                held.add_row(coverage.ward, receipt, str(coverage.set_aside), "-", "-", "-")
                continue
            held.add_row(coverage.ward, receipt, str(coverage.set_aside), str(report.conflicts),
                         str(report.instances), str(report.evicted))
            days, last = certificate_days(ward, self.now_us), self.reconciled.get(coverage.ward)
            node.add_row(
                coverage.ward, ward.version or "-",
                f"{round(ward.skew_us / 1e6, 1) + 0.0:+.1f} s",  # a little slow is 0, not -0
                size(report.free_bytes),
                "-" if days is None else f"{days:.0f} d",
                f"{report.wire_ratio:.1f}x" if report.wire_ratio else "-",
                "never" if last is None else clock_words(last.ended_us, self.now_us, _zone()))
        out.print(held)
        if node.row_count:
            out.print(node)

    def _reconciled(self, ward: WardStatus) -> dict[str, Any] | None:
        last = self.reconciled.get(ward.coverage.ward)
        if last is None:
            return None
        return {"ended_us": last.ended_us, "differing": last.differing, "alarms": last.alarms,
                "failure": last.failure}

    def _link(self, ward: WardStatus) -> Text:
        from federation.coverage import clock_words

        attached = self._attached(ward)
        words = "away"
        if attached:
            words = "attached " + clock_words(ward.attached_since_us, self.now_us, _zone())
        if ward.coverage.ward in self.revoked:
            return Text(f"{words}, revoked", "red")
        return Text(words, "green" if attached else "yellow")

    def _attached(self, ward: WardStatus) -> bool:
        return ward.attached and self.hub_answers


def _folder(state: Path) -> Path:
    """`state`, or the demo's folder in it when that is what a person in the repository means."""
    known = (DEMO, Process.HUB.file, Process.NODE.file)
    for folder in (state, state / DEMO_STATE):
        if any((folder / name).exists() for name in known):
            return folder
    raise SettingsError(f"{state} holds no region, no demo and no node: give --state DIR")


def _totals(settings: Any) -> Totals | None:
    """What the regional index counts; None when it can't be read now (the wards are shown all the same)."""
    from archive.archive import Archive

    try:
        archive = Archive.open(settings, outbox=False, read_only=True)
    except MissError as error:
        err.print(f"the regional index can't be read: {error}", style="yellow", markup=False)
        return None
    try:
        return archive.index.totals()
    finally:
        archive.close()


def _show_backlogs(backlogs: list[Backlog]) -> None:
    from miss.commitments import counted
    from miss.routes import summary_table

    grid = table("node on this machine", "running", ">holds", "the region lacks", ">conflicts",
                 title="\nfrom the nodes' own disks")
    for backlog in backlogs:
        grid.add_row(f"{backlog.ward} ({backlog.ae_title})",
                     "yes" if backlog.listening else Text("no", "red"),
                     str(backlog.instances), backlog.words, str(backlog.conflicts))
    out.print(grid)
    for backlog in backlogs:
        if backlog.commitments.is_any:
            out.print(f"{backlog.ward}: storage commitment: {counted(backlog.commitments)}", markup=False)
        if backlog.routes:
            out.print(summary_table(backlog.routes, title=f"\n{backlog.ward}: what waits by routing rules"))


def _zone() -> Any:
    from datetime import datetime

    return datetime.now().astimezone().tzinfo
