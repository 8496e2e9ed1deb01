"""The order desk: the thread of a running node or hub that carries out what commands ask through its ledger,
one order after the other, the oldest first.

An order stays in the ledger until it is answered. A process that ends between the act and the answer carries
it out again when it comes back, so every handler must be safe to repeat. What an order does is its handler's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from archive.errors import MissError
from archive.ledger import Ledger, Order
from archive.rounds import Rounds

log = logging.getLogger(__name__)

Handler = Callable[[Mapping[str, str], str], str]  # detail and who asked -> the answer, in words

POLL_S = 0.25
_RETRY_S = 2.0
_BATCH = 100


class OrderDesk:
    """See the module's docstring. `start` and `stop` make and end its thread."""

    def __init__(self, ledger: Ledger, handlers: Mapping[str, Handler]) -> None:
        self._ledger = ledger
        self._handlers = handlers
        self._rounds = Rounds("orders", self._look, log, retry_s=_RETRY_S, first_s=POLL_S)

    def start(self) -> None:
        self._rounds.start()

    def stop(self) -> None:
        """The order under way is finished, if that does not take too long; the others wait in the ledger."""
        self._rounds.stop()

    def work_off(self) -> int:
        """Carry out what waits; how many orders that were."""
        done = 0
        while not self._rounds.stopping.is_set():
            orders = self._ledger.open_orders(_BATCH)
            if not orders:
                break
            for order in orders:
                if self._rounds.stopping.is_set():
                    break
                self._carry_out(order)
                done += 1
        return done

    def _carry_out(self, order: Order) -> None:
        handler = self._handlers.get(order.kind)
        try:
            if handler is None:
                ok, answer = False, f"this release knows no order {order.kind!r}"
            else:
                ok, answer = True, handler(order.detail, order.by)
        except MissError as error:
            ok, answer = False, str(error)
        except Exception:
            log.exception("an order of kind %s met an error that it does not know", order.kind)
            ok, answer = False, "an error that is not foreseen; the log says more"
        self._ledger.finish_order(order.id, ok, answer)
        log.info("order %s by %s: %s", order.kind, order.by, "done" if ok else f"failed: {answer}")

    def _look(self) -> float:
        if self._ledger.has_open_orders():
            self.work_off()
        return POLL_S
