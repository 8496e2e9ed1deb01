"""A record that the index can't take: it is stepped over and reported, and holds up nobody. An index that
takes nothing steps over nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from archive.archive import Archive, ArchiveSettings
from archive.index import index as index_module
from archive.index.apply import apply_entries
from archive.model import START, Fact, FactKind, IndexEntry, Outcome
from archive.rebuild import rebuild
from tests.archive.archives import send, settings_for, store, stored_bytes
from tests.datasets import Instance, make_instance
from tests.waiting import wait_for

POISON = "1.2.3.66"


@pytest.fixture
def settings(tmp_path: Path) -> ArchiveSettings:
    return settings_for(tmp_path / "state", index_lag_s_max=5.0)


def batch(number: int = 40) -> list[Instance]:
    """One of them, in the middle, is the poison."""
    made = [make_instance(number=n) for n in range(number)]
    made[number // 3] = make_instance(sop_uid=POISON, number=99)
    return made


def damages(archive: Archive, count: int) -> list[Fact]:
    """The damage facts, once there are as many; they are recorded just after the index has moved."""

    def recorded() -> list[Fact]:
        facts = [fact for found in archive.facts.read(START) for fact in found.facts]
        return [fact for fact in facts if fact.kind is FactKind.DAMAGE]

    wait_for(lambda: len(recorded()) >= count, f"{count} damages")
    found = recorded()
    assert len(found) == count
    return found


def failing_for(is_struck: Callable[[str], bool]) -> Callable[..., None]:
    """What applies records, with a fault of our own."""

    def apply(connection: Any, entries: Sequence[IndexEntry], **rest: Any) -> None:
        for entry in entries:
            if is_struck(entry.record.head.sop_instance_uid):
                raise KeyError("a fault that nobody foresaw")
        apply_entries(connection, entries, **rest)

    return apply


def refuse(url: str) -> None:
    """Let the database itself refuse the poison."""
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            connection.execute(
                f"CREATE TRIGGER refuse BEFORE INSERT ON instance WHEN NEW.sop_instance_uid = '{POISON}'"
                " BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
        connection.close()
    else:
        with psycopg.connect(url) as connected:
            connected.execute(
                f"ALTER TABLE instance ADD CONSTRAINT refuse CHECK (sop_instance_uid <> '{POISON}')"
            )


def test_what_the_database_refuses_holds_up_nobody(tmp_path: Path, database_url: str) -> None:
    settings = settings_for(tmp_path / "state", index_url=database_url)
    with Archive.open(settings, outbox=True) as archive:
        store(archive, make_instance())
        refuse(database_url)
        others = [one for one in batch() if one.sop_instance_uid != POISON]
        tickets = [send(archive, one) for one in batch() + others]
        for ticket in tickets:
            ticket.wait_indexed()
        assert archive.index.totals().instances == 1 + 39 + len(others)
        (fact,) = damages(archive, 1)
        assert fact.sop_instance_uid == POISON and fact.detail.startswith("pack 1 from ")


def test_a_fault_of_our_own_holds_up_nobody_and_a_restart_neither(
    settings: ArchiveSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = batch()
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "apply_entries", failing_for(POISON.__eq__))
        with Archive.open(settings, outbox=True) as archive:
            for instance in instances:
                store(archive, instance)
            archive.wait_indexed()
            assert archive.index.totals().instances == 39
            assert [fact.sop_instance_uid for fact in damages(archive, 1)] == [POISON]
            assert archive.index.pending_summary().count == 39
        for name in settings.state.glob("index.db*"):
            name.unlink()
        with Archive.open(settings, outbox=True) as archive:  # catches up with the poison on its way
            assert archive.index.totals().instances == 39
            assert store(archive, make_instance()) is Outcome.STORED
    assert not rebuild(settings, outbox=True).damages  # by a release that can take it
    with Archive.open(settings, outbox=True) as archive:
        for instance in instances:
            assert stored_bytes(archive, instance) == instance.dataset


def test_many_at_once_hold_up_nobody(settings: ArchiveSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "apply_entries", failing_for(lambda uid: uid.startswith("1.2.3.")))
    with Archive.open(settings, outbox=True) as archive:
        for number in range(60):
            send(archive, make_instance(sop_uid=f"1.2.3.{number}", number=number))
        good = make_instance()
        store(archive, good)
        archive.wait_indexed()
        assert stored_bytes(archive, good) == good.dataset
        assert len(damages(archive, 60)) == 60


def test_an_index_that_takes_nothing_steps_over_nothing(
    settings: ArchiveSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = batch(5)
    with Archive.open(settings, outbox=True) as archive:
        with monkeypatch.context() as patch:
            patch.setattr(index_module, "apply_entries", failing_for(lambda uid: True))
            for instance in instances:
                store(archive, instance)
            writing = archive._writing
            assert writing is not None
            wait_for(lambda: writing.indexer.failing, "the index is failing")
        archive.wait_indexed()
        assert archive.index.totals().instances == 5
        assert not damages(archive, 0)
