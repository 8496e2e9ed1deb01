"""C-GET end to end: sub-operations over the requestor's own association (PS3.4 C.4.3; M1 to M6, M8)."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import build_context

from archive.model import StoredInstance
from node.dimse import messages, pdu
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE, PATIENT_ROOT_GET, STUDY_ROOT_GET
from node.dimse.identifiers import read_identifier, write_identifier
from node.dimse.messages import Command, Field
from node.dimse.outbox import Source
from node.dimse.payloads import Supply
from node.dimse.pdu import ProposedContext, Role
from node.dimse.services.suboperations import Turns
from tests.datasets import BIG_ENDIAN, CT, DEFLATED, EXPLICIT, IMPLICIT, MR, RLE, Instance, make_instance
from tests.node.serving import AE_TITLE, Raw, data
from tests.node.storing import Storing, storing
from tests.node.test_move import counts_of, series
from tests.peers import dcmtk


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


class Getter:
    """A C-GET SCU by hand: it answers each C-STORE as it is told, and keeps what came."""

    def __init__(self, served: Storing, *takes: tuple[str, tuple[str, ...]], model: str = STUDY_ROOT_GET,
                 window: tuple[int, int] | None = None) -> None:
        self.raw = Raw(served.port)
        proposed = [ProposedContext(1, model, (EXPLICIT_LITTLE,))]
        proposed += [ProposedContext(2 * n + 3, *each) for n, each in enumerate(takes)]
        roles = tuple(Role(uid, scu=False, scp=True) for uid in dict.fromkeys(uid for uid, _ in takes))
        self.accept = self.raw.associate(pdu.AssociateRequest(
            AE_TITLE, "CT1", tuple(proposed), 65_536, roles=roles, asynchronous_window=window))
        self.syntaxes = {answer.id: answer.transfer_syntax for answer in self.accept.contexts
                         if answer.result == 0}
        self.model = model
        self.received: dict[str, Instance] = {}
        self.pending: list[tuple[int | None, ...]] = []

    def __enter__(self) -> Getter:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.sock.close()

    def ask(self, level: str, **keys: str | list[str]) -> None:
        identifier = Dataset()
        identifier.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(identifier, keyword, value)
        self.raw.send(data(1, 3, messages.query_request(Field.C_GET, 7, self.model))
                      + data(1, 2, write_identifier(identifier, EXPLICIT_LITTLE)))

    def cancel(self) -> None:
        self.raw.send(data(1, 3, messages.cancel_request(7)))

    def answer(self, context_id: int, command: Command, status: int = 0) -> None:
        self.raw.send(data(context_id, 3, messages.response(command, status)))

    def message(self) -> tuple[int, Command, bytes]:
        """The next one, whole."""
        command_octets = dataset = b""
        command: Command | None = None
        while True:
            kind, body = self.raw.receive()
            assert kind == pdu.PduType.P_DATA_TF, (kind, body)
            context_id, control = body[4], body[5]
            assert int.from_bytes(body[:4], "big") == len(body) - 4
            if control & 1:
                command_octets += body[6:]
                if control & 2:
                    command = messages.parse(command_octets)
            else:
                dataset += body[6:]
            if control & 2 and command is not None and (not control & 1 or not command.has_dataset):
                return context_id, command, dataset

    def end(self, status: Callable[[str], int] = lambda uid: 0,
            ) -> tuple[int, tuple[int | None, ...], list[str]]:
        """Take all until the final response: its status, counts and failures."""
        while True:
            context_id, command, dataset = self.message()
            if command.field == Field.C_STORE:
                self.keep(context_id, command, dataset)
                self.answer(context_id, command, status(command.affected_sop_instance_uid))
                continue
            assert command.short(messages.MESSAGE_ID_RESPONDED_TO, -1) == 7
            if command.status == 0xFF00:
                self.pending.append(counts_of(command))
                continue
            found: Sequence[str] = ()
            if command.has_dataset:
                found = read_identifier(dataset, EXPLICIT_LITTLE).FailedSOPInstanceUIDList
            return command.status, counts_of(command), [found] if isinstance(found, str) else list(found)

    def keep(self, context_id: int, command: Command, dataset: bytes) -> None:
        assert messages.MOVE_ORIGINATOR_AE not in command.elements
        uid = command.affected_sop_instance_uid
        self.received[uid] = Instance(command.affected_sop_class_uid, uid, self.syntaxes[context_id], "", "",
                                      dataset)


def test_a_study_comes_over_the_same_association(served: Storing) -> None:
    sent = series(4, padding=100_000)
    served.send(*sent)
    with Getter(served, (CT, (EXPLICIT,))) as getter:
        for _ in range(2):  # the association lives on
            getter.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            assert getter.end() == (0, (None, 4, 0, 0), [])
        assert getter.pending == [(4, 0, 0, 0), (3, 1, 0, 0), (2, 2, 0, 0), (1, 3, 0, 0)] * 2
    assert {uid: one.dataset for uid, one in getter.received.items()} == {
        one.sop_instance_uid: one.dataset for one in sent}


@pytest.mark.parametrize(("answers", "status", "counts"), [
    ((0, 0xA700, 0), 0xB000, (None, 2, 1, 0)),
    ((0xB000, 0xB000, 0xB000), 0xB000, (None, 0, 0, 3)),
    ((0xA700, 0xC000, 0x0110), 0xA702, (None, 0, 3, 0)),
])
def test_the_final_status_is_by_the_rules(served: Storing, answers: tuple[int, ...], status: int,
                                          counts: tuple[int | None, ...]) -> None:
    sent = series(3)
    served.send(*sent)
    by_uid = {one.sop_instance_uid: answer for one, answer in zip(sent, answers, strict=True)}
    with Getter(served, (CT, (EXPLICIT,))) as getter:
        getter.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
        failed = [uid for uid, answer in by_uid.items() if answer and not 0xB000 <= answer < 0xC000]
        assert getter.end(lambda uid: by_uid[uid]) == (status, counts, failed)


def test_without_a_context_in_which_it_is_scp_an_instance_fails(served: Storing) -> None:
    ct, mr = series(1)[0], series(1, sop_class=MR, patient_id="P2")[0]
    served.send(ct, mr)
    with Getter(served, (CT, (EXPLICIT,))) as getter:
        getter.ask("STUDY", StudyInstanceUID=[ct.study_uid, mr.study_uid])
        assert getter.end() == (0xB000, (None, 1, 1, 0), [mr.sop_instance_uid])
    with Getter(served) as getter:
        getter.ask("STUDY", StudyInstanceUID=ct.study_uid)
        assert getter.end() == (0xA702, (None, 0, 1, 0), [ct.sop_instance_uid])


@pytest.mark.parametrize("target", [EXPLICIT, IMPLICIT])
def test_all_that_is_stored_can_be_had_natively(served: Storing, target: str) -> None:
    """M8; with an explicit native syntax among the proposed ones, that is chosen."""
    sent = [make_instance(transfer_syntax=syntax, rows=16, columns=16, number=n)
            for n, syntax in enumerate((EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED, RLE))]
    served.send(*sent)
    with Getter(served, (CT, (RLE, target))) as getter:
        assert getter.syntaxes[3] == target
        getter.ask("STUDY", StudyInstanceUID=[one.study_uid for one in sent])
        assert getter.end() == (0, (None, 5, 0, 0), [])
    for one in sent:
        got = getter.received[one.sop_instance_uid].read()
        assert (got.pixel_array == one.read().pixel_array).all(), one.transfer_syntax_uid
        assert got.PatientName == one.read().PatientName


def test_a_list_that_is_too_long_for_its_vr(served: Storing) -> None:
    """Past 64 KiB a UI of explicit VR is told as UN (PS3.5 6.2.2)."""
    sent = series(3)
    served.send(*sent)
    others = [str(generate_uid()) for _ in range(1500)]
    with Getter(served, (CT, (EXPLICIT,))) as getter:
        getter.ask("IMAGE", StudyInstanceUID=sent[0].study_uid, SeriesInstanceUID=sent[0].series_uid,
                   SOPInstanceUID=[*others, *(one.sop_instance_uid for one in sent[1:])])
        assert getter.end() == (0, (None, 2, 0, 0), [])
    assert set(getter.received) == {one.sop_instance_uid for one in sent[1:]}


def test_an_identifier_that_does_not_fit_is_a900(served: Storing) -> None:
    with Getter(served, (CT, (EXPLICIT,)), model=PATIENT_ROOT_GET) as getter:
        getter.ask("STUDY", StudyInstanceUID="1.2")
        assert getter.end() == (0xA900, (None,) * 4, [])
        getter.ask("PATIENT", PatientID="NOBODY")
        assert getter.end() == (0, (None, 0, 0, 0), [])


def test_cancel_before_the_response(served: Storing) -> None:
    """C-CANCEL comes between a C-STORE-RQ and its response: that one is finished, no other is begun."""
    sent = series(5)
    served.send(*sent)
    with Getter(served, (CT, (EXPLICIT,))) as getter:
        getter.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
        getter.message()
        context_id, command, dataset = getter.message()
        getter.keep(context_id, command, dataset)
        getter.cancel()
        getter.answer(context_id, command)
        assert getter.end() == (0xFE00, (4, 1, 0, 0), [])
        getter.ask("STUDY", StudyInstanceUID=sent[0].study_uid)  # nothing of it is left over
        assert getter.end() == (0, (None, 5, 0, 0), [])


def test_a_window_is_used(served: Storing) -> None:
    """Three sub-operations come before one is answered, and are answered in another order."""
    sent = series(6)
    served.send(*sent)
    with Getter(served, (CT, (EXPLICIT,)), window=(1, 3)) as getter:
        assert getter.accept.asynchronous_window == (1, 3)
        getter.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
        held: list[tuple[int, Command]] = []
        while len(held) < 3:
            context_id, command, dataset = getter.message()
            if command.field == Field.C_STORE:
                getter.keep(context_id, command, dataset)
                held.append((context_id, command))
        for context_id, command in reversed(held):
            getter.answer(context_id, command)
        assert getter.end() == (0, (None, 6, 0, 0), [])


def test_an_evicted_instance_fails_and_the_rest_arrive(served: Storing) -> None:
    from archive.packs import holes

    first, second = sent = series(2, padding=50_000)
    served.send(*sent)
    place = served.stored(first)[0].location
    if not holes.can_punch(served.archive.settings.state):
        pytest.skip("the file system makes no holes")
    start, end = holes.span_of(place)
    with (served.archive.settings.state / place.pack).open("r+b") as file:
        holes.punch(file.fileno(), start, end - start)
    with Getter(served, (CT, (EXPLICIT,))) as getter:
        getter.ask("STUDY", StudyInstanceUID=first.study_uid)
        assert getter.end() == (0xB000, (None, 1, 1, 0), [first.sop_instance_uid])
    assert getter.received[second.sop_instance_uid].dataset == second.dataset


def test_an_error_that_nobody_foresaw_costs_the_one_instance(
        served: Storing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    first, second = sent = series(2)
    served.send(*sent)
    secret, whole = "ROSSI^MARIA", Supply.open

    def opening(self: Supply, instance: StoredInstance, transfer_syntax_uid: str) -> Source:
        if instance.head.sop_instance_uid == first.sop_instance_uid:
            raise ValueError(secret)
        return whole(self, instance, transfer_syntax_uid)

    monkeypatch.setattr(Supply, "open", opening)
    with Getter(served, (CT, (EXPLICIT,))) as getter:
        getter.ask("STUDY", StudyInstanceUID=first.study_uid)
        assert getter.end() == (0xB000, (None, 1, 1, 0), [first.sop_instance_uid])
    assert set(getter.received) == {second.sop_instance_uid} and secret not in caplog.text


def test_a_hole_in_the_middle_of_a_large_one_aborts(served: Storing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first megabyte is gone already: nothing but A-ABORT keeps the zeros from being an image."""
    from archive.errors import EVICTED, Evicted
    from archive.packs.packs import StoredDataset

    large = make_instance(padding=3 << 20)
    served.send(large)
    asked: list[StoredDataset] = []

    def confirm(self: StoredDataset) -> None:
        asked.append(self)
        if len(asked) > 1:  # not as it is opened, but after the last read
            raise Evicted(EVICTED)

    monkeypatch.setattr(StoredDataset, "confirm", confirm)
    with Getter(served, (CT, (EXPLICIT,))) as getter:
        getter.ask("STUDY", StudyInstanceUID=large.study_uid)
        kinds: list[int] = []
        while not kinds or kinds[-1] == pdu.PduType.P_DATA_TF:
            kind, body = getter.raw.receive()
            assert kind != pdu.PduType.P_DATA_TF or body[5] != pdu.LAST_FRAGMENT, "the last fragment went out"
            kinds.append(kind)
        assert kinds[-1] == pdu.PduType.ABORT


