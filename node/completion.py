"""Owns when a study is complete, which DICOM never says by itself (IHE RAD SWF.b): when a performed step that
is COMPLETED lists instances and all of them are here; else, a moment after a storage commitment was asked for
it; else, last and said to be so, when nothing came for it for a while.

It follows what the index newly has, in a thread of its own. What was announced is in the ledger; a study that
grows afterwards is announced again. Subscribers hear of each at least once: what was not heard by all when
the node ended is announced again. It never holds up intake, and decides nothing about images."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from archive.errors import MissError
from archive.ledger import Ledger, StudyCompletion
from archive.ledger.performed import IN_PROGRESS
from archive.ledger.worklist import COMPLETED
from archive.model import IndexEntry
from archive.rounds import Rounds

if TYPE_CHECKING:
    from archive.archive import Archive

log = logging.getLogger(__name__)

PERFORMED, COMMITMENT, QUIET = "performed step", "commitment", "quiet"

COMMITMENT_QUIET_S = 15.0   # some ask commitment of each series while the next is still on its way
OPEN_STUDIES_MAX = 100_000  # past them, those that are quiet the longest count as complete
REQUESTS_MAX = 1_000        # for commitment, that are not looked at yet; of older ones, quiet will tell
_TICK_S = 1.0
_RETRY_S = 5.0
_BATCH = 500
_MARGIN_US = 3600 * 1_000_000  # how long a data set may take from its first octet until it is in the index
_FOLLOWED_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class StudyDone:
    """A study is complete, as far as anybody can tell: `why` is "performed step", "commitment" or "quiet"."""

    study_uid: str
    why: str
    at_us: int


@dataclass(slots=True)
class _Open:
    """A study that something came for since it was last announced; times are of `time.monotonic`."""

    moved_s: float
    since_us: int
    committed: bool = False
    look: bool = True  # something came, or a performed step ended: it may be complete now
    retry_s: float = 0.0


class Completion:
    """See the module's docstring. `start` and `stop` make and end its thread."""

    def __init__(self, archive: Archive, ledger: Ledger, *, quiet_s: float, step_timeout_s: float) -> None:
        """`quiet_s` is how long nothing may come; `step_timeout_s` the same while a performed step of the
        study is in progress."""
        self._archive = archive
        self._ledger = ledger
        self._quiet_s = quiet_s
        self._step_timeout_s = step_timeout_s
        self._subscribers: list[Callable[[StudyDone], None]] = []
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()  # the longest quiet first
        self._asked: deque[Sequence[str]] = deque(maxlen=REQUESTS_MAX)
        self._followed_us = 0
        self._noted_s = 0.0
        self._recalled = False
        self._rounds = Rounds("completion", self._go_round, log, retry_s=_RETRY_S)

    def subscribe(self, callback: Callable[[StudyDone], None]) -> None:
        """Have `callback` called, in this part's thread, with every study that is complete. When it raises,
        the study is announced again later; before `start`."""
        self._subscribers.append(callback)

    def start(self) -> None:
        self._archive.watch(self._indexed)
        self._rounds.start()

    def stop(self) -> None:
        self._rounds.stop()

    def performed(self, study_uids: Iterable[str]) -> None:
        """A performed step of these studies ended."""
        with self._lock:
            for uid in study_uids:
                self._at(uid).look = True
        self._rounds.wake()

    def commitment_asked(self, sop_instance_uids: Sequence[str]) -> None:
        """Somebody asked for the storage commitment of these instances; in any thread, and at once."""
        self._asked.append(sop_instance_uids)
        self._rounds.wake()

    @property
    def open_studies(self) -> int:
        """How many studies are not known to be complete."""
        with self._lock:
            return len(self._open)

    def _indexed(self, entries: Sequence[IndexEntry]) -> None:
        """What the index has now; in the indexer's thread, so nothing here waits."""
        with self._lock:
            self._moved(dict.fromkeys(entry.attributes.study_uid for entry in entries))

    def _moved(self, study_uids: Iterable[str]) -> None:
        now_s = time.monotonic()
        for uid in study_uids:
            study = self._at(uid)
            study.moved_s, study.look = now_s, True
            self._open.move_to_end(uid)

    def _at(self, study_uid: str) -> _Open:
        study = self._open.get(study_uid)
        if study is None:
            study = self._open[study_uid] = _Open(time.monotonic(), time.time_ns() // 1000)
        return study

    # The thread

    def _go_round(self) -> float:
        if not self._recalled:
            self._recall()
            self._recalled = True
        self._take_requests()
        self._look()
        self._note_followed()
        return _TICK_S

    def _recall(self) -> None:
        """What came before the node ended, and was not announced."""
        followed_us = self._ledger.completion_followed_us()
        if followed_us is not None:
            recent = self._archive.index.studies_received_since(followed_us - _MARGIN_US)
            for some in _portions(recent):
                known = self._ledger.completions_of(some)
                counts = self._archive.index.instance_counts(some)
                new = [uid for uid in some if uid not in known or known[uid].instances != counts.get(uid)]
                with self._lock:
                    fresh = [uid for uid in new if uid not in self._open]
                    self._moved(fresh)
                    for uid in fresh:
                        self._open[uid].since_us = followed_us  # open since then, for the next start too
        else:  # a node that never looked: what it holds already is nothing new
            self._ledger.note_completion_followed(time.time_ns() // 1000)

    def _take_requests(self) -> None:
        """The studies whose instances somebody asked to be committed."""
        while self._asked:
            self._archive.wait_indexed()  # what is asked for was acknowledged
            found = (self._archive.index.lookup(uid) for uid in self._asked[0])
            studies = {known.study_uid for known in found if known is not None}
            with self._lock:
                for uid in studies:
                    self._at(uid).committed = True
            self._asked.popleft()

    def _look(self) -> None:
        """Announce the studies that are complete now."""
        now_s = time.monotonic()
        looked, due = self._candidates(now_s)
        unlooked = set(looked)
        try:
            for some in _portions([*looked, *(uid for uid in due if uid not in looked)]):
                steps = self._ledger.performed_of(some)
                for uid in some:
                    if self._rounds.stopping.is_set():
                        return
                    why = self._why(steps.get(uid, ()), uid in looked, due.get(uid, ""), uid, now_s)
                    if why:
                        self._announce(uid, why)
                    unlooked.discard(uid)
        finally:  # ledger or index did not answer: nothing may come that has them looked at again
            with self._lock:
                for uid in unlooked & self._open.keys():
                    self._open[uid].look = True

    def _candidates(self, now_s: float) -> tuple[set[str], dict[str, str]]:
        """The studies that a performed step may have completed, and those that time may, with why."""
        looked: set[str] = set()
        due: dict[str, str] = {}
        with self._lock:
            over = len(self._open) - OPEN_STUDIES_MAX
            for number, (uid, study) in enumerate(self._open.items()):
                if study.retry_s > now_s:
                    continue
                if study.look:
                    study.look = False
                    looked.add(uid)
                quiet_s = now_s - study.moved_s
                if study.committed and quiet_s >= COMMITMENT_QUIET_S:
                    due[uid] = COMMITMENT
                elif quiet_s >= self._quiet_s or number < over:
                    due[uid] = QUIET
        return looked, due

    def _why(self, steps: Sequence[tuple[str, str]], look: bool, due: str, uid: str, now_s: float) -> str:
        """Why a study is complete; "" when it is not."""
        if any(state == IN_PROGRESS for _, state in steps):
            with self._lock:
                study = self._open.get(uid)
                waited = study is not None and now_s - study.moved_s >= self._step_timeout_s
            return due if waited else ""
        if look and self._are_here([step for step, state in steps if state == COMPLETED]):
            return PERFORMED
        return due

    def _are_here(self, steps: Sequence[str]) -> bool:
        """Whether these performed steps list instances, and all of them are here."""
        listed: set[str] = set()
        for uid in steps:
            step = self._ledger.performed(uid)
            listed |= set() if step is None else step.instances
        return bool(listed) and all(self._archive.index.lookup(uid) is not None for uid in listed)

    def _announce(self, uid: str, why: str) -> None:
        """Tell the subscribers, then note it, if the study has not been announced as it is."""
        with self._lock:
            study = self._open.get(uid)
            moved_s = None if study is None else study.moved_s
        count = self._archive.index.instance_counts([uid]).get(uid, 0)
        before = self._ledger.completions_of([uid]).get(uid)
        if count and (before is None or before.instances != count):
            done = StudyDone(uid, why, time.time_ns() // 1000)
            if not self._tell(done):
                with self._lock:
                    if (study := self._open.get(uid)) is not None:
                        study.retry_s, study.look = time.monotonic() + _RETRY_S, True
                return
            self._ledger.note_completion(StudyCompletion(uid, why, count, done.at_us))
        with self._lock:
            study = self._open.get(uid)
            if study is not None and study.moved_s == moved_s:
                del self._open[uid]

    def _tell(self, done: StudyDone) -> bool:
        """Whether everybody heard."""
        heard = True
        for callback in self._subscribers:
            try:
                callback(done)
            except MissError as error:
                log.warning("a complete study is announced again later: %s", error)
                heard = False
            except Exception:
                log.exception("a complete study met an error that it does not know")
                heard = False
        return heard

    def _note_followed(self) -> None:
        """From where to look again after a restart: what came before has been announced."""
        now_s = time.monotonic()
        if now_s - self._noted_s < _FOLLOWED_EVERY_S:
            return
        with self._lock:
            oldest_us = min((study.since_us for study in self._open.values()), default=time.time_ns() // 1000)
        if oldest_us != self._followed_us:
            self._ledger.note_completion_followed(oldest_us)
            self._followed_us = oldest_us
        self._noted_s = now_s


def _portions(uids: Sequence[str]) -> Iterable[list[str]]:
    for at in range(0, len(uids), _BATCH):
        yield list(uids[at:at + _BATCH])
