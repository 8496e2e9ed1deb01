"""Packs: where the instances of an archive lie. Writes a payload behind the others, or into a pack of its
own with a reference behind the others, so that all instances have one order; reads payloads back, as they
came.

A payload is a whole Part 10 stream. It is never changed, and it is found by its `Location` alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from archive.errors import EVICTED, Corrupt, Evicted, NotFound
from archive.model import START, InstanceHead, Location, Position, Record, RecordKind
from archive.packs import holes, large
from archive.packs.images import PagePool, RecordImage
from archive.packs.lanes import Lanes
from archive.packs.large import OwnPack, Suspended
from archive.packs.log import IMAGE_FRAME_BYTES, Log
from archive.packs.logfiles import Appended, Layout, LogLimits
from archive.packs.records import TRAILER_BYTES, Flag, Purpose, Reference, header_bytes, part10_prefix
from archive.packs.recovery import Damage, FoundRecord
from archive.packs.storage import AppendFile, Buffer, Storage

LAYOUT = Layout("packs", "pack", Purpose.PACK)
_READ_WHOLE_BYTES_MAX = 128 << 10
_READ_BUFFER_BYTES = 64 << 10
_DIGEST_PIECE_BYTES = 1 << 20
_LOCATION = re.compile(r"(packs|large)/[0-9a-f]{8,32}\.pack", re.ASCII)


@dataclass(frozen=True, slots=True)
class Written:
    """An instance that was appended; durable once `Packs.wait_durable` has returned for it."""

    appended: Appended
    record: Record


class Packs:
    """The packs of one archive. One process opens them to write; any number read by location."""

    def __init__(self, storage: Storage, records: Log | None, image_bytes_max: int = 0) -> None:
        self.storage = storage
        self._log = records
        self._pool = PagePool(image_bytes_max + IMAGE_FRAME_BYTES)
        self._lanes = Lanes()

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        promised: Position = START,
        limits: LogLimits | None = None,
        image_bytes_max: int = 1 << 20,
        resumable: Container[str] = (),
    ) -> Packs:
        """To write. `promised` is a place that was read from the packs before: everything below it was
        synced. `image_bytes_max` is the largest data set that an image takes; own packs in `resumable` that
        were being written stay to be gone on with."""
        records = Log.open(storage, LAYOUT, promised=promised, limits=limits)
        large.settle_after_crash(storage, records, resumable)
        return cls(storage, records, image_bytes_max)

    @classmethod
    def open_to_read(cls, storage: Storage) -> Packs:
        """To read payloads beside the process that writes."""
        return cls(storage, None)

    @property
    def log(self) -> Log:
        if self._log is None:
            raise io.UnsupportedOperation("these packs are open for reading payloads alone")
        return self._log

    @property
    def writer(self) -> bytes:
        """Who wrote these packs: random, made with the first of them, so it stands for this disk's life."""
        return self.log.writer if self._log is not None else LAYOUT.writer_of(self.storage)

    # Writing

    def append(
        self,
        kind: RecordKind,
        head: InstanceHead,
        dataset: Sequence[Buffer],
        dataset_bytes: int,
        digest: bytes,
    ) -> Written:
        """Put an instance behind the last one."""
        prefix = part10_prefix(head)
        length = len(prefix) + dataset_bytes
        appended = self.log.append(kind, head, [prefix, *dataset], length, prefix=prefix, digest=digest)
        location = Location(appended.log_file.name, appended.payload_offset, length, len(prefix))
        return Written(appended, Record(kind, appended.sequence, head, digest, location, appended.end))

    def begin_image(self, head: InstanceHead) -> RecordImage:
        """Memory for an instance of up to `image_bytes_max`, in which it needs no further copy."""
        return RecordImage(self._pool, header_bytes(head) + len(part10_prefix(head)))

    def append_image(
        self, kind: RecordKind, head: InstanceHead, image: RecordImage, digest: bytes
    ) -> Written:
        """Put an instance behind the last one that has arrived in an image."""
        prefix = part10_prefix(head)
        length = len(prefix) + image.dataset_bytes
        appended = self.log.append_image(kind, head, image, prefix=prefix, digest=digest)
        location = Location(appended.log_file.name, appended.payload_offset, length, len(prefix))
        return Written(appended, Record(kind, appended.sequence, head, digest, location, appended.end))

    def begin_own(self, head: InstanceHead, *, buffered: bool = True) -> OwnPack:
        """A pack for one large instance; it counts once `append_own` has referred to it. `buffered` says that
        it may hold twice LANE_BYTES of memory."""
        records = self.log
        return OwnPack.create(
            self.storage, head, writer=records.writer, begun=records.end, sequence=records.next_sequence,
            lanes=self._lanes if buffered else None,
        )  # fmt: skip

    def reopen_own(self, head: InstanceHead, kept: Suspended, *, buffered: bool = True) -> OwnPack:
        """Go on with one that was suspended. Raises Corrupt when it is not this instance's."""
        lanes = self._lanes if buffered else None
        return OwnPack.reopen(self.storage, head, kept, begun=self.log.end, lanes=lanes)

    def append_reference(self, record: Record) -> Written:
        """Refer once more, behind the last instance, to a pack of its own that an earlier record names."""
        place = record.location
        payload = Reference(place.pack, place.offset, place.length, place.dataset_offset).encode()
        appended = self.log.append(
            record.kind, record.head, [payload], len(payload),
            prefix=payload, digest=record.digest, flags=Flag.REFERENCE,
        )  # fmt: skip
        again = Record(record.kind, appended.sequence, record.head, record.digest, place, appended.end)
        return Written(appended, again)

    def append_own(self, kind: RecordKind, head: InstanceHead, own: OwnPack) -> Written:
        """Refer to a sealed pack of its own behind the last instance."""
        reference, digest = own.reference, own.digest()
        payload = reference.encode()
        appended = self.log.append(
            kind, head, [payload], len(payload), prefix=payload, digest=digest, flags=Flag.REFERENCE
        )
        own.close()
        return Written(
            appended, Record(kind, appended.sequence, head, digest, _location(reference), appended.end)
        )

    def wait_durable(self, written: Written, timeout_s: float = 30.0) -> None:
        self.log.wait_durable(written.appended, timeout_s)
        if written.record.location.pack.startswith(large.FOLDER):
            large.settle(self.storage, written.record.location.pack)

    def on_durable(self, callback: Callable[[], None]) -> None:
        self.log.on_durable(callback)

    def close(self) -> None:
        self._lanes.close()
        if self._log is not None:
            self._log.close()

    # Reading

    def read(
        self, start: Position, stop: Position, *, check_digests: bool = True, gone: Container[int] = ()
    ) -> Iterator[Record | Damage]:
        """The instances between two places, marks left out, and what can't be read between them. The payloads
        of records that end at a place in `gone` were given up: they are not looked at."""
        for item in self.log.read(start, stop, check_digests=check_digests, gone=gone):
            if isinstance(item, Damage):
                yield item
            elif item.header.kind != RecordKind.MARK:
                yield record_of(item)

    def open_payload(self, location: Location) -> BinaryIO:
        """A seekable reader over exactly the payload. Raises NotFound when the pack is gone, Corrupt when
        it is shorter than it was."""
        reader = self._reader(location)
        if location.length <= _READ_WHOLE_BYTES_MAX:
            return io.BytesIO(_read_exactly(reader, location, 0, location.length))
        return io.BufferedReader(_PayloadReader(reader, location), _READ_BUFFER_BYTES)

    def dataset_chunks(
        self, location: Location, *, offset: int = 0, chunk_bytes: int = 1 << 20
    ) -> Iterator[bytes]:
        """The data set's bytes from `offset` on, without what stands before it in the Part 10 stream."""
        reader = self._reader(location)
        place = location.dataset_offset + offset
        while place < location.length:
            chunk = _read_exactly(reader, location, place, min(chunk_bytes, location.length - place))
            yield chunk
            place += len(chunk)

    def open_dataset(self, location: Location) -> StoredDataset:
        """The data set to be read into the reader's own memory. Raises NotFound when the pack is gone,
        Evicted when the bytes were given up."""
        opened = StoredDataset(self._reader(location), location)
        opened.confirm()
        return opened

    @contextlib.contextmanager
    def dataset(self, location: Location) -> Iterator[Buffer]:
        """The data set as one buffer, to read its header: mapped when it is large."""
        reader = self._reader(location)
        start = location.dataset_offset
        if location.length > _READ_WHOLE_BYTES_MAX or location.pack.startswith(large.FOLDER):
            _require_bytes(reader, location)
            whole = memoryview(reader.map())[location.offset + start : location.offset + location.length]
            if len(whole) != location.length - start:
                raise Corrupt("a pack is shorter than it was")
            yield whole
        else:
            yield _read_exactly(reader, location, start, location.length - start)

    def verify(self, head: InstanceHead, digest: bytes, location: Location) -> None:
        """Raises Corrupt unless the stored bytes are those that came."""
        prefix = part10_prefix(head)
        if location.dataset_offset != len(prefix):
            raise Corrupt("a stored instance does not begin as it was written")
        if _read_exactly(self._reader(location), location, 0, len(prefix)) != prefix:
            raise Corrupt("a stored instance does not begin as it was written")
        running = hashlib.sha256()
        for chunk in self.dataset_chunks(location):
            running.update(chunk)
        if running.digest() != digest:
            raise Corrupt("a stored instance does not match its digest")

    def _reader(self, location: Location) -> AppendFile:
        if not _LOCATION.fullmatch(location.pack):
            raise NotFound("no such pack")
        with contextlib.suppress(FileNotFoundError):
            return self.storage.reader(location.pack)
        with contextlib.suppress(FileNotFoundError):
            return self.storage.reader(large.part_name(location.pack))
        try:
            return self.storage.reader(location.pack)  # it got its lasting name between the two
        except FileNotFoundError as error:
            raise NotFound("no such pack") from error


