"""Owns what is kept of large objects whose sender was cut off, so that it can go on where it was and need not
begin again. What is kept was promised to nobody: it goes when it is old, when it is too much, and when the
disk has no room for what is whole.

Of each there is its pack as it was being written (`large/*.part`) and a note of whose it is: the sender's
name for it (ward, UID, digest of the whole). The note is written when the object begins, so that it is found
too after a crash. What is on the disk then need not be what was sent; the digest over the whole, taken again
when the object goes on, judges it like any other bytes.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from archive.errors import MissError, Unavailable
from archive.packs import large
from archive.packs.large import OwnPack, Suspended
from archive.packs.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "partial"
KEPT_BYTES_MIN = 1 << 20  # less is sent again sooner than it is looked after
_NOTE_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class PartialKey:
    """How a sender names an object before all of it has come: nobody else can ask for it or go on with it."""

    ward: str
    uid: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class PartialLimits:
    """The bounds of what is kept, of one ward and in all."""

    objects_max: int = 256
    ward_objects_max: int = 16
    bytes_max: int = 64 << 30
    ward_bytes_max: int = 16 << 30
    age_s_max: float = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Kept:
    """One object of which a beginning is here."""

    key: PartialKey
    pack: str
    bytes: int
    at_us: int
    suspended: Suspended = field(compare=False, repr=False)


def surplus(kept: Iterable[Kept], limits: PartialLimits, now_us: int) -> list[Kept]:
    """Which of these have to go: what is past its age, then the oldest of a ward with too much, then the
    oldest."""
    gone: list[Kept] = []
    stay: list[Kept] = []
    objects: Counter[str] = Counter()
    size: Counter[str] = Counter()
    total = 0
    for one in sorted(kept, key=lambda one: (-one.at_us, one.pack)):
        ward = one.key.ward
        fits = (
            now_us - one.at_us <= limits.age_s_max * 1e6
            and len(stay) < limits.objects_max
            and total + one.bytes <= limits.bytes_max
            and objects[ward] < limits.ward_objects_max
            and size[ward] + one.bytes <= limits.ward_bytes_max
        )
        if not fits:
            gone.append(one)
            continue
        stay.append(one)
        total += one.bytes
        objects[ward] += 1
        size[ward] += one.bytes
    return gone


class Partials:
    """See the module's docstring. Any thread may call it."""

    def __init__(
        self,
        storage: Storage,
        limits: PartialLimits,
        clock: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._storage = storage
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[PartialKey, Kept] = {}

    @property
    def bytes(self) -> int:
        """What all of it takes of the disk."""
        with self._lock:
            return sum(one.bytes for one in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def adopt(self, notes: dict[str, tuple[PartialKey, int, int]]) -> None:
        """What an earlier life of this process left, by its notes."""
        begun = set(self._storage.list(large.FOLDER))
        for pack, (key, size, at_us) in notes.items():
            found = 0
            if large.part_name(pack) in begun:
                found = min(size, large.begun_bytes(self._storage, pack))
                if found < KEPT_BYTES_MIN or key in self._kept:
                    large.discard(self._storage, pack)
                    found = 0
            if not found:
                self._drop_note(pack)
                continue
            self._kept[key] = Kept(key, pack, found, at_us, Suspended(pack, found, None))
        if self._kept:
            log.info("%d large objects that were cut off can be gone on with", len(self._kept))
        self.trim()

    def note(self, key: PartialKey, pack: str, size: int) -> None:
        """An object begins. Where its note can't be written it will not survive a crash, that is all."""
        try:
            file = self._storage.create(_note_name(pack))
            try:
                file.pwritev([_encode(key, size, self._clock())], 0)
            finally:
                file.close()
        except OSError as error:
            log.warning("no note of an object that begins: errno %s", error.errno)

    def over(self, pack: str) -> None:
        """An object is whole, or given up."""
        self._drop_note(pack)

    def keep(self, key: PartialKey, own: OwnPack) -> int:
        """The sender was cut off: what came of it stays, how much that is. Nothing stays of little, or where
        it can't be made durable."""
        if own.dataset_bytes < KEPT_BYTES_MIN:
            own.abort()
            self._drop_note(own.name)
            return 0
        try:
            suspended = own.suspend()
        except MissError as error:
            log.warning("an object that was cut off is not kept: %s", error)
            self._drop_note(own.name)
            return 0
        one = Kept(key, suspended.pack, suspended.dataset_bytes, self._clock(), suspended)
        with self._lock:
            before, self._kept[key] = self._kept.get(key), one
        if before is not None:
            self._discard(before)
        self.trim()
        return self.have(key)

    def have(self, key: PartialKey) -> int:
        """How many bytes of this object are here."""
        with self._lock:
            one = self._kept.get(key)
        return 0 if one is None else one.bytes

    def take(self, key: PartialKey, offset: int) -> Suspended:
        """What is here of an object that goes on at `offset`; it is its taker's from now on. Raises
        Unavailable when that is not what is here."""
        with self._lock:
            one = self._kept.get(key)
            if one is None or one.bytes != offset:
                raise Unavailable("what was here of this object is gone: it has to be offered again")
            del self._kept[key]
        return one.suspended

    def forget(self, key: PartialKey) -> None:
        """The object begins anew."""
        with self._lock:
            one = self._kept.pop(key, None)
        if one is not None:
            self._discard(one)

    def trim(self) -> None:
        """Keep within the bounds."""
        with self._lock:
            gone = surplus(self._kept.values(), self._limits, self._clock())
            for one in gone:
                del self._kept[one.key]
        self._discard_all(gone)

    def make_room(self, size: int) -> bool:
        """The disk has too little for what comes: the oldest go, until `size` bytes are given back. Whether
        any went."""
        gone: list[Kept] = []
        with self._lock:
            for one in sorted(self._kept.values(), key=lambda one: one.at_us):
                if sum(other.bytes for other in gone) >= size:
                    break
                gone.append(one)
                del self._kept[one.key]
        self._discard_all(gone)
        return bool(gone)

    def _discard_all(self, gone: Sequence[Kept]) -> None:
        for one in gone:
            log.info("%d bytes of an object that was cut off are given up", one.bytes)
            self._discard(one)

    def _discard(self, one: Kept) -> None:
        large.discard(self._storage, one.pack)
        self._drop_note(one.pack)

    def _drop_note(self, pack: str) -> None:
        try:
            self._storage.delete(_note_name(pack))
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("the note of an object can't be removed: errno %s", error.errno)


def read_notes(storage: Storage) -> dict[str, tuple[PartialKey, int, int]]:
    """By pack: whose it is, how large the whole will be, and when it began. A note that can't be read counts
    for none."""
    notes = {}
    for name in storage.list(FOLDER):
        try:
            found = json.loads(storage.reader(name).read(0, _NOTE_BYTES_MAX))
            key = PartialKey(str(found["ward"]), str(found["uid"]), bytes.fromhex(found["digest"]))
            notes[_pack_of(name)] = key, int(found["size"]), int(found["at_us"])
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s can't be read and is removed", name)
            storage.delete(name)
    return notes


def _encode(key: PartialKey, size: int, at_us: int) -> bytes:
    return json.dumps(
        {"ward": key.ward, "uid": key.uid, "digest": key.digest.hex(), "size": size, "at_us": at_us}
    ).encode()


def _note_name(pack: str) -> str:
    return f"{FOLDER}/{pack.removeprefix(large.FOLDER + '/').removesuffix('.pack')}.json"


def _pack_of(note: str) -> str:
    return f"{large.FOLDER}/{note.removeprefix(FOLDER + '/').removesuffix('.json')}.pack"
