"""The requestor's side, against DCMTK's storescp, pynetdicom, and our own server."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pynetdicom import AE, evt
from pynetdicom.events import Event
from pynetdicom.sop_class import _STORAGE_CLASSES
from pynetdicom.transport import ThreadedAssociationServer

from node.dimse import contexts
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE
from node.dimse.errors import ConnectionLost, Rejected
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import ECHO_CONTEXT, Peer, Requestor
from node.dimse.sending import Progress, SendReport, read_meta, send_files
from tests.datasets import CT, IMPLICIT, MR, RLE, Instance, make_instance
from tests.node.serving import serving, wait_for
from tests.peers import dcmtk


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
