"""Writes multipart/related bodies (RFC 2387) as streams of bounded chunks. It knows nothing of DICOM."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """One part: its headers in order, its content as an iterable of chunks that is read once."""

    content_type: str
    content: Iterable[bytes]
    location: str = ""


def boundary() -> str:
    """128 random bits: no content can hold it but by guessing."""
    return secrets.token_hex(16)


def content_type(part_type: str, mark: str, transfer_syntax: str = "") -> str:
    syntax = f"; transfer-syntax={transfer_syntax}" if transfer_syntax else ""
    return f'multipart/related; type="{part_type}"{syntax}; boundary={mark}'


def body(parts: Iterable[Part], mark: str) -> Iterator[bytes]:
    """The parts one after another; memory does not grow with their number or size."""
    return gather(chain(pieces(parts, mark), (end(mark),)))


def pieces(parts: Iterable[Part], mark: str, *, first: bool = True) -> Iterator[bytes]:
    """The parts without the end; not `first` when others went before."""
    start = f"--{mark}\r\n" if first else f"\r\n--{mark}\r\n"
    for part in parts:
        location = f"Content-Location: {part.location}\r\n" if part.location else ""
        yield f"{start}Content-Type: {part.content_type}\r\n{location}\r\n".encode("ascii")
        yield from part.content
        start = f"\r\n--{mark}\r\n"


def end(mark: str) -> bytes:
    """What says that all parts were there."""
    return f"\r\n--{mark}--\r\n".encode("ascii")


def resumed(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """What was begun, from its beginning: the first piece was read to see whether there is one."""
    yield first
    yield from rest


def gather(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join small pieces until a chunk is worth a system call; never holds more than a chunk and one piece."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= CHUNK_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)
