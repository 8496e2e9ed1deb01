"""A large object as it lies on disk while it still arrives, for a reader beside who writes it. What was read
is no more than bytes: whoever reads it checks the digest of the whole once that is stored."""

from __future__ import annotations

from typing import Protocol

from archive.packs.storage import AppendFile


class Written(Protocol):
    """Who writes it."""

    @property
    def written(self) -> int:
        """How far the file holds what came."""


class Growing:
    """The data set of an own pack that is being written. It can be read on when the pack is given up
    meanwhile: then nothing more comes."""

    def __init__(self, file: AppendFile, writer: Written, start: int) -> None:
        """`file` is closed with this; the data set begins at `start`."""
        self._file = file
        self._writer = writer
        self._start = start

    def read(self, at: int, size_max: int) -> bytes:
        """The data set from `at` on, as far as it is there: b"" when nothing is yet."""
        there = self._writer.written - self._start - at
        return self._file.read(self._start + at, min(there, size_max)) if there > 0 else b""

    def close(self) -> None:
        self._file.close()
