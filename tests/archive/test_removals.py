"""What the index shows of what was removed: nothing, whoever asks, and all of it again when that is
undone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archive.database import sqlite_url
from archive.errors import Corrupt, InvalidInput
from archive.index.index import Index
from archive.model import Attributes, Fact, FactKind, IndexEntry, Level, Position, Query, Record, RecordKind
from archive.removals import (
    Purge,
    Removal,
    Restoration,
    fact_of,
    fact_of_purge,
    fact_of_restoration,
    purge_of,
    removal_of,
    restoration_of,
)
from tests.archive.entries import empty, entry
from tests.archive.test_acceptance import consistent

END = Position(1, 1 << 40)


class Known:
    """The packs, as far as an index reads them."""

    def __init__(self, entries: Sequence[IndexEntry]) -> None:
        self._attributes = {(e.record.head.sop_instance_uid, e.record.digest): e.attributes for e in entries}

    def read(self, record: Record) -> Attributes | None:
        return self._attributes.get((record.head.sop_instance_uid, record.digest))


@pytest.fixture
def index(database_url: str) -> Iterator[Index]:
    opened = Index.open(database_url)
    yield opened
    opened.close()


ONE = entry("1.1", at_us=10)
TWO = entry("1.2", at_us=20)
OTHER_SERIES = entry("1.3", series="1.2.3.2", at_us=30, series_fields={"Modality": "MR"})
OTHER_STUDY = entry("1.4", study="9.9", series="9.9.1", at_us=40)
ALL = [ONE, TWO, OTHER_SERIES, OTHER_STUDY]


def fill(index: Index, entries: Sequence[IndexEntry] = ALL, known: Sequence[IndexEntry] = ()) -> None:
    index.read_attributes_with(Known([*ALL, *entries, *known]).read)
    index.apply(entries, END, outbox=True)


def removed(uid: str, level: Level = Level.IMAGE, *, at_us: int = 100, name: str = "", code: str = "",
            ward: str = "") -> Fact:  # fmt: skip
    study = "" if level is not Level.STUDY else uid
    return fact_of(Removal(name or f"r{uid}", level, uid, study, code, "anna", "twice", at_us, ward))


def restored(uid: str, *, at_us: int = 200, name: str = "", ward: str = "") -> Fact:
    return fact_of_restoration(Restoration(name or f"r{uid}", uid, "bert", at_us, ward))


def purged(uid: str, *, at_us: int = 300, name: str = "", ward: str = "") -> Fact:
    return fact_of_purge(Purge(name or f"r{uid}", uid, "carl", at_us, ward))


def tell(index: Index, *facts: Fact) -> None:
    index.apply_facts(facts, END, outbox=True)


def shown(index: Index) -> list[str]:
    """The instances that a search finds."""
    found = index.search(Query(Level.IMAGE))
    return sorted(match.instance["SOPInstanceUID"] for match in found)


def content(index: Index) -> dict[str, list[tuple[object, ...]]]:
    """What the index holds, but for what it remembers of the facts themselves."""
    dump = index.dump()
    return {name: rows for name, rows in dump.items() if name not in ("tombstone", "known_fact")}


def test_facts_say_what_they_were_made_of() -> None:
    removal = Removal("ab", Level.SERIES, "1.2", "1", "113001", "anna", "blurred", 5, "a/one")
    assert removal_of(fact_of(removal)) == removal
    restoration = Restoration("ab", "1.2", "bert", 6, "")
    assert restoration_of(fact_of_restoration(restoration)) == restoration
    purge = Purge("ab", "1.2", "carl", 7, "a/one")
    assert purge_of(fact_of_purge(purge)) == purge
    with pytest.raises(InvalidInput):
        fact_of(Removal("ab", Level.IMAGE, "1.2", "", "999", "anna", "", 5, ""))
    with pytest.raises(InvalidInput):
        fact_of(Removal("ab", Level.PATIENT, "1.2", "", "", "anna", "", 5, ""))
    for broken in ("", "[]", "{}", '{"id": 3}'):
        with pytest.raises(Corrupt):
            removal_of(Fact(FactKind.REMOVED, "1.2", b"", "", 5, broken))
        with pytest.raises(Corrupt):
            purge_of(Fact(FactKind.PURGED, "1.2", b"", "", 5, broken))


def test_a_removed_instance_is_nowhere_and_comes_back_as_it_was(index: Index) -> None:
    fill(index)
    before = content(index)
    tell(index, removed("1.1"))
    assert shown(index) == ["1.2", "1.3", "1.4"]
    assert index.lookup("1.1") is None and index.live("1.1") is None
    assert [one.head.sop_instance_uid for one in index.instances("1.2.3")] == ["1.2", "1.3"]
    (study,) = index.search(Query(Level.STUDY, (("StudyInstanceUID", "1.2.3"),)))
    assert study.instance_count == 2 and index.totals().instances == 3
    assert index.described(["1.1"]) == [] and index.standings(["1.1"]) == {}
    assert index.instance_counts(["1.2.3"]) == {"1.2.3": 2}
    assert consistent(index) == []
    tell(index, restored("1.1"))
    assert content(index) == before


def test_a_series_and_a_study_are_removed_whole(index: Index) -> None:
    fill(index)
    before = content(index)
    tell(index, removed("1.2.3.1", Level.SERIES))
    assert shown(index) == ["1.3", "1.4"]
    (study,) = index.search(Query(Level.STUDY, (("StudyInstanceUID", "1.2.3"),)))
    assert study.modalities == ("MR",) and study.series_count == 1
    tell(index, removed("1.2.3", Level.STUDY))
    assert shown(index) == ["1.4"]
    assert index.search(Query(Level.STUDY, (("StudyInstanceUID", "1.2.3"),))) == []
    tell(index, restored("1.2.3.1"))
    assert shown(index) == ["1.4"], "the study's removal still covers the series"
    tell(index, restored("1.2.3"))
    assert content(index) == before and consistent(index) == []


def test_the_person_of_a_removed_study_is_not_found_either(index: Index) -> None:
    person = {"PatientName": "Lone^Only", "PatientID": "7"}
    alone = entry("2.1", study="2", series="2.2", patient_fields=person)
    fill(index, [*ALL, alone])
    tell(index, removed("2", Level.STUDY, at_us=5_000))
    assert index.search(Query(Level.PATIENT, (("PatientID", "7"),))) == []
    assert index.search(Query(Level.STUDY, (("PatientName", "*only*"),))) == []


def test_what_waits_for_the_region_goes_on_and_is_told_to_nobody(index: Index) -> None:
    fill(index)
    tell(index, removed("1.2.3", Level.STUDY))
    assert {one.head.sop_instance_uid for one in index.pending(10)} == {"1.1", "1.2", "1.3", "1.4"}
    for level in (Level.STUDY, Level.SERIES, Level.IMAGE):
        found = index.search(Query(level, pending_only=True))
        assert [match.study["StudyInstanceUID"] for match in found] == ["9.9"]
    receipt = Fact(FactKind.RECEIPT, "1.1", ONE.record.digest, "a/one", 400)
    tell(index, receipt)
    assert {one.head.sop_instance_uid for one in index.pending(10)} == {"1.2", "1.3", "1.4"}
    tell(index, restored("1.2.3"))
    assert index.standings(["1.1"])["1.1"].receipt_us == 400


def test_what_the_region_lost_goes_there_again_while_it_is_removed(index: Index) -> None:
    fill(index)
    tell(index, *(Fact(FactKind.RECEIPT, one.record.head.sop_instance_uid, one.record.digest, "a/one", 400)
                  for one in ALL))  # fmt: skip
    tell(index, removed("1.1"))
    tell(index, Fact(FactKind.LOST, "1.1", ONE.record.digest, "a/one", 500))
    assert [one.head.sop_instance_uid for one in index.pending(10)] == ["1.1"]
    assert consistent(index) == []
    tell(index, restored("1.1"))
    assert [one.head.sop_instance_uid for one in index.pending(10)] == ["1.1"]
    assert consistent(index) == []


def test_what_was_decided_while_its_uid_was_removed_goes_to_the_region(index: Index) -> None:
    fill(index)
    other = entry("1.1", content="x", kind=RecordKind.CONFLICT, at_us=50)
    fill(index, [other])
    tell(index, removed("1.1"))
    tell(index, Fact(FactKind.ACCEPTED, "1.1", other.record.digest, "a/one", 600, "anna"))
    tell(index, restored("1.1"))
    tell(index, Fact(FactKind.ACCEPTED, "1.1", ONE.record.digest, "a/one", 700, "anna"))
    offered = {(one.head.sop_instance_uid, one.digest) for one in index.pending(10)}
    assert len(offered) == 5 and index.pending_summary().count == 5 and consistent(index) == []


def test_the_region_is_told_again_which_content_of_a_removed_instance_counts(index: Index) -> None:
    fill(index)
    other = entry("1.1", content="x", kind=RecordKind.CONFLICT, at_us=50)
    fill(index, [other])
    receipts = [Fact(FactKind.RECEIPT, "1.1", one.record.digest, "a/one", 400) for one in (ONE, other)]
    tell(index, removed("1.1"), *receipts)
    for one, at_us in ((other, 600), (ONE, 700)):
        tell(index, Fact(FactKind.ACCEPTED, "1.1", one.record.digest, "a/one", at_us, "anna"))
    tell(index, Fact(FactKind.RECEIPT, "1.1", ONE.record.digest, "a/one", 800, "accepted 700"))
    assert "1.1" not in {one.head.sop_instance_uid for one in index.pending(10)}
    tell(index, Fact(FactKind.RECEIPT, "1.1", other.record.digest, "a/one", 900, "accepted 600"))
    assert ("1.1", ONE.record.digest) in {
        (one.head.sop_instance_uid, one.digest) for one in index.pending(10)}  # fmt: skip
    assert consistent(index) == []


def test_nothing_that_comes_later_or_again_resurrects_it(index: Index) -> None:
    tell(index, removed("1.1"), removed("1.2.3.2", Level.SERIES, at_us=50))
    fill(index)
    assert shown(index) == ["1.2", "1.4"]
    fill(index)
    assert shown(index) == ["1.2", "1.4"]
    known = index.lookup_removed("1.1")
    assert known is not None and known.digest == ONE.record.digest and known.settled
    assert index.has_content("1.1", ONE.record.digest)
    other = entry("1.1", content="x", kind=RecordKind.CONFLICT, at_us=500)
    fill(index, [other])
    assert shown(index) == ["1.2", "1.4"] and len(index.conflicts()) == 1
    tell(index, Fact(FactKind.ACCEPTED, "1.1", other.record.digest, "a/one", 600, "anna"))
    assert shown(index) == ["1.2", "1.4"], "another content of a removed instance is as removed"
    known = index.lookup_removed("1.1")
    assert known is not None and known.digest == other.record.digest
    assert consistent(index) == []


def test_images_acquired_after_their_study_was_removed_are_live(index: Index) -> None:
    fill(index)
    late = entry("1.5", at_us=101)
    fill(index, [late], ALL)
    tell(index, removed("1.2.3", Level.STUDY, at_us=100))
    assert shown(index) == ["1.4", "1.5"]
    later = entry("1.6", at_us=102)
    fill(index, [later, entry("1.7", at_us=99)], [late])
    assert shown(index) == ["1.4", "1.5", "1.6"] and consistent(index) == []


def test_what_the_region_purged_is_gone_for_good_and_what_a_ward_purged_is_the_regions_to_restore(
    index: Index,
) -> None:
    fill(index)
    tell(index, removed("1.1"), purged("1.1", ward="a/one"), restored("1.1", ward="a/one"))
    assert "1.1" not in shown(index)
    tell(index, restored("1.1", at_us=900))
    assert "1.1" in shown(index)
    tell(index, purged("1.1", at_us=1_000))
    assert "1.1" not in shown(index)
    (tombstone,) = index.removals()
    assert tombstone.final and tombstone.purged_by == "carl" and tombstone.hidden == 1


def test_copies_of_what_is_removed_count_once_it_is_back(index: Index) -> None:
    fill(index)
    tell(index, removed("1.2.3", Level.STUDY))
    tell(index, Fact(FactKind.COPY, "1.1", ONE.record.digest, "b/two", 5))
    tell(index, restored("1.2.3"))
    (study,) = index.search(Query(Level.STUDY, (("StudyInstanceUID", "1.2.3"),)))
    assert study.wards == ("a/one", "b/two") and consistent(index) == []


def test_a_fact_that_says_nothing_holds_up_nothing(index: Index) -> None:
    fill(index)
    tell(index, Fact(FactKind.REMOVED, "1.1", b"", "a/one", 5, "nonsense"), removed("1.2"))
    assert shown(index) == ["1.1", "1.3", "1.4"]


_UIDS = ["1.1", "1.2", "1.3", "1.4"]
_facts = st.one_of(
    st.builds(
        removed, st.sampled_from(_UIDS), name=st.sampled_from("abc"), at_us=st.sampled_from([15, 100, 101]),
        ward=st.sampled_from(["", "a/one"]),
    ),
    st.builds(removed, st.sampled_from(["1.2.3.1", "1.2.3.2"]), st.just(Level.SERIES),
              name=st.sampled_from("def"), at_us=st.sampled_from([15, 100])),
    st.builds(removed, st.sampled_from(["1.2.3", "9.9"]), st.just(Level.STUDY), name=st.sampled_from("gh"),
              at_us=st.sampled_from([15, 25, 100])),
    st.builds(restored, st.just("1.1"), name=st.sampled_from("abcdefgh"), at_us=st.sampled_from([1, 2]),
              ward=st.sampled_from(["", "a/one"])),
    st.builds(purged, st.just("1.1"), name=st.sampled_from("abcdefgh"), at_us=st.sampled_from([1, 2]),
              ward=st.sampled_from(["", "a/one"])),
    st.sampled_from([
        Fact(FactKind.RECEIPT, "1.1", ONE.record.digest, "a/one", 7),
        Fact(FactKind.COPY, "1.2", TWO.record.digest, "b/two", 8),
    ]),
)  # fmt: skip
_numbers = itertools.count()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Index, Index]]:
    folder = tmp_path_factory.mktemp("index")
    first = Index.open(sqlite_url(folder / "first.db"))
    second = Index.open(sqlite_url(folder / "second.db"))
    yield first, second
    first.close()
    second.close()


@settings(max_examples=40, deadline=None)
@given(facts=st.lists(_facts, max_size=8), chance=st.randoms(use_true_random=False))
def test_facts_and_records_in_any_order_come_to_one_index(
    two: tuple[Index, Index], facts: list[Fact], chance: object
) -> None:
    for opened in two:
        empty(opened)
        opened.read_attributes_with(Known(ALL).read)
    steps: list[Fact | IndexEntry] = [*ALL, *facts]
    for opened in two:
        order = list(steps)
        chance.shuffle(order)  # type: ignore[attr-defined]
        again = order[: len(order) // 2]
        for step in [*order, *again]:
            if isinstance(step, Fact):
                opened.apply_facts([step], END, outbox=True)
            else:
                opened.apply([step], END, outbox=True)
        assert consistent(opened) == []
    assert two[0].dump() == two[1].dump()
