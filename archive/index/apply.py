"""Bringing records into the index: one transaction for a batch, exactly once by content.

An instance counts once by its SOP Instance UID: the first content is live, any other is a conflict and
hidden, until a person accepts it (`acceptance.py`). What falls under a removal is kept apart (`removed.py`).
What stands above the instances is `levels.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, select

from archive.index.acceptance import accept
from archive.index.corrected import Overlays
from archive.index.levels import Levels, patient_of
from archive.index.remaking import AttributeReader
from archive.index.removed import Standing, covering
from archive.index.rows import Content, Row, number_of, row_of
from archive.index.schema import conflict, early_fact, holding, instance, outbox, removed
from archive.index.space import write_again
from archive.index.statements import Among, Change, insert_all
from archive.index.wardcounts import holding_row
from archive.model import ConflictState, Fact, FactKind, IndexEntry, Level, RecordKind


def apply_entries(
    connection: Connection,
    entries: Sequence[IndexEntry],
    *,
    into_outbox: bool,
    read: AttributeReader,
    removals: bool = True,
) -> None:
    """Bring records in, in their order. What is there already is passed over, so that a batch may come
    again. `read` gives the attributes of what is here, for what a person accepted before it came. What
    people corrected of a study is laid over all of it. Without `removals` nothing was ever removed here, and
    nothing is asked about that."""
    overlays = Overlays(connection)
    entries = overlays.over([entry for entry in entries if entry.record.kind is not RecordKind.MARK])
    read = overlays.reader(read)
    while entries:
        batch = _Batch(connection, entries, into_outbox, removals)
        count = batch.until_decided()
        if count < len(entries):  # what comes behind it meets the decision
            batch = _Batch(connection, entries[:count], into_outbox, removals)
        batch.sort_out()
        batch.write()
        for fact in batch.accepted:
            accept(connection, fact, into_outbox=into_outbox, read=read)
        entries = entries[count:]


@dataclass(slots=True)
class _Waiting:
    """The early facts about one content."""

    receipt_us: int = 0
    damaged: bool = False
    set_aside: str | None = None
    wards: set[str] = field(default_factory=set)
    verdicts: dict[str, Any] = field(default_factory=dict)  # by kind, of people and of the comparison

    def judged(self) -> Row:
        """The state of a conflict by what was said of it before it came."""
        for kind, state in _STATES:
            found = self.verdicts.get(kind)
            if found is not None:
                by_person = state is ConflictState.REJECTED
                return {"state": state.value, "decided_by": found.detail if by_person else "",
                        "decided_us": found.at_us}  # fmt: skip
        return {"state": ConflictState.OPEN.value, "decided_by": "", "decided_us": 0}


_STATES = (
    (FactKind.REJECTED.value, ConflictState.REJECTED),
    (FactKind.EQUIVALENT.value, ConflictState.EQUIVALENT),
    (FactKind.PROPOSED.value, ConflictState.PROPOSED),
)


_NO_FACTS = _Waiting()


class _Batch:
    """The records of one transaction, grouped in memory: one read and one write a table, however many they
    are."""

    def __init__(
        self, connection: Connection, entries: Sequence[IndexEntry], into_outbox: bool, removals: bool
    ) -> None:
        self._connection = connection
        self._entries = entries
        self._into_outbox = into_outbox
        uids = {entry.record.head.sop_instance_uid for entry in entries}
        self._removals = removals
        self._live: dict[str, bytes] = {}  # and what was removed: it has its UID all the same
        for question in (_LIVE, _REMOVED) if removals else (_LIVE,):
            for uid, digest in question.rows(connection, uids):
                self._live[uid] = bytes(digest)
        self._known_conflicts: dict[Content, Any] = {
            (row.sop_instance_uid, bytes(row.digest)): row for row in _CONFLICTS.rows(connection, uids)
        }
        self._waiting = self._early(uids)
        self._instances: list[Row] = []
        self._removed: list[Row] = []
        self._conflicts: dict[Content, Row] = {}
        self._outbox: list[Row] = []
        self._holdings: list[Row] = []
        self._again: list[IndexEntry] = []  # of contents that are here
        self._levels = Levels(connection)
        self.accepted: list[Fact] = []  # of conflicts that came after it

    def until_decided(self) -> int:
        """How many there are up to the first that a person accepted before it came, with it. A record behind
        it is brought in by itself, so that a batch ends as its records one by one do."""
        if not self._waiting:
            return len(self._entries)
        for count, entry in enumerate(self._entries, 1):
            waiting = self._waiting.get((entry.record.head.sop_instance_uid, entry.record.digest), _NO_FACTS)
            if FactKind.ACCEPTED.value in waiting.verdicts:
                return count
        return len(self._entries)

    def sort_out(self) -> None:
        fresh: list[IndexEntry] = []
        other: list[IndexEntry] = []
        for entry in self._entries:
            uid, digest = entry.record.head.sop_instance_uid, entry.record.digest
            known = self._live.get(uid)
            if known is None and entry.record.kind is RecordKind.INSTANCE:
                self._live[uid] = digest
                fresh.append(entry)
            elif known != digest:
                other.append(entry)
            else:
                self._again.append(entry)
        if other:
            self._add_conflicts(other)
        if fresh:
            self._promote({(entry.record.head.sop_instance_uid, entry.record.digest) for entry in fresh})
            hidden = self._covered(fresh)
            shown = [entry for entry in fresh if entry.record.head.sop_instance_uid not in hidden]
            self._levels.load(shown)
            for entry in fresh:
                self._add_instance(entry, hidden.get(entry.record.head.sop_instance_uid))

    def _covered(self, entries: Sequence[IndexEntry]) -> dict[str, Standing]:
        """Those that fall under a removal: they are taken, and not shown."""
        if not self._removals:
            return {}
        return covering(self._connection, [
            {
                "study_instance_uid": entry.attributes.study_uid,
                "series_instance_uid": entry.attributes.series_uid,
                "sop_instance_uid": entry.record.head.sop_instance_uid,
                "received_at_us": entry.record.head.provenance.received_at_us,
                "ward": entry.record.head.provenance.ward,
            }
            for entry in entries
        ], of_region=not self._into_outbox)  # fmt: skip

    def write(self) -> None:
        self._levels.write()
        fresh = {(row["sop_instance_uid"], row["digest"]): row for row in (*self._instances, *self._removed)}
        write_again(self._connection, self._again, fresh | self._conflicts, removals=self._removals)
        for table, rows in (
            (instance, self._instances), (removed, self._removed), (conflict, list(self._conflicts.values())),
            (outbox, self._outbox), (holding, self._holdings),
        ):  # fmt: skip
            if rows:
                insert_all(self._connection, table, rows)
        live = [{"b_uid": u, "b_digest": d} for u, d in self._waiting if self._live.get(u) == d]
        apart = [{"b_uid": u, "b_digest": d} for u, d in self._waiting if (u, d) in self._conflicts]
        if live:
            _DELETE_EARLY.run(self._connection, live)
        if apart:
            _DELETE_EARLY_BUT_COPIES.run(self._connection, apart)

    def _early(self, uids: Iterable[str]) -> dict[Content, _Waiting]:
        waiting: dict[Content, _Waiting] = {}
        for row in _EARLY.rows(self._connection, uids):
            facts = waiting.setdefault((row.sop_instance_uid, bytes(row.digest)), _Waiting())
            if row.kind == FactKind.RECEIPT.value:
                facts.receipt_us = row.at_us
            elif row.kind == FactKind.SET_ASIDE.value:
                facts.set_aside = row.detail
            elif row.kind == FactKind.DAMAGE.value:
                continue  # a release before this one kept them: they are about bytes that lay here before
            elif row.kind == FactKind.COPY.value:
                facts.wards.add(row.ward)
            else:
                facts.verdicts[row.kind] = row
        return waiting

    def _promote(self, contents: set[Content]) -> None:
        """A content that was a conflict is live when it comes again and its UID has none: what is known of it
        goes with it. So it is in a region that gets a ward's conflict before any live content."""
        for content in contents & self._conflicts.keys():
            del self._conflicts[content]
            self._outbox = [
                row for row in self._outbox if (row["sop_instance_uid"], row["digest"]) != content
            ]
        for content in contents & self._known_conflicts.keys():
            known, facts = self._known_conflicts[content], self._waiting.setdefault(content, _Waiting())
            facts.receipt_us, facts.damaged = known.receipt_us, bool(known.damaged)
            for table in (conflict, outbox):
                here = and_(table.c.sop_instance_uid == content[0], table.c.digest == content[1])
                if table is outbox:
                    row = self._connection.execute(select(outbox).where(here)).fetchone()
                    facts.set_aside = row.detail if row is not None and row.set_aside else None
                self._connection.execute(delete(table).where(here))

    def _add_conflicts(self, entries: Sequence[IndexEntry]) -> None:
        known = set(self._known_conflicts)
        for entry in entries:
            content = (entry.record.head.sop_instance_uid, entry.record.digest)
            if content in known:
                self._again.append(entry)
                continue
            known.add(content)
            facts = self._waiting.get(content, _NO_FACTS)
            self._conflicts[content] = {
                "sop_instance_uid": content[0],
                "study_instance_uid": entry.attributes.study_uid,
                "series_instance_uid": entry.attributes.series_uid,
                "sop_class_uid": entry.record.head.sop_class_uid,
                **_stored(entry, facts),
                **facts.judged(),
            }
            self._queue(entry, facts, conflicting=True)
            if FactKind.ACCEPTED.value in facts.verdicts:
                early = facts.verdicts[FactKind.ACCEPTED.value]
                self.accepted.append(Fact(FactKind.ACCEPTED, *content, early.ward, early.at_us, early.detail))

    def _add_instance(self, entry: IndexEntry, standing: Standing | None) -> None:
        attributes, head = entry.attributes, entry.record.head
        facts = self._waiting.get((head.sop_instance_uid, entry.record.digest), _NO_FACTS)
        row = row_of(Level.IMAGE, attributes.instance)
        row.update(
            sop_instance_uid=head.sop_instance_uid,
            sop_class_uid=head.sop_class_uid,
            study_instance_uid=attributes.study_uid,
            series_instance_uid=attributes.series_uid,
            patient_hash=patient_of(entry),
            number=number_of(row["instance_number"]),
            **_stored(entry, facts),
        )
        holders = sorted(facts.wards - {head.provenance.ward})
        if standing is None:
            self._instances.append(row)
            self._levels.add(entry, holders)
        else:
            self._removed.append(row | {"removal_id": standing.removal, "purged": standing.purged})
        self._holdings += [holding_row(row, holder) for holder in holders]
        self._queue(entry, facts, conflicting=False, hidden=standing is not None)

    def _queue(
        self, entry: IndexEntry, facts: _Waiting, *, conflicting: bool, hidden: bool = False
    ) -> None:
        if not self._into_outbox or facts.receipt_us:
            return
        head, location = entry.record.head, entry.record.location
        self._outbox.append({
            "sop_instance_uid": head.sop_instance_uid, "digest": entry.record.digest,
            "study_instance_uid": entry.attributes.study_uid,
            "series_instance_uid": entry.attributes.series_uid,
            "ward": head.provenance.ward, "received_at_us": head.provenance.received_at_us,
            "bytes": location.length - location.dataset_offset, "conflict": conflicting,
            "urgent": False, "tries": 0,
            "set_aside": facts.set_aside is not None, "detail": facts.set_aside or "", "hidden": hidden,
        })  # fmt: skip


