"""The messages of a push stream on the wire (`PushRequest` of `protos/uplink.proto`). The two shapes that
carry data sets, a group of whole objects and a chunk, are written and read here by hand: protobuf copies each
data set three times on its way out and twice on its way in, and counts a message's bytes by encoding it once
more, which together were a fifth of what replication cost both sides. What has not exactly the usual shape is
read by protobuf, so that there is one meaning of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio

from archive.packs.storage import Buffer
from protos import uplink_pb2

PUSH = "/miss.v1.Uplink/Push"
OBJECTS_MAX = 1_024  # in a group; a node sends 128
PACKED_OBJECTS = 128  # at most in a compressed group that does not say how many

# A field of bytes begins with its number and the wire type 2, then the length as a varint.
_CHUNK, _GROUP = 2 << 3 | 2, 4 << 3 | 2
_OBJECT = 1 << 3 | 2
_BEGIN, _DATASET, _DIGEST = 1 << 3 | 2, 2 << 3 | 2, 3 << 3 | 2


@dataclass(frozen=True, slots=True)
class Whole:
    """A small object: a `PushWhole` whose data set lies in the message that it came in."""

    begin: uplink_pb2.PushBegin
    dataset: Buffer
    digest: bytes


@dataclass(frozen=True, slots=True)
class Group:
    """A `PushGroup` of so many bytes in all."""

    objects: Sequence[Whole]
    octets: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """More of a large object's data set."""

    data: Buffer


PushMessage: TypeAlias = Group | Chunk | uplink_pb2.PushRequest


# Written.


def group(objects: bytes) -> bytes:
    """The message of what `group_body` made."""
    return b"".join((_field(_GROUP, len(objects)), objects))


def group_body(wholes: Sequence[tuple[uplink_pb2.PushBegin, Sequence[bytes], bytes]]) -> bytes:
    """A `PushGroup` of these: the begin, the pieces of the data set, the digest."""
    parts: list[bytes] = []
    for begin, pieces, digest in wholes:
        head = begin.SerializeToString()
        before = _field(_BEGIN, len(head)) + head + _field(_DATASET, sum(map(len, pieces)))
        after = _field(_DIGEST, len(digest)) + digest
        size = len(before) + sum(map(len, pieces)) + len(after)
        parts += (_field(_OBJECT, size), before, *pieces, after)
    return b"".join(parts)


def chunk(data: bytes) -> bytes:
    return b"".join((_field(_CHUNK, len(data)), data))


def other(**field: Any) -> bytes:
    """Any other message, by its one field."""
    return uplink_pb2.PushRequest(**field).SerializeToString()


def _field(tag: int, size: int) -> bytes:
    out = bytearray((tag,))
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)


# Read.


def read(data: bytes) -> PushMessage:
    """The message; its data sets stay where they are. Raises DecodeError."""
    if data and data[0] == _CHUNK:
        at, size = _size(data, 1)
        if at + size == len(data):
            return Chunk(memoryview(data)[at:])
    elif data and data[0] == _GROUP:
        at, size = _size(data, 1)
        if at + size == len(data) and (objects := read_group(data, at)) is not None:
            return Group(objects, len(data))
    return uplink_pb2.PushRequest.FromString(data)


def read_group(data: bytes, at: int = 0) -> list[Whole] | None:
    """The objects of a `PushGroup` that fills the data from `at` on; None when it has another shape than it
    is written with here, more objects than it may have, or is none."""
    view = memoryview(data)
    objects: list[Whole] = []
    end = len(data)
    while at < end:
        over, *places = _whole(data, at, end)
        if not over or len(objects) >= OBJECTS_MAX:  # a million empty ones would take 14 s to read here
            return None
        begin, dataset, digest = (view[first:last] for first, last in places)
        objects.append(Whole(uplink_pb2.PushBegin.FromString(bytes(begin)), dataset, bytes(digest)))
        at = over
    return objects


def _whole(data: bytes, at: int, end: int) -> tuple[int, *tuple[tuple[int, int], ...]]:
    """Where the object that begins at `at` is over, and where its three fields lie; 0 when it has others."""
    places: list[tuple[int, int]] = []
    if data[at] != _OBJECT:
        return (0,)
    at, size = _size(data, at + 1)
    over = at + size
    if over > end:
        return (0,)
    for tag in (_BEGIN, _DATASET, _DIGEST):
        if at >= over or data[at] != tag:
            return (0,)
        at, size = _size(data, at + 1)
        places.append((at, at + size))
        at += size
    return (over, *places) if at == over else (0,)


def _size(data: bytes, at: int) -> tuple[int, int]:
    """Where the varint at `at` is over, and what it says; beyond any message where there is none."""
    size = shift = 0
    for byte in data[at : at + 5]:
        at += 1
        size |= (byte & 0x7F) << shift
        if byte < 0x80:
            return at, size
        shift += 7
    return at, 1 << 62


# The call.


def push_method(channel: grpc.aio.Channel) -> Callable[[], Any]:
    """Begins a push stream on this channel, whose messages are given as they go on the wire."""
    method: Callable[[], Any] = channel.stream_stream(
        PUSH, request_serializer=None, response_deserializer=uplink_pb2.PushReply.FromString
    )
    return method


def push_handler(push: Callable[[Any, Any], Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """The call as a hub serves it: `push` gets each message as `read` has it."""
    return grpc.stream_stream_rpc_method_handler(
        push, request_deserializer=read, response_serializer=uplink_pb2.PushReply.SerializeToString
    )
