"""Owns the octets of a data set on their way from where they lie to the peer: a buffer in which PDU headers
stand ready, and into whose gaps they are read, so that one read and one send move up to a mebibyte. It never
touches a socket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from node.dimse.pdu import DATA_HEADER_BYTES, LAST_FRAGMENT, data_header

BUFFER_BYTES = 1 << 20  # of one outbox, whatever the file's size
VECTOR_MAX = 1024       # IOV_MAX of Linux: fragments of one read
COMMAND_BYTES_MAX = 2048


class Source(Protocol):
    """A data set that lies somewhere. What can't be read raises an OSError or a MissError."""

    @property
    def length(self) -> int: ...

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill `views`, at most 1,024, from a place on that leaves enough for them; how many octets, at least
        one, fewer for no reason."""

    def confirm(self) -> None:
        """Raises where what was read until now may not be what lay there. Asked before the last fragment
        goes out."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class FileSource:
    """A part of an open file, which is closed with it."""

    fd: int
    offset: int
    length: int

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        done = os.preadv(self.fd, views, self.offset + offset)
        if not done:
            raise OSError("the file ends early")
        return done

    def confirm(self) -> None:
        """What was read was there."""

    def close(self) -> None:
        os.close(self.fd)


class Outbox:
    """Holds a part of one data set, cut into fragments of `fragment_bytes` with their headers between them.

    `begin` takes a source, `load` reads the next part and says how the PDUs lie; `octets` are then to be sent
    whole before the next `load`.
    """

    def __init__(self, fragment_bytes: int) -> None:
        self._step = fragment_bytes
        self._whole = max(min(VECTOR_MAX, BUFFER_BYTES // (fragment_bytes + DATA_HEADER_BYTES)), 1)
        pitch = fragment_bytes + DATA_HEADER_BYTES
        self._pitch = pitch
        self._buffer = memoryview(bytearray(COMMAND_BYTES_MAX + self._whole * pitch))
        self._gaps = [self._buffer[at + DATA_HEADER_BYTES:at + pitch]
                      for at in range(COMMAND_BYTES_MAX, len(self._buffer), pitch)]
        self._context_id = 0
        self._patched = -1  # where a header is not that of a whole fragment with more to come
        self._source: Source | None = None
        self._offset = 0
        self._left = 0
        self._start = self._end = COMMAND_BYTES_MAX

    def begin(self, source: Source, context_id: int) -> None:
        """Take the next data set; whoever opened it closes it."""
        if context_id != self._context_id:
            self._context_id = context_id
            self._patched = -1
            header = data_header(context_id, 0, self._step)
            for at in range(COMMAND_BYTES_MAX, len(self._buffer), self._pitch):
                self._buffer[at:at + DATA_HEADER_BYTES] = header
        self._source, self._offset, self._left = source, 0, source.length

    @property
    def left(self) -> int:
        """How much of the data set was not loaded yet."""
        return self._left

    @property
    def octets(self) -> memoryview:
        """What is to be sent."""
        return self._buffer[self._start:self._end]

    def load(self) -> None:
        """Read the next part; the last one is marked as that, once the source has confirmed it. Raises what
        the source raises: then the rest is not to be sent."""
        count = min(self._left, self._whole * self._step)
        whole, rest = divmod(count, self._step)
        gaps = list(islice(self._gaps, whole))
        if rest:
            gaps.append(self._gaps[whole][:rest])
        self._read(gaps, count)
        self._offset += count
        self._left -= count
        if not self._left and self._source is not None:
            self._source.confirm()
            self._source = None
        self._start = COMMAND_BYTES_MAX
        self._end = COMMAND_BYTES_MAX + count + DATA_HEADER_BYTES * max(len(gaps), 1)
        if self._patched >= 0:
            self._put(self._patched, 0, self._step)
            self._patched = -1
        if not self._left:
            last = max(len(gaps), 1) - 1
            self._put(last, LAST_FRAGMENT, count - last * self._step)
            self._patched = last

    def put_before(self, octets: bytes) -> None:
        """Let the command's PDUs, at most COMMAND_BYTES_MAX, go out in the same send."""
        self._start -= len(octets)
        self._buffer[self._start:self._start + len(octets)] = octets

    def _put(self, number: int, control: int, length: int) -> None:
        at = COMMAND_BYTES_MAX + number * self._pitch
        self._buffer[at:at + DATA_HEADER_BYTES] = data_header(self._context_id, control, length)

    def _read(self, gaps: Sequence[memoryview], count: int) -> None:
        if not count:
            return
        assert self._source is not None
        done = self._source.read_into(gaps, self._offset)
        while done < count:  # a read may stop early, though it hardly ever does on a disk
            skipped = 0
            rest: list[memoryview] = []
            for gap in gaps:
                if skipped + len(gap) > done:
                    rest.append(gap[max(done - skipped, 0):])
                skipped += len(gap)
            done += self._source.read_into(rest, self._offset + done)
