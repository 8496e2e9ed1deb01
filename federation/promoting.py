"""Reading promotes, as a reader of the region sees it: the instances of a study are those of the regional
archive and those that wards hold alone, which come because somebody reads them.

The wards that are known to have a backlog are asked first, then the region's index is read: what moves in
between is seen. What they list is given at once as `Awaited`; each can be read as soon as it is here, and a
large one while it arrives. A ward that does not answer costs its deadline, and is said to be lacking: so is
one that is away, where the region has a part of the study from it. Nothing short passes for whole.

Bounds: 64 conversations with the hub at once, which readers share, each over when all has arrived or
nothing more comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO

from archive.archive import Archive
from archive.errors import MissError, NotFound, Unavailable
from archive.ledger import Ledger, WardState
from archive.model import Scope, StoredInstance
from archive.packs.records import part10_prefix
from federation.coverage import CoverageState, is_present, is_worth_asking
from federation.gathering import Awaited, Coming, Found, awaited
from federation.policy import Act, Principal, require
from federation.source import WardsPart

log = logging.getLogger(__name__)

PROMOTE_DEADLINE_S = 60.0
PASSED_ON_BYTES_MIN = 4 << 20  # smaller ones are waited for and read where they lie
CHUNK_BYTES = 1 << 20
WHOLE_S = 2.0  # so long what wards listed of a study is not asked for again
WHOLE_MAX = 1_000
CONVERSATIONS_MAX = 64
AWAY = "a ward that holds part of this study is away"
NOBODY_CAN_TELL = "it is not in the region, and a ward that may have it is away or does not answer now"

_Key = tuple[str, str, str, str, str]


class Promoting:
    """Instances to read, at hand or on their way. Thread-safe."""

    def __init__(
        self,
        archive: Archive,
        ledger: Ledger,
        hub: WardsPart,
        clock: Callable[[], int],
        deadline_s: float = PROMOTE_DEADLINE_S,
    ) -> None:
        self._archive = archive
        self._ledger = ledger
        self._hub = hub
        self._clock = clock
        self._deadline_s = deadline_s
        self._whole = _Recently()
        self._comings: dict[_Key, tuple[float, Coming]] = {}  # and when the wards were asked
        self._running: list[Coming] = []
        self._lock = threading.Lock()

    def at_hand(
        self, principal: Principal, study_uid: str, series_uid: str | None, sop_instance_uid: str | None
    ) -> Found | None:
        """As far as nobody has to be asked; None when a ward may hold more of it."""
        scope = require(principal, Act.READ)
        states = self._ledger.ward_states()
        elsewhere = not self._whole.has(_whose(principal, study_uid)) and any(
            is_worth_asking(state, self._clock()) for _, state in _within(scope, states)
        )
        found = self._archive.instances(study_uid, series_uid, sop_instance_uid, scope=scope)
        if found and sop_instance_uid is not None:
            return Found(found)  # an instance is whole or not here: nothing to wait for
        if elsewhere:
            return None
        away = self._away(scope, states)
        if found:
            return Found(found, lacking=_lacking(found, away, states))
        if away:
            # The same for every UID, known or not: it says that nobody can tell.
            raise Unavailable(NOBODY_CAN_TELL)
        raise NotFound("no such study, series or instance")

    def instances(
        self, principal: Principal, study_uid: str, series_uid: str | None, sop_instance_uid: str | None
    ) -> Found:
        found = self.at_hand(principal, study_uid, series_uid, sop_instance_uid)
        if found is not None:
            return found
        scope = require(principal, Act.READ)
        coming = self._coming(principal, study_uid, sop_instance_uid)
        here = self._archive.instances(study_uid, series_uid, sop_instance_uid, scope=scope)
        known = {one.head.sop_instance_uid for one in here}
        listed = [
            held.instance
            for held in coming.listed
            if scope.allows(held.ward)
            and series_uid in (None, held.instance.series_uid)
            and sop_instance_uid in (None, held.instance.head.sop_instance_uid)
            and held.instance.head.sop_instance_uid not in known
        ]
        rest = {
            one.head.sop_instance_uid: awaited(one, coming)
            for one in self._archive.index.corrections.over(listed)
        }
        states = self._ledger.ward_states()
        away = self._away(scope, states)
        if not here and not rest:
            if coming.complete and not away:
                raise NotFound("no such study, series or instance")
            raise Unavailable(NOBODY_CAN_TELL)
        lacking = "" if coming.complete else _words(coming)
        both = [*here, *rest.values()]
        lacking = lacking or _lacking(both, away, states)
        return Found(sorted(both, key=_order) if rest else both, lacking=lacking)

    def arrived(self, instance: StoredInstance) -> StoredInstance:
        if not isinstance(instance, Awaited):
            return instance
        uid = instance.head.sop_instance_uid
        own = Scope(frozenset({instance.head.provenance.ward}))

        def found() -> list[StoredInstance]:
            return self._archive.instances(instance.study_uid, instance.series_uid, uid, scope=own)

        here = found()
        if not here:
            instance.coming.wait(uid, self._deadline_s)
            here = found()
        if not here:
            raise Unavailable("it did not arrive as it was promised")
        return here[0]

    def passing(self, principal: Principal, instance: StoredInstance) -> Iterator[bytes]:
        size = instance.location.length - instance.location.dataset_offset
        # One that is corrected is read when it has arrived: what passes passes as it came.
        is_plain = instance.corrections is None
        if isinstance(instance, Awaited) and is_plain and size >= PASSED_ON_BYTES_MIN:
            yield part10_prefix(instance.head)
            yield from self._hub.passing(principal, instance)
            return
        with self.open_payload(instance) as payload:
            while chunk := payload.read(CHUNK_BYTES):
                yield chunk

    def open_payload(self, instance: StoredInstance) -> BinaryIO:
        return self._archive.open_instance(self.arrived(instance))

    def _coming(self, principal: Principal, study_uid: str, sop_instance_uid: str | None) -> Coming:
        """What the hub says of it: one conversation for a reader and a study for a moment, for an instance as
        long as it is on its way."""
        whose = (*_whose(principal, study_uid), principal.user, principal.role.value)
        with self._lock:
            self._running = [coming for coming in self._running if not coming.over]
            self._comings = {key: one for key, one in self._comings.items() if not one[1].over}
            for uid in dict.fromkeys((sop_instance_uid or "", "")):
                asked_s, running = self._comings.get((*whose, uid), (0.0, None))
                if running is None:
                    continue
                if sop_instance_uid is None:
                    fresh = time.monotonic() - asked_s < WHOLE_S
                else:
                    fresh = _lists(running, sop_instance_uid)
                if fresh:
                    return running
            full = len(self._running) >= CONVERSATIONS_MAX
        if full:
            log.warning("more than %d studies are fetched at once", CONVERSATIONS_MAX)
            return Coming(complete=False)
        try:
            coming = self._hub.gather(principal, study_uid, sop_instance_uid, self._deadline_s)
        except MissError as error:
            log.warning("the hub does not promote: %s", error)
            return Coming(complete=False)
        for one in coming.coverage:
            if one.state is CoverageState.INCOMPLETE:
                log.info("a study is read while %s is incomplete: %s", one.ward, one.reason)
        if coming.over and coming.complete and sop_instance_uid is None:
            self._whole.add(_whose(principal, study_uid))
        if not coming.over:
            with self._lock:
                self._comings[(*whose, sop_instance_uid or "")] = time.monotonic(), coming
                self._running.append(coming)
        return coming

    def _away(self, scope: Scope, states: Mapping[str, WardState]) -> frozenset[str]:
        """The wards in the scope that may hold what the region lacks and can't be asked."""
        now_us = self._clock()
        return frozenset(
            ward
            for ward, state in _within(scope, states)
            if state.seen_us and not is_present(state, now_us)
        )


