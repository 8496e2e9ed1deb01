"""Facts that travel, over real gRPC and TLS between real archives: what a ward's people decide and what the
region's do reaches the other, once, in any order, whatever is cut off, repeated or put back."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archive.archive import Archive
from archive.corrections import Correction, Withdrawal, fact_of, withdrawal_fact
from archive.index.travel import TRAVELLING, Cursor
from archive.model import START, Fact, FactKind, Level, Position, Query
from archive.rebuild import rebuild
from archive.removals import Removal, Restoration, fact_of_restoration
from archive.removals import fact_of as removal_fact
from federation import abilities, facts_pages, facts_service
from federation.facts_exchange import FactsExchange
from federation.facts_pages import pages, take
from federation.facts_rules import (
    DECIDED_ELSEWHERE,
    FUTURE,
    NOT_HELD,
    OTHER_WARD,
    UNREADABLE,
    FactRules,
)
from federation.hub import Hub
from tests.archive.archives import settings_for, store
from tests.datasets import PROVENANCE, Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import Node, node_of
from tests.waiting import wait_for

MARTINO, GALLIERA = "san-martino/radiology", "galliera/oncology"
STUDY = "1.2.3"
EXAMPLES = int(os.environ.get("MISS_FACTS_EXAMPLES", "4"))  # of interleavings: 0.5 to 2 s each


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_service, "GATHER_S", 0.02)


def ward_of(region: Region, hub: Hub, hospital: str, name: str, issuer: str) -> Node:
    node = node_of(region, hub, hospital, name, issuer)
    node.refused = []  # type: ignore[attr-defined]

    def keep(fact: Fact, reason: str) -> None:
        node.refused.append((fact, reason))  # type: ignore[attr-defined]

    node.parts = lambda archive, identity: [FactsExchange(archive, identity.ward, keep)]
    return node


@pytest.fixture
def martino(region: Region, hub: Hub) -> Iterator[Node]:
    node = ward_of(region, hub, "San Martino", "Radiology", "SM")
    yield node
    node.stop()


@pytest.fixture
def galliera(region: Region, hub: Hub) -> Iterator[Node]:
    node = ward_of(region, hub, "Galliera", "Oncology", "GA")
    yield node
    node.stop()


def regional(hub: Hub) -> Archive:
    """The hub's own archive: what the region's people decide is recorded by its process."""
    assert hub._writer is not None
    return hub._writer.archive


def correction(number: int = 1, *, ward: str = "", study: str = STUDY, **values: str) -> Correction:
    changes = tuple(sorted((values or {"PatientID": "999"}).items()))
    return Correction(f"{number:016x}", study, changes, "maria", "wrong", 1000 + number, ward)


def undoing(one: Correction, ward: str = "", at_us: int = 9000) -> Fact:
    return withdrawal_fact(one.id, one.study_uid, Withdrawal("luca", "was right", at_us, ward))


def removal(number: int = 1, *, ward: str = "", uid: str = STUDY) -> Removal:
    at_us = time.time_ns() // 1000
    return Removal(f"{number:032x}", Level.STUDY, uid, uid, "", "maria", "wrong", at_us, ward)


def patient_id(archive: Archive, study: str = STUDY) -> str:
    archive.wait_indexed()
    found = archive.search(Query(Level.STUDY, (("StudyInstanceUID", study),)))
    return found[0].patient.get("PatientID", "") if found else "none"


def in_region(hub: Hub, node: Node, instances: Sequence[Instance]) -> None:
    node.take(instances)
    wait_for(lambda: node.pending == 0, "the region has them")


def told(archive: Archive) -> list[Fact]:
    """Every fact that travels, as often as it was recorded."""
    return [f for batch in archive.facts.read() for f in batch.facts if f.kind in TRAVELLING]


def test_a_ward_s_correction_reaches_the_region_and_undone_there_the_ward(hub: Hub, martino: Node) -> None:
    martino.start()
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    one = correction(ward=MARTINO)
    martino.store.record_facts([fact_of(one)])
    wait_for(lambda: patient_id(regional(hub)) == "999", "the region corrects it")
    regional(hub).record_facts([undoing(one)])
    wait_for(lambda: patient_id(martino.store) == "123", "the ward takes it back")
    assert len(told(martino.store)) == 2 and len(told(regional(hub))) == 2


def test_a_removal_reaches_the_region_and_every_ward_and_its_undoing_too(
    hub: Hub, martino: Node, galliera: Node
) -> None:
    martino.start()
    galliera.start()
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    one = removal(ward=MARTINO)
    martino.store.record_facts([removal_fact(one)])
    wait_for(lambda: patient_id(regional(hub)) == "none", "the region hides it")
    wait_for(lambda: len(told(galliera.store)) == 1, "another ward knows, should it get that study")
    undone = Restoration(one.id, STUDY, "luca", one.at_us + 1, MARTINO)
    martino.store.record_facts([fact_of_restoration(undone)])
    wait_for(lambda: patient_id(regional(hub)) == "123", "the region shows it again")
    wait_for(lambda: len(told(galliera.store)) == 2, "the other ward knows that too")


def test_a_correction_goes_to_the_wards_that_hold_a_part_of_the_study_alone(
    hub: Hub, martino: Node, galliera: Node
) -> None:
    martino.start()
    galliera.start()
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    in_region(hub, galliera, [make_instance(study_uid="1.2.9")])
    regional(hub).record_facts([fact_of(correction(1)), fact_of(correction(2, study="1.2.9"))])
    wait_for(lambda: patient_id(martino.store) == "999", "its ward corrects it")
    wait_for(lambda: patient_id(galliera.store, "1.2.9") == "999", "its ward corrects it")
    assert [f.sop_instance_uid for f in told(martino.store)] == [STUDY]
    assert [f.sop_instance_uid for f in told(galliera.store)] == ["1.2.9"]
    # The ward comes to hold a part of the study later: it is told then.
    in_region(hub, galliera, [make_instance(study_uid=STUDY)])
    wait_for(lambda: patient_id(galliera.store) == "999", "it is told what is corrected of it")


def test_who_came_to_hold_a_part_while_nobody_said_so_is_told_when_it_attaches(
    hub: Hub, martino: Node, galliera: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_service, "ARRIVED_MAX", 0)
    martino.start()
    galliera.start()
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    regional(hub).record_facts([fact_of(correction())])
    wait_for(lambda: patient_id(martino.store) == "999", "its ward corrects it")
    in_region(hub, galliera, [make_instance(study_uid=STUDY)])
    galliera.stop()
    galliera.start()
    wait_for(lambda: patient_id(galliera.store) == "999", "the sums differ, so it is told")


def test_what_was_decided_while_the_line_was_down_is_told_once_when_it_is_up(
    hub: Hub, martino: Node
) -> None:
    martino.start()
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    martino.leave()
    ours, theirs = correction(1, ward=MARTINO, PatientName="A^B"), correction(2, StudyID="S2")
    martino.store.record_facts([fact_of(ours)])
    regional(hub).record_facts([fact_of(theirs)])
    martino.start()
    wait_for(lambda: len(told(martino.store)) == 2 and len(told(regional(hub))) == 2, "both know both")
    for _ in range(3):  # nothing is told again
        martino.stop()
        martino.start()
        wait_for(lambda: martino.uplink is not None and martino.uplink.status().attached, "attached")
    martino.store.record_facts([fact_of(correction(3, ward=MARTINO))])
    wait_for(lambda: len(told(regional(hub))) == 3, "and what is new is")
    assert len(told(martino.store)) == 3


def test_a_node_on_a_new_disk_learns_its_own_decisions_again(
    region: Region, hub: Hub, martino: Node
) -> None:
    martino.start()
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    martino.store.record_facts([fact_of(correction(1, ward=MARTINO)), removal_fact(removal(2, ward=MARTINO))])
    wait_for(lambda: len(told(regional(hub))) == 2, "the region knows")
    martino.stop()
    shutil.rmtree(martino.folder)
    martino.start()
    wait_for(lambda: len(told(martino.store)) == 2, "the node is told its own again")
    martino.store.record_facts([fact_of(correction(3, ward=MARTINO))])
    wait_for(lambda: len(told(regional(hub))) == 3, "its new log is told from its beginning")


def test_a_hub_that_was_put_back_from_a_backup_is_told_again(
    region: Region, hub: Hub, martino: Node, tmp_path: Path
) -> None:
    martino.start()
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    regional(hub).record_facts([fact_of(correction(1))])
    wait_for(lambda: len(told(martino.store)) == 1, "the ward knows")
    hub.stop(grace_s=0)
    shutil.copytree(hub.settings.state, tmp_path / "backup", symlinks=True)
    second = Hub(hub.settings)
    second.start()
    martino.store.record_facts([fact_of(correction(2, ward=MARTINO, PatientID="2"))])
    wait_for(lambda: patient_id(regional(second)) == "2", "the region knows")
    regional(second).record_facts([fact_of(correction(3, PatientName="Lost^With"))])
    wait_for(lambda: len(told(martino.store)) == 3, "the ward knows")
    second.stop(grace_s=0)
    shutil.rmtree(hub.settings.state)
    shutil.copytree(tmp_path / "backup", hub.settings.state, symlinks=True)
    third = Hub(hub.settings)
    third.start()
    try:
        wait_for(lambda: patient_id(regional(third)) == "2", "it is told again what it had lost")
        # Its log goes on where the other one went on too: what is new there is not taken for known.
        regional(third).record_facts([fact_of(correction(n, PatientName=f"N^{n}")) for n in range(4, 9)])
        wait_for(lambda: len(told(martino.store)) == 8, "the ward hears of what came after the backup")
    finally:
        third.stop()


def test_what_the_region_refuses_stops_nothing_else_and_the_ward_hears_why(
    hub: Hub, martino: Node, galliera: Node
) -> None:
    galliera.start()
    martino.start()
    in_region(hub, galliera, [make_instance(study_uid="1.2.9")])
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    theirs = correction(1, ward=MARTINO, study="1.2.9")
    martino.store.record_facts([fact_of(theirs), fact_of(correction(2, ward=MARTINO))])
    wait_for(lambda: patient_id(regional(hub)) == "999", "the other one counts")
    wait_for(lambda: bool(martino.refused), "the ward hears of it")  # type: ignore[attr-defined]
    assert martino.refused == [(fact_of(theirs), NOT_HELD)]  # type: ignore[attr-defined]
    assert patient_id(regional(hub), "1.2.9") == "123"


def test_what_a_ward_may_decide(tmp_path: Path) -> None:
    with Archive.open(settings_for(tmp_path), outbox=False) as archive:
        store(archive, make_instance(study_uid=STUDY, series_uid="1.3", sop_uid="1.4"))
        archive.wait_indexed()
        archive.record_facts([fact_of(correction(7)), removal_fact(removal(8, uid="1.2.5"))])
        rules = FactRules(archive, lambda: 10**15)
        ours, other = PROVENANCE.ward, GALLIERA
        mine = fact_of(correction(1, ward=ours))
        assert rules.refusal(ours, mine) == ""
        assert rules.refusal(other, mine) == OTHER_WARD
        assert rules.refusal(other, replace(mine, ward=other)) == NOT_HELD
        assert rules.refusal(ours, replace(mine, detail="{}")) == UNREADABLE
        assert rules.refusal(ours, replace(mine, at_us=10**15 + 10**12)) == FUTURE
        assert rules.refusal(ours, undoing(correction(7), ours)) == DECIDED_ELSEWHERE
        assert rules.refusal(ours, undoing(correction(1), ours)) == ""  # nobody knows it yet
        nobody_s = fact_of(correction(1, ward=other, study="1.2.99"))
        assert rules.refusal(other, nobody_s) == ""
        back = Restoration(f"{8:032x}", "1.2.5", "luca", 2000, ours)
        assert rules.refusal(ours, fact_of_restoration(back)) == DECIDED_ELSEWHERE
        for level, uid in ((Level.SERIES, "1.3"), (Level.IMAGE, "1.4")):
            one = Removal(f"{9:032x}", level, uid, STUDY, "", "m", "r", 1000, other)
            assert rules.refusal(other, removal_fact(one)) == NOT_HELD
            assert rules.refusal(ours, removal_fact(replace(one, ward=ours))) == ""


def test_a_hub_of_the_last_release_is_not_asked(
    hub: Hub, martino: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abilities, "OURS", tuple(one for one in abilities.OURS if one != abilities.FACTS))
    martino.start()
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    martino.store.record_facts([fact_of(correction(ward=MARTINO))])
    in_region(hub, martino, [make_instance(study_uid=STUDY)])
    assert told(regional(hub)) == []


# What is read of a log.


def test_a_page_is_bounded_and_a_large_batch_told_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_pages, "PAGE_FACTS_MAX", 10)
    with Archive.open(settings_for(tmp_path), outbox=True) as archive:
        facts = [fact_of(correction(n)) for n in range(1, 48)]
        archive.record_facts(facts[:25])
        archive.record_facts(facts[25:29])
        archive.record_facts(facts[29:])
        found = list(pages(archive, Cursor(), list))
        assert [fact for page in found for fact in page.facts] == facts
        assert max(len(page.facts) for page in found) <= 10
        assert [page.last for page in found] == [False] * (len(found) - 1) + [True]
        seen = 0
        for page in found:  # from each cursor on, exactly what follows is told
            seen += len(page.facts)
            if page.cursor is not None:
                rest = [fact for later in pages(archive, page.cursor, list) for fact in later.facts]
                assert rest == facts[seen:]


def test_a_cursor_of_another_log_or_of_one_that_was_put_back_is_one_of_nothing(tmp_path: Path) -> None:
    with Archive.open(settings_for(tmp_path), outbox=True) as archive:
        store(archive, make_instance())
        archive.wait_indexed()
        archive.record_facts([fact_of(correction(1))])
        (page,) = pages(archive, Cursor(), list)
        cursor = page.cursor
        assert cursor is not None and cursor.log
        assert list(pages(archive, cursor, list))[-1].facts == ()
        for wrong in (
            replace(cursor, log=b"another"), replace(cursor, seal=b"12345678"),
            replace(cursor, position=Position(cursor.position.file, cursor.position.offset + 8)),
            replace(cursor, position=Position(9, 0)), replace(cursor, seal=b""),
        ):  # fmt: skip
            assert [len(page.facts) for page in pages(archive, wrong, list)] == [1]


def test_receipts_in_thousands_are_passed_over_once(tmp_path: Path) -> None:
    with Archive.open(settings_for(tmp_path), outbox=True) as archive:
        receipts = [Fact(FactKind.RECEIPT, f"1.2.{n}", bytes(32), MARTINO, 1) for n in range(1000)]
        for _ in range(5):
            archive.facts.record(receipts, after=START)
        (page,) = pages(archive, Cursor(), list)
        assert page.facts == () and page.last and page.cursor is not None
        assert page.cursor.position == archive.facts.end
        (again,) = pages(archive, page.cursor, list)
        assert again.cursor == page.cursor


# Whatever is lost, repeated or crossed, both come to the same.

_TABLES = ("patient", "study", "series", "correction", "known_fact")


class Exchange:
    """Two archives, and what a line between them may do: a page is told, perhaps twice, perhaps its cursor is
    lost, or an index is made anew."""

    def __init__(self, folder: Path) -> None:
        self.folders = {MARTINO: folder / "ward", "": folder / "region"}
        self.archives = {side: self._open(side) for side in self.folders}
        self.cursors = {MARTINO: Cursor(), "": Cursor()}

    def _open(self, side: str) -> Archive:
        return Archive.open(settings_for(self.folders[side]), outbox=bool(side))

    def tell(self, side: str, pages_max: int, *, lost: bool) -> None:
        """What `side` decided goes to the other."""
        source, target = self.archives[side], self.archives[MARTINO if side == "" else ""]
        own = [page for _, page in zip(range(pages_max), pages(
            source, self.cursors[side], lambda facts: [fact for fact in facts if fact.ward == side]
        ), strict=False)]  # fmt: skip
        for page in own:
            take(target, page.facts)
            if page.cursor is not None and not lost:
                self.cursors[side] = page.cursor

    def rebuild(self, side: str) -> None:
        self.archives[side].close()
        rebuild(settings_for(self.folders[side]), outbox=bool(side))
        self.archives[side] = self._open(side)
        self.cursors[MARTINO if side == "" else ""] = Cursor()  # it was kept with that index

    def close(self) -> None:
        for archive in self.archives.values():
            archive.close()


_DECISIONS = st.tuples(
    st.sampled_from([MARTINO, ""]), st.sampled_from(["correct", "undo", "remove", "restore"]),
    st.integers(0, 3),
)  # fmt: skip
_LINE = st.tuples(
    st.just("tell"), st.sampled_from([MARTINO, ""]), st.integers(1, 3), st.booleans()
)  # fmt: skip
_STEPS = st.lists(
    st.one_of(_DECISIONS, _DECISIONS, _LINE, st.tuples(st.just("arrive"), st.integers(0, 2)),
              st.tuples(st.just("rebuild"), st.sampled_from([MARTINO, ""]))),
    min_size=4, max_size=14,
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=_STEPS)
def test_any_interleaving_of_decisions_arrivals_and_losses_converges(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Any, ...]]
) -> None:
    line = Exchange(tmp_path_factory.mktemp("line"))
    instances = [
        make_instance(study_uid=STUDY, series_uid="1.8", sop_uid=f"1.9.{n}", number=n) for n in range(3)
    ]
    made: list[Correction] = []
    removed: list[Removal] = []
    try:
        for at, step in enumerate(steps, 1):
            if step[0] == "tell":
                line.tell(step[1], step[2], lost=step[3])
            elif step[0] == "rebuild":
                line.rebuild(step[1])
            elif step[0] == "arrive":
                for archive in line.archives.values():
                    store(archive, instances[step[1]])
                    archive.wait_indexed()
            else:
                side, what, which = step
                archive = line.archives[side]
                archive.wait_indexed()
                if what == "correct":
                    made.append(Correction(f"{at:016x}", STUDY, (("PatientID", str(which)),), "m", "r",
                                           1000 + which, side))  # fmt: skip
                    archive.record_facts([fact_of(made[-1])])
                elif what == "undo" and made:
                    archive.record_facts([undoing(made[which % len(made)], side, 5000 + at)])
                elif what == "remove":
                    removed.append(replace(removal(at, ward=side), at_us=2_000_000))
                    archive.record_facts([removal_fact(removed[-1])])
                elif what == "restore" and removed:
                    one = removed[which % len(removed)]
                    back = Restoration(one.id, STUDY, "l", 3_000_000 + at, side)
                    archive.record_facts([fact_of_restoration(back)])
        for archive in line.archives.values():
            for instance in instances:
                store(archive, instance)
            archive.wait_indexed()
        for side in line.archives:
            line.tell(side, 1000, lost=False)
        dumps = [archive.index.dump() for archive in line.archives.values()]
        for table in (*_TABLES, "tombstone"):
            assert dumps[0][table] == dumps[1][table], table
        shown = [patient_id(archive) for archive in line.archives.values()]
        assert shown[0] == shown[1]
    finally:
        line.close()


