"""`miss bench`: how fast this machine is with MISS. Runs a temporary node, loads it, says what came of it,
and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archive.errors import Corrupt
from miss.console import err, out, size, table

if TYPE_CHECKING:
    from miss.load.disk import Disk
    from miss.load.measure import Measurement

app = typer.Typer(help="How fast this machine takes images in.", no_args_is_help=True)

DISK_S = 2.0
CORES_FULL = 0.85  # of all: from here on the machine, not the disk, is what there is too little of
DISK_FULL = 0.6


@app.callback()
def group() -> None:
    """How fast this machine takes images in."""


@app.command()
def intake(
    seconds: Annotated[float, typer.Option(help="How long each measurement sends.", min=0.2,
                                           max=600)] = 5.0,
    associations: Annotated[list[int] | None, typer.Option(
        min=1, max=64, help="How many senders at once; may be given again (else 1 and 4).",
        show_default=False)] = None,
    state: Annotated[Path | None, typer.Option(
        "--state", "-d", metavar="DIR", file_okay=False, show_default=False,
        help="A folder on the disk that is to be judged (else the folder for temporary files).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Measures how fast a node takes instances in on this machine and this disk.

    A temporary node is started, loaded with synthetic images over loopback, checked and removed. Everything
    is as in a ward: each "success" is sent after the disk confirmed, and the index is complete. The senders
    share the machine with the node, so that a node whose senders are elsewhere does better.

    \b
    Examples:
      miss bench intake
      miss bench intake --state /srv --seconds 20 --associations 1 --associations 8
    """
    from miss.load import instances
    from miss.load.disk import measure_disk
    from miss.load.measure import measure_node

    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="miss-bench-", dir=state) as folder:
        with err.status("the disk ..."):
            disk = measure_disk(Path(folder), DISK_S)
        for corpus in (instances.small(), instances.ct()):
            for count in associations or [1, 4]:
                place = Path(folder) / f"{corpus.name.replace(' ', '')}-{count}"
                with err.status(f"{corpus.name}, {count} at once ..."):
                    found.append(measure_node(place, corpus, count, seconds))
                shutil.rmtree(place)  # the next one finds as much room
    for one in found:
        if one.problem:
            raise Corrupt(f"{one.corpus}, {one.associations} at once: {one.problem}")
    if as_json:
        out.print_json(json.dumps({"disk": dataclasses.asdict(disk),
                                   "intake": [dataclasses.asdict(one) for one in found]}))
        return
    grid = table("instances", ">senders", ">per second", ">MB/s", ">p50", ">p95", ">CPU s per 1,000")
    for one in found:
        grid.add_row(f"{one.corpus} ({size(one.instance_bytes)})", str(one.associations), f"{one.rate:,.0f}",
                     f"{one.bytes_rate / 1e6:,.0f}", f"{one.p50_s * 1e3:.1f} ms",
                     f"{one.p95_s * 1e3:.1f} ms", f"{one.cpu_per_1000_s:.2f}")
    out.print(grid)
    out.print(f"the disk: {disk.syncs_per_s:,.0f} synced writes of 8 KB a second, "
              f"{disk.bytes_per_s / 1e6:,.0f} MB/s in one stream", markup=False)
    out.print(interpretation(disk, found), markup=False)


def interpretation(disk: Disk, found: list[Measurement]) -> str:
    """What holds intake back here, in a sentence."""
    fastest = max(found, key=lambda one: one.rate)
    fullest = max(found, key=lambda one: one.bytes_rate)
    if fullest.bytes_rate >= DISK_FULL * disk.bytes_per_s:
        return ("Large instances come near what the disk writes in one stream: a faster disk takes more of "
                "them.")
    if fastest.busy >= CORES_FULL:
        return (f"The processor is the limit: it was {fastest.busy:.0%} busy, the senders included, while "
                f"the disk could sync {disk.syncs_per_s:,.0f} times a second.")
    alone = min(found, key=lambda one: one.associations)
    if alone.rate >= DISK_FULL * disk.syncs_per_s:
        return ("One sender waits for the disk, which confirms every instance; more senders share each "
                "confirmation and get more done.")
    return ("Neither the disk nor the processor was used up: more senders at once, or senders on other "
            "machines, will get more done.")
