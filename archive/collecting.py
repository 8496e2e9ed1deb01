"""How often the process looks for cycles of objects that nobody holds. A node and a hub make and drop
thousands of small objects a second, most of which live until a receipt and are in no cycle: by Python's own
measure, after each 700 new ones, a hub that was sent small instances spent an eighth of its CPU on looking,
and a node 5 to 8 %."""

from __future__ import annotations

import gc

THRESHOLDS = (20_000, 20, 50)  # new objects; collections of the youngest; of those after them


def collect_seldom() -> None:
    """For a process that has started: what was made so far stays, and is not looked at again."""
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