class StoredDataset:
    """A data set where it lies, without what stands before it in the Part 10 stream. It keeps no place: the
    next piece may be read while an earlier one is used. What was read counts once `confirm` was asked."""

    def __init__(self, reader: AppendFile, location: Location) -> None:
        self._reader = reader
        self._location = location
        self._start = location.offset + location.dataset_offset
        self.length = location.length - location.dataset_offset

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill `views` from a place of the data set on, which they do not reach beyond; how many bytes, fewer
        for no reason. Raises Corrupt when the pack can't be read or ends early."""
        try:
            done = self._reader.read_into(views, self._start + offset)
        except OSError as error:
            raise Corrupt(f"a pack can't be read (errno {error.errno})") from error
        if not done:
            raise Corrupt("a pack is shorter than it was")
        return done

    def confirm(self) -> None:
        """Raises Evicted when the bytes were given back: what was read until now may be zeros. Asked after
        the last read and before its bytes are used, it lets none pass."""
        _require_bytes(self._reader, self._location)

    def close(self) -> None:
        """Nothing is held but the pack's shared handle."""


class _PayloadReader(io.RawIOBase):
    """A payload as a file of its own. It keeps its own place: any number may read one pack at once."""

    name = ""  # pydicom asks every buffered file for it

    def __init__(self, reader: AppendFile, location: Location) -> None:
        self._reader = reader
        self._location = location
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._location.length}[whence]
        if base + offset < 0:
            raise ValueError("a place before the beginning")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        length = min(len(buffer), self._location.length - self._place)
        if length <= 0:
            return 0
        memoryview(buffer)[:length] = _read_exactly(self._reader, self._location, self._place, length)
        self._place += length
        return length


