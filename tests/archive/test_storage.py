"""Storage in files: whole writes, reads at offsets, names that can't leave the folder, handles that outlive
names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from archive.errors import NotFound
from archive.packs.storage import FileStorage


@pytest.fixture
def storage(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path)


def test_what_is_written_is_read_back(storage: FileStorage) -> None:
    file = storage.create("packs/00000001.pack")
    file.pwritev([b"abc", memoryview(b"defg"), bytearray(b"hi")], 10)
    file.fdatasync()
    storage.sync_directory("packs")
    assert file.size() == 19
    assert storage.reader("packs/00000001.pack").read(10, 100) == b"abcdefghi"
    assert bytes(file.map()) == bytes(10) + b"abcdefghi"
    file.truncate(12)
    assert storage.size("packs/00000001.pack") == 12


def test_a_folder_that_another_life_made_is_synced_by_the_next(
    storage: FileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("archive.packs.storage._sync_directory", synced.append)
    (tmp_path / "packs").mkdir()  # and killed before it could sync what holds it
    storage.create("packs/00000001.pack")
    assert synced == [tmp_path]
    storage.create("packs/00000002.pack")
    assert synced == [tmp_path]
    storage.rename("packs/00000002.pack", "set-aside/2.cut")
    assert synced == [tmp_path, tmp_path]
    (tmp_path / "set-aside/2.cut").unlink()
    (tmp_path / "set-aside").rmdir()
    storage.create("set-aside/3.cut")


def test_more_views_than_one_system_call_takes_are_written_whole(storage: FileStorage) -> None:
    file = storage.create("packs/00000001.pack")
    views = [bytes([number % 256]) * 3 for number in range(2000)]
    file.pwritev(views, 5)
    assert file.read(5, 6000) == b"".join(views)


def test_a_short_write_goes_on_from_where_it_stopped(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = storage.create("packs/00000001.pack")

    def short(fd: int, views: Sequence[bytes], offset: int) -> int:
        return os.pwrite(fd, b"".join(views)[:4], offset)

    monkeypatch.setattr(os, "pwritev", short)
    file.pwritev([b"abc", b"defg", b"hi"], 0)
    assert file.read(0, 100) == b"abcdefghi"


@pytest.mark.parametrize(
    "name",
    ["../x.pack", "packs/../../x.pack", "/etc/passwd", "packs/a/b.pack", "packs/.hidden", "packs",
    "packs/x\n.pack", "packs/..", "", "PACKS/1.pack", "packs/1.pack\0"],
)  # fmt: skip
def test_no_name_leaves_the_folder(storage: FileStorage, name: str) -> None:
    for attempt in (storage.create, storage.open, storage.reader, storage.size, storage.delete):
        with pytest.raises(NotFound):
            attempt(name)


def test_an_object_is_made_once(storage: FileStorage) -> None:
    storage.create("packs/00000001.pack")
    with pytest.raises(FileExistsError):
        storage.create("packs/00000001.pack")


def test_a_reader_outlives_a_rename_and_a_deletion(storage: FileStorage) -> None:
    file = storage.create("large/00ff.part")
    file.pwritev([b"abc"], 0)
    held = storage.reader("large/00ff.part")
    storage.rename("large/00ff.part", "large/00ff.pack")
    assert storage.reader("large/00ff.pack").read(0, 3) == b"abc"
    storage.delete("large/00ff.pack")
    assert held.read(0, 3) == b"abc"
    with pytest.raises(FileNotFoundError):
        storage.reader("large/00ff.pack")


def test_the_list_is_sorted_and_leaves_strangers_out(storage: FileStorage, tmp_path: Path) -> None:
    for number in (3, 1, 2):
        storage.create(f"packs/0000000{number}.pack")
    (tmp_path / "packs" / "Strange File").write_bytes(b"")
    assert storage.list("packs") == [f"packs/0000000{number}.pack" for number in (1, 2, 3)]
    assert storage.list("nothing") == []


def test_handles_do_not_pile_up(storage: FileStorage) -> None:
    for number in range(300):
        storage.create(f"packs/{number:08d}.pack").close()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(300):
        storage.reader(f"packs/{number:08d}.pack")
    assert len(os.listdir("/proc/self/fd")) - before <= 130
    storage.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 2
