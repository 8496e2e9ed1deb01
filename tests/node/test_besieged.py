"""Peers that ask for too much, or ask and do not listen: what they get, and what others still get."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from archive.budget import ByteBudget
from archive.ledger import Device
from node.dimse import messages, pdu
from node.dimse.commitments import INSTANCE, REQUEST, Information, encode
from node.dimse.contexts import (
    IMPLICIT_LITTLE,
    PERFORMED_STEP,
    STORAGE_COMMITMENT,
    STUDY_ROOT_FIND,
    STUDY_ROOT_GET,
    STUDY_ROOT_MOVE,
    VERIFICATION,
    ServiceName,
)
from node.dimse.exchange import Service
from node.dimse.identifiers import COUNTED_FROM_BYTES
from node.dimse.messages import Field
from node.dimse.pdu import ProposedContext
from node.dimse.services.commitment import CommitmentRequests
from node.dimse.services.find import SEARCHES_MAX, SEARCHES_PER_DEVICE_MAX
from node.dimse.services.mpps import PerformedSteps
from node.dimse.services.retrieval import UIDS_MAX
from tests.datasets import CT, make_instance
from tests.node.committing import committing
from tests.node.serving import AE_TITLE, Raw, data, serving
from tests.node.storing import Storing, storing
from tests.waiting import wait_for

LEVEL, STUDY, SERIES = 0x00080052, 0x0020000D, 0x0020000E
RETRIEVES = ((Field.C_GET, STUDY_ROOT_GET), (Field.C_MOVE, STUDY_ROOT_MOVE))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        running.ledger.add_device(Device("OTHER", "127.0.0.1", port=1))
        yield running


def implicit(tag: int, value: bytes) -> bytes:
    value += b"\0" * (len(value) & 1)
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value


def uids(count: int) -> bytes:
    return b"\\".join(b"1.2.%d" % number for number in range(count))


def associated(port: int, sop_class: str, calling_ae: str = "CT1") -> Raw:
    raw = Raw(port)
    raw.associate(pdu.AssociateRequest(AE_TITLE, calling_ae,
                                       (ProposedContext(1, sop_class, (IMPLICIT_LITTLE,)),), 65_536))
    return raw


def asked(field: Field, sop_class: str, identifier: bytes) -> bytes:
    command = messages.query_request(field, 1, sop_class,
                                     move_destination="OTHER" if field == Field.C_MOVE else "")
    return data(1, 3, command) + data(1, 2, identifier)


def status(raw: Raw) -> int:
    kind, body = raw.receive()
    assert kind == pdu.PduType.P_DATA_TF
    return messages.parse(body[6:]).status


@pytest.mark.parametrize(("field", "sop_class"), RETRIEVES)
@pytest.mark.parametrize("keys", [
    [(LEVEL, b"STUDY"), (STUDY, uids(UIDS_MAX + 1))],
    [(LEVEL, b"SERIES"), (STUDY, b"1.2.3"), (SERIES, uids(UIDS_MAX + 1))],
])  # fmt: skip
def test_a_retrieve_of_too_many_uids_is_refused(served: Storing, field: Field, sop_class: str,
                                                keys: Sequence[tuple[int, bytes]]) -> None:
    """A megabyte of them would be looked up for a minute."""
    with associated(served.port, sop_class) as raw:
        raw.send(asked(field, sop_class, b"".join(implicit(*key) for key in keys)))
        assert status(raw) == 0xA900


@pytest.mark.parametrize(("field", "sop_class"), RETRIEVES)
def test_a_retrieve_is_cancelled_while_it_is_counted(served: Storing, field: Field, sop_class: str) -> None:
    identifier = implicit(LEVEL, b"STUDY") + implicit(STUDY, uids(UIDS_MAX))
    with associated(served.port, sop_class) as raw:
        raw.send(asked(field, sop_class, identifier) + data(1, 3, messages.cancel_request(1)))
        assert status(raw) == 0xFE00


def test_large_requests_share_their_memory(tmp_path: Path) -> None:
    """One takes most of it and does not send the end: another's large one is told to come later, its ordinary
    one passes, and in the end all of it is given back."""
    table: dict[tuple[ServiceName, int], Service] = {}
    with serving(tmp_path, table=table) as served:
        steps = PerformedSteps(served.ledger, lambda studies: None, ByteBudget(1 << 20))
        table[ServiceName.MPPS, Field.N_CREATE] = steps
        request = messages.normalized_request(Field.N_CREATE, 1, PERFORMED_STEP, "1.2.3", has_dataset=True)
        part = b"".join(data(1, 0, bytes(50_000)) for _ in range(15))
        small = data(1, 3, request) + data(1, 2, bytes(COUNTED_FROM_BYTES))
        with (associated(served.port, PERFORMED_STEP) as first,
              associated(served.port, PERFORMED_STEP) as other):
            first.send(data(1, 3, request) + part)
            wait_for(lambda: steps.receiving.taken_bytes > 700_000, "the first one's part")
            other.send(data(1, 3, request) + part + data(1, 2, b""))
            assert status(other) == 0xA700
            other.send(small)
            assert status(other) == 0x0120  # looked at: no attribute is there
            first.send(data(1, 2, b""))
            assert status(first) == 0x0120
        wait_for(lambda: steps.receiving.taken_bytes == 0, "all of it to be given back")


@pytest.mark.parametrize("window", [None, (4, 4)])
@pytest.mark.parametrize(("field", "sop_class"), [(Field.C_FIND, STUDY_ROOT_FIND), *RETRIEVES])
def test_what_is_asked_during_a_retrieve_is_answered_after_it(
        served: Storing, field: Field, sop_class: str, window: tuple[int, int] | None) -> None:
    """With nothing more to come from the peer, which the pump would wake up for."""
    served.send(make_instance(study_uid="1.2.3", rows=0))
    contexts = (ProposedContext(1, sop_class, (IMPLICIT_LITTLE,)),
                ProposedContext(3, VERIFICATION, (IMPLICIT_LITTLE,)))
    with Raw(served.port) as raw:
        raw.associate(pdu.AssociateRequest(AE_TITLE, "CT1", contexts, 65_536, asynchronous_window=window))
        identifier = implicit(LEVEL, b"STUDY") + implicit(STUDY, b"1.2.3")
        raw.send(asked(field, sop_class, identifier) + data(3, 3, messages.echo_request(2)))
        while raw.receive()[1][4] != 3:
            pass  # what the first one is answered, its data sets too


@pytest.mark.parametrize(("field", "sop_class"), RETRIEVES)
def test_who_releases_while_its_retrieve_is_counted_is_released(served: Storing, field: Field,
                                                                sop_class: str) -> None:
    identifier = implicit(LEVEL, b"STUDY") + implicit(STUDY, uids(UIDS_MAX))
    with associated(served.port, sop_class) as raw:
        raw.send(asked(field, sop_class, identifier) + pdu.RELEASE_RQ_OCTETS)
        assert raw.receive()[0] == pdu.PduType.RELEASE_RP


def test_a_flood_of_searches_leaves_the_others_a_turn(served: Storing) -> None:
    """200 queries of one device held another's up for 21 seconds."""
    with ExitStack() as stack:
        got = [stack.enter_context(served.find.searching.of("CT1", lambda: True))
               for _ in range(SEARCHES_MAX)]
        assert got == [True] * SEARCHES_PER_DEVICE_MAX + [False] * (SEARCHES_MAX - SEARCHES_PER_DEVICE_MAX)
        identifier = implicit(LEVEL, b"STUDY") + implicit(STUDY, b"")
        with associated(served.port, STUDY_ROOT_FIND, "OTHER") as raw:
            raw.send(asked(Field.C_FIND, STUDY_ROOT_FIND, identifier))
            assert status(raw) == 0


def test_a_commitment_counts_until_it_is_kept(tmp_path: Path) -> None:
    """A hundred thousand instances decoded are 30 MB: a queue of such before the ledger must not grow."""
    with committing(tmp_path) as served:
        requests = served.commitment.services[ServiceName.COMMIT, Field.N_ACTION]
        assert isinstance(requests, CommitmentRequests)
        counted: list[int] = []
        accept = requests.desk.accept

        def watched(device: str, information: Information) -> str:
            counted.append(requests.held.taken_bytes)
            return accept(device, information)

        requests.desk.accept = watched  # type: ignore[method-assign]
        wanted = encode(Information("1.2.3.8", {"1.2.3.1": CT}), IMPLICIT_LITTLE)
        request = messages.normalized_request(
            Field.N_ACTION, 1, STORAGE_COMMITMENT, INSTANCE, has_dataset=True,
            more=messages.short(messages.ACTION_TYPE_ID, REQUEST))
        with associated(served.port, STORAGE_COMMITMENT) as raw:
            raw.send(data(1, 3, request) + data(1, 2, wanted))
            assert status(raw) == 0
        assert counted == [len(wanted)]
        assert requests.held.taken_bytes == 0
