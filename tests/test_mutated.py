"""Mutated PDUs and data sets, by the thousand: no crash, no hang, flat memory, and no error of a kind that
nobody foresaw. `MISS_MUTATIONS=100000` runs that many, `MISS_MUTATIONS_FROM=n` from case n on: one that
failed is run again by its number."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from archive.archive import Archive
from archive.dataset import dicomjson, frames
from archive.errors import MissError
from archive.model import Outcome
from node.dimse.association import Limits
from node.dimse.requestor import echo
from tests.archive.archives import settings_for
from tests.forked import Forked, forked
from tests.mutating import Mutant, conversation, mutant
from tests.waiting import wait_for

COUNT = int(os.environ.get("MISS_MUTATIONS", "1500")) // 2
FIRST = int(os.environ.get("MISS_MUTATIONS_FROM", "0"))
TIMEOUT_S = 120 + COUNT // 20
SENDERS = 4
ANSWER_S_MAX = 20.0
CPU_S_MAX = 2.0           # of one data set: a hundred times what the worst takes
GROWTH_BYTES_MAX = 48 << 20
WARM_UP = 200
LATE_THREADS = 6       # read-ahead and pools begin theirs when they are first needed: three are seen
LATE_DESCRIPTORS = 12  # in the second half: by then each thread has its views of ledger and index


def converse(node: Forked, number: int) -> None:
    """Say it, then nothing more; the node must end the connection."""
    with socket.create_connection(("127.0.0.1", node.port), ANSWER_S_MAX) as sock:
        try:
            first, then = conversation(number)
            sock.sendall(first)
            if then and sock.recv(65536):
                sock.sendall(then)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass  # it was shown the door while it spoke
        except TimeoutError:
            raise AssertionError(f"conversation {number} is never ended") from None


def converse_all(node: Forked, numbers: range) -> None:
    failures: list[BaseException] = []

    def run(share: range) -> None:
        try:
            for number in share:
                converse(node, number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(numbers[n::SENDERS],)) for n in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.timeout(TIMEOUT_S)
def test_mutated_conversations(tmp_path: Path) -> None:
    limits = Limits(artim_s=1.0, idle_timeout_s=1.0, message_timeout_s=1.0)
    with forked(tmp_path, limits=limits, private=True, all_services=True, pack_bytes_max=16 << 20) as node:
        watched = psutil.Process(node.pid)
        threads = watched.num_threads()
        warm = min(WARM_UP, COUNT)
        converse_all(node, range(FIRST, FIRST + warm))
        before, half = node.rss, max(warm, COUNT // 2)
        converse_all(node, range(FIRST + warm, FIRST + half))
        descriptors = watched.num_fds()
        converse_all(node, range(FIRST + half, FIRST + COUNT))
        assert echo(node.peer, "CT1") == 0
        assert node.rss - before < GROWTH_BYTES_MAX, f"grown by {node.rss - before >> 20} MB"
        wait_for(lambda: watched.num_threads() < threads + LATE_THREADS, "no thread left behind")
        wait_for(lambda: watched.num_fds() < descriptors + LATE_DESCRIPTORS, "no descriptor left behind")
        node.check_no_surprise()


@pytest.mark.timeout(TIMEOUT_S)
def test_mutated_data_sets(tmp_path: Path) -> None:
    process = psutil.Process()
    before = 0
    taken = 0
    with Archive.open(settings_for(tmp_path / "state", pack_bytes_max=16 << 20), outbox=True) as archive:
        for number in range(FIRST, FIRST + COUNT):
            if number == FIRST + WARM_UP:
                before = process.memory_info().rss
            case = mutant(number)
            started = time.thread_time()
            try:
                taken += take(archive, case, read_back=number % 5 == 0) is not None
            except Exception as error:
                raise AssertionError(f"data set {number}") from error
            assert time.thread_time() - started < CPU_S_MAX, f"data set {number} costs too much"
        archive.wait_indexed(60)
        assert archive.intake.budget.taken_bytes == 0
        assert archive.packs.storage.list("large") == []
        assert archive.index.totals().instances > 0
        if before:
            growth = process.memory_info().rss - before
            assert growth < GROWTH_BYTES_MAX, f"grown by {growth >> 20} MB"
    assert taken > COUNT // 10  # it is not all garbage


def take(archive: Archive, case: Mutant, *, read_back: bool) -> Outcome | None:
    """Take a mutant in, and read back what readers of images read; None when it was refused."""
    head = case.instance.head()
    reception = archive.intake.begin(head)
    try:
        for start in range(0, len(case.dataset), 16 << 10):
            reception.write(memoryview(case.dataset)[start : start + (16 << 10)])
        ticket = reception.commit()
    except MissError:
        return None
    if not read_back or ticket._written is None:
        return ticket.outcome
    ticket.wait_durable()
    with archive.open_payload(ticket._written.record.location) as payload:
        with suppress(MissError):
            json.dumps(dicomjson.metadata(payload, bulk_uri="/".join), allow_nan=False)
        with suppress(MissError):
            frames.read(payload, [1])
    return ticket.outcome
