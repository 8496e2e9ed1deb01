"""The rows above the instances: patients, studies and series, what they count and list, and the wards that
hold a part of them. Made in memory for a batch of instances, one read and one write a table.

Within a level the first instance that has a value gives it, so a rebuilt index equals the one it replaces.
The patient of a study is the first one named in it; an instance with another Patient ID is listed in the
study but gives none of the patient's fields, and a study without any Patient ID stands alone (PS3.4
C.6.1.1.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, delete, select

from archive.index.rows import Row, fill, joined, number_of, row_of, split
from archive.index.schema import (
    SEARCHED,
    STUDY_TEXT,
    patient,
    patient_hash,
    series,
    series_ward,
    study,
    text_id,
)
from archive.index.statements import Among, insert_all, update_all, update_some
from archive.index.wardcounts import SERIES_KEY, SeriesKey, WardCount, WardKey, count_in_ward, write_wards
from archive.model import IndexEntry, Level, PatientKey


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


class Levels:
    """The rows that some instances add to. `load` what is there, `add` each instance, `write`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._studies: dict[str, _Study] = {}
        self._series: dict[SeriesKey, _Series] = {}
        self._wards: dict[WardKey, WardCount] = {}
        self._patients: dict[bytes, _Patient] = {}
        self._left_alone: list[bytes] = []  # patients of studies that turned out to have a Patient ID

    def load(self, entries: Sequence[IndexEntry]) -> None:
        """The rows that the new instances add to, where there are any."""
        keys = {(entry.attributes.study_uid, entry.attributes.series_uid) for entry in entries}
        for row in _STUDIES.rows(self._connection, {study_uid for study_uid, _ in keys}):
            self._studies[row.study_instance_uid] = _Study(row._asdict(), new=False)
        keys = {key for key in keys if key[0] in self._studies}  # a study that is not here has no series
        for row in _SERIES.rows_near(self._connection, keys):
            key = (row.study_instance_uid, row.series_instance_uid)
            if key in keys:
                self._series[key] = _Series(row._asdict(), new=False)
        for row in _WARDS.rows_near(self._connection, self._series):
            key = (row.study_instance_uid, row.series_instance_uid)
            if key in self._series:
                self._wards[(*key, row.ward)] = WardCount(row._asdict(), new=False)
        hashes = {patient_of(entry) for entry in entries}
        hashes |= {bytes(found.row["patient_hash"]) for found in self._studies.values()}
        for row in _PATIENTS.rows(self._connection, hashes):
            self._patients[bytes(row.patient_hash)] = _Patient(row._asdict(), new=False)

    def add(self, entry: IndexEntry, holders: Iterable[str]) -> None:
        """Count one instance, at its own ward and at `holders`, which hold it too."""
        head = entry.record.head
        found = self._study(entry)
        found_series = self._series_of(entry, found)
        found.row["instance_count"] += 1
        found.row["bytes"] += entry.record.location.length
        found_series.row["instance_count"] += 1
        found.counted = found_series.counted = True
        for ward in (head.provenance.ward, *holders):
            count_in_ward(self._wards, found.row, found_series.row, ward, head.sop_class_uid)

    def write(self) -> None:
        patients = [p.row for p in self._patients.values() if p.new]
        if self._left_alone:
            self._connection.execute(delete(patient).where(patient.c.patient_hash.in_(self._left_alone)))
        if patients:
            insert_all(self._connection, patient, patients)
        changed = [p.row for p in self._patients.values() if p.filled and not p.new]
        if changed:
            update_all(self._connection, patient, ("patient_hash",), changed)
        self.write_studies()

    def write_studies(self) -> set[bytes]:
        """Studies and series alone; the patients that these studies have."""
        self._write_studies()
        self._write_series()
        return {bytes(found.row["patient_hash"]) for found in self._studies.values()}

    def _study(self, entry: IndexEntry) -> _Study:
        attributes = entry.attributes
        found = self._studies.get(attributes.study_uid)
        if found is None:
            found = self._new_study(entry)
            self._studies[attributes.study_uid] = found
            return found
        if found.last_study is not attributes.study and found.last_study != attributes.study:
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
        row.update(
            study_instance_uid=attributes.study_uid,
            patient_hash=patient_of(entry),
            text_id=text_id(attributes.study_uid),
            bytes=0, series_count=0, instance_count=0, modalities="", sop_classes="", wards="",
        )  # fmt: skip
        self._add_patient(row["patient_hash"], patient_row)
        named = (attributes.patient, entry.record.head.provenance.issuer)
        return _Study(row, new=True, last_study=attributes.study, last_patient=named)

    def _name_patient(self, found: _Study, entry: IndexEntry) -> None:
        """What a further instance of a study says of the patient."""
        key, row = patient_key(entry), _patient_row(entry)
        own = patient_of(entry)
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
            if known.last is not attributes.series and known.last != attributes.series:
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
            insert_all(self._connection, study, new)
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
            insert_all(self._connection, series, new)
        if filled:
            update_all(self._connection, series, SERIES_KEY, filled)
        if counted:
            update_some(self._connection, series, SERIES_KEY, _SERIES_COUNTS, counted)
        write_wards(self._connection, self._wards)


_STUDIES = Among(select(study), study.c.study_instance_uid)
_SERIES, _WARDS = (
    Among(select(table), table.c.study_instance_uid, table.c.series_instance_uid)
    for table in (series, series_ward)
)
_PATIENTS = Among(select(patient), patient.c.patient_hash)
_STUDY_COUNTS = ("bytes", "series_count", "instance_count", "sop_classes", "wards")
_SERIES_COUNTS = ("instance_count", "sop_classes", "wards")


def patient_key(entry: IndexEntry) -> PatientKey:
    """The issuer in force is the data set's own (0010,0021); where it has none, its sender's."""
    fields = entry.attributes.patient
    issuer = fields.get("IssuerOfPatientID") or entry.record.head.provenance.issuer
    return PatientKey(issuer, fields.get("PatientID", ""))


def patient_of(entry: IndexEntry) -> bytes:
    """The key of the patient whom an instance names."""
    fields = entry.attributes.patient
    issuer = fields.get("IssuerOfPatientID") or entry.record.head.provenance.issuer
    return _patient_of(issuer, fields.get("PatientID", ""), entry.attributes.study_uid)


@lru_cache(maxsize=1024)  # every instance of a study asks it again, three times
def _patient_of(issuer: str, patient_id: str, study_uid: str) -> bytes:
    return patient_hash(PatientKey(issuer, patient_id), study_uid)


def _patient_row(entry: IndexEntry) -> Row:
    key = patient_key(entry)
    return row_of(Level.PATIENT, {**entry.attributes.patient, "IssuerOfPatientID": key.issuer})


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
