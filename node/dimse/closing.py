"""Owns the end of a connection after its last word (PS3.8 Sta13): the peer is to close first, within ARTIM,
as closing with octets unread would reset the connection and take our last PDU from it. It never decides what
the last word is."""

from __future__ import annotations

import contextlib
import time

from node.dimse.errors import ConnectionLost, Stopping, TimedOut
from node.dimse.pdu import HEADER_BYTES, AbortReason, AbortSource, PduType, encode_abort, parse_header
from node.dimse.wire import Wire

REST_BYTES_MAX = 1 << 20  # what a peer may still send after it was told that the association is over
ABORTS_MAX = 8            # answers to what has no place in Sta13; a peer that goes on is closed on

_PASSED_OVER = (PduType.ASSOCIATE_AC, PduType.P_DATA_TF)  # AA-6, whatever their length
_PASSED_OVER_OF_FOUR = (PduType.ASSOCIATE_RJ, PduType.RELEASE_RQ, PduType.RELEASE_RP)


def await_close(wire: Wire, seconds: float, pdu_left: int = 0) -> None:
    """Wait until the peer closes (AR-5) or aborts (AA-2); the caller closes. `pdu_left` octets of a PDU that
    was begun are passed over first, and so is what may still be under way (AA-6). An A-ASSOCIATE-RQ or what
    is no PDU is answered with A-ABORT (AA-7)."""
    wire.busy = False
    wire.set_deadline(time.monotonic() + seconds)
    aborts = 0
    room = REST_BYTES_MAX
    with contextlib.suppress(ConnectionLost, TimedOut, Stopping):
        while True:
            room -= pdu_left + HEADER_BYTES
            if room < 0:
                return
            while pdu_left:
                pdu_left -= len(wire.take(pdu_left))
            kind, pdu_left = parse_header(memoryview(wire.read(HEADER_BYTES)))
            if kind == PduType.ABORT:
                return
            if kind in _PASSED_OVER or (kind in _PASSED_OVER_OF_FOUR and pdu_left == 4):
                continue
            if aborts == ABORTS_MAX:
                return
            aborts += 1
            wire.send(encode_abort(AbortSource.SERVICE_PROVIDER, _reason(kind)))


def _reason(kind: int) -> AbortReason:
    if kind == PduType.ASSOCIATE_RQ:
        return AbortReason.UNEXPECTED_PDU
    if kind in _PASSED_OVER_OF_FOUR:
        return AbortReason.INVALID_PARAMETER_VALUE
    return AbortReason.UNRECOGNIZED_PDU
