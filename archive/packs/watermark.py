"""The watermark: one small mapped file in which the process that writes an archive says how far it has
acknowledged, so that another process that reads the same index (a portal) can wait for what was
acknowledged before its question.

It is written after the sync it tells of and never synced itself: after a power loss it may be old, never
too new.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import zlib
from pathlib import Path

from archive.model import START, Position

_BYTES = 4096
_SLOT = struct.Struct("<8sQ16sIQ")  # magic, turn, writer, file, offset
_CHECK = struct.Struct("<I")
_SLOT_BYTES = 64
_MAGIC = b"MISSwm\x00\x01"


class Watermark:
    """Two slots, written in turn: a reader that meets one half written takes the other."""

    def __init__(self, view: mmap.mmap, writer: bytes, turn: int) -> None:
        self._view = view
        self.writer = writer
        self._turn = turn
        self._said = START
        self._publishing = threading.Lock()

    @classmethod
    def open(cls, path: Path, writer: bytes) -> Watermark:
        """To publish. What it said before goes on being said, if it was said for this writer's packs."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            os.ftruncate(fd, _BYTES)
            view = mmap.mmap(fd, _BYTES)
        finally:
            os.close(fd)
        turn, _, _ = _newest(view)
        return cls(view, writer, turn)

    @property
    def position(self) -> Position:
        _, writer, position = _newest(self._view)
        return position if writer == self.writer else START

    def publish(self, position: Position) -> None:
        """Say that everything below `position` was acknowledged. Never takes anything back."""
        with self._publishing:
            if position <= self._said:
                return
            self._said = position
            self._turn += 1
            slot = _SLOT.pack(_MAGIC, self._turn, self.writer, position.file, position.offset)
            start = (self._turn % 2) * _SLOT_BYTES
            self._view[start : start + _SLOT.size + _CHECK.size] = slot + _CHECK.pack(zlib.crc32(slot))

    def close(self) -> None:
        self._view.close()


def read_watermark(path: Path) -> Position:
    """What the writer of an archive has acknowledged; START when nobody says."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return START
    return _newest(data)[2]


def _newest(view: mmap.mmap | bytes) -> tuple[int, bytes, Position]:
    newest: tuple[int, bytes, Position] = (0, b"", START)
    for start in (0, _SLOT_BYTES):
        data = view[start : start + _SLOT.size + _CHECK.size]
        if len(data) < _SLOT.size + _CHECK.size:
            continue
        slot = data[: _SLOT.size]
        magic, turn, writer, file, offset = _SLOT.unpack(slot)
        if magic == _MAGIC and _CHECK.unpack(data[_SLOT.size :])[0] == zlib.crc32(slot) and turn > newest[0]:
            newest = (turn, writer, Position(file, offset))
    return newest
