"""Large objects whose sender was cut off: they go on where they were, over a restart and a crash too, and
what is kept of them stays within its bounds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from archive.archive import Archive, ArchiveSettings
from archive.errors import Corrupt, MissError, OutOfResources, Unavailable
from archive.packs.lanes import LANE_BYTES
from archive.packs.large import Suspended
from archive.partials import Kept, PartialKey, PartialLimits, surplus
from archive.reception import Reception
from tests.datasets import Instance, make_instance
from tests.federation.wards import stored_bytes

WARD = "san-martino/radiology"
LARGE = make_instance(rows=1500, columns=1500)
CUTS = (LANE_BYTES, LANE_BYTES + 1, 2 * LANE_BYTES - 5, 3 * LANE_BYTES + 12_345)


def key(instance: Instance = LARGE, ward: str = WARD) -> PartialKey:
    return PartialKey(ward, instance.sop_instance_uid, instance.digest)


def opened(state: Path, **changes: object) -> Archive:
    return Archive.open(replace(ArchiveSettings(state, free_bytes_min=1 << 20), **changes), outbox=False)  # type: ignore[arg-type]


def begin(archive: Archive, instance: Instance = LARGE, offset: int = 0) -> Reception:
    return archive.intake.begin(
        instance.head(), size_hint=len(instance.dataset), partial=key(instance), offset=offset
    )


def cut_at(archive: Archive, size: int, instance: Instance = LARGE) -> int:
    reception = begin(archive, instance)
    reception.write(instance.dataset[:size])
    return reception.suspend()


def go_on(archive: Archive, offset: int, instance: Instance = LARGE) -> None:
    reception = begin(archive, instance, offset)
    reception.write(instance.dataset[offset:])
    reception.commit(expected_digest=instance.digest).wait_durable()


def left_over(state: Path) -> list[str]:
    return [path.name for folder in ("large", "partial") for path in (state / folder).glob("*")
            if path.suffix != ".pack"]  # fmt: skip


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("memory", [True, False])
def test_an_object_goes_on_where_it_was_cut(tmp_path: Path, size: int, memory: bool) -> None:
    with opened(tmp_path, memory_budget_bytes=(64 << 20) if memory else 0) as archive:
        assert cut_at(archive, size) == size
        assert archive.intake.budget.taken_bytes == 0
        assert archive.intake.partials.have(key()) == size
        go_on(archive, size)
        archive.wait_indexed()
        assert stored_bytes(archive, LARGE) == LARGE.dataset
        assert archive.intake.partials.have(key()) == 0
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("size", [*CUTS, pytest.param(len(LARGE.dataset), id="all of it")])
def test_it_goes_on_after_a_restart(tmp_path: Path, size: int) -> None:
    with opened(tmp_path) as archive:
        cut_at(archive, size)
    with opened(tmp_path) as archive:
        assert archive.intake.partials.have(key()) == size
        go_on(archive, size)
        archive.wait_indexed()
        assert stored_bytes(archive, LARGE) == LARGE.dataset
    with opened(tmp_path) as archive:
        assert stored_bytes(archive, LARGE) == LARGE.dataset
    assert left_over(tmp_path) == []


def killed(state: Path, act: Callable[[Archive], object]) -> None:
    """Runs `act` in a process that ends without closing anything, as `kill -9` has it."""
    child = os.fork()
    if child == 0:
        try:
            act(opened(state))
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def test_it_goes_on_after_a_crash(tmp_path: Path) -> None:
    def receive(archive: Archive) -> None:
        begin(archive).write(LARGE.dataset[: 3 * LANE_BYTES])

    killed(tmp_path, receive)
    with opened(tmp_path) as archive:
        have = archive.intake.partials.have(key())
        assert LANE_BYTES <= have <= 3 * LANE_BYTES
        go_on(archive, have)
        archive.wait_indexed()
        assert stored_bytes(archive, LARGE) == LARGE.dataset


def test_what_the_crash_left_wrong_is_found_by_the_digest(tmp_path: Path) -> None:
    with opened(tmp_path) as archive:
        cut_at(archive, 2 * LANE_BYTES)
    (part,) = (tmp_path / "large").glob("*.part")
    with part.open("r+b") as file:
        file.seek(LANE_BYTES)
        file.write(b"?")
    with opened(tmp_path) as archive:
        with pytest.raises(Corrupt):
            go_on(archive, 2 * LANE_BYTES)
        assert archive.intake.partials.have(key()) == 0
    assert left_over(tmp_path) == []


def test_what_was_referred_to_before_the_crash_is_stored(tmp_path: Path) -> None:
    """The pack has its first name still and a note beside it: the reference alone counts."""

    def store(archive: Archive) -> None:
        have = cut_at(archive, 2 * LANE_BYTES)
        go_on(archive, have)

    killed(tmp_path, store)
    (pack,) = (tmp_path / "large").glob("*.pack")
    pack.rename(pack.with_suffix(".part"))
    with opened(tmp_path) as archive:
        archive.wait_indexed()
        assert stored_bytes(archive, LARGE) == LARGE.dataset
    assert left_over(tmp_path) == []


def test_nobody_goes_on_with_anothers_object(tmp_path: Path) -> None:
    with opened(tmp_path) as archive:
        cut_at(archive, 2 * LANE_BYTES)
        assert archive.intake.partials.have(key(ward="galliera/ct")) == 0
        with pytest.raises(Unavailable):
            begin(archive, offset=LANE_BYTES)
        other = make_instance(rows=1500, columns=1500)
        with pytest.raises(Corrupt):
            archive.intake.begin(
                other.head(), size_hint=len(other.dataset), partial=key(), offset=2 * LANE_BYTES
            )
    assert left_over(tmp_path) == []


def test_an_object_that_begins_anew_replaces_what_was_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as archive:
        cut_at(archive, 2 * LANE_BYTES)
        assert cut_at(archive, 3 * LANE_BYTES) == 3 * LANE_BYTES
        assert len(archive.intake.partials) == 1
        assert len(left_over(tmp_path)) == 2


def test_little_is_not_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as archive:
        assert cut_at(archive, LANE_BYTES - 1) == 0
    assert left_over(tmp_path) == []


def test_what_is_kept_gives_way_to_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as archive:
        cut_at(archive, 2 * LANE_BYTES)
        free = iter([0, 100 << 20])
        monkeypatch.setattr(archive._storage, "free_bytes", lambda: next(free, 100 << 20))
        archive.intake._free_asked_s = -1.0
        archive.intake.begin(make_instance().head()).abort()
        assert len(archive.intake.partials) == 0
        monkeypatch.setattr(archive._storage, "free_bytes", lambda: 0)
        archive.intake._free_asked_s = -1.0
        with pytest.raises(OutOfResources):
            archive.intake.begin(make_instance().head())
    assert left_over(tmp_path) == []


def test_what_is_kept_is_bounded_on_disk(tmp_path: Path) -> None:
    with opened(tmp_path, partial_ward_bytes_max=5 * LANE_BYTES) as archive:
        many = [make_instance(rows=1500, columns=1500) for _ in range(4)]
        for one in many:
            cut_at(archive, 2 * LANE_BYTES, one)
        assert [archive.intake.partials.have(key(one)) > 0 for one in many] == [False, False, True, True]
        assert len(left_over(tmp_path)) == 4


def kept(number: int, ward: str = "w", size: int = 10, at_s: float = 0.0) -> Kept:
    pack = f"large/{number}.pack"
    return Kept(
        PartialKey(ward, str(number), b""), pack, size, int(at_s * 1e6), Suspended(pack, size, None)
    )


@pytest.mark.parametrize(
    ("limits", "gone"),
    [
        (PartialLimits(), []),
        (PartialLimits(objects_max=2), [1]),
        (PartialLimits(ward_objects_max=1), [1]),
        (PartialLimits(bytes_max=25), [1]),
        (PartialLimits(ward_bytes_max=15), [1]),
        (PartialLimits(age_s_max=7.5), [1, 2]),
    ],
)
def test_the_oldest_go_first(limits: PartialLimits, gone: list[int]) -> None:
    found = [kept(1, "w", at_s=1), kept(2, "v", at_s=2), kept(3, "w", at_s=3)]
    assert sorted(int(one.key.uid) for one in surplus(found, limits, 10_000_000)) == gone


def test_a_note_that_can_not_be_read_is_no_note(tmp_path: Path) -> None:
    with opened(tmp_path) as archive:
        cut_at(archive, 2 * LANE_BYTES)
    (note,) = (tmp_path / "partial").glob("*")
    note.write_text("{")
    try:
        with opened(tmp_path) as archive:
            assert len(archive.intake.partials) == 0
    except MissError:
        pytest.fail("it opens all the same")
    assert left_over(tmp_path) == []
    assert [path.suffix for path in (tmp_path / "set-aside").glob("*")] == [".part"]
