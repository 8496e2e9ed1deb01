"""A whole archive: what was acknowledged is found at once, also by another process; crashes, lost indexes,
full disks and rot; and the index made anew equals the old one."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from archive.archive import Archive, ArchiveSettings
from archive.errors import Corrupt, NotFound, OutOfResources, Unavailable
from archive.model import (
    START,
    Fact,
    FactKind,
    Level,
    Location,
    Outcome,
    Position,
    Query,
    Record,
)
from archive.packs.recovery import Damage
from archive.packs.watermark import read_watermark
from archive.rebuild import rebuild
from tests.archive.archives import send, settings_for, store, stored_bytes
from tests.datasets import Instance, make_instance

ROOT = Path(__file__).parents[2]
STUDIES = Query(Level.STUDY)


@pytest.fixture
def settings(tmp_path: Path) -> ArchiveSettings:
    return settings_for(tmp_path / "state")


@pytest.fixture
def archive(settings: ArchiveSettings) -> Iterator[Archive]:
    with Archive.open(settings, outbox=True) as opened:
        yield opened


def found_uids(archive: Archive) -> set[str]:
    return {match.study["StudyInstanceUID"] for match in archive.search(STUDIES)}


def test_a_search_finds_what_was_acknowledged_before_it(archive: Archive) -> None:
    for number in range(50):
        instance = make_instance(number=number)
        store(archive, instance)
        assert instance.study_uid in found_uids(archive)
    assert archive.count(STUDIES) == 50


def test_another_process_that_reads_sees_what_was_acknowledged_before(
    archive: Archive, settings: ArchiveSettings
) -> None:
    with Archive.open(settings, outbox=False, read_only=True) as reader:
        assert reader.epoch == archive.epoch != b""
        for number in range(30):
            instance = make_instance(number=number, padding=2 << 20 if number == 7 else 0)
            store(archive, instance)
            assert instance.study_uid in found_uids(reader)
            assert stored_bytes(reader, instance) == instance.dataset
        with pytest.raises(Unavailable):
            _ = reader.intake
        with pytest.raises(Unavailable):
            reader.record_facts([fact("1.2.3", b"d" * 32)])


def test_a_reader_is_told_when_the_index_does_not_catch_up(
    archive: Archive, settings: ArchiveSettings
) -> None:
    with Archive.open(settings, outbox=False, read_only=True) as reader:
        store(archive, make_instance())
        writing = archive._writing
        assert writing is not None
        writing.watermark.publish(Position(9, 9))
        with pytest.raises(Unavailable):
            reader.wait_indexed(timeout_s=0.1)


def test_one_process_writes(archive: Archive, settings: ArchiveSettings) -> None:
    with pytest.raises(Unavailable):
        Archive.open(settings, outbox=True)
    with pytest.raises(Unavailable):
        rebuild(settings, outbox=True)


def test_wait_indexed_of_a_ticket(archive: Archive) -> None:
    instance = make_instance()
    ticket = send(archive, instance)
    ticket.wait_indexed()
    assert archive.index.lookup(instance.sop_instance_uid) is not None
    again = send(archive, instance)
    assert again.outcome is Outcome.DUPLICATE
    again.wait_indexed()


def test_nothing_is_written_after_the_archive_was_closed(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        late = make_instance()
        reception = archive.intake.begin(late.head())
        reception.write(late.dataset)
        store(archive, make_instance())
    before = {path: path.stat().st_size for path in settings.state.rglob("*.pack")}
    with pytest.raises(Unavailable):
        reception.commit()
    assert {path: path.stat().st_size for path in settings.state.rglob("*.pack")} == before
    assert not [thread for thread in threading.enumerate() if thread.name == "indexer"]


def test_many_threads_store_and_search(archive: Archive) -> None:
    failures: list[BaseException] = []

    def run(thread: int) -> None:
        try:
            for number in range(25):
                instance = make_instance(number=number, series_uid=f"1.2.{thread}")
                assert store(archive, instance) is Outcome.STORED
                if number % 5 == 0:
                    assert stored_bytes(archive, instance) == instance.dataset
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    archive.wait_indexed()
    assert archive.index.totals().instances == 200


def test_payloads_are_read_by_many_threads_at_once(archive: Archive) -> None:
    instance = make_instance(padding=3 << 20)
    store(archive, instance)
    (found,) = archive.instances(instance.study_uid)
    failures = []

    def run(seed: int) -> None:
        chance = random.Random(seed)
        with archive.open_payload(found.location) as payload:
            for _ in range(50):
                place = chance.randrange(len(instance.dataset))
                payload.seek(found.location.dataset_offset + place)
                if payload.read(5000) != instance.dataset[place : place + 5000]:
                    failures.append(place)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("pack", ["../index.db", "packs/../index.db", "index.db", "packs/00000009.pack", ""])
def test_a_location_that_is_none_is_not_found(archive: Archive, pack: str) -> None:
    with pytest.raises(NotFound):
        archive.open_payload(Location(pack, 0, 10, 0))


# Facts


def fact(uid: str, digest: bytes, kind: FactKind = FactKind.RECEIPT, at_us: int = 5) -> Fact:
    return Fact(kind, uid, digest, "", at_us)


def test_facts_are_applied_at_once_and_again_after_a_restart(settings: ArchiveSettings) -> None:
    instances = [make_instance(number=n) for n in range(5)]
    with Archive.open(settings, outbox=True) as archive:
        for instance in instances:
            store(archive, instance)
        archive.wait_indexed()
        assert archive.index.pending_summary().count == 5
        archive.record_facts([fact(i.sop_instance_uid, i.digest) for i in instances[:3]])
        assert archive.index.pending_summary().count == 2
    for name in settings.state.glob("index.db*"):
        name.unlink()
    with Archive.open(settings, outbox=True) as archive:
        assert archive.index.pending_summary().count == 2
        assert [batch.facts for batch in archive.facts.read(START)] == [
            tuple(fact(i.sop_instance_uid, i.digest) for i in instances[:3])
        ]


def test_facts_that_the_index_could_not_take_are_applied_later(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = [make_instance(number=n) for n in range(3)]
    for instance in instances:
        store(archive, instance)
    archive.wait_indexed()

    def down(*_: object, **__: object) -> None:
        raise Unavailable("the index does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(archive.index, "apply_facts", down)
        for instance in instances[:2]:
            with pytest.raises(Unavailable):
                archive.record_facts([fact(instance.sop_instance_uid, instance.digest)])
    archive.record_facts([fact(instances[2].sop_instance_uid, instances[2].digest)])
    assert archive.index.pending_summary().count == 0  # the earlier ones too


# Crashes


def test_an_index_that_was_lost_is_read_from_the_packs_again(settings: ArchiveSettings) -> None:
    instances = [make_instance(number=n, padding=(2 << 20) if n == 3 else 0) for n in range(12)]
    with Archive.open(settings, outbox=True) as archive:
        for instance in instances:
            store(archive, instance)
        archive.wait_indexed()
        dump = archive.index.dump()
    for name in settings.state.glob("index.db*"):
        name.unlink()
    with Archive.open(settings, outbox=True) as archive:
        assert archive.index.dump() == dump
        assert store(archive, instances[0]) is Outcome.DUPLICATE


def run_until_killed(state: Path, seed: int, chance: random.Random) -> dict[str, tuple[str, str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.archive.storing", str(state), str(seed)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    lines = 0
    stop = chance.randrange(5, 120)
    acknowledged: dict[str, tuple[str, str]] = {}

    def note(line: bytes) -> None:
        uid, study_uid, digest = line.decode().split()
        acknowledged[uid] = (study_uid, digest)

    while lines < stop:
        note(process.stdout.readline())
        lines += 1
    process.send_signal(signal.SIGKILL)
    for line in process.stdout:
        if line.endswith(b"\n"):
            note(line)
    process.wait()
    process.stdout.close()
    return acknowledged


def test_kill_9_loses_nothing_acknowledged_and_doubles_nothing(settings: ArchiveSettings) -> None:
    chance = random.Random(7)
    acknowledged: dict[str, tuple[str, str]] = {}
    epochs = set()
    for seed in range(6):
        acknowledged |= run_until_killed(settings.state, seed, chance)
        with Archive.open(settings, outbox=True) as archive:
            epochs.add(archive.epoch)
            records = [item for item in archive.packs.read(START, archive.packs.log.durable)]
            assert not [item for item in records if isinstance(item, Damage)]
            uids = [item.head.sop_instance_uid for item in records if isinstance(item, Record)]
            assert len(uids) == len(set(uids))
            assert set(acknowledged) <= set(uids)
            for uid, (study_uid, digest) in acknowledged.items():
                (found,) = archive.instances(study_uid, None, uid)
                assert found.digest.hex() == digest
                archive.verify(found)
            assert archive.index.totals().instances == len(uids)
            assert archive.packs.storage.list("large") == sorted(
                {item.location.pack for item in records if isinstance(item, Record)}
                & set(archive.packs.storage.list("large"))
            )
    assert len(epochs) == 1
    assert rebuilt_equals(settings)


def test_rot_is_reported_as_a_fact_and_costs_nothing_else(settings: ArchiveSettings) -> None:
    instances = [make_instance(number=n) for n in range(10)]
    with Archive.open(settings, outbox=True) as archive:
        for instance in instances:
            store(archive, instance)
        struck = archive.instances(instances[4].study_uid)[0]
    with (settings.state / struck.location.pack).open("r+b") as pack:
        pack.seek(struck.location.offset + struck.location.length - 3)
        byte = pack.read(1)
        pack.seek(-1, os.SEEK_CUR)
        pack.write(bytes([byte[0] ^ 1]))
    with Archive.open(settings, outbox=True) as archive, pytest.raises(Corrupt):
        archive.verify(struck)
    for name in settings.state.glob("index.db*"):
        name.unlink()
    with Archive.open(settings, outbox=True) as archive:
        facts = [each for batch in archive.facts.read(START) for each in batch.facts]
        assert [(each.kind, each.sop_instance_uid) for each in facts] == [
            (FactKind.DAMAGE, instances[4].sop_instance_uid)
        ]
        assert archive.index.totals().instances == 9
        for instance in instances[:4] + instances[5:]:
            assert stored_bytes(archive, instance) == instance.dataset
        assert store(archive, instances[4]) is Outcome.STORED  # it may come again
        assert stored_bytes(archive, instances[4]) == instances[4].dataset


def test_the_watermark_never_runs_ahead(archive: Archive, settings: ArchiveSettings) -> None:
    for number in range(20):
        ticket = send(archive, make_instance(number=number))
        assert read_watermark(settings.state / "watermark") < ticket.position
        ticket.wait_durable()
        assert read_watermark(settings.state / "watermark") >= ticket.position


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_refuses_keeps_nothing_half_stored_and_recovers_by_itself(tmp_path: Path) -> None:
    state = tmp_path / "small"
    state.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(state)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        # The index lies elsewhere: this is about packs.
        settings = settings_for(state, index_url=f"sqlite:///{tmp_path / 'index.db'}")
        with Archive.open(settings, outbox=True) as archive:
            fill_and_recover(archive, state)
        with Archive.open(settings, outbox=True) as archive:
            assert archive.index.totals().instances > 0
        assert rebuilt_equals(settings)
    finally:
        subprocess.run(["umount", str(state)], check=True)


def fill_and_recover(archive: Archive, state: Path) -> None:
    ballast = state / "ballast"
    ballast.write_bytes(bytes(5 << 20))
    kept: list[Instance] = []
    refusals = 0
    for number in range(400):
        large = number % 10 == 5
        instance = make_instance(number=number, padding=(1 << 20) + 200 if large else 60_000)
        try:
            assert store(archive, instance, piece_bytes=200_000) is Outcome.STORED
            kept.append(instance)
        except OutOfResources:
            refusals += 1
        if refusals > 5:
            break
    assert refusals > 5 and len(kept) > 5
    ballast.unlink()
    late = make_instance(padding=60_000)
    assert store(archive, late) is Outcome.STORED
    for instance in (*kept, late):
        assert stored_bytes(archive, instance) == instance.dataset
    assert archive.index.totals().instances == len(kept) + 1
    assert archive.intake.budget.taken_bytes == 0
    referred = {found.location.pack for i in kept for found in archive.instances(i.study_uid)}
    assert set(archive.packs.storage.list("large")) <= referred


def test_the_reserve_counts_what_is_being_received(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    settings = settings_for(tmp_path / "s", free_bytes_min=free - (64 << 30))
    with Archive.open(settings, outbox=True) as archive:
        with pytest.raises(OutOfResources):
            archive.intake.begin(make_instance().head(), size_hint=70 << 30)
        assert store(archive, make_instance()) is Outcome.STORED


# Rebuilding


def rebuilt_equals(settings: ArchiveSettings) -> bool:
    with Archive.open(settings, outbox=True) as archive:
        archive.wait_indexed()
        dump = archive.index.dump()
    report = rebuild(settings, outbox=True)
    with Archive.open(settings, outbox=True) as archive:
        return archive.index.dump() == dump and report.records == sum(
            isinstance(item, Record) for item in archive.packs.read(START, archive.packs.log.durable)
        )


def history(archive: Archive, seed: int) -> None:
    """A past with everything in it: repeats, conflicts, late first copies, receipts before and after."""
    chance = random.Random(seed)
    studies = [f"1.2.{n}" for n in range(4)]
    sent: list[Instance] = []
    for number in range(120):
        choice = chance.random()
        if sent and choice < 0.15:
            store(archive, chance.choice(sent))
        elif sent and choice < 0.3:
            uid = chance.choice(sent).sop_instance_uid
            other = make_instance(
                sop_uid=uid, study_uid=chance.choice(studies), patient_name=f"Other^{number}"
            )
            store(archive, other, conflict=chance.random() < 0.3)
        elif sent and choice < 0.45:
            about = chance.choice(sent)
            kind = chance.choice([FactKind.RECEIPT, FactKind.COPY, FactKind.SET_ASIDE, FactKind.RETRY])
            digest = about.digest if chance.random() < 0.9 else hashlib.sha256(b"never came").digest()
            archive.record_facts([Fact(kind, about.sop_instance_uid, digest, "b/two", number, "why")])
        else:
            study_uid = chance.choice(studies)
            instance = make_instance(
                study_uid=study_uid,
                series_uid=f"{study_uid}.{chance.randrange(3)}",
                patient_id=f"P{studies.index(study_uid) % 2}",
                number=number,
                padding=2 << 20 if chance.random() < 0.03 else 0,
            )
            sent.append(instance)
            store(archive, instance)


@pytest.mark.parametrize("seed", range(3))
def test_a_rebuilt_index_equals_the_one_it_replaces(tmp_path: Path, database_url: str, seed: int) -> None:
    settings = settings_for(tmp_path / "state", index_url=database_url)
    with Archive.open(settings, outbox=True) as archive:
        history(archive, seed)
    assert rebuilt_equals(settings)


def test_search_decisions_and_restart_on_either_database(tmp_path: Path, database_url: str) -> None:
    settings = settings_for(tmp_path / "state", index_url=database_url)
    instances = [make_instance(number=n) for n in range(10)]
    other = make_instance(sop_uid=instances[2].sop_instance_uid, patient_name="Other^One")
    with (
        Archive.open(settings, outbox=True) as archive,
        Archive.open(settings, outbox=False, read_only=True) as reader,
    ):
        for instance in instances:
            assert store(archive, instance) is Outcome.STORED
            assert instance.study_uid in found_uids(reader)
        archive.wait_indexed()
        assert store(archive, instances[1]) is Outcome.DUPLICATE
        assert store(archive, other) is Outcome.CONFLICT
        archive.wait_indexed()
        assert store(archive, other) is Outcome.CONFLICT
    with Archive.open(settings, outbox=True) as archive:
        assert archive.index.totals().instances == 10
        assert len(archive.index.conflicts(10)) == 1
        assert store(archive, instances[9]) is Outcome.DUPLICATE


def test_a_reader_sees_the_rebuilt_index_without_opening_it_again(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        history(archive, 9)
        archive.wait_indexed()
    with Archive.open(settings, outbox=False, read_only=True) as reader:
        before = reader.index.dump()
        rebuild(settings, outbox=True)
        assert reader.index.dump() == before
        with Archive.open(settings, outbox=True) as archive:
            late = make_instance()
            store(archive, late)
            assert late.study_uid in found_uids(reader)


def test_an_index_that_is_garbage_is_rebuilt(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        history(archive, 5)
        archive.wait_indexed()
        dump = archive.index.dump()
    for name in settings.state.glob("index.db-*"):
        name.unlink()
    (settings.state / "index.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(Unavailable, match="miss rebuild"):
        Archive.open(settings, outbox=True)
    report = rebuild(settings, outbox=True)
    assert report.records and report.facts and not report.damages
    with Archive.open(settings, outbox=True) as archive:
        assert archive.index.dump() == dump


def test_a_rebuild_waits_for_nobody_and_reports_damage(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        instances = [make_instance(number=n) for n in range(4)]
        for instance in instances:
            store(archive, instance)
        struck = archive.instances(instances[1].study_uid)[0]
    with (settings.state / struck.location.pack).open("r+b") as pack:
        pack.seek(struck.location.offset - 20)  # in its header
        pack.write(b"\xff\xff")
    began = time.monotonic()
    report = rebuild(settings, outbox=True)
    assert report.records == 3
    assert len(report.damages) == 1 and "pack 1 from" in report.damages[0]
    assert time.monotonic() - began < 30


def test_a_pack_that_is_gone_is_damage_whatever_was_known_of_it(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        for number in range(3):
            instance = make_instance(number=number)
            store(archive, instance)
            archive.wait_indexed()
            receipt = Fact(FactKind.RECEIPT, instance.sop_instance_uid, instance.digest, "a/ct", 1, "stored")
            archive.record_facts([receipt])
        pack = settings.state / archive.instances(instance.study_uid)[0].location.pack
    pack.unlink()
    with Archive.open(settings, outbox=True):
        pass  # a new pack follows the one that is gone
    report = rebuild(settings, outbox=True)
    assert report.records == 0 and report.facts == 3
    assert report.damages and all("pack 1 from" in damage for damage in report.damages)
