"""Owns C-GET (PS3.4 C.4.3): instances go to the requestor over its own association, in the contexts in which
it is the SCP. It never sends where the requestor did not take that role, and opens no association."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from archive.budget import ByteBudget
from archive.errors import CannotUnderstand
from archive.model import StoredInstance
from monitoring.tracing import traced
from node.dimse.association import Context
from node.dimse.errors import AssociationEnded, Stopping, Violation
from node.dimse.exchange import Caller, Exchange
from node.dimse.identifiers import IDENTIFIER_BYTES_MAX, received, room
from node.dimse.messages import MESSAGE_ID_RESPONDED_TO, RESPONSE, Command, Field, store_request
from node.dimse.outbox import Outbox, Source
from node.dimse.payloads import Payloads, Supply, why_not
from node.dimse.pdu import AbortSource
from node.dimse.services import suboperations
from node.dimse.services.retrieval import CannotCount, Selection, read_wanted
from node.dimse.services.suboperations import CANNOT_COUNT, CANNOT_PERFORM, Account, Turns
from node.dimse.shipping import EXPECTED_AHEAD, NOT_TAKEN
from node.dimse.status import CANCELLED, CLASS_NOT_SUPPORTED

log = logging.getLogger(__name__)

STATUSES: Mapping[int, str] = suboperations.STATUSES


@dataclass(frozen=True, slots=True)
class Get:
    """C-GET SCP."""

    selection: Selection
    payloads: Payloads
    turns: Turns
    receiving: ByteBudget = field(default_factory=room)

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        return False

    @traced("C-GET")
    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        if not command.has_dataset:
            raise CannotUnderstand("a C-GET without an identifier")
        association, caller = exchange.association, exchange.caller
        with received(association, context, IDENTIFIER_BYTES_MAX, self.receiving) as octets:
            wanted = read_wanted(octets, context.transfer_syntax, context.abstract_syntax)
        cancelled = False

        def given_up() -> bool:
            nonlocal cancelled
            if association.wire.stopping:
                raise Stopping("this side is being stopped")
            cancelled = cancelled or association.cancelled(command.message_id)
            return cancelled

        with self.turns.of(caller.ae_title, given_up) as turn:
            if not turn:
                exchange.respond(context, command, CANCELLED if cancelled else CANNOT_PERFORM,
                                 comment="" if cancelled else "too many retrieves at once: try later")
                return
            try:
                instances = self.selection.instances(wanted, caller, given_up)
            except CannotCount as error:
                exchange.respond(context, command, CANNOT_COUNT, comment=str(error))
                return
            if cancelled:
                exchange.respond(context, command, CANCELLED)
                return
            began_s = time.monotonic()
            with self.payloads.supply(self.selection.principal(caller)) as supply:
                getting = _Getting(exchange, context, command, instances, self.payloads, supply)
                try:
                    getting.run()
                finally:
                    account = getting.account
                    log.info("C-GET of %s: %s in %.2f s", caller.ae_title, account,
                             time.monotonic() - began_s)
                    for status, count in account.statuses.items():
                        exchange.entry.operations[f"C-GET sub-operation {status:04X}"] += count
        final = account.final(cancelled=getting.cancelled and account.remaining > 0)
        exchange.respond(context, command, final.status, more=final.more, comment=final.comment,
                         dataset=final.dataset(context.transfer_syntax))


@dataclass(frozen=True, slots=True)
class _Ready:
    """An instance whose first part is in the outbox."""

    instance: StoredInstance
    context: Context
    source: Source


class _Getting:
    """The sub-operations of one C-GET: the next instance is read while those before it await their
    responses."""

    def __init__(self, exchange: Exchange, context: Context, command: Command,
                 instances: Sequence[StoredInstance], payloads: Payloads, supply: Supply) -> None:
        self.account = Account(len(instances))
        self.cancelled = False
        self._exchange = exchange
        self._association = exchange.association
        self._context = context
        self._command = command
        self._instances = instances
        self._payloads = payloads
        self._supply = supply
        self._next_at = 0
        self._message_id = 0
        self._open: dict[int, tuple[StoredInstance, int]] = {}
        self._outbox: Outbox = self._association.outbox()
        self._contexts = {(each.abstract_syntax, each.transfer_syntax): each
                          for each in self._association.contexts.values() if each.requestor_is_scp}

    def run(self) -> None:
        """Send all, or until it is cancelled. Raises AssociationEnded; a Violation of ours when a data set
        that was begun can't be read to its end, since the association can't go on after that."""
        ready = self._next()
        try:
            while ready is not None and not self.cancelled:
                while len(self._open) >= self._association.invokes and not self.cancelled:
                    self._collect()
                if self._association.wire.stopping:
                    raise Stopping("this side is being stopped")
                # What has come with a response is looked at; what comes later is found with the next one.
                if self._association.wire.held and not self._open:
                    self.cancelled |= self._association.cancelled(self._command.message_id)
                if self.cancelled:
                    break
                sent, ready = ready, None
                self._send(sent)
                ready = self._next()
        finally:
            if ready is not None:
                ready.source.close()
        while self._open:
            self._collect()

    def _send(self, ready: _Ready) -> None:
        """A pending response goes out with the next sub-operation, and costs no send of its own."""
        message_id = self._free_message_id()
        uid = ready.instance.head.sop_instance_uid
        request = store_request(message_id, ready.context.abstract_syntax, uid)
        before = self._exchange.pending(self._context, self._command, self.account.pending())
        self._open[message_id] = ready.instance, ready.source.length
        try:
            self._association.send_outbox(ready.context, request, self._outbox, before=before)
        except AssociationEnded:
            raise
        except Exception as error:
            why_not(ready.instance, error)
            raise Violation("an instance that was begun could not be read to its end", 0,
                            AbortSource.SERVICE_USER) from None
        finally:
            ready.source.close()

    def _free_message_id(self) -> int:
        while True:
            self._message_id = self._message_id % 0xFFFF + 1
            if self._message_id not in self._open and self._message_id not in self._exchange.asked:
                return self._message_id

    def _collect(self) -> None:
        answer = self._association.receive_store_response(self._command.message_id)
        if answer is None:
            self.cancelled = True
            return
        found = self._open.pop(answer.short(MESSAGE_ID_RESPONDED_TO, -1), None)
        if found is None:
            self._exchange.hear(self._context, answer)
            return
        if answer.field != Field.C_STORE | RESPONSE:
            raise Violation("a response of another kind", 0, AbortSource.SERVICE_USER)
        instance, size = found
        self.account.note(instance.head.sop_instance_uid, answer.status, octets=size)

    def _next(self) -> _Ready | None:
        """Read the beginning of the next instance that can be sent here; the others have failed."""
        while self._next_at < len(self._instances):
            instance = self._instances[self._next_at]
            self._next_at += 1
            for ahead in self._instances[self._next_at:self._next_at + EXPECTED_AHEAD]:
                self._supply.expect(ahead)
            uid = instance.head.sop_instance_uid
            context = self._context_of(instance)
            if context is None:
                self.account.note(uid, CLASS_NOT_SUPPORTED, NOT_TAKEN)
                continue
            try:
                source = self._supply.open(instance, context.transfer_syntax)
                try:
                    self._outbox.begin(source, context.id)
                    self._outbox.load()
                except BaseException:
                    source.close()
                    raise
            except Exception as error:
                self.account.note(uid, *why_not(instance, error))
                continue
            return _Ready(instance, context, source)
        return None

    def _context_of(self, instance: StoredInstance) -> Context | None:
        found = (self._contexts.get((instance.head.sop_class_uid, syntax))
                 for syntax in self._payloads.syntaxes(instance))
        return next((context for context in found if context is not None), None)
