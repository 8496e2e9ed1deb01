"""Sizes at which the way of an instance to its pack changes: what came is what is given back, byte for byte,
at once and after a rebuild, and no memory stays lent."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import pytest
from pydicom.uid import generate_uid

from archive.archive import Archive
from archive.model import InstanceHead, Outcome
from archive.packs.lanes import LANE_BYTES
from archive.packs.records import FILE_HEADER_BYTES, TRAILER_BYTES, header_bytes, part10_prefix
from archive.rebuild import rebuild
from tests.archive.archives import settings_for, stored_bytes
from tests.datasets import EXPLICIT, Instance, make_instance

KIB = 1 << 10
BASE = make_instance(rows=0, sop_uid="1.2.3.999", study_uid="1.2.4", series_uid="1.2.5")
FRONT = header_bytes(BASE.head()) + len(part10_prefix(BASE.head()))


def around(*sizes: int) -> list[int]:
    return [size + more for size in sizes for more in (-1, 0, 1)]


# Where a record of a pack, or of a pack of its own, ends or changes buffers, in octets of its data set.
SIZES = [
    *around(60 * KIB, 64 * KIB, 128 * KIB),
    *around(*(128 * KIB - FRONT - less for less in (0, TRAILER_BYTES, 2 * TRAILER_BYTES))),
    *range(200 * KIB, 204 * KIB, 251),
    *around(1024 * KIB - FRONT, 1024 * KIB),
    *around(*(n * LANE_BYTES - FRONT - FILE_HEADER_BYTES for n in (2, 3))),
    *around(*(n * LANE_BYTES - FRONT - FILE_HEADER_BYTES - TRAILER_BYTES for n in (2, 3))),
    *around(2 * LANE_BYTES),
]


def of_size(number: int, size: int) -> Instance:
    uid, study = f"1.2.3.{100 + number}", generate_uid()
    base = make_instance(rows=0, sop_uid=uid, study_uid=study, series_uid="1.2.5", number=number)
    fill = random.Random(number).randbytes(size - len(base.dataset) - 12)
    tail = struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, len(fill)) + fill
    return Instance(base.sop_class_uid, uid, EXPLICIT, study, "1.2.5", base.dataset + tail)


def receive(archive: Archive, head: InstanceHead, data: bytes, chance: random.Random) -> bytes:
    """As the byte pump does: into the room that is given, where there is any."""
    reception = archive.intake.begin(head)
    at = 0
    while at < len(data):
        want = min(chance.choice([1, 4095, 4096, 16_384, 65_537, 300_000]), len(data) - at)
        room = reception.room(want)
        if room is None:
            reception.write(data[at : at + want])
            at += want
        else:
            got = chance.randrange(1, len(room) + 1) if chance.random() < 0.3 else len(room)
            room[:got] = data[at : at + got]
            reception.filled(room[:got])
            at += got
    ticket = reception.commit(expected_digest=hashlib.sha256(data).digest())
    ticket.wait_durable()
    assert ticket.outcome is Outcome.STORED
    return ticket.digest


@pytest.mark.parametrize("budget_bytes", [256 << 20, 150 * KIB])
def test_every_size_comes_back_as_it_came(tmp_path: Path, budget_bytes: int) -> None:
    chance = random.Random(budget_bytes)
    settings = settings_for(tmp_path / "state", memory_budget_bytes=budget_bytes, pack_bytes_max=5 << 20)
    instances = [of_size(number, size) for number, size in enumerate(SIZES)]
    chance.shuffle(instances)
    with Archive.open(settings, outbox=True) as archive:
        for instance in instances:
            assert receive(archive, instance.head(), instance.dataset, chance) == instance.digest
            assert stored_bytes(archive, instance) == instance.dataset
        assert archive.intake.budget.taken_bytes == 0
    report = rebuild(settings, outbox=True)
    assert report.damages == () and report.records == len(instances)
    with Archive.open(settings, outbox=True) as archive:
        for instance in instances:
            assert stored_bytes(archive, instance) == instance.dataset
