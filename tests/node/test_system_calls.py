"""The order of what reaches the disk and the wire in one C-STORE, as the kernel sees it; and disks that fail
by injected errors: no success that is none, and no restart to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from archive.archive import Archive, ArchiveSettings
from node.dimse import messages
from node.dimse.pdu import AssociateRequest, ProposedContext
from node.dimse.requestor import ECHO_CONTEXT, Requestor
from tests.datasets import CT, EXPLICIT, Instance, make_instance
from tests.forked import Forked, forked
from tests.node.serving import AE_TITLE, Raw, data
from tests.node.storing import store
from tests.syscalls import Call, failing, only, parse, traced

RECORD, DATA_PDU = "MISSrec", r"\4\0"


@contextmanager
def associated(node: Forked) -> Iterator[Requestor]:
    contexts = [ECHO_CONTEXT, ProposedContext(3, CT, (EXPLICIT,))]
    with Requestor.connect(node.peer, "CT1", contexts) as requestor:
        yield requestor


def one_store(folder: Path, instance: Instance, *, before: int = 0, **options: int) -> list[Call]:
    """The calls of one C-STORE over a new association, after `before` others."""
    with forked(folder, **options) as node:
        with associated(node) as requestor:
            for number in range(before):
                assert store(requestor, make_instance(number=number, padding=9000)) == 0
        with traced(node.pid, folder / "trace"), associated(node) as requestor:
            assert store(requestor, instance) == 0
        node.check_no_surprise()
    return parse((folder / "trace").read_text())


def answer_of(calls: list[Call], after: Call) -> Call:
    """The C-STORE-RSP: the only message that the peer was sent, after the record was written."""
    sent = [call for call in calls if call.to_a_peer and call.names]
    answer = only([call for call in sent if call.names[0].startswith(DATA_PDU)])
    assert answer.began > after.ended, "answered before the record was written"
    return answer


def record_of(calls: list[Call]) -> Call:
    """The one write of a record to the stream of packs."""
    return only([call for call in calls
                 if call.writes and "/packs/" in call.path and RECORD in call.arguments])


def check_synced(calls: list[Call], path: str, after: Call, before: Call, how: str = "fdatasync") -> None:
    synced = [call for call in calls if call.name == how and call.path == path and call.result == 0
              and call.began > after.ended and call.ended < before.began]
    assert synced, f"no {how} of {path} between {after.name} and {before.name}"


def test_the_packs_write_then_its_sync_then_the_answer(tmp_path: Path) -> None:
    calls = one_store(tmp_path, make_instance(padding=4000), before=3)
    record = record_of(calls)
    assert record.result > 0 and not record.error
    check_synced(calls, record.path, record, answer_of(calls, record))


def test_a_new_packs_directory_is_synced_too(tmp_path: Path) -> None:
    calls = one_store(tmp_path, make_instance(padding=9000), before=1, pack_bytes_max=16 << 10)
    record = record_of(calls)
    answer = answer_of(calls, record)
    made = only([call for call in calls if call.name == "openat" and "O_CREAT" in call.arguments
                 and "/packs/" in call.arguments and call.result >= 0])
    path = made.names[0]
    assert record.path == path and path.endswith("/00000002.pack")
    check_synced(calls, path, record, answer)
    check_synced(calls, str(Path(path).parent), made, answer, "fsync")
    # The one before it is sealed: whole and synced before anything is behind it.
    sealed = [call for call in calls if call.name == "fdatasync" and call.path.endswith("/00000001.pack")]
    assert sealed and sealed[-1].ended < record.began and sealed[-1].result == 0


def test_a_large_object_is_synced_then_referred_to_then_answered(tmp_path: Path) -> None:
    calls = one_store(tmp_path, make_instance(padding=3 << 20), before=1)
    record = record_of(calls)
    answer = answer_of(calls, record)
    made = only([call for call in calls if call.name == "openat" and "O_EXCL" in call.arguments
                 and "/large/" in call.arguments])
    part = made.names[0]
    written = [call for call in calls if call.writes and call.path == part]
    assert sum(call.result for call in written) > 3 << 20
    check_synced(calls, part, written[-1], record)
    check_synced(calls, str(Path(part).parent), made, record, "fsync")
    check_synced(calls, record.path, record, answer)
    named = only([call for call in calls if call.name.startswith("rename")])
    assert named.names == [part, part.replace(".part", ".pack")] and named.ended < answer.began
    synced = [call for call in calls if call.name == "fdatasync" and call.path == record.path]
    assert named.began > synced[0].ended, "named before anything durable refers to it"


def test_every_answer_of_a_window_comes_after_its_records_sync(tmp_path: Path) -> None:
    """Requests that are sent together may share a sync; none is answered by a sync that began before its
    record was written."""
    instances = [make_instance(number=n, padding=3000) for n in range(6)]
    request = AssociateRequest(AE_TITLE, "CT1", (ProposedContext(1, CT, (EXPLICIT,)),), 16384,
                               asynchronous_window=(8, 1))
    together = b"".join(
        data(1, 3, messages.store_request(n + 1, CT, one.sop_instance_uid)) + data(1, 2, one.dataset)
        for n, one in enumerate(instances))
    with forked(tmp_path) as node, traced(node.pid, tmp_path / "trace"), Raw(node.port) as raw:
        raw.associate(request)
        raw.send(together)
        answers = [raw.receive() for _ in instances]
        assert [messages.parse(body[6:]).status for _, body in answers] == [0] * len(instances)
    answer_bytes = len(answers[0][1]) + 6
    assert all(len(body) + 6 == answer_bytes for _, body in answers)
    calls = parse((tmp_path / "trace").read_text())
    records = [call for call in calls if call.writes and RECORD in call.arguments and "/packs/" in call.path]
    syncs = [call for call in calls if call.name == "fdatasync" and "/packs/" in call.path and not call.error]
    assert len(records) == len(instances)
    answered = 0
    for sent in calls:
        if not (sent.to_a_peer and sent.names and sent.names[0].startswith(DATA_PDU)):
            continue
        assert sent.result % answer_bytes == 0
        for record in records[answered : answered + sent.result // answer_bytes]:
            assert any(record.ended < sync.began and sync.ended < sent.began for sync in syncs)
        answered += sent.result // answer_bytes
    assert answered == len(instances)


# ---------------------------------------------------------------- disks that fail


def pack(folder: Path, number: int) -> Path:
    return folder / f"state/packs/{number:08d}.pack"


def check_held(folder: Path, kept: list[Instance], refused: list[Instance]) -> None:
    """After the node is gone: what was acknowledged is whole; what was refused is not there, or whole."""
    with Archive.open(ArchiveSettings(state=folder / "state", free_bytes_min=0), outbox=True) as archive:
        for instance in kept + refused:
            found = archive.instances(instance.study_uid, None, instance.sop_instance_uid)
            assert len(found) == 1 or (not found and instance in refused)
            for one in found:
                assert one.digest == instance.digest
                archive.verify(one)


def test_a_sync_that_fails_is_no_success_and_the_next_pack_takes_over(tmp_path: Path) -> None:
    """51: never tried again on the same file."""
    kept = [make_instance(number=n) for n in range(3)]
    failed = make_instance(number=10)
    with forked(tmp_path) as node:
        with associated(node) as requestor:
            assert [store(requestor, one) for one in kept] == [0, 0, 0]
        fault = failing(node.pid, tmp_path / "trace", "fdatasync", "EIO", pack(tmp_path, 1))
        with fault, associated(node) as requestor:
            assert store(requestor, failed) == 0xA700
            later = make_instance(number=11)
            assert store(requestor, later) == 0, "the disk is well but for one file"
            kept.append(later)
        assert pack(tmp_path, 2).exists()
        tried = [call for call in parse((tmp_path / "trace").read_text()) if call.error == "EIO"]
        assert len(tried) == 1, "a failed sync is never tried again"
        with associated(node) as requestor:
            assert store(requestor, failed) == 0
            kept.append(failed)
            assert requestor.echo() == 0
        node.check_no_surprise()
    check_held(tmp_path, kept, [])


def test_no_sync_at_all_is_no_success_at_all_and_ends_with_the_fault(tmp_path: Path) -> None:
    kept, refused = [make_instance(number=0)], [make_instance(number=n) for n in range(1, 6)]
    with forked(tmp_path) as node:
        with associated(node) as requestor:
            assert store(requestor, kept[0]) == 0
            with failing(node.pid, tmp_path / "trace", "fdatasync", "EIO"):
                assert [store(requestor, one) for one in refused] == [0xA700] * 5
            late = make_instance(number=100)
            assert store(requestor, late) == 0
            assert store(requestor, refused[0]) == 0
        node.check_no_surprise()
    check_held(tmp_path, [*kept, late, refused[0]], refused[1:])


@pytest.mark.parametrize("padding", [4000, 3 << 20])
def test_no_room_for_a_write_is_a700_and_ends_with_the_fault(tmp_path: Path, padding: int) -> None:
    kept, refused = [make_instance(number=0)], [make_instance(number=n, padding=padding) for n in range(1, 4)]
    with forked(tmp_path) as node:
        with associated(node) as requestor:
            assert store(requestor, kept[0]) == 0
            with failing(node.pid, tmp_path / "trace", "pwritev,pwritev2", "ENOSPC"):
                assert [store(requestor, one) for one in refused] == [0xA700] * 3
                assert requestor.echo() == 0
            for one in refused:
                assert store(requestor, one) == 0
        assert not list((tmp_path / "state").glob("large/*.part"))
        node.check_no_surprise()
    check_held(tmp_path, kept + refused, [])


def test_a_failing_sync_of_a_large_object_is_no_success(tmp_path: Path) -> None:
    kept, failed = make_instance(number=0), make_instance(number=1, padding=3 << 20)
    with forked(tmp_path) as node:
        with associated(node) as requestor:
            assert store(requestor, kept) == 0
            with failing(node.pid, tmp_path / "trace", "fsync", "EIO"):  # of its directory
                assert store(requestor, failed) == 0xA700
            assert store(requestor, failed) == 0
        assert len(list((tmp_path / "state").glob("large/*"))) == 1
        node.check_no_surprise()
    check_held(tmp_path, [kept, failed], [])
