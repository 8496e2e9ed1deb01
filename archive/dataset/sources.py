"""Random access to the bytes of a data set, stored plain or deflated, through a small window. Owns no
structure."""

from __future__ import annotations

import zlib
from typing import BinaryIO, Protocol

from archive.errors import CannotUnderstand, TooLarge

_SEQUENTIAL_READ_BYTES = 64 << 10
_RANDOM_READ_BYTES = 1 << 10
_INFLATE_CHUNK_BYTES = 64 << 10


class Source(Protocol):
    """Random access to the bytes of a data set."""

    def read(self, offset: int, size: int) -> bytes: ...


class FileSource:
    """The data set that lies in a seekable file from `base` on."""

    def __init__(self, file: BinaryIO, base: int) -> None:
        self._file = file
        self._base = base

    def read(self, offset: int, size: int) -> bytes:
        self._file.seek(self._base + offset)
        return self._file.read(size)


class InflatedSource:
    """A deflated data set (PS3.5 A.5), inflated as far as it is read and no further than `bytes_max`.

    Raw deflate is the rule; a zlib header is tolerated, as pydicom and DCMTK do. Going back starts again.
    """

    def __init__(self, file: BinaryIO, base: int, *, bytes_max: int) -> None:
        self._file = file
        self._base = base
        self._bytes_max = bytes_max
        self._wbits = -zlib.MAX_WBITS
        self._restart()

    def _restart(self) -> None:
        self._inflate = zlib.decompressobj(self._wbits)
        self._position = self._base
        self._start = 0
        self._buffer = b""

    def read(self, offset: int, size: int) -> bytes:
        if offset < self._start:
            self._restart()
        if offset + size > self._bytes_max:
            raise TooLarge(f"inflates to more than {self._bytes_max} bytes")
        while self._start + len(self._buffer) < offset + size:
            piece = self._next()
            if not piece:
                break
            keep = max(0, min(offset - self._start, len(self._buffer)))
            self._buffer = self._buffer[keep:] + piece
            self._start += keep
        begin = offset - self._start
        return self._buffer[begin : begin + size]

    def _next(self) -> bytes:
        while not self._inflate.eof:
            data = self._inflate.unconsumed_tail
            if not data:
                self._file.seek(self._position)
                data = self._file.read(_INFLATE_CHUNK_BYTES)
                self._position += len(data)
                if not data:
                    return b""
            try:
                piece = self._inflate.decompress(data, _INFLATE_CHUNK_BYTES)
            except zlib.error as error:
                if self._wbits < 0 and not self._start and not self._buffer:
                    self._wbits = zlib.MAX_WBITS
                    self._restart()
                    continue
                raise CannotUnderstand("the deflated data set does not inflate") from error
            if piece:
                return piece
        return b""


class Window:
    """A buffer over a source that reads ahead when reading goes on where it was, and little after a jump."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._start = 0
        self._buffer = b""

    def at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end."""
        begin = offset - self._start
        if begin >= 0 and begin + size <= len(self._buffer):
            return self._buffer[begin : begin + size]
        near = 0 <= begin <= len(self._buffer)
        self._buffer = self._source.read(
            offset, max(size, _SEQUENTIAL_READ_BYTES if near else _RANDOM_READ_BYTES)
        )
        self._start = offset
        return self._buffer[:size]
