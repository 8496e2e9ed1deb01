"""How a record lies in a log, byte by byte, and how it is told from everything else. Pure functions of
bytes: no file is touched here, and nothing is decided.

    file   = file header (twice, in two pages), record, record, ... , zeros written ahead
    record = header | payload | trailer | zeros up to 64 bytes

    header  = magic, version, kind, flags, encoding, length, writer, key id, sequence, own place,
    `durable_to`,
              time of receipt, payload length, prefix length, the seven words of the head, check
    payload = a Part 10 stream (PS3.10 7.1), a reference to one that has a pack of its own, or a batch of
    facts trailer = magic, length of header and payload, digest of the payload after its prefix, check

Both checks are BLAKE2b keyed by the file's random salt, so that bytes inside a payload can't pose as a
record, and cover the record's own place, so that a record written to the wrong place is none. The trailer's
check covers header, prefix and trailer; the digest covers the rest: no byte of a record goes unchecked.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final

from archive.errors import Corrupt, SchemaTooNew, TooLarge
from archive.model import InstanceHead, Position, Provenance
from archive.packs.storage import Buffer

FORMAT_VERSION: Final = 1
ALIGNMENT: Final = 64
FILE_HEADER_BYTES: Final = 8192
RECORD_HEADER_BYTES_MAX: Final = 2048
RECORD_HEADER_BYTES_MIN: Final = 136
TRAILER_BYTES: Final = 64
RECORD_BYTES_MIN: Final = 256
RECORD_MAGIC: Final = b"MISSrec\x01"
TRAILER_MAGIC: Final = b"MISSend\x01"

# Group 2 of every stored payload (PS3.10 7.1). Both never change: node and region each make the prefix from
# the head, and their payloads are byte for byte the same only as long as the words are.
IMPLEMENTATION_CLASS_UID: Final = "2.25.299978647673335174448193490009480090228"
IMPLEMENTATION_VERSION_NAME: Final = "MISS_1"

_FILE_MAGIC = b"MISSlog\x01"
_FILE = struct.Struct("<8sBBHI16s16sIIQQQQ")
_FIXED = struct.Struct("<8s4BI16s16sQIIQIIQqQ7HH")
_TRAILER = struct.Struct("<8sQ32s")
_REFERENCE = struct.Struct("<QQIH")
_CHECK_BYTES = 16
_WORD_BYTES_MAX = 255
_NO_KEY = bytes(16)  # payload encryption (erasure by key) will name its key here
_AS_RECEIVED = 0
_PADDING = tuple(bytes(n) for n in range(ALIGNMENT))


class Purpose(IntEnum):
    """What a file of records is for. The values are written to disk."""

    PACK = 1
    OWN_PACK = 2
    FACTS = 3


class Flag(IntEnum):
    """Bits of a record's flags."""

    REFERENCE = 1  # the payload lies in a pack of its own
    STREAMED = 2  # the payload's length was not known when the header was written: the trailer has it


