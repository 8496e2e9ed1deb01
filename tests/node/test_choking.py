"""Peers that mean to choke the node, or only behave as if: it is a process of its own here, weighed and
looked at from outside, and an honest sender beside them must not notice."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from archive.archive import Archive, ArchiveSettings
from node.dimse import messages, pdu
from node.dimse.association import Limits
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import ECHO_CONTEXT, Requestor, echo
from tests.datasets import CT, DEFLATED, EXPLICIT, Instance, make_instance
from tests.forked import PATIENT, Forked, forked
from tests.node.serving import Raw, data, echo_request
from tests.node.storing import store
from tests.waiting import wait_for

STORE_CONTEXT = ProposedContext(1, CT, (EXPLICIT,))
MB = 1 << 20


@contextmanager
def associated(node: Forked) -> Iterator[Requestor]:
    with Requestor.connect(node.peer, "CT1", [STORE_CONTEXT], limits=PATIENT) as requestor:
        yield requestor


def store_request() -> pdu.AssociateRequest:
    return pdu.AssociateRequest("MISS", "CT1", (STORE_CONTEXT,), 16384)


def together(work: Callable[[int], None], count: int) -> None:
    """`work(0)` to `work(count - 1)` at once; the first failure is the test's."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def held(folder: Path) -> Archive:
    """The archive of a node that has ended."""
    return Archive.open(ArchiveSettings(state=folder / "state", free_bytes_min=0), outbox=True)


def check_held(folder: Path, instances: list[Instance]) -> None:
    with held(folder) as archive:
        assert archive.index.totals().instances == len(instances)
        for instance in instances:
            (found,) = archive.instances(instance.study_uid, None, instance.sop_instance_uid)
            assert found.digest == hashlib.sha256(instance.dataset).digest()
            archive.verify(found)


def threads_of(node: Forked) -> int:
    return psutil.Process(node.pid).num_threads()


@contextmanager
def weighed(node: Forked) -> Iterator[Callable[[], int]]:
    """By how much the node's memory has grown at its most, from when it had answered an echo."""
    assert echo(node.peer, "CT1") == 0
    seen = [node.rss]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            seen.append(node.rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(seen) - seen[0]
    finally:
        stop.set()
        watcher.join()


# ---------------------------------------------------------------- connections


def test_silent_slow_and_foreign_connections_at_once(tmp_path: Path) -> None:
    """33, 35, 46: 200 silent ones, 20 that say one octet at a time, 20 that speak HTTP. An echo is answered
    within a second, and after ARTIM none of them is left."""
    request = pdu.encode_request(echo_request())
    with forked(tmp_path, limits=Limits(artim_s=2.5)) as node, ExitStack() as sockets:
        before = threads_of(node)
        silent = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(200)]
        slow = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(20)]
        foreign = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(20)]
        for sock in silent + slow + foreign:
            sockets.callback(sock.close)
        for sock in foreign:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: miss\r\n\r\n")
        started = time.monotonic()
        for number in range(20):
            for sock in slow:
                sock.sendall(request[number : number + 1])
            asked = time.monotonic()
            assert echo(node.peer, "CT1") == 0
            assert time.monotonic() - asked < 1.0
        assert time.monotonic() - started < 2.5, "the connections were no longer there"
        for sock in silent + slow + foreign:
            sock.settimeout(10)
            with suppress(ConnectionResetError):
                while sock.recv(1000):
                    pass
        wait_for(lambda: threads_of(node) <= before + 1, "no thread left behind")
        node.check_no_surprise()


