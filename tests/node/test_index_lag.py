"""The index is locked by another process: intake goes on to its bound, then slows down and refuses with A700
while the association lives, and goes on by itself when the lock is gone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from node.dimse.pdu import ProposedContext
from node.dimse.requestor import ECHO_CONTEXT, Requestor
from tests.datasets import CT, EXPLICIT, Instance, make_instance
from tests.node.storing import Storing, store, storing
from tests.waiting import wait_for

LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(database: Path) -> Iterator[None]:
    holder = subprocess.Popen([sys.executable, "-c", LOCK, str(database)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"locked\n"
        yield
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()


@contextmanager
def associated(served: Storing) -> Iterator[Requestor]:
    contexts = [ECHO_CONTEXT, ProposedContext(3, CT, (EXPLICIT,))]
    with Requestor.connect(served.peer, "CT1", contexts) as requestor:
        yield requestor


def check_all_found(served: Storing, instances: list[Instance]) -> None:
    assert served.totals().instances == len(instances)
    for instance in instances:
        (found,) = served.stored(instance)
        assert served.dataset(found) == instance.dataset


def test_past_its_lag_in_records_intake_refuses_and_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archive.intake._ROOM_WAIT_S", 0.3)
    bound = 30
    with storing(tmp_path, index_lag_records_max=bound) as served, associated(served) as requestor:
        kept = [make_instance()]
        assert store(requestor, kept[0]) == 0
        served.archive.wait_indexed()
        with locked(tmp_path / "state/index.db"):
            refusals = 0
            while refusals < 3:
                instance = make_instance(number=len(kept))
                started = time.monotonic()
                status = store(requestor, instance)
                if status == 0:
                    kept.append(instance)
                    assert len(kept) <= 1 + bound + 1
                else:
                    assert status == 0xA700
                    assert time.monotonic() - started > 0.25  # slowed down before it is refused
                    refusals += 1
            assert len(kept) >= bound
            assert store(requestor, kept[3]) == 0xA700  # what is held is not asked for its duplicate either
            assert requestor.echo() == 0
        late = make_instance(number=1000)
        wait_for(lambda: store(requestor, late) == 0, "intake goes on by itself")
        check_all_found(served, [*kept, late])


def test_past_its_lag_in_time_intake_refuses_and_goes_on_by_itself(tmp_path: Path) -> None:
    with storing(tmp_path, index_lag_s_max=0.5) as served, associated(served) as requestor:
        kept = [make_instance()]
        assert store(requestor, kept[0]) == 0
        served.archive.wait_indexed()
        with locked(tmp_path / "state/index.db"):
            started = time.monotonic()
            while True:
                instance = make_instance(number=len(kept))
                status = store(requestor, instance)
                if status:
                    break
                kept.append(instance)
                assert time.monotonic() - started < 5
            assert status == 0xA700
            assert len(kept) > 2
        late = make_instance(number=1000)
        wait_for(lambda: store(requestor, late) == 0, "intake goes on by itself")
        check_all_found(served, [*kept, late])


def test_a_sender_is_only_slowed_down_when_the_lock_is_short(tmp_path: Path) -> None:
    with storing(tmp_path, index_lag_records_max=10) as served, associated(served) as requestor:
        kept = [make_instance(number=n) for n in range(40)]
        assert store(requestor, kept[0]) == 0
        slowest = 0.0
        with ExitStack() as lock:
            lock.enter_context(locked(tmp_path / "state/index.db"))
            opening = threading.Timer(0.6, lock.pop_all().close)
            opening.start()
            for instance in kept[1:]:
                started = time.monotonic()
                assert store(requestor, instance) == 0
                slowest = max(slowest, time.monotonic() - started)
            opening.join()
        assert slowest > 0.2
        check_all_found(served, kept)
