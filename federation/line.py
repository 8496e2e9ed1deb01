"""What a node has while it is attached to a hub, and what rides on it. The uplink makes the line and tells
each of its parts; a part never dials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import grpc.aio

from archive.model import START, Position
from protos import uplink_pb2


@dataclass(frozen=True, slots=True)
class RegionPolicy:
    """What the region lays down for its nodes, as a hub said it last. `clock_us` is that hub's time when it
    said it; what has a receipt of `protected_to_us` or older may be evicted (0: nothing); `store` names the
    disk of the regional store, `store_position` how far it had been written. A hub that is `standby` takes no
    pushes now; `hub` is its own name."""

    clock_us: int = 0
    protected_to_us: int = 0
    store: bytes = b""
    store_position: Position = START
    hub_addresses: tuple[str, ...] = ()
    standby: bool = False
    hub: bytes = b""


@dataclass(frozen=True, slots=True)
class Line:
    """One attach that stands: the channel that it came over, and what its hub can
    (`federation/abilities.py`)."""

    hub: str
    channel: grpc.aio.Channel
    abilities: frozenset[str]


class LinePart(Protocol):
    """Something that a node does over its line. All of it is called in the uplink's event loop."""

    def line_up(self, line: Line) -> None:
        """The node is attached to a hub that writes the region's store. Returns at once."""

    def line_down(self) -> None:
        """That attach ended; `line_up` follows when there is another. Returns at once."""

    def come(self, come: uplink_pb2.Come) -> None:
        """The hub says that something waits there. Returns at once."""

    async def run(self) -> None:
        """Runs until it is cancelled, with a line or without one. What it raises restarts the uplink: then it
        is called again, in a new event loop."""
