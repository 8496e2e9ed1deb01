"""What the index knows of space: what was evicted, where each content lies now, and what may be given back.

EVICTED marks the live or removed content whose place the fact names; DROPPED says that a pack goes; both
leave a row in `reclaim`, in the same transaction, for whoever gives the space back. MOVED changes nothing: it
keeps what stood in a pack that goes. A content that is here and is written again lies at its last place from
then on, if it is the same record once more (compaction) or if its bytes were gone or damaged (a sender sent
it again): then it is whole, and is pushed if the region lacks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, bindparam, delete, insert, select, update

from archive.index.levels import patient_key
from archive.index.rows import Content, Row, number_of, row_of
from archive.index.schema import conflict, instance, outbox, patient_hash, reclaim, removed
from archive.index.statements import by_uid
from archive.index.stored import location_of
from archive.model import Fact, FactKind, IndexEntry, Level, Location, Record
from archive.packs.dropping import drop_of
from archive.removals import GIVEN_UP

RECLAIM_MAX = 1_000
_PLACE = ("pack", "payload_offset", "payload_length", "dataset_offset")
_CHANGES = (*_PLACE, "transfer_syntax_uid", "device", "calling_ae", "received_at_us")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a content lies by the index, and what decides whether its bytes may go."""

    location: Location
    evicted: bool
    receipt_us: int
    received_at_us: int
    live: bool
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Space that may be given back: a payload, or, when its length is 0, a whole pack."""

    location: Location
    sop_instance_uid: str
    digest: bytes

    @property
    def is_pack(self) -> bool:
        return not self.location.length


def apply_space_facts(connection: Connection, facts: Sequence[Fact]) -> None:
    """Bring EVICTED and DROPPED facts in, in their order. Again they only say again what may be given
    back."""
    evicted = [fact for fact in facts if fact.kind is FactKind.EVICTED and fact.entry is not None]
    here = places(connection, {fact.sop_instance_uid for fact in evicted})
    rows: dict[tuple[str, int], Row] = {}
    marked: list[Row] = []
    given_up: list[IndexEntry] = []
    for fact in evicted:
        assert fact.entry is not None
        location = fact.entry.record.location
        place = here.get((fact.sop_instance_uid, fact.digest))
        purged = fact.detail == GIVEN_UP
        if place is None or not (place.live or place.removed or purged):
            continue
        if place.location != location or not location.pack:
            continue  # written again, overtaken by a person's decision, or it never lay here (`stubs.py`)
        if not (purged or place.receipt_us):
            continue  # it was chosen, and before this fact it was found that the region lost it
        marked.append({"b_uid": fact.sop_instance_uid, "b_digest": fact.digest})
        rows[(location.pack, location.offset)] = _reclaim_row(
            location, fact.at_us, fact.sop_instance_uid, fact.digest
        )
        if purged:
            given_up.append(fact.entry)
    for fact in facts:
        if fact.kind is FactKind.DROPPED:
            drop = drop_of(fact)
            rows[(drop.pack, 0)] = _reclaim_row(Location(drop.pack, 0, 0, 0), drop.due_us, "", b"")
    if marked:
        for table in (instance, removed):
            connection.execute(update(table).where(*_content(table)).values(evicted=True), marked)
    if given_up:
        _forget_purged(connection, given_up)
    if rows:
        _forget(connection, rows)
        connection.execute(insert(reclaim), list(rows.values()))


def _forget_purged(connection: Connection, entries: Sequence[IndexEntry]) -> None:
    """Of what was purged the index keeps what the fact still tells, and where its bytes lay; it is pushed to
    nobody."""
    keys = [
        {"b_uid": entry.record.head.sop_instance_uid, "b_digest": entry.record.digest} for entry in entries
    ]
    connection.execute(update(conflict).where(*_content(conflict)).values(evicted=True), keys)
    connection.execute(delete(outbox).where(*_content(outbox)), keys)
    rows = []
    for entry, key in zip(entries, keys, strict=True):
        row = row_of(Level.IMAGE, entry.attributes.instance)
        row["number"] = number_of(row["instance_number"])
        row["patient_hash"] = patient_hash(patient_key(entry), entry.attributes.study_uid)
        rows.append(key | {f"b_{name}": value for name, value in row.items() if name != "sop_instance_uid"})
    changed = [name for name in rows[0] if name not in keys[0]]
    values: dict[str, Any] = {name.removeprefix("b_"): bindparam(name) for name in changed}
    connection.execute(update(removed).where(*_content(removed)).values(values), rows)


def write_again(
    connection: Connection, entries: Sequence[IndexEntry], fresh: Mapping[Content, Row], *, removals: bool
) -> None:
    """Records of contents that are here already, in their order; `fresh` are the rows that the same
    transaction is about to insert. `removals` says whether anything was ever removed here."""
    if not entries:
        return
    uids = {entry.record.head.sop_instance_uid for entry in entries}
    for table in (instance, removed, conflict) if removals else (instance, conflict):
        rows = {
            (row.sop_instance_uid, bytes(row.digest)): dict(row._mapping)
            for row in by_uid(connection, select(table), table.c.sop_instance_uid, uids)
        }
        changed: dict[Content, Row] = {}
        mended: list[Row] = []
        for entry in entries:
            content = (entry.record.head.sop_instance_uid, entry.record.digest)
            row = rows.get(content)
            if row is not None and _supersedes(entry.record, row):
                if row["damaged"] and _location_in(row) != entry.record.location:
                    row["damaged"] = False
                    mended.append({"b_uid": content[0], "b_digest": content[1]})
                row.update(_changes(entry.record))
                changed[content] = row
        if changed:
            names = (*_CHANGES, "evicted", "damaged")
            values: dict[str, Any] = {name: bindparam(f"b_{name}") for name in names}
            connection.execute(
                update(table).where(*_content(table)).values(values),
                [
                    {"b_uid": uid, "b_digest": digest} | {f"b_{name}": row[name] for name in names}
                    for (uid, digest), row in changed.items()
                ],
            )
        if mended:
            again = update(outbox).where(*_content(outbox)).values(set_aside=False, detail="", tries=0)
            connection.execute(again, mended)
    for entry in entries:
        found = fresh.get((entry.record.head.sop_instance_uid, entry.record.digest))
        if found is not None and _supersedes(entry.record, found):
            found.update(_changes(entry.record))


def places(connection: Connection, uids: Iterable[str]) -> dict[Content, Place]:
    """Where the contents of these UIDs lie: live ones, conflicts, and what was removed."""
    wanted, found = sorted(set(uids)), {}
    for table in (conflict, removed, instance):
        columns = ("sop_instance_uid", "digest", *_PLACE, "evicted", "receipt_us", "received_at_us")
        query = select(*(table.c[name] for name in columns))
        for row in by_uid(connection, query, table.c.sop_instance_uid, wanted):
            found[(row.sop_instance_uid, bytes(row.digest))] = Place(
                location_of(row), bool(row.evicted), row.receipt_us, row.received_at_us, table is instance,
                table is removed,
            )  # fmt: skip
    return found


def contents_of(connection: Connection, study_uid: str) -> list[tuple[str, bytes, Location]]:
    """The live instances of a study, pack by pack."""
    columns = ("sop_instance_uid", "digest", *_PLACE)
    query = (
        select(*(instance.c[name] for name in columns))
        .where(instance.c.study_instance_uid == study_uid)
        .order_by(instance.c.pack, instance.c.payload_offset)
    )
    return [(row.sop_instance_uid, bytes(row.digest), location_of(row)) for row in connection.execute(query)]


def due(connection: Connection, now_us: int, limit: int) -> list[Reclaim]:
    """What may be given back by now, pack by pack."""
    query = (
        select(reclaim)
        .where(reclaim.c.due_us <= now_us)
        .order_by(reclaim.c.pack, reclaim.c.payload_offset)
        .limit(min(limit, RECLAIM_MAX))
    )
    rows = connection.execute(query)
    return [Reclaim(location_of(row), row.sop_instance_uid, bytes(row.digest)) for row in rows]


def forget(connection: Connection, done: Sequence[Reclaim]) -> None:
    """It was given back."""
    if done:
        _forget(connection, [(each.location.pack, each.location.offset) for each in done])


def _forget(connection: Connection, keys: Iterable[tuple[str, int]]) -> None:
    statement = delete(reclaim).where(
        reclaim.c.pack == bindparam("b_pack"), reclaim.c.payload_offset == bindparam("b_offset")
    )
    connection.execute(statement, [{"b_pack": pack, "b_offset": offset} for pack, offset in keys])


def _supersedes(record: Record, row: Mapping[str, Any]) -> bool:
    """Whether the content lies where `record` is from now on. Two records of one head are one instance that
    was moved; another record of the same content counts only where the bytes were gone or damaged."""
    if row["evicted"] or row["damaged"]:
        return True
    head, source = record.head, record.head.provenance
    return (
        row["received_at_us"] == source.received_at_us
        and row["transfer_syntax_uid"] == head.transfer_syntax_uid
        and (row["ward"], row["device"], row["calling_ae"]) == (source.ward, source.device, source.calling_ae)
    )


def _location_in(row: Row) -> Location:
    return Location(*(row[name] for name in _PLACE))


def _changes(record: Record) -> Row:
    """The ward and the issuer stay: counts and the patient's key hang on them."""
    head, location = record.head, record.location
    return {
        "pack": location.pack, "payload_offset": location.offset, "payload_length": location.length,
        "dataset_offset": location.dataset_offset, "transfer_syntax_uid": head.transfer_syntax_uid,
        "device": head.provenance.device, "calling_ae": head.provenance.calling_ae,
        "received_at_us": head.provenance.received_at_us, "evicted": False,
    }  # fmt: skip


def _content(table: Table) -> tuple[Any, ...]:
    return table.c.sop_instance_uid == bindparam("b_uid"), table.c.digest == bindparam("b_digest")


def _reclaim_row(location: Location, due_us: int, uid: str, digest: bytes) -> Row:
    return {
        "pack": location.pack, "payload_offset": location.offset, "payload_length": location.length,
        "dataset_offset": location.dataset_offset, "due_us": due_us, "sop_instance_uid": uid,
        "digest": digest,
    }  # fmt: skip
