"""A DIMSE server over a real ledger for the tests, and raw sockets to misbehave with."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from archive.database import sqlite_url
from archive.ledger import Connection, Device, Ledger
from node.admission import Admission
from node.dimse import pdu
from node.dimse.acceptor import Services
from node.dimse.association import Limits
from node.dimse.contexts import IMPLICIT_LITTLE, VERIFICATION, Offer, ServiceName
from node.dimse.exchange import Service
from node.dimse.messages import Field
from node.dimse.requestor import Peer
from node.dimse.server import PENDING_PER_ADDRESS_MAX, DimseServer
from node.dimse.services.echo import Echo
from node.dimse.tls import Listener
from node.users import UserCheck, UserPolicy
from tests.waiting import wait_for

AE_TITLE = "MISS"
QUICK = Limits(artim_s=1.0, idle_timeout_s=30.0, message_timeout_s=2.0)
ECHO: Mapping[tuple[ServiceName, int], Service] = {(ServiceName.ECHO, Field.C_ECHO): Echo()}


@dataclass(frozen=True)
class Serving:
    """A running server, its ledger and its gate."""

    server: DimseServer
    ledger: Ledger
    admission: Admission

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def peer(self) -> Peer:
        return Peer("127.0.0.1", self.port, AE_TITLE)

    @property
    def tls_port(self) -> int:
        assert self.server.tls_port is not None
        return self.server.tls_port

    def log(self, count: int) -> list[Connection]:
        """The connection log, newest first, once it has `count` rows."""
        wait_for(lambda: len(self.ledger.connections()) >= count, "the connection log")
        return self.ledger.connections()


@contextmanager
def serving(folder: Path, *, table: Mapping[tuple[ServiceName, int], Service] = ECHO, limits: Limits = QUICK,
            private: bool = False, associations_max: int = 100, associations_per_device_max: int = 80,
            tls: Listener | None = None, region: str = "", ward: str = "", certificates_required: bool = True,
            pending_per_address_max: int = PENDING_PER_ADDRESS_MAX, offer: Offer | None = None,
            users: UserPolicy = UserPolicy.IGNORE) -> Iterator[Serving]:
    """A server with the devices CT1 (from loopback) and nothing else."""
    ledger = Ledger.open(sqlite_url(folder / "ledger.db"))
    ledger.add_device(Device("CT1", "127.0.0.1", "CT, room 1"))
    admission = Admission(ledger, AE_TITLE, associations_max=associations_max,
                          associations_per_device_max=associations_per_device_max, region=region, ward=ward,
                          certificates_required=certificates_required, users=UserCheck(ledger, users))
    server = DimseServer("127.0.0.1", 0, admission, Services(offer or Offer(private), table), limits,
                         tls=None if tls is None else (0, tls),
                         pending_per_address_max=pending_per_address_max)
    try:
        with server:
            yield Serving(server, ledger, admission)
    finally:
        admission.close()
        ledger.close()


class Raw:
    """A peer by hand: whole PDUs out, whole PDUs in."""

    def __init__(self, port: int, *, timeout_s: float = 10.0) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def of(cls, sock: socket.socket, *, timeout_s: float = 10.0) -> Raw:
        """Over a connection that is there."""
        raw = cls.__new__(cls)
        raw.sock = sock
        sock.settimeout(timeout_s)
        return raw

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, octets: bytes) -> None:
        self.sock.sendall(octets)

    def receive(self) -> tuple[int, bytes]:
        """Type and body of the next PDU; (0, b"") when the connection is closed."""
        head = self._exactly(6)
        if head is None:
            return 0, b""
        body = self._exactly(struct.unpack(">I", head[2:])[0])
        assert body is not None, "closed inside a PDU"
        return head[0], body

    def _exactly(self, count: int) -> bytes | None:
        octets = b""
        while len(octets) < count:
            try:
                piece = self.sock.recv(count - len(octets))
            except ConnectionResetError:
                piece = b""
            if not piece:
                assert not octets, "closed inside a PDU"
                return None
            octets += piece
        return octets

    def associate(self, request: pdu.AssociateRequest | None = None) -> pdu.AssociateAccept:
        self.send(pdu.encode_request(request or echo_request()))
        kind, body = self.receive()
        assert kind == pdu.PduType.ASSOCIATE_AC, (kind, body)
        return pdu.decode_accept(memoryview(body))

    def closed(self) -> bool:
        return self.receive() == (0, b"")


def echo_request(calling_ae: str = "CT1", called_ae: str = AE_TITLE) -> pdu.AssociateRequest:
    """An A-ASSOCIATE-RQ for verification."""
    return pdu.AssociateRequest(called_ae, calling_ae,
                                (pdu.ProposedContext(1, VERIFICATION, (IMPLICIT_LITTLE,)),), 16384)


def data(context_id: int, control: int, fragment: bytes) -> bytes:
    """A P-DATA-TF PDU with one presentation data value."""
    return pdu.data_header(context_id, control, len(fragment)) + fragment
