"""Owns how the rules come to know of what is stored: they follow the packs behind the index, each from where
it stopped, and queue what they take, or mark it urgent for the region. It is beside intake, never in its way,
and sends nothing.

A rule's mark (how far it has looked) moves in the transaction that queues what it found. A mark that found
nothing is written now and then: what is looked at again is in the queue or was sent, and is not queued twice.
A rule of which a destination has no room stops where it is, while the others go on; it goes on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby, islice

from archive.archive import Archive
from archive.index.described import Described
from archive.ledger import CompleteStudy, Destination, Ledger, Routed, RuleMark
from archive.model import START, Position, Record, RecordKind
from archive.packs.recovery import Damage
from node.routing.rules import Rule, When

BATCH_RECORDS = 500
STUDIES_AT_ONCE = 1000
MARK_EVERY_US = 5_000_000
NOTICED_US = 60_000_000  # a clock that was set back is noticed within that


class Following:
    """See the module's docstring. One thread uses it."""

    def __init__(
        self, archive: Archive, ledger: Ledger, ward: str, *, queue_max: int, clock: Callable[[], int],
        on_queued: Callable[[set[Destination]], None] = lambda to: None,
        on_urgent: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`on_urgent` is told that the region is to have something before everything else."""
        self._archive = archive
        self._ledger = ledger
        self._ward = ward
        self._queue_max = queue_max
        self._clock = clock
        self._on_queued = on_queued
        self._on_urgent = on_urgent
        self._rules: tuple[Rule, ...] = ()
        self._marks: dict[str, RuleMark] = {}
        self._unwritten: set[str] = set()
        self._written_us = 0
        self._seen: tuple[bytes, Position] | None = None
        self._full: dict[str, frozenset[Destination]] = {}  # by complete study: who had no room for it
        self._no_room: set[Destination] = set()  # in a page of complete studies: counting takes milliseconds
        self._behind: CompleteStudy | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self._rules

    def use(self, rules: Sequence[Rule]) -> None:
        """Go on with these rules. One that was not there before begins with what comes from now on."""
        self.write_marks()
        known = self._ledger.rule_marks()
        if not rules and not known:
            self._rules, self._marks = (), {}
            return
        self._ledger.keep_rules([rule.name for rule in rules])
        now_us, epoch = self._clock(), self._archive.epoch
        end, _ = self._archive.index.positions()
        fresh = [RuleMark(rule.name, now_us, epoch, end) for rule in rules if rule.name not in known]
        if fresh:
            self._ledger.queue_routes((), fresh)
        names = {rule.name for rule in rules}
        self._marks = {name: mark for name, mark in known.items() if name in names}
        self._marks |= {mark.rule: mark for mark in fresh}
        self._rules = tuple(rules)
        self._seen = None

    def step(self) -> bool:
        """Look at a batch of what is new, for every rule that has room. Whether there is more."""
        if not self._rules:
            return False
        self._keep_with_the_clock()
        epoch, end = self._archive.epoch, self._archive.index.positions()[0]
        if (epoch, end) == self._seen:
            self._write_old_marks()
            return False
        more = stalled = False
        following = [rule for rule in self._rules if rule.when is When.STORED]
        following.sort(key=lambda rule: self._place(rule, epoch))
        for start, group in groupby(following, lambda rule: self._place(rule, epoch)):
            if start >= end:
                continue
            behind = list(group)
            rules = [rule for rule in behind if self._has_room(rule.to)]
            stalled = stalled or len(rules) < len(behind)
            if rules:
                more = self._look(rules, epoch, start, end) or more
        self._seen = None if more or stalled else (epoch, end)
        return more

    def complete(self) -> bool:
        """Look at a page of the studies that are complete, those behind the page before: some wait for room,
        and others may go to whom has it. Whether there are more."""
        if not self._ledger.has_complete_studies():
            return False
        studies = self._ledger.complete_studies(STUDIES_AT_ONCE, self._behind)
        self._archive.wait_indexed()
        self._no_room.clear()
        for study in studies:
            self._complete(study)
        self._behind = studies[-1] if len(studies) == STUDIES_AT_ONCE else None
        return self._behind is not None

    def write_marks(self) -> None:
        """How far the rules have looked, to the ledger."""
        if self._unwritten:
            self._ledger.queue_routes((), [self._marks[name] for name in self._unwritten])
            self._unwritten.clear()
        self._written_us = self._clock()

    def _write_old_marks(self) -> None:
        if self._unwritten and abs(self._clock() - self._written_us) > MARK_EVERY_US:
            self.write_marks()

    def _keep_with_the_clock(self) -> None:
        """A clock that was set back behind the moment at which a rule began: else what comes until it shows
        that moment again would count as received before the rule was there."""
        now_us = self._clock()
        for mark in list(self._marks.values()):
            if mark.since_us > now_us:
                self._marks[mark.rule] = replace(mark, since_us=now_us - NOTICED_US)
                self._unwritten.add(mark.rule)

    def _place(self, rule: Rule, epoch: bytes) -> Position:
        """Where a rule goes on. On another disk than its mark is of, that is the beginning: what it may take
        is bounded by when it was received."""
        mark = self._marks[rule.name]
        return mark.position if mark.epoch == epoch else START

    def _is_full(self, to: Destination) -> bool:
        if to not in self._no_room and not self._has_room([to]):
            self._no_room.add(to)
        return to in self._no_room

    def _has_room(self, to: Iterable[Destination]) -> bool:
        return all(self._ledger.route_count(one) < self._queue_max for one in to)

    def _look(self, rules: Sequence[Rule], epoch: bytes, start: Position, end: Position) -> bool:
        since_us = min(self._marks[rule.name].since_us for rule in rules)
        items = list(islice(self._archive.packs.read(start, end, check_digests=False), BATCH_RECORDS))
        records = [item for item in items if isinstance(item, Record) and _is_new(item, since_us)]
        wanted = [record for record in records if any(rule.may_take(record.head) for rule in rules)]
        contents = {(record.head.sop_instance_uid, record.digest) for record in wanted}
        rows: list[Routed] = []
        urgent: set[str] = set()
        now_us = self._clock()
        for one in self._archive.index.described({uid for uid, _ in contents}):
            if (one.stored.head.sop_instance_uid, one.stored.digest) not in contents:
                continue  # another content of its UID is the live one
            for rule in rules:
                received_us = one.stored.head.provenance.received_at_us
                if received_us >= self._marks[rule.name].since_us and rule.takes(one):
                    rows += rule.routes_of(one, self._ward, now_us)
                    urgent |= {one.stored.head.sop_instance_uid} if rule.urgent else set()
        if urgent and self._archive.index.mark_urgent_all(urgent):  # before the mark moves on
            self._on_urgent()
        reached = end if len(items) < BATCH_RECORDS else _end_of(items[-1])
        marks = [replace(self._marks[rule.name], epoch=epoch, position=reached) for rule in rules]
        if rows:
            self._ledger.queue_routes(merged(rows), marks)
            self._on_queued({row.to for row in rows})
        self._marks |= {mark.rule: mark for mark in marks}
        changed = {mark.rule for mark in marks}
        self._unwritten = self._unwritten - changed if rows else self._unwritten | changed
        self._write_old_marks()
        return reached < end

    def _complete(self, study: CompleteStudy) -> None:
        """When a destination has no room for it now it stays, and is read again when there is room. The
        others get it meanwhile."""
        if any(map(self._is_full, self._full.get(study.study_uid, ()))):
            return
        asked = [rule for rule in self._rules if rule.when is When.STUDY_COMPLETE
                 and study.at_us >= self._marks[rule.name].since_us]  # fmt: skip
        rows: list[Routed] = []
        if asked:
            instances = self._archive.index.described_study(study.study_uid)
            for rule in asked:
                if rule.takes_study(instances):
                    rows += routes_of_study(rule, study.study_uid, instances, self._ward, self._clock())
                    if rule.urgent and self._archive.index.mark_urgent(study.study_uid):
                        self._on_urgent()
        wanted = {row.to for row in rows}
        full = frozenset(filter(self._is_full, wanted))
        chosen = merged([row for row in rows if row.to not in full])
        self._ledger.queue_routes(chosen, (), () if full else [study])
        self._on_queued(wanted - full)
        self._full.pop(study.study_uid, None)
        if full:
            self._full[study.study_uid] = full


def routes_of_study(
    rule: Rule, study_uid: str, instances: Sequence[Described], ward: str, now_us: int
) -> list[Routed]:
    """A whole study on its way by one rule, and the notices of it."""
    rows = [row for one in instances for row in rule.routes_of(one, ward, now_us)]
    content = hashlib.sha256(b"".join(sorted(one.stored.digest for one in instances))).digest()
    return rows + rule.notices_of(study_uid, content, now_us)


def merged(rows: Sequence[Routed]) -> list[Routed]:
    """The same content to the same destination once: under the first rule that says so, by the highest
    priority of any, and committed if any wants that."""
    found: dict[bytes, Routed] = {}
    for row in rows:
        first = found.setdefault(row.key, row)
        if first is not row:
            found[row.key] = replace(
                first, rank=min(first.rank, row.rank), commit=first.commit or row.commit
            )
    return list(found.values())


def _is_new(record: Record, since_us: int) -> bool:
    return record.kind is RecordKind.INSTANCE and record.head.provenance.received_at_us >= since_us


def _end_of(item: Record | Damage) -> Position:
    return Position(item.number, item.end) if isinstance(item, Damage) else item.end