@dataclass(frozen=True, slots=True)
class FileHeader:
    """The beginning of a file of records. `previous` is where its predecessor ended for good: what lies
    behind that place was abandoned after a failed sync. For an own pack it is where the log ended when it
    was begun."""

    purpose: Purpose
    number: int
    writer: bytes
    salt: bytes
    previous: Position
    first_sequence: int
    created_us: int

    @classmethod
    def new(
        cls,
        purpose: Purpose,
        number: int,
        *,
        writer: bytes,
        previous: Position,
        first_sequence: int,
        created_us: int,
    ) -> FileHeader:
        return cls(purpose, number, writer, os.urandom(16), previous, first_sequence, created_us)

    def encode(self) -> bytes:
        body = _FILE.pack(
            _FILE_MAGIC, FORMAT_VERSION, self.purpose, 0, self.number, self.writer, self.salt,
            self.previous.file, 0, self.previous.offset, self.first_sequence, self.created_us, 0,
        )  # fmt: skip
        copy = body + hashlib.blake2b(body, digest_size=_CHECK_BYTES).digest()
        half = FILE_HEADER_BYTES // 2
        return copy.ljust(half, b"\0") * 2

    @classmethod
    def decode(cls, data: bytes) -> FileHeader | None:
        """The header if either of its copies is whole."""
        for start in (0, FILE_HEADER_BYTES // 2):
            body = data[start : start + _FILE.size]
            check = data[start + _FILE.size : start + _FILE.size + _CHECK_BYTES]
            if len(body) < _FILE.size or hashlib.blake2b(body, digest_size=_CHECK_BYTES).digest() != check:
                continue
            magic, version, purpose, _, number, writer, salt, file, _, offset, sequence, created_us, _ = (
                _FILE.unpack(body)
            )
            if magic == _FILE_MAGIC and version > FORMAT_VERSION:
                raise SchemaTooNew(
                    f"a file of records has format {version}, this release reads {FORMAT_VERSION}"
                )
            if magic == _FILE_MAGIC:
                previous = Position(file, offset)
                return cls(Purpose(purpose), number, writer, salt, previous, sequence, created_us)
        return None


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """A record's header as it stands in a file; offsets are the file's."""

    kind: int
    flags: int
    sequence: int
    offset: int
    durable_to: Position
    head: InstanceHead
    header_bytes: int
    payload_bytes: int
    prefix_bytes: int

    @property
    def is_reference(self) -> bool:
        return bool(self.flags & Flag.REFERENCE)

    @property
    def payload_offset(self) -> int:
        return self.offset + self.header_bytes

    @property
    def trailer_offset(self) -> int:
        return self.payload_offset + self.payload_bytes

    @property
    def end(self) -> int:
        return aligned(self.trailer_offset + TRAILER_BYTES)


@dataclass(frozen=True, slots=True)
class Reference:
    """The payload of a reference record: where the Part 10 stream lies instead."""

    pack: str
    offset: int
    length: int
    dataset_offset: int

    def encode(self) -> bytes:
        name = self.pack.encode("ascii")
        return _REFERENCE.pack(self.offset, self.length, self.dataset_offset, len(name)) + name

    @classmethod
    def decode(cls, data: bytes) -> Reference:
        if len(data) < _REFERENCE.size:
            raise Corrupt("a reference record is too short")
        offset, length, dataset_offset, name_bytes = _REFERENCE.unpack_from(data)
        name = data[_REFERENCE.size : _REFERENCE.size + name_bytes]
        return cls(name.decode("ascii", "replace"), offset, length, dataset_offset)


NO_HEAD: Final = InstanceHead("", "", "", Provenance("", "", "", "", 0))


class Framing:
    """Writes and checks the records of one file: its salt keys them."""

    def __init__(self, header: FileHeader) -> None:
        self.header = header
        self._number = header.number
        self._writer = header.writer
        self._keyed = hashlib.blake2b(key=header.salt, digest_size=_CHECK_BYTES)

    def encode(
        self,
        kind: int,
        head: InstanceHead,
        digest: bytes,
        *,
        flags: int,
        sequence: int,
        offset: int,
        durable_to: Position,
        payload_bytes: int,
        prefix: bytes,
    ) -> tuple[bytes, bytes]:
        """The header, and the trailer with its zeros, of a record whose payload begins with `prefix`."""
        header, check = self._begin(
            kind, head, flags=flags, sequence=sequence, offset=offset, durable_to=durable_to,
            payload_bytes=payload_bytes, prefix_bytes=len(prefix),
        )  # fmt: skip
        body_bytes = len(header) + payload_bytes
        trailer = _TRAILER.pack(TRAILER_MAGIC, body_bytes, digest)
        check.update(prefix + trailer)
        padding = -(body_bytes + TRAILER_BYTES) % ALIGNMENT
        return header, trailer + check.digest() + _PADDING[padding]

    def encode_streamed_header(self, head: InstanceHead, *, kind: int, sequence: int, prefix: bytes) -> bytes:
        """The header of an own pack's only record, written before its length and digest are known."""
        place = Position(0, 0)  # an own pack promises nothing: its reference does
        header, _ = self._begin(
            kind,
            head,
            flags=Flag.STREAMED,
            sequence=sequence,
            offset=FILE_HEADER_BYTES,
            durable_to=place,
            payload_bytes=0,
            prefix_bytes=len(prefix),
        )
        return header

    def encode_streamed_trailer(
        self, header: bytes, prefix: bytes, *, payload_bytes: int, digest: bytes
    ) -> bytes:
        trailer = _TRAILER.pack(TRAILER_MAGIC, len(header) + payload_bytes, digest)
        return trailer + self._trailer_check(header, prefix, trailer)

    def _begin(
        self,
        kind: int,
        head: InstanceHead,
        *,
        flags: int,
        sequence: int,
        offset: int,
        durable_to: Position,
        payload_bytes: int,
        prefix_bytes: int,
    ) -> tuple[bytes, hashlib.blake2b]:
        source = head.provenance
        lengths, words = _words(
            head.sop_class_uid,
            head.transfer_syntax_uid,
            source.ward,
            source.issuer,
            source.device,
            source.calling_ae,
        )
        uid = head.sop_instance_uid.encode("ascii")
        length = _FIXED.size + len(words) + len(uid) + _CHECK_BYTES
        header = _FIXED.pack(
            RECORD_MAGIC, FORMAT_VERSION, kind, flags, _AS_RECEIVED, length, self._writer, _NO_KEY, sequence,
            self._number, prefix_bytes, offset, durable_to.file, 0, durable_to.offset, source.received_at_us,
            payload_bytes, *lengths, len(uid), 0,
        ) + words + uid  # fmt: skip
        check = self._keyed.copy()
        check.update(header)
        own = check.digest()
        check.update(own)
        return header + own, check

    def decode(self, data: Buffer, start: int, offset: int) -> RecordHeader | None:
        """The authentic header that begins at `data[start]` and stands at `offset` in the file, else None."""
        if len(data) - start < RECORD_HEADER_BYTES_MIN or data[start : start + 8] != RECORD_MAGIC:
            return None
        fields = _FIXED.unpack_from(data, start)
        (
            _,
            version,
            kind,
            flags,
            _,
            length,
            _,
            _,
            sequence,
            number,
            prefix_bytes,
            own_offset,
            durable_file,
            _,
        ) = fields[:14]
        durable_offset, received_at_us, payload_bytes, *lengths, _ = fields[14:]
        if number != self._number or own_offset != offset or version != FORMAT_VERSION:
            return None
        if not RECORD_HEADER_BYTES_MIN <= length <= min(RECORD_HEADER_BYTES_MAX, len(data) - start):
            return None
        if _FIXED.size + sum(lengths) + _CHECK_BYTES != length:
            return None
        check = self._keyed.copy()
        check.update(data[start : start + length - _CHECK_BYTES])
        if check.digest() != data[start + length - _CHECK_BYTES : start + length]:
            return None
        words = []
        place = start + _FIXED.size
        for word_bytes in lengths:
            words.append(str(data[place : place + word_bytes], "utf-8"))
            place += word_bytes
        sop_class, syntax, ward, issuer, device, calling_ae, uid = words
        head = InstanceHead(
            sop_class, uid, syntax, Provenance(ward, issuer, device, calling_ae, received_at_us)
        )
        durable_to = Position(durable_file, durable_offset)
        return RecordHeader(
            kind, flags, sequence, offset, durable_to, head, length, payload_bytes, prefix_bytes
        )

    def decode_trailer(
        self, trailer: Buffer, header: Buffer, prefix: Buffer, payload_bytes: int
    ) -> bytes | None:
        """The digest that an authentic trailer of this header and prefix carries, else None."""
        if len(trailer) < TRAILER_BYTES:
            return None
        magic, body_bytes, digest = _TRAILER.unpack_from(trailer)
        if magic != TRAILER_MAGIC or body_bytes != len(header) + payload_bytes:
            return None
        own = trailer[_TRAILER.size : TRAILER_BYTES]
        whole = self._trailer_check(header, prefix, trailer[: _TRAILER.size])
        return bytes(digest) if own == whole else None

    def _trailer_check(self, header: Buffer, prefix: Buffer, trailer: Buffer) -> bytes:
        check = self._keyed.copy()
        check.update(header)
        check.update(prefix)
        check.update(trailer)
        return check.digest()


def header_bytes(head: InstanceHead) -> int:
    """How long the header of a record of this instance is, before anything else is known of it."""
    source = head.provenance
    _, words = _words(
        head.sop_class_uid, head.transfer_syntax_uid,
        source.ward, source.issuer, source.device, source.calling_ae,
    )  # fmt: skip
    return _FIXED.size + len(words) + len(head.sop_instance_uid) + _CHECK_BYTES


def aligned(offset: int) -> int:
    """The first place at or after `offset` where a record may begin."""
    return offset + -offset % ALIGNMENT


@lru_cache(maxsize=1024)
def _words(*words: str) -> tuple[Sequence[int], bytes]:
    """The words of a head that are the same for thousands of instances, encoded once."""
    encoded = [word.encode("utf-8") for word in words]
    if any(len(word) > _WORD_BYTES_MAX for word in encoded):
        raise TooLarge(f"a word of an instance's head is longer than {_WORD_BYTES_MAX} bytes")
    return tuple(len(word) for word in encoded), b"".join(encoded)


_AE_TITLE = re.compile(r"[\x20-\x5b\x5d-\x7e]{1,16}", re.ASCII)  # PS3.5 6.2, VR AE


def part10_prefix(head: InstanceHead) -> bytes:
    """What stands before the data set in a Part 10 stream (PS3.10 7.1): a preamble of zeros (so that
    nothing can hide in it: CVE-2019-11687), DICM and group 2. A function of the head alone, so that node
    and region store the same."""
    before, after = _group2(head.sop_class_uid, head.transfer_syntax_uid, head.provenance.calling_ae)
    uid = _ui(b"\x02\x00\x03\x00", head.sop_instance_uid)
    return _PREAMBLE + struct.pack("<I", len(before) + len(uid) + len(after)) + before + uid + after


_PREAMBLE = bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00"


@lru_cache(maxsize=1024)
def _group2(sop_class_uid: str, transfer_syntax_uid: str, calling_ae: str) -> tuple[bytes, bytes]:
    before = b"\x02\x00\x01\x00OB\x00\x00\x02\x00\x00\x00\x00\x01" + _ui(b"\x02\x00\x02\x00", sop_class_uid)
    after = _ui(b"\x02\x00\x10\x00", transfer_syntax_uid) + _ui(b"\x02\x00\x12\x00", IMPLEMENTATION_CLASS_UID)
    after += _text(b"\x02\x00\x13\x00SH", IMPLEMENTATION_VERSION_NAME, b" ")
    if _AE_TITLE.fullmatch(calling_ae):
        after += _text(b"\x02\x00\x16\x00AE", calling_ae, b" ")
    return before, after


def _ui(tag: bytes, uid: str) -> bytes:
    return _text(tag + b"UI", uid, b"\0")


def _text(tag_and_vr: bytes, text: str, padding: bytes) -> bytes:
    value = text.encode("ascii")
    if len(value) % 2:
        value += padding
    return tag_and_vr + struct.pack("<H", len(value)) + value
