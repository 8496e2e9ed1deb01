"""The table: what was measured, what is to be reached, whether it is. As Markdown, and as JSON that makes the
same Markdown again:

    python -m bench.table FILE.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Bar:
    """What is to be reached: by the ratio of our figure to the peer's, or by our figure alone."""

    least_ratio: float | None = None
    most_ratio: float | None = None
    least: float | None = None
    most: float | None = None

    @property
    def needs_peer(self) -> bool:
        return self.least_ratio is not None or self.most_ratio is not None

    def met(self, ours: float, theirs: float | None) -> bool | None:
        """None when there is nothing to reach, or no peer to compare with."""
        verdicts: list[bool] = []
        if self.needs_peer:
            if not theirs:
                return None
            ratio = ours / theirs
            verdicts.append(self.least_ratio is None or ratio >= self.least_ratio)
            verdicts.append(self.most_ratio is None or ratio <= self.most_ratio)
        if self.least is not None:
            verdicts.append(ours >= self.least)
        if self.most is not None:
            verdicts.append(ours <= self.most)
        return all(verdicts) if verdicts else None

    def words(self, unit: str) -> str:
        said = [(self.least_ratio, ">= {:.2g} x"), (self.most_ratio, "<= {:.2g} x"),
                (self.least, f">= {{:g}} {unit}"), (self.most, f"<= {{:g}} {unit}")]
        return ", ".join(form.format(value) for value, form in said if value is not None) or "-"


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the table: every figure of ours and of the peer's, of which the medians count. `void` says
    why there is none: a peer that is not there, answers that were not true."""

    row: str
    work: str
    unit: str
    ours: tuple[float, ...] = ()
    peer: str = ""
    theirs: tuple[float, ...] = ()
    bar: Bar = Bar()
    void: str = ""
    note: str = ""

    @property
    def our_median(self) -> float | None:
        return median(self.ours) if self.ours else None

    @property
    def their_median(self) -> float | None:
        return median(self.theirs) if self.theirs else None

    @property
    def ratio(self) -> float | None:
        ours, theirs = self.our_median, self.their_median
        return ours / theirs if ours is not None and theirs else None

    @property
    def met(self) -> bool | None:
        ours = self.our_median
        return None if ours is None or self.void else self.bar.met(ours, self.their_median)

    def cells(self) -> tuple[str, ...]:
        ours, theirs = self.our_median, self.their_median
        peer = f"{self.peer} {figure(theirs)}" if theirs is not None else self.peer or "-"
        return (
            f"{self.work} ({self.unit})",
            figure(ours) if ours is not None else "-",
            peer,
            f"{self.ratio:.2f}" if self.ratio is not None else "-",
            self.bar.words(self.unit),
            self.void or {True: "yes", False: "**no**", None: "-"}[self.met],
            self.note,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run of the bench."""

    machine: Mapping[str, str]
    peers: Mapping[str, str]
    options: Mapping[str, Any]
    results: Sequence[Result] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        found = json.loads(text)
        results = [Result(**{**one, "ours": tuple(one["ours"]), "theirs": tuple(one["theirs"]),
                             "bar": Bar(**one["bar"])}) for one in found.pop("results")]
        return cls(results=results, **found)

    def to_markdown(self) -> str:
        about = {**self.machine, **self.peers}
        said = [f"{name}: {value or 'not installed'}" for name, value in about.items()]
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return "\n".join([*head(), *(line(result) for result in self.results), "", "; ".join(said) + ".",
                          f"Medians; {options}.", ""])


COLUMNS = ("work", "MISS", "peer", "ratio", "to reach", "met", "note")


def head() -> list[str]:
    return [_joined(COLUMNS), "|" + "---|" * len(COLUMNS)]


def line(result: Result) -> str:
    return _joined(result.cells())


def _joined(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def figure(value: float) -> str:
    """With as many digits as mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m bench.table FILE.json")
    print(Report.from_json(Path(sys.argv[1]).read_text()).to_markdown(), end="")


if __name__ == "__main__":
    main()
