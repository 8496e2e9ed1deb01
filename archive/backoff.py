"""When what failed is tried again: twice as late each time up to a longest pause, and between half of a pause
and all of it by chance, so that what failed together does not come together."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

_DOUBLINGS_MAX = 32  # past them every pause is the longest, and a float is still finite


@dataclass(frozen=True, slots=True)
class Backoff:
    """The pauses of one kind of failure; `first_s` is the whole first one."""

    first_s: float
    longest_s: float
    chance: random.Random = field(default_factory=random.Random)

    def pause_s(self, failures: int) -> float:
        """After `failures` in a row, at least one."""
        whole_s = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, _DOUBLINGS_MAX))
        return whole_s * (0.5 + self.chance.random() / 2)

    def pause_us(self, failures: int) -> int:
        return int(self.pause_s(failures) * 1e6)
