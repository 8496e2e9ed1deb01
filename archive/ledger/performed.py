"""Modality performed procedure steps (PS3.4 F.7): what machines report to have done, durable before they are
answered, and the scheduled steps that follow them. What may be reported, `node/dimse/services/mpps.py`
says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from archive.database import storable
from archive.dataset.jsonsets import items_of, text_of
from archive.errors import NotFound, OtherContent
from archive.ledger.tables import Subject, performed_reference, performed_step, scheduled_step
from archive.ledger.worklist import COMPLETED, DISCONTINUED, STARTED

IN_PROGRESS = "IN PROGRESS"
FINAL = (COMPLETED, DISCONTINUED)
PERFORMED_STATES = (IN_PROGRESS, *FINAL)
_SCHEDULED_AS = {IN_PROGRESS: STARTED, COMPLETED: COMPLETED, DISCONTINUED: DISCONTINUED}

_SERIES_SEQUENCE = "00400340"
_IMAGES, _OTHERS, _REFERENCED_UID = "00081140", "00400220", "00081155"
_UIDS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class StepReference:
    """A scheduled step that is performed (an item of the Scheduled Step Attributes Sequence)."""

    study_uid: str
    accession_number: str = ""
    requested_procedure_id: str = ""
    scheduled_step_id: str = ""


@dataclass(frozen=True, slots=True)
class PerformedStep:
    """One performed step as it stands. `device` is the AE title of who reports it; `dataset` is all that was
    reported, as DICOM JSON text."""

    uid: str
    state: str
    device: str
    step_id: str
    station_ae_title: str
    modality: str
    patient_id: str
    start_date: str
    start_time: str
    dataset: str
    references: tuple[StepReference, ...] = ()
    created_us: int = 0
    changed_us: int = 0

    @property
    def attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = json.loads(self.dataset)
        return attributes

    @property
    def instances(self) -> set[str]:
        """The SOP Instance UIDs that its Performed Series Sequence lists."""
        return {
            uid
            for series in items_of(self.attributes, _SERIES_SEQUENCE)
            for sequence in (_IMAGES, _OTHERS)
            for item in items_of(series, sequence)
            if (uid := text_of(item, _REFERENCED_UID))
        }


class PerformedSteps(Subject):
    """The performed steps of a node."""

    def create_performed(self, step: PerformedStep) -> None:
        """Keep a new step; the scheduled steps that it performs have started. Raises OtherContent when there
        is one of its UID."""
        now_us = time.time_ns() // 1000

        def work(connection: Connection) -> None:
            if _row(connection, step.uid) is not None:
                raise OtherContent("a performed step with this UID is here")
            connection.execute(insert(performed_step).values(
                _values(replace(step, created_us=now_us, changed_us=now_us))))  # fmt: skip
            if step.references:
                connection.execute(insert(performed_reference), [
                    {"step": step.uid, "study_uid": each.study_uid, "accession_number": each.accession_number,
                     "requested_procedure_id": each.requested_procedure_id,
                     "scheduled_step_id": each.scheduled_step_id}
                    for each in dict.fromkeys(map(_storable, step.references))
                ])  # fmt: skip
            _follow(connection, step, now_us)

        self._database.write(work)

    def change_performed(self, uid: str, change: Callable[[PerformedStep], PerformedStep]) -> PerformedStep:
        """Give a step the form that `change` makes of it, in one transaction; it may refuse by raising and
        may be called again. Raises NotFound when there is none of this UID."""
        now_us = time.time_ns() // 1000

        def work(connection: Connection) -> PerformedStep:
            row = _row(connection, uid)
            if row is None:
                raise NotFound("there is no performed step with this UID")
            changed = replace(change(_step(connection, row)), changed_us=now_us)
            connection.execute(
                update(performed_step).where(performed_step.c.uid == uid).values(_values(changed))
            )
            _follow(connection, changed, now_us)
            return changed

        return self._database.write(work)

    def performed(self, uid: str) -> PerformedStep | None:
        """One step by its SOP Instance UID."""

        def work(connection: Connection) -> PerformedStep | None:
            row = _row(connection, uid)
            return None if row is None else _step(connection, row)

        return self._database.read(work)

    def performed_steps(self, limit: int = 100, states: Collection[str] | None = None) -> list[PerformedStep]:
        """The newest steps, newest first."""
        query = select(performed_step).order_by(performed_step.c.created_us.desc()).limit(limit)
        if states is not None:
            query = query.where(performed_step.c.state.in_(list(states)))
        return self._database.read(lambda c: [_step(c, row) for row in c.execute(query).fetchall()])

    def performed_of(self, study_uids: Collection[str]) -> dict[str, list[tuple[str, str]]]:
        """The UIDs and states of the steps that belong to these studies, by study."""
        found: dict[str, list[tuple[str, str]]] = {}
        both = performed_reference.join(
            performed_step, performed_step.c.uid == performed_reference.c.step
        )
        columns = (performed_reference.c.study_uid, performed_step.c.uid, performed_step.c.state)

        def work(connection: Connection) -> None:
            for some in _portions(list(study_uids)):
                query = select(*columns).select_from(both).where(performed_reference.c.study_uid.in_(some))
                for study_uid, uid, state in connection.execute(query.distinct()):
                    found.setdefault(study_uid, []).append((uid, state))

        self._database.read(work)
        return found

    def performed_counts(self) -> dict[str, int]:
        """How many steps there are in each state."""
        query = select(performed_step.c.state, func.count()).group_by(performed_step.c.state)
        return {row[0]: row[1] for row in self._database.read(lambda c: c.execute(query).fetchall())}

    def prune_performed(self, before_us: int) -> int:
        """Forget steps that nobody has changed since `before_us`; how many."""
        old = select(performed_step.c.uid).where(performed_step.c.changed_us < before_us)

        def work(connection: Connection) -> int:
            connection.execute(delete(performed_reference).where(performed_reference.c.step.in_(old)))
            return connection.execute(
                delete(performed_step).where(performed_step.c.changed_us < before_us)
            ).rowcount

        return self._database.write(work)


def _follow(connection: Connection, step: PerformedStep, now_us: int) -> None:
    """The scheduled steps that it performs are as far as it is: those of the same study, step and, where both
    name one, accession number."""
    for each in map(_storable, step.references):
        if not each.scheduled_step_id:
            continue
        same = [scheduled_step.c.study_uid == each.study_uid,
                scheduled_step.c.step_id == each.scheduled_step_id]  # fmt: skip
        if each.accession_number:
            same.append(or_(scheduled_step.c.accession_number == each.accession_number,
                            scheduled_step.c.accession_number == ""))  # fmt: skip
        values = {"status": _SCHEDULED_AS[step.state], "changed_us": now_us}
        connection.execute(update(scheduled_step).where(*same).values(values))


def _portions(uids: list[str]) -> Iterator[list[str]]:
    for at in range(0, len(uids), _UIDS_AT_ONCE):
        yield uids[at : at + _UIDS_AT_ONCE]


def _storable(reference: StepReference) -> StepReference:
    return StepReference(storable(reference.study_uid), storable(reference.accession_number),
                         storable(reference.requested_procedure_id),
                         storable(reference.scheduled_step_id))  # fmt: skip


def _row(connection: Connection, uid: str) -> Any:
    return connection.execute(select(performed_step).where(performed_step.c.uid == uid)).fetchone()


def _step(connection: Connection, row: Any) -> PerformedStep:
    query = select(performed_reference).where(performed_reference.c.step == row.uid)
    references = tuple(
        StepReference(each.study_uid, each.accession_number, each.requested_procedure_id,
                      each.scheduled_step_id)
        for each in connection.execute(query)
    )  # fmt: skip
    return PerformedStep(**row._mapping, references=references)


def _values(step: PerformedStep) -> dict[str, Any]:
    values = {column.name: getattr(step, column.name) for column in performed_step.c}
    return {name: storable(value) if isinstance(value, str) else value for name, value in values.items()}
