"""The attaches of a node that stand now, and which of them leads: that of the hub that writes the region's
store. What rides on a line rides on that one; asks are answered on whichever they come. Lives in the uplink's
event loop and does no I/O.

When the hub that leads dies and another stands, that one leads at once. A hub that says that it has become
the writer leads from then on, also while the line to the last one still seems to stand: exactly one writes.
Two addresses may lead to one hub, which a node finds out by that hub's own name: the address that did not get
through last waits until the other's attach ends, since a hub keeps one attach for a ward.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from federation.line import Line, RegionPolicy

HUBS_MAX = 8


@dataclass(eq=False, slots=True)
class Attached:
    """One attach that stands. `policy` is None for a hub of a release that lays none down: it writes."""

    line: Line
    policy: RegionPolicy | None

    @property
    def writes(self) -> bool:
        return self.policy is None or not self.policy.standby

    @property
    def name(self) -> bytes:
        """The hub's own name; empty for one that has none."""
        return self.policy.hub if self.policy is not None else b""


class Leading:
    """Who stands and who leads. `line_up` and `line_down` are called when the lead changes; `own` are the
    addresses that a node was given, the others come from the hubs."""

    def __init__(
        self,
        own: Callable[[], Sequence[str]],
        line_up: Callable[[Line], None],
        line_down: Callable[[], None],
        clock: Callable[[], int],
    ) -> None:
        self._own = own
        self._line_up = line_up
        self._line_down = line_down
        self._clock = clock
        self._standing: dict[str, Attached] = {}
        self._lead: Attached | None = None
        self._told: tuple[str, ...] = ()  # addresses that the hubs told which stood last
        self._hub_clock: tuple[int, float] | None = None  # a hub's time, and ours that is never set
        self._changed = asyncio.Event()
        self.policy: RegionPolicy | None = None  # of the hub that writes, the last one

    @property
    def lead(self) -> Line | None:
        """The line over which the region is reached now."""
        return self._lead.line if self._lead is not None else None

    @property
    def any_standing(self) -> bool:
        return bool(self._standing)

    def addresses(self) -> list[str]:
        """Where hubs may be, those first that this node was given."""
        return list(dict.fromkeys((*self._own(), *self._told)))[:HUBS_MAX]

    def up(self, address: str, line: Line, policy: RegionPolicy | None, clock_us: int) -> None:
        """An attach stands."""
        self._standing[address] = Attached(line, None)
        self.laid_down(address, policy, clock_us)

    def laid_down(self, address: str, policy: RegionPolicy | None, clock_us: int) -> None:
        """A hub said what the region lays down, or, of an older release, its time alone."""
        attached = self._standing[address]
        became_writer = not attached.writes and policy is not None and not policy.standby
        attached.policy = policy
        if policy is not None:
            self._told = self._told_by_standing()
            clock_us = policy.clock_us
        if attached.writes or self._lead is None:
            self._hub_clock = clock_us, time.monotonic()
        self._choose(attached if became_writer else None)
        if self._lead is attached and policy is not None:
            self.policy = policy
        self._notify()

    def down(self, address: str) -> None:
        """An attach ended."""
        self._standing.pop(address, None)
        self._choose()
        self._notify()

    async def until_wanted(self, address: str, name: bytes) -> None:
        """Returns when this address is worth dialling: not while its hub (by the `name` that it told last)
        stands under another one, nor beside a hub of a release that has no name, as a region had one hub."""
        while any(
            other != address and (not attached.name or attached.name == name)
            for other, attached in self._standing.items()
        ):
            await self.changed()

    async def changed(self) -> None:
        """Returns when an attach began or ended, or a hub laid something down."""
        await self._changed.wait()

    def hub_clock_us(self) -> int:
        """The region's time, as far as it is known here, whatever this machine's clock is set to meanwhile:
        else its devices' questions, and the region's to it, would seem expired."""
        if self._hub_clock is None:
            return self._clock()
        hub_us, at_s = self._hub_clock
        return hub_us + int((time.monotonic() - at_s) * 1e6)

    def _told_by_standing(self) -> tuple[str, ...]:
        policies = [attached.policy for attached in self._standing.values() if attached.policy is not None]
        return tuple(address for policy in policies for address in policy.hub_addresses)

    def _choose(self, preferred: Attached | None = None) -> None:
        standing = list(self._standing.values())
        lead = preferred or (self._lead if self._lead in standing and self._lead.writes else None)
        if lead is None:
            order = {address: place for place, address in enumerate(self.addresses())}
            known = sorted(self._standing.items(), key=lambda one: order.get(one[0], HUBS_MAX))
            lead = next((attached for _, attached in known if attached.writes), None)
        if lead is self._lead:
            return
        if self._lead is not None:
            self._line_down()
        self._lead = lead
        if lead is not None:
            if lead.policy is not None:
                self.policy = lead.policy
            self._line_up(lead.line)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()  # who waits has the old one
