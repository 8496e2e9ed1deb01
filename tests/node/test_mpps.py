"""Modality performed procedure steps end to end (PS3.4 F.7, F.8): what may be created and changed, what a
final state means, what survives, and the scheduled steps that follow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    ModalityPerformedProcedureStep,
    ModalityPerformedProcedureStepRetrieve,
)

from archive.database import sqlite_url
from archive.ledger import Device, Ledger
from node.dimse import messages
from node.dimse.contexts import IMPLICIT_LITTLE, PERFORMED_STEP
from node.dimse.identifiers import write_identifier
from node.dimse.messages import Command, Field
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from tests.node.serving import AE_TITLE
from tests.node.worklists import Scheduling, dataset, scheduling, update, worklist_item
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
UID = "1.2.826.0.1.1"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Scheduling]:
    with scheduling(tmp_path) as running:
        yield running


@pytest.fixture
def scu(served: Scheduling) -> Iterator[Association]:
    association = associate(served)
    yield association
    association.release()


def associate(served: Scheduling, calling_ae: str = "CT1") -> Association:
    ae = AE(calling_ae)
    ae.add_requested_context(ModalityPerformedProcedureStep)
    ae.add_requested_context(ModalityPerformedProcedureStepRetrieve)
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE)
    assert association.is_established
    return association


def begun(number: int = 1, **elements: Any) -> Dataset:
    """The attributes with which a step is created, of type 1 and 2."""
    reference = dataset(
        StudyInstanceUID=f"1.2.3.{number}", ReferencedStudySequence=[], AccessionNumber=f"A{number}",
        RequestedProcedureID=f"R{number}", RequestedProcedureDescription="CT head",
        ScheduledProcedureStepID=f"S{number}", ScheduledProcedureStepDescription="Head",
        ScheduledProtocolCodeSequence=[],
    )
    made = dataset(
        ScheduledStepAttributesSequence=[reference], PatientName="Rossi^Maria", PatientID=f"P{number}",
        PatientBirthDate="", PatientSex="", ReferencedPatientSequence=[], PerformedProcedureStepID="PPS1",
        PerformedStationAETitle="CT1", PerformedStationName="", PerformedLocation="",
        PerformedProcedureStepStartDate="20261122", PerformedProcedureStepStartTime="101500",
        PerformedProcedureStepStatus="IN PROGRESS", PerformedProcedureStepDescription="",
        PerformedProcedureTypeDescription="", ProcedureCodeSequence=[], PerformedProcedureStepEndDate="",
        PerformedProcedureStepEndTime="", Modality="CT", StudyID="", PerformedProtocolCodeSequence=[],
        PerformedSeriesSequence=[],
    )
    update(made, elements)
    return made


def series(*instances: str, **elements: Any) -> Dataset:
    images = [dataset(ReferencedSOPClassUID="1.2.840.10008.5.1.4.1.1.2", ReferencedSOPInstanceUID=uid)
              for uid in instances]
    made = dataset(PerformingPhysicianName="", ProtocolName="Head", OperatorsName="", RetrieveAETitle="",
                   SeriesInstanceUID="1.2.3.9.1", SeriesDescription="", ReferencedImageSequence=images,
                   ReferencedNonImageCompositeSOPInstanceSequence=[])
    update(made, elements)
    return made


def ended(state: str = "COMPLETED", **elements: Any) -> Dataset:
    made = dataset(PerformedProcedureStepStatus=state, PerformedProcedureStepEndDate="20261122",
                   PerformedProcedureStepEndTime="103000", PerformedSeriesSequence=[series("1.2.3.9.1.1")])
    update(made, elements)
    return made


def create(scu: Association, attributes: Dataset | None = None, uid: str | None = UID) -> Dataset:
    return scu.send_n_create(attributes or begun(), ModalityPerformedProcedureStep, uid)[0]


def change(scu: Association, changes: Dataset, uid: str = UID) -> Dataset:
    return scu.send_n_set(changes, ModalityPerformedProcedureStep, uid)[0]


def test_a_step_from_begin_to_end(served: Scheduling, scu: Association) -> None:
    served.schedule(worklist_item(1), worklist_item(2))
    assert create(scu).Status == 0x0000
    step = served.ledger.performed(UID)
    assert step is not None and (step.state, step.device, step.modality) == ("IN PROGRESS", "CT1", "CT")
    assert served.ledger.scheduled_counts() == {"SCHEDULED": 1, "STARTED": 1}
    assert change(scu, dataset(PerformedProcedureStepDescription="Head, twice")).Status == 0x0000
    assert served.ended == []
    assert change(scu, ended()).Status == 0x0000
    step = served.ledger.performed(UID)
    assert step is not None and (step.state, step.instances) == ("COMPLETED", {"1.2.3.9.1.1"})
    assert step.attributes["00400254"]["Value"] == ["Head, twice"]
    assert served.ledger.scheduled_counts() == {"SCHEDULED": 1, "COMPLETED": 1}
    assert served.ended == [{"1.2.3.1"}]


def test_what_is_discontinued_need_not_have_made_anything(served: Scheduling, scu: Association) -> None:
    served.schedule(worklist_item(1))
    create(scu)
    assert change(scu, ended("DISCONTINUED", PerformedSeriesSequence=[])).Status == 0x0000
    assert served.ledger.scheduled_counts() == {"DISCONTINUED": 1}


@pytest.mark.parametrize("state", ["COMPLETED", "DISCONTINUED"])
def test_a_final_step_never_changes(served: Scheduling, scu: Association, state: str) -> None:
    create(scu)
    change(scu, ended(state))
    before = served.ledger.performed(UID)
    for changes in (dataset(PerformedProcedureStepStatus="IN PROGRESS"), ended("DISCONTINUED"), ended(),
                    dataset(PerformedProcedureStepDescription="late")):
        status = change(scu, changes)
        assert (status.Status, status.ErrorID) == (0x0110, 0xA710)
        assert status.ErrorComment == "Performed Procedure Step Object may no longer be updated"
    assert served.ledger.performed(UID) == before


@pytest.mark.parametrize(("elements", "status"), [
    ({"PerformedProcedureStepStatus": "COMPLETED"}, 0x0106),
    ({"PerformedProcedureStepStatus": "PAUSED"}, 0x0106),
    ({"PerformedProcedureStepStatus": ""}, 0x0121),
    ({"PerformedProcedureStepStartDate": "2026-1"}, 0x0106),
    ({"PerformedProcedureStepStartTime": ""}, 0x0121),
    ({"ScheduledStepAttributesSequence": []}, 0x0121),
    ({"ScheduledStepAttributesSequence": [dataset(AccessionNumber="A1")]}, 0x0120),
    ({"ScheduledStepAttributesSequence": [dataset(StudyInstanceUID="1.2.")]}, 0x0106),
], ids=str)  # fmt: skip
def test_a_wrong_value_is_refused(served: Scheduling, scu: Association, elements: Mapping[str, Any],
                                  status: int) -> None:
    assert create(scu, begun(**elements)).Status == status
    assert served.ledger.performed(UID) is None


@pytest.mark.parametrize("keyword", [
    "ScheduledStepAttributesSequence", "PerformedProcedureStepID", "PerformedStationAETitle", "Modality",
    "PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime", "PerformedProcedureStepStatus",
])  # fmt: skip
def test_what_is_of_type_1_must_be_there(served: Scheduling, scu: Association, keyword: str) -> None:
    attributes = begun()
    del attributes[keyword]
    status = create(scu, attributes)
    assert (status.Status, status.ErrorComment) == (0x0120, keyword)
    assert served.ledger.performed(UID) is None


@pytest.mark.parametrize(("changes", "status"), [
    (ended(PerformedSeriesSequence=[]), 0x0121),
    (ended(PerformedSeriesSequence=[series("1.2", SeriesInstanceUID="")]), 0x0121),
    (ended(PerformedProcedureStepEndDate=""), 0x0121),
    (ended("DISCONTINUED", PerformedProcedureStepEndTime=""), 0x0121),
    (dataset(PerformedProcedureStepStatus="READY"), 0x0106),
], ids=["no series", "no series uid", "no end date", "no end time", "no state"])  # fmt: skip
def test_a_step_does_not_end_without_saying_how(served: Scheduling, scu: Association, changes: Dataset,
                                                status: int) -> None:
    create(scu)
    before = served.ledger.performed(UID)
    assert change(scu, changes).Status == status
    assert served.ledger.performed(UID) == before


def test_duplicate_unknown_and_bad_uids(served: Scheduling, scu: Association) -> None:
    assert create(scu).Status == 0x0000
    assert create(scu).Status == 0x0111
    assert change(scu, ended(), "1.2.3.4.5").Status == 0x0112
    assert served.ledger.performed_counts() == {"IN PROGRESS": 1}


def test_uids_are_made_where_none_is_sent_and_refused_where_they_are_none(served: Scheduling) -> None:
    octets = write_identifier(begun(), IMPLICIT_LITTLE)
    proposed = [ProposedContext(1, PERFORMED_STEP, (IMPLICIT_LITTLE,))]
    with Requestor.connect(served.peer, "CT1", proposed) as peer:
        context = peer.context_of(PERFORMED_STEP)
        assert context is not None

        def ask(field: Field, uid: str, dataset: bytes | None, sop_class: str = PERFORMED_STEP) -> Command:
            request = messages.normalized_request(field, peer.next_message_id(), sop_class, uid,
                                                  has_dataset=dataset is not None)
            return peer.call(context, request, dataset)[0]

        made = ask(Field.N_CREATE, "", octets)
        assert made.status == 0x0000
        assert served.ledger.performed(made.affected_sop_instance_uid) is not None
        assert ask(Field.N_CREATE, "../1", octets).status == 0x0117
        assert ask(Field.N_CREATE, UID, octets, "1.2.840.10008.1.1").status == 0x0118
        assert ask(Field.N_CREATE, UID, None).status == 0x0120
        assert ask(Field.N_SET, UID, None).status == 0x0120
        assert ask(Field.N_GET, UID, None).status == 0x0211
        assert ask(Field.N_CREATE, UID, b"\x40\0\0\1SQ\0\0\xff\0\0\0").status == 0xC000
    assert served.ledger.performed_counts() == {"IN PROGRESS": 1}


def test_what_a_step_is_does_not_change(served: Scheduling, scu: Association) -> None:
    create(scu)
    again = ended()
    again.PatientID, again.Modality = "P1", "CT"  # some machines send all of it again
    assert change(scu, again).Status == 0x0000
    create(scu, uid=UID + ".2")
    of_another = dataset(PatientID="P9", PerformedProcedureStepDescription="kept")
    status = change(scu, of_another, UID + ".2")
    assert (status.Status, status.ErrorComment) == (0x0107, "not changed: PatientID")
    step = served.ledger.performed(UID + ".2")
    assert step is not None and step.patient_id == "P1"
    assert step.attributes["00100020"]["Value"] == ["P1"]
    assert step.attributes["00400254"]["Value"] == ["kept"]


def test_a_step_is_its_creators(served: Scheduling, scu: Association) -> None:
    served.ledger.add_device(Device("CT2", "127.0.0.1"))
    create(scu)
    other = associate(served, "CT2")
    assert change(other, ended()).Status == 0x0124
    other.release()
    step = served.ledger.performed(UID)
    assert step is not None and step.state == "IN PROGRESS"


def test_a_step_that_was_not_scheduled_is_kept(served: Scheduling, scu: Association) -> None:
    served.schedule(worklist_item(1))
    unscheduled = begun(ScheduledStepAttributesSequence=[dataset(StudyInstanceUID="1.2.3.1")])
    assert create(scu, unscheduled).Status == 0x0000
    assert served.ledger.scheduled_counts() == {"SCHEDULED": 1}


def test_n_get(served: Scheduling, scu: Association) -> None:
    create(scu, begun(PatientName="Müller^Jürgen", SpecificCharacterSet="ISO_IR 100"))
    status, shown = scu.send_n_get([], ModalityPerformedProcedureStepRetrieve, UID)
    assert status.Status == 0x0000 and shown is not None
    assert (shown.PatientName, shown.PerformedProcedureStepStatus) == ("Müller^Jürgen", "IN PROGRESS")
    two = [Tag(0x00400252), Tag(0x00102180)]
    status, shown = scu.send_n_get(two, ModalityPerformedProcedureStepRetrieve, UID)
    assert status.Status == 0x0001 and shown is not None
    assert [str(element.keyword) for element in shown] == ["PerformedProcedureStepStatus"]
    assert scu.send_n_get([], ModalityPerformedProcedureStepRetrieve, "1.2.9")[0].Status == 0x0112


SERVER = """
import sys
from pathlib import Path
from tests.node.worklists import scheduling
with scheduling(Path(sys.argv[1])) as served:
    print(served.port, flush=True)
    sys.stdin.read()
"""


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path)], stdout=subprocess.PIPE,
                               stdin=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    ae = AE("CT1")
    ae.add_requested_context(ModalityPerformedProcedureStep)
    association = ae.associate("127.0.0.1", port, ae_title=AE_TITLE)
    assert create(association).Status == 0x0000
    assert change(association, ended()).Status == 0x0000
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    wait_for(lambda: not association.is_established, "the end of the association")
    ledger = Ledger.open(sqlite_url(tmp_path / "ledger.db"))
    step = ledger.performed(UID)
    ledger.close()
    assert step is not None and step.state == "COMPLETED"
