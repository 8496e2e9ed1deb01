"""What `miss demo` shows when it is ready: what runs where, how to sign in, lines to try. All of it is what
demo.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from miss.console import err, out, program, table


def show_demo(contents: dict[str, Any], state: Path, seconds: float, *, as_json: bool) -> None:
    """On stdout; with `as_json` demo.json goes there and the rest to stderr."""
    screen = err if as_json else out
    if as_json:
        out.print_json(json.dumps(contents))
        out.file.flush()
    _show_loaded(screen, contents["loaded"], seconds)
    _show_places(screen, contents)
    _show_users(screen, contents["portal"]["users"])
    _show_commands(screen, contents, state)


def _show_loaded(screen: Console, loaded: dict[str, Any], seconds: float) -> None:
    screen.print(f"\n[bold green]The region is ready[/] after {seconds:.0f} s: "
                 f"{loaded['sent']} instances sent, {loaded['failed']} failed, "
                 f"{loaded['skipped']} files skipped.")
    for kind in ("failed", "skipped"):
        for reason, count in loaded[f"{kind}_by_reason"].items():
            screen.print(f"  {kind} {count}: {reason}", markup=False, style="dim")


def _show_places(screen: Console, contents: dict[str, Any]) -> None:
    grid = table("what", "where", title="\n[bold]What runs[/]")
    grid.add_row("portal", contents["portal"]["url"])
    grid.add_row("hub", contents["hub"]["address"])
    for ward in contents["wards"]:
        grid.add_row(f"node of {ward['name']}",
                     f"{ward['ae_title']}@{ward['host']}:{ward['dicom_port']}")
    grid.add_row(f"ward portal, {contents['ward_portal']['ward']} alone", contents["ward_portal"]["url"])
    grid.add_row("logs", contents["logs"])
    screen.print(grid)


def _show_users(screen: Console, users: list[dict[str, Any]]) -> None:
    grid = table("name", "password", "role", "ward", title="\n[bold]Sign in[/]")
    for user in users:
        grid.add_row(user["name"], user["password"], user["role"], user["ward"] or "-")
    for column in grid.columns[:2]:
        column.no_wrap = True
    screen.print(grid)


def _show_commands(screen: Console, contents: dict[str, Any], state: Path) -> None:
    ward = contents["wards"][0]
    target = f"-aec {ward['ae_title']} {ward['host']} {ward['dicom_port']}"
    screen.print("\n[bold]Try[/]")
    lines = [
        f"storescu -v -nh -aet STORESCU {target} +sd +r FOLDER",
        f"findscu -S -aet FINDSCU {target} -k QueryRetrieveLevel=STUDY -k PatientName -k StudyDate",
        f"getscu -S -aet GETSCU {target} -k QueryRetrieveLevel=STUDY -k StudyInstanceUID=UID -od FOLDER",
        f"findscu -W -aet FINDSCU {target} -k PatientName -k 'ScheduledProcedureStepSequence[0].Modality=CT'",
        f"{program()} send FOLDER --to {ward['ae_title']}@{ward['host']}:{ward['dicom_port']}",
        f"{program()} status --state {state}",
        f"{program()} node log --refused --state {ward['state']}",
        f"{program()} worklist ls --state {ward['state']}",
    ]
    if ward["rules"]:
        lines += [f"{program()} routes ls --state {ward['state']}",
                  f"{program()} deliveries ls --state {contents['hub']['state']}"]
    for line in lines:
        screen.print(f"  {line}", markup=False, soft_wrap=True)
    screen.print("\nstorescu alone sends what is not compressed; miss send sends any file as it is.",
                 soft_wrap=True)
    if ward["rules"]:
        screen.print("What is described as a second opinion goes on to another hospital: "
                     f"{ward['rules']}", markup=False, soft_wrap=True)
    screen.print(f"{state / 'demo.json'} says it all. Ctrl-C stops it.", markup=False, soft_wrap=True)
