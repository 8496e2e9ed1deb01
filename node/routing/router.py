"""How what is queued gets to its destinations. Decides what goes next, and what becomes of it; it does no I/O
of its own: clock, queue and sender are given to it, real ones by `service.py`, pretended ones by a
simulation.

**A turn** is one round for one destination: a batch of what is due, what ranks first and then the oldest, is
given to the sender, and what became of each row is written to the queue. Destinations have turns beside each
other, each one at a time, so that one that hangs delays nobody else.

**At least once.** A row leaves the queue when the destination has said that it has the instance. A process
that ends in between sends those again whose answer it had not written: at most a batch. While the queue can't
be written nothing further is sent.

**Failures.** A destination that can't be reached, or that has no room, is left alone: 10 s at first, then
longer and longer up to an hour, with jitter, however much waits for it. Its rows are not touched, and count
no try. A row that the destination refuses is tried again alone, on the same schedule, while the others pass;
after `tries_max` refusals, or at once where trying again can't help, it is set aside with the reason, until a
person retries or drops it. What could not be delivered within its days is set aside as well.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from archive.backoff import Backoff
from archive.errors import MissError
from archive.hours import Hours
from archive.ledger import Destination, DestinationState, Routed, RouteState, Settlement

log = logging.getLogger(__name__)

SECOND_US = 1_000_000
LOOK_AGAIN_US = 60 * SECOND_US  # the queue is looked at at least so often, whatever it said


class Verdict(Enum):
    """What a destination said to one row."""

    SENT = "sent"    # it has the instance
    AGAIN = "again"  # not this time
    BUSY = "busy"    # not now, whatever it is
    NEVER = "never"  # trying again can't help


class Committed(Enum):
    """What is known of a commitment that was asked for."""

    YES = "yes"
    NO = "no"            # it is sent again
    NOT_YET = "not yet"
    UNKNOWN = "unknown"  # and will stay so


Tell = Callable[[Routed, Verdict, int, str], None]  # row, what was said, DIMSE status (0: none), in words


class Queue(Protocol):
    """What waits, on disk. `archive/ledger/routes.py` is one."""

    def due_routes(
        self, to: Destination, now_us: int, limit: int, state: RouteState = RouteState.WAITING
    ) -> list[Routed]: ...
    def next_route_us(self, to: Destination) -> int | None: ...
    def postpone_routes(self, to: Destination, rule: str, until_us: int) -> None: ...
    def settle_routes(self, settlement: Settlement, now_us: int) -> None: ...
    def note_destination(self, state: DestinationState) -> None: ...


class Sender(Protocol):
    """Who sends."""

    def send(self, to: Destination, rows: Sequence[Routed], tell: Tell) -> None:
        """Send each row, and tell what became of it once. Raises MissError when the destination can't be had:
        what was not told of was not sent."""

    def ask_to_commit(self, to: Destination, rows: Sequence[Routed]) -> str:
        """Ask a destination to commit what was sent (PS3.4 J): the transaction; "" when none of it is here
        any more. Raises MissError."""

    def committed(self, rows: Sequence[Routed]) -> Sequence[tuple[Committed, str]]:
        """What is known of each row's transaction, and why not."""


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """The bounds of a router."""

    batch: int = 200
    settle_rows: int = 50      # what became of so many is written together
    settle_us: int = SECOND_US  # and after so long
    tries_max: int = 10
    backoff_first_s: float = 10.0
    backoff_cap_s: float = 3600.0
    commit_poll_s: float = 5.0


@dataclass(slots=True)
class _Turn:
    """What became of rows in one turn, as far as it is not written yet."""

    done: list[Routed] = field(default_factory=list)
    changed: list[Routed] = field(default_factory=list)
    since_us: int = 0
    stored: int = 0
    busy: str = ""
    told: set[bytes] = field(default_factory=set)
    unwritable: bool = False  # the queue did not take it: it is asked once more at the end of the turn


@dataclass(slots=True)
class _Lane:
    """What is remembered of a destination while the process lives."""

    failures: int = 0
    resume_us: int = 0
    since_us: int = 0  # when that was said: a clock that shows less was set back
    error: str = ""
    shown_failing: bool = True  # people may be shown that it fails, perhaps since an earlier life
    last: _Turn = field(default_factory=_Turn)  # what the queue did not take of it is written before another

    def is_over(self, now_us: int) -> bool:
        """Whether the destination is left alone no more."""
        return now_us >= self.resume_us or now_us < self.since_us


