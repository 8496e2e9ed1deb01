"""What the wards page says of what was removed, and to whom."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import Any

from archive.archive import Archive
from archive.index.removed import Tombstone
from archive.model import Level
from archive.removals import Removal, fact_of
from federation.node_source import removals_for
from federation.policy import Principal, Role
from portal.removals import lines
from tests.archive.archives import settings_for

AT_US = 1_767_312_000_000_000  # 2026-01-02, UTC


def tombstone(number: int, order: str = "ab" * 8, **changes: Any) -> Tombstone:
    removal = Removal(f"{order}{number:016x}", Level.IMAGE, f"1.2.{number}", "1.2", "113001", "device CT1",
                      "rejection note 1.9", AT_US, "san-martino/radiology")  # fmt: skip
    return replace(Tombstone(removal, 0, "", 0, "", "", True, False), **changes)


def test_one_line_for_each_note() -> None:
    other = "cd" * 8
    found = lines([tombstone(1), tombstone(2), tombstone(3, other, in_force=False, restored_us=AT_US)], UTC)
    assert [line.id for line in found] == ["ab" * 8, other]
    assert found[0].uid == "1.2.1 and 1 more" and found[0].state == "hidden, can be undone"
    assert found[0].why == "rejection note 1.9: rejected for quality reasons"
    assert found[0].when == "2026-01-02 00:00" and found[1].state == "undone 2026-01-02 00:00"
    gone = lines([tombstone(1, purged=True, purged_us=AT_US)], UTC)
    assert gone[0].state == "purged 2026-01-02 00:00"


def test_only_who_keeps_the_region_running_is_told(tmp_path: Path) -> None:
    with Archive.open(settings_for(tmp_path), outbox=False) as archive:
        archive.record_facts([fact_of(tombstone(1).removal)])
        keeper = Principal("ines", Role.IT)
        assert [one.removal.uid for one in removals_for(archive, keeper, 10)] == ["1.2.1"]
        assert removals_for(archive, Principal("eva", Role.PHYSICIAN), 10) == []
