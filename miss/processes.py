"""Child processes of this program: started as the same `miss` commands that a person would type, watched,
stopped in order, and never left behind. Knows commands, ports and logs; not what the commands do."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from archive.errors import Unavailable
from archive.settings import ENVIRONMENT_PREFIX

PARENT_VARIABLE = "MISS_PARENT_FD"
STOP_TIMEOUT_S = 20.0
POLL_S = 0.05
LOG_TAIL_BYTES = 2_000
FREE_PORTS = range(12_000, 32_000)  # Linux gives 32768 and above to whoever connects

T = TypeVar("T")


@dataclass(slots=True)
class Child:
    """One `miss` command as a process of its own, its output in `log`.

    The child holds the reading end of a pipe whose writing end is ours alone: when this process ends, however
    it ends, the child reads the end of the pipe and stops (`stop_with_parent`). `before` goes before the
    command, for one that runs elsewhere (`ip netns exec NAME`): it is to become the command.
    """

    name: str
    arguments: Sequence[str]
    log: Path
    before: Sequence[str] = ()
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _pipe: int = field(default=-1, init=False)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        reading, writing = os.pipe()
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*self.before, sys.executable, "-P", "-m", "miss", *self.arguments],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[reading],
                    env=_environment() | {PARENT_VARIABLE: str(reading)},
                    # A session of its own: the terminal's Ctrl-C reaches us alone, and we stop them in order.
                    start_new_session=True,
                )
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        self._pipe = writing

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def ask_to_stop(self) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9, as a power cut would: for tests."""
        if self._process is not None and self.running:
            self._process.kill()
        self._reap(STOP_TIMEOUT_S)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """Asks, waits, and kills what does not listen. True when it ended by itself."""
        self.ask_to_stop()
        clean = self._reap(timeout_s)
        if not clean and self._process is not None:
            self._process.kill()
            self._reap(STOP_TIMEOUT_S)
        return clean

    def _reap(self, timeout_s: float) -> bool:
        if self._process is None:
            return True
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        return True

    def last_words(self) -> str:
        """The end of the log, for a message about a child that ended."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                return log.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""


def _environment() -> dict[str, str]:
    """Ours without our settings: a child has a file of its own, and refuses what is not its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}


def wait_until(
    what: str, probe: Callable[[], T | None], *, timeout_s: float, children: Sequence[Child] = ()
) -> T:
    """Polls `probe` until it gives something. Unavailable names `what` when the time is up, or the child that
    ended meanwhile: waiting longer would be in vain."""
    deadline = time.monotonic() + timeout_s
    while True:
        if (value := probe()) is not None:
            return value
        for child in children:
            if not child.running:
                raise Unavailable(f"{child.name} ended with code {child.exit_code} while waiting for {what}; "
                                  f"its log {child.log} ends with:\n{child.last_words()}")
        if time.monotonic() >= deadline:
            raise Unavailable(f"{what}: not there after {timeout_s:g} s")
        time.sleep(POLL_S)


def listening(host: str, port: int) -> bool | None:
    """True when something accepts connections there, else None (for `wait_until`)."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return None


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that nobody holds now. Held together while they are chosen, so that they differ; by chance, and
    below those that the kernel gives to whoever connects, so that hardly anybody takes one before it is used.
    """
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            one = socket.socket()
            sockets.append(one)
            try:
                one.bind((host, random.SystemRandom().choice(FREE_PORTS)))
            except OSError:
                sockets.pop().close()
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def stop_with_parent() -> None:
    """In a child: ends this process soon after its parent, also when the parent was killed outright."""
    text = os.environ.pop(PARENT_VARIABLE, "")
    if not text.isdigit():
        return

    def watch(pipe: int) -> None:
        try:
            os.read(pipe, 1)  # returns only when the writing end is gone
        except OSError:
            return
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_TIMEOUT_S)
        os._exit(1)

    threading.Thread(target=watch, args=(int(text),), name="parent", daemon=True).start()
