"""Whose push is worked on next, when several wards push at once. Without it they would share the hub by how
many streams each opens, and what one ward sends small would wait behind all that another has sent large.

A batch is taken by one of a few, as many as the machine has use for: more would only take the interpreter's
lock from each other (with eight on two cores, small instances came at five sixths of the rate). A few more
are for wards whose batches nobody takes: the takers may be held up by a disk. Until one of them is free a
batch waits in its ward's lane, and the lanes take turns by what their batches cost (deficit round robin,
Shreedhar and Varghese 1995): bytes, as they will be when they are inflated, and a share for each object,
since a small one costs the index what 64 KiB cost the disk. What a reader waits for goes first, round robin
as well, and after three such one that nobody waits for.

What is worked on at once, from being taken to its receipts, is bounded too. Past the bound only a ward that
has less than its share of it goes on. So a ward that sends one batch waits for one quantum or one batch of
each other ward that pushes, whatever they have sent. Lives in the hub's event loop. At most one batch of each
push stream waits here.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from federation.codec import CHUNK_BYTES_MAX, GROUP_BYTES_MAX, size_of
from federation.push_wire import OBJECTS_MAX, PACKED_OBJECTS, Chunk, Group, PushMessage

WORKED_ON_MAX = 64 << 20  # of cost, at once
TAKERS = min(max(2, (os.cpu_count() or 2) // 2), 4)
SPARE_TAKERS = 4  # for wards that have none
QUANTUM = 4 << 20
OBJECT_COST = 64 << 10  # of a message too, however little is in it
URGENT_IN_A_ROW = 3


@dataclass(eq=False, slots=True)
class Turn:
    """A batch that waits, is taken until `taken`, and worked on until `leave`."""

    ward: str
    cost: int
    granted: asyncio.Future[None]
    queue: FairQueue
    taking: bool = True
    over: bool = False

    def taken(self, _: object = None) -> None:
        """What is left to do is to wait for its receipts: the next may be taken."""
        if self.taking:
            self.taking = False
            self.queue.took(self)

    def leave(self, _: object = None) -> None:
        """Its receipts are made, or it came to nothing."""
        self.taken()
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

    def next(self, may: Callable[[str], bool]) -> Turn | None:
        passed = 0  # of the lanes one after another that may not go on
        while self.waiting and passed < len(self.waiting):
            ward, lane = next(iter(self.waiting.items()))
            while lane and lane[0].granted.done():  # who waited has left
                lane.popleft()
            if not lane:
                self._close(ward)
                continue
            if not may(ward):
                passed += 1
                self.waiting[ward] = self.waiting.pop(ward)
                continue
            if self.deficits.get(ward, 0) >= lane[0].cost:
                turn = lane.popleft()
                self.deficits[ward] -= turn.cost
                if not lane:
                    self._close(ward)
                return turn
            passed = 0
            self.deficits[ward] = self.deficits.get(ward, 0) + QUANTUM
            self.waiting[ward] = self.waiting.pop(ward)
        return None

    def _close(self, ward: str) -> None:
        """A ward that waits for nothing saves nothing up."""
        del self.waiting[ward]
        self.deficits.pop(ward, None)


class FairQueue:
    """See the module's docstring."""

    def __init__(self, worked_on_max: int = WORKED_ON_MAX, takers: int = TAKERS) -> None:
        self._most = worked_on_max
        self._takers = takers
        self._taking: Counter[str] = Counter()
        self._worked_on: Counter[str] = Counter()
        self._urgent = _Lanes()
        self._ordinary = _Lanes()
        self._in_a_row = 0

    async def enter(self, ward: str, cost: int, *, urgent: bool = False) -> Turn:
        """Returns when this ward's batch is the next to be taken."""
        turn = Turn(ward, max(cost, 1), asyncio.get_running_loop().create_future(), self)
        (self._urgent if urgent else self._ordinary).put(ward, turn)
        self._grant()
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn.granted.done() and not turn.granted.cancelled():
                turn.leave()
            raise
        return turn

    def took(self, turn: Turn) -> None:
        _subtract(self._taking, turn.ward, 1)
        self._grant()

    def left(self, turn: Turn) -> None:
        _subtract(self._worked_on, turn.ward, turn.cost)
        self._grant()

    def _grant(self) -> None:
        while (turn := self._next()) is not None:
            self._taking[turn.ward] += 1
            self._worked_on[turn.ward] += turn.cost
            turn.granted.set_result(None)

    def _may(self, ward: str) -> bool:
        return self._has_taker(ward) and self._has_room(ward)

    def _has_taker(self, ward: str) -> bool:
        most = self._takers if ward in self._taking else self._takers + SPARE_TAKERS
        return self._taking.total() < most

    def _has_room(self, ward: str) -> bool:
        if self._worked_on.total() < self._most:
            return True
        wards = self._worked_on.keys() | self._urgent.waiting.keys() | self._ordinary.waiting.keys()
        return self._worked_on[ward] < self._most // len(wards | {ward})

    def _next(self) -> Turn | None:
        first, second = self._urgent, self._ordinary
        if self._in_a_row >= URGENT_IN_A_ROW:
            first, second = second, first
        turn = first.next(self._may)
        lanes = first
        if turn is None:
            turn, lanes = second.next(self._may), second
        if turn is not None:
            self._in_a_row = self._in_a_row + 1 if lanes is self._urgent else 0
        return turn


def _subtract(counter: Counter[str], ward: str, by: int) -> None:
    counter[ward] -= by
    if not counter[ward]:
        del counter[ward]


def cost_of(messages: Sequence[PushMessage]) -> int:
    """What a batch costs the hub."""
    return sum(map(_cost_of, messages))


def _cost_of(message: PushMessage) -> int:
    if isinstance(message, Group):
        return message.octets + OBJECT_COST * max(len(message.objects), 1)
    if isinstance(message, Chunk):
        return len(message.data) + OBJECT_COST
    kind = message.WhichOneof("message")
    if kind == "zstd_group":
        objects = message.packed_objects or PACKED_OBJECTS
        cost = OBJECT_COST * min(max(objects, 1), OBJECTS_MAX)
        return size_of(message.zstd_group, GROUP_BYTES_MAX) + cost
    if kind == "zstd_chunk":
        return size_of(message.zstd_chunk, CHUNK_BYTES_MAX) + OBJECT_COST
    return message.ByteSize() + OBJECT_COST * max(len(message.group.objects), 1)


def names(messages: Sequence[PushMessage]) -> list[str]:
    """The instances that a batch begins or holds, as far as it shows them without being unpacked."""
    found: list[str] = []
    for message in messages:
        if isinstance(message, Group):  # which has few; what has more is refused
            found.extend(whole.begin.head.sop_instance_uid for whole in message.objects)
            continue
        if isinstance(message, Chunk):
            continue
        kind = message.WhichOneof("message")
        if kind == "begin":
            found.append(message.begin.head.sop_instance_uid)
        elif kind == "group" and len(message.group.objects) <= OBJECTS_MAX:
            found.extend(whole.begin.head.sop_instance_uid for whole in message.group.objects)
    return found
