"""How the command speaks: what it prints, how it ends on errors, and what a process writes to its log. Data
goes to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from archive.errors import MissError, SettingsError

PIPE_WIDTH = 1_000  # into a pipe or a file nothing is folded: grep wants whole lines

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPE_WIDTH)

EXIT_ERROR = 1
EXIT_SETTINGS = 2
EXIT_INTERRUPTED = 130

# A line feed that came from outside must not make a line of its own, nor may anything steer a terminal.
_CONTROLS = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if code != ord("\t")}


class OneLine(logging.Formatter):
    """One event, one line: time in UTC, level, logger, the trace of the request that it is about if it is
    about one, message; a traceback is folded into the line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        text = record.getMessage()
        if record.exc_info:
            text += " | " + self.formatException(record.exc_info)
        text = text.translate(_CONTROLS)
        trace = getattr(record, "trace", "")
        about = f"trace={trace} " if trace else ""
        return f"{at.removesuffix('+00:00')}Z {record.levelname} {record.name} {about}{text}"


def set_up_logging(level: str = "INFO") -> None:
    """Every logger of the process, one line per event, on stderr. Called once, by the command that runs."""
    from monitoring.tracing import TraceFilter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    handler.addFilter(TraceFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    # pydicom quotes values in its warnings, and httpx query strings: both would be patient data in a log.
    for name in ("py.warnings", "pynetdicom", "httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(name).setLevel("ERROR")
    logging.getLogger("pydicom").setLevel("CRITICAL")  # and a traceback for each image it has no decoder for


def run(command: Callable[[], None]) -> None:
    """Runs the command; what MISS raises on purpose ends in one clear line and an exit code."""
    try:
        command()
    except SettingsError as error:
        err.print(f"miss: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(EXIT_SETTINGS) from None
    except MissError as error:
        err.print(f"miss: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # `miss ... | head`
        sys.stderr.close()
        raise SystemExit(EXIT_ERROR) from None
    except OSError as error:  # a folder that can't be made, a file that may not be read
        what = f"{error.filename}: " if error.filename is not None else ""
        err.print(f"miss: {what}{error.strerror or error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(EXIT_ERROR) from None


def program() -> str:
    """How this command is typed here: `miss` where it is on the PATH, else the way it was started."""
    started = Path(sys.argv[0])
    return "miss" if shutil.which("miss") or started.name != "miss" else str(started)


class Grid(Table):
    """A table that shows every string as it is: AE titles, versions and names come from outside, and neither
    markup nor an escape sequence in them may do anything. What has a colour is a `Text`."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(Text(plain(cell)) if isinstance(cell, str) else cell for cell in cells), **options)


def plain(text: str) -> str:
    """`text` with its control characters made visible."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def table(*columns: str, title: str | None = None) -> Grid:
    """A plain table; a column whose name starts with `>` is of numbers."""
    grid = Grid(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold",
                show_header=any(columns))
    for name in columns:
        grid.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left",
                        overflow="fold")
    return grid


def when(at_us: int) -> str:
    """A time as local people read it, `-` for never."""
    if not at_us:
        return "-"
    return datetime.fromtimestamp(at_us / 1e6).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def size(count: int | float) -> str:
    """Bytes in words: 12.3 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
