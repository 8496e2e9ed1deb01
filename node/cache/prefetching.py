"""Has the priors of the patients on the worklist here before they come: what this ward had given up comes
back from the region, and what other wards hold is copied, as far as the region shows it to the device that
the patient is scheduled for. Each stays until its appointment is over.

A copy of another ward's study is this ward's from then on, as one that was delivered from ward to ward is
(`federation/deliveries_taking.py`): its provenance names that ward in the place of a device and keeps the
issuer, so that the patient stays the same, and the region learns that this ward holds it too.

What was done is a row of the ledger (the pin): after a restart it goes on where it stood. Bounds: steps and
priors of a round, one study after the other, and only while there is room.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import BinaryIO, Protocol

from archive.archive import Archive
from archive.dataset.jsonsets import text_of
from archive.errors import Forbidden, MissError, NotFound, OutOfResources, Unavailable
from archive.ledger import Ledger, Pin, ScheduledStep, StepSearch
from archive.ledger.keeping import PRIOR
from archive.ledger.worklist import OVER
from archive.model import InstanceHead, Level, Match, PatientKey, Provenance, Query, StoredInstance
from federation.deliveries_grants import origin_device
from federation.policy import Principal, Reach, Role
from federation.source import Answer
from node.cache.bringing import Bringing
from node.cache.room import RoomMaker
from node.cache.rules import PrefetchRule, RulesFile

log = logging.getLogger(__name__)

STEPS_MAX = 2_000     # of one round
STUDIES_MAX = 1_000   # of one patient that are looked at
MARGIN_US = 86_400 * 1_000_000  # after the appointment
LOOK_S = 30.0
_CHUNK = 1 << 20
_ISSUER = "00100021"
BY = "worklist"


@dataclass(slots=True)
class Prefetched:
    """What the last round did, for people."""

    at_us: int = 0
    steps: int = 0
    studies: int = 0
    brought: int = 0
    copied: int = 0
    left: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Appointment:
    """Whom a step is for, on what, and when its priors may go."""

    patient: PatientKey
    study_uid: str
    modality: str
    stations: tuple[str, ...]
    until_us: int


class RegionView(Protocol):
    """The region as one device may see it: a node's window on it."""

    def search(self, principal: Principal, query: Query) -> Answer: ...

    def instances(self, principal: Principal, study_uid: str) -> Sequence[StoredInstance]: ...

    def fetch(self, principal: Principal, instance: StoredInstance) -> BinaryIO: ...


