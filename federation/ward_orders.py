"""What a person orders about a ward at the region: that what its old disk may have lost is settled, so that
answers no longer name it as incomplete (`coverage.cleared`). The hub that runs carries it out; where none
runs, the command does, in the ledger alone. Safe to repeat."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from archive.errors import NotFound, Unavailable
from archive.ledger import Ledger
from archive.orders import Handler
from federation.attachments import Attachments
from federation.coverage import cleared

SETTLE = "settle-ward"
WAIT_S = 10.0
NOTHING = "nothing of it counts as lost"


def handlers_at(attachments: Attachments, loop: asyncio.AbstractEventLoop) -> dict[str, Handler]:
    """For the hub that runs: its memory is what the next report is added to."""

    def settle(detail: Mapping[str, str], by: str) -> str:
        work = asyncio.run_coroutine_threadsafe(attachments.settle(detail["ward"]), loop)
        try:
            return _words(detail["ward"], work.result(WAIT_S))
        except TimeoutError:
            work.cancel()
            raise Unavailable("the hub does not come to it: try again") from None

    return {SETTLE: settle}


def handlers_alone(ledger: Ledger) -> dict[str, Handler]:
    """For a region whose hub does not run."""

    def settle(detail: Mapping[str, str], by: str) -> str:
        state = ledger.ward_states().get(detail["ward"])
        if state is None:
            raise NotFound("no such ward has ever reported")
        ledger.put_ward_state(cleared(state))
        return _words(detail["ward"], state.lost_note)

    return {SETTLE: settle}


def _words(ward: str, note: str) -> str:
    return f"{ward}: settled: {note}" if note else f"{ward}: {NOTHING}"
