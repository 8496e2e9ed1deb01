"""Owns C-STORE (PS3.4 Annex B): the data set goes from the receive buffer to the archive's intake as it
arrives, and 0000 is sent when the record is durable, not before. It never decides what is valid, a duplicate
or a conflict: intake does, and what it refuses is answered by the table in `node/dimse/status.py`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from archive.errors import DatasetMismatch, InvalidInput
from archive.intake import Intake
from archive.model import InstanceHead, Provenance, is_uid, require_uid
from node.dimse.acceptor import Exchange
from node.dimse.association import Context
from node.dimse.messages import Command
from node.dimse.status import SUCCESS

DURABLE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Store:
    """C-STORE SCP into one ward's archive."""

    intake: Intake
    ward: str
    issuer: str

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        association = exchange.association
        reception = self.intake.begin(self._head(exchange, context, command))
        try:
            for view in association.fragments(context):
                reception.write(view)
            ticket = reception.commit()
        except BaseException:  # the peer may be gone in the middle of it: nothing of it may stay
            reception.abort()
            raise
        ticket.wait_durable(DURABLE_TIMEOUT_S)
        # A conflict is answered 0000 as well (ST8): the first copy stays, this one is kept and shown.
        exchange.respond(context, command, SUCCESS)

    def _head(self, exchange: Exchange, context: Context, command: Command) -> InstanceHead:
        sop_class = command.affected_sop_class_uid
        if not command.has_dataset:
            raise InvalidInput("a C-STORE without a data set")
        if not is_uid(sop_class) or sop_class != context.abstract_syntax:
            raise DatasetMismatch("the SOP class is not that of the presentation context")
        instance = require_uid(command.affected_sop_instance_uid, "Affected SOP Instance UID")
        caller = exchange.caller
        issuer = self.issuer if caller.issuer is None else caller.issuer
        provenance = Provenance(self.ward, issuer, caller.name or caller.ae_title, caller.ae_title,
                                int(time.time() * 1e6))
        return InstanceHead(sop_class, instance, context.transfer_syntax, provenance)
