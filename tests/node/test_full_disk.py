"""A small disk that fills up with everything of the node on it, packs, index and ledger: A700 while it is
full, the association lives, and 0000 again when there is room, without a restart."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from archive.archive import Archive, ArchiveSettings
from archive.model import START, Record
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import ECHO_CONTEXT, Requestor
from tests.datasets import CT, EXPLICIT, Instance, make_instance
from tests.forked import forked
from tests.node.storing import store
from tests.waiting import wait_for

MB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("padding", [60_000, 2 * MB])
def test_a_full_disk_is_a700_until_there_is_room(disk: Path, padding: int) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(12 * MB))
    kept: list[Instance] = []
    refused: list[Instance] = []
    contexts = [ECHO_CONTEXT, ProposedContext(3, CT, (EXPLICIT,))]
    with forked(disk) as node:
        with Requestor.connect(node.peer, "CT1", contexts) as requestor:
            for number in range(1000):
                instance = make_instance(number=number, padding=padding)
                status = store(requestor, instance)
                assert status in (0, 0xA700), f"{status:04X}"
                (refused if status else kept).append(instance)
                if len(refused) == 12:
                    break
            assert len(refused) == 12 and len(kept) > 3
            assert requestor.echo() == 0
            ballast.unlink()
            wait_for(lambda: store(requestor, refused[0]) == 0, "intake goes on by itself")
            assert [store(requestor, one) for one in refused[:4]] == [0] * 4
        node.check_no_surprise()
    check(disk, kept + refused[:4], refused[4:])


def check(disk: Path, kept: list[Instance], refused: list[Instance]) -> None:
    with Archive.open(ArchiveSettings(state=disk / "state", free_bytes_min=0), outbox=True) as archive:
        items = [item for item in archive.packs.read(START, archive.packs.log.durable)]
        records = {item.head.sop_instance_uid: item for item in items if isinstance(item, Record)}
        assert len(records) == len(items), "damage, or an instance twice"
        assert {one.sop_instance_uid for one in kept} <= records.keys()
        assert not {one.sop_instance_uid for one in refused} & records.keys()
        assert archive.index.totals().instances == len(records)
        for instance in kept:
            (found,) = archive.instances(instance.study_uid, None, instance.sop_instance_uid)
            archive.verify(found)
            assert found.digest == instance.digest
        named = {found.location.pack for found in records.values()}
        assert set(archive.packs.storage.list("large")) <= named
