"""Progress bars on stderr, which stay quiet when stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from miss.console import err, size
from miss.sending import Account


@contextmanager
def sending_bar(total: int, title: str) -> Iterator[Callable[[Account], None]]:
    """A bar for a stretch of sending; call what it gives with the account after each instance."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[amount]}"), TimeRemainingColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(title, total=total, amount="")

        def show(account: Account) -> None:
            failed = f", {account.failed} failed" if account.failed else ""
            bar.update(task, completed=account.sent + account.failed, amount=size(account.bytes) + failed)

        yield show
