"""Owns the cache as a part of a running node: its threads, what they note for people, and the orders by which
a command and the ward's portal have studies pinned and brought back. What goes and what comes is decided in
the modules beside it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from archive.archive import Archive
from archive.errors import MissError, NotFound
from archive.ledger import Ledger
from archive.model import StoredInstance, require_uid
from archive.orders import Handler
from archive.rounds import Rounds
from archive.space.upkeep import answer_of
from archive.uses import Uses
from federation.bringing_orders import BRING
from federation.line import RegionPolicy
from federation.restoring import Restoring
from node.cache.bringing import NOT_HERE, Bringing, Brought
from node.cache.policy import Room
from node.cache.prefetching import LOOK_S, Prefetching, RegionView
from node.cache.room import RoomMaker
from node.cache.rules import RulesFile
from node.settings import CacheSettings

log = logging.getLogger(__name__)

NOTE = "cache"
NOTE_S = 60.0
FLUSH_S = 30.0
FORGET_S = 86_400.0
RETRY_S = 5.0
ANSWER_S = 15.0  # the other orders wait for as long as that
OFF = "cache.evicts is off"


class Cache:
    """See the module's docstring. `start` and `stop` make and end its threads. `policy` is what the region
    laid down last, `held` says that nothing may be given up now."""

    def __init__(
        self,
        archive: Archive,
        ledger: Ledger,
        settings: CacheSettings,
        rules: RulesFile,
        *,
        ward: str,
        issuer: str,
        restoring: Restoring | None = None,
        window: RegionView | None = None,
        policy: Callable[[], RegionPolicy | None] = lambda: None,
        held: Callable[[], bool] = lambda: False,
        room: Callable[[], Room] | None = None,
        clock: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._archive = archive
        self._ledger = ledger
        self._settings = settings
        self._rules = rules
        self._clock = clock
        self._rounds = Rounds("cache", self._look, log, retry_s=RETRY_S)
        self._fetching = Rounds("prefetch", self._prefetch, log, retry_s=LOOK_S, first_s=RETRY_S)
        self._uses = Uses(ledger, clock)
        self.room = RoomMaker(
            archive, ledger, settings, rules, self._uses,
            protected_to_us=lambda: None if (said := policy()) is None else said.protected_to_us,
            held=held, room=room or (lambda: room_of(archive)), clock=clock,
            stopping=self._rounds.stopping.is_set,
        )  # fmt: skip
        self.bringing = Bringing(archive, restoring, self.room, self._uses, keeps_again=settings.keeps_again)
        self.prefetching = Prefetching(
            archive, ledger, rules, self.bringing, self.room, window, ward=ward, issuer=issuer, clock=clock,
            stopping=self._fetching.stopping.is_set,
        )  # fmt: skip
        self._noted_s = -NOTE_S
        self._noted = ""
        self._forgot_s = time.monotonic()
        self._rules_error = ""

    def start(self) -> None:
        self._rounds.start()
        self.bringing.start()
        self._fetching.start()

    def stop(self) -> None:
        self._fetching.stop()
        self.bringing.stop()
        self._rounds.stop()
        try:
            self._uses.flush()
        except MissError as error:
            log.warning("when studies were last wanted is not kept: %s", error)

    def read(self, instance: StoredInstance) -> None:
        """An instance was opened to be sent. Waits for nothing."""
        self._uses.note(instance.study_uid)
        if instance.evicted:
            self.bringing.want(instance.study_uid)

    # Rounds

    def _look(self) -> float:
        self._look_at_rules()
        try:
            if self._settings.evicts:
                self.room.look()
        finally:
            self._uses.flush_if_due(FLUSH_S)
            self._note()
        if time.monotonic() - self._forgot_s >= FORGET_S:
            self._forgot_s = time.monotonic()
            self._uses.forget()
        return self._settings.look_s

    def _prefetch(self) -> float:
        self.prefetching.look()
        return LOOK_S

    def _look_at_rules(self) -> None:
        self._rules.look()
        if self._rules.error != self._rules_error:
            self._rules_error = self._rules.error
            if self._rules_error:
                log.error("the cache's rules are not taken, the last ones count: %s", self._rules_error)

    def _note(self) -> None:
        """How it stands, for `miss cache` and `miss node status`; when it changed, and now and then."""
        made, prefetched, survey = self.room.made, self.prefetching.last, self.room.survey
        key = repr((made, prefetched, self._rules_error))
        now_s = time.monotonic()
        if key == self._noted and now_s - self._noted_s < NOTE_S:
            return
        if now_s - self._noted_s < min(NOTE_S, 1.0):
            return
        self._noted, self._noted_s = key, now_s
        why_not = made.why_not or (self.room.why_not() or "" if self._settings.evicts else OFF)
        totals = self._archive.index.cached.totals()
        self._ledger.note_cache(NOTE, json.dumps({
            **asdict(totals),
            "evictable_bytes": None if survey is None else survey.evictable_bytes,
            "pinned_bytes": None if survey is None else survey.pinned_bytes,
            "last_eviction_us": made.at_us, "last_instances": made.instances, "last_bytes": made.bytes,
            "why_not": why_not, "waiting": self.bringing.waiting, "prefetched": asdict(prefetched),
            "rules_error": self._rules_error,
        }), self._clock())  # fmt: skip

    # Orders

    def handlers(self) -> dict[str, Handler]:
        """What is asked by a command, or the ward's portal."""
        return {BRING: self._bring}

    def _bring(self, detail: Mapping[str, str], by: str) -> str:
        study_uid = require_uid(detail.get("study", ""), "the study")
        if not self._archive.index.instance_counts([study_uid]):
            raise NotFound("there is no such study at this node")
        future = self.bringing.ask(study_uid)
        if "at_once" in detail:
            return "it is being brought back"
        brought = answer_of(future, ANSWER_S)
        return "it goes on; `miss cache ls` shows how far it is" if brought is None else _words(brought)


def room_of(archive: Archive) -> Room:
    """The disk under an archive."""
    found = os.statvfs(archive.settings.state)
    return Room(archive.free_bytes(), found.f_blocks * found.f_frsize)


def _words(brought: Brought) -> str:
    if not brought.instances and not brought.missing:
        return NOT_HERE
    words = f"{brought.instances} instances are here again"
    return f"{words}; {brought.missing} the region did not give" if brought.missing else words