class _Recently:
    """The studies that were found whole a moment ago: a viewer asks for the same one many times a second."""

    def __init__(self) -> None:
        self._at_s: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._at_s.pop(key, None)
            self._at_s[key] = time.monotonic()
            while len(self._at_s) > WHOLE_MAX:
                self._at_s.popitem(last=False)

    def has(self, key: tuple[str, str]) -> bool:
        with self._lock:
            return time.monotonic() - self._at_s.get(key, -WHOLE_S) < WHOLE_S


def _within(scope: Scope, states: Mapping[str, WardState]) -> list[tuple[str, WardState]]:
    return [(ward, state) for ward, state in states.items() if scope.allows(ward)]


def _whose(principal: Principal, study_uid: str) -> tuple[str, str]:
    return principal.ward or "", study_uid


def _lists(coming: Coming, uid: str) -> bool:
    return any(held.instance.head.sop_instance_uid == uid for held in coming.listed)


def _lacking(
    found: Sequence[StoredInstance], away: frozenset[str], states: Mapping[str, WardState]
) -> str:
    """Whether a ward that has sent some of it is away, and still held something alone as it left."""
    short = {ward for ward in away if states[ward].pending > 0}
    return AWAY if any(one.head.provenance.ward in short for one in found) else ""


def _words(coming: Coming) -> str:
    lacking = [one for one in coming.coverage if one.state is CoverageState.INCOMPLETE]
    return "; ".join(f"{one.title}: {one.reason}" for one in lacking) or "the hub does not answer"


def _order(instance: StoredInstance) -> tuple[str, bool, int, str]:
    """As an index lists: by series, number (none first) and UID."""
    try:
        number = int(instance.instance.get("InstanceNumber", ""))
    except ValueError:
        return instance.series_uid, False, 0, instance.head.sop_instance_uid
    return instance.series_uid, True, number, instance.head.sop_instance_uid
