"""The modality worklist (PS3.4 Annex K): scheduled procedure steps, each with its whole data set, found by
the keys that narrow a search. Whoever schedules (a command, a folder, an HL7 feed) upserts by accession
number, requested procedure and step. It matches no identifier: `node/dimse/services/worklist.py` does."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, literal, or_, select, tuple_, update

from archive.database import storable
from archive.dataset.jsonsets import Attributes, first_of, items_of, put, text_of
from archive.errors import InvalidInput, OutOfResources
from archive.folding import clean_date, clean_time
from archive.ledger.tables import Subject, as_row, scheduled_station, scheduled_step
from archive.model import is_uid

SCHEDULED, ARRIVED, READY, STARTED = "SCHEDULED", "ARRIVED", "READY", "STARTED"
COMPLETED, DISCONTINUED, DEPARTED = "COMPLETED", "DISCONTINUED", "DEPARTED"
STEP_STATUSES = (SCHEDULED, ARRIVED, READY, STARTED, COMPLETED, DISCONTINUED, DEPARTED)
OVER = (COMPLETED, DISCONTINUED, DEPARTED)
_RANK = {SCHEDULED: 0, ARRIVED: 1, READY: 2, STARTED: 3, COMPLETED: 4, DISCONTINUED: 4, DEPARTED: 4}

SCHEDULED_STEPS_MAX = 100_000
DATASET_CHARS_MAX = 1 << 20
STATIONS_MAX = 32
_PAGE = 500
_KEY_CHARS_MAX = 256

STEP_SEQUENCE = "00400100"
_ACCESSION, _PROCEDURE_ID, _STUDY_UID, _PATIENT_ID = "00080050", "00401001", "0020000D", "00100020"
_STATION, _DATE, _TIME, _STEP_ID = "00400001", "00400002", "00400003", "00400009"
_MODALITY, _STATUS = "00080060", "00400020"


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One scheduled procedure step. `dataset` is its worklist item as DICOM JSON text, whose Scheduled
    Procedure Step Sequence has this step alone; the others are read from it. `origin` is who put it there:
    "command", "file:NAME", or a feed's word. `start_date` is YYYYMMDD, `start_time` HHMMSS or part of it."""

    id: str
    accession_number: str
    requested_procedure_id: str
    step_id: str
    study_uid: str
    patient_id: str
    modality: str
    start_date: str
    start_time: str
    status: str
    origin: str
    dataset: str
    changed_us: int = 0

    @property
    def attributes(self) -> dict[str, Any]:
        """The worklist item, its step in the status that it has now."""
        attributes: dict[str, Any] = json.loads(self.dataset)
        for item in items_of(attributes, STEP_SEQUENCE):
            put(item, _STATUS, "CS", self.status)
        return attributes

    @property
    def stations(self) -> tuple[str, ...]:
        """The AE titles that it is scheduled for; none when anybody may perform it."""
        return _stations(first_of(json.loads(self.dataset), STEP_SEQUENCE))


def steps_of(attributes: Attributes, origin: str) -> list[ScheduledStep]:
    """The steps of a worklist item, one for each item of its Scheduled Procedure Step Sequence. Raises
    InvalidInput where an attribute is missing without which nobody could perform it."""
    steps = []
    for item in items_of(attributes, STEP_SEQUENCE):
        steps.append(_step({**attributes, STEP_SEQUENCE: {"vr": "SQ", "Value": [item]}}, item, origin))
    if not steps:
        raise InvalidInput("no Scheduled Procedure Step Sequence with an item")
    return steps


