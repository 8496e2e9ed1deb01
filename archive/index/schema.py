"""The index's tables, generated from the catalogue, and the steps that bring an older schema forward.

Patient, Study, Series and Image (instance) hold the catalogue's columns of their level; a study also holds
its patient's, so that a study is found in one table. Absent and empty are both the empty string. Keys are
UIDs and hashes, never a sequence, and each holds its shard key (the study, or the instance). All of it
derives from packs and facts. This module says what the tables are; `apply.py` alone writes the derived
ones.
"""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    false,
    inspect,
    text,
)
from sqlalchemy.types import TypeEngine

from archive.catalog import CATALOG, Indexed
from archive.database import Characters, Step
from archive.model import Level, PatientKey

metadata = MetaData()

# A study's columns whose `*x*` is answered by trigrams; names by their folded form.
SEARCHED = ("patient_name_folded", "patient_id", "accession_number", "study_description",
            "referring_physician_name_folded")  # fmt: skip
STUDY_TEXT = "study_text"


def folded_column(entry: Indexed) -> str | None:
    """The column that holds the folded form of a person's name."""
    return f"{entry.column}_folded" if entry.vr == "PN" else None


def patient_hash(key: PatientKey, study_uid: str) -> bytes:
    """The patient's key. Without a Patient ID the study stands alone: such patients are never merged."""
    named = bool(key.patient_id)
    parts = ("patient", key.issuer, key.patient_id) if named else ("study", study_uid, "")
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def text_id(study_uid: str) -> int:
    """The row of a study in the trigram table: a hash, so that it needs no sequence and a rebuild makes it
    again. Two of a million studies share one with a chance of 1 in 10 million; the older would miss
    wildcard searches."""
    return int.from_bytes(hashlib.blake2b(study_uid.encode(), digest_size=8).digest(), "big") >> 1


def _catalogued(*levels: Level) -> list[Column[Any]]:
    columns: list[Column[Any]] = []
    for entry in CATALOG:
        if entry.level in levels:
            columns.append(Column(entry.column, Characters(), nullable=False, server_default=""))
            folded = folded_column(entry)
            if folded is not None:
                columns.append(Column(folded, Characters(), nullable=False, server_default=""))
    return columns


def _columns(kind: TypeEngine[Any] | type[TypeEngine[Any]], *names: str) -> list[Column[Any]]:
    return [Column(name, kind, nullable=False) for name in names]


def _stored() -> list[Column[Any]]:
    """Where an instance came from, where its payload lies, and what facts say of it."""
    return [
        *_columns(Characters(), "transfer_syntax_uid", "ward", "issuer", "device", "calling_ae", "pack"),
        *_columns(BigInteger, "received_at_us", "payload_offset", "payload_length", "receipt_us"),
        *_columns(Integer, "dataset_offset"),
        *_columns(Boolean, "damaged"),
        Column("evicted", Boolean, nullable=False, server_default=false()),
    ]


patient = Table(
    "patient",
    metadata,
    *_columns(LargeBinary, "patient_hash"),
    *_catalogued(Level.PATIENT),
    PrimaryKeyConstraint("patient_hash"),
)

study = Table(
    "study",
    metadata,
    *_catalogued(Level.STUDY, Level.PATIENT),
    *_columns(LargeBinary, "patient_hash"),
    *_columns(BigInteger, "text_id", "bytes"),
    *_columns(Integer, "series_count", "instance_count"),
    *_columns(Characters(), "modalities", "sop_classes", "wards"),
    PrimaryKeyConstraint("study_instance_uid"),
)
Index("study_patient", study.c.patient_hash)
Index("study_patient_id", study.c.patient_id)
Index("study_accession_number", study.c.accession_number)

series = Table(
    "series",
    metadata,
    *_columns(Characters(), "study_instance_uid"),
    *_catalogued(Level.SERIES),
    *_columns(Integer, "number", "instance_count"),
    *_columns(Characters(), "sop_classes", "wards"),
    PrimaryKeyConstraint("study_instance_uid", "series_instance_uid"),
)
Index("series_uid", series.c.series_instance_uid)

# What each ward has of a series: its own instances and the copies that it holds of others'.
series_ward = Table(
    "series_ward",
    metadata,
    *_columns(Characters(), "study_instance_uid", "series_instance_uid", "ward", "sop_classes"),
    *_columns(Integer, "instance_count"),
    PrimaryKeyConstraint("study_instance_uid", "series_instance_uid", "ward"),
    sqlite_with_rowid=False,
)
Index("series_ward_of_ward", series_ward.c.ward, series_ward.c.study_instance_uid)


def _instance() -> list[Column[Any]]:
    return [
        *_columns(Characters(), "study_instance_uid", "series_instance_uid"),
        *_catalogued(Level.IMAGE),
        *_columns(LargeBinary, "digest", "patient_hash"),  # of the patient whom this instance names
        *_columns(Integer, "number"),
        *_stored(),
    ]


instance = Table("instance", metadata, *_instance(), PrimaryKeyConstraint("sop_instance_uid"))
Index("instance_series", instance.c.study_instance_uid, instance.c.series_instance_uid)

