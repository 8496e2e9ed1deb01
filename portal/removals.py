"""What the portal says of removals: who took what out of sight, when and why, for those who keep it running.
Many of one rejection note are one line. No patient data reaches this module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, tzinfo
from itertools import groupby

from archive.index.removed import Tombstone
from archive.model import Level
from archive.removals import CODES

_WORDS = {Level.STUDY: "study", Level.SERIES: "series", Level.IMAGE: "instance"}


@dataclass(frozen=True, slots=True)
class RemovalLine:
    """A line of the removals on the wards page."""

    id: str
    what: str
    uid: str
    why: str
    by: str
    where: str
    when: str
    state: str


def lines(found: Iterable[Tombstone], zone: tzinfo) -> list[RemovalLine]:
    """One for each command or note, in their order."""
    return [_line(list(group), zone) for _, group in groupby(found, key=lambda one: one.removal.order)]


def _line(group: list[Tombstone], zone: tzinfo) -> RemovalLine:
    removal = group[0].removal
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    why = f"{removal.reason}: {CODES[removal.code]}" if removal.code in CODES else removal.reason
    return RemovalLine(
        removal.order, _WORDS[removal.level], removal.uid + more, why, removal.by,
        removal.ward or "the region", _when(removal.at_us, zone), _state(group, zone),
    )  # fmt: skip


def _state(group: list[Tombstone], zone: tzinfo) -> str:
    if not any(one.in_force for one in group):
        return f"undone {_when(group[0].restored_us, zone)}"
    if all(one.purged for one in group if one.in_force):
        return f"purged {_when(max(one.purged_us for one in group), zone)}"
    return "hidden, can be undone"


def _when(at_us: int, zone: tzinfo) -> str:
    return datetime.fromtimestamp(at_us / 1e6, zone).strftime("%Y-%m-%d %H:%M")
