"""C-FIND of the modality worklist end to end (PS3.4 Annex K): matching inside the sequence, return keys,
statuses, cancel, bounds, who sees what; and the answers of DCMTK's own worklist server beside ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.sop_class import ModalityWorklistInformationFind  # type: ignore[attr-defined]

from archive.ledger import Device
from archive.ledger.worklist import steps_of
from miss.processes import free_ports, listening
from node.dimse import messages
from node.dimse.contexts import EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE, WORKLIST_FIND
from node.dimse.identifiers import read_identifier, write_identifier
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from node.worklistfolder import WorklistFolder
from tests.node.serving import AE_TITLE
from tests.node.worklists import Scheduling, as_json, dataset, query, scheduling, worklist_item
from tests.peers import dcmtk
from tests.waiting import wait_for

SAMPLES = Path("/usr/share/doc/dcmtk/examples")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Scheduling]:
    with scheduling(tmp_path) as running:
        yield running


def find(served: Scheduling, asked: Dataset, *, syntax: str = EXPLICIT_LITTLE,
         cancel_after: int | None = None, calling_ae: str = "CT1") -> tuple[list[int], list[Dataset]]:
    """Every status in order, and the identifiers."""
    proposed = [ProposedContext(1, WORKLIST_FIND, (syntax,))]
    with Requestor.connect(served.peer, calling_ae, proposed) as requestor:
        answers = list(requestor.find(write_identifier(asked, syntax), WORKLIST_FIND,
                                      cancel_after=cancel_after))
    return ([answer.status for answer, _ in answers],
            [read_identifier(octets, syntax) for _, octets in answers if octets is not None])


def ids(found: list[Dataset]) -> list[str]:
    return sorted(one.ScheduledProcedureStepSequence[0].ScheduledProcedureStepID for one in found)


@pytest.mark.parametrize("syntax", [IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG])
def test_a_step_is_found_with_what_was_asked_for(served: Scheduling, syntax: str) -> None:
    served.schedule(worklist_item(1, PatientWeight="70.5"), worklist_item(2))
    asked = query(PatientID="P1", PatientWeight=None, Allergies="", MedicalAlerts="")
    statuses, found = find(served, asked, syntax=syntax)
    assert statuses == [0xFF00, 0x0000]
    one, = found
    assert (one.PatientName, one.PatientID, one.StudyInstanceUID) == ("Rossi^Maria", "P1", "1.2.3.1")
    assert float(one.PatientWeight) == 70.5
    step, = one.ScheduledProcedureStepSequence
    assert (step.ScheduledStationAETitle, step.Modality, step.ScheduledProcedureStepID) == ("CT1", "CT", "S1")
    assert one["Allergies"].is_empty and one["MedicalAlerts"].is_empty  # unknown: there, without value
    assert "RequestedProcedureID" not in one and "ScheduledProcedureStepDescription" not in step


@pytest.mark.parametrize(("step", "keys", "found"), [
    ({}, {}, ["S1", "S2", "S3"]),
    ({"ScheduledStationAETitle": "MR1"}, {}, ["S2"]),
    ({"ScheduledStationAETitle": "MR?"}, {}, ["S2"]),
    ({"Modality": "CT"}, {}, ["S1", "S3"]),
    ({"ScheduledPerformingPhysicianName": "neri^*"}, {}, ["S2"]),
    ({"ScheduledProcedureStepStartDate": "20261123"}, {}, ["S2"]),
    ({"ScheduledProcedureStepStartDate": "20261122-20261123"}, {}, ["S1", "S2"]),
    ({"ScheduledProcedureStepStartDate": "20261123-"}, {}, ["S2", "S3"]),
    ({"ScheduledProcedureStepStartTime": "0900-1000"}, {}, ["S1"]),
    ({"ScheduledProcedureStepID": "S?"}, {}, ["S1", "S2", "S3"]),
    ({}, {"PatientName": "ROSSI*"}, ["S1", "S3"]),
    ({}, {"PatientName": "*luca*"}, ["S2"]),
    ({}, {"PatientID": "P3"}, ["S3"]),
    ({}, {"PatientID": "p3"}, []),
    ({}, {"AccessionNumber": "A2"}, ["S2"]),
    ({}, {"StudyInstanceUID": ["1.2.3.1", "1.2.3.3"]}, ["S1", "S3"]),
    ({"Modality": "CT"}, {"PatientID": "P2"}, []),
], ids=str)  # fmt: skip
def test_keys(served: Scheduling, step: Mapping[str, Any], keys: Mapping[str, Any], found: list[str]) -> None:
    served.schedule(
        worklist_item(1),
        worklist_item(2, {"ScheduledStationAETitle": ["MR1", "MR2"], "Modality": "MR",
                          "ScheduledPerformingPhysicianName": "Neri^Anna",
                          "ScheduledProcedureStepStartDate": "20261123",
                          "ScheduledProcedureStepStartTime": "140000"}, PatientName="Bruni^Luca"),
        worklist_item(3, {"ScheduledProcedureStepStartDate": "20261201",
                          "ScheduledProcedureStepStartTime": "07"}),
    )  # fmt: skip
    assert ids(find(served, query(step, **keys))[1]) == found


def test_a_date_range_and_a_time_range_are_one_span(served: Scheduling) -> None:
    for number, (date, at) in enumerate([("20260705", "0900"), ("20260705", "1000"), ("20260706", "0300"),
                                         ("20260707", "1759"), ("20260707", "1900")], 1):
        served.schedule(worklist_item(number, {"ScheduledProcedureStepStartDate": date,
                                               "ScheduledProcedureStepStartTime": at}))
    asked = query({"ScheduledProcedureStepStartDate": "20260705-20260707",
                   "ScheduledProcedureStepStartTime": "1000-1800"})
    assert ids(find(served, asked)[1]) == ["S2", "S3", "S4"]


def test_a_sequence_without_keys_is_answered_whole(served: Scheduling) -> None:
    served.schedule(worklist_item(1))
    for empty in ([], [Dataset()]):
        asked = query()
        asked.ScheduledProcedureStepSequence = empty
        step, = find(served, asked)[1][0].ScheduledProcedureStepSequence
        assert step.ScheduledProcedureStepDescription == "Head"
        assert step.ScheduledProcedureStepStatus == "SCHEDULED"


def test_sequences_in_the_step_are_matched_and_answered(served: Scheduling) -> None:
    def code(value: str) -> Dataset:
        return dataset(CodeValue=value, CodingSchemeDesignator="L", CodeMeaning=f"meaning {value}")

    served.schedule(worklist_item(1, {"ScheduledProtocolCodeSequence": [code("X"), code("Y")]}),
                    worklist_item(2, {"ScheduledProtocolCodeSequence": [code("Z")]}), worklist_item(3))
    asked = query({"ScheduledProtocolCodeSequence": [dataset(CodeValue="Y", CodeMeaning="")]})
    one, = find(served, asked)[1]
    codes = one.ScheduledProcedureStepSequence[0].ScheduledProtocolCodeSequence
    assert [(each.CodeValue, each.CodeMeaning) for each in codes] == [("X", "meaning X"), ("Y", "meaning Y")]
    assert "CodingSchemeDesignator" not in codes[0]
    everything = query({"ScheduledProtocolCodeSequence": [dataset(CodeValue="")]})
    items = [one.ScheduledProcedureStepSequence[0] for one in find(served, everything)[1]]
    third, = (item for item in items if item.ScheduledProcedureStepID == "S3")
    assert len(third.ScheduledProtocolCodeSequence) == 0  # unknown: there, empty


def test_each_step_of_a_procedure_is_an_answer_of_its_own(served: Scheduling) -> None:
    item = worklist_item(1)
    second = dataset(ScheduledStationAETitle="MR1", ScheduledProcedureStepStartDate="20261122",
                     ScheduledProcedureStepStartTime="1100", Modality="MR", ScheduledProcedureStepID="S2")
    item.ScheduledProcedureStepSequence.append(second)
    served.schedule(item)
    _, found = find(served, query())
    assert [len(one.ScheduledProcedureStepSequence) for one in found] == [1, 1]
    assert ids(found) == ["S1", "S2"]


def test_character_sets_of_keys_and_answers(served: Scheduling) -> None:
    served.schedule(worklist_item(1, PatientName="Yamada^Tarou=山田^太郎"),
                    worklist_item(2, PatientName="Çelik^Ümit"))
    asked = query(PatientName="çelik^Ümit", SpecificCharacterSet="ISO_IR 148")
    _, found = find(served, asked)
    one, = found
    assert str(one.PatientName) == "Çelik^Ümit" and one.SpecificCharacterSet == "ISO_IR 148"  # as it asked
    japanese = query(PatientName="*=山田*", SpecificCharacterSet="ISO_IR 192")
    one, = find(served, japanese)[1]
    assert str(one.PatientName) == "Yamada^Tarou=山田^太郎" and one.SpecificCharacterSet == "ISO_IR 192"


def test_what_is_over_is_offered_only_by_its_status(served: Scheduling) -> None:
    served.schedule(worklist_item(1), worklist_item(2, {"ScheduledProcedureStepStatus": "COMPLETED"}),
                    worklist_item(3, {"ScheduledProcedureStepStatus": "STARTED"}))
    assert ids(find(served, query())[1]) == ["S1", "S3"]
    over = query({"ScheduledProcedureStepStatus": "COMPLETED"})
    assert ids(find(served, over)[1]) == ["S2"]


def test_own_steps_only(tmp_path: Path) -> None:
    with scheduling(tmp_path, own_steps_only=True) as served:
        served.ledger.add_device(Device("MR1", "127.0.0.1"))
        served.schedule(worklist_item(1), worklist_item(2, {"ScheduledStationAETitle": "MR1"}),
                        worklist_item(3, {"ScheduledStationAETitle": ""}),
                        worklist_item(4, {"ScheduledStationAETitle": ["CT1", "MR1"]}))
        assert ids(find(served, query(), calling_ae="CT1")[1]) == ["S1", "S3", "S4"]
        assert ids(find(served, query(), calling_ae="MR1")[1]) == ["S2", "S3", "S4"]
        of_another = query({"ScheduledStationAETitle": "MR1"})
        assert ids(find(served, of_another, calling_ae="CT1")[1]) == ["S3", "S4"]


def test_a_step_that_names_no_station_is_for_whichever_asks(served: Scheduling) -> None:
    """And the answer names it (type 1 in PS3.4 Table K.6-1)."""
    served.schedule(worklist_item(1), worklist_item(2, {"ScheduledStationAETitle": ""}),
                    worklist_item(3, {"ScheduledStationAETitle": "MR1"}))
    for station, steps in (("CT1", ["S1", "S2"]), ("MR1", ["S2", "S3"]), ("CR1", ["S2"])):
        _, found = find(served, query({"ScheduledStationAETitle": station}))
        assert ids(found) == steps
        assert {one.ScheduledProcedureStepSequence[0].ScheduledStationAETitle for one in found} == {station}
    _, found = find(served, query({"ScheduledStationAETitle": ""}))
    assert ids(found) == ["S1", "S2", "S3"]


def test_a_level_is_no_key_of_a_worklist(served: Scheduling) -> None:
    served.schedule(worklist_item(1))
    statuses, (found,) = find(served, query(QueryRetrieveLevel="STUDY"))
    assert statuses == [0xFF00, 0]
    assert "QueryRetrieveLevel" not in found


def test_a_device_without_the_service_gets_no_context(served: Scheduling) -> None:
    served.ledger.add_device(Device("CT1", "127.0.0.1", services=frozenset({"store", "find", "mpps"})))
    proposed = [ProposedContext(1, WORKLIST_FIND, (IMPLICIT_LITTLE,))]
    with Requestor.connect(served.peer, "CT1", proposed) as peer:
        assert not peer.association.contexts


@pytest.mark.parametrize(("asked", "offending"), [
    (query({"ScheduledProcedureStepStartDate": "2026-2027-2028"}), b"\x40\x00\x02\x00"),
    (query({"ScheduledProcedureStepStartTime": "2500"}), b"\x40\x00\x03\x00"),
    (dataset(ScheduledProcedureStepSequence=[dataset(Modality="CT"), dataset(Modality="MR")]),
     b"\x40\x00\x00\x01"),
], ids=["date", "time", "two items"])  # fmt: skip
def test_what_a_vr_does_not_allow_is_a900(served: Scheduling, asked: Dataset, offending: bytes) -> None:
    """And the element is named (PS3.4 Table K.4-1)."""
    served.schedule(worklist_item(1))
    proposed = [ProposedContext(1, WORKLIST_FIND, (EXPLICIT_LITTLE,))]
    with Requestor.connect(served.peer, "CT1", proposed) as requestor:
        (answer, octets), = requestor.find(write_identifier(asked, EXPLICIT_LITTLE), WORKLIST_FIND)
    assert (answer.status, octets) == (0xA900, None)
    assert answer.elements[messages.OFFENDING_ELEMENT] == offending


def test_a_key_that_is_not_matched_on_is_said_to_be(served: Scheduling) -> None:
    served.schedule(worklist_item(1))
    asked = query()
    asked.add_new(0x00091001, "OB", b"\1\2")
    statuses, found = find(served, asked)
    assert (statuses, ids(found)) == ([0xFF01, 0x0000], ["S1"])


def test_more_than_the_bound_fails_after_it(tmp_path: Path) -> None:
    with scheduling(tmp_path, responses_max=3) as served:
        served.schedule(*map(worklist_item, range(1, 6)))
        statuses, found = find(served, query())
        assert (statuses, len(found)) == ([0xFF00] * 3 + [0xA700], 3)


def test_cancelled(served: Scheduling) -> None:
    served.schedule(*(worklist_item(n, PatientComments="x" * 10_000) for n in range(1, 100)))
    statuses, found = find(served, query(PatientComments=""), cancel_after=1)
    assert statuses[-1] == 0xFE00 and len(found) < 99


def test_an_identifier_that_cant_be_read_is_c000(served: Scheduling) -> None:
    proposed = [ProposedContext(1, WORKLIST_FIND, (EXPLICIT_LITTLE,))]
    with Requestor.connect(served.peer, "CT1", proposed) as peer:
        answers = list(peer.find(b"\x40\0\0\1SQ\0\0\xff\0\0\0", WORKLIST_FIND))
    assert [answer.status for answer, _ in answers] == [0xC000]


def test_todays_steps_of_one_station_among_ten_thousand_take_milliseconds(served: Scheduling) -> None:
    days = [f"202611{day:02}" for day in range(1, 26)]
    items = [
        worklist_item(n, {"ScheduledStationAETitle": f"AE{n % 16}",
                          "ScheduledProcedureStepStartDate": days[n // 16 % 25]}) for n in range(1, 17)
    ]
    template = [step for item in items for step in steps_of(as_json(item), "test")]
    steps = []
    for n in range(10_000):
        item = template[n % 16].attributes
        item["00080050"] = {"vr": "SH", "Value": [f"A{n}"]}
        item["00400100"]["Value"][0]["00400002"]["Value"] = [days[n // 16 % 25]]
        steps += steps_of(item, "test")
    served.ledger.schedule(steps)
    asked = query({"ScheduledStationAETitle": "AE3", "ScheduledProcedureStepStartDate": days[4]})
    proposed = [ProposedContext(1, WORKLIST_FIND, (EXPLICIT_LITTLE,))]
    took = []
    with Requestor.connect(served.peer, "CT1", proposed) as requestor:
        for _ in range(5):
            begun_s = time.perf_counter()
            answers = list(requestor.find(write_identifier(asked, EXPLICIT_LITTLE), WORKLIST_FIND))
            took.append(time.perf_counter() - begun_s)
    assert len(answers) == 26
    assert min(took) < 0.05, took  # 2 ms on a machine of its own; reading through the table takes 200


# Real clients


def test_pynetdicom_asks(served: Scheduling) -> None:
    served.schedule(worklist_item(1), worklist_item(2))
    ae = AE("CT1")
    ae.add_requested_context(ModalityWorklistInformationFind)
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE)
    assert association.is_established
    answers = list(association.send_c_find(query(PatientID="P2"), ModalityWorklistInformationFind))
    association.release()
    assert [status.Status for status, _ in answers] == [0xFF00, 0x0000]
    assert answers[0][1] is not None and answers[0][1].AccessionNumber == "A2"


def test_ctn_asks(served: Scheduling, tmp_path: Path) -> None:
    program = shutil.which("mwlQuery")
    if program is None:
        pytest.skip("CTN's mwlQuery is not installed")
    served.schedule(worklist_item(1))
    file = tmp_path / "query.dcm"
    file.write_bytes(write_identifier(query(), IMPLICIT_LITTLE))
    done = subprocess.run([program, "-a", "CT1", "-c", AE_TITLE, "-f", file, "127.0.0.1", str(served.port)],
                          capture_output=True, text=True, timeout=20, check=False)
    assert "Rossi^Maria" in done.stdout, done.stdout + done.stderr


def examples(folder: Path) -> list[Path]:
    """DCMTK's own sample worklist as files in `folder`, and its queries."""
    if not (SAMPLES / "wlistqry").is_dir():
        pytest.skip("DCMTK's sample worklist is not installed")
    folder.mkdir(parents=True)
    for dump in (SAMPLES / "wlistdb" / "OFFIS").glob("*.dump"):
        subprocess.run([dcmtk("dump2dcm"), "-q", dump, folder / f"{dump.stem}.wl"], check=True)
    (folder / "lockfile").touch()
    queries = folder.parent / "queries"
    queries.mkdir()
    for dump in (SAMPLES / "wlistqry").glob("*.dump"):
        subprocess.run([dcmtk("dump2dcm"), "-q", dump, queries / f"{dump.stem}.dcm"], check=True)
    return sorted(queries.glob("*.dcm"))


