"""C-STORE end to end: what arrives is kept byte for byte, what is wrong is answered as PS3.4 Table B.2-1 has
it, and nothing half-received stays."""

from __future__ import annotations

import logging
import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydicom import dcmread
from pynetdicom import AE

from archive.archive import Archive, ArchiveSettings
from archive.errors import SyncFailed
from archive.intake import Ticket
from archive.ledger import Device
from archive.model import Outcome
from node.dimse import messages, pdu
from node.dimse.association import Limits
from node.dimse.contexts import EXPLICIT_LITTLE, STORAGE_SYNTAXES, VERIFICATION
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import ECHO_CONTEXT, Requestor
from tests.datasets import CT, DEFLATED, MR, NATIVE, RLE, Instance, make_instance
from tests.node.serving import AE_TITLE, Raw, data
from tests.node.storing import ISSUER, WARD, Storing, store, storing
from tests.peers import dcmtk
from tests.waiting import wait_for

JPEG = "1.2.840.10008.1.2.4.70"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


@pytest.mark.parametrize("syntax", [*NATIVE, RLE])
def test_every_octet_is_kept(served: Storing, syntax: str) -> None:
    instance = make_instance(transfer_syntax=syntax, padding=30_000)
    assert served.send(instance) == [0]
    stored, = served.stored(instance)
    assert served.dataset(stored) == instance.dataset
    assert stored.digest == instance.digest
    assert stored.head.transfer_syntax_uid == syntax
    provenance = stored.head.provenance
    assert (provenance.ward, provenance.issuer, provenance.device, provenance.calling_ae) == (
        WARD, ISSUER, "CT, room 1", "CT1")
    assert abs(provenance.received_at_us / 1e6 - time.time()) < 60


def test_a_compressed_object_keeps_its_syntax(served: Storing) -> None:
    frames = [random.Random(1).randbytes(5000), random.Random(2).randbytes(333)]
    instance = make_instance(transfer_syntax=JPEG, encapsulated=frames, frames=2)
    assert served.send(instance) == [0]
    stored, = served.stored(instance)
    with served.archive.open_payload(stored.location) as payload:
        read = dcmread(payload)
    assert read.file_meta.TransferSyntaxUID == JPEG
    assert served.dataset(stored) == instance.dataset


def test_a_device_has_its_own_issuer(served: Storing) -> None:
    served.ledger.add_device(Device("US7", "*", issuer="OBSTETRICS"))
    instance = make_instance()
    assert served.send(instance, calling_ae="US7") == [0]
    provenance = served.stored(instance)[0].head.provenance
    assert (provenance.issuer, provenance.device) == ("OBSTETRICS", "US7")


def test_same_content_again_and_other_content(served: Storing) -> None:
    first = make_instance(sop_uid="1.2.3.1", study_uid="1.2.3", series_uid="1.2.3.0", rows=8)
    other = make_instance(sop_uid="1.2.3.1", study_uid="1.2.3", series_uid="1.2.3.0", rows=16)
    assert served.send(first, first, other, first) == [0, 0, 0, 0]
    stored, = served.stored(first)
    assert served.dataset(stored) == first.dataset
    assert served.totals().conflicts == 1
    assert served.totals().instances == 1


def test_one_instance_from_twenty_at_once(served: Storing) -> None:
    instance = make_instance(padding=20_000)
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.extend(served.send(instance))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert statuses == [0] * 20
    assert len(served.stored(instance)) == 1
    assert served.totals().conflicts == 0


BAD_UIDS = ["../../../etc/x", "1.2/3", "1.2.3.a", "1." * 32 + "1", "", "1..2", "01.2", "1.2.", "/etc/passwd"]


@pytest.mark.parametrize("uid", BAD_UIDS)
def test_bad_instance_uids(served: Storing, tmp_path: Path, uid: str) -> None:
    """39: 0117, the UID sent back, the association lives, nothing outside the store."""
    instance = make_instance()
    before = _tree(tmp_path.parent)
    with Requestor.connect(served.peer, "CT1", _contexts(instance)) as requestor:
        context = requestor.context(CT, EXPLICIT_LITTLE)
        assert context is not None
        assert requestor.store(context, uid, [instance.dataset]) == 0x0117
        assert store(requestor, instance) == 0
    outside = {path for path in _tree(tmp_path.parent) - before if tmp_path not in path.parents}
    assert outside == set()
    assert served.totals().instances == 1


