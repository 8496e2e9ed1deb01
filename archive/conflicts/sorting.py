"""Sorts equivalents out of the conflicts, in a thread of an archive's one writer: each content that waits for
a decision is compared once with the live one of its UID, off the path of intake, one pair at a time and no
more than half of the time. What it finds becomes a fact; it takes no decision that is a person's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from archive.conflicts.comparison import CompareLimits, Comparison, compare
from archive.errors import MissError, Unavailable
from archive.index.index import Index
from archive.model import ConflictRow, Fact, FactKind, StoredInstance
from archive.packs.packs import Packs

log = logging.getLogger(__name__)

POLL_S = 1.0
_NOTHING_S = 10.0  # conflicts without a live content stay uncompared: they are not asked for every second
_BATCH = 20
_STOP_S_MAX = 5.0


class Sorter:
    """See the module's docstring. `pressed` says that intake needs the machine."""

    def __init__(
        self,
        index: Index,
        packs: Packs,
        record_facts: Callable[[Sequence[Fact]], None],
        *,
        pressed: Callable[[], bool] = lambda: False,
        limits: CompareLimits | None = None,
    ) -> None:
        self._index = index
        self._packs = packs
        self._record_facts = record_facts
        self._pressed = pressed
        self._limits = limits or CompareLimits(differences_max=1)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sorter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S_MAX)

    def sort(self) -> int:
        """Compare what waits, a batch of it; how many pairs that were."""
        rows = self._index.uncompared(_BATCH)
        equivalents: list[Fact] = []
        compared: list[tuple[str, bytes, bytes]] = []
        for row in rows:
            if self._stopping.is_set() or self._pressed():
                break
            began_s = time.monotonic()
            live = self._index.live(row.sop_instance_uid)
            if live is None or live.digest != row.kept_digest:
                continue  # it was decided meanwhile
            found = compare_contents(
                self._packs, live, row, limits=self._limits, is_stopping=self._stopping.is_set
            )
            if self._stopping.is_set():
                break
            if found.equal:
                equivalents.append(_equivalent(row))
            elif found.undecided:
                log.info("%s was not compared: %s", row.sop_instance_uid, found.undecided)
            compared.append((row.sop_instance_uid, row.kept_digest, row.other_digest))
            self._stopping.wait(time.monotonic() - began_s)
        if equivalents:
            self._record_facts(equivalents)
            log.info("%d contents are the live ones in another encoding: no conflicts", len(equivalents))
        self._index.note_compared(compared)
        return len(compared)

    def _run(self) -> None:
        wait_s = POLL_S
        while not self._stopping.wait(wait_s):
            wait_s = POLL_S
            try:
                if not self._pressed() and self._index.has_uncompared():
                    wait_s = 0.0 if self.sort() else _NOTHING_S
            except Unavailable as error:
                log.warning("conflicts are compared later: %s", error)
                wait_s = _NOTHING_S
            except Exception as error:
                log.error("conflicts are compared later: %s", type(error).__name__)
                wait_s = _NOTHING_S


def compare_contents(
    packs: Packs,
    live: StoredInstance,
    other: ConflictRow,
    *,
    limits: CompareLimits | None = None,
    show: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Compare a kept content with the live one, both read where they lie."""
    try:
        with packs.open_payload(live.location) as first, packs.open_payload(other.location) as second:
            return compare(first, second, limits=limits, show=show, is_stopping=is_stopping)
    except MissError as error:
        return Comparison(undecided=str(error))


def _equivalent(row: ConflictRow) -> Fact:
    """Of this content and the one that it was compared with, whose digest is in the detail."""
    at_us, live = time.time_ns() // 1000, row.kept_digest.hex()
    return Fact(FactKind.EQUIVALENT, row.sop_instance_uid, row.other_digest, row.ward, at_us, live)
