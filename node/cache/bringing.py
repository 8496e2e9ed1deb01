"""Gets studies back that were given up here: those that a reader retrieved from the region meanwhile, once
the reader is done; and those that somebody asks for, at once. Whole studies, over `federation/restoring.py`.

Bounds: 1,000 studies wait, the next is not kept again; a few that somebody waits for at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from archive.archive import Archive
from archive.errors import MissError, OutOfResources, Unavailable
from archive.rounds import Rounds
from archive.uses import Uses
from federation.restoring import Restoring
from node.cache.room import RoomMaker

log = logging.getLogger(__name__)

WAITING_MAX = 1_000
AT_ONCE = 4
QUIET_S = 2.0   # after the last read of it: a reader who fetches it now is not slowed
LOOK_S = 0.5
AWAY_S = 5.0    # when the region is away
PART = 256      # instances after which it is looked whether there still is room
PART_S = 3600.0
NOT_HERE = "no instance of this study was given up here"
NO_REGION = "this node has no line to a region (uplink.enabled)"
NO_ROOM = "there is no room for it above cache.free_percent_high"


@dataclass(frozen=True, slots=True)
class Brought:
    """What came of a study: instances that are whole here again, and those that the region did not give."""

    instances: int
    missing: int


class Bringing:
    """See the module's docstring. `want` and `ask` may be called by any thread."""

    def __init__(
        self,
        archive: Archive,
        restoring: Restoring | None,
        room: RoomMaker,
        uses: Uses,
        *,
        keeps_again: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._archive = archive
        self._restoring = restoring
        self._room = room
        self._uses = uses
        self._keeps_again = keeps_again and restoring is not None
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted: dict[str, float] = {}  # studies, and when they were last read
        self._asked: dict[str, Future[Brought]] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE, "bringing")
        self._rounds = Rounds("bringing", self._look, log, retry_s=AWAY_S)

    def start(self) -> None:
        self._rounds.start()

    def stop(self) -> None:
        self._rounds.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Studies that are to be kept again."""
        return len(self._wanted)

    def want(self, study_uid: str) -> None:
        """A reader fetched a part of it from the region: it is kept again, if there is room. Returns at
        once."""
        if not self._keeps_again:
            return
        with self._lock:
            if study_uid in self._wanted or len(self._wanted) < WAITING_MAX:
                self._wanted[study_uid] = self._clock()

    def ask(self, study_uid: str) -> Future[Brought]:
        """Somebody waits for it: it is brought at once. Asked again meanwhile it is the same answer. Raises
        Unavailable at once where that can't be."""
        if self._restoring is None:
            raise Unavailable(NO_REGION)
        if not self._restoring.is_ready:
            raise Unavailable("the region can't be reached now, and this study's images are there alone")
        self._uses.note(study_uid)
        with self._lock:
            known = self._asked.get(study_uid)
            if known is not None:
                return known
            if len(self._asked) >= WAITING_MAX:
                raise OutOfResources("too many studies are brought back at once")
            future = self._asked[study_uid] = self._pool.submit(self.bring, study_uid, urgent=True)
        # Without the lock: where it has ended by now, this thread forgets it at once.
        future.add_done_callback(lambda _: self._forget(study_uid))
        return future

    def bring(self, study_uid: str, *, urgent: bool) -> Brought:
        """Brings what is missing of a study. Raises Unavailable and OutOfResources; what came by then is
        kept."""
        restoring = self._restoring
        if restoring is None:
            raise Unavailable(NO_REGION)
        self._archive.wait_indexed()
        gone = self._archive.index.cached.evicted_of(study_uid)
        brought = 0
        for start in range(0, len(gone), PART):
            part = gone[start : start + PART]
            if not urgent and not self._room.has_room_for(sum(size for _, _, size in part)):
                raise OutOfResources(NO_ROOM)
            if self._rounds.stopping.is_set():
                raise Unavailable("the node stops")
            keys = [(uid, digest) for uid, digest, _ in part]
            brought += len(restoring.bring_blocking(keys, PART_S, urgent=urgent))
        if brought:
            self._uses.note(study_uid)
            log.info("%d instances of a study are kept here again", brought)
        return Brought(brought, len(gone) - brought)

    def _forget(self, study_uid: str) -> None:
        with self._lock:
            self._asked.pop(study_uid, None)

    def _look(self) -> float:
        restoring = self._restoring
        if restoring is None or not restoring.is_ready:
            return AWAY_S if not self._wanted else LOOK_S
        while not self._rounds.stopping.is_set():
            now_s = self._clock()
            with self._lock:
                study_uid = next((uid for uid, at in self._wanted.items() if now_s - at >= QUIET_S), None)
            if study_uid is None:
                break
            try:
                self.bring(study_uid, urgent=False)
            except OutOfResources as error:
                log.info("a study is not kept again: %s", error)
            except Unavailable:
                raise  # it stays wanted, and is tried again
            except MissError as error:
                log.warning("a study is not kept again: %s", error)
            with self._lock:
                self._wanted.pop(study_uid, None)
        return LOOK_S
