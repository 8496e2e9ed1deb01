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

from archive.errors import Unavailable
from archive.ledger import Connection, Device, Ledger
from certs.profiles import device_uri, is_device_uri
from node.dimse.acceptor import Refusal
from node.dimse.contexts import ServiceName
from node.dimse.exchange import Caller, Log
from node.dimse.origin import Origin, PeerCertificate
from node.dimse.pdu import AssociateRequest, Rejection
from node.logbook import LogBook
from node.users import NOBODY, UserCheck

CALLING_AE_NOT_RECOGNIZED = Rejection(1, 1, 3)  # whatever failed, so that the cause does not leak (AS3)
CALLED_AE_NOT_RECOGNIZED = Rejection(1, 1, 7)
LOCAL_LIMIT_EXCEEDED = Rejection(2, 3, 2)

UNKNOWN = "no device has this AE title"
ELSEWHERE = "the device is not listed at this address, but at "
DISABLED = "the device is disabled"
WRONG_NAME = "it called another AE title; this node is "
NOT_BY_TLS = "the device may come over the plain port alone"
NOT_BY_PLAIN = "the device may come over TLS alone"
PINNED = "the device has a pinned certificate, and showed none"
OTHER_KEY = "the certificate it showed is not the one that is pinned"
OTHER_AE = "the certificate it showed is of another AE title or another ward"
NO_AE = "the certificate it showed names no AE title, and the device has none pinned"
DEVICE_FULL = "the device has as many associations as one may have (dimse.associations_per_device_max)"
NODE_FULL = "the node has as many associations as it takes (dimse.associations_max)"

LEDGER_S_MAX = 10.0  # what the list of devices may take; then the caller is told to come again (2/3/1)
CONTEXTS_LOGGED_MAX = 128
OPERATIONS_LOGGED_MAX = 64


class Admission:
    """The gate of one node. Devices are read for every association, so a change counts at once."""

    def __init__(self, ledger: Ledger, ae_title: str, *, associations_max: int,
                 associations_per_device_max: int, region: str = "", ward: str = "",
                 certificates_required: bool = True, users: UserCheck | None = None) -> None:
        """`region` and `ward` are what certificates of the region's own authority have to name;
        `certificates_required` says that who comes over TLS proves which device it is; `users` judges the
        users that are named, where any are looked at."""
        self._ledger = ledger
        self._ae_title = ae_title
        self._in_all_max = associations_max
        self._per_device_max = associations_per_device_max
        self._region = region
        self._ward = ward
        self._certificates_required = certificates_required
        self._users = users
        self._book = LogBook(ledger)
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

    def close(self) -> None:
        """Write the rest of the log. Nobody is admitted any more."""
        self._reader.shutdown()
        if self._users is not None:
            self._users.close()
        self._book.close()

    def admit(self, request: AssociateRequest, origin: Origin) -> Caller | Refusal:
        if request.called_ae != self._ae_title:
            return Refusal(CALLED_AE_NOT_RECOGNIZED, WRONG_NAME + self._ae_title)
        device = self._device(request.calling_ae)
        if device is None or device.ae_title != request.calling_ae:  # the ledger reads past a NUL inside
            return Refusal(CALLING_AE_NOT_RECOGNIZED, UNKNOWN)
        if not listed_at(device, origin.address):
            return Refusal(CALLING_AE_NOT_RECOGNIZED, ELSEWHERE + device.address)
        if not device.enabled:
            return Refusal(CALLING_AE_NOT_RECOGNIZED, DISABLED)
        if objection := self._objection(device, origin):
            return Refusal(CALLING_AE_NOT_RECOGNIZED, objection)
        user = NOBODY if self._users is None else self._users.judge(request.user_identity, origin.address)
        if isinstance(user, Refusal):
            return user
        full = self._enter(device.ae_title)
        if full:
            return Refusal(LOCAL_LIMIT_EXCEEDED, full)
        return Caller(device.ae_title, device.name, device.issuer, _permitted(device), device.on_conflict,
                      device.sop_classes, device.transfer_syntaxes, user.name, user.answer, device.reach,
                      device.on_incomplete, device.max_age_s)

    def _objection(self, device: Device, origin: Origin) -> str:
        """What speaks against the transport or the certificate that a device came with; "" when nothing."""
        if origin.is_tls and device.transport == "plain":
            return NOT_BY_TLS
        if not origin.is_tls and device.transport == "tls":
            return NOT_BY_PLAIN
        shown = origin.certificate
        if device.certificate:
            if shown is None:
                return PINNED
            if shown.spki != device.certificate:
                return OTHER_KEY
        if shown is None:
            return ""  # over TLS only where the listener does not ask for one
        return self._objection_to(shown, device)

    def _objection_to(self, shown: PeerCertificate, device: Device) -> str:
        """A certificate of the region names the AE titles that may use it. One of another authority does not:
        then the device's pin ties them, and nothing else can where certificates are to prove who comes."""
        named = [uri for uri in shown.uris if is_device_uri(uri)]
        if named:
            own = {device_uri(self._region, device.ae_title),
                   device_uri(self._region, device.ae_title, self._ward)}
            return "" if own & set(named) else OTHER_AE
        return NO_AE if self._certificates_required and not device.certificate else ""

    def _device(self, ae_title: str) -> Device | None:
        if not ae_title:
            return None
        asked = self._reader.submit(self._ledger.device, ae_title)
        try:
            return asked.result(LEDGER_S_MAX)
        except TimeoutError:
            asked.cancel()
            raise Unavailable("the list of devices does not answer") from None

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
        """Have a connection that is over, or was refused, written to the ledger's log."""
        self._book.add(Connection(
            at_us=entry.at_us, address=entry.address, calling_ae=entry.calling_ae, called_ae=entry.called_ae,
            device=entry.device, outcome=entry.outcome, reason=entry.reason,
            contexts=json.dumps(entry.contexts[:CONTEXTS_LOGGED_MAX]),
            operations=json.dumps(dict(entry.operations.most_common(OPERATIONS_LOGGED_MAX))),
            bytes_in=entry.bytes_in, bytes_out=entry.bytes_out, ended=entry.ended,
            ended_us=int(time.time() * 1e6), transport=entry.transport, certificate=entry.certificate,
            user_name=entry.user,
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