def test_what_does_not_match_is_a900(served: Storing) -> None:
    """40, and the class."""
    instance, other = make_instance(), make_instance(number=2)
    no_study = make_instance(number=3)
    proposed = [*_contexts(instance), ProposedContext(9, MR, (EXPLICIT_LITTLE,))]
    with Requestor.connect(served.peer, "CT1", proposed) as requestor:
        context, mr = requestor.context(CT, EXPLICIT_LITTLE), requestor.context(MR, EXPLICIT_LITTLE)
        assert context is not None and mr is not None
        assert requestor.store(context, other.sop_instance_uid, [instance.dataset]) == 0xA900
        assert requestor.store(mr, instance.sop_instance_uid, [instance.dataset]) == 0xA900
        missing = no_study.dataset.replace(b"\x20\x00\x0d\x00UI", b"\x20\x00\x0c\x00UI")
        assert requestor.store(context, no_study.sop_instance_uid, [missing]) == 0xA900
        assert store(requestor, instance) == 0
    assert served.totals().instances == 1


def test_a_command_of_another_class_than_its_context(served: Storing) -> None:
    instance = make_instance(sop_class=MR)
    with Raw(served.port) as raw:
        raw.associate(_request(ProposedContext(1, CT, (EXPLICIT_LITTLE,))))
        raw.send(data(1, 3, messages.store_request(1, MR, instance.sop_instance_uid)))
        raw.send(data(1, 2, instance.dataset))
        assert _answer(raw).status == 0xA900


@pytest.mark.parametrize("dataset", [b"\xff" * 2000, b"not a data set", b"\x08\x00\x05\x00CS\xff\xff"])
def test_what_is_no_data_set_is_refused(served: Storing, dataset: bytes) -> None:
    instance = make_instance()
    with Requestor.connect(served.peer, "CT1", _contexts(instance)) as requestor:
        status = store(requestor, instance, [dataset])
        assert status & 0xF000 in (0xC000, 0xA000), f"{status:04X}"
        assert store(requestor, instance) == 0
    assert served.totals().instances == 1


def test_a_store_without_a_data_set(served: Storing) -> None:
    with Raw(served.port) as raw:
        raw.associate(_request(ProposedContext(1, CT, (EXPLICIT_LITTLE,))))
        raw.send(data(1, 3, messages.build(
            messages.element(0x0002, CT.encode()), messages.short(0x0100, 1), messages.short(0x0110, 3),
            messages.short(0x0800, 0x0101), messages.element(0x1000, b"1.2.3"))))
        answer = _answer(raw)
        assert (answer.status, answer.short(messages.MESSAGE_ID_RESPONDED_TO, 0)) == (0xC000, 3)
        assert answer.affected_sop_instance_uid == "1.2.3"
        assert answer.text(messages.ERROR_COMMENT)


def test_store_over_a_verification_context(served: Storing) -> None:
    with Raw(served.port) as raw:
        raw.associate(_request(ECHO_CONTEXT))
        raw.send(data(1, 3, messages.store_request(1, VERIFICATION, "1.2.3")) + data(1, 2, b"1234"))
        assert _answer(raw).status == 0x0211


def test_full_disk_is_a700_and_the_association_lives(tmp_path: Path) -> None:
    instance = make_instance(padding=300_000)
    with storing(tmp_path, free_bytes_min=1 << 60) as served:
        with Requestor.connect(served.peer, "CT1", [*_contexts(instance), ProposedContext(
                9, VERIFICATION, (EXPLICIT_LITTLE,))]) as requestor:
            assert store(requestor, instance) == 0xA700
            assert store(requestor, instance) == 0xA700
            assert requestor.echo() == 0
        assert served.totals().instances == 0
        assert served.log(1)[0].operations == '{"C-STORE A700": 2, "C-ECHO 0000": 1}'


