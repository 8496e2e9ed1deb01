"""The requestor's side, against DCMTK's storescp, pynetdicom, and our own server."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pynetdicom import AE, evt
from pynetdicom.events import Event
from pynetdicom.sop_class import _STORAGE_CLASSES
from pynetdicom.transport import ThreadedAssociationServer

from node.dimse import contexts, messages, pdu
from node.dimse.association import Limits
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE
from node.dimse.errors import ConnectionLost, Rejected
from node.dimse.outbox import FileSource, Outbox
from node.dimse.pdu import PduType, ProposedContext
from node.dimse.requestor import ECHO_CONTEXT, Peer, Requestor
from node.dimse.sending import Progress, SendReport, read_meta, send_files
from node.dimse.wire import Buffer, Wire
from tests.datasets import CT, IMPLICIT, MR, RLE, Instance, make_instance
from tests.node.serving import Raw, data, serving
from tests.peers import dcmtk
from tests.waiting import wait_for


def write(folder: Path, instances: list[Instance]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{n:04d}.dcm" for n in range(len(instances))]
    for path, instance in zip(paths, instances, strict=True):
        path.write_bytes(instance.part10)
    return paths


@contextmanager
def storescp(folder: Path, *options: str) -> Iterator[Peer]:
    """DCMTK's storescp, bit-preserving, into `folder`."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen([dcmtk("storescp"), "-od", folder, "+B", "+xa", *options, str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _listens(port), "storescp listens")
        yield Peer("127.0.0.1", port, "DCMTK")
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def dataset_of(path: Path) -> bytes:
    return path.read_bytes()[read_meta(path).dataset_offset:]


@pytest.mark.parametrize("max_pdu", ["4096", "16384", "131072"])
def test_dcmtk_receives_every_octet(tmp_path: Path, max_pdu: str) -> None:
    instances = [make_instance(padding=size, number=size) for size in (0, 4000, 4073, 100_000, 3_000_000)]
    paths = write(tmp_path / "out", instances)
    seen: list[Progress] = []
    with storescp(tmp_path / "in", "-pdu", max_pdu) as peer:
        report = send_files(peer, "MISS", paths, seen.append)
    assert (report.sent, report.failed, report.skipped) == (5, [], [])
    assert report.bytes > 3_100_000
    assert [progress.status for progress in seen] == [0] * 5
    received = {read_meta(path).sop_instance_uid: dataset_of(path) for path in (tmp_path / "in").iterdir()}
    assert received == {instance.sop_instance_uid: instance.dataset for instance in instances}


def test_several_associations_send_everything_once(tmp_path: Path) -> None:
    instances = [make_instance(number=n) for n in range(40)]
    paths = write(tmp_path / "out", instances)
    with storescp(tmp_path / "in", "--fork") as peer:
        report = send_files(peer, "MISS", paths, associations=4)
    assert report.sent == 40
    assert len(list((tmp_path / "in").iterdir())) == 40


def started(ae: AE, handlers: list[Any]) -> tuple[ThreadedAssociationServer, int]:
    """pynetdicom as SCP on a free port."""
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    assert server is not None and server.socket is not None
    return server, server.socket.getsockname()[1]


@contextmanager
def pynetdicom_scp(statuses: list[int] | None = None, *, syntaxes: tuple[str, ...] = (EXPLICIT_LITTLE,),
                   classes: tuple[str, ...] = (CT,)) -> Iterator[tuple[Peer, list[bytes], list[int]]]:
    """pynetdicom as SCP: the data sets it got and the number of contexts of each association."""
    got: list[bytes] = []
    proposals: list[int] = []

    def store(event: Event) -> int:
        request: Any = event.request
        got.append(request.DataSet.getvalue())
        return statuses.pop(0) if statuses else 0

    def requested(event: Event) -> None:
        proposals.append(len(event.assoc.requestor.requested_contexts))

    ae = AE("PEER")
    for uid in classes:
        ae.add_supported_context(uid, list(syntaxes))
    server, port = started(ae, [(evt.EVT_C_STORE, store), (evt.EVT_REQUESTED, requested)])
    try:
        yield Peer("127.0.0.1", port, "PEER"), got, proposals
    finally:
        server.shutdown()