def test_too_many_wait_in_turn(tmp_path: Path) -> None:
    with storing(tmp_path, turns=Turns(1, 1, 0.1)) as served:
        sent = series(2)
        served.send(*sent)
        with Getter(served, (CT, (EXPLICIT,))) as first, Getter(served, (CT, (EXPLICIT,))) as second:
            first.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            first.message()  # it has its turn
            second.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            assert second.end() == (0xA702, (None,) * 4, [])


def test_memory_is_flat_whatever_the_size(served: Storing) -> None:
    """384 MiB, stored and fetched, in a sixteenth of that."""
    large = make_instance(padding=1 << 20)
    size = 384
    dataset = memoryview(large.dataset)
    # Trailing padding of the standard (FFFC,FFFC) as long as it takes, in pieces.
    head = dataset.tobytes() + b"\xfc\xff\xfc\xffOB\0\0" + (size << 20).to_bytes(4, "little")
    piece = bytes(1 << 20)
    from node.dimse.requestor import Requestor

    with Requestor.connect(served.peer, "CT1", [ProposedContext(1, CT, (EXPLICIT,))]) as requestor:
        context = requestor.context(CT, EXPLICIT)
        assert context is not None
        assert requestor.store(context, large.sop_instance_uid,
                               (head, *(piece for _ in range(size)))) == 0
    served.archive.wait_indexed()
    process, peak = psutil.Process(), 0
    before = process.memory_info().rss
    with Getter(served, (CT, (EXPLICIT,))) as getter:
        getter.ask("STUDY", StudyInstanceUID=large.study_uid)
        received, last, command = 0, 0, None
        while not last & 2 or last & 1:
            kind, body = getter.raw.receive()
            assert kind == pdu.PduType.P_DATA_TF
            last = body[5]
            if last & 1:
                command = messages.parse(body[6:])
            else:
                received += len(body) - 6
            peak = max(peak, process.memory_info().rss)
        assert command is not None and command.field == Field.C_STORE
        getter.answer(3, command)
        assert getter.end() == (0, (None, 1, 0, 0), [])
    assert received == len(head) + (size << 20)
    assert peak - before < 24 << 20


