"""A storage in memory that fails as disks do. What was written and what is durable are kept apart by pages
of 4 KiB: at `power_loss` every page that was not synced is kept or dropped by a coin, and so is every name
that was not. A sync that fails leaves the pages clean, as Linux does: the next sync succeeds and they are
lost all the same."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Sequence

from archive.packs.storage import Buffer, Capabilities

PAGE = 4096


class Blob:
    """The bytes of one object, as written and as they would survive."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.durable = bytearray()
        self.dirty: set[int] = set()
        self.size_dirty = False

    def write(self, data: bytes, offset: int) -> None:
        end = offset + len(data)
        if end > len(self.written):
            self.written.extend(bytes(end - len(self.written)))
            self.size_dirty = True
        self.written[offset:end] = data
        self.dirty.update(range(offset // PAGE, (end + PAGE - 1) // PAGE))

    def truncate(self, size: int) -> None:
        if size < len(self.written):
            del self.written[size:]
        else:
            self.written.extend(bytes(size - len(self.written)))
        self.size_dirty = True
        if size % PAGE:
            self.dirty.add(size // PAGE)

    def sync(self) -> None:
        self.durable = bytearray(self.written)
        self.dirty.clear()
        self.size_dirty = False

    def lose(self, keep: Callable[[], bool]) -> None:
        """What the disk holds after the power went."""
        size = len(self.written) if not self.size_dirty or keep() else len(self.durable)
        after = bytearray(size)
        kept = min(size, len(self.durable))
        after[:kept] = self.durable[:kept]
        for page in sorted(self.dirty):
            if keep():
                start = page * PAGE
                data = self.written[start : min(start + PAGE, size)]
                after[start : start + len(data)] = data
        self.written = after
        self.sync()


class FaultyFile:
    def __init__(self, storage: FaultyStorage, name: str, blob: Blob) -> None:
        self._storage = storage
        self._name = name
        self._blob = blob

    @property
    def name(self) -> str:
        return self._name

    def pwritev(self, views: Sequence[Buffer], offset: int, *, direct: bool = False) -> None:
        data = b"".join(bytes(view) for view in views)
        with self._storage.lock:
            room = self._storage.room(self._blob, offset + len(data))
            if self._storage.write_error:
                error, self._storage.write_error = self._storage.write_error, 0
                self._blob.write(data[: len(data) // 2], offset)
                raise OSError(error, "write")
            if room < len(data):
                self._blob.write(data[: max(room, 0)], offset)
                raise OSError(errno.ENOSPC, "write")
            self._blob.write(data, offset)

    def read(self, offset: int, length: int) -> bytes:
        with self._storage.lock:
            return bytes(self._blob.written[offset : offset + length])

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        done = 0
        for view in views:
            data = self.read(offset + done, len(view))
            view[: len(data)] = data
            done += len(data)
        return done

    def map(self) -> Buffer:
        return self.read(0, self.size())

    def fdatasync(self) -> None:
        before = self._storage.before_sync
        if before is not None:
            before(self._name)
        with self._storage.lock:
            self._storage.syncs += 1
            if self._storage.fail_syncs:
                self._storage.fail_syncs -= 1
                self._blob.dirty.clear()
                self._blob.size_dirty = False
                raise OSError(errno.EIO, "fdatasync")
            # Pages that a failed sync lost stay lost: only what is dirty now becomes durable.
            blob = self._blob
            size = len(blob.written)
            if len(blob.durable) > size:
                del blob.durable[size:]
            blob.durable.extend(bytes(size - len(blob.durable)))
            for page in blob.dirty:
                start = page * PAGE
                data = blob.written[start : start + PAGE]
                blob.durable[start : start + len(data)] = data
            blob.dirty.clear()
            blob.size_dirty = False

    def truncate(self, size: int) -> None:
        with self._storage.lock:
            self._blob.truncate(size)

    def punch(self, offset: int, length: int) -> None:
        if not self._storage.punch_holes:
            raise OSError(errno.EOPNOTSUPP, "punch")
        assert offset % PAGE == 0 and length % PAGE == 0 and offset + length <= self.size()
        with self._storage.lock:
            self._blob.write(bytes(length), offset)

    def is_hole(self, start: int, end: int) -> bool:
        return end > start and not any(self._blob.written[start:end])

    def size(self) -> int:
        return len(self._blob.written)

    def close(self) -> None:
        return None


class FaultyStorage:
    """See the module. `capacity` bounds the bytes of all objects together."""

    def __init__(self, capacity: int = 1 << 40, *, punch_holes: bool = False) -> None:
        self.lock = threading.RLock()
        self.capacity = capacity
        self.punch_holes = punch_holes
        self.fail_syncs = 0
        self.write_error = 0
        self.syncs = 0
        self.before_sync: Callable[[str], None] | None = None
        self._names: dict[str, Blob] = {}
        self._durable_names: dict[str, Blob] = {}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(append=True, punch_holes=self.punch_holes, object_lock=False)

    def room(self, blob: Blob, end: int) -> int:
        used = sum(len(each.written) for each in set(self._names.values()) if each is not blob)
        free = self.capacity - used
        start = len(blob.written)
        return free - start if end > start else end  # bytes that still fit from the object's end on

    def create(self, name: str) -> FaultyFile:
        with self.lock:
            if name in self._names:
                raise FileExistsError(name)
            if sum(len(each.written) for each in self._names.values()) >= self.capacity:
                raise OSError(errno.ENOSPC, "create")
            blob = self._names[name] = Blob()
            return FaultyFile(self, name, blob)

    def open(self, name: str, *, write: bool = False) -> FaultyFile:
        with self.lock:
            if name not in self._names:
                raise FileNotFoundError(name)
            return FaultyFile(self, name, self._names[name])

    def reader(self, name: str) -> FaultyFile:
        return self.open(name)

    def size(self, name: str) -> int:
        return self.open(name).size()

    def allocated(self, name: str) -> int:
        return self.size(name)

    def list(self, folder: str) -> list[str]:
        return sorted(name for name in self._names if name.startswith(f"{folder}/"))

    def rename(self, name: str, new_name: str) -> None:
        with self.lock:
            if name not in self._names:
                raise FileNotFoundError(name)
            self._names[new_name] = self._names.pop(name)

    def delete(self, name: str) -> None:
        with self.lock:
            if name not in self._names:
                raise FileNotFoundError(name)
            del self._names[name]

    def sync_directory(self, folder: str) -> None:
        with self.lock:
            mine = {name: blob for name, blob in self._names.items() if name.startswith(f"{folder}/")}
            others = {n: blob for n, blob in self._durable_names.items() if not n.startswith(f"{folder}/")}
            self._durable_names = others | mine

    def free_bytes(self) -> int:
        return self.capacity - sum(len(each.written) for each in self._names.values())

    def close(self) -> None:
        return None

    # What tests do to it

    def flip(self, name: str, offset: int, mask: int = 0xFF) -> None:
        """Rot: one byte of an object changes on the disk."""
        blob = self._names[name]
        blob.written[offset] ^= mask
        blob.durable[offset] ^= mask

    def power_loss(self, chance: random.Random) -> FaultyStorage:
        """The same disk after the power went: what was not synced is there or not, page by page, name by
        name."""

        def keep() -> bool:
            return chance.random() < 0.5

        after = FaultyStorage(self.capacity, punch_holes=self.punch_holes)
        with self.lock:
            # A name changes as one: an object is found under its old name or its new one, or, new, perhaps
            # not.
            blobs = {id(blob): blob for blob in (*self._durable_names.values(), *self._names.values())}
            names: dict[str, Blob] = {}
            for blob in blobs.values():
                now = {name for name, each in self._names.items() if each is blob}
                synced = {name for name, each in self._durable_names.items() if each is blob}
                names |= dict.fromkeys(now if now == synced or keep() else synced, blob)
            copies: dict[int, Blob] = {}
            for name in sorted(names):
                blob = names[name]
                if id(blob) not in copies:
                    copy = Blob()
                    copy.written, copy.durable = bytearray(blob.written), bytearray(blob.durable)
                    copy.dirty, copy.size_dirty = set(blob.dirty), blob.size_dirty
                    copy.lose(keep)
                    copies[id(blob)] = copy
                after._names[name] = copies[id(blob)]
        after._durable_names = dict(after._names)
        return after

    def kill(self) -> FaultyStorage:
        """The same disk after a kill -9: the page cache is whole, what was not synced may still be lost
        later."""
        after = FaultyStorage(self.capacity, punch_holes=self.punch_holes)
        after._names, after._durable_names = dict(self._names), dict(self._durable_names)
        return after
