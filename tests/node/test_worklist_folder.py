"""A folder of worklist files: what comes, changes and goes is followed; what is broken or foreign harms
nothing."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID

from archive.database import sqlite_url
from archive.dataset import jsonsets
from archive.dataset.jsonwriting import encoded
from archive.errors import InvalidInput, MissError, OutOfResources, TooLarge
from archive.ledger import Ledger
from archive.ledger.worklist import steps_of
from node import worklistfolder
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE
from node.dimse.identifiers import write_identifier
from node.worklistfolder import WorklistFolder
from node.worklistkeeper import WorklistKeeper
from tests.node.worklists import worklist_item
from tests.peers import dcmtk
from tests.waiting import wait_for


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(sqlite_url(tmp_path / "ledger.db"))
    yield opened
    opened.close()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "worklist"
    folder.mkdir()
    return folder


def raw(item: Dataset, syntax: str = IMPLICIT_LITTLE) -> bytes:
    return write_identifier(item, syntax)


def part10(item: Dataset) -> bytes:
    buffer = DicomBytesIO()
    item.file_meta = FileMetaDataset()
    item.file_meta.MediaStorageSOPClassUID = UID("1.2.276.0.7230010.3.1.0.1")
    item.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    item.file_meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE)
    dcmwrite(buffer, item, enforce_file_format=True)
    return buffer.getvalue()


def steps(ledger: Ledger) -> list[str]:
    return sorted(step.step_id for step in ledger.scheduled_steps())


def test_files_come_change_and_go(ledger: Ledger, files: Path) -> None:
    folder = WorklistFolder(files, ledger)
    assert folder.look() == 0
    (files / "a.wl").write_bytes(raw(worklist_item(1)))
    (files / "b.WL").write_bytes(raw(worklist_item(2), EXPLICIT_LITTLE))
    (files / "c.dcm").write_bytes(part10(worklist_item(3)))
    assert folder.look() == 3 and steps(ledger) == ["S1", "S2", "S3"]
    assert folder.look() == 0
    (files / "a.wl").write_bytes(raw(worklist_item(4, PatientName="Another")))
    assert folder.look() == 1 and steps(ledger) == ["S2", "S3", "S4"]
    (files / "c.dcm").unlink()
    assert folder.look() == 1 and steps(ledger) == ["S2", "S4"]


def test_what_went_while_nobody_looked_goes_too(ledger: Ledger, files: Path) -> None:
    (files / "a.wl").write_bytes(raw(worklist_item(1)))
    (files / "b.wl").write_bytes(raw(worklist_item(2)))
    WorklistFolder(files, ledger).look()
    ledger.schedule(steps_of(jsonsets.from_file(raw(worklist_item(3))), "command"))
    (files / "a.wl").unlink()
    WorklistFolder(files, ledger).look()
    assert steps(ledger) == ["S2", "S3"]


def test_a_folder_that_is_away_changes_nothing(ledger: Ledger, files: Path,
                                               caplog: pytest.LogCaptureFixture) -> None:
    (files / "a.wl").write_bytes(raw(worklist_item(1)))
    folder = WorklistFolder(files, ledger)
    folder.look()
    away = files.rename(files.parent / "away")
    with caplog.at_level(logging.WARNING):
        assert folder.look() == folder.look() == 0
    assert steps(ledger) == ["S1"] and caplog.text.count("can't be listed") == 1
    away.rename(files)
    assert folder.look() == 0 and steps(ledger) == ["S1"]


def test_a_half_written_file_keeps_what_it_had_and_is_read_again(
        ledger: Ledger, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = files / "a.wl"
    path.write_bytes(raw(worklist_item(1)))
    folder = WorklistFolder(files, ledger)
    folder.look()
    whole = raw(worklist_item(2, PatientName="Segreto^Nome"))
    with caplog.at_level(logging.WARNING):
        path.write_bytes(whole[:-7])
        assert folder.look() == 1 and folder.look() == 0
    assert steps(ledger) == ["S1"]
    assert "'a.wl'" in caplog.text and "Segreto" not in caplog.text and len(caplog.records) == 1
    path.write_bytes(whole)
    folder.look()
    assert steps(ledger) == ["S2"]


def test_what_is_no_worklist_file_is_left_alone(ledger: Ledger, files: Path, tmp_path: Path) -> None:
    (files / "lockfile").touch()
    (files / "notes.txt").write_bytes(raw(worklist_item(1)))
    (files / "folder.wl").mkdir()
    os.mkfifo(files / "pipe.wl")
    outside = tmp_path / "outside.wl"
    outside.write_bytes(raw(worklist_item(1)))
    (files / "link.wl").symlink_to(outside)
    (files / "empty.wl").touch()
    (files / "junk.wl").write_bytes(os.urandom(5000))
    (files / "late.wl").write_bytes(raw(worklist_item(1)).replace(b"1.2.3.1", b"1.2.3.."))
    WorklistFolder(files, ledger).look()
    assert steps(ledger) == []
    assert sorted(path.name for path in files.iterdir()) == [
        "empty.wl", "folder.wl", "junk.wl", "late.wl", "link.wl", "lockfile", "notes.txt", "pipe.wl"]


def test_bounds(ledger: Ledger, files: Path, monkeypatch: pytest.MonkeyPatch,
                caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(worklistfolder, "FILES_MAX", 2)
    monkeypatch.setattr(worklistfolder, "FILE_BYTES_MAX", 2000)
    for name in "abc":
        (files / f"{name}.wl").write_bytes(raw(worklist_item(ord(name))))
    (files / "a.wl").write_bytes(raw(worklist_item(1, PatientComments="x" * 3000)))
    WorklistFolder(files, ledger).look()
    assert steps(ledger) == ["S98"]
    assert "more than 2 worklist files" in caplog.text and "more than 2,000 bytes" in caplog.text


def test_a_step_that_was_started_stays_so_when_its_file_is_read_again(ledger: Ledger, files: Path) -> None:
    (files / "a.wl").write_bytes(raw(worklist_item(1)))
    WorklistFolder(files, ledger).look()
    started = worklist_item(1, {"ScheduledProcedureStepStatus": "STARTED"})
    ledger.schedule(steps_of(jsonsets.from_file(raw(started)), "file:a.wl"))
    WorklistFolder(files, ledger).look()
    assert ledger.scheduled_counts() == {"STARTED": 1}


@pytest.mark.parametrize("stopped", [False, True], ids=["while it is watched", "while nobody looked"])
def test_a_step_that_was_started_stays_so_when_its_file_has_another_name(
        ledger: Ledger, files: Path, stopped: bool) -> None:
    (files / "a.wl").write_bytes(raw(worklist_item(1)))
    folder = WorklistFolder(files, ledger)
    folder.look()
    started = worklist_item(1, {"ScheduledProcedureStepStatus": "STARTED"})
    ledger.schedule(steps_of(jsonsets.from_file(raw(started)), "file:a.wl"))
    (files / "a.wl").rename(files / "b.wl")
    folder = WorklistFolder(files, ledger) if stopped else folder
    folder.look()
    assert ledger.scheduled_counts() == {"STARTED": 1} and ledger.origins("file:") == {"file:b.wl"}
    (files / "b.wl").unlink()
    folder.look()
    assert steps(ledger) == []


def test_what_goes_makes_room_for_what_came(ledger: Ledger, files: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archive.ledger.worklist.SCHEDULED_STEPS_MAX", 1)
    (files / "a.wl").write_bytes(raw(worklist_item(1)))
    folder = WorklistFolder(files, ledger)
    folder.look()
    (files / "a.wl").unlink()
    (files / "b.wl").write_bytes(raw(worklist_item(2)))
    with pytest.raises(OutOfResources):
        folder.look()
    folder.look()
    assert steps(ledger) == ["S2"]


def test_dcmtk_makes_files_that_are_read(ledger: Ledger, files: Path, tmp_path: Path) -> None:
    dump = tmp_path / "item.dump"
    dump.write_text(
        "(0008,0005) CS [ISO_IR 100]\n(0010,0010) PN [Test^Case]\n(0020,000d) UI [1.2.3]\n(0040,0100) SQ\n"
        "(fffe,e000) -\n(0040,0001) AE [CT1]\n(0040,0002) DA 20261122\n(0040,0009) SH [SX]\n(fffe,e00d) -\n"
        "(fffe,e0dd) -\n")
    subprocess.run([dcmtk("dump2dcm"), "-q", "-g", dump, files / "a.wl"], check=True)
    subprocess.run([dcmtk("dump2dcm"), "-q", "-F", dump, files / "b.wl"], check=True)
    assert WorklistFolder(files, ledger).look() == 2 and steps(ledger) == ["SX"]


def test_the_keeper_follows_the_folder_and_prunes(ledger: Ledger, files: Path) -> None:
    today = datetime.now()
    for number, days in enumerate((0, 5, 20), 1):
        begins = {"ScheduledProcedureStepStartDate": f"{today - timedelta(days=days):%Y%m%d}"}
        (files / f"{number}.wl").write_bytes(raw(worklist_item(number, begins)))
    keeper = WorklistKeeper(ledger, WorklistFolder(files, ledger), poll_s=0.02, keep_days=10,
                            performed_keep_days=10)
    keeper.start()
    try:
        wait_for(lambda: steps(ledger) == ["S1", "S2"], "the past step to go")
        (files / "4.wl").write_bytes(raw(worklist_item(4)))
        wait_for(lambda: "S4" in steps(ledger), "the new step")
    finally:
        keeper.stop()


ITEM = raw(worklist_item(1))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(ITEM) - 1), st.integers(0, 255)), min_size=1, max_size=6),
       st.integers(0, len(ITEM)))
def test_whatever_a_file_holds_it_is_taken_or_refused(changes: list[tuple[int, int]], length: int) -> None:
    octets = bytearray(ITEM)
    for place, value in changes:
        octets[place] = value
    for content in (bytes(octets), bytes(octets[:length])):
        try:
            found = steps_of(jsonsets.from_file(content), "test")
        except (InvalidInput, TooLarge) as error:
            assert isinstance(error, MissError) and "Rossi" not in str(error)
        else:
            for step in found:
                written = encoded(step.attributes, IMPLICIT_LITTLE)
                assert jsonsets.from_octets(written, IMPLICIT_LITTLE)["00400100"]["Value"]