def test_failures_and_what_is_skipped(tmp_path: Path) -> None:
    good, refused, last = (make_instance(number=n) for n in range(3))
    other = make_instance(sop_class=MR)
    implicit = make_instance(transfer_syntax=IMPLICIT)
    paths = write(tmp_path, [good, refused, last, other, implicit])
    (tmp_path / "notes.txt").write_text("no DICOM")
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "cut.dcm").write_bytes(good.part10[:200])
    more = [tmp_path / "notes.txt", tmp_path / "empty.dcm", tmp_path / "cut.dcm", tmp_path / "absent.dcm"]
    with pynetdicom_scp([0x0000, 0xA700, 0xB000]) as (peer, got, _):
        report = send_files(peer, "MISS", [*paths, *more])
    assert got == [good.dataset, refused.dataset, last.dataset]
    assert report.sent == 2
    assert report.failed == [(paths[1], 0xA700), (paths[3], 0x0122), (paths[4], 0x0122)]
    assert [path for path, _ in report.skipped] == more
    assert all(reason for _, reason in report.skipped)


def test_more_than_128_contexts_take_several_associations(tmp_path: Path) -> None:
    classes = sorted(_STORAGE_CLASSES.values())[:140]
    instances = [make_instance(sop_class=uid) for uid in classes]
    paths = write(tmp_path, instances)
    with pynetdicom_scp(classes=tuple(classes[:120])) as (peer, got, proposals):
        report = send_files(peer, "MISS", paths)
    assert proposals == [128, 12]
    assert len(got) == 120 and report.sent == 120
    assert {status for _, status in report.failed} == {0x0122}


def test_an_association_that_ends_costs_one_file(tmp_path: Path) -> None:
    """The peer aborts at the second file; the others go over another association."""
    instances = [make_instance(number=n) for n in range(4)]
    paths = write(tmp_path, instances)
    count = 0

    def store(event: Event) -> int:
        nonlocal count
        count += 1
        if count == 2:
            event.assoc.abort()
        return 0

    ae = AE("PEER")
    ae.add_supported_context(CT, [EXPLICIT_LITTLE])
    server, port = started(ae, [(evt.EVT_C_STORE, store)])
    try:
        report = send_files(Peer("127.0.0.1", port, "PEER"), "MISS", paths)
    finally:
        server.shutdown()
    assert (report.sent, report.failed) == (3, [(paths[1], 0x0110)])


def test_a_peer_that_is_not_there(tmp_path: Path) -> None:
    paths = write(tmp_path, [make_instance()])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(ConnectionLost, match=f"127.0.0.1:{port}"):
        send_files(Peer("127.0.0.1", port, "X"), "MISS", paths)


def test_a_peer_that_rejects(tmp_path: Path) -> None:
    paths = write(tmp_path / "out", [make_instance()])
    with serving(tmp_path) as served, pytest.raises(Rejected, match="calling AE title"):
        send_files(served.peer, "STRANGER", paths)


def test_nothing_to_send(tmp_path: Path) -> None:
    assert send_files(Peer("127.0.0.1", 1, "X"), "MISS", []) == SendReport()


def test_meta_of_what_pydicom_wrote(tmp_path: Path) -> None:
    for syntax in (IMPLICIT, EXPLICIT_LITTLE, RLE):
        instance = make_instance(transfer_syntax=syntax)
        path, = write(tmp_path, [instance])
        meta = read_meta(path)
        assert meta.transfer_syntax_uid == syntax
        assert meta.sop_instance_uid == str(dcmread(path).SOPInstanceUID)
        assert dataset_of(path) == instance.dataset


def test_the_data_set_says_what_it_is(tmp_path: Path) -> None:
    """A file's meta information that names another instance, or none, is not believed."""
    first, second = make_instance(number=1), make_instance(number=2)
    path = tmp_path / "wrong.dcm"
    path.write_bytes(first.part10[:-len(first.dataset)] + second.dataset)
    assert read_meta(path).sop_instance_uid == second.sop_instance_uid
    nameless = first.part10.replace(b"\x02\x00\x03\x00UI", b"\x02\x00\x99\x00UI", 1)
    path.write_bytes(nameless)
    assert read_meta(path).sop_instance_uid == first.sop_instance_uid


