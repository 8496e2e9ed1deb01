"""The wards' standing as a portal reads it from the ledger before each answer, at the price of one short
question when nothing of it has changed: with hundreds of wards, reading all of their states would cost more
than the search that it comes before.

What was read is used again, for two seconds at most, while no attached ward holds anything alone and nothing
that an answer's coverage speaks of has changed, but the time of the last report. So an answer may say "as of"
two seconds too little, never too much.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from archive.ledger import Ledger, WardState
from archive.model import Scope, Ward
from federation.coverage import WardCoverage, coverage_of, is_worth_searching

USED_S = 2.0
SCOPES_MAX = 64


@dataclass(frozen=True, slots=True)
class Standing:
    """The wards and what each said last, at one moment."""

    wards: tuple[Ward, ...]
    states: Mapping[str, WardState]
    now_us: int
    idle: bool = False  # no attached ward holds anything that the region lacks
    _by_scope: dict[Scope, list[WardCoverage]] = field(default_factory=dict)

    def of(self, scope: Scope) -> list[Ward]:
        return [ward for ward in self.wards if scope.allows(ward.id)]

    def is_worth_searching(self, scope: Scope) -> bool:
        """Whether any ward in the scope is there and holds something that the region lacks."""
        return not self.idle and any(
            is_worth_searching(self.states.get(ward.id), self.now_us) for ward in self.of(scope)
        )

    def coverage(self, scope: Scope) -> list[WardCoverage]:
        """What an answer covers that asks nobody."""
        known = self._by_scope.get(scope)
        if known is None:
            known = [coverage_of(ward, self.states.get(ward.id), self.now_us) for ward in self.of(scope)]
            if len(self._by_scope) < SCOPES_MAX:
                self._by_scope[scope] = known
        return list(known)


class Standings:
    """Reads it. Safe to use from any thread."""

    def __init__(self, ledger: Ledger, clock: Callable[[], int]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._lock = threading.Lock()
        self._last: tuple[tuple[int, ...], float, Standing] | None = None

    def now(self) -> Standing:
        mark = self._ledger.ward_mark()
        with self._lock:
            last = self._last
        idle = mark[0] == 0
        if idle and last is not None and last[0] == mark and time.monotonic() - last[1] < USED_S:
            return last[2]
        # The mark before the states: they are at least as new as it says.
        states = self._ledger.ward_states()
        still = idle and not any(
            state.attached and state.pending + state.set_aside > 0 for state in states.values()
        )
        standing = Standing(tuple(self._ledger.wards()), states, self._clock(), still)
        with self._lock:
            self._last = (mark, time.monotonic(), standing) if still else None
        return standing
