"""Owns C-MOVE (PS3.4 C.4.2): instances go to a device of the list over associations of their own, by a thread
of their own, while this one looks after who asked: it says how far they are, hears C-CANCEL, and stops what
goes on for a requestor that is gone (M5). It never chooses a destination that is not on the list (M9)."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from archive.budget import ByteBudget
from archive.errors import CannotUnderstand, NotFound
from archive.model import StoredInstance
from federation.policy import Principal
from monitoring.tracing import carried, traced
from node.dimse.acceptor import log_unexpected
from node.dimse.association import Context
from node.dimse.errors import AssociationEnded, Stopping
from node.dimse.exchange import Caller, Exchange
from node.dimse.identifiers import IDENTIFIER_BYTES_MAX, received, room
from node.dimse.messages import MOVE_DESTINATION, Command
from node.dimse.requestor import Peer
from node.dimse.services import suboperations
from node.dimse.services.retrieval import CannotCount, Selection, read_wanted
from node.dimse.services.suboperations import (
    CANNOT_COUNT,
    CANNOT_PERFORM,
    UNKNOWN_DESTINATION,
    Account,
    Turns,
)
from node.dimse.status import CANCELLED, PENDING, PROCESSING_FAILURE
from node.forwarding import Forwarder, Forwarding

log = logging.getLogger(__name__)

PENDING_S = 0.05        # at most one pending response in this time, and only when the counts have changed
PENDING_S_MAX = 5.0     # at least one, that the requestor does not take us for dead
# Nothing new: said after so long, and twice as long each time. Who is the destination itself, as movescu is,
# looks whether it is called only when it hears from us, or once a second.
PENDING_S_FIRST = 0.01
CANCEL_GRACE_S = 2.0    # what is under way gets when it is cancelled; then its association is cut

STATUSES: Mapping[int, str] = {
    **suboperations.STATUSES,
    UNKNOWN_DESTINATION: "no device of the list has the AE title of the move destination, or nobody said "
                         "where it listens",
}


@dataclass(frozen=True, slots=True)
class Move:
    """C-MOVE SCP."""

    selection: Selection
    forwarder: Forwarder
    turns: Turns
    receiving: ByteBudget = field(default_factory=room)

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        return False

    @traced("C-MOVE")
    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        if not command.has_dataset:
            raise CannotUnderstand("a C-MOVE without an identifier")
        association, caller = exchange.association, exchange.caller
        destination = command.text(MOVE_DESTINATION)
        try:
            peer = self.forwarder.peer(destination)
        except NotFound as error:
            association.drain(context)
            exchange.respond(context, command, UNKNOWN_DESTINATION, comment=str(error))
            return
        with received(association, context, IDENTIFIER_BYTES_MAX, self.receiving) as octets:
            wanted = read_wanted(octets, context.transfer_syntax, context.abstract_syntax)
        watch = _Watch(exchange, context, command)
        with self.turns.of(caller.ae_title, watch.cancelled) as turn:
            if not turn:
                _refuse(exchange, context, command, watch)
                return
            try:
                instances = self.selection.instances(wanted, caller, watch.cancelled)
            except CannotCount as error:
                exchange.respond(context, command, CANNOT_COUNT, comment=str(error))
                return
            if watch.cancelled():
                exchange.respond(context, command, CANCELLED)
                return
            moving = _Moving(self.forwarder, peer, instances, self.selection.principal(caller),
                             (caller.ae_title, command.message_id))
            account, began_s = moving.account, time.monotonic()
            try:
                with moving:
                    watch.follow(moving)
            finally:
                log.info("C-MOVE of %s to %s: %s in %.2f s", caller.ae_title, destination, account,
                         time.monotonic() - began_s)
                for status, count in account.statuses.items():
                    exchange.entry.operations[f"C-MOVE sub-operation {status:04X}"] += count
            final = account.final(cancelled=watch.was_cancelled and account.remaining > 0)
        exchange.respond(context, command, final.status, more=final.more, comment=final.comment,
                         dataset=final.dataset(context.transfer_syntax))


def _refuse(exchange: Exchange, context: Context, command: Command, watch: _Watch) -> None:
    """No turn: it was cancelled while it waited, or others go on for too long."""
    if watch.was_cancelled:
        exchange.respond(context, command, CANCELLED)
    else:
        exchange.respond(context, command, CANNOT_PERFORM, comment="too many retrieves at once: try later")


class _Moving:
    """The sub-operations, in a thread of their own. Leaving the block waits for its end. `bell` becomes
    readable when it is over."""

    def __init__(self, forwarder: Forwarder, peer: Peer, instances: list[StoredInstance],
                 principal: Principal, originator: tuple[str, int]) -> None:
        self.account = Account(len(instances))
        self.over = False
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._without_outcome = {each.head.sop_instance_uid: None for each in instances}
        self._forwarding: Forwarding = forwarder.forwarding(peer, instances, self._note, principal=principal,
                                                            originator=originator)
        self._thread = threading.Thread(target=carried(self._run), name="move", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._forwarding.stop()
        if kind is Stopping:
            self._thread.join(CANCEL_GRACE_S)
            self._forwarding.cut()
        self._thread.join()
        os.close(self.bell)

    def stop(self) -> None:
        """Begin no further sub-operation."""
        self._forwarding.stop()

    def cut(self) -> None:
        """End those under way."""
        self._forwarding.cut()

    def _run(self) -> None:
        try:
            if self.account.total:
                self._forwarding.run()
        except AssociationEnded as ended:
            self._fail_all(str(ended))
        except Exception as error:
            log_unexpected("a C-MOVE", error)
            self._fail_all("")
        finally:
            self.over = True
            os.eventfd_write(self.bell, 1)

    def _fail_all(self, comment: str) -> None:
        """What has no outcome yet will have no other."""
        for uid in self._without_outcome:
            self.account.note(uid, PROCESSING_FAILURE, comment)

    def _note(self, instance: StoredInstance, status: int, comment: str) -> None:
        uid, location = instance.head.sop_instance_uid, instance.location
        self._without_outcome.pop(uid, None)
        self.account.note(uid, status, comment, location.length - location.dataset_offset)


class _Watch:
    """The requestor of a C-MOVE, while that goes on."""

    def __init__(self, exchange: Exchange, context: Context, command: Command) -> None:
        self._exchange = exchange
        self._context = context
        self._command = command
        self.was_cancelled = False

    def cancelled(self) -> bool:
        """Whether the requestor has cancelled. Raises AssociationEnded when it is gone, or we are asked to
        stop."""
        association = self._exchange.association
        if association.wire.stopping:
            raise Stopping("this side is being stopped")
        if not self.was_cancelled:
            self.was_cancelled = association.cancelled(self._command.message_id)
        return self.was_cancelled

    def follow(self, moving: _Moving) -> None:
        """Say how far it is until it is over. When the requestor is gone, nothing further is begun, and what
        is under way is waited for: then what ended the association is raised (M5)."""
        account, told, told_s, cut_s = moving.account, -1, 0.0, 0.0
        silence_s = PENDING_S_FIRST
        while not moving.over:
            now_s = time.monotonic()
            if self.cancelled():
                moving.stop()
                cut_s = cut_s or now_s + CANCEL_GRACE_S
                if now_s > cut_s:
                    moving.cut()
            elif now_s - told_s >= (PENDING_S if account.done != told else silence_s):
                if account.done == told:
                    silence_s = min(2 * silence_s, PENDING_S_MAX)
                told, told_s = account.done, now_s
                self._exchange.respond(self._context, self._command, PENDING, more=account.pending())
            self._rest(moving.bell, min(silence_s, PENDING_S))

    def _rest(self, bell: int, moment_s: float) -> None:
        """Until it is over, or the requestor says something, or a moment has passed."""
        wire = self._exchange.association.wire
        poll = select.poll()
        poll.register(bell, select.POLLIN)
        if not wire.readable():  # else what lies there is for later
            poll.register(wire.fileno(), select.POLLIN)
        poll.poll(moment_s * 1000)
