"""What facts change in the index. They may come before what they are about, and are then kept in
`early_fact`.

A fact is about a content: a UID and a digest, whether it is live or a conflict. A receipt takes it from the
outbox for good; SET_ASIDE and RETRY say whether the outbox offers it; COPY adds a ward that holds it too;
DAMAGE flags it; LOST takes a receipt back (`loss.py`). PROPOSED, EQUIVALENT and REJECTED say where a
conflict stands, ACCEPTED makes it live (`acceptance.py`); REFUSED is about what was not taken. REMOVED,
RESTORED and PURGED are about whatever a UID covers (`removed.py`). A fact that comes again changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, bindparam, delete, exists, insert, select, update

from archive.index.acceptance import accept, tell_again
from archive.index.loss import lose
from archive.index.remaking import AttributeReader, remake
from archive.index.removed import bring_in
from archive.index.rows import Content, Row
from archive.index.schema import (
    conflict,
    early_fact,
    holding,
    instance,
    outbox,
    refusal,
    removed,
    series,
    series_ward,
    study,
)
from archive.index.statements import PARAMETERS_MAX, Among, Change, by_uid, update_some
from archive.index.wardcounts import (
    SERIES_KEY,
    SeriesKey,
    WardCount,
    WardKey,
    count_in_ward,
    holding_row,
    write_wards,
)
from archive.model import TOLD, UNDECIDED, ConflictState, Fact, FactKind
from archive.removals import REMOVAL_KINDS


def apply_facts(
    connection: Connection, facts: Sequence[Fact], *, into_outbox: bool, read: AttributeReader
) -> None:
    """Bring facts in, in their order. `into_outbox` at a node, whose region is told what was accepted; `read`
    gives the attributes of what is here."""
    before: list[Fact] = []
    removals = [fact for fact in facts if fact.kind in REMOVAL_KINDS]
    for fact in facts:
        if fact.kind in REMOVAL_KINDS:
            continue
        if fact.kind not in _IN_TURN:
            before.append(fact)
            continue
        _apply_run(connection, before)
        before = []
        if fact.kind is FactKind.LOST:
            lose(connection, fact, into_outbox=into_outbox)
        elif not accept(connection, fact, into_outbox=into_outbox, read=read):
            _keep_early(connection, [fact])
    _apply_run(connection, before)
    if removals:  # what they cover depends on no fact, so they come last
        changed = sorted(bring_in(connection, removals, of_region=not into_outbox))
        for start in range(0, len(changed), PARAMETERS_MAX):
            remake(connection, changed[start : start + PARAMETERS_MAX], read)


_IN_TURN = frozenset({FactKind.ACCEPTED, FactKind.LOST})  # each changes what the next one meets


def _apply_run(connection: Connection, facts: Sequence[Fact]) -> None:
    """Facts that leave the places of the contents as they are."""
    refused = [fact for fact in facts if fact.kind is FactKind.REFUSED]
    facts = [fact for fact in facts if fact.kind is not FactKind.REFUSED]
    _keep_refusals(connection, refused)
    if not facts:
        return
    uids = {fact.sop_instance_uid for fact in facts}
    live = {row[0]: row for row in _LIVE.rows(connection, uids)}
    others = {(uid, bytes(digest)) for uid, digest in _CONFLICTS.rows(connection, uids)}
    hidden = {row[0]: row for row in _REMOVED.rows(connection, uids - live.keys())}
    changes, early = _Changes(), []
    copies: list[tuple[Mapping[str, Any], str]] = []
    unseen: list[tuple[Mapping[str, Any], str]] = []
    for fact in facts:
        content = (fact.sop_instance_uid, fact.digest)
        row = live.get(fact.sop_instance_uid)
        if row is not None and bytes(row[1]) == fact.digest:
            changes.note(content, fact)
            if fact.kind is FactKind.COPY and fact.ward != row.ward:
                copies.append((row._asdict(), fact.ward))
        elif content in others and fact.kind is not FactKind.COPY:
            changes.note(content, fact)
        elif fact.sop_instance_uid in hidden and bytes(hidden[content[0]].digest) == fact.digest:
            changes.note(content, fact)
            if fact.kind is FactKind.COPY and fact.ward != hidden[content[0]].ward:
                unseen.append((hidden[content[0]]._asdict(), fact.ward))
        else:
            early.append(fact)
    changes.write(connection, [(instance, live), (conflict, {uid for uid, _ in others}), (removed, hidden)])
    for content, receipt in changes.receipts.items():
        if content in others and told_us(receipt):
            tell_again(connection, *content)
    _hold(connection, copies)
    _hold(connection, unseen, counted=False)
    _keep_early(connection, early)


_LIVE, _REMOVED = (
    Among(
        select(*(table.c[name] for name in (
            "sop_instance_uid", "digest", "study_instance_uid", "series_instance_uid", "sop_class_uid",
            "ward",
        ))),
        table.c.sop_instance_uid,
    )
    for table in (instance, removed)
)  # fmt: skip
_CONFLICTS = Among(select(conflict.c.sop_instance_uid, conflict.c.digest), conflict.c.sop_instance_uid)


def _keep_refusals(connection: Connection, facts: Sequence[Fact]) -> None:
    """What was not taken, each content once."""
    if not facts:
        return
    uids = {fact.sop_instance_uid for fact in facts}
    query = select(refusal.c.sop_instance_uid, refusal.c.digest)
    known = {(row[0], bytes(row[1])) for row in by_uid(connection, query, refusal.c.sop_instance_uid, uids)}
    rows: dict[Content, Row] = {}
    for fact in facts:
        content = (fact.sop_instance_uid, fact.digest)
        if content not in known:
            values = (*content, fact.ward, fact.detail, fact.at_us)
            rows.setdefault(content, dict(zip(_REFUSAL_COLUMNS, values, strict=True)))
    if rows:
        connection.execute(insert(refusal), list(rows.values()))


_REFUSAL_COLUMNS = ("sop_instance_uid", "digest", "ward", "device", "at_us")


def _hold(
    connection: Connection, copies: Sequence[tuple[Mapping[str, Any], str]], *, counted: bool = True
) -> None:
    """Copies at other wards of instances that are here; a ward that is known to hold one is not counted
    again, and those of what was removed are not counted."""
    if not copies:
        return
    uids = {row["sop_instance_uid"] for row, _ in copies}
    query = select(holding.c.sop_instance_uid, holding.c.ward)
    known = {tuple(row) for row in by_uid(connection, query, holding.c.sop_instance_uid, uids)}
    keys = {
        (row["study_instance_uid"], row["series_instance_uid"]) for row, _ in copies if counted
    }
    studies, all_series, wards = _rows_behind(connection, keys)
    added: list[Row] = []
    for row, ward in copies:
        if (row["sop_instance_uid"], ward) in known:
            continue
        known.add((row["sop_instance_uid"], ward))
        added.append(holding_row(row, ward))
        if not counted:
            continue
        key = (row["study_instance_uid"], row["series_instance_uid"])
        count_in_ward(wards, studies[key[0]], all_series[key], ward, row["sop_class_uid"])
    if added:
        connection.execute(insert(holding), added)
    if added and counted:
        update_some(connection, study, ("study_instance_uid",), ("wards",), list(studies.values()))
        update_some(connection, series, SERIES_KEY, ("wards",), list(all_series.values()))
        write_wards(connection, wards)


def _rows_behind(
    connection: Connection, keys: set[SeriesKey]
) -> tuple[dict[str, Row], dict[SeriesKey, Row], dict[WardKey, WardCount]]:
    uids = {study_uid for study_uid, _ in keys}
    studies = {
        row.study_instance_uid: dict(row._mapping)
        for row in by_uid(connection, select(study), study.c.study_instance_uid, uids)
    }
    all_series = {
        (row.study_instance_uid, row.series_instance_uid): dict(row._mapping)
        for row in by_uid(connection, select(series), series.c.study_instance_uid, uids)
    }
    wards = {
        (row.study_instance_uid, row.series_instance_uid, row.ward): WardCount(dict(row._mapping), new=False)
        for row in by_uid(connection, select(series_ward), series_ward.c.study_instance_uid, uids)
    }
    return studies, {key: all_series[key] for key in keys}, wards


@dataclass(slots=True)
class _Changes:
    """What facts change of contents that are here, the last word of each."""

    receipts: dict[Content, Fact] = field(default_factory=dict)
    damaged: set[Content] = field(default_factory=set)
    set_aside: dict[Content, str | None] = field(default_factory=dict)
    verdicts: list[Fact] = field(default_factory=list)

    def note(self, content: Content, fact: Fact) -> None:
        if fact.kind is FactKind.RECEIPT:
            known = self.receipts.get(content)
            if known is None or told_us(fact) > told_us(known):
                self.receipts[content] = fact
        elif fact.kind is FactKind.DAMAGE:
            self.damaged.add(content)
        elif fact.kind is FactKind.SET_ASIDE:
            self.set_aside[content] = fact.detail
        elif fact.kind is FactKind.RETRY:
            self.set_aside[content] = None
        elif fact.kind in _VERDICTS:
            self.verdicts.append(fact)

    def write(self, connection: Connection, homes: Iterable[tuple[Table, Collection[str]]]) -> None:
        """`homes` are the UIDs among those of the facts that each table has."""
        for fact in self.verdicts:
            state, from_states = _VERDICTS[fact.kind]
            by_person = state is ConflictState.REJECTED
            statement = update(conflict).where(
                conflict.c.sop_instance_uid == fact.sop_instance_uid, conflict.c.digest == fact.digest,
                conflict.c.state.in_([one.value for one in from_states]),
            )  # fmt: skip
            if fact.kind is FactKind.EQUIVALENT and len(fact.detail) == _DIGEST_DIGITS:
                statement = statement.where(exists().where(
                    instance.c.sop_instance_uid == fact.sop_instance_uid,
                    instance.c.digest == bytes.fromhex(fact.detail),
                ))  # fmt: skip
            connection.execute(statement.values(
                state=state.value, decided_us=fact.at_us, decided_by=fact.detail if by_person else ""
            ))  # fmt: skip
        for table, uids in homes:
            rows = [{"b_uid": u, "b_digest": d, "b_at": fact.at_us}
                    for (u, d), fact in self.receipts.items() if u in uids]  # fmt: skip
            if rows:
                _RECEIVED[table].run(connection, rows)
            rows = [{"b_uid": u, "b_digest": d} for u, d in self.damaged if u in uids]
            if rows:
                _DAMAGED[table].run(connection, rows)
        if self.set_aside:
            _SET_ASIDE.run(connection, [
                {"b_uid": u, "b_digest": d, "b_aside": detail is not None, "b_detail": detail or ""}
                for (u, d), detail in self.set_aside.items()
            ])  # fmt: skip
        if self.receipts:
            _DELIVERED.run(connection, [
                {"b_uid": u, "b_digest": d, "b_told": told_us(fact)}
                for (u, d), fact in self.receipts.items()
            ])  # fmt: skip


def _of_content(table: Table) -> tuple[ColumnElement[bool], ...]:
    return table.c.sop_instance_uid == bindparam("b_uid"), table.c.digest == bindparam("b_digest")


_RECEIVED = {
    table: Change(
        update(table)
        .where(*_of_content(table), table.c.receipt_us == 0)
        .values(receipt_us=bindparam("b_at"))
    )
    for table in (instance, conflict, removed)
}
_DAMAGED = {
    table: Change(update(table).where(*_of_content(table)).values(damaged=True))
    for table in (instance, conflict, removed)
}
_SET_ASIDE = Change(
    update(outbox)
    .where(*_of_content(outbox))
    .values(set_aside=bindparam("b_aside"), detail=bindparam("b_detail"), tries=0)
)
# What was accepted after it was sent stays, until the region has been told that too.
_DELIVERED = Change(
    delete(outbox).where(*_of_content(outbox), outbox.c.accepted_us <= bindparam("b_told"))
)


def told_us(receipt: Fact) -> int:
    """Up to when the region knew of decisions at the ward, when it gave this receipt; 0 when it was told of
    none."""
    _, _, at = receipt.detail.partition(TOLD)
    return int(at) if at.isascii() and at.isdigit() else 0


_DIGEST_DIGITS = 64  # an EQUIVALENT names the live content that it was compared with

_VERDICTS = {
    FactKind.PROPOSED: (ConflictState.PROPOSED, (ConflictState.OPEN,)),
    FactKind.EQUIVALENT: (ConflictState.EQUIVALENT, UNDECIDED),
    FactKind.REJECTED: (ConflictState.REJECTED, UNDECIDED),
}


def _keep_early(connection: Connection, facts: Sequence[Fact]) -> None:
    """Facts about what is not here yet, the first of a kind; RETRY takes back SET_ASIDE, and the last word of
    that pair counts. DAMAGE is about the bytes that lay here when it was found: a copy that comes after it
    is a good one."""
    facts = [fact for fact in facts if fact.kind is not FactKind.DAMAGE]
    if not facts:
        return
    key = (early_fact.c.sop_instance_uid, early_fact.c.digest, early_fact.c.kind, early_fact.c.ward)
    known = {
        (row[0], bytes(row[1]), row[2], row[3])
        for row in by_uid(
            connection, select(*key), early_fact.c.sop_instance_uid, {fact.sop_instance_uid for fact in facts}
        )
    }
    rows: dict[tuple[str, bytes, str, str], Row] = {}
    gone: set[tuple[str, bytes, str, str]] = set()
    for fact in facts:
        ward = fact.ward if fact.kind is FactKind.COPY else ""
        kind = FactKind.SET_ASIDE if fact.kind is FactKind.RETRY else fact.kind
        place = (fact.sop_instance_uid, fact.digest, kind.value, ward)
        if fact.kind in (FactKind.SET_ASIDE, FactKind.RETRY):
            rows.pop(place, None)
            gone |= {place} & known
        if fact.kind is FactKind.RETRY or (place in known and place not in gone):
            continue
        rows.setdefault(place, dict(zip(_EARLY_COLUMNS, (*place, fact.at_us, fact.detail), strict=True)))
    if gone:
        condition = [column == bindparam(f"b{number}") for number, column in enumerate(key)]
        connection.execute(
            delete(early_fact).where(*condition),
            [{f"b{number}": value for number, value in enumerate(place)} for place in gone],
        )
    if rows:
        connection.execute(insert(early_fact), list(rows.values()))


_EARLY_COLUMNS = ("sop_instance_uid", "digest", "kind", "ward", "at_us", "detail")
