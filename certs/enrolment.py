"""The hub's enrolment port: where a new member trades an invite for its first certificate. HTTPS of its
own, as who comes here has no certificate yet; TLS 1.3, and the server proves itself under the region's root
before it is told anything (RFC 7030's order of things, in JSON).

    GET  /bundle  -> the roots and the issuing CA: public, and worth what the invite's pin says it is worth
    POST /enrol   {"id", "secret", "csr"}  -> certificate, chain, roots, and what the invite assigned

The same invite and the same key give the same certificate again, byte for byte: a reply that was lost is
asked for again. Another key means that two hold the invite: it is burnt, and the audit log gets a security
alert. Names come from the invite's row alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import socket
import ssl
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from archive.errors import Forbidden, InvalidInput
from archive.ledger import Binding, CertificateRow, Invite, Ledger
from certs import identity as identities
from certs import registry
from certs.authority import Authority, Clock, clock_us
from certs.certificate import spki_fingerprint
from certs.connections import bounded_protocol
from certs.identity import Identity
from certs.invites import hash_secret, member_of
from certs.requests import REQUEST_BYTES_MAX, requested_key
from certs.settings import EnrolmentSettings

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 2 * REQUEST_BYTES_MAX
BODY_WAIT_S_MAX = 10.0
CONNECTIONS_MAX = 64
AT_ONCE_MAX = 4            # enrolments in work: each is a signature and two transactions
FAILURES_PER_MINUTE = 10   # of one address; success costs nothing: a hospital may share one address
ADDRESSES_MAX = 1024

_STATUS = {
    "bad-request": 400, "bad-key": 400, "wrong-secret": 403, "unknown-invite": 403, "key-in-use": 403,
    "revoked": 403, "other-key": 409, "expired": 410, "burnt": 410, "certificate-over": 410, "too-large": 413,
    "too-many-tries": 429,
}


class Refused(Exception):
    """An enrolment that is refused; `code` is one of the words that a client can act on."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


_BY_BINDING = {
    Binding.UNKNOWN: ("unknown-invite", "no such invite"),
    Binding.WRONG_SECRET: ("wrong-secret", "the invite's secret is wrong"),
    Binding.OTHER_KEY: ("other-key", "the invite was used with another key: it is burnt, ask for a new one"),
    Binding.BURNT: ("burnt", "the invite is burnt: ask for a new one"),
    Binding.EXPIRED: ("expired", "the invite has expired: ask for a new one"),
}


