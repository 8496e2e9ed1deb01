"""Owns a folder of worklist files, as wlmscpfs has one: files that come, change or go are followed into the
ledger's scheduled steps. It reads `*.wl` and `*.dcm`, Part 10 or data sets alone; whatever else lies there, a
lock file too, it leaves alone. It writes nothing into the folder."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from archive.database import storable
from archive.dataset import jsonsets
from archive.errors import InvalidInput, TooLarge
from archive.ledger import Ledger
from archive.ledger.worklist import steps_of

log = logging.getLogger(__name__)

SUFFIXES = (".wl", ".dcm")
FILES_MAX = 20_000
FILE_BYTES_MAX = 4 << 20
ORIGIN = "file:"

Look = tuple[int, int, int]  # when it changed, its size, which file it is


class WorklistFolder:
    """One folder. `look` brings the ledger up to what lies there now."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self._folder = folder
        self._ledger = ledger
        self._seen: dict[str, Look] = {}
        self._recalled = False
        self._complaint = ""

    def look(self) -> int:
        """Follow what came, changed or went; how many files. Raises what the ledger does, and then goes on
        with the rest the next time. A folder that can't be listed changes nothing."""
        found = self._listed()
        if found is None:
            return 0
        count = 0
        try:
            for name, look in found.items():
                if self._seen.get(name) != look:
                    self._follow(name, look)
                    count += 1
        finally:  # what goes makes room for what came; after it, as a file that has another name now is both
            for name in self._gone(found):
                self._ledger.unschedule_origin(_origin(name))
                self._seen.pop(name, None)
                count += 1
            self._recalled = True
        return count

    def _gone(self, found: Mapping[str, Look]) -> list[str]:
        """The files that were here and are not; at first, those whose steps are from an earlier run."""
        if self._recalled:
            return [name for name in self._seen if name not in found]
        here = {_origin(name) for name in found}
        return [origin.removeprefix(ORIGIN) for origin in self._ledger.origins(ORIGIN) - here]

    def _listed(self) -> dict[str, Look] | None:
        """The files by name; None when the folder can't be listed, which is said once."""
        found: dict[str, Look] = {}
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.name.lower().endswith(SUFFIXES) and entry.is_file(follow_symlinks=False):
                        try:
                            found[entry.name] = _look(entry.stat(follow_symlinks=False))
                        except FileNotFoundError:
                            continue  # it went between the two
        except OSError as error:
            self._complain(f"can't be listed ({error.strerror})")
            return None
        if len(found) > FILES_MAX:
            self._complain(f"holds more than {FILES_MAX:,} worklist files: the first of them count")
            found = dict(sorted(found.items())[:FILES_MAX])
        else:
            self._complaint = ""
        return found

    def _follow(self, name: str, look: Look) -> None:
        """Take in one file. A broken or half-written one keeps what it had on the worklist, and is read again
        when it changes."""
        try:
            octets, now = _read(self._folder / name)
            steps = steps_of(jsonsets.from_file(octets), _origin(name))
        except FileNotFoundError:
            return  # the next look knows
        except (InvalidInput, TooLarge) as error:
            log.warning("the worklist file %r can't be taken: %s", name, error)
            self._seen[name] = look
            return
        except OSError as error:
            log.warning("the worklist file %r can't be read: %s", name, error.strerror)
            self._seen[name] = look
            return
        self._ledger.schedule(steps, instead_of=_origin(name))
        self._seen[name] = now

    def _complain(self, what: str) -> None:
        if self._complaint != what:
            log.warning("the worklist folder %s %s", self._folder, what)
            self._complaint = what


def _origin(name: str) -> str:
    return storable(ORIGIN + name)


def _look(status: os.stat_result) -> Look:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> tuple[bytes, Look]:
    """A file's octets, and how it looked before they were read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput("it is no regular file")
        octets = file.read(FILE_BYTES_MAX + 1)
    if len(octets) > FILE_BYTES_MAX:
        raise TooLarge(f"it has more than {FILE_BYTES_MAX:,} bytes")
    return octets, _look(status)
