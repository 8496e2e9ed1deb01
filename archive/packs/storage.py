"""Where bytes lie: append-only objects under names that MISS made itself. The one place that touches the
file system for packs, facts and what was set aside. It knows nothing of records, and takes no name from
outside: a name is `folder/object` in a small alphabet, checked at this door again, since a location also
comes out of a database.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from archive.errors import NotFound
from archive.packs import holes

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview | mmap.mmap

_NAME = re.compile(r"[a-z][a-z0-9-]*/[a-z0-9][a-z0-9-]*(\.[a-z0-9-]+)+", re.ASCII)
_HANDLES_MAX = 128  # open for reading at once; the oldest is closed when nobody reads from it any more
_NOT_OPENED, _CANNOT = -1, -2  # in place of a descriptor
_VIEWS_MAX = 512  # of one pwritev; Linux takes 1,024 (IOV_MAX)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a storage can do beyond writing whole objects and reading ranges of them."""

    append: bool
    punch_holes: bool
    object_lock: bool


class AppendFile(Protocol):
    """One object that is being written, or read from. Offsets are absolute; nothing here keeps a cursor."""

    @property
    def name(self) -> str: ...

    def pwritev(self, views: Sequence[Buffer], offset: int, *, direct: bool = False) -> None:
        """Write all of `views` from `offset` on, or raise OSError (some of it may have been written).
        `direct` says that they are one view of whole pages, in memory and in the object: nothing need be
        copied or cached for them."""

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the object."""

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill the reader's own memory, at most 1,024 views of it; how many bytes, fewer than fit where the
        object ends or for no reason."""

    def map(self) -> Buffer:
        """The whole object as it is now. Only for objects that do not shrink meanwhile."""

    def fdatasync(self) -> None:
        """What was written is durable, and so is the size, when this returns."""

    def truncate(self, size: int) -> None: ...

    def punch(self, offset: int, length: int) -> None:
        """Give whole blocks back: they read as zeros from then on. OSError where that is not possible."""

    def is_hole(self, start: int, end: int) -> bool:
        """Whether everything between two places was given back."""

    def size(self) -> int: ...

    def close(self) -> None: ...


class Storage(Protocol):
    """A place for objects. Folders are one level deep and appear with their first object."""

    @property
    def capabilities(self) -> Capabilities: ...

    def create(self, name: str) -> AppendFile:
        """A new empty object; FileExistsError when there is one. Durable after `sync_directory`."""

    def open(self, name: str, *, write: bool = False) -> AppendFile:
        """An object that exists; FileNotFoundError when it does not."""

    def reader(self, name: str) -> AppendFile:
        """A shared handle for reading, not to be closed; it stays usable for its holder when the object
        goes."""

    def size(self, name: str) -> int: ...

    def allocated(self, name: str) -> int:
        """What an object takes of the disk: less than its size where holes were punched."""

    def list(self, folder: str) -> list[str]:
        """The names in a folder, sorted; none when there is no such folder."""

    def rename(self, name: str, new_name: str) -> None: ...

    def delete(self, name: str) -> None: ...

    def sync_directory(self, folder: str) -> None: ...

    def free_bytes(self) -> int: ...

    def close(self) -> None: ...