def test_dcmtk_gets_a_study(served: Storing, tmp_path: Path) -> None:
    sent = series(7, padding=40_000)
    served.send(*sent)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run([dcmtk("getscu"), "-S", "+B", "-aet", "CT1", "-aec", "MISS", "-od", str(out),
                    "-k", "0008,0052=STUDY", "-k", f"0020,000d={sent[0].study_uid}",
                    "127.0.0.1", str(served.port)], check=True, timeout=60, capture_output=True, cwd=out)
    files = [path.read_bytes() for path in out.iterdir()]
    assert len(files) == 7
    assert all(any(file.endswith(one.dataset) for file in files) for one in sent)


def test_dcmtk_that_prefers_a_compressed_syntax_gets_all(served: Storing, tmp_path: Path) -> None:
    """getscu +xs proposes JPEG Lossless and the native ones in one context: what is stored natively can't be
    had in the former."""
    sent = [*series(1), *series(1, transfer_syntax=RLE, rows=16, columns=16)]
    served.send(*sent)
    subprocess.run([dcmtk("getscu"), "-S", "+xs", "-aet", "CT1", "-aec", "MISS", "-od", str(tmp_path),
                    "-k", "0008,0052=STUDY",
                    "-k", f"0020,000d={sent[0].study_uid}\\{sent[1].study_uid}",
                    "127.0.0.1", str(served.port)], check=True, timeout=60, capture_output=True, cwd=tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("CT")]) == 2


def test_pynetdicom_gets_a_study(served: Storing) -> None:
    sent = series(3)
    served.send(*sent)
    got: list[str] = []
    lock = threading.Lock()

    def stored(event: evt.Event) -> int:
        with lock:
            got.append(str(event.dataset.SOPInstanceUID))
        return 0x0000

    ae = AE("CT1")
    ae.requested_contexts = [build_context(STUDY_ROOT_GET), build_context(CT)]
    role = SCP_SCU_RoleSelectionNegotiation()
    role.sop_class_uid, role.scu_role, role.scp_role = CT, False, True
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE, ext_neg=[role],
                               evt_handlers=[(evt.EVT_C_STORE, stored)])
    assert association.is_established
    identifier = Dataset()
    identifier.QueryRetrieveLevel, identifier.StudyInstanceUID = "STUDY", sent[0].study_uid
    statuses = [status.Status for status, _ in association.send_c_get(identifier, STUDY_ROOT_GET)]
    association.release()
    assert statuses == [0xFF00] * 3 + [0]
    assert sorted(got) == sorted(one.sop_instance_uid for one in sent)
    assert IMPLICIT_LITTLE in str(ae.requested_contexts[1].transfer_syntax)  # pynetdicom's own preference