class Prefetching:
    """See the module's docstring. Used by one thread."""

    def __init__(
        self,
        archive: Archive,
        ledger: Ledger,
        rules: RulesFile,
        bringing: Bringing,
        room: RoomMaker,
        window: RegionView | None,
        *,
        ward: str,
        issuer: str,
        clock: Callable[[], int],
        stopping: Callable[[], bool],
    ) -> None:
        self._archive = archive
        self._ledger = ledger
        self._rules = rules
        self._bringing = bringing
        self._room = room
        self._window = window
        self._ward = ward
        self._issuer = issuer
        self._clock = clock
        self._stopping = stopping
        self._done_at: dict[str, str] = {}  # the rules with an hour: the day on which each was done
        self._seen: dict[str, tuple[object, ...]] = {}  # the others: of which worklist
        self.last = Prefetched()

    def look(self) -> None:
        """Does what is due by now. Raises Unavailable when the region is away: then it is done later."""
        now = datetime.fromtimestamp(self._clock() / 1e6)
        for rule in self._rules.look().prefetch:
            if self._stopping():
                return
            steps = list(self._steps(rule, now)) if self._is_hour(rule, now) else []
            day = now.strftime("%Y%m%d")
            mark = (day, *sorted((step.id, step.changed_us) for step in steps))
            if not steps or (rule.at and self._done_at.get(rule.name) == day):
                continue
            if not rule.at and self._seen.get(rule.name) == mark:
                continue
            done = Prefetched(self._clock())
            try:
                self._fetch(rule, steps, done)
            finally:
                self.last = done
            if not done.reason:
                self._done_at[rule.name] = day
                self._seen[rule.name] = mark

    @staticmethod
    def _is_hour(rule: PrefetchRule, now: datetime) -> bool:
        return not rule.at or now.strftime("%H:%M") >= rule.at

    def _steps(self, rule: PrefetchRule, now: datetime) -> Iterator[ScheduledStep]:
        """Those that begin within the rule's hours, and were not begun."""
        until = now + timedelta(hours=rule.hours)
        search = StepSearch(first_date=f"{now:%Y%m%d}", last_date=f"{until:%Y%m%d}")
        count = 0
        for step in self._ledger.scheduled_steps(search):
            begins = f"{step.start_date}{(step.start_time or '235959')[:6]:0<6}"
            if begins > f"{until:%Y%m%d%H%M%S}" or step.status in OVER or not rule.wants(step.modality):
                continue
            yield step
            count += 1
            if count >= STEPS_MAX:
                log.warning("more than %d steps: the priors of the others are not fetched", STEPS_MAX)
                return

    def _fetch(self, rule: PrefetchRule, steps: Sequence[ScheduledStep], done: Prefetched) -> None:
        pinned = {(pin.study_uid, pin.until_us) for pin in self._ledger.pins() if pin.kind == PRIOR}
        for step in steps:
            done.steps += 1
            appointment = self._appointment(step)
            if appointment is None or self._stopping():
                continue
            for prior in self._priors(rule, appointment, done):
                try:
                    self._have(prior, appointment, done)
                except (Unavailable, OutOfResources) as error:
                    done.left += 1
                    done.reason = str(error)
                    log.warning("priors are not fetched now: %s", error)
                    return
                except MissError as error:
                    done.left += 1
                    log.warning("a prior is not fetched: %s", error)
                    continue
                uid = prior.study["StudyInstanceUID"]
                if not any(one == uid and until >= appointment.until_us for one, until in pinned):
                    pin = Pin(uid, PRIOR, appointment.until_us, BY, self._clock())
                    self._ledger.pin_study(pin)
                    pinned.add((uid, appointment.until_us))

    def _appointment(self, step: ScheduledStep) -> Appointment | None:
        """None without a Patient ID: it names nobody."""
        if not step.patient_id:
            return None
        issuer = text_of(json.loads(step.dataset), _ISSUER).strip() or self._issuer
        try:
            begins = datetime.strptime(step.start_date + (step.start_time or "2359")[:4], "%Y%m%d%H%M")
        except ValueError:
            begins = datetime.fromtimestamp(self._clock() / 1e6)
        return Appointment(
            PatientKey(issuer, step.patient_id), step.study_uid, step.modality, step.stations,
            int(begins.timestamp() * 1e6) + MARGIN_US,
        )  # fmt: skip

    def _priors(self, rule: PrefetchRule, appointment: Appointment, done: Prefetched) -> list[Match]:
        """Of the patient, here or in the region, the newest first."""
        query = Query(
            Level.STUDY, (("PatientID", appointment.patient.patient_id),),
            person=frozenset({appointment.patient}), limit=STUDIES_MAX,
        )
        found = {match.study["StudyInstanceUID"]: match for match in self._archive.search(query)}
        principal = self._principal(appointment)
        if principal is not None and self._window is not None:
            answer = self._window.search(principal, query)
            for match in answer.matches:
                if match.issuer == appointment.patient.issuer:
                    found.setdefault(match.study["StudyInstanceUID"], match)
            if not all(one.covered for one in answer.coverage):
                done.left += 1
        found.pop(appointment.study_uid, None)
        oldest = datetime.fromtimestamp(self._clock() / 1e6) - timedelta(days=rule.years * 365.25)
        taken = [match for match in found.values() if rule.takes(match, f"{oldest:%Y%m%d}")]
        taken.sort(key=lambda match: (match.study.get("StudyDate", ""), match.study.get("StudyTime", "")),
                   reverse=True)  # fmt: skip
        priors: list[Match] = []
        for match in taken:
            if len(priors) >= rule.count:
                break
            if not rule.body_parts or self._shows(match, rule.body_parts, principal):
                priors.append(match)
        done.studies += len(priors)
        return priors

    def _shows(self, prior: Match, parts: frozenset[str], principal: Principal | None) -> bool:
        """Whether any series of it is of one of these body parts."""
        for part in parts:
            keys = (("StudyInstanceUID", prior.study["StudyInstanceUID"]), ("BodyPartExamined", part))
            query = Query(Level.SERIES, keys, limit=1)
            if self._archive.search(query):
                return True
            window = self._window
            if principal is not None and window is not None and window.search(principal, query).matches:
                return True
        return False

    def _principal(self, appointment: Appointment) -> Principal | None:
        """The device for which the patient is scheduled, if it may look into the region: by what it may see
        its ward may be sent."""
        for station in appointment.stations:
            device = self._ledger.device(station)
            if device is not None and device.enabled and device.reach == Reach.REGION.value:
                return Principal(device.ae_title, Role.DEVICE, self._ward, reach=Reach.REGION)
        return None

    def _have(self, prior: Match, appointment: Appointment, done: Prefetched) -> None:
        """The whole study is here when this returns, as far as the region shows it."""
        uid = prior.study["StudyInstanceUID"]
        if self._archive.index.cached.evicted_of(uid):
            done.brought += self._bringing.bring(uid, urgent=False).instances
        principal = self._principal(appointment)
        if principal is None or self._window is None:
            return
        here = {one.head.sop_instance_uid for one in self._archive.instances(uid)}
        try:
            there = self._window.instances(principal, uid)
        except (NotFound, Forbidden):
            return
        for instance in there:
            if self._stopping():
                raise Unavailable("the node stops")
            if instance.head.sop_instance_uid in here:
                continue
            if not self._room.has_room_for(instance.location.length):
                raise OutOfResources("there is no room for it above cache.free_percent_high")
            self._copy(principal, instance)
            done.copied += 1

    def _copy(self, principal: Principal, instance: StoredInstance) -> None:
        assert self._window is not None
        source = instance.head.provenance
        origin = Provenance(
            self._ward, source.issuer, origin_device(source.ward), source.calling_ae, time.time_ns() // 1000
        )
        head = InstanceHead(
            instance.head.sop_class_uid, instance.head.sop_instance_uid, instance.head.transfer_syntax_uid,
            origin,
        )  # fmt: skip
        with self._window.fetch(principal, instance) as file:
            reception = self._archive.intake.begin(head, size_hint=instance.location.length)
            try:
                while chunk := file.read(_CHUNK):
                    reception.write(chunk)
                ticket = reception.commit(expected_digest=instance.digest)
            except BaseException:
                reception.abort()
                raise
            ticket.wait_durable()
