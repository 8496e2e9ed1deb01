"""Giving back the space of a payload in the middle of a file: which bytes, and how Linux is asked. The file's
size stays, and so does everything around: the record's header, the beginning of its payload and its trailer.

A hole reads as zeros, so whoever reads a payload asks afterwards whether it is one. Only file systems that
say so exactly, block by block, count as able to punch; on the others the space comes back by compaction.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

from archive.model import Location

BLOCK_BYTES = 4096
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


def span_of(location: Location) -> tuple[int, int]:
    """The whole blocks that hold nothing but the data set of a payload: from, to (equal when there is
    none)."""
    start = -(-(location.offset + location.dataset_offset) // BLOCK_BYTES) * BLOCK_BYTES
    end = (location.offset + location.length) // BLOCK_BYTES * BLOCK_BYTES
    return start, max(start, end)


def punch(fd: int, offset: int, length: int) -> None:
    """Give the blocks back. Raises OSError: EOPNOTSUPP where the file system can't."""
    if _fallocate is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    while _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def is_hole(fd: int, start: int, end: int) -> bool:
    """Whether there is no data between two places of a file."""
    if end <= start:
        return False
    try:
        return os.lseek(fd, start, os.SEEK_DATA) >= end
    except OSError as error:
        return error.errno == errno.ENXIO and os.fstat(fd).st_size >= end


def can_punch(folder: Path) -> bool:
    """Whether the file system of `folder` punches a single block and says so; tried on a file of its own."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            fd = probe.fileno()
            os.pwrite(fd, b"\xff" * 3 * BLOCK_BYTES, 0)
            os.fsync(fd)
            if is_hole(fd, BLOCK_BYTES, 2 * BLOCK_BYTES):
                return False
            punch(fd, BLOCK_BYTES, BLOCK_BYTES)
            data = os.pread(fd, 4 * BLOCK_BYTES, 0)
            kept = b"\xff" * BLOCK_BYTES
            return data == kept + bytes(BLOCK_BYTES) + kept and (
                is_hole(fd, BLOCK_BYTES, 2 * BLOCK_BYTES)
                and not is_hole(fd, 0, BLOCK_BYTES)
                and not is_hole(fd, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES)
            )
    except OSError:
        return False


def _find_fallocate() -> Any:
    """Python has `posix_fallocate` alone, which makes no holes."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("fallocate64", "fallocate"):  # the former takes 64-bit places on every machine
        function = getattr(libc, name, None)
        if function is not None:
            function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
            function.restype = ctypes.c_int
            return function
    return None


_fallocate = _find_fallocate()
