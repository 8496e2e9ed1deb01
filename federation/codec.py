"""zstd on the wire, at both of its ends: a chunk or a group as one frame. What comes in is inflated within
the bounds of what it stands for, whatever its frame says. When it is worth it, `compression.py` decides."""

from __future__ import annotations

from collections.abc import Sequence

import zstandard
from google.protobuf.message import DecodeError

from archive.errors import InvalidInput
from federation.push_wire import Whole, read_group
from protos import uplink_pb2

CHUNK_BYTES_MAX = 1 << 20
GROUP_BYTES_MAX = 2 << 20  # the bytes of its objects, with what names them
WINDOW_BYTES_MAX = 8 << 20

# Implicit and explicit little endian, explicit big endian: everything else is compressed in itself.
PLAIN_SYNTAXES = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"})


def size_of(frame: bytes, bytes_max: int) -> int:
    """How many bytes the frame says that it holds, at most `bytes_max`: that many where it says nothing."""
    try:
        said = zstandard.frame_content_size(frame)
    except zstandard.ZstdError:
        return bytes_max
    return said if 0 <= said <= bytes_max else bytes_max


def deflated(data: bytes, level: int) -> bytes:
    """The data as one frame, which says how long they are. In a thread of a pool: it takes a while."""
    return zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True).compress(data)


class Inflating:
    """Inflates what one stream brings; one message at a time."""

    def __init__(self) -> None:
        self._inflate = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)

    def chunk(self, frame: bytes) -> bytes:
        return self._inflated(frame, CHUNK_BYTES_MAX)

    def group(self, frame: bytes) -> Sequence[Whole | uplink_pb2.PushWhole]:
        data = self._inflated(frame, GROUP_BYTES_MAX)
        try:
            found = read_group(data)
            return uplink_pb2.PushGroup.FromString(data).objects if found is None else found
        except DecodeError:
            raise InvalidInput("a compressed group that is none") from None

    def _inflated(self, frame: bytes, bytes_max: int) -> bytes:
        try:
            # Without a length in the frame, or against it, the library's own bound does not hold.
            if not 0 <= zstandard.frame_content_size(frame) <= bytes_max:
                raise InvalidInput("compressed bytes that are too many, or do not say how many they are")
            return self._inflate.decompress(frame, max_output_size=bytes_max, allow_extra_data=False)
        except zstandard.ZstdError:
            raise InvalidInput("compressed bytes that can't be inflated") from None
