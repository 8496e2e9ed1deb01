"""Associations between two messages: they cost no thread, whatever the pieces in which the next message
comes, and whoever keeps it waiting waits alone."""

from __future__ import annotations

import errno
import select
import socket
import sqlite3
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from archive.errors import SyncFailed
from archive.ledger import Device
from node.dimse import messages, pdu
from node.dimse import status as codes
from node.dimse.association import Context
from node.dimse.contexts import EXPLICIT_LITTLE, STUDY_ROOT_FIND, VERIFICATION, ServiceName
from node.dimse.exchange import Exchange, Service
from node.dimse.messages import Command, Field
from node.dimse.pdu import AbortSource, AssociateRequest, PduType, ProposedContext
from node.dimse.pump import MESSAGES_MAX, PARTIAL_BYTES_MAX
from node.dimse.services.echo import Echo
from node.dimse.wire import QUIET_BUFFER_BYTES
from tests.datasets import CT, Instance, make_instance
from tests.node.serving import AE_TITLE, QUICK, Raw, data, serving
from tests.node.storing import Storing, storing
from tests.waiting import wait_for

COMMAND, LAST = pdu.COMMAND_FRAGMENT, pdu.LAST_FRAGMENT
REQUEST = AssociateRequest(AE_TITLE, "CT1", (
    ProposedContext(1, CT, (EXPLICIT_LITTLE,)),
    ProposedContext(3, VERIFICATION, (EXPLICIT_LITTLE,)),
    ProposedContext(5, STUDY_ROOT_FIND, (EXPLICIT_LITTLE,)),
), 16384)
ECHO = data(3, COMMAND | LAST, messages.echo_request(7))


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as served:
        yield served


def store_octets(instance: Instance, message_id: int = 1, fragment_bytes: int = 16_000) -> bytes:
    command = messages.store_request(message_id, instance.sop_class_uid, instance.sop_instance_uid)
    octets = data(1, COMMAND | LAST, command)
    for at in range(0, len(instance.dataset), fragment_bytes):
        piece = instance.dataset[at:at + fragment_bytes]
        octets += data(1, LAST if at + fragment_bytes >= len(instance.dataset) else 0, piece)
    return octets


def status(raw: Raw) -> int:
    kind, body = raw.receive()
    assert kind == PduType.P_DATA_TF, kind
    return messages.parse(body[6:]).status


def dimse_threads() -> int:
    return sum(thread.name == "dimse" for thread in threading.enumerate())


def test_idle_associations_have_no_thread(stores: Storing) -> None:
    with ExitStack() as open_ones:
        raws = [open_ones.enter_context(Raw(stores.port)) for _ in range(40)]
        for raw in raws:
            raw.associate(REQUEST)
        wait_for(lambda: dimse_threads() == 0, "the threads of idle associations")
        for raw in raws:
            raw.send(ECHO)
        assert [status(raw) for raw in raws] == [0] * 40
        for number, raw in enumerate(raws):
            raw.send(store_octets(make_instance(number=number)))
        assert [status(raw) for raw in raws] == [0] * 40
        wait_for(lambda: dimse_threads() == 0, "the threads after small messages")
    assert stores.totals().instances == 40


