"""Bringing records into the index: one transaction for a batch, exactly once by content.

An instance counts once by its SOP Instance UID: the first content is live, any other is a conflict and
hidden. Within a level the first instance that has a value gives it, so a rebuilt index equals the one it
replaces. The patient of a study is the first one named in it; an instance with another Patient ID is listed
in the study but gives none of the patient's fields, and a study without any Patient ID stands alone (PS3.4
C.6.1.1.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, insert, select

from archive.index.rows import Row, fill, joined, number_of, row_of, split
from archive.index.schema import (
    SEARCHED,
    STUDY_TEXT,
    conflict,
    early_fact,
    holding,
    instance,
    outbox,
    patient,
    patient_hash,
    series,
    series_ward,
    study,
    text_id,
)
from archive.index.statements import by_uid, update_all, update_some
from archive.index.wardcounts import SERIES_KEY, WardCount, count_in_ward, holding_row, write_wards
from archive.model import FactKind, IndexEntry, Level, PatientKey, RecordKind

SeriesKey = tuple[str, str]
Content = tuple[str, bytes]


def apply_entries(connection: Connection, entries: Sequence[IndexEntry], *, into_outbox: bool) -> None:
    """Bring records in, in their order. What is there already is passed over, so that a batch may come
    again."""
    entries = [entry for entry in entries if entry.record.kind is not RecordKind.MARK]
    if entries:
        batch = _Batch(connection, entries, into_outbox)
        batch.sort_out()
        batch.write()


@dataclass(slots=True)
class _Study:
    row: Row
    new: bool
    filled: bool = False
    counted: bool = False
    last_study: Any = None
    last_patient: Any = None


@dataclass(slots=True)
class _Series:
    row: Row
    new: bool
    filled: bool = False
    counted: bool = False
    last: Any = None


@dataclass(slots=True)
class _Patient:
    row: Row
    new: bool
    filled: bool = False


@dataclass(slots=True)
class _Waiting:
    """The early facts about one content."""

    receipt_us: int = 0
    damaged: bool = False
    set_aside: str | None = None
    wards: set[str] = field(default_factory=set)


_NO_FACTS = _Waiting()


class _Batch:
    """The records of one transaction, grouped in memory: one read and one write a table, however many they
    are."""

    def __init__(self, connection: Connection, entries: Sequence[IndexEntry], into_outbox: bool) -> None:
        self._connection = connection
        self._entries = entries
        self._into_outbox = into_outbox
        uids = {entry.record.head.sop_instance_uid for entry in entries}
        self._live: dict[str, bytes] = {
            uid: bytes(digest)
            for uid, digest in by_uid(
                connection,
                select(instance.c.sop_instance_uid, instance.c.digest),
                instance.c.sop_instance_uid,
                uids,
            )
        }
        query = select(
            conflict.c.sop_instance_uid, conflict.c.digest, conflict.c.receipt_us, conflict.c.damaged
        )
        self._known_conflicts: dict[Content, Any] = {
            (row.sop_instance_uid, bytes(row.digest)): row
            for row in by_uid(connection, query, conflict.c.sop_instance_uid, uids)
        }
        self._waiting = self._early(uids)
        self._instances: list[Row] = []
        self._conflicts: dict[Content, Row] = {}
        self._outbox: list[Row] = []
        self._holdings: list[Row] = []
        self._studies: dict[str, _Study] = {}
        self._series: dict[SeriesKey, _Series] = {}
        self._wards: dict[tuple[str, str, str], WardCount] = {}
        self._patients: dict[bytes, _Patient] = {}
        self._left_alone: list[bytes] = []  # patients of studies that turned out to have a Patient ID

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
        if other:
            self._add_conflicts(other)
        if fresh:
            self._promote({(entry.record.head.sop_instance_uid, entry.record.digest) for entry in fresh})
            self._load(fresh)
            for entry in fresh:
                self._add_instance(entry)

    def write(self) -> None:
        execute = self._connection.execute
        patients = [p.row for p in self._patients.values() if p.new]
        if self._left_alone:
            execute(delete(patient).where(patient.c.patient_hash.in_(self._left_alone)))
        if patients:
            execute(insert(patient), patients)
        changed = [p.row for p in self._patients.values() if p.filled and not p.new]
        if changed:
            update_all(self._connection, patient, ("patient_hash",), changed)
        self._write_studies()
        self._write_series()
        for table, rows in (
            (instance, self._instances), (conflict, list(self._conflicts.values())),
            (outbox, self._outbox), (holding, self._holdings),
        ):  # fmt: skip
            if rows:
                execute(insert(table), rows)
        live = [{"b_uid": u, "b_digest": d} for u, d in self._waiting if self._live.get(u) == d]
        apart = [{"b_uid": u, "b_digest": d} for u, d in self._waiting if (u, d) in self._conflicts]
        if live:
            execute(_DELETE_EARLY, live)
        if apart:
            # A copy is told of what is live; this content may become that.
            execute(_DELETE_EARLY.where(early_fact.c.kind != FactKind.COPY.value), apart)

    def _early(self, uids: Iterable[str]) -> dict[Content, _Waiting]:
        waiting: dict[Content, _Waiting] = {}
        for row in by_uid(self._connection, select(early_fact), early_fact.c.sop_instance_uid, uids):
            facts = waiting.setdefault((row.sop_instance_uid, bytes(row.digest)), _Waiting())
            if row.kind == FactKind.RECEIPT.value:
                facts.receipt_us = row.at_us
            elif row.kind == FactKind.SET_ASIDE.value:
                facts.set_aside = row.detail
            elif row.kind == FactKind.DAMAGE.value:
                facts.damaged = True
            elif row.kind == FactKind.COPY.value:
                facts.wards.add(row.ward)
        return waiting

    def _load(self, entries: Sequence[IndexEntry]) -> None:
        """The rows that the new instances add to, where there are any."""
        studies = {entry.attributes.study_uid for entry in entries}
        keys = {(entry.attributes.study_uid, entry.attributes.series_uid) for entry in entries}
        numbers = {series_uid for _, series_uid in keys}
        for row in by_uid(self._connection, select(study), study.c.study_instance_uid, studies):
            self._studies[row.study_instance_uid] = _Study(dict(row._mapping), new=False)
        query = select(series).where(series.c.study_instance_uid.in_(studies))
        for row in by_uid(self._connection, query, series.c.series_instance_uid, numbers):
            key = (row.study_instance_uid, row.series_instance_uid)
            if key in keys:
                self._series[key] = _Series(dict(row._mapping), new=False)
        query = select(series_ward).where(series_ward.c.study_instance_uid.in_(studies))
        for row in by_uid(self._connection, query, series_ward.c.series_instance_uid, numbers):
            key = (row.study_instance_uid, row.series_instance_uid)
            if key in keys:
                self._wards[(*key, row.ward)] = WardCount(dict(row._mapping), new=False)
        hashes = {patient_hash(_patient_key(entry), entry.attributes.study_uid) for entry in entries}
        hashes |= {bytes(found.row["patient_hash"]) for found in self._studies.values()}
        for row in by_uid(self._connection, select(patient), patient.c.patient_hash, hashes):
            self._patients[bytes(row.patient_hash)] = _Patient(dict(row._mapping), new=False)

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
                continue
            known.add(content)
            facts = self._waiting.get(content, _NO_FACTS)
            self._conflicts[content] = {
                "sop_instance_uid": content[0],
                "study_instance_uid": entry.attributes.study_uid,
                "series_instance_uid": entry.attributes.series_uid,
                "sop_class_uid": entry.record.head.sop_class_uid,
                **_stored(entry, facts),
            }
            self._queue(entry, facts, conflicting=True)

    def _add_instance(self, entry: IndexEntry) -> None:
        attributes, head = entry.attributes, entry.record.head
        facts = self._waiting.get((head.sop_instance_uid, entry.record.digest), _NO_FACTS)
        row = row_of(Level.IMAGE, attributes.instance)
        row.update(
            sop_instance_uid=head.sop_instance_uid,
            sop_class_uid=head.sop_class_uid,
            study_instance_uid=attributes.study_uid,
            series_instance_uid=attributes.series_uid,
            patient_hash=patient_hash(_patient_key(entry), attributes.study_uid),
            number=number_of(row["instance_number"]),
            **_stored(entry, facts),
        )
        self._instances.append(row)
        found = self._study(entry)
        found_series = self._series_of(entry, found)
        found.row["instance_count"] += 1
        found.row["bytes"] += entry.record.location.length
        found_series.row["instance_count"] += 1
        found.counted = found_series.counted = True
        ward = head.provenance.ward
        count_in_ward(self._wards, found.row, found_series.row, ward, head.sop_class_uid)
        for holder in sorted(facts.wards - {ward}):
            count_in_ward(self._wards, found.row, found_series.row, holder, head.sop_class_uid)
            self._holdings.append(holding_row(row, holder))
        self._queue(entry, facts, conflicting=False)

    def _queue(self, entry: IndexEntry, facts: _Waiting, *, conflicting: bool) -> None:
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
            "set_aside": facts.set_aside is not None, "detail": facts.set_aside or "",
        })  # fmt: skip

    def _study(self, entry: IndexEntry) -> _Study:
        attributes = entry.attributes
        found = self._studies.get(attributes.study_uid)
        if found is None:
            found = self._new_study(entry)
            self._studies[attributes.study_uid] = found
            return found
        if found.last_study != attributes.study:
            found.filled |= fill(found.row, Level.STUDY, row_of(Level.STUDY, attributes.study))
            found.last_study = attributes.study
        named = (attributes.patient, entry.record.head.provenance.issuer)
        if found.last_patient != named:
            self._name_patient(found, entry)
            found.last_patient = named
        return found

    def _new_study(self, entry: IndexEntry) -> _Study:
        attributes = entry.attributes
        patient_row = _patient_row(entry)
        row = row_of(Level.STUDY, attributes.study) | patient_row
        key = _patient_key(entry)
        row.update(
            study_instance_uid=attributes.study_uid,
            patient_hash=patient_hash(key, attributes.study_uid),
            text_id=text_id(attributes.study_uid),
            bytes=0, series_count=0, instance_count=0, modalities="", sop_classes="", wards="",
        )  # fmt: skip
        self._add_patient(row["patient_hash"], patient_row)
        named = (attributes.patient, entry.record.head.provenance.issuer)
        return _Study(row, new=True, last_study=attributes.study, last_patient=named)

    def _name_patient(self, found: _Study, entry: IndexEntry) -> None:
        """What a further instance of a study says of the patient."""
        key, row = _patient_key(entry), _patient_row(entry)
        own = patient_hash(key, entry.attributes.study_uid)
        current = bytes(found.row["patient_hash"])
        if key.patient_id and not found.row["patient_id"]:
            # The study stood alone; now it has a patient, whose own fields come first.
            fill(row, Level.PATIENT, found.row)
            found.row.update(row)
            found.row["patient_hash"] = own
            found.filled = True
            if not self._patients[current].new:
                self._left_alone.append(current)
            del self._patients[current]
            self._add_patient(own, row)
        elif not key.patient_id or own == current:
            row["patient_id"] = ""
            row["issuer_of_patient_id"] = ""
            found.filled |= fill(found.row, Level.PATIENT, row)
            self._add_patient(current, row)

    def _add_patient(self, key: bytes, row: Row) -> None:
        known = self._patients.get(key)
        if known is None:
            self._patients[key] = _Patient({**row, "patient_hash": key}, new=True)
        else:
            known.filled |= fill(known.row, Level.PATIENT, row)

    def _series_of(self, entry: IndexEntry, found: _Study) -> _Series:
        attributes = entry.attributes
        key = (attributes.study_uid, attributes.series_uid)
        known = self._series.get(key)
        if known is not None:
            if known.last != attributes.series:
                had = known.row["modality"]
                known.filled |= fill(known.row, Level.SERIES, row_of(Level.SERIES, attributes.series))
                known.row["number"] = number_of(known.row["series_number"])
                known.last = attributes.series
                if had != known.row["modality"]:
                    self._add_modality(found, known.row["modality"])
            return known
        row = row_of(Level.SERIES, attributes.series)
        row.update(
            study_instance_uid=attributes.study_uid, series_instance_uid=attributes.series_uid,
            number=number_of(row["series_number"]), instance_count=0, sop_classes="", wards="",
        )  # fmt: skip
        known = self._series[key] = _Series(row, new=True, last=attributes.series)
        found.row["series_count"] += 1
        self._add_modality(found, row["modality"])
        return known

    def _add_modality(self, found: _Study, modality: str) -> None:
        if modality and modality not in split(found.row["modalities"]):
            found.row["modalities"] = joined({*split(found.row["modalities"]), modality})
            found.filled = True

    def _write_studies(self) -> None:
        new = [found.row for found in self._studies.values() if found.new]
        filled = [found.row for found in self._studies.values() if found.filled and not found.new]
        counted = [f.row for f in self._studies.values() if f.counted and not f.filled and not f.new]
        if new:
            self._connection.execute(insert(study), new)
        if filled:
            update_all(self._connection, study, ("study_instance_uid",), filled)
        if counted:
            update_some(self._connection, study, ("study_instance_uid",), _STUDY_COUNTS, counted)
        _write_text(self._connection, new, filled)

    def _write_series(self) -> None:
        new = [known.row for known in self._series.values() if known.new]
        filled = [known.row for known in self._series.values() if known.filled and not known.new]
        counted = [k.row for k in self._series.values() if k.counted and not k.filled and not k.new]
        if new:
            self._connection.execute(insert(series), new)
        if filled:
            update_all(self._connection, series, SERIES_KEY, filled)
        if counted:
            update_some(self._connection, series, SERIES_KEY, _SERIES_COUNTS, counted)
        write_wards(self._connection, self._wards)


_STUDY_COUNTS = ("bytes", "series_count", "instance_count", "sop_classes", "wards")
_SERIES_COUNTS = ("instance_count", "sop_classes", "wards")
_DELETE_EARLY = delete(early_fact).where(
    early_fact.c.sop_instance_uid == bindparam("b_uid"), early_fact.c.digest == bindparam("b_digest")
)


def _patient_key(entry: IndexEntry) -> PatientKey:
    """The issuer in force is the data set's own (0010,0021); where it has none, its sender's."""
    fields = entry.attributes.patient
    issuer = fields.get("IssuerOfPatientID") or entry.record.head.provenance.issuer
    return PatientKey(issuer, fields.get("PatientID", ""))


def _patient_row(entry: IndexEntry) -> Row:
    key = _patient_key(entry)
    return row_of(Level.PATIENT, {**entry.attributes.patient, "IssuerOfPatientID": key.issuer})


def _stored(entry: IndexEntry, facts: _Waiting) -> Row:
    head, location = entry.record.head, entry.record.location
    source = head.provenance
    return {
        "digest": entry.record.digest, "transfer_syntax_uid": head.transfer_syntax_uid,
        "ward": source.ward, "issuer": source.issuer, "device": source.device,
        "calling_ae": source.calling_ae, "received_at_us": source.received_at_us,
        "pack": location.pack, "payload_offset": location.offset, "payload_length": location.length,
        "dataset_offset": location.dataset_offset,
        "receipt_us": facts.receipt_us, "damaged": facts.damaged,
    }  # fmt: skip


def _write_text(connection: Connection, new: Sequence[Row], filled: Sequence[Row]) -> None:
    """SQLite's trigrams of the searched columns; PostgreSQL keeps its own."""
    if connection.dialect.name != "sqlite" or not (new or filled):
        return
    columns = ", ".join(SEARCHED)
    marks = ", ".join("?" * (len(SEARCHED) + 1))
    connection.exec_driver_sql(
        f"INSERT OR REPLACE INTO {STUDY_TEXT} (rowid, {columns}) VALUES ({marks})",
        [(row["text_id"], *(row[column] for column in SEARCHED)) for row in (*new, *filled)],
    )
