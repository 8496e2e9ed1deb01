"""Owns C-FIND of the Modality Worklist SOP class (PS3.4 Annex K): it reads the identifier, narrows the search
by the keys that the ledger has columns for, matches each step by all of them, and sends the matches one by
one until it is cancelled. What a key means, `archive/matching.py` says; it schedules nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from archive.budget import ByteBudget
from archive.dataset.jsonsets import Attributes, items_of, put, with_character_set
from archive.dataset.jsonwriting import encoded
from archive.dataset.nestedkeys import Keys, answered, fits, keys_of
from archive.errors import CannotUnderstand, OutOfResources
from archive.ledger import Ledger, ScheduledStep, StepSearch
from archive.ledger.worklist import OVER, STEP_SEQUENCE, STEP_STATUSES
from archive.predicates import Between, OneOf
from federation.policy import Act, Principal, Role, require
from node.dimse import status as codes
from node.dimse.association import Context
from node.dimse.exchange import Caller, Exchange
from node.dimse.identifiers import IDENTIFIER_BYTES_MAX, careful, received, room
from node.dimse.messages import Command

# A date range and a time range are one span of time (Table K.6-1, Scheduled Procedure Step Start Time).
START_DATE, START_TIME = "00400002", "00400003"
COMBINED = ((START_DATE, START_TIME),)

STATION, MODALITY, STATUS = "00400001", "00080060", "00400020"
PATIENT_ID, ACCESSION_NUMBER, STUDY_UID = "00100020", "00080050", "0020000D"

_IN_STEP = "ScheduledProcedureStepSequence."
# The matching keys of Table K.6-1, required and optional. Whatever else a step's data set has is matched on
# and returned in the same way, attributes within its sequences too.
KEYS: Mapping[str, str] = {
    **dict.fromkeys((
        _IN_STEP + "ScheduledStationAETitle", _IN_STEP + "ScheduledProcedureStepStartDate",
        _IN_STEP + "ScheduledProcedureStepStartTime", _IN_STEP + "Modality",
        _IN_STEP + "ScheduledPerformingPhysicianName", "PatientName", "PatientID",
    ), "R"),
    **dict.fromkeys((
        _IN_STEP + "ScheduledProcedureStepDescription", _IN_STEP + "ScheduledStationName",
        _IN_STEP + "ScheduledProcedureStepLocation", _IN_STEP + "ScheduledProtocolCodeSequence",
        _IN_STEP + "PreMedication", _IN_STEP + "ScheduledProcedureStepID",
        _IN_STEP + "RequestedContrastAgent", _IN_STEP + "ScheduledProcedureStepStatus",
        "RequestedProcedureID", "RequestedProcedureDescription", "RequestedProcedureCodeSequence",
        "StudyInstanceUID",
        "ReferencedStudySequence", "RequestedProcedurePriority", "PatientTransportArrangements",
        "AccessionNumber", "RequestingPhysician", "ReferringPhysicianName", "AdmissionID",
        "CurrentPatientLocation", "ReferencedPatientSequence", "IssuerOfPatientID", "OtherPatientIDsSequence",
        "PatientBirthDate", "PatientSex", "PatientWeight", "PatientSize",
        "ConfidentialityConstraintOnPatientDataDescription", "PatientState", "PregnancyStatus",
        "MedicalAlerts", "Allergies", "SpecialNeeds", "PatientComments",
    ), "O"),
}
OFFERED = tuple(status for status in STEP_STATUSES if status not in OVER)

STATUSES: Mapping[int, str] = {
    codes.SUCCESS: "every match was sent",
    codes.PENDING: "a match",
    codes.PENDING_UNSUPPORTED_KEYS: "a match; a key of a VR without text or numbers was not matched on",
    codes.CANCELLED: "cancelled by C-CANCEL",
    codes.OUT_OF_RESOURCES: "more matches than worklist.responses_max; or the ledger does not answer",
    codes.DOES_NOT_MATCH: "a value that its VR does not allow, or several items in a sequence key",
    codes.CANNOT_UNDERSTAND: "no identifier, or one that can't be read",
    codes.NOT_AUTHORIZED: "the device may not search",
}


@dataclass(frozen=True, slots=True)
class WorklistFind:
    """C-FIND SCP over the scheduled steps. With `own_steps_only` a device sees the steps that name its AE
    title, or none."""

    ledger: Ledger
    ward: str
    responses_max: int
    own_steps_only: bool = False
    receiving: ByteBudget = field(default_factory=room)

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        return False

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        association = exchange.association
        if not command.has_dataset:
            raise CannotUnderstand("a C-FIND without an identifier")
        syntax = context.transfer_syntax
        with received(association, context, IDENTIFIER_BYTES_MAX, self.receiving) as octets:
            identifier, character_set = careful(lambda: with_character_set(octets, syntax))
            keys = keys_of(identifier, combined=COMBINED)
        caller = exchange.caller.ae_title
        require(Principal(caller, Role.DEVICE, self.ward), Act.SEARCH)
        status = codes.PENDING_UNSUPPORTED_KEYS if keys.unmatched else codes.PENDING
        sent = 0
        for step in self.ledger.scheduled_steps(self._search(keys, caller)):
            if association.cancelled(command.message_id):
                exchange.respond(context, command, codes.CANCELLED)
                return
            attributes = _for_station(step, keys)
            if not self._may_see(caller, step) or not fits(keys, attributes):
                continue
            if sent >= self.responses_max:
                raise OutOfResources(f"more than {self.responses_max} matches: ask more narrowly")
            exchange.respond(context, command, status,
                             dataset=encoded(answered(keys, attributes), syntax, character_set))
            sent += 1
        exchange.respond(context, command, codes.SUCCESS)

    def _may_see(self, caller: str, step: ScheduledStep) -> bool:
        return not self.own_steps_only or caller in (stations := step.stations) or not stations

    def _search(self, keys: Keys, caller: str) -> StepSearch:
        """What the ledger narrows by: the rest is matched step by step. Steps that are over are not offered
        unless their status is asked for."""
        step = keys.inside(STEP_SEQUENCE)
        stations = _values(step, STATION) or ((caller,) if self.own_steps_only else ())
        first, last = _dates(step)
        return StepSearch(
            (*stations, "") if stations else None, first, last, _value(keys, PATIENT_ID),
            _value(keys, ACCESSION_NUMBER), _value(keys, STUDY_UID), _value(step, MODALITY),
            None if STATUS in step.by_tag and step.by_tag[STATUS].predicate is not None else OFFERED,
        )


def _for_station(step: ScheduledStep, keys: Keys) -> Attributes:
    """The step as who asks by station gets it: one that names none is for any, so for the first that is asked
    for, since an answer has one (type 1 in Table K.6-1)."""
    attributes = step.attributes
    stations = _values(keys.inside(STEP_SEQUENCE), STATION)
    if stations and not step.stations:
        put(items_of(attributes, STEP_SEQUENCE)[0], STATION, "AE", stations[0])
    return attributes


def _values(keys: Keys, tag: str) -> tuple[str, ...]:
    """The values of which the attribute is one; none when it is asked for in another way, or not."""
    key = keys.by_tag.get(tag)
    return key.predicate.values if key is not None and isinstance(key.predicate, OneOf) else ()


def _value(keys: Keys, tag: str) -> str:
    values = _values(keys, tag)
    return values[0] if len(values) == 1 else ""


def _dates(step: Keys) -> tuple[str, str]:
    """The first and the last day on which a step may begin, "" where there is no such."""
    for moment in step.moments:
        return moment.lower[0], moment.upper[0]
    key = step.by_tag.get(START_DATE)
    if key is not None and isinstance(key.predicate, Between):
        return key.predicate.lower, key.predicate.upper
    return (_value(step, START_DATE),) * 2
