"""Whose push is worked on next, when several wards push at once. Without it they would share the hub by how
many streams each opens, and what one ward sends small would wait behind all that another has sent large.

What is worked on at once, from being taken to its receipts, is bounded; past the bound a batch waits in its
ward's lane, and the lanes take turns by what their batches cost (deficit round robin, Shreedhar and Varghese
1995): bytes, and a share for each object, since a small one costs the index what 16 KiB cost the disk. What a
reader waits for goes first, round robin as well, and after three such one that nobody waits for.

So a ward that sends one batch waits at most for what is worked on, and for one quantum or one batch of each
other ward that pushes, whatever they have sent. Lives in the hub's event loop. At most one batch of each push
stream waits here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from federation.push_wire import Chunk, Group, PushMessage

WORKED_ON_MAX = 64 << 20  # of cost, at once
QUANTUM = 1 << 20
OBJECT_COST = 64 << 10
PACKED_OBJECTS = 128  # a group that is compressed counts as one of so many
URGENT_IN_A_ROW = 3


@dataclass(eq=False, slots=True)
class Turn:
    """A batch that waits, or is worked on until `leave`."""

    cost: int
    granted: asyncio.Future[None]
    queue: FairQueue
    over: bool = False

    def leave(self, _: object = None) -> None:
        """Its receipts are made, or it came to nothing."""
        if not self.over:
            self.over = True
            self.queue.left(self)


@dataclass(slots=True)
class _Lanes:
    """The wards' waiting batches, of one urgency."""

    waiting: dict[str, deque[Turn]] = field(default_factory=dict)  # the first ward is the next
    deficits: dict[str, int] = field(default_factory=dict)

    def put(self, ward: str, turn: Turn) -> None:
        self.waiting.setdefault(ward, deque()).append(turn)

    def next(self) -> Turn | None:
        while self.waiting:
            ward, lane = next(iter(self.waiting.items()))
            while lane and lane[0].granted.done():  # who waited has left
                lane.popleft()
            if not lane:
                self._close(ward)
                continue
            if self.deficits.get(ward, 0) >= lane[0].cost:
                turn = lane.popleft()
                self.deficits[ward] -= turn.cost
                if not lane:
                    self._close(ward)
                return turn
            self.deficits[ward] = self.deficits.get(ward, 0) + QUANTUM
            self.waiting[ward] = self.waiting.pop(ward)
        return None

    def _close(self, ward: str) -> None:
        """A ward that waits for nothing saves nothing up."""
        del self.waiting[ward]
        self.deficits.pop(ward, None)


class FairQueue:
    """See the module's docstring."""

    def __init__(self, worked_on_max: int = WORKED_ON_MAX) -> None:
        self._most = worked_on_max
        self._worked_on = 0
        self._urgent = _Lanes()
        self._ordinary = _Lanes()
        self._in_a_row = 0

    async def enter(self, ward: str, cost: int, *, urgent: bool = False) -> Turn:
        """Returns when this ward's batch is the next to be worked on."""
        turn = Turn(max(cost, 1), asyncio.get_running_loop().create_future(), self)
        (self._urgent if urgent else self._ordinary).put(ward, turn)
        self._grant()
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn.granted.done() and not turn.granted.cancelled():
                turn.leave()
            raise
        return turn

    def left(self, turn: Turn) -> None:
        self._worked_on -= turn.cost
        self._grant()

    def _grant(self) -> None:
        while self._worked_on < self._most and (turn := self._next()) is not None:
            self._worked_on += turn.cost
            turn.granted.set_result(None)

    def _next(self) -> Turn | None:
        first, second = self._urgent, self._ordinary
        if self._in_a_row >= URGENT_IN_A_ROW:
            first, second = second, first
        turn = first.next()
        lanes = first
        if turn is None:
            turn, lanes = second.next(), second
        self._in_a_row = self._in_a_row + 1 if turn is not None and lanes is self._urgent else 0
        return turn


def cost_of(messages: Sequence[PushMessage]) -> int:
    """What a batch costs the hub."""
    return sum(map(_cost_of, messages))


def _cost_of(message: PushMessage) -> int:
    if isinstance(message, Group):
        return message.octets + OBJECT_COST * len(message.objects)
    if isinstance(message, Chunk):
        return len(message.data)
    kind = message.WhichOneof("message")
    objects = {"group": len(message.group.objects), "zstd_group": PACKED_OBJECTS, "end": 1}.get(str(kind), 0)
    return message.ByteSize() + OBJECT_COST * objects


def names(messages: Sequence[PushMessage]) -> list[str]:
    """The instances that a batch begins or holds, as far as it shows them without being unpacked."""
    found: list[str] = []
    for message in messages:
        if isinstance(message, Group):
            found.extend(whole.begin.head.sop_instance_uid for whole in message.objects)
            continue
        if isinstance(message, Chunk):
            continue
        kind = message.WhichOneof("message")
        if kind == "begin":
            found.append(message.begin.head.sop_instance_uid)
        elif kind == "group":
            found.extend(whole.begin.head.sop_instance_uid for whole in message.group.objects)
    return found
