"""Packs looked at from outside: beside the writer, with no index, after rot, and their bytes out again; and
what recovery set aside, within its bounds."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom import dcmread

from archive.archive import Archive, ArchiveSettings, read_acknowledged
from archive.errors import Corrupt, NotFound
from archive.extract import Wanted, extract, extract_aside
from archive.model import Fact, FactKind, RecordKind
from archive.packs.asides import asides, trim
from archive.packs.logfiles import LogLimits
from archive.packs.packs import LAYOUT, Packs
from archive.packs.storage import FileStorage
from archive.packs.survey import Finding, Listed, Salvaged, State, Survey, salvage
from archive.space.eviction import EvictionRequest
from tests.archive.archives import settings_for, store
from tests.archive.faulty_storage import FaultyStorage
from tests.archive.test_packs_faults import LIMITS, Site, head_of, payload_of
from tests.datasets import Instance, make_instance
from tests.waiting import wait_for

LATE_US = 2_000_000_000_000_000


@pytest.fixture
def settings(tmp_path: Path) -> ArchiveSettings:
    return settings_for(tmp_path / "state", pack_bytes_max=200_000, drop_delay_s=0.0)


def survey_of(settings: ArchiveSettings) -> Survey:
    return Survey(FileStorage(settings.state), promised=read_acknowledged(settings.state))


def everything(survey: Survey) -> Iterator[Listed | Finding]:
    for name in survey.names:
        yield from survey.records(survey.number_of(name))


def verified(survey: Survey) -> tuple[list[Listed], list[Finding]]:
    listed: list[Listed] = []
    findings = survey.missing()
    for name in survey.names:
        for item in survey.verify(survey.number_of(name), lambda count: None):
            if isinstance(item, Finding):
                findings.append(item)
            else:
                listed.append(item)
    return listed, findings


def filled(archive: Archive, count: int = 12) -> list[Instance]:
    made = [
        make_instance(
            study_uid=f"1.2.{n % 3}", sop_uid=f"1.2.3.{n}", number=n, padding=2 << 20 if n == 5 else 30_000
        )
        for n in range(count)
    ]
    for instance in made:
        store(archive, instance)
    archive.wait_indexed()
    return made


def test_what_a_pack_holds_is_told_without_an_index_beside_the_writer(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        made = filled(archive)
        store(archive, make_instance(study_uid="1.2.0", sop_uid="1.2.3.0", padding=10_000))  # a conflict
        archive.wait_indexed()
        archive.record_facts([Fact(FactKind.RECEIPT, made[1].sop_instance_uid, made[1].digest, "", 5)])
        for name in settings.state.glob("index.db*"):
            name.rename(name.with_suffix(".away"))
        survey = survey_of(settings)
        summaries = [survey.summary(survey.number_of(name)) for name in survey.names]
        assert len(summaries) > 2 and [each.sealed for each in summaries][-2:] == [True, False]
        assert sum(each.counts[State.LIVE] for each in summaries) == 12
        assert sum(each.counts[State.CONFLICT] for each in summaries) == 1
        assert survey.own_packs()[0] == 1
        uids = [item.record.head.sop_instance_uid for item in everything(survey) if isinstance(item, Listed)]
        assert uids == [each.sop_instance_uid for each in made] + ["1.2.3.0"]
        sequences = [item.record.sequence for item in everything(survey) if isinstance(item, Listed)]
        assert sequences == sorted(sequences)
        listed, findings = verified(survey)
        assert len(listed) == 13 and not findings
        for name in settings.state.glob("*.away"):
            name.rename(name.with_name(name.name.replace(".away", "")))


def test_evicted_and_moved_are_no_damage(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        made = filled(archive)
        archive.record_facts(
            [Fact(FactKind.RECEIPT, each.sop_instance_uid, each.digest, "", 5) for each in made]
        )
        report = archive.upkeep.evict(EvictionRequest(LATE_US, study_uid="1.2.2")).result(30)
        assert report.instances == 4
        listed, findings = verified(survey_of(settings))
        assert not findings
        states = {item.record.head.sop_instance_uid: item.state for item in listed}
        evicted = {uid for uid, state in states.items() if state is State.EVICTED}
        assert evicted <= {each.sop_instance_uid for each in made if each.study_uid == "1.2.2"} and evicted
        archive.upkeep.evict(EvictionRequest(LATE_US, received_before_us=LATE_US)).result(30)
        survey = survey_of(settings)
        assert survey.missing() == [] and verified(survey)[1] == []


def test_beside_a_writer_nothing_is_called_damage(settings: ArchiveSettings) -> None:
    with Archive.open(settings, outbox=True) as archive:
        stopping = threading.Event()

        def write() -> None:
            number = 0
            while not stopping.is_set():
                number += 1
                store(archive, make_instance(sop_uid=f"1.2.9.{number}", padding=9_000))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            deadline = time.monotonic() + 4
            rounds = 0
            while time.monotonic() < deadline or rounds < 5:
                listed, findings = verified(survey_of(settings))
                assert findings == []
                rounds += 1
        finally:
            stopping.set()
            writer.join(30)
        assert listed


@pytest.mark.parametrize("part", ["payload", "prefix", "header", "trailer", "file header", "gone", "own"])
def test_rot_is_found_with_its_place_and_uid(settings: ArchiveSettings, part: str) -> None:
    with Archive.open(settings, outbox=True) as archive:
        filled(archive)
        stored = archive.index.live("1.2.3.5" if part == "own" else "1.2.3.1")
        assert stored is not None
    path, location = settings.state / stored.location.pack, stored.location
    place = {
        "payload": location.offset + location.length - 9, "prefix": location.offset + 140,
        "header": location.offset - 30, "trailer": location.offset + location.length + 20,
        "file header": 40, "gone": 0, "own": location.offset + 1_000_000,
    }[part]  # fmt: skip
    if part == "gone":
        path.unlink()
    else:
        with path.open("r+b") as file:
            for offset in (place, place + 4096) if part == "file header" else (place,):
                file.seek(offset)
                byte = file.read(1)
                file.seek(offset)
                file.write(bytes([byte[0] ^ 1]))
    listed, findings = verified(survey_of(settings))
    assert findings and all(finding.pack == stored.location.pack for finding in findings)
    if part in ("payload", "prefix", "trailer", "own"):
        (finding,) = findings
        assert finding.sop_instance_uid == stored.head.sop_instance_uid
        assert finding.offset <= location.offset < finding.end
    whole = {item.record.head.sop_instance_uid for item in listed}
    assert stored.head.sop_instance_uid not in whole
    if part not in ("file header", "gone"):
        assert len(whole) == 11  # nothing else is lost


# Out again


def test_instances_come_out_as_files_with_no_index(settings: ArchiveSettings, tmp_path: Path) -> None:
    with Archive.open(settings, outbox=True) as archive:
        made = filled(archive)
        other = make_instance(study_uid="1.2.0", sop_uid="1.2.3.0", padding=10_000)
        store(archive, other)
    for name in settings.state.glob("index.db*"):
        name.unlink()
    survey = survey_of(settings)
    to = tmp_path / "all"
    done = extract(survey, Wanted(), to)
    assert (done.files, done.there, done.failures) == (13, 0, [])
    for instance in made:
        path = to / f"{instance.sop_instance_uid}.dcm"
        assert path.read_bytes().endswith(instance.dataset)
        assert dcmread(path).SOPInstanceUID == instance.sop_instance_uid
    conflicting = to / f"1.2.3.0.{other.digest.hex()[:16]}.dcm"
    assert conflicting.read_bytes().endswith(other.dataset)
    before = {path: path.stat().st_mtime_ns for path in to.iterdir()}
    assert len(before) == 13
    again = extract(survey, Wanted(), to)
    assert (again.files, again.there) == (0, 13)
    assert {path: path.stat().st_mtime_ns for path in to.iterdir()} == before
    by_study = extract(survey, Wanted(study_uid="1.2.1"), tmp_path / "study")
    assert by_study.files == 4
    by_uid = extract(survey, Wanted(uids=frozenset({"1.2.3.5"})), tmp_path / "uid")
    assert by_uid.files == 1 and by_uid.bytes > 2 << 20
    first = extract(survey, Wanted(packs=(1,)), tmp_path / "pack")
    assert 0 < first.files < 13


def test_a_file_that_is_there_is_never_overwritten(settings: ArchiveSettings, tmp_path: Path) -> None:
    with Archive.open(settings, outbox=True) as archive:
        instance = make_instance(sop_uid="1.2.3")
        store(archive, instance)
    (tmp_path / "to").mkdir()
    mine = tmp_path / "to" / "1.2.3.dcm"
    mine.write_bytes(b"somebody's")
    done = extract(survey_of(settings), Wanted(), tmp_path / "to")
    assert mine.read_bytes() == b"somebody's" and done.files == 1
    assert (tmp_path / "to" / f"1.2.3.{instance.digest.hex()[:16]}.dcm").exists()


# Set aside


def torn_site() -> Site:
    """A log whose unpromised tail was cut, with a whole record in what was cut."""
    for seed in range(400):
        site = Site()
        site.append(3000)
        site.acknowledge()
        site.append(9000)
        site.append(9000)
        site.reopen(site.storage.power_loss(random.Random(seed)))
        cuts = [name for name in site.storage.list("set-aside") if name.endswith(".cut")]
        if cuts and any(isinstance(item, Salvaged) for item in salvage(site.storage, cuts[0])):
            return site
    raise AssertionError("no seed tears the first record and keeps the second")


def test_a_whole_record_comes_out_of_what_was_cut(tmp_path: Path) -> None:
    site = torn_site()
    (name,) = site.storage.list("set-aside")
    done = extract_aside(site.storage, name, tmp_path)
    assert done.files == 1 and done.failures  # the torn one
    data = payload_of(3, 9000)
    assert (tmp_path / f"1.2.3.3.{hashlib.sha256(data).hexdigest()[:16]}.dcm").read_bytes().endswith(data)
    site.storage.delete("packs/00000001.pack")
    with pytest.raises(Corrupt):
        extract_aside(site.storage, name, tmp_path)
    with pytest.raises(NotFound):
        extract_aside(site.storage, "set-aside/packs-00000001-8192-1.cut", tmp_path)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_large_object_comes_out_when_it_is_whole(tmp_path: Path, sealed: bool) -> None:
    storage = FaultyStorage()
    packs = Packs.open(storage, limits=LIMITS)
    own = packs.begin_own(head_of(7))
    data = payload_of(7, 50_000)
    own.write(data)
    if sealed:
        own.seal()
    after = storage.kill()
    Packs.open(after, limits=LIMITS)
    (name,) = after.list("set-aside")
    done = extract_aside(after, name, tmp_path)
    assert done.files == int(sealed) and bool(done.failures) is not sealed
    if sealed:
        (path,) = tmp_path.iterdir()
        assert path.read_bytes().endswith(data)


def test_what_is_set_aside_has_bounds_and_the_oldest_goes_first() -> None:
    storage = FaultyStorage()
    names = [f"set-aside/packs-0000000{n}-8192-{1_700_000_000 + n}000000000.cut" for n in range(1, 6)]
    kept = "set-aside/large-00ff-1600000000000000000.part.kept"
    for name in (*names, kept):
        storage.create(name).pwritev([bytes(1000)], 0)
    now_us = 1_700_000_010_000_000
    assert [each.name for each in asides(storage)] == [kept, *names]
    assert trim(storage, bytes_max=10_000, age_s_max=1e9, now_us=now_us) == []
    gone = trim(storage, bytes_max=4_000, age_s_max=1e9, now_us=now_us)
    assert [each.name for each in gone] == names[:2]  # what may have been promised counts, and stays
    gone = trim(storage, bytes_max=10_000, age_s_max=6.5, now_us=now_us)
    assert [each.name for each in gone] == [names[2]]
    assert storage.list("set-aside") == [kept, *names[3:]]


def test_a_large_object_that_a_damaged_reference_may_have_named_stays() -> None:
    site = Site()
    site.append(3000)
    site.append_own(30_000)
    name = next(name for name in site.storage.list("large") if name.endswith(".part"))
    site.packs.log.flush()
    site.packs.log.mark()
    (reference,) = [record for records in site.holdings()[0].values() for record in records
                    if record.location.pack.startswith("large")]  # fmt: skip
    site.storage.flip("packs/00000001.pack", reference.end.offset - 100)
    after = site.storage.kill()
    Packs.open(after, limits=LIMITS)
    (aside,) = after.list("set-aside")
    assert aside.startswith(f"set-aside/{name[:-5].replace('/', '-')}") and aside.endswith(".part.kept")
    assert trim(after, bytes_max=0, age_s_max=0.0, now_us=LATE_US) == []


# Sealing, and many packs


def test_a_pack_past_its_age_is_sealed_in_an_idle_archive(settings: ArchiveSettings) -> None:
    with Archive.open(replace(settings, pack_age_s_max=0.3), outbox=True) as archive:
        store(archive, make_instance())
        wait_for(archive.packs.log.sealed, "the pack is sealed")
        count = len(archive.packs.storage.list("packs"))
        time.sleep(0.6)  # an empty pack is not sealed again and again
        assert len(archive.packs.storage.list("packs")) == count == 2
        store(archive, make_instance(number=2))
    assert verified(survey_of(settings))[1] == []


def test_a_thousand_packs_open_by_their_headers_alone(tmp_path: Path) -> None:
    limits = LogLimits(file_bytes_max=20_000, ahead_bytes=0)
    storage = FileStorage(tmp_path)
    packs = Packs.open(storage, limits=limits)
    data = payload_of(1, 9_000)
    digest = hashlib.sha256(data).digest()
    for number in range(1_000):
        packs.append(RecordKind.INSTANCE, head_of(number), [data], len(data), digest)
    packs.close()
    count = len(storage.list(LAYOUT.folder))
    assert count >= 1_000
    began = time.process_time()
    again = Packs.open(FileStorage(tmp_path), limits=limits, promised=packs.log.durable)
    used_s = time.process_time() - began
    assert again.log.next_sequence > 1_000
    assert used_s < 2.0, f"{count} packs took {used_s:.2f} s of CPU"
    again.close()
