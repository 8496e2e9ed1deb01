"""The hub's half of a push, over a real archive: what is refused alone, what ends the stream, what is never
promised.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from archive.archive import Archive
from archive.errors import InvalidInput, InvalidInstance, MissError, OutOfResources
from archive.model import Level, Outcome, Provenance, Query
from federation import serde
from federation.codec import CHUNK_BYTES_MAX, deflated
from federation.push_wire import OBJECTS_MAX, Chunk
from federation.receiving import Incoming, Receiver, Taken
from protos import uplink_pb2
from tests.datasets import Instance, make_instance
from tests.federation.wards import open_archive, stored_bytes

WARD = "san-martino/radiology"


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with open_archive(tmp_path / "hub", outbox=False) as archive:
        yield archive


@pytest.fixture
def receiver(archive: Archive) -> Receiver:
    return Receiver(archive, lambda: time.time_ns() // 1000)


@pytest.fixture
def incoming(receiver: Receiver) -> Incoming:
    return receiver.incoming(WARD)


def begin(instance: Instance, **changes: object) -> uplink_pb2.PushBegin:
    head = replace(instance.head(Provenance("galliera/ct", "GA", "CT9", "CT9", 5)), **changes)  # type: ignore[arg-type]
    return uplink_pb2.PushBegin(head=serde.head_to(head), size=len(instance.dataset))


def pieces(
    instance: Instance, size: int = 1000, *, digest: bytes | None = None
) -> list[uplink_pb2.PushRequest]:
    chunks = [instance.dataset[at : at + size] for at in range(0, len(instance.dataset), size)]
    return [
        uplink_pb2.PushRequest(begin=begin(instance)),
        *(uplink_pb2.PushRequest(chunk=chunk) for chunk in chunks),
        uplink_pb2.PushRequest(end=uplink_pb2.PushEnd(digest=digest or instance.digest)),
    ]


def group(*instances: Instance) -> uplink_pb2.PushRequest:
    wholes = [
        uplink_pb2.PushWhole(begin=begin(one), dataset=one.dataset, digest=one.digest) for one in instances
    ]
    return uplink_pb2.PushRequest(group=uplink_pb2.PushGroup(objects=wholes))


def in_region(archive: Archive) -> list[str]:
    return sorted(match.instance["SOPInstanceUID"] for match in archive.search(Query(Level.IMAGE)))


def ended(taken: Taken) -> MissError:
    assert isinstance(taken.error, MissError)
    return taken.error


def test_chunks_and_groups_make_receipts_of_what_is_durable(
    archive: Archive, receiver: Receiver, incoming: Incoming
) -> None:
    one, two, three = (make_instance() for _ in range(3))
    taken = incoming.take([*pieces(one), group(two, three)])
    assert taken.error is None
    receipts = receiver.settle(WARD, taken.pushed)
    assert [(r.sop_instance_uid, r.digest, r.outcome) for r in receipts] == [
        (instance.sop_instance_uid, instance.digest, Outcome.STORED) for instance in (one, two, three)
    ]
    for instance in (one, two, three):
        assert stored_bytes(archive, instance) == instance.dataset
    (match, *_) = archive.search(Query(Level.IMAGE))
    assert match.wards == (WARD,)  # by the certificate, not by the message


def test_messages_may_come_in_any_cut(archive: Archive, receiver: Receiver, incoming: Incoming) -> None:
    instance = make_instance()
    for message in pieces(instance, 333):
        taken = incoming.take([message])
        assert taken.error is None
    assert len(receiver.settle(WARD, taken.pushed)) == 1
    assert stored_bytes(archive, instance) == instance.dataset


def test_other_bytes_than_the_digest_are_refused_alone(
    archive: Archive, receiver: Receiver, incoming: Incoming
) -> None:
    bad, good = make_instance(), make_instance()
    taken = incoming.take([*pieces(bad, digest=good.digest), *pieces(good)])
    assert taken.error is None
    assert [(r.sop_instance_uid, r.permanent) for r in taken.refused] == [(bad.sop_instance_uid, False)]
    assert [r.sop_instance_uid for r in receiver.settle(WARD, taken.pushed)] == [good.sop_instance_uid]
    assert in_region(archive) == [good.sop_instance_uid]


def test_an_object_cut_short_is_refused(archive: Archive, incoming: Incoming) -> None:
    instance = make_instance()
    first, *chunks, last = pieces(instance, 100)
    taken = incoming.take([first, *chunks[:-1], last])
    assert [r.permanent for r in taken.refused] == [False]
    assert in_region(archive) == []


def test_a_data_set_that_is_none_is_refused_for_good(archive: Archive, incoming: Incoming) -> None:
    good = make_instance()
    nonsense = replace(good, dataset=b"no data set at all" * 10)
    taken = incoming.take([*pieces(nonsense), *pieces(good)])
    assert [r.permanent for r in taken.refused] == [True]
    assert [one.uid for one in taken.pushed] == [good.sop_instance_uid]


@pytest.mark.parametrize(
    "messages",
    [
        lambda one: [*pieces(one)[:2], *pieces(one)],
        lambda one: [*pieces(one)[:2], group(one)],
        lambda one: pieces(one)[1:],
        lambda one: pieces(one)[-1:],
        lambda one: [*pieces(one)[:-1], *pieces(one)[1:]],
        lambda one: [pieces(one)[0], uplink_pb2.PushRequest(chunk=b"x" * (CHUNK_BYTES_MAX + 1))],
        lambda one: [uplink_pb2.PushRequest()],
        lambda one: [uplink_pb2.PushRequest(begin=uplink_pb2.PushBegin(head=begin(one).head, size=-1))],
    ],
)
def test_what_breaks_the_conversation_ends_the_stream(
    archive: Archive, receiver: Receiver, incoming: Incoming, messages: object
) -> None:
    assert callable(messages)
    before = make_instance()
    taken = incoming.take([group(before), *messages(make_instance())])
    assert isinstance(taken.error, InvalidInput)
    receipts = receiver.settle(WARD, taken.pushed)  # what came before is not lost
    assert [one.sop_instance_uid for one in receipts] == [before.sop_instance_uid]
    incoming.abort()
    incoming.abort()
    assert in_region(archive) == [before.sop_instance_uid]


def test_a_group_has_no_more_objects_than_it_may_or_says(archive: Archive, receiver: Receiver) -> None:
    many = group(*([make_instance()] * (OBJECTS_MAX + 1)))
    assert isinstance(receiver.incoming(WARD).take([many]).error, InvalidInput)
    few = group(*(make_instance(number=number) for number in range(3)))
    frame = deflated(few.group.SerializeToString(), 1)
    said_two = uplink_pb2.PushRequest(zstd_group=frame, packed_objects=2)
    taken = receiver.incoming(WARD).take([said_two])
    assert isinstance(taken.error, InvalidInput) and taken.pushed == []
    said_three = uplink_pb2.PushRequest(zstd_group=frame, packed_objects=3)
    assert len(receiver.incoming(WARD).take([said_three]).pushed) == 3


def test_what_ended_a_stream_does_not_keep_its_messages(receiver: Receiver) -> None:
    data = bytes(1 << 20)
    before = sys.getrefcount(data)
    gc.disable()
    try:
        taken = receiver.incoming(WARD).take([Chunk(data)])
        assert isinstance(taken.error, InvalidInput)
        del taken
        assert sys.getrefcount(data) == before
    finally:
        gc.enable()


def test_a_stream_that_is_cut_while_it_is_read_keeps_nothing(
    tmp_path: Path, archive: Archive, incoming: Incoming
) -> None:
    instance = make_instance(padding=2 << 20)  # it streams into a pack of its own
    messages = pieces(instance, CHUNK_BYTES_MAX)
    cutting = threading.Thread(target=incoming.abort)

    def read() -> Iterator[uplink_pb2.PushRequest]:
        yield group(make_instance())
        cutting.start()
        cutting.join(0.3)
        yield from messages[:2]

    incoming.take(cast(Sequence[uplink_pb2.PushRequest], read()))
    cutting.join()
    assert list((tmp_path / "hub" / "large").glob("*")) == []
    assert archive.intake.budget.taken_bytes == 0


def test_a_uid_that_is_none_never_reaches_the_archive(archive: Archive, incoming: Incoming) -> None:
    instance = replace(make_instance(), sop_instance_uid="../../etc/x")
    assert isinstance(ended(incoming.take(pieces(instance))), InvalidInstance)
    assert in_region(archive) == []


def test_want_of_room_is_nobodys_fault(tmp_path: Path) -> None:
    from archive.archive import ArchiveSettings

    settings = ArchiveSettings(state=tmp_path / "full", free_bytes_min=1 << 60)
    with Archive.open(settings, outbox=False) as full:
        taken = Receiver(full, lambda: 1).incoming(WARD).take(pieces(make_instance()))
        assert isinstance(taken.error, OutOfResources)
        assert taken.refused == []


def test_no_receipt_before_the_index_has_it(
    archive: Archive, receiver: Receiver, incoming: Incoming, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, apply = threading.Event(), archive.index.apply

    def late(*args: Any, **kwargs: Any) -> None:
        gate.wait(30)
        apply(*args, **kwargs)

    monkeypatch.setattr(archive.index, "apply", late)
    taken = incoming.take([group(make_instance())])
    with ThreadPoolExecutor(1) as pool:
        settling = pool.submit(receiver.settle, WARD, taken.pushed)
        taken.pushed[0].ticket.wait_durable()
        with pytest.raises(TimeoutError):
            settling.result(0.3)
        gate.set()
        assert len(settling.result(30)) == 1


def test_a_content_that_is_kept_as_a_conflict_is_here_too(
    archive: Archive, receiver: Receiver, incoming: Incoming
) -> None:
    first = make_instance(sop_uid="1.2.3", study_uid="1.2")
    second = make_instance(sop_uid="1.2.3", study_uid="1.2", rows=18)
    taken = incoming.take([group(first, second)])
    outcomes = [receipt.outcome for receipt in receiver.settle(WARD, taken.pushed)]
    assert outcomes == [Outcome.STORED, Outcome.CONFLICT]
    items = [uplink_pb2.OfferItem(sop_instance_uid="1.2.3", digest=one.digest) for one in (first, second)]
    for ward in (WARD, "galliera/ct"):
        found = [one.receipt and one.receipt.outcome for one in receiver.verdicts(ward, items[1:])]
        assert found == [Outcome.CONFLICT]
    assert archive.search(Query(Level.IMAGE))[0].wards == (WARD,)  # other bytes make nobody a holder
    assert [one.receipt and one.receipt.outcome for one in receiver.verdicts(WARD, items[:1])] == [
        Outcome.DUPLICATE
    ]


def test_offers_are_answered_with_receipts_for_what_is_here(
    archive: Archive, receiver: Receiver, incoming: Incoming
) -> None:
    here, missing = make_instance(), make_instance()
    receiver.settle(WARD, incoming.take([group(here)]).pushed)

    def offer(ward: str, *instances: Instance) -> list[bool]:
        items = [
            uplink_pb2.OfferItem(sop_instance_uid=one.sop_instance_uid, digest=one.digest)
            for one in instances
        ]
        return [one.receipt is not None for one in receiver.verdicts(ward, items)]

    assert offer(WARD, here, missing) == [True, False]
    other_bytes = replace(here, dataset=here.dataset + b"\0\0")
    assert offer(WARD, other_bytes) == [False]
    assert archive.search(Query(Level.IMAGE))[0].wards == (WARD,)
    for _ in range(2):  # the second time it is known already
        assert offer("galliera/ct", here) == [True]
    assert archive.search(Query(Level.IMAGE))[0].wards == ("galliera/ct", WARD)
    with pytest.raises(InvalidInput):
        receiver.verdicts(WARD, [uplink_pb2.OfferItem()] * 1001)
