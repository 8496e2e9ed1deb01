"""What the region lays down for its nodes, as this hub tells it: its time, up to which receipt they may
evict, how far the store that confirmed them has been written, where the hubs are. Told in the welcome, every
minute, and when it changes: a hub whose clock is set does not leave its nodes with the old one.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from archive.archive import Archive
from archive.model import START
from federation.attachments import Attachments
from federation.line import RegionPolicy

EVERY_S = 60.0
LOOK_S = 1.0  # how often it is seen that something changed
CLOCK_SET_S = 0.5  # a clock that went so far beside the one that nobody sets was set


@dataclass(slots=True)
class Rules:
    """What is laid down now. `archive` is that of a hub that writes the region's store; one without stands
    by. `protected_to_us` decides how far nodes may evict: what has a receipt of that time or older; 0 is
    nothing. `hub` names this process."""

    clock: Callable[[], int]
    hub_addresses: tuple[str, ...] = ()
    archive: Archive | None = None
    protected_to_us: Callable[[], int] = lambda: 0
    hub: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def current(self) -> RegionPolicy:
        policy = RegionPolicy(self.clock(), hub_addresses=self.hub_addresses, hub=self.hub)
        if self.archive is None:
            return replace(policy, standby=True)
        packs = self.archive.packs
        return replace(
            policy,
            protected_to_us=self.protected_to_us(),
            store=packs.writer,
            store_position=packs.log.durable if packs.writer else START,
        )


async def tell_for_ever(rules: Rules, attachments: Attachments) -> None:
    """Tells the wards that are attached, until it is cancelled."""
    told, told_s = rules.current(), time.monotonic()
    while True:
        await asyncio.sleep(LOOK_S)
        now, now_s = rules.current(), time.monotonic()
        went_s = (now.clock_us - told.clock_us) / 1e6
        is_set = abs(went_s - (now_s - told_s)) > CLOCK_SET_S
        if now_s - told_s >= EVERY_S or is_set or _lasting(now) != _lasting(told):
            attachments.lay_down(now)
            told, told_s = now, now_s


def _lasting(policy: RegionPolicy) -> RegionPolicy:
    """What is told at once when it changes: not what moves on by itself."""
    return replace(policy, clock_us=0, store_position=START)