def _step(attributes: Attributes, item: Attributes, origin: str) -> ScheduledStep:
    accession, procedure_id = _key(attributes, _ACCESSION), _key(attributes, _PROCEDURE_ID)
    study_uid, step_id = _key(attributes, _STUDY_UID), _key(item, _STEP_ID)
    if not is_uid(study_uid):
        raise InvalidInput("no Study Instance UID, or one that is none (type 1 in PS3.4 Table K.6-1)")
    if not step_id:
        raise InvalidInput("no Scheduled Procedure Step ID (type 1 in PS3.4 Table K.6-1)")
    status = text_of(item, _STATUS) or SCHEDULED
    if status not in STEP_STATUSES:
        raise InvalidInput(f"a Scheduled Procedure Step Status is one of {', '.join(STEP_STATUSES)}")
    if len(_stations(item)) > STATIONS_MAX:
        raise InvalidInput(f"more than {STATIONS_MAX} Scheduled Station AE Titles")
    dataset = json.dumps(attributes, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    if len(dataset) > DATASET_CHARS_MAX:
        raise InvalidInput(f"more than {DATASET_CHARS_MAX:,} characters in one worklist item")
    return ScheduledStep(
        step_key(accession, procedure_id, step_id, study_uid), accession, procedure_id, step_id, study_uid,
        _key(attributes, _PATIENT_ID), _key(item, _MODALITY), clean_date(_key(item, _DATE)),
        clean_time(_key(item, _TIME)), status, origin, dataset,
    )  # fmt: skip


def step_key(accession_number: str, requested_procedure_id: str, step_id: str, study_uid: str) -> str:
    """What makes two messages speak of the same step: accession number, requested procedure and step, the
    study in place of an accession number that nobody gave."""
    named = (accession_number or study_uid, requested_procedure_id, step_id)
    return hashlib.blake2b("\0".join(named).encode(), digest_size=12).hexdigest()


def _key(attributes: Attributes, tag: str) -> str:
    return storable(text_of(attributes, tag).strip())[:_KEY_CHARS_MAX]


def _stations(item: Attributes) -> tuple[str, ...]:
    return tuple(filter(None, (title.strip() for title in text_of(item, _STATION).split("\\"))))


@dataclass(frozen=True, slots=True)
class StepSearch:
    """What narrows a search before each step is matched; "" and None ask for nothing. Dates are inclusive.
    `stations` are AE titles of which a step names one, or, with "", names none."""

    stations: Collection[str] | None = None
    first_date: str = ""
    last_date: str = ""
    patient_id: str = ""
    accession_number: str = ""
    study_uid: str = ""
    modality: str = ""
    statuses: Collection[str] | None = None


class Worklist(Subject):
    """The scheduled procedure steps of a node."""

    def schedule(self, steps: Sequence[ScheduledStep], *, instead_of: str = "") -> int:
        """Upsert steps by their key; how many changed. A status only moves forward: what was started is not
        scheduled again by a source that does not know. With `instead_of`, other steps of this origin go.
        Raises OutOfResources past SCHEDULED_STEPS_MAX."""
        now_us = time.time_ns() // 1000

        def work(connection: Connection) -> int:
            changed = sum(_upsert(connection, step, now_us) for step in steps)
            if instead_of:
                kept = [step.id for step in steps]
                of_origin = scheduled_step.c.origin == storable(instead_of)
                changed += _remove(connection, select(scheduled_step.c.id).where(
                    of_origin, scheduled_step.c.id.not_in(kept)))  # fmt: skip
            return changed

        return self._database.write(work)

    def unschedule(self, step_ids: Iterable[str]) -> int:
        """Take steps off the worklist; how many were there."""
        ids = list(step_ids)
        return self._database.write(lambda c: sum(
            _remove(c, select(scheduled_step.c.id).where(scheduled_step.c.id == one)) for one in ids
        ))  # fmt: skip

    def unschedule_origin(self, origin: str) -> int:
        """Take the steps of one origin off the worklist."""
        of_origin = select(scheduled_step.c.id).where(scheduled_step.c.origin == storable(origin))
        return self._database.write(lambda c: _remove(c, of_origin))

    def origins(self, prefix: str) -> set[str]:
        """The origins that begin with `prefix`."""
        query = select(scheduled_step.c.origin).where(
            scheduled_step.c.origin.startswith(prefix, autoescape=True)
        ).distinct()  # fmt: skip
        return {row.origin for row in self._database.read(lambda c: c.execute(query).fetchall())}

    def scheduled(self, step_id: str) -> ScheduledStep | None:
        """One step by its key."""
        query = select(scheduled_step).where(scheduled_step.c.id == step_id)
        row = self._database.read(lambda c: c.execute(query).fetchone())
        return None if row is None else ScheduledStep(**row._mapping)

    def scheduled_like(self, beginning: str) -> list[ScheduledStep]:
        """The first two steps whose key begins so."""
        query = select(scheduled_step).where(scheduled_step.c.id.startswith(beginning, autoescape=True))
        rows = self._database.read(lambda c: c.execute(query.limit(2)).fetchall())
        return [ScheduledStep(**row._mapping) for row in rows]

    def scheduled_steps(self, search: StepSearch = StepSearch()) -> Iterator[ScheduledStep]:
        """Steps by date, time and key, read page by page."""
        order = (scheduled_step.c.start_date, scheduled_step.c.start_time, scheduled_step.c.id)
        query = _narrowed(search).order_by(*order).limit(_PAGE)
        after: tuple[str, str, str] | None = None
        while True:
            page = query if after is None else query.where(tuple_(*order) > tuple_(*map(literal, after)))
            rows = self._database.read(lambda c, page=page: c.execute(page).fetchall())  # type: ignore[misc]
            for row in rows:
                yield ScheduledStep(**row._mapping)
            if len(rows) < _PAGE:
                return
            after = (rows[-1].start_date, rows[-1].start_time, rows[-1].id)

    def scheduled_counts(self) -> dict[str, int]:
        """How many steps there are in each status."""
        query = select(scheduled_step.c.status, func.count()).group_by(scheduled_step.c.status)
        return {row[0]: row[1] for row in self._database.read(lambda c: c.execute(query).fetchall())}

    def prune_scheduled(self, before_date: str, before_us: int) -> int:
        """Take off what was to begin before `before_date` (YYYYMMDD), or names no date and did not change
        since `before_us`; how many."""
        dated = (scheduled_step.c.start_date != "") & (scheduled_step.c.start_date < before_date)
        undated = (scheduled_step.c.start_date == "") & (scheduled_step.c.changed_us < before_us)
        return self._database.write(
            lambda c: _remove(c, select(scheduled_step.c.id).where(or_(dated, undated)))
        )


def _narrowed(search: StepSearch) -> Select[Any]:
    query = select(scheduled_step)
    if search.stations is not None:
        at = select(scheduled_station.c.step).where(scheduled_station.c.ae_title.in_(list(search.stations)))
        if search.first_date:
            at = at.where(scheduled_station.c.start_date >= search.first_date)
        if search.last_date:
            at = at.where(scheduled_station.c.start_date <= search.last_date)
        query = query.where(scheduled_step.c.id.in_(at))
    if search.first_date:
        query = query.where(scheduled_step.c.start_date >= search.first_date)
    if search.last_date:
        query = query.where(scheduled_step.c.start_date <= search.last_date)
    for column in ("patient_id", "accession_number", "study_uid", "modality"):
        if value := getattr(search, column):
            query = query.where(scheduled_step.c[column] == storable(value))
    if search.statuses is not None:
        query = query.where(scheduled_step.c.status.in_(list(search.statuses)))
    return query


def _upsert(connection: Connection, step: ScheduledStep, now_us: int) -> int:
    found = connection.execute(select(scheduled_step).where(scheduled_step.c.id == step.id)).fetchone()
    if found is not None:
        same = (found.dataset, found.origin) == (storable(step.dataset), storable(step.origin))
        status = max(found.status, step.status, key=_RANK.__getitem__)
        if same and status == found.status:
            return 0
        step = replace(step, status=status)
    elif (connection.execute(select(func.count()).select_from(scheduled_step)).scalar_one()
          >= SCHEDULED_STEPS_MAX):
        raise OutOfResources(f"the worklist holds {SCHEDULED_STEPS_MAX:,} steps already")
    row = as_row(replace(step, changed_us=now_us))
    if found is None:
        connection.execute(insert(scheduled_step).values(row))
    else:
        connection.execute(update(scheduled_step).where(scheduled_step.c.id == step.id).values(row))
        connection.execute(delete(scheduled_station).where(scheduled_station.c.step == step.id))
    connection.execute(insert(scheduled_station), [
        {"ae_title": storable(title), "start_date": row["start_date"], "step": step.id}
        for title in dict.fromkeys(step.stations or ("",))
    ])  # fmt: skip
    return 1


def _remove(connection: Connection, ids: Select[Any]) -> int:
    connection.execute(delete(scheduled_station).where(scheduled_station.c.step.in_(ids)))
    return connection.execute(delete(scheduled_step).where(scheduled_step.c.id.in_(ids))).rowcount
