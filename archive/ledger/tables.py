"""The ledger's tables and the steps that bring an older schema forward; only the ledger's modules use them.

Keys are natural or random, never from a sequence. The audit log refuses changes in the database itself.
"""

from __future__ import annotations

import secrets
from dataclasses import fields
from typing import Any, TypeVar

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
    inspect,
    text,
)
from sqlalchemy.types import TypeEngine

from archive.database import Characters, Database, Step, storable

T = TypeVar("T")

metadata = MetaData()


def _key(name: str) -> Column[Any]:
    return Column(name, Characters(), primary_key=True)


def _columns(
    kind: TypeEngine[Any] | type[TypeEngine[Any]], *names: str, null: bool = False
) -> list[Column[Any]]:
    return [Column(name, kind, nullable=null) for name in names]


ward = Table("ward", metadata, _key("id"), *_columns(Characters(), "hospital", "name", "issuer"))

ward_state = Table(
    "ward_state",
    metadata,
    _key("ward"),
    *_columns(LargeBinary, "epoch"),
    *_columns(
        BigInteger,
        "complete_to_us",
        "pending",
        "pending_bytes",
        "oldest_pending_us",
        "set_aside",
        "seen_us",
        "attached_since_us",
        "skew_us",
        "last_receipt_us",
    ),
    *_columns(Boolean, "attached"),
    *_columns(Characters(), "version", "report_json", "lost_note"),
)

device = Table(
    "device",
    metadata,
    _key("ae_title"),
    *_columns(Characters(), "address", "name", "services"),
    *_columns(Characters(), "transport", "certificate", "sop_classes", "transfer_syntaxes", "on_conflict"),
    *_columns(Characters(), "host", "reach", "on_incomplete"),
    *_columns(Characters(), "issuer", null=True),
    *_columns(Integer, "port", null=True),
    *_columns(Integer, "max_age_s"),
    *_columns(Boolean, "enabled"),
)

# Keys of the logs are time and chance, so that the newest come first by the key alone and nobody counts.
connection_log = Table(
    "connection_log",
    metadata,
    _key("id"),
    *_columns(BigInteger, "at_us", "bytes_in", "bytes_out", "ended_us"),
    *_columns(
        Characters(),
        "address",
        "calling_ae",
        "called_ae",
        "device",
        "outcome",
        "reason",
        "contexts",
        "operations",
        "ended",
        "transport",
        "certificate",
        "user_name",
    ),
    *_columns(Integer, "times"),
)
Index("connection_log_outcome", connection_log.c.outcome, connection_log.c.id)

user_account = Table(
    "user_account",
    metadata,
    _key("name"),
    *_columns(Characters(), "display_name", "role", "password_hash"),
    *_columns(Characters(), "ward", null=True),
    *_columns(Boolean, "enabled"),
)

user_session = Table(
    "user_session",
    metadata,
    Column("id_hash", LargeBinary, primary_key=True),
    *_columns(Characters(), "user_name", "csrf"),
    *_columns(BigInteger, "created_us", "seen_us"),
)
Index("user_session_user", user_session.c.user_name)

sign_in_failure = Table(
    "sign_in_failure",
    metadata,
    _key("subject"),
    *_columns(Integer, "failures"),
    *_columns(BigInteger, "last_us"),
)

certificate = Table(
    "certificate",
    metadata,
    _key("fingerprint"),
    *_columns(Characters(), "serial", "spki", "identity", "profile", "state", "reason"),
    *_columns(Characters(), "ward", null=True),
    *_columns(BigInteger, "not_before_us", "not_after_us", "issued_us"),
    *_columns(LargeBinary, "der"),
)
Index("certificate_serial", certificate.c.serial, unique=True)
Index("certificate_identity", certificate.c.identity)
Index("certificate_spki", certificate.c.spki, unique=True)  # a key gets one certificate, ever

counter = Table("counter", metadata, _key("name"), *_columns(BigInteger, "value"))

invite = Table(
    "invite",
    metadata,
    _key("id"),
    *_columns(LargeBinary, "secret_hash"),
    *_columns(Characters(), "profile", "hospital", "ward_name", "issuer", "ward_id", "state"),
    *_columns(BigInteger, "created_us", "expires_us"),
    *_columns(Integer, "tries_left"),
    *_columns(Characters(), "spki", "certificate_serial", null=True),
)