@dataclass(frozen=True, slots=True)
class Enrolment:
    """The decision about one request; blocking, and the same from whichever server it is asked."""

    authority: Authority
    ledger: Ledger
    hub_addresses: tuple[str, ...]
    life_s: int
    clock: Clock = clock_us

    def enrol(self, invite_id: str, secret: str, request_der: bytes, address: str) -> dict[str, Any]:
        """The reply for a member that may come in; Refused otherwise."""
        try:
            key = requested_key(request_der)
        except InvalidInput as error:
            raise Refused("bad-key", str(error)) from error
        spki, secret_hash = spki_fingerprint(key), hash_secret(secret)
        self._check_key(invite_id, secret_hash, spki, address)
        binding, invite = self.ledger.bind_invite(
            invite_id, spki, now_us=self.clock(), secret_hash=secret_hash)
        if invite is None or binding in _BY_BINDING:
            raise self._refused(binding, invite, address)
        member = member_of(invite, self.authority.region)
        if invite.certificate_serial is None:
            issued = self.authority.issue(member, key, life_s=self.life_s)
            row = self.ledger.complete_invite(invite_id, registry.row_of(issued, clock=self.clock))
        else:
            row = self._again(invite)
        registry.audit(self.ledger, act="enrol", subject=f"{invite_id} {row.identity} {row.serial}",
                       who=row.identity, ward=row.ward or "", address=address, clock=self.clock)
        log.info("%s enrolled from %s, serial %s", row.identity, address, row.serial)
        return self._reply(row, invite)

    def _check_key(self, invite_id: str, secret_hash: bytes, spki: str, address: str) -> None:
        """A key that has a certificate comes again by the invite that gave it, or not at all. Only who knows
        the secret learns of it; for others the invite is left to find fault."""
        invite = self.ledger.invite(invite_id)
        if invite is None or not hmac.compare_digest(invite.secret_hash, secret_hash):
            return
        try:
            known = registry.known_key(self.ledger, spki, member_of(invite, self.authority.region).uri)
        except Forbidden as error:
            self._audit(registry.SECURITY_ALERT, invite, "key-in-use", address)
            raise Refused("key-in-use", str(error)) from error
        if known is None:
            return
        # The invite is read again, after the key's certificate: the two appear in one transaction, and the
        # same request that came twice may have made them since the invite was read above.
        invite = self.ledger.invite(invite_id) or invite
        if known.serial != invite.certificate_serial:
            self._audit("enrol", invite, "key-in-use", address)
            raise Refused("key-in-use", "the key has a certificate already: make a new key")

    def _again(self, invite: Invite) -> CertificateRow:
        row = self.ledger.certificate(invite.certificate_serial or "")
        if row is None or row.state == registry.REVOKED:
            raise Refused("revoked", "the certificate of this invite was revoked")
        if row.not_after_us <= self.clock():
            raise Refused("certificate-over", "the invite's certificate has expired: ask for a new invite")
        return row

    def _refused(self, binding: Binding, invite: Invite | None, address: str) -> Refused:
        code, message = _BY_BINDING[binding]
        if invite is None:  # not audited: whoever finds the port could fill the audit log
            log.warning("enrolment refused from %s: %s", address, code)
            return Refused(code, message)
        alarming = binding is Binding.OTHER_KEY
        self._audit(registry.SECURITY_ALERT if alarming else "enrol", invite, code, address)
        if binding is Binding.WRONG_SECRET:
            message += f"; {invite.tries_left} tries left"
        return Refused(code, message)

    def _audit(self, act: str, invite: Invite, outcome: str, address: str) -> None:
        log.warning("%s: invite %s from %s: %s", act, invite.id, address, outcome)
        ward = invite.ward_id if invite.profile == "node" else ""
        registry.audit(self.ledger, act=act, subject=f"{invite.id} {invite.profile} {invite.ward_id}", who="",
                       ward=ward, outcome=outcome, address=address, clock=self.clock)

    def _reply(self, row: CertificateRow, invite: Invite) -> dict[str, Any]:
        bundle = self.authority.bundle
        leaf = x509.load_der_x509_certificate(row.der).public_bytes(Encoding.PEM)
        return {
            "chain": (leaf + bundle.issuing_pem).decode(),
            "roots": bundle.roots_pem.decode(),
            "bundle_version": bundle.version,
            "hospital": invite.hospital,
            "ward_name": invite.ward_name,
            "issuer": invite.issuer,
            "hub_addresses": list(self.hub_addresses),
        }


