"""The asynchronous operations window (PS3.7 D.3.3.3): what is granted, what a C-STORE gains from it, and what
becomes of a peer that takes more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.pdu_primitives import AsynchronousOperationsWindowNegotiation

from archive.errors import SyncFailed
from archive.intake import Ticket
from node.dimse import contexts, messages, pdu
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE, STUDY_ROOT_FIND, VERIFICATION
from node.dimse.identifiers import write_identifier
from node.dimse.messages import Field
from node.dimse.pdu import PduType, ProposedContext
from node.dimse.sending import send_files
from tests.datasets import CT, Instance, make_instance
from tests.node.serving import AE_TITLE, QUICK, Raw, data
from tests.node.storing import Storing, storing
from tests.waiting import wait_for

CONTEXTS = (ProposedContext(1, CT, (EXPLICIT_LITTLE,)), ProposedContext(3, VERIFICATION, (IMPLICIT_LITTLE,)),
            ProposedContext(5, STUDY_ROOT_FIND, (IMPLICIT_LITTLE,)))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


def asking(window: tuple[int, int] | None) -> pdu.AssociateRequest:
    return pdu.AssociateRequest(AE_TITLE, "CT1", CONTEXTS, 16384, asynchronous_window=window)


def store_octets(message_id: int, instance: Instance) -> bytes:
    command = messages.store_request(message_id, CT, instance.sop_instance_uid)
    return data(1, 3, command) + data(1, 2, instance.dataset)


def answers(raw: Raw, count: int) -> list[tuple[int, int, int]]:
    """Field, message ID and status of the next responses."""
    found: list[tuple[int, int, int]] = []
    for _ in range(count):
        kind, body = raw.receive()
        assert kind == PduType.P_DATA_TF, (kind, body, found)
        command = messages.parse(body[6:])
        found.append((command.field, command.short(messages.MESSAGE_ID_RESPONDED_TO, -1), command.status))
    return found


class Disk:
    """Holds every wait for the disk back until it is let go; counts those that wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.waiting = 0
        wait_durable = Ticket.wait_durable

        def held(ticket: Ticket, timeout_s: float = 30.0) -> None:
            self.waiting += 1
            assert self.go.wait(20)
            wait_durable(ticket, timeout_s)

        monkeypatch.setattr(Ticket, "wait_durable", held)


@pytest.mark.parametrize(("asked", "granted"), [
    (None, None), ((8, 1), (8, 1)), ((3, 1), (3, 1)), ((1, 1), (1, 1)), ((100, 100), (8, 8)),
    ((0, 0), (8, 8)), ((65535, 0), (8, 8)), ((2, 3), (2, 3)),
])
def test_what_is_granted(served: Storing, asked: tuple[int, int] | None,
                         granted: tuple[int, int] | None) -> None:
    """The smaller of what is asked and what is set, of either side (ours are C-GET's); unlimited is bounded;
    unasked is absent."""
    with Raw(served.port) as raw:
        assert raw.associate(asking(asked)).asynchronous_window == granted


def test_a_setting_of_one_grants_none(tmp_path: Path) -> None:
    with storing(tmp_path, limits=replace(QUICK, operations_max=1)) as served, Raw(served.port) as raw:
        assert raw.associate(asking((8, 8))).asynchronous_window == (1, 1)


def test_a_peer_of_another_make_reads_the_answer(served: Storing) -> None:
    item = AsynchronousOperationsWindowNegotiation()
    item.maximum_number_operations_invoked = 5
    item.maximum_number_operations_performed = 5
    ae = AE("CT1")
    ae.add_requested_context(contexts.VERIFICATION)
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE, ext_neg=[item])
    assert association.is_established
    assert association.acceptor.asynchronous_operations == (5, 5)
    assert association.send_c_echo().Status == 0
    association.release()