def _open_direct(fd: int) -> int:
    """The same file, opened to be written past the page cache; not every file system takes that."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):  # no O_DIRECT on this system at all
        return _CANNOT


class FileHandle:
    """An open file. Closed when it is told to be, or when nobody refers to it any more."""

    __slots__ = ("_closing", "_direct_fd", "_fd", "_name")

    def __init__(self, name: str, fd: int) -> None:
        self._name = name
        self._fd = fd
        self._direct_fd = _NOT_OPENED
        self._closing = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    def pwritev(self, views: Sequence[Buffer], offset: int, *, direct: bool = False) -> None:
        if direct and self._write_direct(views[0], offset):
            return
        total = sum(len(view) for view in views)
        written = os.pwritev(self._fd, views[:_VIEWS_MAX], offset)
        if written != total:
            self._write_rest(views, offset, written)

    def _write_direct(self, view: Buffer, offset: int) -> bool:
        """Past the page cache. False where the file system can't, and nothing was written then."""
        with self._closing:
            if self._direct_fd == _NOT_OPENED:
                self._direct_fd = _open_direct(self._fd)
        if self._direct_fd < 0:
            return False
        try:
            written = os.pwrite(self._direct_fd, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with self._closing:
                os.close(self._direct_fd)
                self._direct_fd = _CANNOT
            return False
        if written < len(view):
            self._write_rest([view], offset, written)
        return True

    def _write_rest(self, views: Sequence[Buffer], offset: int, written: int) -> None:
        """A short write is rare (a full disk, a signal): go on from where it stopped until all is there or
        it fails."""
        for view in views:
            if written >= len(view):
                written -= len(view)
                offset += len(view)
                continue
            with memoryview(view) as whole:
                while written < len(whole):
                    written += os.pwrite(self._fd, whole[written:], offset + written)
            offset += len(view)
            written = 0

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) == length or not data:
            return data
        parts = [data]
        read = len(data)
        while read < length and (data := os.pread(self._fd, length - read, offset + read)):
            parts.append(data)
            read += len(data)
        return b"".join(parts)

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        return os.preadv(self._fd, views, offset)

    def map(self) -> Buffer:
        if not self.size():
            return b""
        mapped = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        # Who reads the heads of a thousand fragments touches a thousand pages, not what lies around them.
        mapped.madvise(mmap.MADV_RANDOM)
        return mapped

    def fdatasync(self) -> None:
        os.fdatasync(self._fd)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def punch(self, offset: int, length: int) -> None:
        holes.punch(self._fd, offset, length)

    def is_hole(self, start: int, end: int) -> bool:
        return holes.is_hole(self._fd, start, end)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        with self._closing:
            open_fds = [fd for fd in (self._fd, self._direct_fd) if fd >= 0]
            self._fd, self._direct_fd = -1, _CANNOT
        for fd in open_fds:
            os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.close()


class FileStorage:
    """Objects as files below one folder of a local file system."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._handles: OrderedDict[str, FileHandle] = OrderedDict()
        self._handles_lock = threading.Lock()
        self._folders: set[Path] = set()  # whose names are on the disk, as far as this process knows

    @cached_property
    def capabilities(self) -> Capabilities:
        return Capabilities(append=True, punch_holes=holes.can_punch(self._root), object_lock=False)

    def create(self, name: str) -> FileHandle:
        path = self._path(name)
        self._make_folder(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        log.debug("created %s", name)
        return FileHandle(name, fd)

    def open(self, name: str, *, write: bool = False) -> FileHandle:
        flags = os.O_RDWR if write else os.O_RDONLY
        return FileHandle(name, os.open(self._path(name), flags | os.O_CLOEXEC))

    def reader(self, name: str) -> FileHandle:
        with self._handles_lock:
            found = self._handles.get(name)
            if found is not None:
                self._handles.move_to_end(name)
                return found
        opened = self.open(name)
        with self._handles_lock:
            found = self._handles.setdefault(name, opened)
            if len(self._handles) > _HANDLES_MAX:
                self._handles.popitem(last=False)
        return found

    def size(self, name: str) -> int:
        return self._path(name).stat().st_size

    def allocated(self, name: str) -> int:
        return self._path(name).stat().st_blocks * 512

    def list(self, folder: str) -> list[str]:
        try:
            with os.scandir(self._root / folder) as entries:
                names = [f"{folder}/{entry.name}" for entry in entries]
        except FileNotFoundError:
            return []
        return sorted(name for name in names if _NAME.fullmatch(name))

    def rename(self, name: str, new_name: str) -> None:
        target = self._path(new_name)
        self._make_folder(target.parent)
        self._path(name).rename(target)
        self._forget(name)
        log.debug("renamed %s to %s", name, new_name)

    def delete(self, name: str) -> None:
        self._path(name).unlink()
        self._forget(name)
        log.debug("deleted %s", name)

    def sync_directory(self, folder: str) -> None:
        _sync_directory(self._root / folder)

    def free_bytes(self) -> int:
        stat = os.statvfs(self._root)
        return stat.f_bavail * stat.f_frsize

    def close(self) -> None:
        with self._handles_lock:
            self._handles.clear()

    def _make_folder(self, folder: Path) -> None:
        """One that is there is synced as well, once: its maker may have ended before it could."""
        if folder in self._folders and folder.is_dir():
            return
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        _sync_directory(self._root)
        self._folders.add(folder)

    def _forget(self, name: str) -> None:
        with self._handles_lock:
            self._handles.pop(name, None)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise NotFound("no such object in this storage")
        return self._root / name


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