audit = Table(
    "audit",
    metadata,
    _key("id"),
    *_columns(BigInteger, "at_us"),
    *_columns(Characters(), "who", "role", "ward", "act", "subject", "outcome", "address", "correlation"),
)
Index("audit_who", audit.c.who, audit.c.id)
Index("audit_correlation", audit.c.correlation)

# What commands ask of the process that runs; `detail` is JSON.
order_ = Table(
    "order_",
    metadata,
    _key("id"),
    *_columns(Characters(), "kind", "detail", "by", "state", "answer"),
    *_columns(BigInteger, "at_us", "answered_us"),
)
Index("order_state", order_.c.state, order_.c.id)

# What waits for which destination by the routing rules; `id` is a hash of destination and content. Of a
# notice `sop_instance_uid` is "".
route = Table(
    "route",
    metadata,
    Column("id", LargeBinary, primary_key=True),
    *_columns(Characters(), "rule", "kind", "destination", "study_uid", "series_uid", "sop_instance_uid"),
    *_columns(Characters(), "state", "comment", "transaction_uid"),
    *_columns(LargeBinary, "digest"),
    *_columns(BigInteger, "queued_us", "next_try_us", "expires_us"),
    *_columns(Integer, "rank", "tries", "status"),
    *_columns(Boolean, "ask_commit"),
)
Index("route_turn", route.c.kind, route.c.destination, route.c.state, route.c.rank, route.c.queued_us)
Index("route_due", route.c.kind, route.c.destination, route.c.state, route.c.next_try_us)

route_sent = Table("route_sent", metadata, Column("id", LargeBinary, primary_key=True),
                   *_columns(BigInteger, "at_us"))  # fmt: skip
Index("route_sent_at", route_sent.c.at_us)

# How far each rule has looked in the packs of one disk.
route_rule = Table(
    "route_rule",
    metadata,
    _key("rule"),
    *_columns(LargeBinary, "epoch"),
    *_columns(BigInteger, "since_us", "file", "place"),
)

route_destination = Table(
    "route_destination",
    metadata,
    _key("kind"),
    _key("name"),
    *_columns(Characters(), "error"),
    *_columns(BigInteger, "resume_us", "at_us"),
    *_columns(Integer, "failures"),
)

# Studies that were said to be complete, until the rules have looked at them.
route_study = Table("route_study", metadata, _key("study_uid"), *_columns(Characters(), "why"),
                    *_columns(BigInteger, "at_us"))  # fmt: skip

# What one ward handed over to another, in the region's ledger.
delivery = Table(
    "delivery",
    metadata,
    _key("to_ward"),
    _key("from_ward"),
    _key("sop_instance_uid"),
    Column("digest", LargeBinary, primary_key=True),
    *_columns(Characters(), "state", "issuer", "calling_ae", "reason"),
    *_columns(BigInteger, "size", "ordered_us", "due_us", "done_us"),
    *_columns(Integer, "tries"),
)
Index("delivery_due", delivery.c.to_ward, delivery.c.state, delivery.c.due_us)
Index("delivery_pair", delivery.c.to_ward, delivery.c.from_ward, delivery.c.state)
Index("delivery_awaited", delivery.c.state, delivery.c.sop_instance_uid)
Index("delivery_age", delivery.c.state, delivery.c.done_us, delivery.c.ordered_us)

# How a node's deliveries stood when the hub told it last.
delivery_told = Table(
    "delivery_told",
    metadata,
    _key("from_ward"),
    _key("to_ward"),
    *_columns(BigInteger, "awaited", "ready", "oldest_us", "delivered", "failed", "at_us"),
    *_columns(Characters(), "reason"),
)

# Storage commitment (PS3.4 Annex J): what devices asked of us ("scp") and what we asked of them ("scu").
commitment = Table(
    "commitment",
    metadata,
    _key("id"),
    *_columns(Characters(), "role", "device", "transaction_uid", "state", "last_error"),
    *_columns(BigInteger, "asked_us", "settled_us", "ended_us", "next_try_us"),
    *_columns(Integer, "instances", "failed", "tries"),
)
Index(
    "commitment_transaction",
    commitment.c.role,
    commitment.c.device,
    commitment.c.transaction_uid,
    unique=True,
)
Index("commitment_state", commitment.c.role, commitment.c.state, commitment.c.next_try_us)