def test_odd_chunks_are_fragmented_right(tmp_path: Path) -> None:
    """Chunks that end anywhere, an empty one too, against a peer with a small PDU."""
    instance = make_instance(padding=50_000)
    cuts = [0, 1, 4089, 4090, 4090, 12_345, 40_000, len(instance.dataset)]
    chunks = [instance.dataset[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    proposed = [ProposedContext(1, CT, (EXPLICIT_LITTLE,))]
    with storescp(tmp_path / "in", "-pdu", "4096") as peer:
        with Requestor.connect(peer, "MISS", proposed) as requestor:
            context = requestor.context(CT, EXPLICIT_LITTLE)
            assert context is not None
            assert requestor.store(context, instance.sop_instance_uid, chunks) == 0
            assert requestor.store(context, instance.sop_instance_uid, [instance.dataset]) == 0
        received = [dataset_of(path) for path in (tmp_path / "in").iterdir()]
    assert received == [instance.dataset] * len(received)


def test_echo_with_a_peer_of_another_make() -> None:
    ae = AE("PEER")
    ae.add_supported_context(contexts.VERIFICATION, [IMPLICIT_LITTLE])
    server, port = started(ae, [])
    try:
        peer = Peer("127.0.0.1", port, "PEER")
        with Requestor.connect(peer, "MISS", [ECHO_CONTEXT]) as requestor:
            assert requestor.echo() == 0
            assert requestor.echo() == 0
            assert requestor.accept.implementation_class_uid.startswith("1.2.826.0.1.3680043.9.3811")
    finally:
        server.shutdown()


@pytest.mark.parametrize("nodelay", ["0", "1"])
def test_dcmtk_echoes(tmp_path: Path, nodelay: str) -> None:
    with serving(tmp_path) as served:
        subprocess.run([dcmtk("echoscu"), "-aet", "CT1", "-aec", "MISS", "--repeat", "20", "127.0.0.1",
                        str(served.port)], check=True, timeout=20, env={**os.environ, "TCP_NODELAY": nodelay})
        refused = subprocess.run([dcmtk("echoscu"), "-aet", "CT9", "-aec", "MISS", "127.0.0.1",
                                  str(served.port)], capture_output=True, text=True, timeout=20, check=False)
        assert refused.returncode != 0
        assert "Calling AE Title Not Recognized" in refused.stdout + refused.stderr


def test_pynetdicom_echoes_many_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        results: list[int] = []

        def run() -> None:
            ae = AE("CT1")
            ae.add_requested_context(contexts.VERIFICATION)
            association = ae.associate("127.0.0.1", served.port, ae_title="MISS")
            assert association.is_established
            results.append(association.send_c_echo().Status)
            association.release()

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert results == [0] * 8


# --- peers by hand

class Acceptor:
    """Takes associations one after the other and gives each to a function; what it was sent is counted."""

    def __init__(self, *scripts: Callable[[Raw], None], answer: pdu.AssociateAccept | None = None) -> None:
        self._scripts = scripts
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run)
        self.requests: list[pdu.AssociateRequest] = []
        self.errors: list[BaseException] = []

    def __enter__(self) -> Acceptor:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.join(20)
        self._listener.close()
        assert kind is not None or not self.errors, self.errors

    @property
    def peer(self) -> Peer:
        return Peer("127.0.0.1", self._listener.getsockname()[1], "X")

    def _run(self) -> None:
        try:
            for script in self._scripts:
                self._listener.settimeout(20)
                with Raw.of(self._listener.accept()[0], timeout_s=20.0) as raw:
                    _, body = raw.receive()
                    request = pdu.decode_request(memoryview(body))
                    self.requests.append(request)
                    answers = tuple(pdu.AnsweredContext(context.id, 0, context.transfer_syntaxes[0])
                                    for context in request.contexts)
                    accept = pdu.AssociateAccept("X", "MISS", answers, 16384)
                    raw.send(pdu.encode_accept(
                        accept if self._answer is None else replace(self._answer, contexts=answers)))
                    script(raw)
        except BaseException as error:
            self.errors.append(error)


def take_store(raw: Raw) -> tuple[messages.Command, bytes] | None:
    """The next C-STORE; None when the peer releases, after it was answered, or is gone."""
    command: messages.Command | None = None
    dataset = b""
    while True:
        kind, body = raw.receive()
        if kind == PduType.RELEASE_RQ:
            raw.send(pdu.RELEASE_RP_OCTETS)
            return None
        if kind in (0, PduType.ABORT):
            return None
        assert kind == PduType.P_DATA_TF
        if body[5] & 1:
            command = messages.parse(body[6:])
        else:
            dataset += body[6:]
        if body[5] == 2:
            assert command is not None
            return command, dataset


def reply(raw: Raw, command: messages.Command, status: int = 0, *, number: int | None = None) -> None:
    if number is not None:
        command.message_id = number
    raw.send(data(1, 3, messages.response(command, status)))


def one_by_one(raw: Raw) -> None:
    while (taken := take_store(raw)) is not None:
        reply(raw, taken[0])


@pytest.mark.parametrize(("granted", "open_at_once"),
                         [((3, 1), 3), ((0, 0), 4), ((100, 1), 4), ((1, 1), 1), (None, 1)])
def test_a_window_is_used_as_far_as_it_is_granted(tmp_path: Path, granted: tuple[int, int] | None,
                                                  open_at_once: int) -> None:
    """Four were asked for; the answers come in any order."""
    instances = [make_instance(number=n, padding=n * 100) for n in range(12)]
    paths = write(tmp_path, instances)
    got: list[bytes] = []
    most = 0

    def script(raw: Raw) -> None:
        nonlocal most
        while len(got) < 12:
            batch = []
            for _ in range(open_at_once):
                taken = take_store(raw)
                assert taken is not None
                batch.append(taken[0])
                got.append(taken[1])
            raw.sock.setblocking(False)
            with pytest.raises(BlockingIOError):  # nothing beyond the window
                raw.sock.recv(1)
            raw.sock.settimeout(20)
            most = max(most, len(batch))
            for command in reversed(batch):
                reply(raw, command, 0xB000 if command.message_id == 3 else 0)
        assert take_store(raw) is None

    accept = pdu.AssociateAccept("X", "MISS", (), 16384, asynchronous_window=granted)
    with Acceptor(script, answer=accept) as acceptor:
        report = send_files(acceptor.peer, "MISS", paths, window=4)
    assert (report.sent, report.failed, report.ended) == (12, [], [])
    assert got == [instance.dataset for instance in instances]
    assert acceptor.requests[0].asynchronous_window == (4, 1)
    assert most == open_at_once


def test_no_window_is_asked_for_unless_wanted(tmp_path: Path) -> None:
    with Acceptor(one_by_one) as acceptor:
        assert send_files(acceptor.peer, "MISS", write(tmp_path, [make_instance()])).sent == 1
    assert acceptor.requests[0].asynchronous_window is None


def test_a_peer_that_closes_in_the_middle(tmp_path: Path) -> None:
    """The file without an answer has failed and is not sent again; the rest goes on, and the report says
    how far it was."""
    paths = write(tmp_path, [make_instance(number=n) for n in range(6)])
    seen: list[str] = []

    def closes(raw: Raw) -> None:
        for _ in range(2):
            taken = take_store(raw)
            assert taken is not None
            seen.append(taken[0].affected_sop_instance_uid)
            reply(raw, taken[0])
        third = take_store(raw)
        assert third is not None
        seen.append(third[0].affected_sop_instance_uid)

    def goes_on(raw: Raw) -> None:
        while (taken := take_store(raw)) is not None:
            seen.append(taken[0].affected_sop_instance_uid)
            reply(raw, taken[0])

    with Acceptor(closes, goes_on) as acceptor:
        report = send_files(acceptor.peer, "MISS", paths)
    assert (report.sent, report.failed) == (5, [(paths[2], 0x0110)])
    assert report.ended == ["after 2 instances: the peer closed the connection"]
    assert len(seen) == len(set(seen)) == 6


def test_a_connection_lost_with_a_window_costs_what_was_open(tmp_path: Path) -> None:
    paths = write(tmp_path, [make_instance(number=n) for n in range(8)])

    def closes(raw: Raw) -> None:
        first = take_store(raw)
        for _ in range(3):
            assert take_store(raw) is not None
        assert first is not None
        reply(raw, first[0])
        assert take_store(raw) is not None

    accept = pdu.AssociateAccept("X", "MISS", (), 16384, asynchronous_window=(4, 1))
    with Acceptor(closes, one_by_one, answer=accept) as acceptor:
        report = send_files(acceptor.peer, "MISS", paths, window=4)
    assert report.sent == 4
    assert [path for path, status in report.failed if status == 0x0110] == paths[1:5]
    assert len(report.ended) == 1 and report.ended[0].startswith("after 1 instances: ")


@pytest.mark.parametrize(("wrong", "words"), [
    (lambda raw, command: reply(raw, command, number=99), "a response to another message"),
    (lambda raw, command: reply(raw, messages.parse(messages.echo_request(1))), "a response of another kind"),
    (lambda raw, command: raw.send(data(1, 3, messages.store_request(1, CT, "1.2.3"))),
     "in place of a response"),
    (lambda raw, command: raw.send(data(5, 3, messages.response(command, 0))), "was not accepted"),
    (lambda raw, command: raw.send(pdu.RELEASE_RQ_OCTETS), "released"),
    (lambda raw, command: raw.send(pdu.encode_abort(2, 6)), "aborted"),
    (lambda raw, command: raw.send(b"HTTP/1.1"), "no known type"),
])
def test_answers_that_are_none(tmp_path: Path, wrong: Callable[[Raw, messages.Command], None],
                               words: str) -> None:
    """The association is ended and the file has failed; the next one goes over another association."""
    paths = write(tmp_path, [make_instance(number=n) for n in range(2)])

    def script(raw: Raw) -> None:
        taken = take_store(raw)
        assert taken is not None
        wrong(raw, taken[0])
        while raw.receive()[0] not in (0, PduType.ABORT):
            pass

    with Acceptor(script, one_by_one) as acceptor:
        report = send_files(acceptor.peer, "MISS", paths)
    assert (report.sent, report.failed) == (1, [(paths[0], 0x0110)])
    assert len(report.ended) == 1 and words in report.ended[0]


def test_a_peer_that_says_nothing(tmp_path: Path) -> None:
    paths = write(tmp_path, [make_instance()])

    def silent(raw: Raw) -> None:
        assert take_store(raw) is not None
        assert raw.receive()[0] == PduType.ABORT

    with Acceptor(silent) as acceptor:
        report = send_files(acceptor.peer, "MISS", paths, limits=Limits(message_timeout_s=0.3))
    assert report.failed == [(paths[0], 0x0110)]
    assert "silent" in report.ended[0]


def test_a_peer_that_takes_nothing(tmp_path: Path) -> None:
    """Nothing is sent, each is named, and the end is orderly."""
    paths = write(tmp_path, [make_instance(number=n) for n in range(3)])
    with pynetdicom_scp(classes=(MR,)) as (peer, got, _):
        report = send_files(peer, "MISS", paths)
    assert (report.sent, report.failed, got, report.ended) == (0, [(path, 0x0122) for path in paths], [], [])


def test_a_peer_that_always_closes_is_given_up(tmp_path: Path) -> None:
    paths = write(tmp_path, [make_instance(number=n) for n in range(9)])

    def closes(raw: Raw) -> None:
        assert take_store(raw) is not None

    with Acceptor(closes, closes, closes) as acceptor:
        report = send_files(acceptor.peer, "MISS", paths)
    assert (report.sent, len(report.failed), len(report.ended)) == (0, 9, 3)


def test_a_file_that_ends_early_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shrank after its size was known: its association is ended, as the data set was begun."""
    sizes = (0, 3 << 20, 0)
    paths = write(tmp_path, [make_instance(number=n, padding=size) for n, size in enumerate(sizes)])
    load = Outbox.load

    def shrinking(outbox: Outbox) -> None:
        load(outbox)
        if outbox.left > 0:
            with paths[1].open("r+b") as file:
                file.truncate(1 << 20)

    monkeypatch.setattr(Outbox, "load", shrinking)
    with Acceptor(one_by_one, one_by_one) as acceptor:
        report = send_files(acceptor.peer, "MISS", paths)
    assert report.sent == 2
    assert report.skipped == [(paths[1], "the file can't be read")]
    assert report.ended == ["after 1 instances: the file ends early"]


def test_a_message_is_one_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command and data set go out together, with no small write behind them that would wait for an
    acknowledgement."""
    paths = write(tmp_path, [make_instance(number=n, padding=500_000) for n in range(3)])
    sends: list[int] = []
    send = Wire.send

    def counted(wire: Wire, octets: Buffer) -> None:
        sends.append(len(octets))
        send(wire, octets)

    monkeypatch.setattr(Wire, "send", counted)
    with Acceptor(one_by_one) as acceptor:
        assert send_files(acceptor.peer, "MISS", paths).sent == 3
    assert len([size for size in sends if size > 1000]) == 3
    assert len(sends) == 1 + 3 + 1  # A-ASSOCIATE-RQ and A-RELEASE-RQ


def test_memory_is_flat_whatever_the_size(tmp_path: Path) -> None:
    """256 MiB from a file with a hole to a peer that throws them away, in a sixteenth of that."""
    path, = write(tmp_path, [make_instance()])
    size = 256 << 20
    with path.open("r+b") as file:
        file.truncate(size)
    sink = bytearray(1 << 20)
    received = 0

    def swallow(raw: Raw) -> None:
        nonlocal received
        kind, body = raw.receive()
        command = messages.parse(body[6:])
        while received < size - read_meta(path).dataset_offset:
            head = raw._exactly(12)
            assert head is not None
            left = int.from_bytes(head[6:10], "big") - 2
            received += left
            while left:
                left -= raw.sock.recv_into(memoryview(sink)[:left])
        reply(raw, command)
        assert take_store(raw) is None

    before = psutil.Process().memory_info().rss
    accept = pdu.AssociateAccept("X", "MISS", (), 0)
    with Acceptor(swallow, answer=accept) as acceptor:
        report = send_files(acceptor.peer, "MISS", [path], limits=Limits(message_timeout_s=60.0))
        assert psutil.Process().memory_info().rss - before < 16 << 20
    assert report.sent == 1 and report.bytes == received


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 70_000), fragment=st.integers(1, 20_000).map(lambda n: 2 * n),
       offset=st.integers(0, 300), later=st.integers(0, 5_000))
def test_an_outbox_cuts_a_file_into_fragments(size: int, fragment: int, offset: int, later: int) -> None:
    """Two files through one outbox: every octet, whole fragments but for the last, which alone is marked."""
    with tempfile.TemporaryFile() as file:
        outbox = Outbox(fragment)
        for context_id, length in ((1, size), (1, later), (3, size)):
            content = random.Random(length).randbytes(length)
            file.seek(0)
            file.truncate()
            file.write(bytes(offset) + content)
            file.flush()
            outbox.begin(FileSource(file.fileno(), offset, length), context_id)
            octets = b""
            while not octets or outbox.left:
                outbox.load()
                octets += outbox.octets
            found, at = b"", 0
            while at < len(octets):
                kind, pdu_length, value_length, context, control = struct.unpack_from(">BxIIBB", octets, at)
                piece = octets[at + 12:at + 6 + pdu_length]
                at += 6 + pdu_length
                assert (kind, pdu_length - 4, context) == (4, value_length, context_id)
                assert control == (2 if at == len(octets) else 0)
                assert len(piece) == fragment or control == 2
                found += piece
            assert found == content
