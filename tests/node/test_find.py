"""C-FIND end to end: levels, hierarchy, statuses, cancel, bounds and character sets (PS3.4 C.4.1)."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE

from archive.ledger import Device
from node.dimse import messages, pdu
from node.dimse.contexts import (
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    PATIENT_ROOT_FIND,
    STUDY_ROOT_FIND,
    VERIFICATION,
)
from node.dimse.identifiers import write_identifier
from node.dimse.messages import Field
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from node.dimse.services.find import MATCHES_HELD_MAX, MATCHES_PER_DEVICE_MAX, STATUSES
from tests.datasets import make_instance
from tests.node.finding import find, identifier, study
from tests.node.serving import AE_TITLE, Raw, data
from tests.node.storing import Storing, storing
from tests.peers import dcmtk

FIND = ProposedContext(1, STUDY_ROOT_FIND, (EXPLICIT_LITTLE,))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


@pytest.mark.parametrize("syntax", [IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG])
def test_study_level(served: Storing, syntax: str) -> None:
    uid = study(served, 3, patient_id="P1", patient_name="Rossi^Maria")
    study(served, 1, patient_id="P2", patient_name="Bianchi^Luca")
    query = identifier("STUDY", PatientID="P1", PatientName="", StudyInstanceUID="", StudyDate="",
                       ModalitiesInStudy="", NumberOfStudyRelatedInstances="")
    statuses, found = find(served, query, syntax=syntax)
    assert statuses == [0xFF00, 0x0000]
    match, = found
    assert (match.StudyInstanceUID, match.PatientName, match.PatientID) == (uid, "Rossi^Maria", "P1")
    assert (match.QueryRetrieveLevel, match.NumberOfStudyRelatedInstances) == ("STUDY", 3)
    assert match.ModalitiesInStudy == "CT"
    assert match.RetrieveAETitle == AE_TITLE
    assert "AccessionNumber" not in match  # F4: the requested keys only


def test_what_was_stored_just_now_is_found(served: Storing) -> None:
    for n in range(10):
        uid = study(served, 1, patient_id=f"Q{n}")
        _, found = find(served, identifier("STUDY", PatientID=f"Q{n}", StudyInstanceUID=""))
        assert [match.StudyInstanceUID for match in found] == [uid]


def test_no_match_is_one_success_without_identifier(served: Storing) -> None:
    study(served)
    assert find(served, identifier("STUDY", PatientID="NOBODY")) == ([0x0000], [])


def test_series_and_image_levels(served: Storing) -> None:
    uid = study(served, 3)
    _, series = find(served, identifier("SERIES", StudyInstanceUID=uid, SeriesInstanceUID="", Modality="",
                                        NumberOfSeriesRelatedInstances=""))
    assert [(one.Modality, one.NumberOfSeriesRelatedInstances) for one in series] == [("CT", 3)]
    statuses, images = find(served, identifier(
        "IMAGE", StudyInstanceUID=uid, SeriesInstanceUID=series[0].SeriesInstanceUID, SOPInstanceUID="",
        InstanceNumber=""))
    assert statuses == [0xFF00] * 3 + [0]
    assert [image.InstanceNumber for image in images] == [1, 2, 3]


def test_patient_root(served: Storing) -> None:
    uid = study(served, patient_id="P1")
    _, patients = find(served, identifier("PATIENT", PatientID="", PatientName="R*"), root=PATIENT_ROOT_FIND)
    assert [one.PatientID for one in patients] == ["P1"]
    query = identifier("STUDY", PatientID="P1", StudyInstanceUID="")
    _, studies = find(served, query, root=PATIENT_ROOT_FIND)
    assert [one.StudyInstanceUID for one in studies] == [uid]
    assert find(served, identifier("STUDY", StudyInstanceUID=""), root=PATIENT_ROOT_FIND)[0] == [0xA900]


@pytest.mark.parametrize("query", [
    Dataset(),
    identifier("HOSPITAL"),
    identifier("PATIENT", PatientID=""),
    identifier("SERIES", SeriesInstanceUID=""),
    identifier("SERIES", StudyInstanceUID="1.2\\1.3", SeriesInstanceUID=""),
    identifier("IMAGE", StudyInstanceUID="1.2", SOPInstanceUID=""),
    identifier("SERIES", StudyInstanceUID="1.2", PatientName="R*"),
], ids=["no level", "no such level", "PATIENT in Study Root", "no study", "two studies", "no series",
        "a key of a higher level"])
def test_a900(served: Storing, query: Dataset) -> None:
    """F1, F2: the Error Comment says which rule, and the association lives."""
    with Requestor.connect(served.peer, "CT1", [FIND]) as requestor:
        (answer, octets), = requestor.find(write_identifier(query, EXPLICIT_LITTLE))
        assert (answer.status, octets) == (0xA900, None)
        assert answer.text(messages.ERROR_COMMENT)
        assert messages.OFFENDING_ELEMENT in answer.elements
        good = write_identifier(identifier("STUDY", StudyInstanceUID=""), EXPLICIT_LITTLE)
        assert [answer.status for answer, _ in requestor.find(good)] == [0]


@pytest.mark.parametrize("syntax", [EXPLICIT_LITTLE, IMPLICIT_LITTLE, EXPLICIT_BIG])
def test_an_identifier_that_ends_inside_an_element_is_c000(served: Storing, syntax: str) -> None:
    """Not a search for what there is of its last key."""
    uid = study(served)
    query = write_identifier(identifier("STUDY", StudyInstanceUID=uid), syntax)
    with Requestor.connect(served.peer, "CT1", [ProposedContext(1, STUDY_ROOT_FIND, (syntax,))]) as requestor:
        for short in (2, len(uid) // 2 * 2 + 2):
            (answer, octets), = requestor.find(query[:-short])
            assert (answer.status, octets) == (0xC000, None)
        assert [answer.status for answer, _ in requestor.find(query)] == [0xFF00, 0]


def test_the_offending_element_is_named(served: Storing) -> None:
    """PS3.4 Table C.4-1; the value is not repeated."""
    query = write_identifier(identifier("STUDY", StudyDate="2026*"), EXPLICIT_LITTLE)
    with Requestor.connect(served.peer, "CT1", [FIND]) as requestor:
        (answer, _), = requestor.find(query)
    assert answer.status == 0xA900
    assert answer.elements[messages.OFFENDING_ELEMENT] == b"\x08\x00\x20\x00"
    assert "2026" not in answer.text(messages.ERROR_COMMENT)


def test_mutated_identifiers_are_answered_by_the_table(served: Storing) -> None:
    uid = study(served, 2, patient_name="Müller^A", SpecificCharacterSet="ISO_IR 100")
    item = identifier("STUDY", ScheduledProcedureStepID="A*", RequestedProcedureID="?")
    query = identifier("SERIES", PatientID="123", PatientName="M*^*", StudyInstanceUID=uid, Modality="CT",
                       SeriesDate="20200101-", RequestAttributesSequence=[item], StudyDescription="")
    query.SpecificCharacterSet = ["ISO 2022 IR 100", "ISO 2022 IR 87"]
    octets = write_identifier(query, EXPLICIT_LITTLE)
    chance = random.Random(20260101)
    asked = [(STUDY_ROOT_FIND, b"\1" * 7)]
    with Requestor.connect(served.peer, "CT1", [FIND], extended=asked) as requestor:
        for _ in range(150):
            mutated = bytearray(octets)
            for _ in range(chance.randrange(1, 5)):
                mutated[chance.randrange(len(mutated))] = chance.choice([0, 255, 92, 42, 45, 27, 65])
            if chance.random() < 0.2:
                del mutated[chance.randrange(len(mutated)):]
            assert {answer.status for answer, _ in requestor.find(bytes(mutated))} <= set(STATUSES)


def test_patient_id_beside_a_study_passes(served: Storing) -> None:
    uid = study(served, patient_id="P1")
    statuses, _ = find(served, identifier("SERIES", StudyInstanceUID=uid, PatientID="P1", PatientName=""))
    assert statuses == [0xFF00, 0]


def test_unsupported_keys_are_ff01(served: Storing) -> None:
    study(served)
    statuses, _ = find(served, identifier("STUDY", StudyInstanceUID="", Occupation=""))
    assert statuses == [0xFF01, 0]


def test_wildcards_ranges_and_lists(served: Storing) -> None:
    old = study(served, patient_id="P1", patient_name="Rossi^Maria", StudyDate="20200105")
    new = study(served, patient_id="P2", patient_name="Rosso^Carla", StudyDate="20240630")
    for keys, expected in (
        ({"PatientName": "ROSS*"}, {old, new}), ({"PatientName": "*carla"}, {new}),
        ({"PatientName": "Ross?^M*"}, {old}),
        ({"StudyDate": "20200101-20201231"}, {old}), ({"StudyDate": "20230101-"}, {new}),
        ({"StudyInstanceUID": f"{old}\\{new}"}, {old, new}), ({"StudyInstanceUID": old}, {old}),
    ):
        _, found = find(served, identifier("STUDY", **{"StudyInstanceUID": "", **keys}))
        assert {match.StudyInstanceUID for match in found} == expected, keys


def test_character_sets(served: Storing) -> None:
    study(served, SpecificCharacterSet="ISO_IR 192", patient_name="Müller^Jürgen")
    query = identifier("STUDY", SpecificCharacterSet="ISO_IR 100", PatientName="Müller*", StudyInstanceUID="")
    _, found = find(served, query)
    assert [match.PatientName for match in found] == ["Müller^Jürgen"]


def test_cancel(served: Storing) -> None:
    """FE00, and fewer answers than there are: they fill the connection before the peer reads any of them."""
    uid = study(served, 400)
    _, series = find(served, identifier("SERIES", StudyInstanceUID=uid, SeriesInstanceUID=""))
    keys = dict.fromkeys(("SOPInstanceUID", "InstanceNumber", "SOPClassUID", "ImageType"), "")
    query = identifier("IMAGE", StudyInstanceUID=uid, SeriesInstanceUID=series[0].SeriesInstanceUID, **keys)
    with Raw(served.port) as raw:
        raw.associate(pdu.AssociateRequest(AE_TITLE, "CT1", (
            ProposedContext(1, STUDY_ROOT_FIND, (EXPLICIT_LITTLE,)),), 16384))
        octets = write_identifier(query, EXPLICIT_LITTLE)
        raw.send(data(1, 3, messages.query_request(Field.C_FIND, 1, STUDY_ROOT_FIND)) + data(1, 2, octets)
                 + data(1, 3, messages.cancel_request(1)))
        answers = 0
        while (answer := _command(raw)).status != 0xFE00:
            assert answer.status == 0xFF00
            answers += 1
        assert answers < 400
        assert not answer.has_dataset
        raw.send(data(1, 3, messages.cancel_request(1)))  # too late: passed over
        raw.send(pdu.RELEASE_RQ_OCTETS)
        assert raw.receive()[0] == pdu.PduType.RELEASE_RP


def _command(raw: Raw) -> messages.Command:
    """The next command; data sets between are passed over."""
    while True:
        kind, body = raw.receive()
        assert kind == pdu.PduType.P_DATA_TF
        if body[5] & 1:
            return messages.parse(body[6:])


def test_responses_are_bounded(tmp_path: Path) -> None:
    with storing(tmp_path, responses_max=5) as served:
        for n in range(7):
            study(served, 1, patient_id=f"P{n}")
        statuses, found = find(served, identifier("STUDY", StudyInstanceUID=""))
        assert statuses == [0xFF00] * 5 + [0xA700]
        assert len(found) == 5


def test_a_store_only_device_may_not_ask(served: Storing) -> None:
    """45: the context is refused, so that there is nothing to ask over."""
    served.ledger.add_device(Device("CT2", "*", services=frozenset({"store"})))
    proposed = [ProposedContext(1, STUDY_ROOT_FIND, (EXPLICIT_LITTLE,)),
                ProposedContext(3, VERIFICATION, (EXPLICIT_LITTLE,))]
    with Requestor.connect(served.peer, "CT2", proposed) as requestor:
        assert requestor.context_of(STUDY_ROOT_FIND) is None
        assert {answer.id: answer.result for answer in requestor.accept.contexts} == {1: 1, 3: 0}
        assert requestor.echo() == 0


@pytest.mark.parametrize("octets", [b"\x08\x00\x52\x00CS\xff\xff", b"\xff" * 64, b"\x00", b""])
def test_identifiers_that_cannot_be_read(served: Storing, octets: bytes) -> None:
    with Requestor.connect(served.peer, "CT1", [FIND]) as requestor:
        (answer, _), = requestor.find(octets)
        assert answer.status in (0xA900, 0xC000)


def test_an_identifier_without_end_is_cut(served: Storing) -> None:
    with Raw(served.port) as raw:
        raw.associate(pdu.AssociateRequest(AE_TITLE, "CT1", (
            ProposedContext(1, STUDY_ROOT_FIND, (IMPLICIT_LITTLE,)),), 16384))
        raw.send(data(1, 3, messages.query_request(Field.C_FIND, 1, STUDY_ROOT_FIND)))
        block = data(1, 0, bytes(100_000))
        with pytest.raises(OSError):
            for _ in range(1000):
                raw.send(block)
            raise AssertionError("100 MB were taken")


def test_a_nested_identifier_is_survived(served: Storing) -> None:
    """42: sequences 2,000 deep, in an identifier."""
    nested = b"\x40\x00\x75\x02\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 2000
    proposed = [ProposedContext(1, STUDY_ROOT_FIND, (IMPLICIT_LITTLE,))]
    with Requestor.connect(served.peer, "CT1", proposed) as requestor:
        level = write_identifier(identifier("STUDY"), IMPLICIT_LITTLE)
        (answer, _), = requestor.find(level + nested)
        assert answer.status in (0xA900, 0xC000, 0x0000)
        assert [answer.status for answer, _ in requestor.find(level)] == [0]


def test_findscu(served: Storing, tmp_path: Path) -> None:
    uid = study(served, 2, patient_id="P1")
    subprocess.run([dcmtk("findscu"), "-S", "-X", "-od", str(tmp_path), "-aet", "CT1", "-aec", AE_TITLE,
                    "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientID=P1", "-k", "StudyInstanceUID",
                    "-k", "PatientName", "127.0.0.1", str(served.port)], check=True, timeout=20,
                   capture_output=True)
    answers = [dcmread(path, force=True) for path in sorted(tmp_path.glob("rsp*.dcm"))]
    assert [(one.StudyInstanceUID, one.PatientName) for one in answers] == [(uid, "Rossi^Maria")]


def test_pynetdicom_finds(served: Storing) -> None:
    uid = study(served, 2)
    ae = AE("CT1")
    ae.add_requested_context(STUDY_ROOT_FIND)
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE)
    query = identifier("STUDY", StudyInstanceUID="", PatientName="*")
    answers = list(association.send_c_find(query, STUDY_ROOT_FIND))
    association.release()
    assert [status.Status for status, _ in answers] == [0xFF00, 0x0000]
    assert answers[0][1] is not None and answers[0][1].StudyInstanceUID == uid


def test_matches_that_nobody_reads_are_bounded(tmp_path: Path) -> None:
    with storing(tmp_path) as served:
        first = make_instance(number=1)
        served.send(first)
        query = identifier("STUDY", StudyInstanceUID="")
        left = MATCHES_HELD_MAX - MATCHES_PER_DEVICE_MAX
        assert served.find.held.take("ANOTHER", MATCHES_PER_DEVICE_MAX)  # it has asked, and does not read
        assert not served.find.held.take("ANOTHER", 1)
        assert find(served, query)[0] == [0xFF00, 0x0000]
        assert served.find.held.take("OTHER", left)
        assert find(served, query)[0] == [0xA700]
        served.find.held.give_back("ANOTHER", MATCHES_PER_DEVICE_MAX)
        served.find.held.give_back("OTHER", left)
        assert find(served, query)[0] == [0xFF00, 0x0000]
        assert served.find.held.taken_bytes == 0
