"""The wards' standing as a portal reads it from the ledger before each answer, at the price of one short
question when nothing of it has changed: with hundreds of wards, reading all of their states would cost more
than the search that it comes before.

What was read is used again, for half a second at most, while no attached ward has anything pending and
nothing that an answer's coverage speaks of has changed, but the time of the last report. So an answer may say
"as of" half a second too little, never too much.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from archive.ledger import Ledger, WardState
from archive.model import Scope, Ward
from federation.coverage import WardCoverage, coverage_of, is_worth_asking

USED_S = 0.5
SCOPES_MAX = 64


@dataclass(frozen=True, slots=True)
class Standing:
    """The wards and what each said last, at one moment."""

    wards: tuple[Ward, ...]
    states: Mapping[str, WardState]
    now_us: int
    _by_scope: dict[Scope, list[WardCoverage]] = field(default_factory=dict)

    def of(self, scope: Scope) -> list[Ward]:
        return [ward for ward in self.wards if scope.allows(ward.id)]

    def is_worth_asking(self, scope: Scope) -> bool:
        """Whether any ward in the scope is there and holds something that the region lacks."""
        return any(is_worth_asking(self.states.get(ward.id), self.now_us) for ward in self.of(scope))

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
        standing = Standing(tuple(self._ledger.wards()), self._ledger.ward_states(), self._clock())
        with self._lock:
            self._last = (mark, time.monotonic(), standing) if idle else None
        return standing
