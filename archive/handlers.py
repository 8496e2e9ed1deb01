"""Which orders an archive carries out, each with the function that does. Node and hub give them to their
order desk, a command to its own when neither runs. Every handler is safe to repeat."""

from __future__ import annotations

from archive.archive import Archive
from archive.conflicts.decisions import ACCEPT, REJECT, Decisions
from archive.orders import Handler
from archive.space.orders import COMPACT, EVICT, SpaceOrders


def handlers_of(archive: Archive) -> dict[str, Handler]:
    """By the kind of an order."""
    decisions, space = Decisions(archive), SpaceOrders(archive)
    return {
        ACCEPT: decisions.accept, REJECT: decisions.reject, EVICT: space.evict, COMPACT: space.compact,
    }  # fmt: skip
