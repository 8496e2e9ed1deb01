"""Where the replicator's bytes come from: a place that went stale is looked up again, and what passes by
itself is not held against an instance."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.errors import NotFound, Unavailable
from archive.model import PendingInstance
from archive.packs.storage import FileHandle, FileStorage
from federation.packing import Packing
from protos import uplink_pb2
from tests.archive.archives import settings_for, store
from tests.archive.test_compaction import SMALL, compact, evict_study, instance_of, receive
from tests.datasets import Instance


class _Opening(FileStorage):
    """Fails to open a pack for reading, once for each number that it is told."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fail: list[int] = []

    def reader(self, name: str) -> FileHandle:
        if self.fail:
            raise OSError(self.fail.pop(), "open")
        return super().reader(name)


@pytest.fixture
def storage(tmp_path: Path) -> _Opening:
    (tmp_path / "state").mkdir()
    return _Opening(tmp_path / "state")


@pytest.fixture
def archive(tmp_path: Path, storage: _Opening) -> Iterator[Archive]:
    with Archive.open(settings_for(tmp_path / "state", **SMALL), outbox=True, storage=storage) as opened:
        yield opened


def one_pending(archive: Archive) -> tuple[Instance, PendingInstance]:
    """Among many that the region has, and that are evicted, one that waits."""
    made = [instance_of(number) for number in range(18)]
    for instance in made:
        store(archive, instance)
    archive.wait_indexed()
    waits = next(instance for instance in made if instance.study_uid == "1.2.2")
    receive(archive, [instance for instance in made if instance is not waits])
    (row,) = archive.index.pending(10)
    for study in ("1.2.0", "1.2.1", "1.2.2"):
        evict_study(archive, study)
    return waits, row


def test_an_instance_that_was_moved_since_the_outbox_was_read_is_pushed(archive: Archive) -> None:
    waits, row = one_pending(archive)
    compact(archive)
    archive.upkeep.drain()
    with pytest.raises(NotFound):
        archive.open_payload(row.location)
    packed = Packing(archive).group([row])
    (parcel,) = packed.parcels
    assert packed.unreadable == []
    message = uplink_pb2.PushRequest.FromString(parcel.message)
    assert [one.dataset for one in message.group.objects] == [waits.dataset]


def test_a_node_out_of_descriptors_does_not_set_instances_aside(archive: Archive, storage: _Opening) -> None:
    _, row = one_pending(archive)
    packing = Packing(archive)
    for number in (errno.EMFILE, errno.ENFILE):
        storage.fail = [number]
        with pytest.raises(Unavailable):
            packing.group([row])
    storage.fail = [errno.EIO]
    assert packing.group([row]).unreadable == [row]