# `reason` is 0 for what is committed, -1 while that is not known, else why not (0008,1197).
commitment_item = Table(
    "commitment_item",
    metadata,
    _key("commitment"),
    _key("sop_instance_uid"),
    *_columns(Characters(), "sop_class_uid"),
    *_columns(Integer, "reason"),
    *_columns(LargeBinary, "digest"),
    sqlite_with_rowid=False,
)

# The modality worklist (PS3.4 Annex K): the data set as DICOM JSON, and the keys that narrow a search. A step
# has a row for each station that it names, or one of "" when it names none.
scheduled_step = Table(
    "scheduled_step",
    metadata,
    _key("id"),
    *_columns(Characters(), "accession_number", "requested_procedure_id", "step_id", "study_uid"),
    *_columns(Characters(), "patient_id", "modality", "start_date", "start_time", "status", "origin"),
    *_columns(Characters(), "dataset"),
    *_columns(BigInteger, "changed_us"),
)
Index("scheduled_step_date", scheduled_step.c.start_date, scheduled_step.c.start_time, scheduled_step.c.id)
Index("scheduled_step_patient", scheduled_step.c.patient_id)
Index("scheduled_step_accession", scheduled_step.c.accession_number)
Index("scheduled_step_study", scheduled_step.c.study_uid)
Index("scheduled_step_origin", scheduled_step.c.origin)

scheduled_station = Table(
    "scheduled_station",
    metadata,
    *_columns(Characters(), "ae_title", "start_date", "step"),
    PrimaryKeyConstraint("ae_title", "start_date", "step"),
    sqlite_with_rowid=False,
)
Index("scheduled_station_step", scheduled_station.c.step)

# Modality performed procedure steps (PS3.4 F.7), and the scheduled steps that each says it performs.
performed_step = Table(
    "performed_step",
    metadata,
    _key("uid"),
    *_columns(Characters(), "state", "device", "step_id", "station_ae_title", "modality", "patient_id"),
    *_columns(Characters(), "start_date", "start_time", "dataset"),
    *_columns(BigInteger, "created_us", "changed_us"),
)
Index("performed_step_created", performed_step.c.created_us)
Index("performed_step_state", performed_step.c.state)

performed_reference = Table(
    "performed_reference",
    metadata,
    *_columns(Characters(), "step", "study_uid", "accession_number", "requested_procedure_id"),
    *_columns(Characters(), "scheduled_step_id"),
    PrimaryKeyConstraint(
        "step", "study_uid", "accession_number", "requested_procedure_id", "scheduled_step_id"
    ),
    sqlite_with_rowid=False,
)
Index("performed_reference_study", performed_reference.c.study_uid)

# Studies that were said to be complete, and with how many instances.
study_completion = Table(
    "study_completion",
    metadata,
    _key("study_uid"),
    *_columns(Characters(), "why"),
    *_columns(Integer, "instances"),
    *_columns(BigInteger, "at_us"),
)
Index("study_completion_at", study_completion.c.at_us)

# What a node's cache keeps, and why; when each study was last wanted; how the cache stands, for people.
pinned_study = Table(
    "pinned_study",
    metadata,
    *_columns(Characters(), "study_uid", "kind"),
    *_columns(BigInteger, "until_us"),
    *_columns(Characters(), "by"),
    *_columns(BigInteger, "at_us"),
    PrimaryKeyConstraint("study_uid", "kind"),
)

study_use = Table("study_use", metadata, _key("study_uid"), *_columns(BigInteger, "at_us"))
Index("study_use_at", study_use.c.at_us)

cache_note = Table(
    "cache_note", metadata, _key("name"), *_columns(Characters(), "value"), *_columns(BigInteger, "at_us")
)

# Backups of the region, as they were declared: all that it had confirmed by then is in them.
declared_backup = Table(
    "declared_backup",
    metadata,
    Column("as_of_us", BigInteger, primary_key=True, autoincrement=False),
    *_columns(Characters(), "by"),
    *_columns(BigInteger, "at_us"),
)

