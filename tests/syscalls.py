"""What a process asks the kernel, by strace, while it runs: begun by attaching to it and read strictly, line
by line, so that a call that is not understood fails the test; and faults that strace injects."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ATTACH_S_MAX = 10.0
WRITING = ("openat,pwrite64,pwritev,pwritev2,write,writev,fdatasync,fsync,sync_file_range,msync,rename,"
           "renameat,renameat2,unlink,unlinkat,ftruncate,fallocate,sendto,sendmsg,sendfile")

_LINE = re.compile(r"(\d+) +(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+|\?)(?:<[^>]*(?:->[^>]*)?>)?(?: (E[A-Z]+) \(.*?\))?"
                   r"(?: \(INJECTED\))?")
_DETACHED = " <detached ...>"  # strace was ended in the middle of it
_UNFINISHED = re.compile(r"(\w+)\((.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)")
_NOTES = ("+++ ", "--- ")
_DESCRIPTOR = re.compile(r"\d+<((?:TCP|TCPv6|UNIX[^:]*):\[[^\]]*\]|[^>]*)>")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Call:
    """One system call. `began` and `ended` are places in one order of events over all threads."""

    name: str
    arguments: str
    result: int
    error: str
    began: int
    ended: int

    @property
    def path(self) -> str:
        """The file or socket that its first argument refers to."""
        found = _DESCRIPTOR.match(self.arguments)
        return found[1] if found else ""

    @property
    def names(self) -> list[str]:
        """The quoted arguments: paths that are opened or renamed, and what is written."""
        return _QUOTED.findall(self.arguments)

    @property
    def to_a_peer(self) -> bool:
        return self.path.startswith("TCP")

    @property
    def writes(self) -> bool:
        return self.name in ("pwrite64", "pwritev", "pwritev2", "write", "writev")


def parse(text: str) -> list[Call]:
    """The calls of a trace by `strace -f -yy -o`, by when they ended."""
    calls: list[Call] = []
    waiting: dict[str, tuple[str, str, int]] = {}
    for place, line in enumerate(text.splitlines()):
        split = _LINE.fullmatch(line)
        assert split is not None, line
        thread, rest = split.groups()
        if rest.startswith(_NOTES):
            continue
        began = place
        if rest.endswith(_DETACHED):
            continue
        unfinished, resumed = _UNFINISHED.fullmatch(rest), _RESUMED.fullmatch(rest)
        if unfinished is not None:
            assert thread not in waiting, line
            waiting[thread] = (unfinished[1], unfinished[2], place)
            continue
        if resumed is not None:
            name, arguments, began = waiting.pop(thread)
            assert name == resumed[1], line
            rest = f"{name}({arguments}{resumed[2]}"
        call = _CALL.fullmatch(rest)
        assert call is not None, line
        if call[3] != "?":
            calls.append(Call(call[1], call[2], int(call[3]), call[4] or "", began, place))
    return calls


@contextmanager
def attached(pid: int, trace: Path, *options: str) -> Iterator[None]:
    """strace on every thread of a process, until the block ends. Skips where it may not."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed")
    errors = trace.with_suffix(".errors")
    with errors.open("wb") as said:
        command = [program, "-f", "-yy", "-s", "32", "-o", str(trace), *options, "-p", str(pid)]
        tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
    try:
        until = time.monotonic() + ATTACH_S_MAX
        while f"Process {pid} attached" not in errors.read_text():
            if tracer.poll() is not None:
                pytest.skip(f"strace may not attach here: {errors.read_text().strip()}")
            assert time.monotonic() < until, "strace does not attach"
            time.sleep(0.01)
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(ATTACH_S_MAX)


@contextmanager
def traced(pid: int, trace: Path) -> Iterator[None]:
    """Everything that writes, syncs, names or sends."""
    with attached(pid, trace, "-e", f"trace={WRITING}"):
        yield


def failing(pid: int, trace: Path, calls: str, error: str, *paths: Path) -> AbstractContextManager[None]:
    """Calls that fail with `error`, on these files alone."""
    chosen = [option for path in paths for option in ("-P", str(path))]
    return attached(pid, trace, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}", *chosen)


def only(calls: Sequence[Call]) -> Call:
    assert len(calls) == 1, calls
    return calls[0]