def test_no_success_without_a_sync(served: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Ticket, timeout_s: float = 30.0) -> None:
        raise SyncFailed("the disk did not confirm")

    monkeypatch.setattr(Ticket, "wait_durable", fail)
    assert served.send(make_instance()) == [0xA700]


def test_a_data_set_that_never_ends_is_cut(tmp_path: Path) -> None:
    """37: the last fragment never set."""
    instance = make_instance()
    limits = Limits(object_bytes_max=3 << 20, message_timeout_s=5.0, artim_s=1.0)
    with storing(tmp_path, limits=limits) as served:
        before = psutil.Process().memory_info().rss
        with Raw(served.port) as raw:
            raw.associate(_request(*_contexts(instance)))
            raw.send(data(1, 3, messages.store_request(1, CT, instance.sop_instance_uid)))
            block = data(1, 0, bytes(100_000))
            with pytest.raises(OSError):
                for _ in range(2000):
                    raw.send(block)
                raise AssertionError("200 MB were taken")
        assert psutil.Process().memory_info().rss - before < 32 << 20
        assert served.log(1)[0].ended == "aborted by us: a data set is larger than its bound"
        assert served.totals().instances == 0
        assert served.archive.intake.budget.taken_bytes == 0


def test_a_connection_cut_anywhere_leaves_nothing(served: Storing) -> None:
    """43: at 100 offsets of one C-STORE."""
    instance = make_instance(padding=9_000)
    conversation = data(1, 3, messages.store_request(1, CT, instance.sop_instance_uid))
    conversation += b"".join(data(1, 0, instance.dataset[at:at + 1000])
                             for at in range(0, len(instance.dataset), 1000)) + data(1, 2, b"")
    for offset in range(1, len(conversation), len(conversation) // 100):
        with Raw(served.port) as raw:
            raw.associate(_request(*_contexts(instance)))
            raw.send(conversation[:offset])
    wait_for(lambda: served.server.connections == 0, "every connection is over", 20)
    assert served.archive.intake.budget.taken_bytes == 0
    assert served.stored(instance) == []
    assert served.totals().instances == 0
    assert served.send(instance) == [0]


def test_large_objects_pass_with_flat_memory(served: Storing) -> None:
    """ST10, smaller: 192 MB while memory grows by less than 48 MB."""
    head = make_instance(rows=0)
    size = 192 << 20
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, size)
    block = bytes(1 << 20)
    peak = 0

    def chunks() -> Iterator[bytes]:
        nonlocal peak
        yield head.dataset + pixels
        for _ in range(192):
            peak = max(peak, psutil.Process().memory_info().rss)
            yield block

    before = psutil.Process().memory_info().rss
    with Requestor.connect(served.peer, "CT1", _contexts(head)) as requestor:
        context = requestor.context(CT, EXPLICIT_LITTLE)
        assert context is not None
        assert requestor.store(context, head.sop_instance_uid, chunks()) == 0
    assert peak - before < 48 << 20
    stored, = served.stored(head)
    assert stored.location.length > size


@pytest.mark.parametrize("nodelay", ["0", "1"])
def test_storescu_is_never_kept_waiting(served: Storing, tmp_path: Path, nodelay: str) -> None:
    """With Nagle on, a missing TCP_QUICKACK costs 40 ms an instance: 150 of them would be 6 s."""
    paths = _written(tmp_path / "out", [make_instance(number=n, padding=4000) for n in range(150)])
    started = time.monotonic()
    _storescu(served.port, *paths, nodelay=nodelay)
    assert time.monotonic() - started < 3
    assert served.totals().instances == 150


def test_storescu_proposes_what_it_has(served: Storing, tmp_path: Path) -> None:
    instances = [make_instance(transfer_syntax=syntax, number=n) for n, syntax in enumerate((*NATIVE, RLE))]
    options = {DEFLATED: ["-xd"], RLE: ["-xr"], NATIVE[0]: ["-xi"], NATIVE[2]: ["-xb"]}
    for n, instance in enumerate(instances):
        paths = _written(tmp_path / f"out{n}", [instance])
        _storescu(served.port, *options.get(instance.transfer_syntax_uid, ["-xe"]), *paths)
    for instance in instances:
        assert served.dataset(served.stored(instance)[0]) == instance.dataset


