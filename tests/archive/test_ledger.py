"""The ledger on SQLite and PostgreSQL."""

from __future__ import annotations

import multiprocessing
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection as DatabaseConnection
from sqlalchemy import create_engine, text

from archive.database import Database, sqlite_url
from archive.errors import InvalidInput, SchemaTooNew, SettingsError, Unavailable
from archive.index.index import Index
from archive.ledger import (
    AuditRow,
    Binding,
    CertificateRow,
    Connection,
    Device,
    Invite,
    Ledger,
    Session,
    Throttle,
    User,
    WardState,
)
from archive.model import Ward


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    opened = Ledger.open(database_url)
    yield opened
    opened.close()


INVITE = Invite("i1", b"h" * 32, "node", "San Martino", "Radiology", "SM", "san-martino/radiology", 0, 1_000)
CERTIFICATE = CertificateRow(
    "0a",
    "f1",
    "key-1",
    "spiffe://r/node/san-martino/radiology",
    "node",
    "san-martino/radiology",
    1,
    2,
    der=b"der",
)
USER = User("anna", "Anna B", "ward technician", "san-martino/radiology")


def test_wards_are_kept_and_changed(ledger: Ledger) -> None:
    ledger.add_ward(Ward("b/x", "B", "X", "IB"))
    ledger.add_ward(Ward("a/x", "A", "X", "IA"))
    ledger.add_ward(Ward("a/x", "A", "X-ray", "IA"))
    assert [ward.name for ward in ledger.wards()] == ["X-ray", "X"]
    assert ledger.ward("a/x") == Ward("a/x", "A", "X-ray", "IA")
    assert ledger.ward("c") is None
    assert ledger.remove_ward("a/x") and not ledger.remove_ward("a/x")


def test_the_wards_mark_changes_with_what_an_answer_says_of_them(ledger: Ledger) -> None:
    assert ledger.ward_mark()[:3] == (0, 0, 0)
    ledger.add_ward(Ward("a/x", "A", "X", "A"))
    state = WardState("a/x", b"e", complete_to_us=5, seen_us=5, attached=True, attached_since_us=1)
    marks = []
    for each in (
        state, replace(state, pending=2), replace(state, set_aside=1), replace(state, attached=False),
        replace(state, attached_since_us=2), replace(state, lost_note="2 lost"), replace(state, seen_us=0),
        replace(state, complete_to_us=0),
    ):  # fmt: skip
        ledger.put_ward_state(each)
        marks.append(ledger.ward_mark())
    assert len(set(marks)) == len(marks)
    assert [mark[0] for mark in marks] == [0, 1, 1, 0, 0, 0, 0, 0]
    ledger.put_ward_state(replace(state, seen_us=9, complete_to_us=9, last_receipt_us=3, report_json="{}"))
    assert ledger.ward_mark() == marks[0]  # the times of reports move on all the while


def test_a_ward_state_takes_the_place_of_the_last(ledger: Ledger) -> None:
    state = WardState(
        "a/x", b"e" * 16, complete_to_us=5, pending=2, attached=True, report_json="{}", skew_us=-3
    )
    ledger.put_ward_state(state)
    ledger.put_ward_state(replace(state, pending=0, attached=False))
    ledger.put_ward_state(WardState("b/x"))
    assert ledger.ward_states() == {"a/x": replace(state, pending=0, attached=False), "b/x": WardState("b/x")}


def test_devices_are_read_live_by_another_process(ledger: Ledger, database_url: str) -> None:
    device = Device("CT1", "10.0.0.0/8", "CT", issuer="X", port=104, services=frozenset({"store"}))
    other = Ledger.open(database_url)
    assert other.device("CT1") is None
    ledger.add_device(device)
    assert other.device("CT1") == device
    ledger.add_device(replace(device, enabled=False))
    assert other.device("CT1") == replace(device, enabled=False)
    assert other.devices() == [replace(device, enabled=False)]
    assert other.device("CT1\x00") is not None, "padding is not part of an AE title"
    assert ledger.remove_device("CT1") and not ledger.remove_device("CT1")
    assert other.device("CT1") is None
    other.close()


