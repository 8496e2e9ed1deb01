"""A corrected data set as readers get it: the stream or the memory that they read, with the few stretches
that `correcting.py` wrote anew in their places. Nothing else is held, whatever the size; a deflated data set
alone is written anew as a whole, within a bound.
"""

from __future__ import annotations

import io
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import BinaryIO, Protocol

from archive.dataset.correcting import Edit, edits_of, padded
from archive.dataset.encoding import DEFLATED_SYNTAXES, EXPLICIT_LITTLE
from archive.dataset.sources import FileSource, InflatedSource
from archive.errors import CannotUnderstand
from archive.model import Overlay

INFLATED_BYTES_MAX = 256 << 20
_BUFFER_BYTES = 64 << 10


class ReadableDataset(Protocol):
    """A data set to be read into the reader's own memory (`packs.StoredDataset`)."""

    @property
    def length(self) -> int: ...

    def read_into(self, views: Sequence[memoryview], offset: int) -> int: ...

    def confirm(self) -> None: ...

    def close(self) -> None: ...


class Patchwork:
    """Where the bytes of a stream with edits lie: in the stream, or in an edit."""

    def __init__(self, edits: Sequence[Edit], length: int) -> None:
        # Where each begins, its octets, or where it lies.
        self._pieces: list[tuple[int, bytes | None, int]] = []
        at = there = 0
        for edit in edits:
            if edit.start > there:
                self._pieces.append((at, None, there))
                at += edit.start - there
            if edit.octets:
                self._pieces.append((at, edit.octets, 0))
                at += len(edit.octets)
            there = max(there, edit.stop)
        if length > there:
            self._pieces.append((at, None, there))
            at += length - there
        self.length = at
        self._starts = [piece[0] for piece in self._pieces]

    def piece(self, offset: int) -> tuple[bytes | None, int, int]:
        """What lies at a place: the octets of an edit or None, where in them or in the stream, how many."""
        number = bisect_right(self._starts, offset) - 1
        begins, octets, there = self._pieces[number]
        ends = self._starts[number + 1] if number + 1 < len(self._starts) else self.length
        within = offset - begins
        return octets, (within if octets is not None else there + within), ends - offset


class CorrectedDataset:
    """A data set with edits, for who reads into memory of their own."""

    def __init__(self, plain: ReadableDataset, edits: Sequence[Edit]) -> None:
        self._plain = plain
        self._work = Patchwork(edits, plain.length)

    @property
    def length(self) -> int:
        return self._work.length

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        octets, at, count = self._work.piece(offset)
        if octets is not None:
            view = views[0]
            taken = min(count, len(view))
            view[:taken] = octets[at : at + taken]
            return taken
        within: list[memoryview] = []
        for view in views:
            if count <= 0:
                break
            within.append(view[:count])
            count -= len(view)
        return self._plain.read_into(within, at)

    def confirm(self) -> None:
        self._plain.confirm()

    def close(self) -> None:
        self._plain.close()


class CorrectedFile(io.RawIOBase):
    """A Part 10 stream whose data set has edits; their places count from the stream's first byte."""

    def __init__(self, plain: BinaryIO, edits: Sequence[Edit], length: int) -> None:
        self._plain = plain
        self._work = Patchwork(edits, length)
        self._place = 0

    name = ""  # pydicom asks for it

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._work.length}[whence]
        if base + offset < 0:
            raise ValueError("a place before the beginning")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self._place >= self._work.length or not len(buffer):
            return 0
        octets, at, count = self._work.piece(self._place)
        count = min(count, len(buffer))
        if octets is None:
            self._plain.seek(at)
            data = self._plain.read(count)
            if not data:
                raise CannotUnderstand("the stream ends early")
        else:
            data = octets[at : at + count]
        memoryview(buffer)[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._plain.close()
        super().close()


def corrected_file(
    payload: BinaryIO, dataset_offset: int, transfer_syntax_uid: str, overlay: Overlay
) -> BinaryIO:
    """A Part 10 stream whose data set begins at `dataset_offset`, as corrected. It closes `payload`."""
    try:
        edits = _file_edits(payload, dataset_offset, transfer_syntax_uid, overlay)
        length = payload.seek(0, io.SEEK_END)
        payload.seek(0)
    except BaseException:
        payload.close()
        raise
    if not edits:
        return payload
    return io.BufferedReader(CorrectedFile(payload, edits, length), _BUFFER_BYTES)


def corrected_dataset(
    plain: ReadableDataset, payload: BinaryIO, dataset_offset: int, transfer_syntax_uid: str, overlay: Overlay
) -> ReadableDataset:
    """The same of a data set that is read into memory; `payload` is the stream that it is the end of."""
    moved = _file_edits(payload, dataset_offset, transfer_syntax_uid, overlay)
    edits = [Edit(each.start - dataset_offset, each.stop - dataset_offset, each.octets) for each in moved]
    return CorrectedDataset(plain, edits) if edits else plain


def _file_edits(payload: BinaryIO, base: int, transfer_syntax_uid: str, overlay: Overlay) -> list[Edit]:
    if transfer_syntax_uid in DEFLATED_SYNTAXES:
        return _deflated_edits(payload, base, overlay)
    edits = edits_of(FileSource(payload, base), transfer_syntax_uid, overlay)
    return [Edit(base + each.start, base + each.stop, each.octets) for each in edits]


def _deflated_edits(payload: BinaryIO, base: int, overlay: Overlay) -> list[Edit]:
    """The whole data set anew: within a deflated one nothing has a place of its own."""
    source = InflatedSource(payload, base, bytes_max=INFLATED_BYTES_MAX)
    edits = edits_of(source, EXPLICIT_LITTLE, overlay)
    if not edits:
        return []
    source = InflatedSource(payload, base, bytes_max=INFLATED_BYTES_MAX)
    pieces, at = [], 0
    while piece := source.read(at, 1 << 20):
        pieces.append(piece)
        at += len(piece)
    plain = b"".join(pieces)
    written, there = [], 0
    for edit in edits:
        written += [plain[there : edit.start], edit.octets]
        there = max(there, edit.stop)
    written.append(plain[there:])
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    octets = b"".join([deflate.compress(piece) for piece in written]) + deflate.flush()
    return [Edit(base, payload.seek(0, io.SEEK_END), padded(octets, b"\0"))]
