"""Progress bars on stderr, which stay quiet when stderr is no terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from miss.console import err, size
from node.dimse.sending import Progress, SendReport
from node.dimse.status import CLASS_NOT_SUPPORTED, PROCESSING_FAILURE, is_stored

WORDS = {
    CLASS_NOT_SUPPORTED: "the peer takes no such SOP class in this transfer syntax",
    PROCESSING_FAILURE: "processing failure (0110), or the association ended before the answer",
}


@contextmanager
def sending_bar(total: int, title: str) -> Iterator[Callable[[Progress], None]]:
    """A bar for a stretch of sending; what it gives is called after each file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[amount]}"), TimeRemainingColumn())
    with Bar(*columns, console=err) as bar:
        task = bar.add_task(title, total=total, amount="")
        done, failed = 0, 0

        def show(step: Progress) -> None:
            nonlocal done, failed
            done += step.bytes
            failed += step.status is None or not is_stored(step.status)
            bar.update(task, advance=1, amount=size(done) + (f", {failed} failed" if failed else ""))

        yield show


def failures(report: SendReport) -> Counter[str]:
    """What was not taken, by reason."""
    return Counter(WORDS.get(status, f"refused with status {status:04X}") for _, status in report.failed)
