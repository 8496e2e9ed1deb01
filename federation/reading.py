"""Data sets on their way out of an archive to another member: found where they lie by now, and read in chunks
of at most 1 MiB. Whoever gets them checks the digest as well. It decides nothing about who may have them."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from archive.archive import Archive
from archive.errors import Corrupt, Evicted, NotFound, Unavailable
from archive.model import ConflictState, InstanceHead, Location

CHUNK_BYTES = 1 << 20
CONTENTS_MAX = 1_000  # kept under one UID, that are looked through

_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Content:
    """One content of a SOP Instance UID, and where it lies."""

    head: InstanceHead
    digest: bytes
    location: Location

    @property
    def size(self) -> int:
        """The bytes of its data set."""
        return self.location.length - self.location.dataset_offset


def find_content(archive: Archive, uid: str, digest: bytes) -> Content | None:
    """The content of this digest, served or kept beside another under its UID; None when it is not here."""
    live = archive.index.live(uid)
    if live is not None and live.digest == digest:
        return Content(live.head, digest, live.location)
    kept = archive.index.conflicts(CONTENTS_MAX, states=list(ConflictState), uid=uid)
    return next((Content(row.head, digest, row.location) for row in kept if row.other_digest == digest), None)


def read_chunks(
    archive: Archive,
    uid: str,
    digest: bytes,
    location: Location,
    *,
    offset: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[bytes]:
    """Its data set without group 2, from where it lies now: since it was found its pack may have gone. Raises
    NotFound, Evicted, Corrupt, OSError."""
    chunks = iter(archive.dataset_chunks(location, offset=offset, chunk_bytes=chunk_bytes))
    try:
        first = next(chunks, b"")
    except (NotFound, Evicted):
        place = archive.index.places([uid]).get((uid, digest))
        if place is None or place.evicted or place.location == location:
            raise
        chunks = iter(archive.dataset_chunks(place.location, offset=offset, chunk_bytes=chunk_bytes))
        first = next(chunks, b"")
    if first:
        yield first
    yield from chunks


def checked_chunks(archive: Archive, uid: str, digest: bytes, location: Location) -> Iterator[bytes]:
    """The same; the last chunk comes only when the whole is what its digest says, else Corrupt is raised."""
    running, held = hashlib.sha256(), b""
    for chunk in read_chunks(archive, uid, digest, location):
        if held:
            yield held
        running.update(chunk)
        held = chunk
    if running.digest() != digest:
        raise Corrupt("a stored instance does not match its digest")
    if held:
        yield held


def raise_if_passing(error: Exception) -> None:
    """What says nothing of the bytes: the index does not answer, or there are no descriptors. Tried again."""
    if isinstance(error, Unavailable) and not isinstance(error, Evicted):
        raise error
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise Unavailable(f"no pack can be opened now (errno {error.errno})") from error
