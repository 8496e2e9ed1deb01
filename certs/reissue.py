"""The hub's side of renewal: a new certificate for the caller's own identity and a new key. The identity is
the calling certificate's; the request's names are never read. Calls come through the gate, and are looked
at again."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from archive.errors import Forbidden, InvalidInput, MissError, OutOfResources
from archive.ledger import CertificateRow, Ledger
from certs import registry
from certs.authority import Authority, Clock, clock_us
from certs.certificate import spki_fingerprint
from certs.gate import Peer, peer
from certs.profiles import LEAF_LIFE_S, Member
from certs.requests import requested_key
from protos import uplink_pb2, uplink_pb2_grpc

ACTIVE_MAX = 8  # certificates of one member that are neither superseded nor over: two, when all is well

_CODES: dict[type[MissError], grpc.StatusCode] = {
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    OutOfResources: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class CertificatesServicer(uplink_pb2_grpc.CertificatesServicer):
    """`Certificates` for a grpc.aio server behind a `Gate`."""

    def __init__(
        self, authority: Authority, ledger: Ledger, *, life_s: int = LEAF_LIFE_S, clock: Clock = clock_us
    ) -> None:
        self._authority = authority
        self._ledger = ledger
        self._life_s = life_s
        self._clock = clock

    async def Renew(
        self, request: uplink_pb2.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> uplink_pb2.RenewReply:
        try:
            row = await asyncio.to_thread(self.renew, peer(context), request.csr_der)
        except (Forbidden, InvalidInput, OutOfResources) as error:
            await context.abort(_CODES[type(error)], str(error))
        bundle = self._authority.bundle
        return uplink_pb2.RenewReply(
            chain_der=[row.der, self._authority.issuing.public_bytes(Encoding.DER)],
            roots_der=[root.public_bytes(Encoding.DER)
                       for root in x509.load_pem_x509_certificates(bundle.roots_pem)],
            bundle_version=bundle.version,
        )

    def renew(self, caller: Peer, request_der: bytes) -> CertificateRow:
        """The certificate for the key in the request: a new one, or the one this key has already.

        Called with its own certificate's key, a member only shows that this certificate works: then the older
        ones are superseded.
        """
        own = self._admitted(caller)
        key = requested_key(request_der)
        spki = spki_fingerprint(key)
        if spki == own.spki:
            registry.supersede_older(self._ledger, own)
            return own
        if known := registry.known_key(self._ledger, spki, caller.uri):
            return known
        self._check_number(caller)
        issued = self._authority.issue(Member.parse(caller.uri), key, life_s=self._life_s)
        row = registry.row_of(issued, clock=self._clock)
        self._ledger.add_certificate(row)
        try:
            self._admitted(caller)
        except Forbidden:  # revoked while this was signed: what was signed goes with it
            self._ledger.revoke_certificate(row.fingerprint, "renewed from a revoked certificate")
            raise
        registry.audit(self._ledger, act="renew", subject=f"{caller.uri} {row.serial}", who=caller.uri,
                       ward=caller.ward, clock=self._clock)
        return row

    def _admitted(self, caller: Peer) -> CertificateRow:
        row = self._ledger.certificate(caller.fingerprint)
        if row is None or row.state == registry.REVOKED:
            raise Forbidden("certificate revoked")
        return row

    def _check_number(self, caller: Peer) -> None:
        now_us = self._clock()
        rows = self._ledger.certificates(identity=caller.uri)
        active = [row for row in rows if row.state == registry.ACTIVE and row.not_after_us > now_us]
        if len(active) >= ACTIVE_MAX:
            raise OutOfResources(f"{len(active)} certificates of this member are active already")