_LIVE, _REMOVED = (
    Among(select(table.c.sop_instance_uid, table.c.digest), table.c.sop_instance_uid)
    for table in (instance, removed)
)
_CONFLICTS = Among(
    select(conflict.c.sop_instance_uid, conflict.c.digest, conflict.c.receipt_us, conflict.c.damaged),
    conflict.c.sop_instance_uid,
)
_EARLY = Among(select(early_fact), early_fact.c.sop_instance_uid)
_EARLY_OF_CONTENT = delete(early_fact).where(
    early_fact.c.sop_instance_uid == bindparam("b_uid"), early_fact.c.digest == bindparam("b_digest")
)
_DELETE_EARLY = Change(_EARLY_OF_CONTENT)
# A copy is told of what is live; a conflict may become that.
_DELETE_EARLY_BUT_COPIES = Change(_EARLY_OF_CONTENT.where(early_fact.c.kind != FactKind.COPY.value))


def _stored(entry: IndexEntry, facts: _Waiting) -> Row:
    head, location = entry.record.head, entry.record.location
    source = head.provenance
    return {
        "digest": entry.record.digest, "transfer_syntax_uid": head.transfer_syntax_uid,
        "ward": source.ward, "issuer": source.issuer, "device": source.device,
        "calling_ae": source.calling_ae, "received_at_us": source.received_at_us,
        "pack": location.pack, "payload_offset": location.offset, "payload_length": location.length,
        "dataset_offset": location.dataset_offset,
        "receipt_us": facts.receipt_us, "damaged": facts.damaged, "evicted": False,
    }  # fmt: skip
