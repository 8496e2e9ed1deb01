"""`python -m bench`: runs rows of the table, prints each as soon as it is there, and the whole at the end."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from archive.errors import MissError
from bench import programs
from bench.crowded import CROWDED_ROWS
from bench.crowds import CROWD_ROWS
from bench.finding import FIND_ROWS, GROWTH_ROWS
from bench.flooding import FLOOD_ROWS
from bench.lag import LAG_ROWS
from bench.mixed import MIXED_ROWS
from bench.programs_that_send import SENDING_ROWS
from bench.rates import RATE_ROWS
from bench.replicating import REPLICATION_ROWS
from bench.retrieving import RETRIEVE_ROWS
from bench.runs import TINY, Bench, Scale
from bench.table import Report, Result, line
from bench.wards import WARD_ROWS


class Row(Protocol):
    """Some lines of the table that are measured together."""

    @property
    def key(self) -> str: ...

    def measure(self, bench: Bench) -> list[Result]: ...


ROWS: tuple[Row, ...] = (*RATE_ROWS, *SENDING_ROWS, *LAG_ROWS, *CROWD_ROWS, *FIND_ROWS, *RETRIEVE_ROWS,
                         *MIXED_ROWS, *CROWDED_ROWS, *REPLICATION_ROWS, *FLOOD_ROWS,
                         *WARD_ROWS)
LONG_ROWS: tuple[Row, ...] = GROWTH_ROWS  # that run only when they are named


def chosen(names: Sequence[str]) -> list[Row]:
    """The rows of these names, or whose names begin with one and a hyphen; when there is none, all but the
    long ones."""
    every = (*ROWS, *LONG_ROWS)
    for name in names:
        if not any(_named(row, name) for row in every):
            raise SystemExit(f"there is no row {name}: {', '.join(row.key for row in every)}")
    return [row for row in every if any(_named(row, name) for name in names)] if names else list(ROWS)


def _named(row: Row, name: str) -> bool:
    return row.key == name or row.key.startswith(f"{name}-")


def run(rows: Sequence[Row], scale: Scale, folder: Path, kept: Path | None = None) -> Report:
    """Measures `rows` on the disk of `folder`, and says on the way what comes of them."""
    report = Report(machine(folder), programs.versions(), options(scale), [])
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="miss-bench-", dir=folder) as place:
        bench = Bench(Path(place), scale, kept)
        for row in rows:
            bench.say(row.key)
            start = time.monotonic()
            try:
                found = row.measure(bench)
            except MissError as error:  # a server that does not start voids its row, not the table
                found = [Result(row.key, row.key, "-", void=f"void: {error}")]
            results += found
            for result in found:
                bench.say(line(result))
            bench.say(f"  {time.monotonic() - start:.0f} s")
    return replace(report, results=results)


def options(scale: Scale) -> dict[str, object]:
    return {"rounds": scale.rounds, "seconds each": scale.seconds,
            **({"scale": "tiny: no figure means anything"} if scale.idle == TINY.idle else {})}


def machine(folder: Path) -> dict[str, str]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return {"machine": f"{os.cpu_count()} cores, {memory:.0f} GiB, {_file_system(folder)}, Linux "
                       f"{platform.release()}",
            "Python": platform.python_version(), "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}


def _file_system(folder: Path) -> str:
    best = ("", "unknown file system")
    with open("/proc/mounts") as file:
        for fields in map(str.split, file):
            if folder.resolve().is_relative_to(fields[1]) and len(fields[1]) >= len(best[0]):
                best = (fields[1], fields[2])
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="What MISS does beside other archives on this machine, as one table.",
        epilog="rows: " + ", ".join(row.key for row in ROWS) + ", and when named "
               + ", ".join(row.key for row in LONG_ROWS) + "; a name's beginning stands for all of them "
               "(small, tls). `python -m bench.table FILE` prints the table of a JSON file again.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="which rows; all when none is named")
    parser.add_argument("--rounds", type=int, help=f"runs of each figure ({Scale().rounds})")
    parser.add_argument("--seconds", type=float,
                        help=f"how long a run of small instances sends ({Scale().seconds:g})")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
                        help="a folder on the disk that is to be used (needs 16 GB of room)")
    parser.add_argument("--kept", type=Path, metavar="DIR",
                        help="keep there what is loaded for searches, and take it from there the next time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure there")
    parser.add_argument("--tiny", action="store_true", help="only show that every row runs")
    given = parser.parse_args()
    # However it is stopped: servers are ended and folders removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    scale = TINY if given.tiny else Scale()
    if given.rounds:
        scale = replace(scale, rounds=given.rounds, mammogram_rounds=given.rounds)
    if given.seconds:
        scale = replace(scale, seconds=given.seconds)
    report = run(chosen(given.rows), scale, given.data, given.kept)
    if given.json:
        given.json.write_text(report.to_json())
    print(report.to_markdown(), end="")
    missed = [result for result in report.results if result.met is False or result.void.startswith("void")]
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