# Instances that a removal covers (`removed.py`), `purged` when their bytes are given back. A UID is in one of
# the two tables at most.
removed = Table(
    "removed",
    metadata,
    *_instance(),
    *_columns(Characters(), "removal_id"),
    *_columns(Boolean, "purged"),
    PrimaryKeyConstraint("sop_instance_uid"),
)
Index("removed_study", removed.c.study_instance_uid)
Index("removed_series", removed.c.series_instance_uid)
Index("removed_by", removed.c.removal_id)

# Removals and what became of them; `level` is empty as long as only their end is known.
tombstone = Table(
    "tombstone",
    metadata,
    *_columns(
        Characters(), "removal_id", "level", "uid", "study_instance_uid", "code", "decided_by", "reason",
        "ward", "restored_by", "restored_ward", "purged_by", "purged_ward",
    ),
    *_columns(BigInteger, "at_us", "restored_us", "purged_us"),
    PrimaryKeyConstraint("removal_id"),
)
Index("tombstone_uid", tombstone.c.uid)

# Contents that are kept and not served: `state` is a ConflictState. `compared` says that it was compared with
# the live content, and derives from nothing: a rebuilt index compares again.
conflict = Table(
    "conflict",
    metadata,
    *_columns(Characters(), "sop_instance_uid", "study_instance_uid", "series_instance_uid", "sop_class_uid"),
    *_columns(LargeBinary, "digest"),
    *_stored(),
    Column("state", Characters(), nullable=False, server_default="open"),
    Column("decided_by", Characters(), nullable=False, server_default=""),
    Column("decided_us", BigInteger, nullable=False, server_default="0"),
    Column("compared", Boolean, nullable=False, server_default=false()),
    PrimaryKeyConstraint("sop_instance_uid", "digest"),
)
Index("conflict_state", conflict.c.state, conflict.c.compared)

# Contents that were not taken, since another is here under their UID.
refusal = Table(
    "refusal",
    metadata,
    *_columns(Characters(), "sop_instance_uid", "ward", "device"),
    *_columns(LargeBinary, "digest"),
    *_columns(BigInteger, "at_us"),
    PrimaryKeyConstraint("sop_instance_uid", "digest"),
    sqlite_with_rowid=False,
)

# `urgent` and `tries` derive from nothing: a rebuilt index starts with none.
outbox = Table(
    "outbox",
    metadata,
    *_columns(
        Characters(), "sop_instance_uid", "study_instance_uid", "series_instance_uid", "ward", "detail"
    ),
    *_columns(LargeBinary, "digest"),
    *_columns(BigInteger, "received_at_us", "bytes"),
    *_columns(Integer, "tries"),
    *_columns(Boolean, "conflict", "urgent", "set_aside"),
    Column("accepted_us", BigInteger, nullable=False, server_default="0"),  # the region is to be told: live
    Column("hidden", Boolean, nullable=False, server_default=false()),  # removed: it goes, nobody is told
    PrimaryKeyConstraint("sop_instance_uid", "digest"),
    sqlite_with_rowid=False,
)
Index("outbox_order", outbox.c.set_aside, outbox.c.urgent, outbox.c.received_at_us)
Index("outbox_study", outbox.c.study_instance_uid)

holding = Table(
    "holding",
    metadata,
    *_columns(Characters(), "study_instance_uid", "series_instance_uid", "sop_instance_uid", "ward"),
    PrimaryKeyConstraint("sop_instance_uid", "ward"),
    sqlite_with_rowid=False,
)
Index("holding_study", holding.c.study_instance_uid)

# Facts about an instance that is not here yet: a rebuild reads one log after the other.
early_fact = Table(
    "early_fact",
    metadata,
    *_columns(Characters(), "sop_instance_uid", "kind", "ward", "detail"),
    *_columns(LargeBinary, "digest"),
    *_columns(BigInteger, "at_us"),
    PrimaryKeyConstraint("sop_instance_uid", "digest", "kind", "ward"),
    sqlite_with_rowid=False,
)

# Space that facts say may be given back and that is not yet: payloads to punch, packs to remove (their length
# is 0). Progress, not content: a rebuilt index starts with all that ever was, and giving back twice is safe.
reclaim = Table(
    "reclaim",
    metadata,
    *_columns(Characters(), "pack", "sop_instance_uid"),
    *_columns(BigInteger, "payload_offset", "payload_length", "due_us"),
    *_columns(Integer, "dataset_offset"),
    *_columns(LargeBinary, "digest"),
    PrimaryKeyConstraint("pack", "payload_offset"),
)
Index("reclaim_due", reclaim.c.due_us)

# What people corrected of studies, by its id; without `changes` only its withdrawal is known yet.
correction = Table(
    "correction",
    metadata,
    *_columns(Characters(), "id", "study_instance_uid", "changes", "by", "reason", "ward"),
    *_columns(Characters(), "undone_by", "undone_reason", "undone_ward"),
    *_columns(BigInteger, "at_us", "undone_us"),
    PrimaryKeyConstraint("id"),
)
Index("correction_study", correction.c.study_instance_uid)
Index("correction_order", correction.c.at_us)

