"""Wards whose nodes compare with the region, for the tests of this folder: a node's parts, and how to hurt
what lies on a disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from archive.archive import Archive
from archive.model import Location
from certs.identity import Identity
from federation.hub import Hub
from federation.line import LinePart
from federation.reconcile_notes import Outcome
from federation.reconciling import Reconciling
from federation.restoring import Restoring
from federation.settings import ReconcileSettings
from tests.datasets import Instance
from tests.federation.regions import Region
from tests.federation.wards import Node, node_of
from tests.waiting import wait_for

NEVER = ReconcileSettings(jitter_s=0.0, refill_days=0.0)


@dataclass
class Reconciled:
    """A node with the parts that compare and bring back."""

    node: Node
    settings: ReconcileSettings = NEVER
    part: Reconciling | None = None

    def parts(self, archive: Archive, identity: Identity) -> Sequence[LinePart]:
        restoring = Restoring(archive, identity.ward)
        part = Reconciling(
            archive, identity.ward, self.settings, restoring=restoring,
            policy=lambda: self.node.uplink.policy if self.node.uplink is not None else None,
        )  # fmt: skip
        self.part = part
        return restoring, part

    @property
    def reconciling(self) -> Reconciling:
        assert self.part is not None
        return self.part

    def start(self) -> Reconciled:
        self.node.parts = self.parts
        self.node.start()
        return self

    def compared(self, reason: str = "") -> Outcome:
        """Waits for a comparison that ended, for that reason."""
        def ended() -> Outcome | None:
            last = self.reconciling.notes.now.last
            return last if last is not None and reason in last.reason else None

        found = wait_for(ended, "it was compared")
        assert found is not None
        return found

    def compare(self, *, dry_run: bool = False) -> Outcome:
        wait_for(lambda: self.reconciling._line is not None, "it is attached")
        return self.reconciling.ask(dry_run=dry_run).result(20)


def reconciled(region: Region, hub: Hub, name: str = "Radiology") -> Reconciled:
    return Reconciled(node_of(region, hub, "San Martino", name, "SM"))


def place_of(archive: Archive, instance: Instance) -> Location:
    """Where an instance lies."""
    (found,) = archive.instances(instance.study_uid, None, instance.sop_instance_uid)
    return found.location


def flip(folder: Path, location: Location) -> None:
    """One bit in the middle of a data set."""
    with (folder / location.pack).open("r+b") as file:
        place = location.offset + (location.dataset_offset + location.length) // 2
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