def test_requests_are_read_while_earlier_ones_wait_for_the_disk(
        served: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four are taken before one is answered; the answers come in the order of the requests."""
    disk = Disk(monkeypatch)
    instances = [make_instance(number=n, padding=60_000 * (n % 2)) for n in range(4)]
    with Raw(served.port) as raw:
        raw.associate(asking((4, 1)))
        for number, instance in enumerate(instances, 1):
            raw.send(store_octets(number, instance))
        wait_for(lambda: disk.waiting, "the disk is waited for")
        disk.go.set()
        assert answers(raw, 4) == [(0x8001, n, 0) for n in (1, 2, 3, 4)]
    for instance in instances:
        assert served.dataset(served.stored(instance)[0]) == instance.dataset


def test_one_sync_serves_a_window(served: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a C-STORE gains: eight that came together are one sync, not eight."""
    log = served.archive.intake.packs.log
    syncs: list[None] = []
    lead = type(log)._lead

    def counted(*args: Any) -> None:
        syncs.append(None)
        lead(*args)

    monkeypatch.setattr(type(log), "_lead", counted)
    instances = [make_instance(number=n) for n in range(24)]
    with Raw(served.port) as raw:
        raw.associate(asking((8, 1)))
        for start in range(0, 24, 8):
            raw.send(b"".join(store_octets(n + 1, instances[n]) for n in range(start, start + 8)))
            assert [status for _, _, status in answers(raw, 8)] == [0] * 8
    assert len(syncs) <= 12, "at least two to a sync, eight when they arrive in one piece"


@pytest.mark.parametrize("count", [3, 12])
def test_more_than_the_window_is_aborted(served: Storing, count: int) -> None:
    """What was within it is answered and kept; nothing that came beyond it is."""
    instances = [make_instance(number=n) for n in range(count)]
    with Raw(served.port) as raw:
        raw.associate(asking((2, 1)))
        raw.send(b"".join(store_octets(n, one) for n, one in enumerate(instances, 1)))
        assert answers(raw, 2) == [(0x8001, 1, 0), (0x8001, 2, 0)]
        assert raw.receive() == (PduType.ABORT, bytes(4))
    assert "more operations at once" in served.log(1)[0].ended
    assert [len(served.stored(one)) for one in instances] == [1, 1] + [0] * (count - 2)


def test_a_peer_without_a_window_is_served_one_by_one(served: Storing) -> None:
    """It should have waited; its requests are answered in turn."""
    instances = [make_instance(number=n) for n in range(5)]
    with Raw(served.port) as raw:
        raw.associate(asking(None))
        raw.send(b"".join(store_octets(n, one) for n, one in enumerate(instances, 1)))
        assert [number for _, number, _ in answers(raw, 5)] == [1, 2, 3, 4, 5]


def test_echo_and_find_among_stores(served: Storing) -> None:
    """In order; a C-FIND sees what was sent before it."""
    first, second = make_instance(number=1), make_instance(number=2)
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = first.study_uid
    find = messages.query_request(Field.C_FIND, 3, STUDY_ROOT_FIND)
    with Raw(served.port) as raw:
        raw.associate(asking((8, 1)))
        raw.send(store_octets(1, first) + data(3, 3, messages.echo_request(2))
                 + data(5, 3, find) + data(5, 2, write_identifier(query, IMPLICIT_LITTLE))
                 + store_octets(4, second))
        assert answers(raw, 2) == [(0x8001, 1, 0), (0x8030, 2, 0)]
        assert answers(raw, 1) == [(0x8020, 3, 0xFF00)]
        assert raw.receive()[0] == PduType.P_DATA_TF  # the match's identifier
        assert answers(raw, 2) == [(0x8020, 3, 0), (0x8001, 4, 0)]


def test_a_find_is_not_confused_by_what_comes_behind_it(served: Storing) -> None:
    """C-CANCEL and a C-STORE that arrive while matches are sent: the C-STORE's data set is its own."""
    instances = [make_instance(number=n) for n in range(6)]
    assert served.send(*instances) == [0] * 6
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = ""
    another = make_instance(number=77)
    with Raw(served.port) as raw:
        raw.associate(asking((2, 1)))
        raw.send(data(5, 3, messages.query_request(Field.C_FIND, 1, STUDY_ROOT_FIND))
                 + data(5, 2, write_identifier(query, IMPLICIT_LITTLE)) + store_octets(2, another))
        finals: list[tuple[int, int]] = []
        while len(finals) < 2:
            kind, body = raw.receive()
            assert kind == PduType.P_DATA_TF, body
            if body[5] & 1:
                command = messages.parse(body[6:])
                if command.status != 0xFF00:
                    finals.append((command.field, command.status))
        assert finals == [(0x8020, 0), (0x8001, 0)]
    assert served.dataset(served.stored(another)[0]) == another.dataset


def test_a_find_without_a_window_is_followed_by_what_did_not_wait(served: Storing) -> None:
    """As with every other request: in turn."""
    assert served.send(*(make_instance(number=n) for n in range(6))) == [0] * 6
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = ""
    with Raw(served.port) as raw:
        raw.associate(asking(None))
        raw.send(data(5, 3, messages.query_request(Field.C_FIND, 1, STUDY_ROOT_FIND))
                 + data(5, 2, write_identifier(query, IMPLICIT_LITTLE))
                 + data(3, 3, messages.echo_request(2)) + store_octets(3, make_instance(number=9))
                 + data(3, 3, messages.echo_request(4)))
        finals: list[int] = []
        while len(finals) < 4:
            kind, body = raw.receive()
            assert kind == PduType.P_DATA_TF, body
            if body[5] & 1 and messages.parse(body[6:]).status != 0xFF00:
                finals.append(messages.parse(body[6:]).short(messages.MESSAGE_ID_RESPONDED_TO, -1))
        assert finals == [1, 2, 3, 4]


def test_a_find_that_is_overrun_is_aborted(served: Storing) -> None:
    """Three at once in a window of two."""
    assert served.send(*(make_instance(number=n) for n in range(6))) == [0] * 6
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = ""
    with Raw(served.port) as raw:
        raw.associate(asking((2, 1)))
        raw.send(data(5, 3, messages.query_request(Field.C_FIND, 1, STUDY_ROOT_FIND))
                 + data(5, 2, write_identifier(query, IMPLICIT_LITTLE))
                 + data(3, 3, messages.echo_request(2)) + data(3, 3, messages.echo_request(3)))
        while (answer := raw.receive())[0] == PduType.P_DATA_TF:
            pass
        assert answer == (PduType.ABORT, bytes(4))


def test_what_is_refused_is_answered_in_its_place(served: Storing) -> None:
    good, other = make_instance(number=1), make_instance(number=2)
    wrong = data(1, 3, messages.store_request(2, CT, "1.2.3")) + data(1, 2, other.dataset)
    with Raw(served.port) as raw:
        raw.associate(asking((4, 1)))
        raw.send(store_octets(1, good) + wrong + store_octets(3, other))
        assert answers(raw, 3) == [(0x8001, 1, 0), (0x8001, 2, 0xA900), (0x8001, 3, 0)]


def test_a_sync_that_fails_is_said_of_each(served: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ticket: Ticket, timeout_s: float = 30.0) -> None:
        raise SyncFailed("the disk said no")

    monkeypatch.setattr(Ticket, "wait_durable", fail)
    with Raw(served.port) as raw:
        raw.associate(asking((2, 1)))
        raw.send(store_octets(1, make_instance(number=1)) + store_octets(2, make_instance(number=2)))
        assert answers(raw, 2) == [(0x8001, 1, 0xA700), (0x8001, 2, 0xA700)]


@pytest.mark.parametrize("ending", ["abort", "close", "release"])
def test_an_end_in_the_middle_leaves_nothing_half_stored(served: Storing, ending: str) -> None:
    """Two whole ones and a half: the whole ones are kept, answered or not; of the half nothing is."""
    instances = [make_instance(number=n, padding=200_000) for n in range(3)]
    half = store_octets(3, instances[2])[:100_000]
    with Raw(served.port) as raw:
        raw.associate(asking((8, 1)))
        raw.send(store_octets(1, instances[0]) + store_octets(2, instances[1]))
        if ending == "release":
            raw.send(pdu.RELEASE_RQ_OCTETS)  # AR-7: what is owed is said before the answer
            assert answers(raw, 2) == [(0x8001, 1, 0), (0x8001, 2, 0)]
            assert raw.receive() == (PduType.RELEASE_RP, bytes(4))
        else:
            raw.send(half)
    wait_for(lambda: served.admission.associations == {}, "the association is over")
    served.log(1)
    assert [len(served.stored(one)) for one in instances] == [1, 1, 0]
    assert served.totals().instances == 2
    wait_for(lambda: served.archive.intake.budget.taken_bytes == 0, "all memory is given back")


def test_our_requestor_uses_what_is_granted(served: Storing, tmp_path: Path) -> None:
    """Files sent with a window arrive as without one, each exactly once."""
    paths = []
    for number in range(40):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(make_instance(number=number, padding=number * 977).part10)
        paths.append(path)
    report = send_files(served.peer, "CT1", paths, window=4, associations=2)
    assert (report.sent, report.failed, report.ended) == (40, [], [])
    assert served.totals().instances == 40
    assert sum('{"C-STORE 0000":' in row.operations for row in served.log(2)) == 2


def test_cancel_of_what_is_over_counts_for_nothing(served: Storing) -> None:
    """A C-CANCEL is no operation: it may come behind a full window."""
    cancel = data(1, 3, messages.cancel_request(1))
    with Raw(served.port) as raw:
        raw.associate(asking((2, 1)))
        raw.send(store_octets(1, make_instance(number=1)) + store_octets(2, make_instance(number=2)) + cancel)
        assert len(answers(raw, 2)) == 2
        raw.send(data(3, 3, messages.echo_request(9)))
        assert answers(raw, 1) == [(Field.C_ECHO | 0x8000, 9, 0)]