def test_the_connection_log_keeps_the_newest(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archive.ledger.devices.CONNECTIONS_MAX", 20)
    monkeypatch.setattr("archive.ledger.devices._TRIM_ONE_IN", 1)
    for number in range(50):
        outcome = "refused" if number % 2 else "accepted"
        ledger.log_connections([Connection(number, "10.1.1.1", f"AE\x00{number}", "MISS", outcome=outcome)])
    logged = ledger.connections(100)
    assert [one.at_us for one in logged] == list(range(49, 29, -1))
    assert logged[0].calling_ae == "AE49", "what no database could hold is dropped, not the row"
    assert [one.at_us for one in ledger.connections(3, refused_only=True)] == [49, 47, 45]


def test_accounts(ledger: Ledger) -> None:
    ledger.add_user(USER, "hash-1")
    with pytest.raises(InvalidInput):
        ledger.add_user(USER, "hash-2")
    assert ledger.user("anna") == (USER, "hash-1")
    assert ledger.user("nobody") is None
    assert ledger.change_user(replace(USER, role="regional IT", ward=None))
    assert ledger.users() == [replace(USER, role="regional IT", ward=None)]
    assert not ledger.set_password("nobody", "x")
    assert ledger.remove_user("anna") and not ledger.remove_user("anna")


@pytest.mark.parametrize(
    "act", ["set_password", "disable_user", "remove_user", "change_user", "end_user_sessions"]
)
def test_sessions_end_with_what_they_rest_on(ledger: Ledger, act: str) -> None:
    ledger.add_user(USER, "hash")
    ledger.add_user(replace(USER, name="bea"), "hash")
    for number, name in enumerate(("anna", "anna", "bea")):
        ledger.create_session(Session(bytes([number]) * 32, name, 10, 10, "csrf"))
    arguments = {"set_password": ("anna", "new"), "change_user": (USER,)}.get(act, ("anna",))
    assert getattr(ledger, act)(*arguments)
    assert ledger.session(b"\0" * 32) is None and ledger.session(b"\1" * 32) is None
    assert ledger.session(b"\2" * 32) == Session(b"\2" * 32, "bea", 10, 10, "csrf")


def test_sessions_age(ledger: Ledger) -> None:
    ledger.create_session(Session(b"a" * 32, "anna", 10, 10, "csrf"))
    ledger.create_session(Session(b"b" * 32, "anna", 20, 20, "csrf"))
    ledger.touch_session(b"a" * 32, 90)
    found = ledger.session(b"a" * 32)
    assert found is not None and found.seen_us == 90
    assert ledger.purge_sessions(seen_before_us=50, created_before_us=0) == 1
    assert ledger.session(b"b" * 32) is None
    assert ledger.purge_sessions(seen_before_us=0, created_before_us=11) == 1
    assert not ledger.end_session(b"a" * 32)


def test_failures_are_counted_by_subject_and_forgotten(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ledger.throttle("user:anna") == Throttle(0, 0)
    for at_us in (1, 2, 3):
        ledger.note_failure("user:anna", at_us)
    ledger.note_failure("address:10.1.1.1", 3)
    assert ledger.throttle("user:anna") == Throttle(3, 3)
    assert ledger.note_failure("user:anna", 100, forget_before_us=50) == Throttle(1, 100)
    assert ledger.throttle("address:10.1.1.1") == Throttle(0, 0), "forgotten with the rest"
    ledger.clear_failures("user:anna")
    assert ledger.throttle("user:anna") == Throttle(0, 0)
    monkeypatch.setattr("archive.ledger.users.THROTTLE_SUBJECTS_MAX", 3)
    for number in range(6):
        ledger.note_failure(f"address:{number}", number)
    assert [ledger.throttle(f"address:{number}").failures for number in range(6)] == [0, 0, 0, 1, 1, 1]


def test_revocation_moves_the_counter_once(ledger: Ledger, database_url: str) -> None:
    other = Ledger.open(database_url)
    ledger.add_certificate(CERTIFICATE)
    before = other.revocation_version()
    assert not ledger.revoke_certificate("none", "x")
    assert ledger.revocation_version() == before
    assert ledger.revoke_certificate("0A", "stolen")
    assert other.revocation_version() > before
    assert not ledger.revoke_certificate("f1", "again")
    found = other.certificate("f1")
    assert found == replace(CERTIFICATE, state="revoked", reason="stolen")
    assert other.certificate("0a") == found
    assert other.certificates(identity=CERTIFICATE.identity) == [found]
    other.close()


def test_an_invite_is_bound_once(ledger: Ledger) -> None:
    ledger.add_invite(INVITE)
    assert ledger.bind_invite("none", "key-1", now_us=1) == (Binding.UNKNOWN, None)
    assert ledger.bind_invite("i1", "key-1", now_us=1, secret_hash=b"x" * 32)[0] is Binding.WRONG_SECRET
    assert ledger.bind_invite("i1", "key-1", now_us=1, secret_hash=b"h" * 32)[0] is Binding.BOUND
    assert ledger.bind_invite("i1", "key-1", now_us=9_999)[0] is Binding.SAME_KEY, "the reply was lost"
    assert ledger.complete_invite("i1", CERTIFICATE) == CERTIFICATE
    again = replace(CERTIFICATE, serial="0b", fingerprint="f2")
    assert ledger.complete_invite("i1", again) == CERTIFICATE, "the same certificate again"
    assert ledger.certificate("f2") is None
    binding, after = ledger.bind_invite("i1", "key-2", now_us=2)
    assert binding is Binding.OTHER_KEY and after is not None and after.state == "burnt"
    assert ledger.bind_invite("i1", "key-1", now_us=2)[0] is Binding.BURNT


def test_an_invite_expires_and_its_tries_end(ledger: Ledger) -> None:
    ledger.add_invite(INVITE)
    ledger.add_invite(replace(INVITE, id="i2", created_us=5))
    binding, after = ledger.bind_invite("i1", "key-1", now_us=1_000)
    assert binding is Binding.EXPIRED and after is not None and after.state == "expired"
    assert [ledger.spend_try("i2") for _ in range(6)] == [4, 3, 2, 1, 0, 0]
    assert ledger.bind_invite("i2", "key-1", now_us=1, secret_hash=b"h" * 32)[0] is Binding.BURNT
    assert [one.id for one in ledger.invites()] == ["i2", "i1"]
    assert not ledger.burn_invite("i2") and ledger.burn_invite("i1")


def test_of_many_keys_at_once_one_is_bound(ledger: Ledger) -> None:
    for number in range(10):
        ledger.add_invite(replace(INVITE, id=f"i{number}"))
        barrier = threading.Barrier(4)

        def bind(key: int, invite: str = f"i{number}", barrier: threading.Barrier = barrier) -> Binding:
            barrier.wait()
            return ledger.bind_invite(invite, f"key-{key}", now_us=1)[0]

        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(bind, range(4)))
        assert outcomes.count(Binding.BOUND) == 1
        assert set(outcomes) <= {Binding.BOUND, Binding.OTHER_KEY, Binding.BURNT}


def test_of_many_processes_at_once_one_opens_a_new_ledger_first(database_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        outcomes = pool.map(_enrol, [(database_url, number) for number in range(3)])
    ledger = Ledger.open(database_url)
    assert sorted(ward.id for ward in ledger.wards()) == ["w/0", "w/1", "w/2"]
    assert outcomes == [0, 0, 0]
    ledger.close()


def _enrol(job: tuple[str, int]) -> int:
    url, number = job
    ledger = Ledger.open(url)
    ledger.add_ward(Ward(f"w/{number}", "W", "W", "I"))
    version = ledger.revocation_version()
    ledger.close()
    return version


def test_the_audit_log_only_grows(ledger: Ledger) -> None:
    for number in range(5):
        ledger.audit(
            AuditRow(number, "anna", act="search" if number % 2 else "read", correlation=f"c{number}")
        )
    assert [row.at_us for row in ledger.audit_rows(2)] == [4, 3]
    assert [row.at_us for row in ledger.audit_rows(9, before_us=3)] == [2, 1, 0]
    assert [row.at_us for row in ledger.audit_rows(9, act="read")] == [4, 2, 0]
    assert [row.at_us for row in ledger.audit_rows(9, who="bea")] == []
    assert [row.at_us for row in ledger.audit_rows(9, correlation="c3")] == [3]
    for statement in ("UPDATE audit SET who = 'bea'", "DELETE FROM audit"):
        with pytest.raises(Unavailable):
            ledger._database.write(partial(_execute, statement))
    assert {row.who for row in ledger.audit_rows(9)} == {"anna"}


def test_a_ledger_of_a_newer_release_is_refused(database_url: str) -> None:
    Ledger.open(database_url).close()
    Index.open(database_url).close()
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE schema_version SET version = version + 1 WHERE name = 'ledger'"))
    with pytest.raises(SchemaTooNew, match="ledger"):
        Ledger.open(database_url)
    Index.open(database_url).close()
    with engine.begin() as connection:
        connection.execute(text("UPDATE schema_version SET version = version + 1 WHERE name = 'index'"))
    with pytest.raises(SchemaTooNew, match="index"):
        Index.open(database_url)
    engine.dispose()


def test_an_older_schema_goes_forward_by_the_steps_it_lacks(database_url: str) -> None:
    ran: list[int] = []

    def step(number: int) -> Callable[[DatabaseConnection], None]:
        return lambda connection: ran.append(number)

    Database(database_url, name="thing", steps=[step(1)]).close()
    Database(database_url, name="thing", steps=[step(1), step(2), step(3)]).close()
    Database(database_url, name="thing", steps=[step(1), step(2), step(3)]).close()
    assert ran == [1, 2, 3]


FIRST_DEVICE = """
CREATE TABLE device (ae_title TEXT NOT NULL PRIMARY KEY, address TEXT NOT NULL, name TEXT NOT NULL,
services TEXT NOT NULL, issuer TEXT, port INTEGER, enabled BOOLEAN NOT NULL)
"""
FIRST_CONNECTION_LOG = """
CREATE TABLE connection_log (id TEXT NOT NULL PRIMARY KEY, at_us BIGINT NOT NULL, bytes_in BIGINT NOT NULL,
bytes_out BIGINT NOT NULL, ended_us BIGINT NOT NULL, address TEXT NOT NULL, calling_ae TEXT NOT NULL,
called_ae TEXT NOT NULL, device TEXT NOT NULL, outcome TEXT NOT NULL, reason TEXT NOT NULL,
contexts TEXT NOT NULL, operations TEXT NOT NULL, ended TEXT NOT NULL)
"""


def test_a_ledger_of_the_first_schema_opens_with_what_it_holds(database_url: str) -> None:
    """The tables are spelt out as the first release made them."""

    def first(connection: DatabaseConnection) -> None:
        for statement in (
            FIRST_DEVICE,
            FIRST_CONNECTION_LOG,
            "INSERT INTO device VALUES ('CT1', '10.0.0.5', 'CT', 'find,store', NULL, 104, TRUE)",
            "INSERT INTO connection_log VALUES ('0', 1, 2, 3, 4, '10.0.0.5', 'CT1', 'MISS', 'CT', 'accepted',"
            " '', '[]', '{}', 'released')",
        ):
            connection.execute(text(statement))

    Database(database_url, name="ledger", steps=[first]).close()
    ledger = Ledger.open(database_url)
    # What it was allowed then stays: services that came later are for a person to allow.
    device = Device("CT1", "10.0.0.5", "CT", port=104, services=frozenset({"store", "find"}))
    assert ledger.device("CT1") == device and ledger.devices() == [device]
    assert ledger.connections() == [
        Connection(1, "10.0.0.5", "CT1", "MISS", "CT", bytes_in=2, bytes_out=3, ended="released", ended_us=4)
    ]
    changed = replace(device, transport="tls", certificate="ab", sop_classes=frozenset({"1.2", "1.3"}),
                      reach="region", on_incomplete="fail", max_age_s=60)
    ledger.add_device(changed)
    assert ledger.device("CT1") == changed and ledger.devices() == [changed]
    ledger.close()


def test_a_step_that_fails_leaves_nothing(database_url: str) -> None:
    def broken(connection: DatabaseConnection) -> None:
        connection.execute(text("CREATE TABLE half (a INTEGER)"))
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Database(database_url, name="thing", steps=[broken])
    Database(database_url, name="thing", steps=[partial(_execute, "CREATE TABLE half (a INTEGER)")]).close()


def _execute(statement: str, connection: DatabaseConnection) -> None:
    connection.execute(text(statement))


def test_the_file_is_for_its_owner_alone_and_fully_synced(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger.db"
    ledger = Ledger.open(sqlite_url(path))
    ledger.add_user(USER, "hash")
    for name in os.listdir(path.parent):
        assert stat.S_IMODE((path.parent / name).stat().st_mode) == 0o600, name
    with ledger._database._engine.connect() as connection:
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    ledger.close()


def test_a_path_with_odd_characters_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a?b#c%20 d" / "x.db"
    ledger = Ledger.open(sqlite_url(path))
    ledger.add_ward(Ward("a/x", "A", "X", "I"))
    ledger.close()
    assert path.exists()


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "sqlite://", ""])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(SettingsError):
        Ledger.open(url)


def test_a_database_that_is_gone_is_unavailable_and_comes_back(postgresql_url: str) -> None:
    ledger = Ledger.open(postgresql_url)
    ledger.add_user(USER, "hash of Anna")
    killer = create_engine(postgresql_url.replace("postgresql://", "postgresql+psycopg://"))
    with killer.connect() as connection:
        connection.execute(text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        ))  # fmt: skip
    assert ledger.users() == [USER], "a broken connection of the pool is replaced"
    killer.dispose()
    ledger.close()
    with pytest.raises(Unavailable):
        Ledger.open("postgresql://miss@/none?host=/nonexistent")


def test_no_value_is_in_an_error(database_url: str) -> None:
    ledger = Ledger.open(database_url)
    ledger.add_certificate(CERTIFICATE)
    with pytest.raises(Unavailable) as caught:
        ledger._database.write(
            lambda connection: connection.execute(text("INSERT INTO nothing VALUES (:v)"), {"v": "Rossi"})
        )
    assert "Rossi" not in str(caught.value)
    assert caught.value.__suppress_context__
    ledger.close()
