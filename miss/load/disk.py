"""What a disk gives to whoever writes durably: the floor under every intake. Writes one file, removes it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 8 << 10
CHUNK_BYTES = 4 << 20
FILLED_BYTES = 32 << 20
STREAM_BYTES_MAX = 2 << 30


@dataclass(frozen=True, slots=True)
class Disk:
    """Synced writes of 8 KB into zero-filled space, one after the other, and a stream that is synced once."""

    syncs_per_s: float
    bytes_per_s: float


def measure_disk(folder: Path, seconds: float) -> Disk:
    """Half of the time for each."""
    path = folder / "disk-floor"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.pwrite(descriptor, bytes(FILLED_BYTES), 0)
        os.fdatasync(descriptor)
        return Disk(_syncs_per_s(descriptor, seconds / 2), _bytes_per_s(descriptor, seconds / 2))
    finally:
        os.close(descriptor)
        path.unlink()


def _syncs_per_s(descriptor: int, seconds: float) -> float:
    block = os.urandom(BLOCK_BYTES)
    count = 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        os.pwrite(descriptor, block, count * BLOCK_BYTES % FILLED_BYTES)
        os.fdatasync(descriptor)
        count += 1
    return count / max(spent, 1e-6)


def _bytes_per_s(descriptor: int, seconds: float) -> float:
    chunk = os.urandom(CHUNK_BYTES)
    at = FILLED_BYTES
    start = time.perf_counter()
    while time.perf_counter() - start < seconds and at < STREAM_BYTES_MAX:
        os.pwrite(descriptor, chunk, at)
        at += CHUNK_BYTES
    os.fdatasync(descriptor)
    return (at - FILLED_BYTES) / max(time.perf_counter() - start, 1e-6)
