"""A ward with a cache on a disk of a size of its own, over a real hub, for the tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from archive.archive import Archive, ArchiveSettings
from archive.errors import OutOfResources
from archive.ledger import Ledger
from archive.model import StoredInstance
from certs.identity import Identity
from federation.hub import Hub
from federation.line import LinePart
from federation.restoring import Restoring
from federation.settings import ProtectionSettings
from node.cache.cache import Cache
from node.cache.policy import Room
from node.cache.prefetching import RegionView
from node.cache.rules import RulesFile
from node.settings import CacheSettings
from tests.datasets import Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import Node, hub_settings, node_of
from tests.waiting import wait_for

MB = 1 << 20
QUICK = CacheSettings(look_s=0.05, free_percent_low=25.0, free_percent_high=40.0, bring_bytes_per_s=0.0)
RESERVE = 4 * MB  # what intake keeps free


class CachingWard:
    """A ward's archive, uplink and cache. Its disk has `disk_bytes`, of which its own files take their
    part."""

    def __init__(
        self, region: Region, hub: Hub, disk_bytes: int, settings: CacheSettings, **options: Any
    ) -> None:
        self.disk_bytes = disk_bytes
        self.node: Node = node_of(region, hub, "San Martino", "Radiology", "SM")
        self.folder = self.node.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger.open(f"sqlite:///{self.folder / 'ledger.db'}")
        self.node.archive = self.archive = Archive.open(
            ArchiveSettings(
                state=self.folder, pack_bytes_max=8 * MB, free_bytes_min=RESERVE, drop_delay_s=0.0
            ),
            outbox=True,
        )
        self.archive._storage.free_bytes = self.free_bytes  # type: ignore[method-assign]
        self.is_held = False
        self.restoring = Restoring(self.archive, self.node.identity.ward)
        self.node.parts = self._parts
        self.rules = self.folder / "cache.toml"
        self.cache = Cache(
            self.archive, self.ledger, settings, RulesFile(self.rules), ward=self.node.ward.id,
            issuer=self.node.ward.issuer, restoring=self.restoring,
            policy=lambda: None if self.node.uplink is None else self.node.uplink.policy,
            held=lambda: self.is_held, room=lambda: Room(self.free_bytes(), disk_bytes), **options,
        )  # fmt: skip

    def _parts(self, archive: Archive, identity: Identity) -> Sequence[LinePart]:
        return (self.restoring,)

    def free_bytes(self) -> int:
        taken = 0
        for path in self.folder.glob("*/*"):
            try:
                taken += path.stat().st_blocks * 512
            except FileNotFoundError:
                continue
        return max(0, self.disk_bytes - taken)

    def attach(self) -> None:
        self.node.start()
        wait_for(lambda: self.restoring.is_ready, "the ward is attached")

    def settle(self) -> None:
        wait_for(lambda: self.node.pending == 0, "the region has everything")

    def take_as_long_as_it_takes(self, instance: Instance, timeout_s: float = 30.0) -> int:
        """As a modality does that tries again when it was refused for want of room: how often it was."""
        refused, until_s = 0, time.monotonic() + timeout_s
        while True:
            try:
                self.node.take([instance])
                return refused
            except OutOfResources:
                refused += 1
                assert time.monotonic() < until_s, "the ward takes nothing any more"
                time.sleep(0.05)

    def instances(self, study: str) -> list[StoredInstance]:
        return self.archive.instances(study)

    def evicted(self, *studies: str) -> int:
        """Instances that are not here, of these studies."""
        return sum(one.evicted for study in studies for one in self.instances(study))

    def close(self) -> None:
        self.cache.stop()
        self.node.leave()
        self.node.archive = None
        self.archive.close()
        self.ledger.close()


@contextmanager
def protecting(region: Region, by: str = "age", hours: float = 0.0) -> Iterator[Hub]:
    """A hub whose receipts count at once, or as `by` says."""
    hub = Hub(hub_settings(region, protection=ProtectionSettings(by=by, hours=hours)))
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


@contextmanager
def caching(
    region: Region, hub: Hub, disk_bytes: int = 200 * MB, settings: CacheSettings = QUICK,
    window: Callable[[CachingWard], RegionView] | None = None, **changes: Any,
) -> Iterator[CachingWard]:  # fmt: skip
    ward = CachingWard(region, hub, disk_bytes, replace(settings, **changes))
    if window is not None:
        ward.cache.prefetching._window = window(ward)
    try:
        yield ward
    finally:
        ward.close()


def study(uid: str, count: int = 3, *, size: int = 2 * MB, **options: Any) -> list[Instance]:
    """Of instances that have packs of their own."""
    return [
        make_instance(study_uid=uid, series_uid=f"{uid}.1", sop_uid=f"{uid}.1.{number}", number=number,
                      padding=size, **options)
        for number in range(1, count + 1)
    ]  # fmt: skip


