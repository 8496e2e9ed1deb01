"""Owns the ways in which an association ends before its user wanted it to, as exceptions of the tree in
`archive/errors.py`, so that they translate like the rest. It never decides what is sent to the peer."""

from __future__ import annotations

from archive.errors import Unavailable
from node.dimse.pdu import AbortReason, AbortSource, Rejection

_REJECTIONS = {
    (1, 1, 1): "no reason given",
    (1, 1, 2): "it does not know the application context",
    (1, 1, 3): "it does not know the calling AE title, or not from this address",
    (1, 1, 7): "it does not go by the called AE title",
    (1, 2, 1): "no reason given",
    (1, 2, 2): "it does not know this version of the protocol",
    (2, 3, 1): "it is congested, try later",
    (2, 3, 2): "its limit of associations is reached, try later",
}


class AssociationEnded(Unavailable):
    """The association is over."""


class PeerReleased(AssociationEnded):
    """The peer asked to release: the orderly end."""


class PeerAborted(AssociationEnded):
    """The peer sent A-ABORT."""

    def __init__(self, source: int, reason: int) -> None:
        super().__init__(f"the peer aborted (source {source}, reason {reason})")
        self.source = source
        self.reason = reason


class ConnectionLost(AssociationEnded):
    """The transport connection is gone, or could not be made."""


class TimedOut(AssociationEnded):
    """The peer was silent for longer than the setting allows."""


class Stopping(AssociationEnded):
    """This side is being stopped."""


class Violation(AssociationEnded):
    """The peer broke PS3.8 or PS3.7, or passed a stated bound: `source` and `reason` are what it is told."""

    def __init__(self, what: str, reason: int = AbortReason.INVALID_PARAMETER_VALUE,
                 source: AbortSource = AbortSource.SERVICE_PROVIDER) -> None:
        super().__init__(what)
        self.source = source
        self.reason = reason


class Rejected(AssociationEnded):
    """The peer answered our A-ASSOCIATE-RQ with A-ASSOCIATE-RJ."""

    def __init__(self, rejection: Rejection) -> None:
        key = (rejection.result, rejection.source, rejection.reason)
        meaning = _REJECTIONS.get(key, "a reason that PS3.8 does not name")
        super().__init__(f"the peer rejected the association ({rejection.triple}): {meaning}")
        self.rejection = rejection
