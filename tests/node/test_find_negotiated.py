"""C-FIND with extended negotiation (PS3.4 C.5.1.1): what is answered, and that nothing is done without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import pytest
from pynetdicom import AE
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from node.dimse.contexts import (
    EXPLICIT_LITTLE,
    PATIENT_ROOT_FIND,
    QUERY_SUPPORT,
    STUDY_ROOT_FIND,
    STUDY_ROOT_MOVE,
)
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from node.dimse.services.find import EXTENDED, Negotiated
from tests.datasets import make_instance
from tests.node.finding import find, identifier
from tests.node.serving import AE_TITLE
from tests.node.storing import Storing, storing

RELATIONAL, DATETIME, FUZZY, ZONE, _, EMPTY, MULTIPLE = (bytes(at) + b"\1" for at in range(7))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storing]:
    with storing(tmp_path_factory.mktemp("find")) as running:
        assert running.send(
            make_instance(patient_id="P1", patient_name="Müller^Anna Maria=山田", study_uid="1.2.1",
                          SpecificCharacterSet="ISO_IR 192", series_uid="1.2.1.1", AccessionNumber="A1",
                          StudyDate="20260101", StudyTime="233000", TimezoneOffsetFromUTC="+0100"),
            make_instance(patient_id="P1", study_uid="1.2.1", series_uid="1.2.1.2", modality="PT"),
            make_instance(patient_id="P2", patient_name="Rossi^Luca", study_uid="1.2.2", StudyDate="20260102",
                          StudyTime="080000", AccessionNumber=""),
            make_instance(patient_id="P3", patient_name="Rossi^Ada", study_uid="1.2.3", StudyDate="20260103",
                          StudyTime="230000", AccessionNumber="A3"),
        ) == [0] * 4
        yield running


def studies(served: Storing, extended: bytes, **keys: str) -> set[str]:
    statuses, found = find(served, identifier("STUDY", **{"StudyInstanceUID": "", **keys}), extended=extended)
    assert statuses[-1] == 0
    return {one.StudyInstanceUID for one in found}


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (b"\1", b"\1"),
        (b"\1\1\1\1\1\1\1", b"\1\1\1\1\0\1\1"),
        (b"\0\0\1", b"\0\0\1"),
        (b"\1\2\xff", b"\1\0\0"),  # values that say nothing
        (b"\1" * 12, b"\1\1\1\1\0\1\1"),
        (b"", None),
    ],
)
def test_no_more_is_answered_than_was_asked_for(
    served: Storing, asked: bytes, answered: bytes | None
) -> None:
    proposed = [ProposedContext(1, STUDY_ROOT_FIND, (EXPLICIT_LITTLE,))]
    extended = [(STUDY_ROOT_FIND, asked), (PATIENT_ROOT_FIND, b"\1")]
    with Requestor.connect(served.peer, "CT1", proposed, extended=extended) as requestor:
        found = dict(requestor.accept.extended)
        assert found.get(STUDY_ROOT_FIND) == answered
        assert PATIENT_ROOT_FIND not in found  # there is no context for it


def test_what_is_said_to_be_supported_is() -> None:
    assert [bool(done) for _, done in EXTENDED] == [bool(byte) for byte in QUERY_SUPPORT]
    assert len(fields(Negotiated)) == len(QUERY_SUPPORT)


def test_relational_queries_ask_of_any_level(served: Storing) -> None:
    query = identifier("SERIES", SeriesInstanceUID="", PatientName="müll*", Modality="PT", StudyDate="")
    query.SpecificCharacterSet = "ISO_IR 100"
    statuses, found = find(served, query, extended=RELATIONAL)
    assert statuses == [0xFF00, 0] and found[0].SeriesInstanceUID == "1.2.1.2"
    assert find(served, query)[0] == [0xA900]
    images = identifier("IMAGE", SOPInstanceUID="", PatientID="P1", AccessionNumber="A1")
    assert len(find(served, images, extended=RELATIONAL)[1]) == 2
    assert find(served, images)[0] == [0xA900]
    of_patients = identifier("STUDY", StudyInstanceUID="", PatientName="Rossi*")
    assert len(find(served, of_patients, root=PATIENT_ROOT_FIND, extended=RELATIONAL)[1]) == 2


def test_date_and_time_are_one_range_where_that_was_agreed_on(served: Storing) -> None:
    keys = {"StudyDate": "20260101-20260103", "StudyTime": "2200-2315"}
    assert studies(served, DATETIME, **keys) == {"1.2.1", "1.2.2", "1.2.3"}
    assert studies(served, b"", **keys) == {"1.2.3"}


def test_fuzzy_names(served: Storing) -> None:
    assert studies(served, FUZZY, PatientName="maria muller") == {"1.2.1"}
    assert studies(served, FUZZY, PatientName="ROSS") == {"1.2.2", "1.2.3"}
    assert studies(served, FUZZY, PatientName="luca^rossi") == {"1.2.2"}
    assert studies(served, b"", PatientName="maria muller") == set()


def test_dates_and_times_in_the_askers_zone(served: Storing) -> None:
    query = identifier("STUDY", StudyInstanceUID="", StudyDate="20260102", StudyTime="",
                       TimezoneOffsetFromUTC="+0900")
    _, found = find(served, query, extended=ZONE)
    told = {one.StudyInstanceUID: one for one in found}
    assert set(told) == {"1.2.1", "1.2.2"}  # the other's zone is not known
    assert (told["1.2.1"].StudyDate, told["1.2.1"].StudyTime) == ("20260102", "073000")
    assert told["1.2.1"].TimezoneOffsetFromUTC == "+0900"
    assert told["1.2.2"].StudyTime == "080000" and "TimezoneOffsetFromUTC" not in told["1.2.2"]
    _, found = find(served, query)
    assert [one.StudyInstanceUID for one in found] == ["1.2.2"]
    query.TimezoneOffsetFromUTC = "CET"
    assert find(served, query, extended=ZONE)[0] == [0xA900]


def test_empty_and_several_values(served: Storing) -> None:
    assert studies(served, EMPTY, AccessionNumber='""') == {"1.2.2"}
    assert studies(served, b"", AccessionNumber='""') == set()
    assert studies(served, MULTIPLE, ModalitiesInStudy="CT\\PT") == {"1.2.1"}
    assert studies(served, b"", ModalitiesInStudy="CT\\PT") == {"1.2.1", "1.2.2", "1.2.3"}


def test_pynetdicom_negotiates(served: Storing) -> None:
    ae = AE("CT1")
    ae.add_requested_context(STUDY_ROOT_FIND)
    ae.add_requested_context(STUDY_ROOT_MOVE)
    item = SOPClassExtendedNegotiation()
    item.sop_class_uid = STUDY_ROOT_FIND
    item.service_class_application_information = b"\1\1\1\1\1"
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE, ext_neg=[item])
    assert association.acceptor.sop_class_extended == {STUDY_ROOT_FIND: b"\1\1\1\1\0"}
    query = identifier("IMAGE", SOPInstanceUID="", PatientName="luca rossi")
    answers = list(association.send_c_find(query, STUDY_ROOT_FIND))
    association.release()
    assert [status.Status for status, _ in answers] == [0xFF00, 0]