def _read_exactly(reader: AppendFile, location: Location, place: int, length: int) -> bytes:
    try:
        data = reader.read(location.offset + place, length)
    except OSError as error:
        raise Corrupt(f"a pack can't be read (errno {error.errno})") from error
    if len(data) != length:
        raise Corrupt("a pack is shorter than it was")
    # Asked after the bytes were read: a hole that came in between is seen, one that comes later does no harm.
    if place + length > location.dataset_offset:
        _require_bytes(reader, location)
    return data


def _require_bytes(reader: AppendFile, location: Location) -> None:
    """Raises Evicted when the data set was given back. File systems that compress keep zeros as holes: there
    the digest behind the payload says whether the zeros are the data set."""
    start, end = holes.span_of(location)
    if not reader.is_hole(start, end):
        return
    running, offset = hashlib.sha256(), location.offset + location.dataset_offset
    stop = location.offset + location.length
    while offset < stop:
        piece = reader.read(offset, min(_DIGEST_PIECE_BYTES, stop - offset))
        if not piece:
            break
        running.update(piece)
        offset += len(piece)
    if running.digest() not in reader.read(stop, TRAILER_BYTES):
        raise Evicted(EVICTED)


def _location(reference: Reference) -> Location:
    return Location(reference.pack, reference.offset, reference.length, reference.dataset_offset)


def record_of(item: FoundRecord) -> Record:
    """A record of a pack as the domain knows it."""
    header = item.header
    if header.is_reference:
        location = _location(Reference.decode(item.prefix))
    else:
        location = Location(
            LAYOUT.name_of(item.number), header.payload_offset, header.payload_bytes, header.prefix_bytes
        )
    end = Position(item.number, header.end)
    return Record(RecordKind(header.kind), header.sequence, header.head, item.digest, location, end)
