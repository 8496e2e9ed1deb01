"""Rejection notes as DCMTK's storescu sends them to a node: what they name is found and given to nobody from
the answer on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.model import Level, Query
from archive.removing import Removing
from tests.datasets import CT, Instance, make_instance
from tests.node.serving import AE_TITLE
from tests.node.storing import Storing, storing
from tests.peers import dcmtk
from tests.rejections import note_about

STUDY = "1.2.826.7.1"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


def images(count: int) -> list[Instance]:
    return [make_instance(study_uid=STUDY, series_uid=f"{STUDY}.1", sop_uid=f"{STUDY}.1.{n}", number=n)
            for n in range(1, count + 1)]  # fmt: skip


def storescu(served: Storing, folder: Path, *instances: Instance) -> None:
    paths = []
    for number, one in enumerate(instances):
        path = folder / f"{one.sop_instance_uid}.{number}.dcm"
        path.write_bytes(one.part10)
        paths.append(str(path))
    command = [dcmtk("storescu"), "-aet", "CT1", "-aec", AE_TITLE, "127.0.0.1", str(served.port), *paths]
    subprocess.run(command, check=True, timeout=60, capture_output=True)


def findscu(served: Storing) -> str:
    """The SOP Instance UIDs that a device finds in the series."""
    command = [dcmtk("findscu"), "-S", "-aet", "CT1", "-aec", AE_TITLE, "-k", "QueryRetrieveLevel=IMAGE",
               "-k", f"StudyInstanceUID={STUDY}", "-k", f"SeriesInstanceUID={STUDY}.1", "-k",
               "SOPInstanceUID", "127.0.0.1", str(served.port)]  # fmt: skip
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    return done.stdout + done.stderr


def getscu(served: Storing, folder: Path) -> set[str]:
    """The instances that a device gets of the study."""
    folder.mkdir(exist_ok=True)
    command = [dcmtk("getscu"), "-S", "-aet", "CT1", "-aec", AE_TITLE, "-od", str(folder), "-k",
               "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY}", "127.0.0.1",
               str(served.port)]  # fmt: skip
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    return {path.name.partition(".")[2] for path in folder.iterdir()}


def shown(archive: Archive) -> list[str]:
    return sorted(one.instance["SOPInstanceUID"] for one in archive.search(Query(Level.IMAGE)))


@pytest.mark.parametrize("title", ["113001", "113037", "113038"])
def test_what_a_note_rejects_is_found_and_given_to_nobody(
    served: Storing, tmp_path: Path, title: str
) -> None:
    one, two, three = images(3)
    storescu(served, tmp_path, one, two, three)
    assert f"[{two.sop_instance_uid}" in findscu(served)
    note = note_about([one, two], title)
    storescu(served, tmp_path, note)
    found = findscu(served)
    assert f"[{one.sop_instance_uid}" not in found and f"[{two.sop_instance_uid}" not in found
    assert f"[{three.sop_instance_uid}" in found
    given = getscu(served, tmp_path / "got")
    assert three.sop_instance_uid in given
    assert not {one.sop_instance_uid, two.sop_instance_uid} & given
    storescu(served, tmp_path, one, two)  # answered as stored, as before
    assert f"[{one.sop_instance_uid}" not in findscu(served)
    assert served.archive.index.standings([one.sop_instance_uid]) == {}, "and nobody is told it is safe"
    (order,) = {t.removal.order for t in served.archive.index.removals()}
    Removing(served.archive, "").undo({"id": order}, "anna")
    assert f"[{one.sop_instance_uid}" in findscu(served)


def test_an_ordinary_selection_of_key_images_rejects_nothing(served: Storing, tmp_path: Path) -> None:
    one, two = images(2)
    storescu(served, tmp_path, one, two, note_about([one], "113000"))
    assert {one.sop_instance_uid, two.sop_instance_uid} < set(shown(served.archive))
    assert not served.archive.index.has_removals()


def test_a_note_with_a_broken_reference_is_kept_and_not_obeyed(served: Storing, tmp_path: Path) -> None:
    one, two = images(2)
    bad = make_instance(sop_class=CT, sop_uid="1.2.3")
    note = note_about([one, bad], "113037")
    broken = replace(note, dataset=note.dataset.replace(b"1.2.3\0", b"x.y.z\0"))
    assert broken.dataset != note.dataset
    assert served.send(one, two, broken) == [0, 0, 0]
    assert {one.sop_instance_uid, two.sop_instance_uid} < set(shown(served.archive))
