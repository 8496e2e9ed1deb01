"""Owns C-STORE (PS3.4 Annex B): the data set goes from the receive buffer to the archive's intake as it
arrives, and 0000 is sent when the record is durable, not before. It never decides what is valid, a duplicate
or a conflict: intake does, and what it refuses is answered by the table in `node/dimse/status.py`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from archive.errors import DatasetMismatch, Forbidden, InvalidInput, MissError, UnsupportedClass
from archive.intake import Intake, Ticket
from archive.model import ConflictPolicy, InstanceHead, Outcome, Provenance, require_uid
from monitoring.measures import Distribution
from node.dimse.association import Context
from node.dimse.contexts import STORAGE_CLASSES
from node.dimse.exchange import Caller, Exchange
from node.dimse.messages import Command
from node.dimse.status import (
    CANNOT_UNDERSTAND,
    CLASS_NOT_SUPPORTED,
    DOES_NOT_MATCH,
    DUPLICATE_INSTANCE,
    INVALID_INSTANCE,
    NOT_AUTHORIZED,
    OUT_OF_RESOURCES,
    PROCESSING_FAILURE,
    SUCCESS,
)

STATUSES: Mapping[int, str] = {
    SUCCESS: "stored, on disk; also what was here already, and what is kept apart as other content of a UID",
    PROCESSING_FAILURE: "an error that is not foreseen; the node's log says more",
    DUPLICATE_INSTANCE: "another content is here under this UID, and this device's are refused then",
    INVALID_INSTANCE: "a SOP, Study or Series Instance UID that is none",
    CLASS_NOT_SUPPORTED: "a SOP class that is not stored here",
    NOT_AUTHORIZED: "a SOP class that this device may not send",
    OUT_OF_RESOURCES: "no room on disk or in memory, the index is too far behind, or larger than the bound: "
                      "nothing is stored, and the association lives on",
    DOES_NOT_MATCH: "what the data set says of its SOP class or instance is not what the command says",
    CANNOT_UNDERSTAND: "a data set that can't be read, or none",
}


@dataclass(frozen=True, slots=True)
class Store:
    """C-STORE SCP into one ward's archive."""

    intake: Intake
    ward: str
    issuer: str
    measures: StoreMeasures = field(default_factory=lambda: StoreMeasures())

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        association, begun_s = exchange.association, time.perf_counter()
        policy = ConflictPolicy(exchange.caller.on_conflict)
        reception = self.intake.begin(self._head(exchange, context, command), policy=policy)
        try:
            association.pour(context, reception)
            ticket = reception.commit()
        except BaseException:  # the peer may be gone in the middle of it: nothing of it may stay
            reception.abort()
            raise
        # A conflict is answered 0000 as well (ST8): the first copy stays, this one is kept and shown. Devices
        # whose conflicts are refused have met OtherContent: 0111.
        exchange.answer(context, command, SUCCESS, stored=_Timed(ticket, begun_s, self.measures))

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        """What is refused or proposed is a fact before the answer goes, and facts wait for disk and index."""
        return (caller.on_conflict == ConflictPolicy.KEEP.value
                and self.intake.decides_at_once(command.affected_sop_instance_uid))

    def _head(self, exchange: Exchange, context: Context, command: Command) -> InstanceHead:
        sop_class = command.affected_sop_class_uid
        if not command.has_dataset:
            raise InvalidInput("a C-STORE without a data set")
        if sop_class != context.abstract_syntax:
            raise _other_class(sop_class, exchange.caller)
        instance = require_uid(command.affected_sop_instance_uid, "Affected SOP Instance UID")
        caller = exchange.caller
        issuer = self.issuer if caller.issuer is None else caller.issuer
        provenance = Provenance(self.ward, issuer, caller.name or caller.ae_title, caller.ae_title,
                                int(time.time() * 1e6))
        return InstanceHead(sop_class, instance, context.transfer_syntax, provenance)


class StoreMeasures:
    """How long C-STOREs took, from the command to the disk, by what became of them."""

    def __init__(self) -> None:
        self.seconds = {outcome: Distribution() for outcome in Outcome}


@dataclass(slots=True)  # not frozen: that would cost a microsecond for each instance
class _Timed:
    """What is stored, and the moment when its command was there."""

    ticket: Ticket
    begun_s: float
    measures: StoreMeasures

    def wait_durable(self, timeout_s: float) -> None:
        self.ticket.wait_durable(timeout_s)
        self.measures.seconds[self.ticket.outcome].observe(time.perf_counter() - self.begun_s)


def _other_class(sop_class: str, caller: Caller) -> MissError:
    """What is wrong with a SOP class that is not its context's (PS3.7 9.1.1.1.9)."""
    if sop_class not in STORAGE_CLASSES:
        return UnsupportedClass("a SOP class that is not stored here")
    if caller.sop_classes and sop_class not in caller.sop_classes:
        return Forbidden("a SOP class that this device may not send")
    return DatasetMismatch("the SOP class is not that of the presentation context")
