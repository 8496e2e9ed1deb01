"""Owns how reports go to a device that does not wait for them: over an association of our own, to where it
listens, with the role of the SCP (PS3.4 J.3.3, SC4). When, and how often, is up to others."""

from __future__ import annotations

from collections.abc import Sequence

from archive.errors import MissError
from archive.ledger import Commitment
from node.commitment.desk import NOT_ANSWERED, CommitmentDesk, HeldReport
from node.destinations import Destinations
from node.dimse.association import Limits
from node.dimse.commitments import encode
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE, STORAGE_COMMITMENT
from node.dimse.pdu import ProposedContext, Role
from node.dimse.requestor import Requestor
from node.dimse.services.commitment import event_request

PROPOSED = (ProposedContext(1, STORAGE_COMMITMENT, (EXPLICIT_LITTLE, IMPLICIT_LITTLE)),)
_AS_SCP = (Role(STORAGE_COMMITMENT, scu=False, scp=True),)
_NO_CONTEXT = "it takes no storage commitment"
_NO_ROLE = "it does not grant the role of the SCP, in which reports come"


class Reporter:
    """Carries reports."""

    def __init__(self, desk: CommitmentDesk, destinations: Destinations, calling_ae: str,
                 limits: Limits) -> None:
        self._desk = desk
        self._destinations = destinations
        self._calling_ae = calling_ae
        self._limits = limits

    def carry(self, device: str, requests: Sequence[Commitment]) -> None:
        """Send the reports on these requests of one device."""
        left = [HeldReport(self._desk, one) for one in requests if self._desk.hold(one)]
        error = NOT_ANSWERED
        try:
            peer = self._destinations.peer(device)
            with Requestor.connect(peer, self._calling_ae, PROPOSED, roles=_AS_SCP,
                                   limits=self._limits) as requestor:
                error = self._send_all(requestor, left)
        except MissError as problem:  # AssociationEnded too
            error = str(problem)
        finally:
            for report in left:
                report.answered(None, error)

    def _send_all(self, requestor: Requestor, left: list[HeldReport]) -> str:
        """Send them one after the other; why those that are left were not sent."""
        context = requestor.context_of(STORAGE_COMMITMENT)
        if context is None:
            return _NO_CONTEXT
        if not context.requestor_is_scp:
            return _NO_ROLE
        while left:
            information = left[0].information
            request = event_request(information)(requestor.next_message_id())
            answer, _ = requestor.call(context, request, encode(information, context.transfer_syntax))
            left.pop(0).answered(answer.status)
        return ""
