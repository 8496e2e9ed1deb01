"""Removing, undoing and purging in a real archive; rejection notes; and that neither a crash nor a rebuild
changes what came of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from archive.archive import Archive, ArchiveSettings
from archive.errors import Evicted, InvalidInput, NotFound
from archive.model import START, Fact, FactKind, Level, Outcome, Query, Record, RecordKind
from archive.rebuild import rebuild
from archive.removals import QUALITY, Purge, fact_of_purge
from archive.removing import Removing
from archive.retention import RemovalSettings, RetentionSettings
from archive.space.pace import Pace
from tests.archive.archives import abandon, settings_for, store
from tests.datasets import PROVENANCE, Instance, make_instance
from tests.rejections import note_about

DAY_US = 86_400 * 1_000_000
NO_RETENTION = RetentionSettings(years=0.0)
FREE = RemovalSettings(undo_days=0.0)


@pytest.fixture
def settings(tmp_path: Path) -> ArchiveSettings:
    return settings_for(tmp_path / "state", drop_delay_s=0.0, retention=NO_RETENTION)


@pytest.fixture
def archive(settings: ArchiveSettings) -> Iterator[Archive]:
    with Archive.open(settings, outbox=True) as opened:
        yield opened


def study(number: int, count: int = 3) -> list[Instance]:
    """The last one has a pack of its own."""
    return [
        make_instance(
            study_uid=f"1.2.{number}", series_uid=f"1.2.{number}.1", sop_uid=f"1.2.{number}.1.{n}", number=n,
            padding=40_000 if n < count else 2 << 20,
        )
        for n in range(1, count + 1)
    ]  # fmt: skip


def fill(archive: Archive, instances: list[Instance]) -> None:
    for one in instances:
        assert store(archive, one) is Outcome.STORED
    archive.wait_indexed()


def shown(archive: Archive) -> set[str]:
    return {one.instance["SOPInstanceUID"] for one in archive.search(Query(Level.IMAGE))}


def uids(instances: list[Instance]) -> set[str]:
    return {one.sop_instance_uid for one in instances}


def remove(removing: Removing, level: str, uid: str, **more: str) -> str:
    """The id of what was removed."""
    words = removing.remove({"level": level, "uid": uid, "reason": "sent twice", **more}, "anna")
    return words.partition(":")[0]


def pace() -> Pace:
    return Pace(1e12)


def bytes_held(archive: Archive) -> int:
    return sum(
        path.stat().st_blocks * 512
        for folder in ("packs", "large")
        for path in (archive.settings.state / folder).glob("*")
    )


def records(archive: Archive) -> int:
    """How many instances were written, whatever became of them."""
    found = archive.packs.read(START, archive.packs.log.durable)
    return sum(isinstance(one, Record) and one.kind is not RecordKind.MARK for one in found)


def rebuilt_equals(settings: ArchiveSettings) -> bool:
    with Archive.open(settings, outbox=True) as archive:
        archive.wait_indexed()
        before = archive.index.dump()
    rebuild(settings, outbox=True)
    with Archive.open(settings, outbox=True) as archive:
        return archive.index.dump() == before


def test_remove_undo_and_remove_again(archive: Archive) -> None:
    one, two = study(1), study(2)
    fill(archive, one + two)
    before = archive.index.dump()
    removing = Removing(archive, "")
    order = remove(removing, "study", "1.2.1")
    assert shown(archive) == uids(two)
    assert archive.instances("1.2.1") == [] and archive.count(Query(Level.STUDY)) == 1
    assert "already" in removing.remove({"level": "study", "uid": "1.2.1", "reason": "again"}, "bert")
    (tombstone,) = archive.index.removals()
    assert (tombstone.removal.by, tombstone.removal.reason) == ("anna", "sent twice")
    assert (tombstone.hidden, tombstone.kept) == (3, 3)
    assert "undone" in removing.undo({"id": order}, "bert")
    assert "already" in removing.undo({"id": order}, "bert")
    after = archive.index.dump()
    assert after["instance"] == before["instance"] and after["study"] == before["study"]
    assert remove(removing, "series", "1.2.1.1") != order
    assert remove(removing, "instance", "1.2.2.1.1")
    assert shown(archive) == uids(two[1:])


def test_what_is_sent_again_stays_away_and_is_answered_as_stored(archive: Archive) -> None:
    one = study(1)
    fill(archive, one)
    remove(Removing(archive, ""), "study", "1.2.1")
    assert records(archive) == 3
    for each in one:
        assert store(archive, each) is Outcome.DUPLICATE
    assert records(archive) == 3, "nothing was written"
    other = make_instance(study_uid="1.2.1", series_uid="1.2.1.1", sop_uid="1.2.1.1.1", number=7)
    assert store(archive, other) is Outcome.CONFLICT
    assert shown(archive) == set()
    now = replace(PROVENANCE, received_at_us=time.time_ns() // 1000 + DAY_US)
    new = make_instance(study_uid="1.2.1", series_uid="1.2.1.1", sop_uid="1.2.1.1.9", number=9)
    assert store(archive, new, provenance=now) is Outcome.STORED
    assert shown(archive) == {"1.2.1.1.9"}, "what was acquired afterwards is another matter"


def test_purged_is_gone_for_good_and_its_space_comes_back(settings: ArchiveSettings) -> None:
    one, two = study(1), study(2)
    with Archive.open(settings, outbox=True) as archive:
        fill(archive, one + two)
        removing = Removing(archive, "")
        order = remove(removing, "study", "1.2.1")
        held = bytes_held(archive)
        words = removing.purge({"id": order}, "carl")
        assert "3 contents" in words
        assert bytes_held(archive) < held - (2 << 20)
        with pytest.raises(InvalidInput):
            removing.undo({"id": order}, "anna")
        assert "0 contents" in removing.purge({"id": order}, "carl")
        for each in one:
            assert store(archive, each) is Outcome.DUPLICATE
        (tombstone,) = archive.index.removals()
        assert tombstone.final and (tombstone.hidden, tombstone.kept) == (3, 0)
        assert not {row.head.sop_instance_uid for row in archive.index.pending(100)} & uids(one)
        for row in archive.index.dump()["removed"]:
            assert "Rossi" not in str(row)
        assert shown(archive) == uids(two)
    assert rebuilt_equals(settings)
    with Archive.open(settings, outbox=True) as archive:
        assert shown(archive) == uids(two)
        assert store(archive, one[0]) is Outcome.DUPLICATE


def test_retention_keeps_what_is_asked_to_be_deleted(tmp_path: Path) -> None:
    kept = RetentionSettings(years=10.0, by_modality=("MR=0",))
    with Archive.open(settings_for(tmp_path / "state", retention=kept, removal=FREE), outbox=True) as archive:
        one = [make_instance(study_uid="1.2.1", series_uid="1.2.1.1", sop_uid="1.2.1.1.1")]
        fill(archive, one)
        removing = Removing(archive, "")
        with pytest.raises(InvalidInput, match="inside retention"):
            remove(removing, "study", "1.2.1")
        with pytest.raises(InvalidInput, match="inside retention"):
            remove(removing, "study", "1.2.1", code="113039")
        order = remove(removing, "study", "1.2.1", code=QUALITY)
        assert shown(archive) == set(), "a rejection hides, and keeps the bytes"
        with pytest.raises(InvalidInput, match="inside retention"):
            removing.purge({"id": order}, "carl")
        assert removing.look(pace()).contents == 0
        later = Removing(archive, "", clock=lambda: time.time_ns() // 1000 + 11 * 366 * DAY_US)
        held = Removing(archive, "", clock=later._clock, held=lambda study_uid: study_uid == "1.2.1")
        assert held.look(pace()).contents == 0, "another reason to keep it"
        assert later.look(pace()).contents == 1


def test_one_removal_behind_another_is_not_a_way_around_retention(tmp_path: Path) -> None:
    kept = RetentionSettings(years=10.0)
    with Archive.open(settings_for(tmp_path / "state", retention=kept), outbox=True) as archive:
        fill(archive, study(1))
        removing = Removing(archive, "")
        remove(removing, "instance", "1.2.1.1.1", code=QUALITY)
        second = remove(removing, "study", "1.2.1", code=QUALITY)
        with pytest.raises(InvalidInput, match="inside retention"):
            removing.purge({"id": second}, "carl")


def test_what_was_removed_long_ago_is_purged_by_itself(settings: ArchiveSettings) -> None:
    with Archive.open(replace(settings, removal=FREE), outbox=True) as archive:
        fill(archive, study(1))
        removing = Removing(archive, "")
        remove(removing, "study", "1.2.1")
        time.sleep(0.001)
        assert removing.look(pace()).contents == 3
        assert removing.look(pace()).contents == 0
        (tombstone,) = archive.index.removals()
        assert tombstone.final


def test_the_regions_own_retention_decides_of_what_a_ward_purged(tmp_path: Path) -> None:
    kept = RetentionSettings(years=100.0)
    with Archive.open(settings_for(tmp_path / "state", retention=kept), outbox=False) as region:
        fill(region, study(1))
        removing = Removing(region, "")
        remove(removing, "study", "1.2.1", code=QUALITY)
        (tombstone,) = region.index.removals()
        told = Purge(tombstone.removal.id, "1.2.1", "anna", 5, "san-martino/radiology")
        region.record_facts([fact_of_purge(told)])
        assert removing.look(pace()).contents == 0
        assert "undone" in removing.undo({"id": tombstone.removal.order}, "bert")
        assert len(shown(region)) == 3, "its bytes are here, and it is the region's to restore"


def test_a_ward_gives_back_what_the_region_purged(tmp_path: Path) -> None:
    kept = RetentionSettings(years=100.0)
    with Archive.open(settings_for(tmp_path / "state", retention=kept), outbox=True) as ward:
        fill(ward, study(1))
        removing = Removing(ward, "san-martino/radiology")
        remove(removing, "study", "1.2.1", code=QUALITY)
        (tombstone,) = ward.index.removals()
        ward.record_facts([fact_of_purge(Purge(tombstone.removal.id, "1.2.1", "hub", 5, ""))])
        assert removing.look(pace()).contents == 3
        with pytest.raises(InvalidInput):
            removing.undo({"id": tombstone.removal.order}, "bert")


def test_a_conflict_beside_what_is_purged_goes_too(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        fill(archive, study(1))
        other = make_instance(study_uid="1.2.1", series_uid="1.2.1.1", sop_uid="1.2.1.1.1", number=7,
                              padding=30_000)  # fmt: skip
        assert store(archive, other) is Outcome.CONFLICT
        archive.wait_indexed()
        removing = Removing(archive, "")
        order = remove(removing, "study", "1.2.1")
        assert "4 contents" in removing.purge({"id": order}, "carl")
        (row,) = archive.index.conflicts()
        with pytest.raises(Evicted):
            archive.packs.open_payload(row.location)
    assert rebuilt_equals(settings)


def test_what_is_asked_wrongly_is_refused(archive: Archive) -> None:
    removing = Removing(archive, "")
    for wrong in (
        {"level": "patient", "uid": "1.2", "reason": "x"}, {"level": "study", "uid": "a.b", "reason": "x"},
        {"level": "study", "uid": "1.2", "reason": " "},
        {"level": "study", "uid": "1.2", "reason": "x" * 201},
        {"level": "study", "uid": "1.2", "reason": "x", "code": "1"},
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            removing.remove(wrong, "anna")
    with pytest.raises(InvalidInput):
        removing.undo({"id": "12"}, "anna")
    with pytest.raises(NotFound):
        removing.purge({"id": "0" * 16}, "anna")


@pytest.mark.parametrize("title", ["113001", "113037", "113038"])
def test_a_rejection_note_takes_effect_before_any_search(archive: Archive, title: str) -> None:
    one = study(1)
    fill(archive, one)
    note = note_about(one[:2], title)
    assert store(archive, note) is Outcome.STORED
    given_out = {note.sop_instance_uid} if title == QUALITY else set()
    assert shown(archive) == {one[2].sop_instance_uid} | given_out
    found = archive.index.removals(prefix=archive.index.removals()[0].removal.order)
    assert {t.removal.uid for t in found} >= uids(one[:2]) and {t.removal.code for t in found} == {title}
    assert found[0].removal.by == "device CT1" and found[0].removal.ward == PROVENANCE.ward
    assert store(archive, note) is Outcome.DUPLICATE
    assert len(archive.index.removals()) == len(found)
    Removing(archive, "").undo({"id": found[0].removal.order}, "anna")
    assert shown(archive) == uids(one) | {note.sop_instance_uid}


def test_a_note_may_come_before_what_it_rejects(archive: Archive) -> None:
    one = study(1)
    assert store(archive, note_about(one[:1], "113037")) is Outcome.STORED
    fill(archive, one)
    assert shown(archive) == uids(one[1:])


def test_notes_that_mean_something_else_or_are_not_obeyed(tmp_path: Path) -> None:
    one = study(1)
    quiet = [
        (RemovalSettings(rejection_notes=False), note_about(one, "113037")),
        (RemovalSettings(no_notes_from=("CT1",)), note_about(one, "113037")),
        (RemovalSettings(shows_quality_rejected=True), note_about(one, "113001")),
        (RemovalSettings(), note_about(one, "113000")),  # Of Interest
        (RemovalSettings(), note_about(one, "113037", scheme="99X")),
        (RemovalSettings(), note_about(one, "113039")),  # inside retention
    ]
    for number, (removal, note) in enumerate(quiet):
        with Archive.open(settings_for(tmp_path / str(number), removal=removal), outbox=True) as archive:
            fill(archive, one)
            assert store(archive, note) is Outcome.STORED
            assert shown(archive) == uids([*one, note]), number
            assert archive.index.removals() == []


def test_a_note_about_expired_retention_counts_where_it_has_expired(archive: Archive) -> None:
    one = study(1)
    fill(archive, one)
    note = note_about([*one, make_instance(sop_uid="1.2.99")], "113039")
    assert store(archive, note) is Outcome.STORED
    assert shown(archive) == set()
    assert len(archive.index.removals()) == len(one) + 1, "and the note; what is not here is not told of"


def test_a_crash_between_a_notes_answer_and_its_effect_loses_nothing(settings: ArchiveSettings) -> None:
    one = study(1)
    archive = Archive.open(settings, outbox=True)
    fill(archive, one)
    indexer = archive._writing.indexer  # type: ignore[union-attr]
    with indexer._writing:  # nothing comes into the index meanwhile
        assert store(archive, note_about(one, "113037")) is Outcome.STORED
        indexer._closing = True
        indexer._record_facts = lambda facts: (_ for _ in ()).throw(OSError())  # type: ignore[method-assign]
        indexer._apply = lambda entries, position: (_ for _ in ()).throw(OSError())  # type: ignore[method-assign]
    abandon(archive)
    with Archive.open(settings, outbox=True) as again:
        assert shown(again) == set()
    assert rebuilt_equals(settings)


def test_an_index_made_anew_equals(settings: ArchiveSettings) -> None:
    one, two, three = study(1), study(2), study(3)
    with Archive.open(settings, outbox=True) as archive:
        fill(archive, one + two + three)
        archive.record_facts([Fact(FactKind.RECEIPT, i.sop_instance_uid, i.digest, "", 5) for i in one])
        removing = Removing(archive, "")
        store(archive, note_about(one[:2], "113037"))
        order = remove(removing, "study", "1.2.2")
        removing.purge({"id": remove(removing, "instance", "1.2.3.1.1")}, "anna")
        removing.undo({"id": order}, "anna")
        remove(removing, "series", "1.2.2.1")
        assert archive.index.positions()[0] > START
    assert rebuilt_equals(settings)