_REFUSE_SQLITE = """
CREATE TRIGGER audit_keeps_{act} BEFORE {act} ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END
"""
_REFUSE_POSTGRESQL = (
    """
    CREATE FUNCTION audit_keeps() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'the audit log only grows'; END $$
    """,
    "CREATE TRIGGER audit_keeps BEFORE UPDATE OR DELETE OR TRUNCATE ON audit EXECUTE FUNCTION audit_keeps()",
)


def _first(connection: Connection) -> None:
    metadata.create_all(connection)
    if connection.dialect.name == "sqlite":
        for act in ("UPDATE", "DELETE"):
            connection.execute(text(_REFUSE_SQLITE.format(act=act)))
    else:
        for statement in _REFUSE_POSTGRESQL:
            connection.execute(text(statement))
    connection.execute(counter.insert().values(name="revocation", value=0))


_ADDED_SECOND = {
    "device": {
        "transport": "TEXT NOT NULL DEFAULT 'any'",
        "certificate": "TEXT NOT NULL DEFAULT ''",
        "sop_classes": "TEXT NOT NULL DEFAULT ''",
        "transfer_syntaxes": "TEXT NOT NULL DEFAULT ''",
        "on_conflict": "TEXT NOT NULL DEFAULT 'keep'",
    },
    "connection_log": {
        "transport": "TEXT NOT NULL DEFAULT 'plain'",
        "certificate": "TEXT NOT NULL DEFAULT ''",
        "times": "INTEGER NOT NULL DEFAULT 1",
    },
}


def _second(connection: Connection) -> None:
    """Devices by certificate, transport, SOP class and transfer syntax; how a connection came and how
    often."""
    _add_columns(connection, _ADDED_SECOND)


def _third(connection: Connection) -> None:
    """Orders; a ledger that is made now has them from the first step."""
    order_.create(connection, checkfirst=True)


def _fourth(connection: Connection) -> None:
    """The verified user of an association."""
    _add_columns(connection, {"connection_log": {"user_name": "TEXT NOT NULL DEFAULT ''"}})


def _fifth(connection: Connection) -> None:
    """Where a device listens, when that is not where it comes from; how far it looks, and what becomes of an
    answer that lacks a ward."""
    added = {
        "host": "TEXT NOT NULL DEFAULT ''",
        "reach": "TEXT NOT NULL DEFAULT 'ward'",
        "on_incomplete": "TEXT NOT NULL DEFAULT 'succeed'",
        "max_age_s": "INTEGER NOT NULL DEFAULT 43200",
    }
    _add_columns(connection, {"device": added})


def _sixth(connection: Connection) -> None:
    """Storage commitment; worklist, performed steps, and which studies are complete; the queue of the routing
    rules; deliveries from ward to ward."""
    for table in (
        commitment, commitment_item,
        scheduled_step, scheduled_station, performed_step, performed_reference, study_completion,
        route, route_sent, route_rule, route_destination, route_study,
        delivery, delivery_told,
    ):  # fmt: skip
        table.create(connection, checkfirst=True)


def _keeping(connection: Connection) -> None:
    """What a node's cache keeps; the backups of the region."""
    for table in (pinned_study, study_use, cache_note, declared_backup):
        table.create(connection, checkfirst=True)


def _add_columns(connection: Connection, added: dict[str, dict[str, str]]) -> None:
    """A ledger that this release makes has them from the first step."""
    for table, columns in added.items():
        there = {column["name"] for column in inspect(connection).get_columns(table)}
        for name, definition in columns.items():
            if name not in there:
                connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {name} {definition}"))


STEPS: tuple[Step, ...] = (_first, _second, _third, _fourth, _fifth, _sixth, _keeping)


def log_key(at_us: int) -> str:
    """A key that sorts by time and that no other process makes."""
    return f"{at_us:016x}{secrets.token_hex(6)}"


def as_row(instance: Any) -> dict[str, Any]:
    """A frozen dataclass as a row: text made storable, and sets joined."""
    row: dict[str, Any] = {}
    for field in fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, frozenset):
            value = ",".join(sorted(value))
        row[field.name] = storable(value) if isinstance(value, str) else value
    return row


class Subject:
    """A part of the ledger over the one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
