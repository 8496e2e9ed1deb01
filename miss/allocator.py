"""What becomes of memory that comes and goes: a node and a hub that move images make and drop a buffer of
half a megabyte a thousand times a second, and thousands of small objects with each.

glibc gives each block of 128 KiB and more pages of its own and takes them back at once, so that every buffer
is zeroed and mapped page by page by the kernel: more than half of a node's CPU while it replicated CTs (13.1
s of CPU against 7.4 for 1.6 GB). Such blocks are kept here and used again; what is kept is bounded by the
number of arenas and by how much of each may lie idle.

Python looks for cycles after each 700 new objects. Here nearly all that is new lives until its receipt and is
in no cycle: a hub that was sent small instances spent an eighth of its CPU on looking.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
BLOCK_BYTES = 8 << 20  # larger ones have pages of their own still
IDLE_BYTES = 32 << 20  # of an arena's end
ARENAS = 4
COLLECT_AFTER = (20_000, 50, 100)  # new objects; collections of the youngest; of those after them


def keep_buffers() -> None:
    """For this process, before its threads begin. Does nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in (
            (_M_ARENA_MAX, ARENAS), (_M_MMAP_THRESHOLD, BLOCK_BYTES), (_M_TRIM_THRESHOLD, IDLE_BYTES),
        ):  # fmt: skip
            mallopt(parameter, value)


def collect_seldom() -> None:
    """For this process, when its modules are imported: they are never looked through."""
    gc.set_threshold(*COLLECT_AFTER)
    gc.freeze()
