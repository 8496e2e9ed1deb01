"""Owns the Modality Performed Procedure Step SOP classes (PS3.4 F.7 and F.8): N-CREATE and N-SET are checked
against Table F.7.2-1 and kept in the ledger before they are answered; N-GET shows a step. A step that is
COMPLETED or DISCONTINUED never changes. When a study is complete, `node/completion.py` says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydicom.datadict import keyword_for_tag
from pydicom.uid import generate_uid

from archive.budget import ByteBudget
from archive.dataset.jsonsets import Attributes, from_octets, items_of, text_of
from archive.dataset.jsonwriting import encoded
from archive.errors import Forbidden, NotFound
from archive.ledger import Ledger, PerformedStep, StepReference
from archive.ledger.performed import FINAL, IN_PROGRESS, PERFORMED_STATES
from archive.ledger.worklist import COMPLETED
from archive.model import is_uid, require_uid
from node.dimse import status as codes
from node.dimse.association import Context
from node.dimse.contexts import PERFORMED_STEP, PERFORMED_STEP_RETRIEVE
from node.dimse.exchange import Caller, Exchange
from node.dimse.identifiers import careful, received, room
from node.dimse.messages import (
    AFFECTED_SOP_CLASS_UID,
    ATTRIBUTE_IDENTIFIER_LIST,
    REQUESTED_SOP_CLASS_UID,
    Command,
    Field,
)

DATASET_BYTES_MAX = 8 << 20  # a step may list tens of thousands of instances
MAY_NO_LONGER_BE_UPDATED = 0xA710  # Error ID (Table F.7.2-2)
SOME_ATTRIBUTES_UNKNOWN = 0x0001   # Table F.8.2-2

_REFERENCES, _SERIES = "00400270", "00400340"
_STUDY_UID, _ACCESSION, _PROCEDURE_ID, _STEP_ID = "0020000D", "00080050", "00401001", "00400009"
_PERFORMED_ID, _STATION, _MODALITY, _STATUS = "00400253", "00400241", "00080060", "00400252"
_START_DATE, _START_TIME, _END_DATE, _END_TIME = "00400244", "00400245", "00400250", "00400251"
_PATIENT_ID, _SERIES_UID = "00100020", "0020000E"

# Type 1 of Table F.7.2-1: to create a step, and for it to end. What is of type 2 there may be left out.
TO_CREATE = (_REFERENCES, _PERFORMED_ID, _STATION, _START_DATE, _START_TIME, _STATUS, _MODALITY)
TO_END = (_END_DATE, _END_TIME)
# Not allowed in N-SET (Table F.7.2-1): what a step is does not change.
FIXED = (_REFERENCES, "00100010", _PATIENT_ID, "00100030", "00100040", "00081120", _PERFORMED_ID, _STATION,
         "00400242", "00400243", _START_DATE, _START_TIME, _MODALITY, "00200010")
_DATE = re.compile(r"\d{8}", re.ASCII)
_TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?", re.ASCII)
_FORMS = {_START_DATE: _DATE, _END_DATE: _DATE, _START_TIME: _TIME, _END_TIME: _TIME}

STATUSES: Mapping[int, str] = {
    codes.SUCCESS: "kept, on disk",
    SOME_ATTRIBUTES_UNKNOWN: "N-GET: some of the attributes asked for are not known",
    codes.INVALID_ATTRIBUTE_VALUE: "a state, a date, a time or a UID that is none; N-CREATE in another state "
                                   "than IN PROGRESS",
    codes.ATTRIBUTE_LIST_ERROR: "N-SET: kept, but for attributes that may not change (Table F.7.2-1)",
    codes.PROCESSING_FAILURE: "N-SET: the step is COMPLETED or DISCONTINUED (Error ID A710)",
    codes.DUPLICATE_INSTANCE: "N-CREATE: there is a step of this SOP Instance UID",
    codes.NO_SUCH_INSTANCE: "N-SET, N-GET: there is no step of this SOP Instance UID",
    codes.INVALID_INSTANCE: "the SOP Instance UID is no UID",
    codes.NO_SUCH_CLASS: "the SOP class is not the presentation context's",
    codes.MISSING_ATTRIBUTE: "an attribute of type 1 is missing, or there is no data set",
    codes.MISSING_ATTRIBUTE_VALUE: "an attribute of type 1 has no value",
    codes.NOT_AUTHORIZED: "N-SET: another device created this step",
    codes.UNRECOGNIZED_OPERATION: "the operation is not of this SOP class",
    codes.OUT_OF_RESOURCES: "the ledger does not answer, or has no room",
    codes.CANNOT_UNDERSTAND: "the data set can't be read",
}


class Refused(Exception):
    """What the table of errors has no word for: a status, an Error ID and a comment without patient data."""

    def __init__(self, status: int, comment: str, error_id: int = 0) -> None:
        super().__init__(comment)
        self.status = status
        self.error_id = error_id


@dataclass(frozen=True, slots=True)
class PerformedSteps:
    """SCP of both SOP classes. `ended` is told the studies of a step that came to its end."""

    ledger: Ledger
    ended: Callable[[Iterable[str]], None]
    receiving: ByteBudget = field(default_factory=room)

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        return False

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        if not command.has_dataset:
            self._serve(exchange, context, command, b"")
            return
        with received(exchange.association, context, DATASET_BYTES_MAX, self.receiving) as octets:
            self._serve(exchange, context, command, octets)

    def _serve(self, exchange: Exchange, context: Context, command: Command, octets: bytes) -> None:
        try:
            sop_class = (command.text(AFFECTED_SOP_CLASS_UID) or command.text(REQUESTED_SOP_CLASS_UID))
            if sop_class != context.abstract_syntax:
                raise Refused(codes.NO_SUCH_CLASS, "the SOP class is not the presentation context's")
            operation = (context.abstract_syntax, command.field)
            if operation == (PERFORMED_STEP_RETRIEVE, Field.N_GET):
                self._show(exchange, context, command)
            elif operation == (PERFORMED_STEP, Field.N_CREATE):
                uid = self._create(exchange.caller.ae_title, command, _read(octets, context))
                exchange.respond(context, command, codes.SUCCESS, sop_instance_uid=uid)
            elif operation == (PERFORMED_STEP, Field.N_SET):
                ignored = self._set(exchange.caller.ae_title, command, _read(octets, context))
                status = codes.ATTRIBUTE_LIST_ERROR if ignored else codes.SUCCESS
                exchange.respond(context, command, status, comment=ignored)
            else:
                raise Refused(codes.UNRECOGNIZED_OPERATION, "")
        except Refused as refused:
            exchange.respond(context, command, refused.status, comment=str(refused),
                             error_id=refused.error_id)

    def _create(self, caller: str, command: Command, attributes: dict[str, Any]) -> str:
        uid = command.affected_sop_instance_uid
        uid = require_uid(uid, "the SOP Instance UID") if uid else str(generate_uid(None))
        _require(attributes, TO_CREATE)
        _check_forms(attributes)
        if text_of(attributes, _STATUS) != IN_PROGRESS:
            raise Refused(codes.INVALID_ATTRIBUTE_VALUE, f"a step is created {IN_PROGRESS}")
        references = tuple(_reference(item) for item in items_of(attributes, _REFERENCES))
        self.ledger.create_performed(PerformedStep(
            uid, IN_PROGRESS, caller, text_of(attributes, _PERFORMED_ID), text_of(attributes, _STATION),
            text_of(attributes, _MODALITY), text_of(attributes, _PATIENT_ID),
            text_of(attributes, _START_DATE), text_of(attributes, _START_TIME), _json(attributes), references,
        ))
        return uid

    def _set(self, caller: str, command: Command, changes: dict[str, Any]) -> str:
        """Keep the changes; what was passed over of them, in words."""
        ignored: list[str] = []

        def change(step: PerformedStep) -> PerformedStep:
            if step.device != caller:
                raise Forbidden("another device created this step")
            if step.state in FINAL:
                raise Refused(codes.PROCESSING_FAILURE,
                              "Performed Procedure Step Object may no longer be updated",
                              MAY_NO_LONGER_BE_UPDATED)
            attributes = step.attributes
            ignored[:] = [tag for tag in FIXED
                          if tag in changes and not _is_same(changes[tag], attributes.get(tag))]
            attributes.update((tag, value) for tag, value in changes.items() if tag not in FIXED)
            return replace(step, state=_state(attributes), dataset=_json(attributes))

        _check_forms(changes)
        uid = require_uid(command.requested_sop_instance_uid, "the SOP Instance UID")
        changed = self.ledger.change_performed(uid, change)
        if changed.state in FINAL:
            self.ended({each.study_uid for each in changed.references})
        return f"not changed: {_keyword(ignored[0])}" if ignored else ""

    def _show(self, exchange: Exchange, context: Context, command: Command) -> None:
        step = self.ledger.performed(require_uid(command.requested_sop_instance_uid, "the SOP Instance UID"))
        if step is None:
            raise NotFound("there is no performed step with this UID")
        attributes: Attributes = step.attributes
        asked = _tags(command.elements.get(ATTRIBUTE_IDENTIFIER_LIST, b""))
        known = {tag: attributes[tag] for tag in asked if tag in attributes} if asked else attributes
        status = SOME_ATTRIBUTES_UNKNOWN if len(known) < len(asked) else codes.SUCCESS
        exchange.respond(context, command, status, dataset=encoded(known, context.transfer_syntax))


def _read(octets: bytes, context: Context) -> dict[str, Any]:
    if not octets:
        raise Refused(codes.MISSING_ATTRIBUTE, "no data set")
    return careful(lambda: from_octets(octets, context.transfer_syntax))


def _require(attributes: Attributes, tags: Iterable[str]) -> None:
    for tag in tags:
        if tag not in attributes:
            raise Refused(codes.MISSING_ATTRIBUTE, _keyword(tag))
        if not (items_of(attributes, tag) or text_of(attributes, tag)):
            raise Refused(codes.MISSING_ATTRIBUTE_VALUE, _keyword(tag))


def _check_forms(attributes: Attributes) -> None:
    for tag, form in _FORMS.items():
        value = text_of(attributes, tag)
        if value and not form.fullmatch(value):
            raise Refused(codes.INVALID_ATTRIBUTE_VALUE, _keyword(tag))


def _reference(item: Attributes) -> StepReference:
    _require(item, (_STUDY_UID,))
    study_uid = text_of(item, _STUDY_UID)
    if not is_uid(study_uid):
        raise Refused(codes.INVALID_ATTRIBUTE_VALUE, _keyword(_STUDY_UID))
    return StepReference(study_uid, text_of(item, _ACCESSION).strip(), text_of(item, _PROCEDURE_ID).strip(),
                         text_of(item, _STEP_ID).strip())


def _state(attributes: Attributes) -> str:
    """The state that a changed step has; at its end it must say when that was and, completed, what it
    made."""
    state = text_of(attributes, _STATUS)
    if state not in PERFORMED_STATES:
        raise Refused(codes.INVALID_ATTRIBUTE_VALUE, _keyword(_STATUS))
    if state in FINAL:
        _require(attributes, TO_END)
    if state == COMPLETED:
        _require(attributes, (_SERIES,))
        for series in items_of(attributes, _SERIES):
            _require(series, (_SERIES_UID,))
    return state


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    """Whether a value is the one that is there: some machines send all of it again."""
    return other is not None and one.get("Value") == other.get("Value")


def _tags(value: bytes) -> list[str]:
    words = [int.from_bytes(value[at:at + 2], "little") for at in range(0, len(value) - 1, 2)]
    return [f"{group:04X}{element:04X}" for group, element in zip(words[::2], words[1::2], strict=False)]


def _json(attributes: Attributes) -> str:
    return json.dumps(attributes, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _keyword(tag: str) -> str:
    return keyword_for_tag(int(tag, 16)) or tag