def asked_by_findscu(port: int, called_ae: str, file: Path, folder: Path) -> list[Dataset]:
    folder.mkdir()
    subprocess.run([dcmtk("findscu"), "-W", "-X", "-aet", "CT1", "-aec", called_ae, "-od", folder,
                    "127.0.0.1", str(port), file], check=True, capture_output=True, timeout=20)
    return [dcmread(path) for path in sorted(folder.glob("*.dcm"))]


def summary(found: list[Dataset]) -> list[str]:
    """What answers say, in no order, whatever their character set: without what is empty, and without the
    status, which the sample's steps do not have and ours do."""
    for one in found:
        one.decode()
    return sorted(json.dumps(known(one.to_json_dict()), sort_keys=True) for one in found)


def known(attributes: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for tag, element in attributes.items():
        values = [known(value) if element["vr"] == "SQ" else value for value in element.get("Value", ())]
        if any(values) and tag not in ("00080005", "00400020"):
            kept[tag] = values
    return kept


def test_dcmtk_gets_from_us_what_its_own_worklist_server_answers(served: Scheduling, tmp_path: Path) -> None:
    queries = examples(tmp_path / "db" / "OFFIS")
    assert WorklistFolder(tmp_path / "db" / "OFFIS", served.ledger).look() == 10
    port, = free_ports(1)
    server = subprocess.Popen([dcmtk("wlmscpfs"), "-dfp", tmp_path / "db", str(port)])
    try:
        wait_for(lambda: listening("127.0.0.1", port), "wlmscpfs")
        matched = 0
        for file in queries:
            ours = asked_by_findscu(served.port, AE_TITLE, file, tmp_path / f"{file.stem}-ours")
            theirs = asked_by_findscu(port, "OFFIS", file, tmp_path / f"{file.stem}-theirs")
            assert summary(ours) == summary(theirs), file.stem
            matched += len(ours)
        assert matched > 20
    finally:
        server.terminate()
        server.wait(10)
