"""Owns who may open an association with the node: called AE title, calling AE title, address and capacity are
checked here and nowhere else, against the devices in the ledger as they are now; and the log of who came. It
never speaks DICOM: it says what to answer, and `node/dimse/acceptor.py` answers."""

from __future__ import annotations

import ipaddress
import json
import shlex
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from archive.ledger import Connection, Device, Ledger
from node.dimse.acceptor import Caller, Log, Refusal
from node.dimse.contexts import ServiceName
from node.dimse.pdu import AssociateRequest, Rejection

CALLING_AE_NOT_RECOGNIZED = Rejection(1, 1, 3)  # whatever failed, so that the cause does not leak (AS3)
CALLED_AE_NOT_RECOGNIZED = Rejection(1, 1, 7)
LOCAL_LIMIT_EXCEEDED = Rejection(2, 3, 2)

UNKNOWN = "no device has this AE title"
ELSEWHERE = "the device is not listed at this address, but at "
DISABLED = "the device is disabled"
WRONG_NAME = "it called another AE title; this node is "
DEVICE_FULL = "the device has as many associations as one may have (dimse.associations_per_device_max)"
NODE_FULL = "the node has as many associations as it takes (dimse.associations_max)"

CONTEXTS_LOGGED_MAX = 128
OPERATIONS_LOGGED_MAX = 64


class Admission:
    """The gate of one node. Devices are read for every association, so a change counts at once."""

    def __init__(self, ledger: Ledger, ae_title: str, *, associations_max: int,
                 associations_per_device_max: int) -> None:
        self._ledger = ledger
        self._ae_title = ae_title
        self._in_all_max = associations_max
        self._per_device_max = associations_per_device_max
        self._lock = threading.Lock()
        self._present: Counter[str] = Counter()
        # The ledger keeps a database connection for each thread that asks it for a device, and every
        # association has its own thread: asked there, 2,000 idle ones cost 180 KB and four descriptors each;
        # asked here 42 KB and one.
        self._reader = ThreadPoolExecutor(1, "admission")

    @property
    def associations(self) -> dict[str, int]:
        """How many associations each device has open now."""
        with self._lock:
            return dict(self._present)

    def admit(self, request: AssociateRequest, address: str) -> Caller | Refusal:
        if request.called_ae != self._ae_title:
            return Refusal(CALLED_AE_NOT_RECOGNIZED, WRONG_NAME + self._ae_title)
        device = self._device(request.calling_ae)
        if device is None:
            return Refusal(CALLING_AE_NOT_RECOGNIZED, UNKNOWN)
        if not listed_at(device, address):
            return Refusal(CALLING_AE_NOT_RECOGNIZED, ELSEWHERE + device.address)
        if not device.enabled:
            return Refusal(CALLING_AE_NOT_RECOGNIZED, DISABLED)
        full = self._enter(device.ae_title)
        if full:
            return Refusal(LOCAL_LIMIT_EXCEEDED, full)
        return Caller(device.ae_title, device.name, device.issuer, _permitted(device))

    def _device(self, ae_title: str) -> Device | None:
        return self._reader.submit(self._ledger.device, ae_title).result() if ae_title else None

    def _enter(self, ae_title: str) -> str:
        with self._lock:
            if self._present[ae_title] >= self._per_device_max:
                return DEVICE_FULL
            if self._present.total() >= self._in_all_max:
                return NODE_FULL
            self._present[ae_title] += 1
            return ""

    def leave(self, caller: Caller) -> None:
        with self._lock:
            self._present[caller.ae_title] -= 1
            if self._present[caller.ae_title] <= 0:
                del self._present[caller.ae_title]

    def record(self, entry: Log) -> None:
        """Write an association to the ledger's connection log."""
        self._ledger.log_connection(Connection(
            at_us=entry.at_us, address=entry.address, calling_ae=entry.calling_ae, called_ae=entry.called_ae,
            device=entry.device, outcome=entry.outcome, reason=entry.reason,
            contexts=json.dumps(entry.contexts[:CONTEXTS_LOGGED_MAX]),
            operations=json.dumps(dict(entry.operations.most_common(OPERATIONS_LOGGED_MAX))),
            bytes_in=entry.bytes_in, bytes_out=entry.bytes_out, ended=entry.ended,
            ended_us=int(time.time() * 1e6),
        ))


def listed_at(device: Device, address: str) -> bool:
    """Whether a device may come from this address. One that cannot be read admits nobody."""
    if device.address == "*":
        return True
    try:
        came_from = ipaddress.ip_address(address)
        if isinstance(came_from, ipaddress.IPv6Address) and came_from.ipv4_mapped is not None:
            came_from = came_from.ipv4_mapped  # an IPv4 peer of a listener on both
        return came_from in ipaddress.ip_network(device.address, strict=False)
    except ValueError:
        return False


def _permitted(device: Device) -> frozenset[ServiceName]:
    """What the device may ask for; verification is everybody's."""
    return frozenset(name for name in ServiceName if name.value in device.services) | {ServiceName.ECHO}


def remedy(entry: Connection) -> str:
    """The line that would admit a refused caller, "" when there is none (`miss node log` shows it)."""
    if entry.outcome != "refused" or not entry.calling_ae.isprintable() or not entry.calling_ae.isascii():
        return ""
    known = entry.reason == DISABLED or entry.reason.startswith(ELSEWHERE)
    if known or (entry.reason == UNKNOWN and entry.calling_ae):
        return f"miss device add {shlex.quote(entry.calling_ae)} {shlex.quote(entry.address)}"
    return ""
