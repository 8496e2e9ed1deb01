"""What the demo keeps beside its region: demo.json, its plan with the passwords, the lock that lets only one
demo run in a folder; and how it hears that it should stop. Files are written whole or not at all, for their
owner alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from archive.errors import Unavailable
from miss.console import EXIT_ERROR

LOCK = "lock"


class Stopped(BaseException):
    """Ctrl-C or SIGTERM."""


@contextlib.contextmanager
def only_one(state: Path) -> Iterator[None]:
    with (state / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Unavailable(f"a demo runs in {state} already") from None
        yield


@contextlib.contextmanager
def until_stopped() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP become `Stopped`, wherever the demo is."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except Stopped:  # before anything ran
        raise typer.Exit(EXIT_ERROR) from None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ignoring_signals() -> Iterator[None]:
    old = {number: signal.signal(number, signal.SIG_IGN)
           for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return dict(read)


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Whole or not at all, readable by its owner alone: passwords are in it."""
    staged = path.with_suffix(".new")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(contents, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(staged, path)
