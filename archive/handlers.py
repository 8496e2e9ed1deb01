"""Which orders an archive carries out, each with the function that does. Node and hub give them to their
order desk, a command to its own when neither runs. Every handler is safe to repeat."""

from __future__ import annotations

from collections.abc import Callable

from archive.archive import Archive
from archive.backlog_orders import BacklogOrders
from archive.conflicts.decisions import ACCEPT, REJECT, Decisions
from archive.correction_orders import CORRECT, CorrectionOrders
from archive.correction_orders import UNDO as UNDO_CORRECTION
from archive.orders import Handler
from archive.removing import PURGE, REMOVE, UNDO, Removing
from archive.space.orders import COMPACT, EVICT, SpaceOrders


def handlers_of(
    archive: Archive, ward: str = "", *, held: Callable[[], bool] = lambda: False
) -> dict[str, Handler]:
    """By the kind of an order, given in the name of `ward`, "" for the region; and what is removed is purged
    from then on when it is due. `held` says that nothing may be evicted now."""
    decisions, space, removing = Decisions(archive), SpaceOrders(archive, held), Removing(archive, ward)
    corrections = CorrectionOrders(archive, ward)
    return BacklogOrders(archive, ward).handlers() | {
        CORRECT: corrections.correct, UNDO_CORRECTION: corrections.undo,
        REMOVE: removing.remove, UNDO: removing.undo, PURGE: removing.purge,
        ACCEPT: decisions.accept, REJECT: decisions.reject, EVICT: space.evict, COMPACT: space.compact,
    }  # fmt: skip
