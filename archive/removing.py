"""What people decide about removals: that something is no longer shown, that this is undone, that its bytes
go for good. Each is a fact, synced before it counts. Handlers of orders (`archive/orders.py`), safe to
repeat, and the round that purges what was removed long enough ago.

Hiding keeps the bytes and may be undone, so a rejection is always taken; what means deletion is refused
inside retention, when it is asked for and again when it is carried out. Each side keeps by its own settings:
the region gives back what a ward purged only when its own retention lets it, and what the region purged a
ward gives back without asking.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from archive.archive import Archive
from archive.errors import InvalidInput, NotFound, Unavailable
from archive.index.index import Index
from archive.index.removed import Tombstone
from archive.model import Fact, Level, Query, StoredInstance, require_uid
from archive.removals import (
    BY_CHARS_MAX,
    CODES,
    DELETES,
    REASON_CHARS_MAX,
    Purge,
    Removal,
    Restoration,
    fact_of,
    fact_of_purge,
    fact_of_restoration,
    new_order,
    removal_id,
)
from archive.retention import RemovalSettings, RetentionSettings
from archive.space.pace import Pace
from archive.space.purging import Purged
from archive.space.upkeep import answer_of

log = logging.getLogger(__name__)

REMOVE, UNDO, PURGE = "remove", "remove-undo", "remove-purge"
ID_DIGITS_MIN = 8
OF_ONE_ORDER_MAX = 100_000
ANSWER_S = 20.0
_ROUND_MAX = 1_000  # removals that one round looks at
_LOOK_AGAIN_US = 86_400 * 1_000_000
_BATCH_FACTS = 5_000
_WORDS = {"study": Level.STUDY, "series": Level.SERIES, "instance": Level.IMAGE}


class Removing:
    """Removals in one archive, which this process writes, decided in the name of `ward`, "" for the region.
    `held` is asked before anything of a study is deleted: whether it has to stay for another reason."""

    def __init__(
        self, archive: Archive, ward: str, *, clock: Callable[[], int] = lambda: time.time_ns() // 1000,
        held: Callable[[str], bool] = lambda study_uid: False,
    ) -> None:  # fmt: skip
        self._archive = archive
        self._ward = ward
        self._clock = clock
        self._held = held
        self._kept_until: dict[str, int] = {}  # by removal: when to look at it again

    @property
    def _retention(self) -> RetentionSettings:
        return self._archive.settings.retention

    @property
    def _settings(self) -> RemovalSettings:
        return self._archive.settings.removal

    # What is asked

    def remove(self, detail: Mapping[str, str], by: str) -> str:
        """`level`, `uid`, `reason`; perhaps `code`. Raises InvalidInput, inside retention too."""
        level, uid = _WORDS.get(detail.get("level", "")), require_uid(detail.get("uid", ""), "what to remove")
        reason, code = detail.get("reason", "").strip(), detail.get("code", "")
        if level is None:
            raise InvalidInput("say what to remove: a study, a series or an instance")
        if not reason:
            raise InvalidInput("say why: a reason is kept with every removal")
        if len(reason) > REASON_CHARS_MAX:
            raise InvalidInput(f"a reason has at most {REASON_CHARS_MAX} characters")
        if code and code not in CODES:
            raise InvalidInput(f"no such code; there are {', '.join(CODES)}")
        self._archive.wait_indexed()
        study_uid, shown = self._shown(level, uid)
        known = self._archive.index.removals(uid=uid, in_force=True)
        if known and not shown:
            return f"{uid} is removed already, as {known[0].removal.order}"
        if code in DELETES:
            self._require_free(shown)
        now_us = self._clock()
        removal = Removal(
            removal_id(new_order(), uid), level, uid, study_uid, code, by[:BY_CHARS_MAX], reason, now_us,
            self._ward,
        )  # fmt: skip
        words = self._record([fact_of(removal)])
        log.info("%s: removed, as %s decided", uid, by)
        until = _day(now_us + int(self._settings.undo_days * 86_400e6))
        return (f"{removal.order}: {len(shown)} instances are no longer shown; "
                f"`miss remove undo {removal.order}` brings them back, until they are purged "
                f"({until} at the soonest){words}")  # fmt: skip

    def undo(self, detail: Mapping[str, str], by: str) -> str:
        """`id`, or its beginning: of one removal, of all of a note. Raises NotFound, InvalidInput."""
        found = self._named(detail)
        if all(not one.in_force for one in found):
            return f"{found[0].removal.order} was undone already"
        open_ones = [one for one in found if one.in_force]
        free = [one for one in open_ones if not one.purged or (not self._ward and not one.final)]
        if not free:
            raise InvalidInput(f"{found[0].removal.order} is purged: its bytes are given back")
        now_us = self._clock()
        words = self._record([
            fact_of_restoration(Restoration(one.removal.id, one.removal.uid, by[:BY_CHARS_MAX], now_us,
                                            self._ward))
            for one in free
        ])  # fmt: skip
        log.info("%d removals are undone, as %s decided", len(free), by)
        stay = len(open_ones) - len(free)
        more = f"; {stay} are purged and stay so" if stay else ""
        return f"{found[0].removal.order} is undone: {len(free)} removals no longer count{more}{words}"

    def purge(self, detail: Mapping[str, str], by: str) -> str:
        """`id`, or its beginning. Raises NotFound; InvalidInput inside retention."""
        found = [one for one in self._named(detail) if one.in_force]
        if not found:
            raise InvalidInput("this removal was undone: there is nothing to purge")
        fresh = [one for one in found if not one.purged or (not self._ward and not one.final)]
        for one in fresh:
            until_us = self._kept(one)
            if until_us > self._clock():
                raise InvalidInput(f"inside retention, until {_day(until_us)}: it stays hidden and is kept")
        words = self._record([self._fact_of_purge(one, by) for one in fresh])
        log.info("%d removals are purged, as %s decided", len(fresh), by)
        done = answer_of(self._archive.upkeep.work(lambda pace: self._give_back(found, pace)), ANSWER_S)
        if done is None:
            return f"{found[0].removal.order} is purged; its bytes are being given back{words}"
        return f"{found[0].removal.order} is purged: {_purged_words(done)}{words}"

    # What goes by itself

    def look(self, pace: Pace) -> Purged:
        """One round: purge what was removed long enough ago, and give back what facts that came purged."""
        now_us = self._clock()
        before_us = now_us - int(self._settings.undo_days * 86_400e6) if self._settings.purges else 0
        due = [one for one in self._archive.index.removals_due(before_us, _ROUND_MAX)
               if self._kept_until.get(one.removal.id, 0) <= now_us]  # fmt: skip
        going: list[Tombstone] = []
        for one in due:
            if one.final or (one.purged and one.purged_ward == self._ward):
                going.append(one)
                continue
            until_us = self._kept(one)
            if until_us > now_us:
                if len(self._kept_until) > OF_ONE_ORDER_MAX:
                    self._kept_until.clear()
                self._kept_until[one.removal.id] = min(until_us, now_us + _LOOK_AGAIN_US)
            elif one.purged and self._ward:
                going.append(one)  # another ward purged it, and nothing here says otherwise
            else:
                self._record([self._fact_of_purge(one, "the end of the undo window")])
                going += [now for now in self._of(one.removal.id) if now.purged]
        return self._give_back(going, pace)

    def _give_back(self, tombstones: Iterable[Tombstone], pace: Pace) -> Purged:
        done = Purged()
        for tombstone in tombstones:
            for one in self._of(tombstone.removal.id):
                if one.purged:
                    each = self._archive.upkeep.purging.purge(one, pace)
                    done.contents += each.contents
                    done.bytes += each.bytes
                    done.unreadable += each.unreadable
        return done

    # What is there

    def _of(self, removal: str) -> list[Tombstone]:
        return self._archive.index.removals(2, prefix=removal)

    def _named(self, detail: Mapping[str, str]) -> list[Tombstone]:
        self._archive.wait_indexed()
        return named(self._archive.index, detail.get("id", ""))

    def _shown(self, level: Level, uid: str) -> tuple[str, list[StoredInstance]]:
        """The study of what is to be removed, and its instances that are shown now."""
        if level is Level.STUDY:
            return uid, self._archive.index.instances(uid)
        keyword = "SeriesInstanceUID" if level is Level.SERIES else "SOPInstanceUID"
        found = self._archive.index.search(Query(level, ((keyword, uid),)))
        studies = sorted({match.study["StudyInstanceUID"] for match in found})
        shown = [
            one
            for study_uid in studies
            for one in self._archive.index.instances(
                study_uid, *((uid, None) if level is Level.SERIES else (None, uid))
            )
        ]
        return (studies[0] if len(studies) == 1 else ""), shown

    def _require_free(self, shown: Iterable[StoredInstance]) -> None:
        """Raises InvalidInput when something of it has to be kept."""
        described = self._archive.index.described([one.head.sop_instance_uid for one in shown])
        until_us = 0
        for one in described:
            if self._held(one.stored.study_uid):
                raise InvalidInput("it is held: nothing of it is deleted")
            ends = self._retention.ends_us(one.fields, one.stored.head.provenance.received_at_us)
            until_us = max(until_us, ends)
        if until_us > self._clock():
            raise InvalidInput(f"inside retention, until {_day(until_us)}; to hide it, give the code of a "
                               f"rejection: {', '.join(code for code in CODES if code not in DELETES)}")

    def _kept(self, tombstone: Tombstone) -> int:
        """Until when retention keeps what a removal covers; read from the bytes, since what was removed has
        no row that says it."""
        until_us = 0
        for one in self._archive.index.removed_under(tombstone.removal, OF_ONE_ORDER_MAX, kept=True):
            if self._held(one.study_uid):
                return 1 << 62
            found = self._archive.index.read_attributes(one.record)
            received_at_us = one.record.head.provenance.received_at_us
            until_us = max(until_us, self._retention.until_us(found, received_at_us))
        return until_us

    def _fact_of_purge(self, tombstone: Tombstone, by: str) -> Fact:
        removal = tombstone.removal
        return fact_of_purge(Purge(removal.id, removal.uid, by[:BY_CHARS_MAX], self._clock(), self._ward))

    def _record(self, facts: list[Fact]) -> str:
        try:
            for start in range(0, len(facts), _BATCH_FACTS):
                self._archive.record_facts(facts[start : start + _BATCH_FACTS])
        except Unavailable:
            return "; the index does not answer and follows later"
        return ""


def named(index: Index, start: str) -> list[Tombstone]:
    """The removals of the one order whose id begins so. Raises NotFound, InvalidInput."""
    start = start.strip().lower()
    if len(start) < ID_DIGITS_MIN or not all(char in "0123456789abcdef" for char in start):
        raise InvalidInput(f"name a removal by {ID_DIGITS_MIN} digits or more of its id (`miss remove ls`)")
    found = index.removals(OF_ONE_ORDER_MAX, prefix=start)
    if not found:
        raise NotFound("no removal's id begins with these digits")
    if len({one.removal.order for one in found}) > 1:
        raise InvalidInput("several removals' ids begin with these digits: give more of them")
    return found


def _purged_words(done: Purged) -> str:
    words = f"{done.contents} contents, {done.bytes} bytes are given back"
    return words + (f"; {done.unreadable} could not be found" if done.unreadable else "")


def _day(at_us: int) -> str:
    if at_us >= 1 << 61:
        return "it is released"
    return datetime.fromtimestamp(at_us / 1e6, UTC).strftime("%Y-%m-%d")
