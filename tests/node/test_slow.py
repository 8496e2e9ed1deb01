"""Senders that never fall silent and never finish: what a message may cost in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from archive.intake import Intake
from node.dimse import messages, pdu
from node.dimse.association import Limits
from node.dimse.contexts import EXPLICIT_LITTLE
from node.dimse.errors import TimedOut
from node.dimse.pdu import PduType, ProposedContext
from node.dimse.wire import Wire
from tests.datasets import CT, make_instance
from tests.node.serving import AE_TITLE, Raw, data
from tests.node.storing import Storing, storing
from tests.waiting import wait_for

# A second stands for the minute of the default; 64 KiB/s for a rate that a test can stay below and above.
STRICT = Limits(artim_s=2.0, idle_timeout_s=30.0, message_timeout_s=1.0, bytes_per_s_min=64 << 10)
REQUEST = pdu.AssociateRequest(AE_TITLE, "CT1", (ProposedContext(1, CT, (EXPLICIT_LITTLE,)),), 16384)


@contextmanager
def dripping(raw: Raw, octets: bytes, step: int, pause_s: float) -> Iterator[None]:
    """Send `octets` by and by, from another thread, until the peer has enough."""
    over = threading.Event()

    def drip() -> None:
        try:
            for at in range(0, len(octets), step):
                raw.send(octets[at:at + step])
                if over.wait(pause_s):
                    return
        except OSError:
            pass

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)


def cut(served: Storing, octets: bytes, step: int, pause_s: float, within_s: float) -> str:
    with Raw(served.port, timeout_s=20.0) as raw:
        raw.associate(REQUEST)
        started = time.monotonic()
        with dripping(raw, octets, step, pause_s):
            assert raw.receive() == (PduType.ABORT, bytes(4))
        assert time.monotonic() - started < within_s
    wait_for(lambda: served.archive.intake.budget.taken_bytes == 0, "what was gathered is given back")
    assert served.totals().instances == 0
    return served.log(1)[0].ended


def test_a_data_set_that_drips_is_cut(tmp_path: Path) -> None:
    """20 octets each 10 ms: 2 KB/s, never silent."""
    instance = make_instance(padding=200_000)
    command = messages.store_request(1, CT, instance.sop_instance_uid)
    head = data(1, 3, command) + data(1, 2, instance.dataset)
    with storing(tmp_path, limits=STRICT) as served, Raw(served.port, timeout_s=20.0) as raw:
        raw.associate(REQUEST)
        raw.send(head[:100_000])  # a good start counts for its own time only
        started = time.monotonic()
        with dripping(raw, head[100_000:], 20, 0.01):
            assert raw.receive() == (PduType.ABORT, bytes(4))
        assert 0.5 < time.monotonic() - started < 8
        assert "the peer is too slow" in served.log(1)[0].ended
        assert served.totals().instances == 0
        wait_for(lambda: served.archive.intake.budget.taken_bytes == 0, "what was gathered is given back")


def test_a_command_set_that_drips_is_cut(tmp_path: Path) -> None:
    """One octet at a time, whatever the rate that is asked for."""
    limits = replace(STRICT, bytes_per_s_min=0)
    octets = data(1, 3, messages.store_request(1, CT, "1.2.3"))
    with storing(tmp_path, limits=limits) as served:
        ended = cut(served, octets, 1, 0.05, 6.0)
        assert ended.startswith("aborted by us: ")


def test_a_command_set_in_many_fragments_has_one_time(tmp_path: Path) -> None:
    """Fragments of a few octets, each whole: the time is the command's, not the fragment's."""
    limits = replace(STRICT, bytes_per_s_min=0)
    command = messages.store_request(1, CT, "1.2.3")
    octets = b"".join(data(1, 1, command[at:at + 2]) for at in range(0, len(command), 2))
    with storing(tmp_path, limits=limits) as served:
        assert cut(served, octets, 14, 0.1, 6.0).startswith("aborted by us: ")


def test_a_slow_sender_that_keeps_the_pace_is_served(tmp_path: Path) -> None:
    """200 KB in two and a half seconds, over two windows."""
    instance = make_instance(padding=250_000)
    octets = (data(1, 3, messages.store_request(1, CT, instance.sop_instance_uid))
              + data(1, 2, instance.dataset))
    with storing(tmp_path, limits=STRICT) as served, Raw(served.port, timeout_s=20.0) as raw:
        raw.associate(REQUEST)
        with dripping(raw, octets, 4096, 0.035):
            kind, body = raw.receive()
            assert kind == PduType.P_DATA_TF, served.ledger.connections()
            assert messages.parse(body[6:]).status == 0
        assert served.dataset(served.stored(instance)[0]) == instance.dataset


def test_many_small_slow_messages_are_no_slow_message(tmp_path: Path) -> None:
    """The pace counts anew with each message, and idling between them counts for nothing."""
    instances = [make_instance(number=n) for n in range(4)]
    with storing(tmp_path, limits=STRICT) as served, Raw(served.port) as raw:
        raw.associate(REQUEST)
        for number, instance in enumerate(instances, 1):
            octets = (data(1, 3, messages.store_request(number, CT, instance.sop_instance_uid))
                      + data(1, 2, instance.dataset))
            raw.send(octets[:300])
            time.sleep(0.4)  # inside each message; together more than a window
            raw.send(octets[300:])
            assert raw.receive()[0] == PduType.P_DATA_TF
            time.sleep(0.2)


def test_our_own_waiting_is_not_held_against_the_sender(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes longer than a window: the sender has nothing to do with it."""
    instance = make_instance(padding=300_000)
    take = Intake.take

    def slow_take(*args: Any, **named: Any) -> Any:
        time.sleep(1.5)
        return take(*args, **named)

    monkeypatch.setattr(Intake, "take", slow_take)
    with storing(tmp_path, limits=STRICT) as served:
        assert served.send(instance, instance) == [0, 0]


@pytest.mark.parametrize("vector", [False, True])
def test_a_peer_that_reads_in_drops_is_left(vector: bool) -> None:
    """It reads 400 octets each 10 ms, so no single send waits for long, and never enough."""
    listener = socket.create_server(("127.0.0.1", 0))
    theirs = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    over = threading.Event()

    def sip() -> None:
        while not over.wait(0.01):
            theirs.recv(400)

    thread = threading.Thread(target=sip)
    thread.start()
    wire = Wire(ours, send_timeout_s=10.0)
    wire.bytes_per_s_min, wire.pace_window_s = 64 << 10, 0.5
    try:
        with pytest.raises(TimedOut, match="reads too slowly"):
            for _ in range(100_000):
                wire.send_vector([bytes(500), bytes(524)]) if vector else wire.send(bytes(1024))
    finally:
        over.set()
        thread.join(10)
        for sock in (ours, theirs, listener):
            sock.close()


def test_a_rate_of_nothing_asks_for_nothing(tmp_path: Path) -> None:
    instance = make_instance(padding=100_000)
    octets = (data(1, 3, messages.store_request(1, CT, instance.sop_instance_uid))
              + data(1, 2, instance.dataset))
    limits = replace(STRICT, bytes_per_s_min=0, message_timeout_s=0.5)
    with storing(tmp_path, limits=limits) as served, Raw(served.port, timeout_s=20.0) as raw:
        raw.associate(REQUEST)
        raw.send(octets[:80_000])
        with dripping(raw, octets[80_000:], 1 << 11, 0.1):
            assert raw.receive()[0] == PduType.P_DATA_TF