class Failures:
    """How often each address failed within the last minute; bounded, the longest quiet forgotten first."""

    def __init__(self, per_minute: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock_s = clock_s
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def too_many(self, address: str) -> bool:
        times = self._times.get(address)
        while times and times[0] < self._clock_s() - 60:
            times.popleft()
        return times is not None and len(times) >= self._per_minute

    def add(self, address: str) -> None:
        times = self._times.setdefault(address, deque(maxlen=self._per_minute))
        times.append(self._clock_s())
        self._times.move_to_end(address)
        if len(self._times) > ADDRESSES_MAX:
            self._times.popitem(last=False)


def enrolment_app(enrolment: Enrolment, failures: Failures) -> Starlette:
    """The two resources of the enrolment port."""
    at_once = asyncio.Semaphore(AT_ONCE_MAX)

    async def bundle(request: Request) -> Response:
        held = enrolment.authority.bundle
        return JSONResponse({
            "version": held.version, "roots": held.roots_pem.decode(), "issuing": held.issuing_pem.decode()})

    async def enrol(request: Request) -> Response:
        address = request.client.host if request.client else "?"
        try:
            if failures.too_many(address):
                raise Refused("too-many-tries", "too many failed tries from this address: wait a minute")
            invite_id, secret, request_der = _fields(await _body(request))
            async with at_once:
                reply = await asyncio.to_thread(enrolment.enrol, invite_id, secret, request_der, address)
        except Refused as refused:
            failures.add(address)
            headers = {"retry-after": "60"} if refused.code == "too-many-tries" else None
            return JSONResponse({"code": refused.code, "message": str(refused)},
                                _STATUS[refused.code], headers)
        except Exception:  # the ledger's disk is full, its database is away: nothing was given out
            log.exception("enrolment failed")
            return JSONResponse({"code": "unavailable", "message": "the hub can't enrol now"}, 503)
        return JSONResponse(reply)

    return Starlette(routes=[Route("/bundle", bundle), Route("/enrol", enrol, methods=["POST"])])


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_WAIT_S_MAX):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES_MAX:
                    raise Refused("too-large", f"a request has at most {BODY_BYTES_MAX} bytes")
    except TimeoutError as error:
        raise Refused("bad-request", "the request did not arrive in time") from error
    return bytes(body)


def _fields(body: bytes) -> tuple[str, str, bytes]:
    try:
        sent = json.loads(body)
        invite_id, secret, request_pem = sent["id"], sent["secret"], sent["csr"]
        if not all(isinstance(part, str) and len(part) <= BODY_BYTES_MAX for part in (invite_id, secret)):
            raise ValueError
        request = x509.load_pem_x509_csr(request_pem.encode())
        return invite_id, secret, request.public_bytes(Encoding.DER)
    except Exception as error:  # of JSON, of its shape, of the request's parser: all the caller's
        raise Refused("bad-request", "not an id, a secret and a PEM certificate request") from error


class EnrolmentServer:
    """The enrolment port, inside the hub's event loop."""

    def __init__(
        self, authority: Authority, ledger: Ledger, identity: Identity, settings: EnrolmentSettings,
        *, clock: Clock = clock_us,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._enrolment = Enrolment(
            authority, ledger, tuple(settings.hub_addresses), settings.certificate_life_s, clock)
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port it listens on, once started."""
        if self._socket is None:
            raise RuntimeError("the enrolment server is not started")
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        self._socket = socket.create_server(
            (self._settings.host, self._settings.port), backlog=CONNECTIONS_MAX,
            family=socket.AF_INET6 if ":" in self._settings.host else socket.AF_INET)
        config = uvicorn.Config(
            enrolment_app(self._enrolment, Failures(FAILURES_PER_MINUTE)), http=bounded_protocol(), ws="none",
            lifespan="off", loop="none", log_config=None, access_log=False, proxy_headers=False,
            server_header=False, limit_concurrency=CONNECTIONS_MAX, timeout_keep_alive=5,
            timeout_graceful_shutdown=5, h11_max_incomplete_event_size=BODY_BYTES_MAX,
            ssl_certfile=self._identity.chain_path,
            ssl_context_factory=lambda config, default: _reloading_context(self._identity),
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([self._socket]), name="enrolment")
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise RuntimeError("the enrolment server ended while it started")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving


class _Server(uvicorn.Server):
    """Inside a process that has its own way with signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def _reloading_context(identity: Identity) -> ssl.SSLContext:
    """TLS 1.3 with the identity's current certificate: looked at when a handshake names the server."""
    outer = _context(identity)
    current = {identity.fingerprint: outer}

    def refresh(handshake: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        held = identities.latest(identity)
        if held.fingerprint not in current:
            fresh = _context(held)
            current.clear()
            current[held.fingerprint] = fresh
        handshake.context = current[held.fingerprint]

    outer.sni_callback = refresh
    return outer


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity.chain_path, identity.key_path)
    return context