def test_pynetdicom_sends(served: Storing) -> None:
    ae = AE("CT1")
    ae.add_requested_context(CT, sorted(STORAGE_SYNTAXES, key=lambda uid: uid != EXPLICIT_LITTLE))
    instance = make_instance(padding=200_000)
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE)
    assert association.is_established
    response = association.send_c_store(instance.read())
    assert response.Status == 0
    association.release()
    assert served.stored(instance)


def test_no_patient_in_the_logs(served: Storing, caplog: pytest.LogCaptureFixture) -> None:
    """47."""
    caplog.set_level(logging.DEBUG)
    good = make_instance(patient_name="Geheimnis^Nomen", patient_id="PID99887766")
    with Requestor.connect(served.peer, "CT1", _contexts(good)) as requestor:
        assert store(requestor, good) == 0
        assert store(requestor, good, [good.dataset[:700], b"\xff" * 500]) != 0
        context = requestor.context(CT, EXPLICIT_LITTLE)
        assert context is not None
        assert requestor.store(context, "1.2.3", [good.dataset]) == 0xA900
    rows = repr(served.log(1))
    for text in (caplog.text, rows):
        assert "Geheimnis" not in text and "PID99887766" not in text


def test_what_was_acknowledged_is_there_after_reopening(tmp_path: Path) -> None:
    instances = [make_instance(number=n) for n in range(20)]
    with storing(tmp_path) as served:
        assert served.send(*instances) == [0] * 20
    with Archive.open(ArchiveSettings(state=tmp_path / "state", free_bytes_min=0), outbox=True) as archive:
        for instance in instances:
            assert archive.instances(instance.study_uid, sop_instance_uid=instance.sop_instance_uid)
        assert archive.index.totals().instances == 20


def test_outcomes_are_decided_before_the_answer(served: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Outcome] = []
    wait = Ticket.wait_durable

    def note(self: Ticket, timeout_s: float = 30.0) -> None:
        outcomes.append(self.outcome)
        wait(self, timeout_s)

    monkeypatch.setattr(Ticket, "wait_durable", note)
    instance = make_instance(sop_uid="1.2.3.4")
    assert served.send(instance, instance, make_instance(sop_uid="1.2.3.4", rows=4)) == [0, 0, 0]
    assert outcomes == [Outcome.STORED, Outcome.DUPLICATE, Outcome.CONFLICT]


def _contexts(*instances: Instance) -> list[ProposedContext]:
    return [ProposedContext(2 * n + 1, one.sop_class_uid, (one.transfer_syntax_uid,))
            for n, one in enumerate(instances)]


def _request(*contexts: ProposedContext) -> pdu.AssociateRequest:
    return pdu.AssociateRequest(AE_TITLE, "CT1", contexts, 16384)


def _answer(raw: Raw) -> messages.Command:
    kind, body = raw.receive()
    assert kind == pdu.PduType.P_DATA_TF
    return messages.parse(body[6:])


def _tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def _written(folder: Path, instances: list[Instance]) -> list[str]:
    folder.mkdir()
    paths = [folder / f"{n:04d}.dcm" for n in range(len(instances))]
    for path, instance in zip(paths, instances, strict=True):
        path.write_bytes(instance.part10)
    return [str(path) for path in paths]


def _storescu(port: int, *arguments: str, nodelay: str = "1") -> None:
    command = [dcmtk("storescu"), "-aet", "CT1", "-aec", AE_TITLE, "127.0.0.1", str(port)]
    options = [argument for argument in arguments if argument.startswith("-")]
    files = [argument for argument in arguments if not argument.startswith("-")]
    subprocess.run([*command[:1], *options, *command[1:], *files], check=True, timeout=60,
                   capture_output=True, env={**os.environ, "TCP_NODELAY": nodelay})
