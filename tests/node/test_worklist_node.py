"""A whole node: a file in its folder becomes a step that a modality asks for, performs and stores; then the
study is complete, and that survives a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    ModalityPerformedProcedureStep,
    ModalityWorklistInformationFind,
)

from archive.ledger import Device, Ledger
from archive.settings import render_toml
from federation.settings import UplinkSettings
from miss.processes import free_ports, listening
from node.dimse.contexts import IMPLICIT_LITTLE
from node.dimse.identifiers import write_identifier
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.service import Node
from node.settings import CompletionSettings, DimseSettings, NodeSettings, WorklistSettings
from tests.datasets import CT, EXPLICIT, make_instance
from tests.federation.regions import make_region
from tests.node.storing import store
from tests.node.test_mpps import begun, ended, series
from tests.node.worklists import dataset, query, worklist_item
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
RUN = "import sys, pathlib; from archive.settings import load; from node.service import Node\n" \
      "from node.settings import NodeSettings\n" \
      "Node(load(NodeSettings, pathlib.Path(sys.argv[1]))).run()"


@pytest.fixture
def settings(tmp_path: Path) -> NodeSettings:
    region = make_region(tmp_path / "region")
    identity = region.node(region.add_ward("San Martino", "Radiology", "SANMARTINO"), "127.0.0.1:1")
    region.ledger.close()
    folder = tmp_path / "worklist"
    folder.mkdir()
    port, = free_ports(1)
    made = NodeSettings(
        state=tmp_path / "node", identity=identity.folder,
        dimse=DimseSettings(host="127.0.0.1", port=port, stop_grace_s=2.0),
        uplink=UplinkSettings(enabled=False),
        worklist=WorklistSettings(folder=folder, folder_poll_s=0.05),
        completion=CompletionSettings(quiet_s=1000.0),
    )
    made.state.mkdir()
    made = replace(made, archive=replace(made.archive, free_bytes_min=0))
    ledger = Ledger.open(made.ledger_url)
    ledger.add_device(Device("CT1", "127.0.0.1"))
    ledger.close()
    return made


def perform(port: int, item: Dataset) -> str:
    """What a modality does with what the worklist tells it, to the end; the study's UID."""
    ae = AE("CT1")
    ae.add_requested_context(ModalityWorklistInformationFind)
    ae.add_requested_context(ModalityPerformedProcedureStep)
    association = ae.associate("127.0.0.1", port, ae_title="MISS")
    assert association.is_established

    def asked() -> list[Dataset]:
        answers = association.send_c_find(query(AccessionNumber=item.AccessionNumber),
                                          ModalityWorklistInformationFind)
        return [answer for _, answer in list(answers) if answer is not None]

    told, = wait_for(asked, "the step on the worklist")
    study_uid = str(told.StudyInstanceUID)
    step, = told.ScheduledProcedureStepSequence
    reference = dataset(StudyInstanceUID=study_uid, AccessionNumber=told.AccessionNumber,
                        ScheduledProcedureStepID=step.ScheduledProcedureStepID)
    status, _ = association.send_n_create(begun(ScheduledStepAttributesSequence=[reference]),
                                          ModalityPerformedProcedureStep, f"{study_uid}.9")
    assert status.Status == 0x0000
    instance = make_instance(study_uid=study_uid)
    proposed = [ProposedContext(1, CT, (EXPLICIT,))]
    with Requestor.connect(Peer("127.0.0.1", port, "MISS"), "CT1", proposed) as requestor:
        assert store(requestor, instance) == 0x0000
    done = ended(PerformedSeriesSequence=[series(instance.sop_instance_uid)])
    status, _ = association.send_n_set(done, ModalityPerformedProcedureStep, f"{study_uid}.9")
    assert status.Status == 0x0000
    association.release()
    return study_uid


def scheduled_today(settings: NodeSettings) -> Dataset:
    """A worklist item, in a file of the node's folder."""
    item = worklist_item(1, {"ScheduledProcedureStepStartDate": f"{datetime.now():%Y%m%d}"})
    assert settings.worklist.folder is not None
    (settings.worklist.folder / "one.wl").write_bytes(write_identifier(item, IMPLICIT_LITTLE))
    return item


def test_from_a_file_to_a_complete_study(settings: NodeSettings) -> None:
    item = scheduled_today(settings)
    with Node(settings) as node:
        study_uid = perform(node.dicom_port, item)
        wait_for(lambda: study_uid in node.ledger.completions_of([study_uid]), "the complete study")
        assert node.ledger.completions_of([study_uid])[study_uid].why == "performed step"
        assert node.ledger.scheduled_counts() == {"COMPLETED": 1}


def test_a_kill_loses_no_step_and_no_study(settings: NodeSettings, tmp_path: Path) -> None:
    item = scheduled_today(settings)
    file = tmp_path / "node.toml"
    file.write_text(render_toml(settings))
    process = subprocess.Popen([sys.executable, "-c", RUN, str(file)], cwd=REPOSITORY)
    try:
        wait_for(lambda: listening("127.0.0.1", settings.dimse.port), "the node")
        study_uid = perform(settings.dimse.port, item)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    with Node(settings) as node:
        wait_for(lambda: study_uid in node.ledger.completions_of([study_uid]), "the complete study")
        assert node.ledger.completions_of([study_uid])[study_uid].why == "performed step"
        assert node.ledger.scheduled_counts() == {"COMPLETED": 1}
        assert node.ledger.performed_counts() == {"COMPLETED": 1}
