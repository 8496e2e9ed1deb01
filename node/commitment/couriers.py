"""Owns the few threads that bring what is due to devices, one device each at a time, so that a device that
does not answer holds up no other. What is due, and what it is, others say."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from archive.errors import MissError
from archive.ledger import Commitment

log = logging.getLogger(__name__)

COURIERS = 4
AT_ONCE_MAX = 100  # transactions over one association
POLL_S = 0.5
_ERROR_S = 5.0
_STOP_S_MAX = 10.0

Carry = Callable[[str, Sequence[Commitment]], None]


class Couriers:
    """`due` lists what may be carried now, `carry` brings some of it to a device and writes down what became
    of it; it raises MissError only where that can't be written down."""

    def __init__(self, name: str, due: Callable[[], list[Commitment]], carry: Carry) -> None:
        self._due = due
        self._carry = carry
        self._changed = threading.Condition()
        self._busy: set[str] = set()
        self._stopping = False
        self._threads = [threading.Thread(target=self._run, name=f"commitment-{name}", daemon=True)
                         for _ in range(COURIERS)]

    @property
    def stopping(self) -> bool:
        """Whether nothing is to be waited for any more."""
        return self._stopping

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """What is under way is finished, if that does not take too long; all else waits in the ledger."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_STOP_S_MAX / COURIERS)

    def wake(self) -> None:
        """Something may be due."""
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stopping:
            if wait_s:
                with self._changed:
                    if not self._stopping:
                        self._changed.wait(wait_s)
            wait_s = POLL_S
            device = ""
            try:
                device, some = self._next()
                if device:
                    self._carry(device, some)
                    wait_s = 0.0
            except MissError as error:
                log.warning("storage commitment waits: %s", error)
                wait_s = _ERROR_S
            except Exception:
                log.exception("storage commitment met an error that it does not know")
                wait_s = _ERROR_S
            finally:
                with self._changed:
                    self._busy.discard(device)

    def _next(self) -> tuple[str, list[Commitment]]:
        """A device that nobody is at, and what is due to it; "" when there is none."""
        found = self._due()
        with self._changed:
            device = next((one.device for one in found if one.device not in self._busy), "")
            if device and not self._stopping:
                self._busy.add(device)
                return device, [one for one in found if one.device == device][:AT_ONCE_MAX]
        return "", []
