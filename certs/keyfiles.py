"""How keys and certificates reach the disk: private from their first byte, whole or not at all, and synced.

Never overwrites: a file is made once (O_EXCL) inside a folder that nobody uses yet, and folders are switched
by rename. Names come from this package only.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from archive.errors import SettingsError

PRIVATE = 0o600
PUBLIC = 0o644
FILE_BYTES_MAX = 256 << 10  # a PEM chain is some kilobytes; more than this is no file of ours


def write_new(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Makes `path` with `data`, synced. The mode is the file's from its first moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes the names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private_folder(path: Path) -> None:
    """Makes `path` and what leads to it; the last one only for the owner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def read(path: Path) -> bytes:
    """The content of a file of ours, within the bound."""
    with path.open("rb") as file:
        data = file.read(FILE_BYTES_MAX + 1)
    if len(data) > FILE_BYTES_MAX:
        raise SettingsError(f"{path.name} is larger than {FILE_BYTES_MAX} bytes: not a file of this program")
    return data


def read_private(path: Path) -> bytes:
    """The content of a key file; refused while others than its owner can read it."""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise SettingsError(f"{path} can be read by others than its owner: chmod 600, and consider it known")
    return read(path)
