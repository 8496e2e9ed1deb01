"""Disks that lose what was written, on both sides at once: bytes flip, files of objects and a whole index are
gone. What node and hub do about it, as processes: the index is made anew, each side gets from the other what
it lost, and in the end both have all of it, digest-equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from archive.archive import Archive, ArchiveSettings
from archive.errors import MissError
from archive.model import Location, StoredInstance
from miss.processes import wait_until
from tests.commands import miss
from tests.trials import Mix, Trial

COUNT = 40


@pytest.mark.timeout(300)
def test_what_either_disk_lost_comes_from_the_other(tmp_path: Path) -> None:
    with Trial(tmp_path, mix=Mix(ct_each=3, large_each=10)) as trial:
        trial.begin()
        wait_until("enough", lambda: len(trial.load.acknowledged) >= COUNT or None, timeout_s=60)
        trial.end()
        trial.drain()
        trial.watch.stop()
        trial.stop_all()
        expected = trial.expected()
        harm(trial.node_archive, trial, first=0)
        harm(trial.hub_archive, trial, first=2)  # others than at the node
        for path in trial.node_archive.state.glob("index.db*"):
            path.unlink()

        trial.start_hub()
        trial.start_node()
        for folder in (trial.ward.state, trial.region.folder):
            begun = miss("scrub", "--now", "--state", folder)
            assert begun.returncode == 0, begun.stderr
        wait_until("both disks' being whole", lambda: both_whole(trial, expected) or None, timeout_s=120,
                   children=[trial.node, trial.hubs[0]])
        trial.drain()


def harm(settings: ArchiveSettings, trial: Trial, *, first: int) -> None:
    """Flips a byte in two packed instances and takes away the files of two large ones."""
    packed: list[Location] = []
    large: list[Location] = []
    with Archive.open(settings, outbox=settings is trial.node_archive, read_only=True) as archive:
        for instance in instances_of(archive, trial):
            (large if instance.location.pack.startswith("large/") else packed).append(instance.location)
    for place in packed[first : first + 2]:
        with open(settings.state / place.pack, "r+b") as file:
            file.seek(place.offset + place.length - 2)
            [octet] = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([octet ^ 1]))
    for place in large[first : first + 2]:
        (settings.state / place.pack).unlink()


def instances_of(archive: Archive, trial: Trial) -> list[StoredInstance]:
    studies = dict.fromkeys(trial.load.instance(number).study_uid for number in trial.load.acknowledged)
    found = [one for study in studies for one in archive.instances(study)]
    return sorted(found, key=lambda one: one.head.sop_instance_uid)


def both_whole(trial: Trial, expected: dict[str, bytes]) -> bool:
    for settings in (trial.node_archive, trial.hub_archive):
        with Archive.open(settings, outbox=settings is trial.node_archive, read_only=True) as archive:
            held = instances_of(archive, trial)
            if {one.head.sop_instance_uid: one.digest for one in held} != expected:
                return False
            try:
                for one in held:
                    archive.verify(one)
            except (MissError, OSError):
                return False
    return True