# Facts that travel between wards and the region, by what they say: one that is told again is known.
known_fact = Table(
    "known_fact",
    metadata,
    *_columns(LargeBinary, "key"),
    *_columns(Characters(), "kind"),
    PrimaryKeyConstraint("key"),
    sqlite_with_rowid=False,
)

# How far others have told their facts (`travel.py`): a rebuilt index is told them once more.
fact_cursor = Table(
    "fact_cursor",
    metadata,
    *_columns(Characters(), "teller"),
    *_columns(LargeBinary, "log", "seal"),
    *_columns(BigInteger, "file", "place"),
    *_columns(Boolean, "whole"),
    PrimaryKeyConstraint("teller"),
)

position = Table(
    "position",
    metadata,
    *_columns(Characters(), "log"),
    *_columns(BigInteger, "file", "place"),
    PrimaryKeyConstraint("log"),
)

DERIVED = (patient, study, series, series_ward, instance, removed, tombstone, conflict, refusal, outbox,
           holding, early_fact,
           correction, known_fact)  # fmt: skip  # fmt: skip
UNDERIVED_COLUMNS = frozenset({"urgent", "tries", "compared"})


def _first(connection: Connection) -> None:
    metadata.create_all(connection)
    if connection.dialect.name == "sqlite":
        # With the modalities in it, a study list of a rare modality is read from this index alone.
        connection.execute(text(
            "CREATE INDEX study_order ON study (study_date, study_time, study_instance_uid, modalities)"
        ))  # fmt: skip
        connection.execute(text("CREATE INDEX study_text_id ON study (text_id)"))
        connection.execute(text(
            f"CREATE VIRTUAL TABLE {STUDY_TEXT} USING fts5({', '.join(SEARCHED)}, tokenize='trigram')"
        ))  # fmt: skip
        return
    connection.execute(text("CREATE INDEX study_order ON study (study_date, study_time, study_instance_uid)"))
    connection.execute(text("CREATE EXTENSION IF NOT EXISTS pg_trgm"))
    for column in SEARCHED:
        connection.execute(text(
            f"CREATE INDEX study_{column}_trigrams ON study USING gin ({column} gin_trgm_ops)"
        ))  # fmt: skip


def _second(connection: Connection) -> None:
    """Instances may be evicted."""
    for table in (instance, conflict):
        if "evicted" not in {column["name"] for column in inspect(connection).get_columns(table.name)}:
            added = f"ALTER TABLE {table.name} ADD COLUMN evicted BOOLEAN NOT NULL DEFAULT FALSE"
            connection.execute(text(added))
    reclaim.create(connection, checkfirst=True)


def _third(connection: Connection) -> None:
    """Conflicts have a state, refusals are kept, and what was accepted is told to the region."""
    for table in (conflict, outbox):
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        for column in table.c:
            if column.name not in there and column.name in _ADDED_THIRD:
                connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {_ADDED_THIRD[column.name]}"))
    connection.execute(text("CREATE INDEX IF NOT EXISTS conflict_state ON conflict (state, compared)"))
    refusal.create(connection, checkfirst=True)


_ADDED_THIRD = {
    "state": "state TEXT NOT NULL DEFAULT 'open'",
    "decided_by": "decided_by TEXT NOT NULL DEFAULT ''",
    "decided_us": "decided_us BIGINT NOT NULL DEFAULT 0",
    "compared": "compared BOOLEAN NOT NULL DEFAULT FALSE",
    "accepted_us": "accepted_us BIGINT NOT NULL DEFAULT 0",
}


def _fourth(connection: Connection) -> None:
    """What was evicted is found without looking at what was not: answers say what has to be fetched."""
    evicted = "evicted = 1" if connection.dialect.name == "sqlite" else "evicted"
    connection.execute(text(
        "CREATE INDEX IF NOT EXISTS instance_evicted ON instance"
        f" (study_instance_uid, series_instance_uid, sop_instance_uid) WHERE {evicted}"
    ))  # fmt: skip


def _removals(connection: Connection) -> None:
    """What is removed lies apart; it still goes to the region."""
    if "hidden" not in {column["name"] for column in inspect(connection).get_columns(outbox.name)}:
        connection.execute(text("ALTER TABLE outbox ADD COLUMN hidden BOOLEAN NOT NULL DEFAULT FALSE"))
    for table in (removed, tombstone):
        table.create(connection, checkfirst=True)


def _corrections(connection: Connection) -> None:
    """Attributes of studies may be corrected, and facts travel between wards and the region."""
    for table in (correction, known_fact, fact_cursor):
        table.create(connection, checkfirst=True)


def _damages(connection: Connection) -> None:
    """How many are damaged is counted without looking at what is not: each report says so."""
    damaged = "damaged = 1" if connection.dialect.name == "sqlite" else "damaged"
    connection.execute(text(
        f"CREATE INDEX IF NOT EXISTS instance_damaged ON instance (sop_instance_uid) WHERE {damaged}"
    ))  # fmt: skip


STEPS: tuple[Step, ...] = (_first, _second, _third, _fourth, _removals, _corrections, _damages)
