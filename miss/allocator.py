"""What the C library does with the memory of buffers that come and go: a node and a hub that move images make
and drop one of half a megabyte a thousand times a second.

glibc gives each block of 128 KiB and more pages of its own and takes them back at once, so that every buffer
is zeroed and mapped page by page by the kernel: more than half of a node's CPU while it replicated CTs (13.1
s of CPU against 7.4 for 1.6 GB). Such blocks are kept here and used again; what is kept is bounded by the
number of arenas and by how much of each may lie idle.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
BLOCK_BYTES = 8 << 20  # larger ones have pages of their own still
IDLE_BYTES = 32 << 20  # of an arena's end
ARENAS = 4


def keep_buffers() -> None:
    """For this process, before its threads begin. Does nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in (
            (_M_ARENA_MAX, ARENAS), (_M_MMAP_THRESHOLD, BLOCK_BYTES), (_M_TRIM_THRESHOLD, IDLE_BYTES),
        ):  # fmt: skip
            mallopt(parameter, value)