def test_associations_that_stop_inside_a_message_are_ended(tmp_path: Path) -> None:
    """After one octet of a PDU, inside a command, inside a data set: beside 70 of them others are served,
    each is aborted when its time is up, and what it held is let go."""
    instance, other = make_instance(padding=300_000), make_instance(number=2)
    command = data(1, 3, messages.store_request(1, CT, instance.sop_instance_uid))
    whole = data(1, 2, instance.dataset)
    stops = (b"\4", command[:3], command[:30], command, command + whole[:1], command + whole[:9],
             command + whole[:200_000])
    limits = Limits(message_timeout_s=2.0, idle_timeout_s=2.0)
    with forked(tmp_path, limits=limits, small_object_bytes_max=100_000) as node, ExitStack() as raws:
        before = threads_of(node)
        stuck = []
        for number in range(70):
            raw = raws.enter_context(Raw(node.port))
            raw.associate(store_request())
            raw.send(stops[number % len(stops)])
            stuck.append(raw)
        asked = time.monotonic()
        assert echo(node.peer, "CT1") == 0
        assert time.monotonic() - asked < 1.0
        with associated(node) as requestor:
            assert store(requestor, other) == 0
        for raw in stuck:
            assert raw.receive()[0] == pdu.PduType.ABORT
        for raw in stuck:
            raw.sock.close()
        # What writes large objects and zeros stays.
        wait_for(lambda: threads_of(node) <= before + 6, "no thread left behind")
        wait_for(lambda: not list((tmp_path / "state").glob("large/*")), "nothing of it stays")
        node.check_no_surprise()
    check_held(tmp_path, [other])


def test_a_huge_length_before_association_costs_nothing(tmp_path: Path) -> None:
    """36: PDU length FFFFFFF0, then 200 MiB."""
    with forked(tmp_path) as node, weighed(node) as growth:
        with Raw(node.port) as raw, pytest.raises(OSError):
            raw.send(struct.pack(">BxI", 1, 0xFFFFFFF0))
            for _ in range(200):
                raw.send(bytes(MB))
        assert growth() < 16 * MB
        assert echo(node.peer, "CT1") == 0


def test_a_data_set_without_an_end_is_cut_at_the_object_bound(tmp_path: Path) -> None:
    """37: nothing of it stays, in memory or on disk."""
    instance = make_instance()
    with forked(tmp_path, limits=Limits(object_bytes_max=8 * MB)) as node, weighed(node) as growth:
        with Raw(node.port) as raw:
            raw.associate(store_request())
            raw.send(data(1, 3, messages.store_request(1, CT, instance.sop_instance_uid)))
            with pytest.raises(OSError):
                for _ in range(200):
                    raw.send(data(1, 0, bytes(200_000)))
                raise AssertionError("40 MB were taken")
        assert growth() < 24 * MB
        wait_for(lambda: not list((tmp_path / "state").glob("large/*")), "nothing of it stays")
        assert not list((tmp_path / "state").glob("set-aside/*"))
        node.check_no_surprise()
    check_held(tmp_path, [])


