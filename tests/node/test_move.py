"""C-MOVE end to end: levels, counts, statuses, cancel, destinations that fail (PS3.4 C.4.2; M1 to M9)."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from archive.ledger import Device
from miss.processes import free_ports
from node.dimse import messages
from node.dimse.contexts import (
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    PATIENT_ROOT_MOVE,
    PATIENT_STUDY_ONLY_MOVE,
    STUDY_ROOT_MOVE,
)
from node.dimse.identifiers import read_identifier, write_identifier
from node.dimse.messages import Command, Field
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from node.dimse.services.suboperations import Turns
from tests.datasets import CT, EXPLICIT, MR, RLE, Instance, make_instance
from tests.node.receiving import Receiver, receiver
from tests.node.storing import Storing, storing
from tests.peers import dcmtk
from tests.waiting import wait_for

COUNTS = (messages.REMAINING_SUBOPERATIONS, messages.COMPLETED_SUBOPERATIONS, messages.FAILED_SUBOPERATIONS,
          messages.WARNING_SUBOPERATIONS)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


class Mover:
    """A C-MOVE SCU, by hand."""

    def __init__(self, served: Storing, destination: str = "OTHER", model: str = STUDY_ROOT_MOVE,
                 syntax: str = EXPLICIT_LITTLE) -> None:
        self.requestor = Requestor.connect(served.peer, "CT1", [ProposedContext(1, model, (syntax,))])
        self.context = self.requestor.context_of(model)
        self.model, self.destination, self.syntax = model, destination, syntax
        self.message_id = 0

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.requestor.__exit__(kind)

    def ask(self, level: str, **keys: str | list[str]) -> None:
        identifier = Dataset()
        identifier.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(identifier, keyword, value)
        self.message_id = self.requestor.next_message_id()
        request = messages.query_request(Field.C_MOVE, self.message_id, self.model,
                                         move_destination=self.destination)
        assert self.context is not None
        self.requestor.association.send(self.context, request, write_identifier(identifier, self.syntax))

    def cancel(self) -> None:
        assert self.context is not None
        self.requestor.association.send(self.context, messages.cancel_request(self.message_id))

    def response(self) -> tuple[Command, list[str] | None]:
        """The next one, and its Failed SOP Instance UID List."""
        answer = self.requestor.association.receive_response()
        assert answer.short(messages.MESSAGE_ID_RESPONDED_TO, -1) == self.message_id
        if not answer.has_dataset:
            return answer, None
        assert self.context is not None
        octets = self.requestor.association.read_dataset(self.context, 1 << 20)
        found = read_identifier(octets, self.syntax).FailedSOPInstanceUIDList
        return answer, [found] if isinstance(found, str) else list(found)

    def end(self) -> tuple[int, tuple[int | None, ...], list[str] | None]:
        """Status, the four counts and the failures of the final response; every pending one is right."""
        while True:
            answer, failed = self.response()
            counts = counts_of(answer)
            if answer.status != 0xFF00:
                return answer.status, counts, failed
            assert None not in counts and failed is None


def counts_of(answer: Command) -> tuple[int | None, ...]:
    return tuple(answer.short(number, 0) if number in answer.elements else None for number in COUNTS)


def listed(served: Storing, peer: Receiver, ae_title: str = "OTHER") -> None:
    served.ledger.add_device(Device(ae_title, "127.0.0.1", "another", port=peer.port))


def series(count: int, **options: Any) -> list[Instance]:
    first = make_instance(number=1, **options)
    options |= {"study_uid": first.study_uid, "series_uid": first.series_uid}
    return [first, *(make_instance(number=n, **options) for n in range(2, count + 1))]


@pytest.mark.parametrize("syntax", [EXPLICIT_LITTLE, IMPLICIT_LITTLE])
def test_a_study_arrives_and_is_counted(served: Storing, syntax: str) -> None:
    sent = series(5)
    served.send(*sent)
    with receiver() as peer:
        listed(served, peer)
        with Mover(served, syntax=syntax) as mover:
            mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            first, _ = mover.response()
            assert (first.status, counts_of(first)) == (0xFF00, (5, 0, 0, 0))
            assert mover.end() == (0x0000, (None, 5, 0, 0), None)
            assert {got.originator_message_id for got in peer.received.values()} == {mover.message_id}
    assert {uid: got.dataset for uid, got in peer.received.items()} == {
        one.sop_instance_uid: one.dataset for one in sent}
    assert {got.originator for got in peer.received.values()} == {"CT1"}


def test_levels_models_and_lists(served: Storing) -> None:
    one, other = series(3, patient_id="P1"), series(2, patient_id="P1")
    second = series(2, patient_id="P1", study_uid=one[0].study_uid)
    foreign = series(1, patient_id="P2")
    served.send(*one, *other, *second, *foreign)
    study, series_uid = one[0].study_uid, one[0].series_uid
    of_image = {"StudyInstanceUID": study, "SeriesInstanceUID": series_uid}
    two = [each.sop_instance_uid for each in one[:2]]
    asked: list[tuple[str, str, dict[str, str | list[str]], list[Instance]]] = [
        (STUDY_ROOT_MOVE, "STUDY", {"StudyInstanceUID": [study, other[0].study_uid]},
         [*one, *second, *other]),
        (STUDY_ROOT_MOVE, "SERIES", {"StudyInstanceUID": study, "SeriesInstanceUID": series_uid}, one),
        (STUDY_ROOT_MOVE, "SERIES", {"StudyInstanceUID": study,
                                     "SeriesInstanceUID": [series_uid, second[0].series_uid]},
         [*one, *second]),
        (STUDY_ROOT_MOVE, "IMAGE", {**of_image, "SOPInstanceUID": two[0]}, one[:1]),
        (STUDY_ROOT_MOVE, "IMAGE", {**of_image, "SOPInstanceUID": two}, one[:2]),
        (PATIENT_ROOT_MOVE, "PATIENT", {"PatientID": "P1"}, [*one, *second, *other]),
        (PATIENT_ROOT_MOVE, "STUDY", {"PatientID": "P1", "StudyInstanceUID": study}, [*one, *second]),
        (PATIENT_ROOT_MOVE, "STUDY", {"PatientID": "P2", "StudyInstanceUID": study}, []),
        (PATIENT_ROOT_MOVE, "IMAGE", {"PatientID": "P1", **of_image, "SOPInstanceUID": two}, one[:2]),
        (PATIENT_STUDY_ONLY_MOVE, "PATIENT", {"PatientID": "P2"}, foreign),
    ]
    for model, level, keys, expected in asked:
        with receiver() as peer:
            ae_title = f"OTHER{peer.port}"
            listed(served, peer, ae_title)
            with Mover(served, ae_title, model) as mover:
                mover.ask(level, **keys)
                assert mover.end() == (0, (None, len(expected), 0, 0), None), (model, level)
            assert set(peer.received) == {each.sop_instance_uid for each in expected}, (model, level)


@pytest.mark.parametrize(("model", "level", "keys"), [
    (STUDY_ROOT_MOVE, "PATIENT", {"PatientID": "P1"}),
    (STUDY_ROOT_MOVE, "", {"StudyInstanceUID": "1.2"}),
    (STUDY_ROOT_MOVE, "STUDY", {}),
    (STUDY_ROOT_MOVE, "STUDY", {"StudyInstanceUID": "1.2.*"}),
    (STUDY_ROOT_MOVE, "SERIES", {"SeriesInstanceUID": "1.2"}),
    (STUDY_ROOT_MOVE, "SERIES", {"StudyInstanceUID": ["1.2", "1.3"], "SeriesInstanceUID": "1.2"}),
    (PATIENT_ROOT_MOVE, "STUDY", {"StudyInstanceUID": "1.2"}),
    (PATIENT_ROOT_MOVE, "PATIENT", {"PatientID": "P*"}),
    (PATIENT_ROOT_MOVE, "PATIENT", {"PatientID": ["P1", "P2"]}),
    (PATIENT_STUDY_ONLY_MOVE, "SERIES", {"PatientID": "P1", "StudyInstanceUID": "1.2",
                                         "SeriesInstanceUID": "1.2"}),
])
def test_an_identifier_that_does_not_fit_is_a900(served: Storing, model: str, level: str,
                                                 keys: dict[str, str | list[str]]) -> None:
    with receiver() as peer:
        listed(served, peer)
        with Mover(served, model=model) as mover:
            mover.ask(level, **keys)
            assert mover.end() == (0xA900, (None,) * 4, None)


@pytest.mark.parametrize(("level", "keys", "offending"), [
    ("", {"StudyInstanceUID": "1.2"}, b"\x08\x00\x52\x00"),
    ("STUDY", {"StudyInstanceUID": "1.2.*"}, b"\x20\x00\x0d\x00"),
    ("IMAGE", {"StudyInstanceUID": "1.2", "SOPInstanceUID": "1.3"}, b"\x20\x00\x0e\x00"),
])
def test_the_offending_element_of_an_identifier_is_named(served: Storing, level: str, keys: dict[str, str],
                                                         offending: bytes) -> None:
    """PS3.4 Table C.4-2."""
    with receiver() as peer:
        listed(served, peer)
        with Mover(served) as mover:
            mover.ask(level, **keys)
            answer, _ = mover.response()
    assert answer.status == 0xA900
    assert answer.elements[messages.OFFENDING_ELEMENT] == offending


def test_an_unknown_destination_is_a801(served: Storing) -> None:
    sent = series(1)
    served.send(*sent)
    for destination in ("NOBODY", "CT1", ""):  # CT1 is a device, and nobody said where it listens
        with Mover(served, destination) as mover:
            mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            assert mover.end() == (0xA801, (None,) * 4, None)


def test_why_a_destination_can_not_be_called_fits_the_comment(served: Storing) -> None:
    with Mover(served, "CT1") as mover:  # a device of which nobody said where it listens
        mover.ask("STUDY", StudyInstanceUID="1.2.3")
        answer, _ = mover.response()
    comment = answer.elements[messages.ERROR_COMMENT].decode().strip()
    assert comment == "nobody said where this device listens: `miss device add --port`"


def test_nothing_that_matches_is_a_success(served: Storing) -> None:
    with receiver() as peer:
        listed(served, peer)
        with Mover(served) as mover:
            mover.ask("STUDY", StudyInstanceUID="1.2.3")
            assert mover.end() == (0, (None, 0, 0, 0), None)
        assert peer.associations == 0


@pytest.mark.parametrize(("answers", "status", "counts"), [
    ((0, 0, 0), 0x0000, (None, 3, 0, 0)),
    ((0, 0xA700, 0), 0xB000, (None, 2, 1, 0)),
    ((0, 0xB000, 0), 0xB000, (None, 2, 0, 1)),
    ((0xB000, 0xB007, 0xB006), 0xB000, (None, 0, 0, 3)),
    ((0xA700, 0xC000, 0x0110), 0xA702, (None, 0, 3, 0)),
    ((0xB000, 0xA900, 0), 0xB000, (None, 1, 1, 1)),
])
def test_the_final_status_is_by_the_rules(served: Storing, answers: tuple[int, ...], status: int,
                                          counts: tuple[int | None, ...]) -> None:
    sent = series(3)
    served.send(*sent)
    by_uid = {one.sop_instance_uid: answer for one, answer in zip(sent, answers, strict=True)}
    with receiver(status=lambda uid: by_uid[uid]) as peer:
        listed(served, peer)
        with Mover(served) as mover:
            mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            failed = [uid for uid, answer in by_uid.items() if answer and not 0xB000 <= answer < 0xC000]
            assert mover.end() == (status, counts, failed or None)


def test_a_destination_that_is_away_or_refuses(served: Storing) -> None:
    sent = series(2)
    served.send(*sent)
    uids = sorted(one.sop_instance_uid for one in sent)
    with receiver(takes={MR: (EXPLICIT,)}) as peer:  # MR only
        listed(served, peer)
        for _ in range(2):
            with Mover(served) as mover:
                mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
                status, counts, failed = mover.end()
                assert (status, counts, sorted(failed or ())) == (0xA702, (None, 0, 2, 0), uids)
            peer.kill()  # the second time nobody listens


def test_only_implicit_is_taken(served: Storing) -> None:
    sent = [*series(1), *series(1, transfer_syntax=RLE, rows=16, columns=16)]
    served.send(*sent)
    with receiver(takes={CT: (IMPLICIT_LITTLE,)}) as peer:
        listed(served, peer)
        with Mover(served) as mover:
            mover.ask("STUDY", StudyInstanceUID=[one.study_uid for one in sent])
            assert mover.end() == (0, (None, 2, 0, 0), None)
    got = peer.received[sent[1].sop_instance_uid]
    assert got.transfer_syntax_uid == IMPLICIT_LITTLE
    assert (got.read().pixel_array == sent[1].read().pixel_array).all()


def test_cancel_in_the_middle(served: Storing) -> None:
    """The destination holds its answer back: the second is under way, and is cut after its grace."""
    sent = series(6)
    served.send(*sent)
    gate = threading.Event()
    with receiver(gate=gate) as peer:
        listed(served, peer)
        with Mover(served) as mover:
            mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            assert peer.arrived.acquire(timeout=10)
            mover.cancel()
            status, counts, failed = mover.end()
    assert (status, counts) == (0xFE00, (5, 0, 1, 0))
    assert failed == list(peer.received)


def test_cancel_lets_what_is_under_way_finish(served: Storing) -> None:
    sent = series(6)
    served.send(*sent)
    gate = threading.Event()
    with receiver(gate=gate) as peer:
        listed(served, peer)
        with Mover(served) as mover:
            mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            assert peer.arrived.acquire(timeout=10)
            mover.cancel()
            threading.Timer(0.3, gate.set).start()  # later than the cancel is heard
            assert mover.end() == (0xFE00, (5, 1, 0, 0), None)
    assert len(peer.received) == 1


def test_a_requestor_that_breaks_off_stops_it(served: Storing) -> None:
    """M5: what is under way is finished, nothing further is begun."""
    sent = series(6)
    served.send(*sent)
    gate = threading.Event()
    with receiver(gate=gate) as peer:
        listed(served, peer)
        mover = Mover(served)
        mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
        assert peer.arrived.acquire(timeout=10)
        mover.requestor.abort()
        threading.Timer(0.3, gate.set).start()
        log = wait_for(lambda: [row for row in served.ledger.connections()
                                if "C-MOVE sub-operation 0000" in str(row.operations)], "the end of it")
        assert "C-MOVE sub-operation 0000" in str(log[0].operations)
    assert len(peer.received) == 1


def test_a_destination_that_dies_in_the_middle(served: Storing) -> None:
    sent = series(6)
    served.send(*sent)
    gate = threading.Event()
    with receiver(gate=gate) as peer:
        listed(served, peer)
        with Mover(served) as mover:
            mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            assert peer.arrived.acquire(timeout=10)
            peer.kill()
            status, counts, failed = mover.end()
    assert (status, counts, len(failed or ())) == (0xA702, (None, 0, 6, 0), 6)


def test_a_destination_that_aborts_once(served: Storing) -> None:
    sent = series(6)
    served.send(*sent)
    with receiver(abort_at={3}) as peer:
        listed(served, peer)
        with Mover(served) as mover:
            mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            status, counts, failed = mover.end()
    assert (status, counts, len(failed or ())) == (0xB000, (None, 5, 1, 0), 1)


def test_a_destination_that_hangs_is_given_up(served: Storing) -> None:
    """After dimse.message_timeout_s (2 s here), once: not again for each instance."""
    sent = series(3)
    served.send(*sent)
    with receiver(gate=threading.Event()) as peer:
        listed(served, peer)
        with Mover(served) as mover:
            mover.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            status, counts, _ = mover.end()
    assert (status, counts) == (0xA702, (None, 0, 3, 0))
    assert peer.associations == 1


def test_too_many_wait_in_turn(tmp_path: Path) -> None:
    sent = series(1)
    gate = threading.Event()
    with storing(tmp_path, turns=Turns(8, 1, 0.2)) as served, receiver(gate=gate) as peer:
        served.send(*sent)
        listed(served, peer)
        with Mover(served) as first, Mover(served) as second, Mover(served) as third:
            first.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            first.response()  # it has its turn
            second.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            assert second.end() == (0xA702, (None,) * 4, None)
            gate.set()
            assert first.end()[0] == 0
            third.ask("STUDY", StudyInstanceUID=sent[0].study_uid)
            assert third.end()[0] == 0


def test_a_store_only_device_may_not_move(served: Storing) -> None:
    served.ledger.add_device(Device("CAMERA", "127.0.0.1", "stores only", services=frozenset({"store"})))
    proposed = [ProposedContext(1, STUDY_ROOT_MOVE, (EXPLICIT_LITTLE,)), ProposedContext(3, CT, (EXPLICIT,))]
    with Requestor.connect(served.peer, "CAMERA", proposed) as requestor:
        assert requestor.context_of(STUDY_ROOT_MOVE) is None
        assert requestor.context_of(CT) is not None


def test_dcmtk_moves_to_itself(served: Storing, tmp_path: Path) -> None:
    sent = series(7, padding=40_000)
    served.send(*sent)
    [port] = free_ports(1, "127.0.0.1")
    served.ledger.add_device(Device("MOVESCU", "127.0.0.1", "DCMTK", port=port))
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run([dcmtk("movescu"), "-S", "+B", "-aet", "MOVESCU", "-aec", "MISS", "-aem", "MOVESCU",
                    "--port", str(port), "-od", str(out), "-k", "0008,0052=STUDY",
                    "-k", f"0020,000d={sent[0].study_uid}", "127.0.0.1", str(served.port)],
                   check=True, timeout=60, capture_output=True, cwd=out)  # with +B it passes over -od
    # With +B the data set's octets stand in the file as they came, behind DCMTK's meta information.
    files = [path.read_bytes() for path in out.iterdir()]
    assert len(files) == 7
    assert all(any(file.endswith(one.dataset) for file in files) for one in sent)