@pytest.mark.parametrize("pieces", [1, 7, 6000])
def test_a_message_may_come_in_any_pieces(stores: Storing, pieces: int) -> None:
    instance = make_instance(number=1, rows=20, columns=20)
    octets = store_octets(instance, fragment_bytes=300)
    with Raw(stores.port) as raw:
        raw.associate(REQUEST)
        step = max(len(octets) // pieces, 1)
        for at in range(0, len(octets), step):
            raw.send(octets[at:at + step])
        assert status(raw) == 0
    [stored] = stores.stored(instance)
    assert stores.dataset(stored) == instance.dataset


def test_small_and_large_messages_take_turns(stores: Storing) -> None:
    """A message that does not fit goes to a thread, and the association comes back."""
    with Raw(stores.port) as raw:
        raw.associate(REQUEST)
        side = int(PARTIAL_BYTES_MAX ** 0.5)
        for number in range(6):
            large = number % 2 == 1
            edge = side if large else 8
            raw.send(store_octets(make_instance(number=number, rows=edge, columns=edge)))
            assert status(raw) == 0
            raw.send(ECHO)
            assert status(raw) == 0
        wait_for(lambda: dimse_threads() == 0, "the thread of the large messages")
    assert stores.totals().instances == 6


def test_several_messages_at_once_are_answered_in_order(stores: Storing) -> None:
    instances = [make_instance(number=number) for number in range(5)]
    octets = b"".join(store_octets(each, number + 1) for number, each in enumerate(instances)) + ECHO
    with Raw(stores.port) as raw:
        raw.associate(REQUEST)
        raw.send(octets)
        answered = [messages.parse(raw.receive()[1][6:]) for _ in range(6)]
    assert [each.short(messages.MESSAGE_ID_RESPONDED_TO, -1) for each in answered] == [1, 2, 3, 4, 5, 7]
    assert {each.status for each in answered} == {0}
    assert stores.totals().instances == 5


def test_more_messages_than_a_round_serves_are_answered_all_the_same(stores: Storing) -> None:
    """They lie in the buffer, and nothing more comes that would show at the descriptor."""
    count = 3 * MESSAGES_MAX + 5
    with Raw(stores.port) as raw:
        raw.associate(REQUEST)
        wait_for(lambda: dimse_threads() == 0, "the association's pause")
        raw.send(ECHO * count)
        assert [status(raw) for _ in range(count)] == [0] * count


def test_who_does_not_wait_for_answers_is_served_in_turn(tmp_path: Path) -> None:
    """Without a window one in each round: of 50 that flooded the node with echoes another one waited for
    2.5 s."""
    served: list[Exchange] = []
    open_ = threading.Event()

    class Noting(Echo):
        def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
            served.append(exchange)
            open_.wait(10)
            super().serve(exchange, context, command)

    table: dict[tuple[ServiceName, int], Service] = {(ServiceName.ECHO, Field.C_ECHO): Noting()}
    with serving(tmp_path, table=table) as running, Raw(running.port) as flooding, Raw(running.port) as other:
        open_.set()
        for raw in (flooding, other):
            raw.associate(REQUEST)
            raw.send(ECHO)
            assert status(raw) == 0
        wait_for(lambda: dimse_threads() == 0, "the associations' pause")
        open_.clear()
        served.clear()
        flooding.send(ECHO * 40)
        wait_for(lambda: served, "the first of them")
        other.send(ECHO)
        open_.set()
        assert status(other) == 0
        assert [status(flooding) for _ in range(40)] == [0] * 40
    turns = [exchange is not served[0] for exchange in served]
    assert len(turns) == 41 and turns.index(True) <= 2


def test_a_disk_that_hangs_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all whose answers are due in a round, not by one after the other."""
    monkeypatch.setattr("node.dimse.pump.DURABLE_TIMEOUT_S", 0.5)
    go = threading.Event()
    waits: list[float] = []

    class Hanging:
        def wait_durable(self, timeout_s: float) -> None:
            waits.append(timeout_s)
            threading.Event().wait(timeout_s)
            raise SyncFailed("the disk did not confirm a write in time")

    class Slow(Echo):
        def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
            go.wait(10)
            exchange.answer(context, command, 0, stored=Hanging() if waiting else None)

    waiting = False
    table: dict[tuple[ServiceName, int], Service] = {(ServiceName.ECHO, Field.C_ECHO): Slow()}
    with serving(tmp_path, table=table) as running, ExitStack() as open_ones:
        go.set()
        raws = [open_ones.enter_context(Raw(running.port)) for _ in range(6)]
        for raw in raws:
            raw.associate(REQUEST)
            raw.send(ECHO)
            assert status(raw) == 0
        wait_for(lambda: dimse_threads() == 0, "the associations' pause")
        waiting = True
        go.clear()
        for raw in raws:
            raw.send(ECHO)
        go.set()
        assert {status(raw) for raw in raws} == {codes.OUT_OF_RESOURCES}
    assert len(waits) == 6 and sum(waits) < 1.5  # one round of those that came first, one of the others


def test_who_rests_gives_back_its_buffer(stores: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 idle associations that have sent a large message each would keep half a gigabyte."""
    monkeypatch.setattr("node.dimse.pump.REST_S", 0.1)
    with Raw(stores.port) as raw:
        raw.associate(REQUEST)
        raw.send(store_octets(make_instance(number=1, rows=512, columns=512)))
        assert status(raw) == 0
        wait_for(lambda: dimse_threads() == 0, "the thread of the large message")
        [parked] = stores.server._pump._parked.values()
        wait_for(lambda: len(parked.wire.buffer) == QUIET_BUFFER_BYTES, "the smaller buffer")
        raw.send(store_octets(make_instance(number=2)))
        assert status(raw) == 0


def test_what_the_kernel_does_not_watch_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may watch only so many descriptors: who comes past that is closed, and nothing of it stays."""

    class Full:
        def __init__(self, epoll: select.epoll) -> None:
            self.unregister, self.poll, self.close = epoll.unregister, epoll.poll, epoll.close

        def register(self, fd: int, events: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with storing(tmp_path, limits=replace(QUICK, idle_timeout_s=1.0)) as stores:
        pump = stores.server._pump
        epoll = pump._epoll
        with Raw(stores.port) as raw:
            monkeypatch.setattr(pump, "_epoll", Full(epoll))
            raw.associate(REQUEST)
            assert raw.closed()
        monkeypatch.setattr(pump, "_epoll", epoll)
        wait_for(lambda: stores.server.connections == 0, "the end of the connection")
        assert stores.admission.associations == {}
        with Raw(stores.port) as raw:
            raw.associate(REQUEST)
            assert raw.receive()[0] == PduType.ABORT  # silent: the pump looks after the others still


def test_a_connection_that_can_not_be_begun_ends_alone(stores: Storing,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("whatever a library raises")

    with monkeypatch.context() as patch:
        patch.setattr("node.dimse.server.Wire", fail)
        with Raw(stores.port) as raw:
            assert raw.closed()
    with Raw(stores.port) as raw:
        raw.associate(REQUEST)
        raw.send(ECHO)
        assert status(raw) == 0


def test_facts_about_conflicts_keep_nobody_waiting(tmp_path: Path, stores: Storing) -> None:
    """A correction is on record before it is answered, which waits for the index; an echo does not."""
    stores.ledger.add_device(Device("CT2", "127.0.0.1", on_conflict="propose"))
    first = make_instance(number=1)
    other = make_instance(number=1, rows=9, sop_uid=first.sop_instance_uid)
    with Raw(stores.port) as innocent, Raw(stores.port) as corrector:
        innocent.associate(REQUEST)
        corrector.associate(replace(REQUEST, calling_ae="CT2"))
        innocent.send(store_octets(first))
        assert status(innocent) == 0
        corrector.send(ECHO)
        assert status(corrector) == 0
        stores.archive.wait_indexed()
        wait_for(lambda: dimse_threads() == 0, "the associations' pause")
        with closing(sqlite3.connect(tmp_path / "state" / "index.db", isolation_level=None)) as locker:
            locker.execute("BEGIN EXCLUSIVE")
            corrector.send(store_octets(other))
            wait_for(lambda: stores.archive.intake.indexer._writing.locked(), "the correction's fact")
            innocent.sock.settimeout(2.0)
            for _ in range(3):
                innocent.send(ECHO)
                assert status(innocent) == 0
            locker.execute("ROLLBACK")
        assert status(corrector) == 0


def test_an_index_elsewhere_keeps_nobody_waiting(tmp_path: Path, postgresql_url: str) -> None:
    """Somebody has its table for himself, or its server does not answer: who stores waits, an echo does
    not."""
    with storing(tmp_path, index_url=postgresql_url) as stores, Raw(stores.port) as sender, \
            Raw(stores.port) as innocent:
        for raw in (sender, innocent):
            raw.associate(REQUEST)
            raw.send(ECHO)
            assert status(raw) == 0
        wait_for(lambda: dimse_threads() == 0, "the associations' pause")
        with psycopg.connect(postgresql_url) as locker:
            locker.execute("LOCK TABLE instance IN ACCESS EXCLUSIVE MODE")
            sender.send(store_octets(make_instance(number=1)))
            wait_for(lambda: locker.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone(),
                     "the question that waits")
            innocent.sock.settimeout(2.0)
            for _ in range(3):
                innocent.send(ECHO)
                assert status(innocent) == 0
        assert status(sender) == 0


def test_a_decision_under_way_keeps_nobody_waiting(stores: Storing) -> None:
    """Another sends the same UID, and a large object's sync is waited for before that is decided."""
    instance = make_instance(number=1)
    with Raw(stores.port) as sender, Raw(stores.port) as innocent:
        for raw in (sender, innocent):
            raw.associate(REQUEST)
            raw.send(ECHO)
            assert status(raw) == 0
        wait_for(lambda: dimse_threads() == 0, "the associations' pause")
        stores.archive.intake._claim(instance.sop_instance_uid)
        sender.send(store_octets(instance))
        wait_for(lambda: stores.archive.intake._turns_awaited, "the sender's turn")
        innocent.sock.settimeout(2.0)
        try:
            innocent.send(ECHO)
            assert status(innocent) == 0
        finally:
            stores.archive.intake._release(instance.sop_instance_uid)
        assert status(sender) == 0


def test_a_query_behind_a_store_sees_it(stores: Storing) -> None:
    instance = make_instance(number=1)
    identifier = struct.pack("<HH2sH", 0x0008, 0x0052, b"CS", 6) + b"STUDY "
    identifier += struct.pack("<HH2sH", 0x0020, 0x000D, b"UI", 0)
    request = messages.query_request(Field.C_FIND, 2, STUDY_ROOT_FIND)
    find = data(5, COMMAND | LAST, request) + data(5, LAST, identifier)
    with Raw(stores.port) as raw:
        raw.associate(REQUEST)
        raw.send(store_octets(instance) + find)
        assert status(raw) == 0
        assert status(raw) == 0xFF00
        kind, match = raw.receive()
        assert kind == PduType.P_DATA_TF and instance.study_uid.encode() in match
        assert status(raw) == 0


@pytest.mark.parametrize("inside", [False, True])
def test_who_falls_silent_is_cut(tmp_path: Path, inside: bool) -> None:
    begun = store_octets(make_instance(number=1))[:-1] if inside else b""
    limits = replace(QUICK, idle_timeout_s=0.5, message_timeout_s=0.5)
    with storing(tmp_path, limits=limits) as stores, Raw(stores.port) as raw:
        raw.associate(REQUEST)
        raw.send(begun)
        kind, body = raw.receive()
        assert (kind, body[2]) == (PduType.ABORT, AbortSource.SERVICE_USER)
        raw.sock.close()
        assert "silent" in stores.log(1)[0].ended
        assert stores.totals().instances == 0


def test_a_broken_message_ends_its_own_association(stores: Storing) -> None:
    with Raw(stores.port) as other, Raw(stores.port) as raw:
        other.associate(REQUEST)
        raw.associate(REQUEST)
        raw.send(data(9, COMMAND | LAST, messages.echo_request(1)))  # a context that was never proposed
        kind, body = raw.receive()
        assert (kind, body[2]) == (PduType.ABORT, AbortSource.SERVICE_PROVIDER)
        other.send(ECHO)
        assert status(other) == 0


def test_who_does_not_read_its_answers_keeps_nobody_waiting(stores: Storing) -> None:
    """Its answers fill the socket, then a thread waits for it; the others go on, and it may come back."""
    with Raw(stores.port) as deaf, Raw(stores.port) as other:
        deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.associate(REQUEST)
        other.associate(REQUEST)
        deaf.sock.settimeout(0.5)
        asked = 0
        try:
            while asked < 100_000:
                deaf.sock.sendall(ECHO * 100)
                asked += 100
                if asked % 5_000 == 0:
                    other.send(ECHO)
                    assert status(other) == 0
        except TimeoutError:
            pass
        other.send(ECHO)
        assert status(other) == 0


def test_stopping_ends_what_is_parked(tmp_path: Path) -> None:
    with storing(tmp_path) as stores, Raw(stores.port) as raw:
        raw.associate(REQUEST)
        wait_for(lambda: dimse_threads() == 0, "the association's pause")
        stopper = threading.Thread(target=stores.server.stop)
        stopper.start()
        assert raw.receive()[0] == PduType.ABORT
        raw.sock.close()
        stopper.join(10)
        assert not stopper.is_alive()
        assert stores.server.connections == 0
