"""Owns routing as a part of a running node: the thread that reads the rules and follows what is stored, and
the workers in which destinations have their turns. It decides nothing: `rulefile.py`, `following.py` and
`router.py` do. Without rules and with an empty queue it asks once a second whether the file is there."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from archive.archive import Archive
from archive.errors import MissError, SettingsError
from archive.ledger import CompleteStudy, Destination, Ledger
from node.routing.following import Following
from node.routing.router import Router, RouterLimits
from node.routing.rulefile import read_rules
from node.routing.rules import DAY_US, Rule, When
from node.routing.senders import Senders
from node.settings import RoutingSettings

log = logging.getLogger(__name__)

FILE_POLL_S = 1.0
MISSING_S = 5.0           # an editor takes a file away and puts another there: that is no end of all rules
LIST_AGAIN_S = 30.0       # destinations that another process put into the queue
TRIM_EVERY_S = 3600.0
RETRY_S = 2.0
COMMIT_POLL_S = 5.0
STOP_GRACE_S = 5.0
_STOP_S_MAX = 60.0


class Routing:
    """See the module's docstring. `start` and `stop` make and end its threads."""

    def __init__(
        self, archive: Archive, ledger: Ledger, ward: str, settings: RoutingSettings, rules: Path,
        senders: Senders, *, clock: Callable[[], int] = lambda: time.time_ns() // 1000,
        chance: random.Random | None = None, commit_poll_s: float = COMMIT_POLL_S,
        on_urgent: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`commit_poll_s` is how often it is looked whether a destination has committed."""
        self._ledger = ledger
        self._settings = settings
        self._file = RulesFile(rules)
        self._senders = senders
        self._clock = clock
        self._following = Following(
            archive, ledger, ward, queue_max=settings.queue_max, clock=clock, on_queued=self._queued,
            on_urgent=on_urgent,
        )
        limits = RouterLimits(
            tries_max=settings.tries_max, backoff_first_s=settings.backoff_first_s,
            backoff_cap_s=settings.backoff_cap_s, commit_poll_s=commit_poll_s,
        )  # fmt: skip
        self._router = Router(ledger, senders, clock, limits, chance or random.Random())
        self._lock = threading.Lock()
        self._destinations: set[Destination] = set()
        self._having_turns: set[Destination] = set()
        self._look = threading.Event()
        self._unread = False  # the file has rules that are not followed yet
        self._stopping = False
        self._pool = ThreadPoolExecutor(settings.destinations_at_once, "routing")
        self._thread = threading.Thread(target=self._run, name="routing", daemon=True)
        self._listed_s = self._trimmed_s = -float("inf")

    def start(self) -> None:
        self._reread()
        if self._settings.rules is not None and not self._file.path.exists():
            log.warning("no routing rules: there is no file %s (routing.rules)", self._file.path)
        self._thread.start()

    def stop(self) -> None:
        """What is under way gets a moment to end; the rest waits in the ledger."""
        self._stopping = True
        self._senders.stop()
        self._look.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S_MAX)
        deadline_s = time.monotonic() + STOP_GRACE_S
        while self._busy() and time.monotonic() < deadline_s:
            self._look.wait(0.05)
            self._look.clear()
        self._senders.cut()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def study_done(self, study_uid: str, why: str, at_us: int) -> None:
        """A study is complete; the rules look at it soon, also after a restart. Any thread may say so."""
        if any(rule.when is When.STUDY_COMPLETE for rule in self._following.rules) or self._file.broken:
            self._ledger.note_complete(CompleteStudy(study_uid, why, at_us))
            self._look.set()

    def changed(self) -> None:
        """A person queued something, or wants something tried now. Any thread may say so."""
        for state in self._ledger.destinations_of_routes():
            self._router.wake(state.to, at_once=True)
        self._listed_s = -float("inf")
        self._look.set()

    # The thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                more = self._step()
                pause_s = 0.0 if more else self._pause_s()
            except MissError as error:
                log.warning("routing waits: %s", error)
                pause_s = RETRY_S
            except Exception:
                log.exception("routing met an error that it does not know")
                pause_s = RETRY_S
            if pause_s:
                self._look.wait(pause_s)
                self._look.clear()
        try:
            self._following.write_marks()
        except MissError as error:
            log.warning("how far the rules have looked is not written: %s", error)

    def _step(self) -> bool:
        self._reread()
        more = False
        if self._following.rules:
            more = self._following.step()
        if not self._file.broken:
            more = self._following.complete() or more
        now_s = time.monotonic()
        if now_s - self._listed_s >= LIST_AGAIN_S:
            self._queued({state.to for state in self._ledger.destinations_of_routes()})
            self._listed_s = now_s
        if now_s - self._trimmed_s >= TRIM_EVERY_S:
            self._trimmed_s = now_s
            while self._ledger.trim_sent(self._clock() - int(self._settings.remember_days * DAY_US)):
                if self._stopping:
                    break
        self._give_turns()
        return more and not self._stopping

    def _pause_s(self) -> float:
        return self._settings.poll_s if self._following.rules or self._destinations else FILE_POLL_S

    def _reread(self) -> None:
        self._unread = self._file.changed() or self._unread
        if not self._unread:
            return
        rules, had_rules = self._file.rules, bool(self._following.rules)
        self._following.use(rules)
        self._unread = False
        self._router.use_hours({rule.name: rule.hours for rule in rules if rule.hours is not None})
        if rules or had_rules or self._file.path.exists():
            log.info("%d routing rules from %s", len(rules), self._file.path)

    # Turns

    def _queued(self, to: set[Destination]) -> None:
        with self._lock:
            self._destinations |= to
        for one in to:
            self._router.wake(one)

    def _give_turns(self) -> None:
        with self._lock:
            due = [to for to in self._destinations - self._having_turns if self._router.is_due(to)]
            self._having_turns |= set(due)
        for to in sorted(due):
            self._pool.submit(self._turns, to)

    def _turns(self, to: Destination) -> None:
        """Turns for one destination as long as there is something to do."""
        try:
            while not self._stopping and self._router.turn(to):
                pass
        except MissError as error:
            log.warning("%s: %s", to, error)
        except Exception:
            log.exception("a turn for %s met an error that it does not know", to)
        finally:
            with self._lock:
                self._having_turns.discard(to)
            self._look.set()

    def _busy(self) -> bool:
        with self._lock:
            return bool(self._having_turns)


class RulesFile:
    """The file of rules, read again when it changes. One that can't be used leaves the rules as they were."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = False  # what is there can't be used
        self._rules: tuple[Rule, ...] = ()
        self._seen: tuple[int, int, int] | None = None
        self._looked_s = -float("inf")
        self._missing_since_s: float | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self._rules

    def changed(self) -> bool:
        """Whether there are other rules than there were; asks the disk once a second at most."""
        now_s = time.monotonic()
        if now_s - self._looked_s < FILE_POLL_S:
            return False
        first, self._looked_s = self._looked_s < 0, now_s
        try:
            there = self.path.stat()
        except OSError:
            return self._is_gone(now_s, first)
        self._missing_since_s = None
        seen = (there.st_mtime_ns, there.st_size, there.st_ino)
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            self._rules = read_rules(self.path)
        except SettingsError as error:
            self.broken = True
            log.error("the routing rules stay as they were; %s", error)
            return False
        self.broken = False
        return True

    def _is_gone(self, now_s: float, first: bool) -> bool:
        if self._missing_since_s is None:
            self._missing_since_s = now_s
        if not first and now_s - self._missing_since_s < MISSING_S:
            return False
        gone = first or self._seen is not None
        self._seen, self._rules, self.broken = None, (), False
        return gone