class Router:
    """See the module's docstring. Turns of different destinations may be had in different threads; `wake` and
    `is_due` are asked in any."""

    def __init__(
        self, queue: Queue, sender: Sender, clock: Callable[[], int], limits: RouterLimits,
        chance: random.Random,
    ) -> None:  # fmt: skip
        self._queue = queue
        self._sender = sender
        self._clock = clock
        self._limits = limits
        self._backoff = Backoff(limits.backoff_first_s, limits.backoff_cap_s, chance)
        self._hours: Mapping[str, Hours] = {}
        self._lanes: dict[Destination, _Lane] = {}

    def use_hours(self, hours: Mapping[str, Hours]) -> None:
        """In which hours what each rule queued may be sent; a rule that is not named has no window."""
        self._hours = hours

    def is_due(self, to: Destination) -> bool:
        """Whether a turn may have something to do."""
        return self._lane(to).is_over(self._clock())

    def wake(self, to: Destination, *, at_once: bool = False) -> None:
        """Something was queued. A destination that fails is left alone all the same, unless a person wants it
        tried `at_once`."""
        lane = self._lane(to)
        if at_once:
            lane.failures = 0
        if not lane.failures:
            lane.resume_us = 0

    def turn(self, to: Destination) -> bool:
        """One round for a destination. Whether anything was sent or settled."""
        lane, now_us = self._lane(to), self._clock()
        if not lane.is_over(now_us):
            return False
        lane.since_us = now_us
        lane.resume_us = now_us + LOOK_AGAIN_US  # what is queued from here on wakes it again
        self._write(lane.last)
        turn = lane.last = _Turn(since_us=now_us)
        rows = self._open(to, self._queue.due_routes(to, now_us, self._limits.batch), turn, now_us)
        error = self._send(to, rows, turn) if rows else None
        self._write(turn)
        if error is None:
            error = self._look_after_commitments(to, turn)
            self._write(turn)
        if error is not None or (turn.busy and not turn.stored):
            self._rest(to, lane, str(error) if error is not None else turn.busy, progress=turn.stored > 0)
        else:
            self._go_on(to, lane, reached=bool(turn.told), more=len(rows) >= self._limits.batch)
        return bool(turn.told)

    # Which rows

    def _open(self, to: Destination, rows: list[Routed], turn: _Turn, now_us: int) -> list[Routed]:
        """Those that may be sent now: their window is open, their days are not over."""
        lane, closed = self._lane(to), dict[str, int]()
        chosen = []
        for row in rows:
            hours = self._hours.get(row.rule)
            if row.expires_us <= now_us and (row.tries or lane.failures):  # else it gets its one try
                words = row.comment or lane.error
                self._set_aside(turn, row, row.status, f"not delivered in time: {words}")
            elif hours is not None and not hours.holds(now_us):
                closed[row.rule] = hours.opens_us(now_us)
            else:
                chosen.append(row)
        for rule, until_us in closed.items():
            self._queue.postpone_routes(to, rule, until_us)
        return chosen

    # Sending

    def _send(self, to: Destination, rows: Sequence[Routed], turn: _Turn) -> MissError | None:
        limits, one_at_a_time = self._limits, threading.Lock()

        def tell(row: Routed, verdict: Verdict, status: int, words: str) -> None:
            with one_at_a_time:
                if row.key in turn.told:
                    return
                turn.told.add(row.key)
                self._judge(turn, row, verdict, status, words)
                unwritten = len(turn.done) + len(turn.changed)
                if turn.unwritable:
                    return
                if unwritten >= limits.settle_rows or self._clock() - turn.since_us >= limits.settle_us:
                    try:
                        self._write(turn)
                    except MissError as error:  # the queue's trouble, and not the association's
                        log.warning("what became of rows for %s is not written yet: %s", to, error)
                        turn.unwritable = True

        try:
            self._sender.send(to, rows, tell)
        except MissError as error:
            return error
        return None

    def _judge(self, turn: _Turn, row: Routed, verdict: Verdict, status: int, words: str) -> None:
        if verdict is Verdict.SENT:
            turn.stored += 1
            if row.commit:
                turn.changed.append(replace(
                    row, state=RouteState.COMMITTING, status=status, comment="",
                    next_try_us=self._clock(), transaction_uid=""))  # fmt: skip
            else:
                turn.done.append(row)
        elif verdict is Verdict.NEVER:
            self._set_aside(turn, row, status, words)
        else:
            if verdict is Verdict.BUSY:
                turn.busy = f"it has no room ({status:04X})"
            self._try_later(turn, row, status, words, give_up=verdict is Verdict.AGAIN)

    def _try_later(self, turn: _Turn, row: Routed, status: int, words: str, *, give_up: bool) -> None:
        tries = row.tries + 1
        if give_up and tries >= self._limits.tries_max:
            self._set_aside(turn, replace(row, tries=tries - 1), status, f"{words} ({tries} times)")
            return
        turn.changed.append(replace(
            row, state=RouteState.WAITING, tries=tries, status=status, comment=words, transaction_uid="",
            next_try_us=self._clock() + self._backoff.pause_us(tries)))  # fmt: skip

    def _set_aside(self, turn: _Turn, row: Routed, status: int, words: str) -> None:
        turn.told.add(row.key)
        turn.changed.append(replace(
            row, state=RouteState.SET_ASIDE, tries=row.tries + 1, status=status, comment=words))  # fmt: skip
        # Its words may be the peer's own: they are for people, in the queue, not for a log.
        log.warning("set aside for %s by rule %r: %s, status %04X", row.to, row.rule,
                    row.sop_instance_uid or row.study_uid, status)  # fmt: skip

    def _write(self, turn: _Turn) -> None:
        """A row keeps its place in the queue until this has returned for it."""
        if turn.done or turn.changed:
            self._queue.settle_routes(Settlement(tuple(turn.done), tuple(turn.changed)), self._clock())
            turn.done.clear()
            turn.changed.clear()
        turn.since_us = self._clock()

    # Commitments

    def _look_after_commitments(self, to: Destination, turn: _Turn) -> MissError | None:
        now_us = self._clock()
        rows = self._queue.due_routes(to, now_us, self._limits.batch, RouteState.COMMITTING)
        unasked = [row for row in rows if not row.transaction_uid]
        asked = [row for row in rows if row.transaction_uid]
        later_us = now_us + int(self._limits.commit_poll_s * 1e6)
        try:
            if unasked:
                uid = self._sender.ask_to_commit(to, unasked)
                for row in unasked:
                    if uid:
                        turn.changed.append(replace(row, transaction_uid=uid, next_try_us=later_us))
                    else:
                        self._set_aside(turn, row, row.status, "sent, and no longer here to be committed")
            for row, (answer, words) in zip(asked, self._sender.committed(asked), strict=True):
                if answer is Committed.YES:
                    turn.told.add(row.key)
                    turn.done.append(row)
                elif answer is Committed.NO:
                    turn.told.add(row.key)
                    self._try_later(turn, row, row.status, f"not committed: {words}", give_up=True)
                elif answer is Committed.UNKNOWN or row.expires_us <= now_us:
                    self._set_aside(turn, row, row.status, f"sent, and not known to be committed: {words}")
                else:
                    turn.changed.append(replace(row, next_try_us=later_us))
        except MissError as error:
            pause_us = self._backoff.pause_us(1)
            turn.changed += [replace(row, next_try_us=now_us + pause_us) for row in unasked]
            return error
        return None

    # What comes next

    def _rest(self, to: Destination, lane: _Lane, words: str, *, progress: bool) -> None:
        lane.failures, lane.error = 1 if progress else lane.failures + 1, words
        lane.since_us = self._clock()
        lane.resume_us = lane.since_us + self._backoff.pause_us(lane.failures)
        lane.shown_failing = True
        level = logging.WARNING if lane.failures == 1 else logging.DEBUG
        log.log(level, "%s: %s; trying again", to, words)
        self._queue.note_destination(
            DestinationState(to, lane.failures, lane.resume_us, words, self._clock())
        )

    def _go_on(self, to: Destination, lane: _Lane, *, reached: bool, more: bool) -> None:
        next_us = self._queue.next_route_us(to)
        if lane.shown_failing and (reached or next_us is None):
            if lane.failures:
                log.info("%s takes instances again", to)
            self._queue.note_destination(DestinationState(to, 0, 0, "", self._clock()))
            lane.shown_failing = False
        lane.failures, lane.error = 0, ""
        if more:
            lane.resume_us = 0
        elif next_us is not None:
            lane.resume_us = min(lane.resume_us, next_us)

    def _lane(self, to: Destination) -> _Lane:
        return self._lanes.setdefault(to, _Lane())
