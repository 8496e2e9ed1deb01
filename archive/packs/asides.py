"""What recovery kept aside, within bounds of bytes and of age: the oldest goes first. What may belong to a
record that was promised never goes by itself: a person looks at it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

from archive.packs.logfiles import KEPT, SET_ASIDE
from archive.packs.records import FILE_HEADER_BYTES, FileHeader
from archive.packs.storage import Storage

log = logging.getLogger(__name__)

_AT = re.compile(r"-(\d{18,20})\.[a-z.]+$", re.ASCII)  # nanoseconds since 1970, in recovery's names


@dataclass(frozen=True, slots=True)
class Aside:
    """A file that was kept aside. `at_us` is when, or when its object was begun, 0 when neither is known."""

    name: str
    bytes: int
    at_us: int

    @property
    def stays(self) -> bool:
        return self.name.endswith(KEPT)


def asides(storage: Storage) -> list[Aside]:
    """What lies there, the oldest first."""
    return sorted(_listed(storage), key=lambda aside: (aside.at_us, aside.name))


def trim(storage: Storage, *, bytes_max: int, age_s_max: float, now_us: int) -> list[Aside]:
    """Remove what is past its age, then the oldest until the others fit; what went."""
    found = asides(storage)
    left = sum(aside.bytes for aside in found)
    gone = []
    for aside in found:
        old = now_us - aside.at_us > age_s_max * 1e6
        if aside.stays or not (old or left > bytes_max):
            continue
        storage.delete(aside.name)
        left -= aside.bytes
        gone.append(aside)
        log.warning("%s is removed, %d bytes that nobody was promised: %s", aside.name, aside.bytes,
                    "it is past its age" if old else "what is kept aside takes too much")  # fmt: skip
    if gone:
        storage.sync_directory(SET_ASIDE)
    return gone


def _listed(storage: Storage) -> Iterator[Aside]:
    for name in storage.list(SET_ASIDE):
        try:
            found = _AT.search(name)
            at_us = int(found.group(1)) // 1000 if found else 0
            if not found:  # an object of an older release: its header says when it was begun
                header = FileHeader.decode(storage.reader(name).read(0, FILE_HEADER_BYTES))
                at_us = header.created_us if header is not None else 0
            yield Aside(name, storage.size(name), at_us)
        except FileNotFoundError:
            continue
