"""What losses, damage and stubs do to an index, in the order in which they come, again, and in a new one; and
what an inventory counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from archive.database import sqlite_url
from archive.index.index import Index
from archive.index.stubs import NOWHERE, stub_location
from archive.model import Fact, FactKind, IndexEntry, Level, Location, Position, Query
from tests.archive.entries import entry

END = Position(1, 1)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index.open(sqlite_url(tmp_path / "index.db"))
    yield index
    index.close()


def fact(kind: FactKind, uid: str, *, told: IndexEntry | None = None, at_us: int = 7) -> Fact:
    return Fact(kind, uid, hashlib.sha256(f"{uid}/".encode()).digest(), "a/one", at_us, entry=told)


def apply(index: Index, *facts: Fact) -> None:
    index.apply_facts(facts, END, outbox=True)


def put(index: Index, *entries: IndexEntry) -> None:
    index.apply(entries, END, outbox=True)


def confirmed(index: Index) -> set[str]:
    return {uid for page in index.inventories.confirmed() for uid, _ in page}


def again(one: IndexEntry) -> IndexEntry:
    """The same record once more, at another place."""
    return replace(one, record=replace(one.record, location=Location("p2", 0, 1000, 400), end=Position(2, 9)))


def stub(uid: str) -> IndexEntry:
    one = entry(uid)
    return replace(one, record=replace(one.record, location=stub_location(1000, 400), end=NOWHERE))


def test_what_the_region_lost_waits_for_a_receipt_again(index: Index) -> None:
    put(index, entry("1.1"), entry("1.2"))
    apply(index, fact(FactKind.RECEIPT, "1.1"), fact(FactKind.RECEIPT, "1.2"))
    assert confirmed(index) == {"1.1", "1.2"}
    for _ in range(2):
        apply(index, fact(FactKind.LOST, "1.1"))
        assert [one.head.sop_instance_uid for one in index.pending(9)] == ["1.1"]
        assert confirmed(index) == {"1.2"}
    apply(index, fact(FactKind.RECEIPT, "1.1", at_us=9))
    assert index.pending(9) == [] and confirmed(index) == {"1.1", "1.2"}


def test_a_receipt_that_was_lost_before_its_instance_came_is_none(index: Index) -> None:
    apply(index, fact(FactKind.RECEIPT, "1.1"), fact(FactKind.LOST, "1.1"))
    put(index, entry("1.1"))
    assert len(index.pending(9)) == 1


def test_what_was_evicted_here_is_not_pushed_again(index: Index) -> None:
    one = entry("1.1")
    put(index, one)
    apply(index, fact(FactKind.RECEIPT, "1.1"), fact(FactKind.EVICTED, "1.1", told=one))
    before = index.dump()
    apply(index, fact(FactKind.LOST, "1.1"))
    assert index.dump() == before


def test_damage_is_held_against_what_lay_here_and_not_against_a_copy_that_comes_after(index: Index) -> None:
    one = entry("1.1")
    put(index, one)
    apply(index, fact(FactKind.RECEIPT, "1.1"), fact(FactKind.DAMAGE, "1.1"))
    assert confirmed(index) == set()
    assert [uid for page in index.inventories.damaged() for uid, _ in page] == ["1.1"]
    put(index, again(one))
    assert confirmed(index) == {"1.1"}
    live = index.dump()

    apply(index, fact(FactKind.DAMAGE, "9.9"), fact(FactKind.RECEIPT, "9.9"))
    put(index, entry("9.9"))
    assert confirmed(index) == {"1.1", "9.9"}, "a new index never saw the damaged copy"
    assert live != index.dump()


def test_what_the_region_tells_a_new_disk_is_listed_as_evicted(index: Index) -> None:
    apply(index, fact(FactKind.RECEIPT, "1.1"), fact(FactKind.EVICTED, "1.1", told=stub("1.1")))
    (found,) = index.instances("1.2.3")
    assert found.evicted and not found.damaged and index.pending(9) == []
    (study,) = index.search(Query(Level.STUDY, (("PatientName", "Rossi*"),)))
    assert study.nearline and study.instance_count == 1
    assert index.due(1 << 60, 9) == [], "there is nothing to give back"
    before = index.dump()
    apply(index, fact(FactKind.RECEIPT, "1.1"), fact(FactKind.EVICTED, "1.1", told=stub("1.1")))
    assert index.dump() == before and index.due(1 << 60, 9) == []
    put(index, entry("1.1"))
    (found,) = index.instances("1.2.3")
    assert not found.evicted and index.has_content("1.1", found.digest) and index.pending(9) == []


def test_a_stub_leaves_what_is_here_alone(index: Index) -> None:
    put(index, entry("1.1", content="other"))
    before = index.dump()["instance"]
    apply(index, fact(FactKind.EVICTED, "1.1", told=stub("1.1")))
    assert index.dump()["instance"] == before and index.conflicts() == []


def test_a_region_counts_what_a_ward_gave_and_what_is_a_copy_there(index: Index) -> None:
    put(index, entry("1.1"), entry("1.2", ward="b/two", study="1.2.4", series="1.2.4.1"),
        entry("1.3", study="1.2.5", series="1.2.5.1"), entry("1.3", content="x", study="1.2.5"))  # fmt: skip
    apply(index, replace(fact(FactKind.COPY, "1.1"), ward="b/two"), fact(FactKind.DAMAGE, "1.3"))

    def of(ward: str) -> list[str]:
        return sorted(uid for page in index.inventories.of_ward(ward) for uid, _ in page)

    assert of("a/one") == ["1.1", "1.3"], "of 1.3 the conflict alone: the other is damaged"
    assert of("b/two") == ["1.1", "1.2"]
    content = ("1.1", fact(FactKind.COPY, "1.1").digest)
    assert index.inventories.holders([content]) == ["a/one", "b/two"]
    assert index.inventories.held("c/none", [content]) == set()
