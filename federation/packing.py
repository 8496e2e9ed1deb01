"""What is pushed, as messages: small objects whole, many in one, larger ones in chunks, compressed or not.
Reads the archive, so it runs in a pool; it decides nothing but whether a message got smaller."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from archive.archive import Archive
from archive.errors import MissError
from archive.model import PendingInstance
from federation import push_wire, serde
from federation.codec import PLAIN_SYNTAXES, deflated
from federation.reading import CHUNK_BYTES, raise_if_passing, read_chunks
from protos import uplink_pb2

log = logging.getLogger(__name__)

PROBE_BYTES = 256 << 10
PROBE_LEVEL = 1
SMALLER = 0.95  # of itself: else a message goes as it is

_Whole = tuple[uplink_pb2.PushBegin, list[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Squeezed:
    """What compressing cost and brought."""

    level: int
    data: int
    made: int
    took_s: float


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message as it goes on the wire, the bytes of data sets in it, and what was learnt of compressing
    them."""

    message: bytes
    data: int
    squeezed: Squeezed | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """Messages of whole objects, and those of them that can't be read here."""

    parcels: list[Parcel]
    unreadable: list[PendingInstance]


class Packing:
    """Makes the messages of one archive. Any thread may call it."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def group(self, rows: Sequence[PendingInstance], *, level: int = 0, probe: bool = False) -> Packed:
        """The objects whole. What is compressed in itself travels apart where the others are compressed."""
        plain: list[_Whole] = []
        others: list[_Whole] = []
        unreadable = []
        for row in rows:
            try:
                pieces = list(self._chunks(row, 0, CHUNK_BYTES))
            except (MissError, OSError) as error:
                raise_if_passing(error)
                log.warning("an instance can't be read: %s", error)
                unreadable.append(row)
                continue
            group = plain if not level or is_plain(row) else others
            group.append((begin_of(row), pieces, row.digest))
        parcels = [_group(plain, level, probe and all(map(is_plain, rows)))] if plain else []
        parcels += [_group(others, 0, False)] if others else []
        return Packed(parcels, unreadable)

    def chunks(self, row: PendingInstance, offset: int, chunk_bytes: int) -> Iterator[bytes]:
        """The data set from `offset` on. Raises what reading it raises."""
        return self._chunks(row, offset, chunk_bytes)

    def is_sound(self, row: PendingInstance) -> bool:
        """Whether its bytes here match their digest. Raises when that can't be said now."""
        digest = hashlib.sha256()
        try:
            for chunk in self._chunks(row, 0, CHUNK_BYTES):
                digest.update(chunk)
        except (MissError, OSError) as error:
            raise_if_passing(error)
            return False
        return digest.digest() == row.digest

    def _chunks(self, row: PendingInstance, offset: int, chunk_bytes: int) -> Iterator[bytes]:
        uid = row.head.sop_instance_uid
        return read_chunks(
            self._archive, uid, row.digest, row.location, offset=offset, chunk_bytes=chunk_bytes
        )


def next_chunk(chunks: Iterator[bytes], level: int, probe: bool) -> Parcel | None:
    """The next chunk as a message; None at the end."""
    chunk = next(chunks, None)
    if chunk is None:
        return None
    squeezed, made = _squeeze(chunk, level, probe)
    if made is not None:
        return Parcel(push_wire.other(zstd_chunk=made), len(chunk), squeezed)
    return Parcel(push_wire.chunk(chunk), len(chunk), squeezed)


def is_plain(row: PendingInstance) -> bool:
    """Whether compressing it may bring anything."""
    return row.head.transfer_syntax_uid in PLAIN_SYNTAXES


def begin_of(row: PendingInstance, *, offset: int = 0, resumable: bool = False) -> uplink_pb2.PushBegin:
    return uplink_pb2.PushBegin(
        head=serde.head_to(row.head), size=row.dataset_bytes, conflict=row.conflict,
        accepted_us=row.accepted_us, offset=offset, digest=row.digest if resumable else b"",
    )  # fmt: skip


def _group(wholes: Sequence[_Whole], level: int, probe: bool) -> Parcel:
    data = sum(sum(map(len, pieces)) for _, pieces, _ in wholes)
    body = push_wire.group_body(wholes)
    squeezed, made = _squeeze(body, level, probe)
    if made is not None:
        return Parcel(push_wire.other(zstd_group=made, packed_objects=len(wholes)), data, squeezed)
    return Parcel(push_wire.group(body), data, squeezed)


def _squeeze(data: bytes, level: int, probe: bool) -> tuple[Squeezed | None, bytes | None]:
    """What compressing taught, and the frame when it is to be sent."""
    if not level and not probe:
        return None, None
    begun_s = time.perf_counter()
    made = deflated(data if level else data[:PROBE_BYTES], level or PROBE_LEVEL)
    size = len(data) if level else min(len(data), PROBE_BYTES)
    squeezed = Squeezed(level or PROBE_LEVEL, size, len(made), time.perf_counter() - begun_s)
    return squeezed, made if level and len(made) < SMALLER * len(data) else None
