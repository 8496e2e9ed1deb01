"""How the ward's own portal has a node bring back what was given up there: the portal is another process,
which reads the node's archive and asks nothing of the network. It places an order in the node's ledger, as a
command does, and sees in the index when the bytes are here again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence

from archive.archive import Archive
from archive.errors import Evicted, MissError, Unavailable
from archive.ledger import Ledger
from archive.model import StoredInstance
from archive.uses import Uses

BRING = "bring back"
BY = "portal"
WAIT_S = 60.0      # for what a reader asked for; what came by then is shown
ANSWER_S = 10.0    # for the node to take the order
POLL_S = 0.1
ORDER_AGAIN_S = 30.0
STUDIES_MAX = 1_000  # whose last order is remembered
NOT_RUNNING = "given up here to make room, and the node that would fetch it from the region does not run"


class NodeReader:
    """What a portal over one node does when somebody reads a study: it is noted as wanted, and what was given
    up of it is brought back. Safe to use from any thread."""

    def __init__(self, archive: Archive, ledger: Ledger) -> None:
        self._archive = archive
        self._ledger = ledger
        self._uses = Uses(ledger)
        self._lock = threading.Lock()
        self._ordered: dict[str, float] = {}

    def read(self, study_uid: str) -> None:
        """It is read, and here."""
        self._uses.note(study_uid)
        with contextlib.suppress(MissError):  # it is written with the next batch
            self._uses.flush_if_due()

    def bring(self, wanted: Sequence[StoredInstance]) -> None:
        """Returns when these instances of one study are here, or after a while; the others of the study come
        too. Raises Evicted, which says why, where they can't be had."""
        study_uid = wanted[0].study_uid
        order_id = self._order(study_uid)
        until_s, answer_until_s = time.monotonic() + WAIT_S, time.monotonic() + ANSWER_S
        while not self._are_here(wanted):
            if order_id:
                answer = self._ledger.order_answer(order_id)
                if answer is not None and not answer[0]:
                    self._forget(study_uid)
                    raise Evicted(f"its images were given up here to make room: {answer[1]}")
                if answer is None and time.monotonic() > answer_until_s:
                    self._forget(study_uid)
                    raise Evicted(NOT_RUNNING)
            if time.monotonic() > until_s:
                return
            time.sleep(POLL_S)

    def _order(self, study_uid: str) -> str:
        """The order's id; "" while another reader's order for the study is fresh."""
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._ordered.get(study_uid, -ORDER_AGAIN_S) < ORDER_AGAIN_S:
                return ""
            if len(self._ordered) >= STUDIES_MAX:
                self._ordered.clear()
            self._ordered[study_uid] = now_s
        try:
            return self._ledger.place_order(BRING, {"study": study_uid, "at_once": "yes"}, BY)
        except MissError as error:
            self._forget(study_uid)
            raise Unavailable(f"it can't be brought back now: {error}") from error

    def _forget(self, study_uid: str) -> None:
        with self._lock:
            self._ordered.pop(study_uid, None)

    def _are_here(self, wanted: Sequence[StoredInstance]) -> bool:
        places = self._archive.index.places(one.head.sop_instance_uid for one in wanted)
        return all(
            (place := places.get((one.head.sop_instance_uid, one.digest))) is None or not place.evicted
            for one in wanted
        )
