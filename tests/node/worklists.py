"""A server of the worklist and of performed steps for the tests, and worklist items to be scheduled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from archive.dataset import jsonsets
from archive.ledger import ScheduledStep
from archive.ledger.worklist import steps_of
from node.dimse.contexts import EXPLICIT_LITTLE, ServiceName
from node.dimse.exchange import Service
from node.dimse.identifiers import write_identifier
from node.dimse.messages import Field
from node.dimse.services.mpps import PerformedSteps
from node.dimse.services.worklist import WorklistFind
from tests.node.serving import Serving, serving

WARD = "san-martino/radiology"


@dataclass(frozen=True)
class Scheduling(Serving):
    """A running server of both services; `ended` are the studies whose steps ended."""

    ended: list[set[str]]

    def schedule(self, *items: Dataset) -> list[ScheduledStep]:
        steps = [step for item in items for step in steps_of(as_json(item), "test")]
        self.ledger.schedule(steps)
        return steps


@contextmanager
def scheduling(folder: Path, *, own_steps_only: bool = False,
               responses_max: int = 100) -> Iterator[Scheduling]:
    ended: list[set[str]] = []

    def tell(studies: Iterable[str]) -> None:
        ended.append(set(studies))

    table: dict[tuple[ServiceName, int], Service] = {}
    with serving(folder, table=table) as served:
        steps = PerformedSteps(served.ledger, tell)
        table[ServiceName.WORKLIST, Field.C_FIND] = WorklistFind(served.ledger, WARD, responses_max,
                                                                 own_steps_only)
        for field in (Field.N_CREATE, Field.N_SET, Field.N_GET):
            table[ServiceName.MPPS, field] = steps
        yield Scheduling(served.server, served.ledger, served.admission, ended)


def as_json(item: Dataset) -> dict[str, Any]:
    return jsonsets.from_octets(write_identifier(item, EXPLICIT_LITTLE), EXPLICIT_LITTLE)


def worklist_item(number: int = 1, step: Mapping[str, Any] | None = None, **elements: Any) -> Dataset:
    """A whole worklist item; `step` changes the Scheduled Procedure Step Sequence's one item."""
    scheduled = dataset(
        ScheduledStationAETitle="CT1", ScheduledProcedureStepStartDate="20261122",
        ScheduledProcedureStepStartTime="0930", Modality="CT", ScheduledProcedureStepDescription="Head",
        ScheduledPerformingPhysicianName="Bianchi^Luca", ScheduledProcedureStepID=f"S{number}",
    )
    update(scheduled, step or {})
    item = dataset(
        SpecificCharacterSet="ISO_IR 192", AccessionNumber=f"A{number}", ReferringPhysicianName="Verdi^Ugo",
        PatientName="Rossi^Maria", PatientID=f"P{number}", PatientBirthDate="19700101", PatientSex="F",
        StudyInstanceUID=f"1.2.3.{number}", RequestedProcedureDescription="CT head",
        ScheduledProcedureStepSequence=[scheduled], RequestedProcedureID=f"R{number}",
    )
    update(item, elements)
    return item


def dataset(**elements: Any) -> Dataset:
    made = Dataset()
    update(made, elements)
    return made


def update(changed: Dataset, elements: Mapping[str, Any]) -> None:
    for keyword, value in elements.items():
        setattr(changed, keyword, value)


def query(step: Mapping[str, Any] | None = None, **elements: Any) -> Dataset:
    """An identifier that asks for what people look at, with these keys."""
    asked = dataset(ScheduledStationAETitle="", ScheduledProcedureStepStartDate="",
                    ScheduledProcedureStepStartTime="", Modality="", ScheduledProcedureStepID="")
    update(asked, step or {})
    made = dataset(AccessionNumber="", PatientName="", PatientID="", StudyInstanceUID="",
                   ScheduledProcedureStepSequence=[asked])
    update(made, elements)
    return made