@pytest.mark.parametrize("padding", [9_000, 150_000])
@pytest.mark.parametrize("politely", [True, False])
def test_a_connection_cut_anywhere_leaves_nothing(tmp_path: Path, padding: int, politely: bool) -> None:
    """43: at 100 offsets of one C-STORE, by FIN and by RST; gathered in memory, and in a pack of its own."""
    instance = make_instance(padding=padding)
    conversation = data(1, 3, messages.store_request(1, CT, instance.sop_instance_uid))
    step = max(len(instance.dataset) // 10, 1)
    conversation += b"".join(data(1, 0, instance.dataset[at : at + step])
                             for at in range(0, len(instance.dataset), step)) + data(1, 2, b"")
    with forked(tmp_path, small_object_bytes_max=16 << 10) as node:
        before = threads_of(node)
        for offset in range(1, len(conversation), len(conversation) // 100):
            with Raw(node.port) as raw:
                raw.associate(store_request())
                raw.send(conversation[:offset])
                if not politely:
                    raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_for(lambda: threads_of(node) <= before + 1, "every connection is over", 20)
        wait_for(lambda: not list((tmp_path / "state").glob("large/*")), "nothing of it stays")
        assert not list((tmp_path / "state").glob("set-aside/*"))
        with associated(node) as requestor:
            assert store(requestor, instance) == 0
        node.check_no_surprise()
    check_held(tmp_path, [instance])


def test_headers_that_are_hard_to_read_hold_up_nobody_else(tmp_path: Path) -> None:
    """Some kilobytes that inflate to half a million elements, again and again over eight associations, cost
    their own senders' time: another association goes on being served."""
    instance, bomb = make_instance(), make_instance(number=2, transfer_syntax=DEFLATED)
    deflate = zlib.compressobj(wbits=-15)
    crumbs = deflate.compress(struct.pack("<HH2sH", 0x0010, 0x4000, b"LT", 0) * 500_000) + deflate.flush()
    over = threading.Event()
    hard = ProposedContext(1, CT, (DEFLATED,))

    def hostile(number: int) -> None:
        with Requestor.connect(node.peer, "CT1", [hard], limits=PATIENT) as requestor:
            context = requestor.context(CT, DEFLATED)
            assert context is not None
            while not over.is_set():
                assert requestor.store(context, bomb.sop_instance_uid, [crumbs]) == 0xA700

    with forked(tmp_path) as node:
        contexts = [ECHO_CONTEXT, ProposedContext(3, CT, (EXPLICIT,))]
        with Requestor.connect(node.peer, "CT1", contexts, limits=PATIENT) as honest:
            assert store(honest, instance) == 0
            attack = threading.Thread(target=together, args=(hostile, 8))
            attack.start()
            try:
                slowest = 0.0
                for _ in range(6):
                    time.sleep(0.1)  # it pauses, as a modality does
                    asked = time.monotonic()
                    assert honest.echo() == 0
                    slowest = max(slowest, time.monotonic() - asked)
            finally:
                over.set()
                attack.join()
        assert slowest < 2.0, f"{slowest:.2f} s"
        node.check_no_surprise()


# ---------------------------------------------------------------- memory


def test_the_byte_budget_is_shared_and_the_rest_goes_to_disk(tmp_path: Path) -> None:
    """64 associations, each with 0.9 MB under way, dripping: what is past the budget is on disk, and every
    one is stored."""
    instances = [make_instance(number=n, padding=900_000) for n in range(64)]
    with forked(tmp_path, memory_budget_bytes=8 * MB) as node, weighed(node) as growth:
        barrier = threading.Barrier(len(instances))

        def drip(number: int) -> None:
            dataset = instances[number].dataset

            def chunks() -> Iterator[bytes]:
                for at in range(0, 800_000, 100_000):
                    yield dataset[at : at + 100_000]
                barrier.wait(60)  # everybody holds the most at once
                yield dataset[800_000:]

            try:
                with associated(node) as requestor:
                    assert store(requestor, instances[number], chunks()) == 0  # type: ignore[arg-type]
            except BaseException:
                barrier.abort()
                raise

        together(drip, len(instances))
        # The budget, a receive buffer for each, its thread; all of it in memory would be 58 MB beside those.
        assert growth() < (8 + 64 * 0.5 + 8) * MB, f"{growth() / MB:.0f} MB"
        node.check_no_surprise()
    check_held(tmp_path, instances)


def test_ten_large_objects_at_once_pass_with_flat_memory(tmp_path: Path) -> None:
    size, senders = 24 * MB, 10
    block = random.Random(1).randbytes(MB)
    heads = [make_instance(number=n, rows=0) for n in range(senders)]
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, size)
    with forked(tmp_path) as node, weighed(node) as growth:

        def send(number: int) -> None:
            def chunks() -> Iterator[bytes]:
                yield heads[number].dataset + pixels
                for _ in range(size // MB):
                    yield block

            with associated(node) as requestor:
                assert store(requestor, heads[number], chunks()) == 0  # type: ignore[arg-type]

        together(send, senders)
        assert growth() < 48 * MB, f"{growth() / MB:.0f} MB"
        node.check_no_surprise()
    with held(tmp_path) as archive:
        for head in heads:
            (found,) = archive.instances(head.study_uid)
            assert found.digest == hashlib.sha256(head.dataset + pixels + block * (size // MB)).digest()
