"""Owns what this node asks others to commit (PS3.4 J.3.2, as SCU): each request is durable before it goes,
tried until it is taken, and its answer kept, whether it comes over the same association or over one that the
other opens. It chooses nothing to ask for: who forwards does."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from archive.backoff import Backoff
from archive.budget import ByteBudget
from archive.errors import InvalidInput, MissError, NotFound, TooLarge
from archive.ledger import Commitment, Ledger
from archive.ledger.commitments import ANSWERING, COMMITTED, DONE, GIVEN_UP, OPEN, SCU
from archive.model import StoredInstance
from node.commitment.couriers import Couriers
from node.commitment.desk import DAY_US, now_us
from node.commitment.reporter import PROPOSED
from node.destinations import Destinations
from node.dimse.association import Context, Limits
from node.dimse.commitments import INSTANCE, ITEMS_MAX, PROCESSING_FAILURE, REQUEST, Information, encode
from node.dimse.contexts import STORAGE_COMMITMENT
from node.dimse.errors import AssociationEnded, PeerReleased
from node.dimse.messages import (
    ACTION_TYPE_ID,
    MESSAGE_ID_RESPONDED_TO,
    Command,
    Field,
    normalized_request,
    response,
    short,
)
from node.dimse.pdu import RELEASE_RP_OCTETS
from node.dimse.requestor import Requestor
from node.dimse.services.commitment import HELD_BYTES_MAX, Refused, read_report
from node.dimse.status import INVALID_ARGUMENT, SUCCESS, UNRECOGNIZED_OPERATION, meaning
from node.settings import CommitmentSettings

log = logging.getLogger(__name__)

SAME_ASSOCIATION_S = 5.0  # how long an association that asked stays open for the answer
_POLL_S = 0.1
_NO_CONTEXT = "it takes no storage commitment"
_NO_REPORT = "it never reported"


@dataclass(frozen=True, slots=True)
class CommitmentResult:
    """What became of a request: `is_over` when nothing more is to come. `failed` has the reason of each
    instance that is not committed (0008,1197); `error` says why there is no answer, or what is tried
    again."""

    is_over: bool
    committed: frozenset[str]
    failed: Mapping[str, int]
    error: str


class CommitmentScu:
    """Asks devices to commit, and takes their reports. Safe to use from any thread."""

    def __init__(self, ledger: Ledger, destinations: Destinations, settings: CommitmentSettings,
                 calling_ae: str, limits: Limits, *,
                 same_association_s: float = SAME_ASSOCIATION_S) -> None:
        self._ledger = ledger
        self._destinations = destinations
        self._settings = settings
        self._calling_ae = calling_ae
        self._limits = limits
        self._same_association_s = same_association_s
        self._backoff = Backoff(settings.retry_first_s, settings.retry_max_s)
        self._held = ByteBudget(HELD_BYTES_MAX)
        self._couriers = Couriers("scu", self._due, self._carry)

    def start(self) -> None:
        self._couriers.start()

    def stop(self) -> None:
        self._couriers.stop()

    def request(self, ae_title: str, instances: Sequence[StoredInstance]) -> str:
        """Ask a device to commit instances; the Transaction UID, under which `result` knows it. It is durable
        when this returns. Raises NotFound for a device that can't be called, InvalidInput for no instance,
        TooLarge past ITEMS_MAX, OutOfResources when too many requests are open."""
        self._destinations.peer(ae_title)
        references = {one.head.sop_instance_uid: one.head.sop_class_uid for one in instances}
        if not references:
            raise InvalidInput("there is nothing to commit")
        if len(references) > ITEMS_MAX:
            raise TooLarge(f"a request for storage commitment names {ITEMS_MAX:,} instances at the most")
        transaction_uid = f"2.25.{uuid.uuid4().int}"
        self._ledger.open_commitment(SCU, ae_title, transaction_uid, references,
                                     open_max=self._settings.open_per_device_max)
        self._couriers.wake()
        return transaction_uid

    def result(self, transaction_uid: str) -> CommitmentResult:
        """What is known of a request. Raises NotFound for one that never was, or was over long ago."""
        found = self._ledger.asked_commitment(transaction_uid)
        if found is None:
            raise NotFound("no such storage commitment transaction")
        items = self._ledger.commitment_items(found.id)
        return CommitmentResult(
            found.state in (DONE, GIVEN_UP),
            frozenset(one.sop_instance_uid for one in items if one.reason == COMMITTED),
            {one.sop_instance_uid: one.reason for one in items if one.reason > COMMITTED},
            found.last_error)

    def take(self, device: str, information: Information) -> bool:
        """A device's report; False when nothing was asked of it under this Transaction UID. One that comes
        again changes nothing; one that comes after all hope was given up is welcome."""
        found = self._ledger.commitment(SCU, device, information.transaction_uid)
        if found is None:
            return False
        reasons = dict.fromkeys(information.referenced, COMMITTED)
        reasons |= {uid: reason for uid, (_, reason) in information.failed.items()}
        self._ledger.answer_commitment(found.id, reasons, PROCESSING_FAILURE)
        return True

    def _due(self) -> list[Commitment]:
        if self._ledger.has_live_commitments(SCU, ANSWERING):
            for one in self._ledger.live_commitments(SCU, ANSWERING, due_us=now_us()):
                self._ledger.end_commitment(one.id, GIVEN_UP, _NO_REPORT)
        if not self._ledger.has_live_commitments(SCU, OPEN):
            return []
        return self._ledger.live_commitments(SCU, OPEN, due_us=now_us())

    def _carry(self, device: str, requests: Sequence[Commitment]) -> None:
        left = list(requests)
        error = ""
        try:
            with Requestor.connect(self._destinations.peer(device), self._calling_ae, PROPOSED,
                                   limits=self._limits) as requestor:
                context = requestor.context_of(STORAGE_COMMITMENT)
                if context is None:
                    error = _NO_CONTEXT
                else:
                    self._ask_all(requestor, context, device, left)
        except MissError as problem:  # AssociationEnded too
            error = str(problem)
        for one in left:
            self._failed(one, error)

    def _ask_all(self, requestor: Requestor, context: Context, device: str, left: list[Commitment]) -> None:
        """Ask for all of them, then stay for the answers that come soon."""
        asked: list[Commitment] = []
        try:
            while left:
                status = self._ask(requestor, context, device, left[0])
                one = left.pop(0)
                if status == SUCCESS:
                    self._ledger.await_answer(one.id, now_us() + int(self._settings.answer_timeout_s * 1e6))
                    asked.append(one)
                else:
                    self._failed(one, f"it answered {status:04X}, {meaning(status)}")
            until_s = time.monotonic() + self._same_association_s
            while time.monotonic() < until_s and not self._couriers.stopping:
                if requestor.association.wire.readable(_POLL_S):
                    self._serve(requestor, device, *requestor.association.receive())
                if not any(self._is_awaited(one) for one in asked):  # they may come another way too
                    return
        except PeerReleased:
            with contextlib.suppress(AssociationEnded):
                requestor.association.wire.send(RELEASE_RP_OCTETS)
            raise

    def _ask(self, requestor: Requestor, context: Context, device: str, one: Commitment) -> int:
        """N-ACTION; the status. A report on an earlier request may come before the response."""
        message_id = requestor.next_message_id()
        references = {item.sop_instance_uid: item.sop_class_uid
                      for item in self._ledger.commitment_items(one.id)}
        information = Information(one.transaction_uid, references)
        request = normalized_request(Field.N_ACTION, message_id, STORAGE_COMMITMENT, INSTANCE,
                                     has_dataset=True, more=short(ACTION_TYPE_ID, REQUEST))
        association = requestor.association
        association.send(context, request, encode(information, context.transfer_syntax))
        while True:
            found, command = association.receive()
            if command.is_response and command.short(MESSAGE_ID_RESPONDED_TO, -1) == message_id:
                association.drain(found)
                return command.status
            self._serve(requestor, device, found, command)

    def _serve(self, requestor: Requestor, device: str, context: Context, command: Command) -> None:
        """What the device asks of us over our association: reports."""
        association = requestor.association
        status, comment = SUCCESS, ""
        if command.is_response or command.field != Field.N_EVENT_REPORT:
            status = UNRECOGNIZED_OPERATION
        else:
            try:
                if not self.take(device, read_report(association, context, command, self._held)):
                    status = INVALID_ARGUMENT
            except Refused as refused:
                status, comment = refused.status, str(refused)
        association.drain(context)
        if not command.is_response:
            association.send(context, response(command, status, comment=comment))

    def _is_awaited(self, one: Commitment) -> bool:
        found = self._ledger.commitment(SCU, one.device, one.transaction_uid)
        return found is not None and found.state == ANSWERING

    def _failed(self, one: Commitment, error: str) -> None:
        log.info("storage commitment by %s: a request failed: %s", one.device, error)
        if now_us() - one.asked_us > self._settings.report_days * DAY_US:
            self._ledger.end_commitment(one.id, GIVEN_UP, error)
        else:
            self._ledger.note_failed_try(one.id, error, now_us() + self._backoff.pause_us(one.tries + 1))


