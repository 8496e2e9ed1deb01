"""What a release can beyond protocol 1, as node and hub tell each other when a node attaches. An ability is
used only where both sides have it, so that a node of the previous release works with a newer hub, and the
other way round."""

from __future__ import annotations

from collections.abc import Iterable

RESUME = "resume"        # a push goes on inside an object
ZSTD = "zstd"            # chunks and groups may be compressed
FACTS = "facts"          # removals and corrections travel (`protos/facts.proto`)
INVENTORY = "inventory"  # inventories are compared (`protos/inventory.proto`)
RESTORE = "restore"      # a ward gets back what it gave (`protos/restore.proto`)
PULSE = "pulse"          # the hub answers each report, so that a node hears when the line is dead one way

OURS: tuple[str, ...] = (RESUME, ZSTD, RESTORE, FACTS, INVENTORY, PULSE)
_SHARED_MAX = 64


def shared(theirs: Iterable[str]) -> frozenset[str]:
    """What both sides can."""
    return frozenset(list(theirs)[:_SHARED_MAX]) & frozenset(OURS)
