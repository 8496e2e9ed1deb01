"""A member's side of renewal: when it is due, how it is done, and how healthy a certificate is.

`Renewal` is the state machine, without I/O: due when two thirds of life are over or, by chance, a little
sooner, so that wards which enrolled together do not renew together; after a failure it waits longer each
time. `renew` is one renewal over the mutually authenticated channel: a new key, a new certificate, and then
a call that the new pair has to carry before it takes the old one's place. Whoever is killed at any point
starts again with a pair that works. `RenewalThread` runs both in a process. The identity never changes
here: the hub takes it from the old certificate.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from enum import Enum

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from archive.errors import Forbidden, InvalidInput, MissError, NotAuthenticated, Unavailable
from certs import identity as identities
from certs.authority import Clock, clock_us
from certs.certificate import read_der, verify_chain
from certs.credentials import channel_sync
from certs.identity import Identity, Issued
from certs.requests import make_request
from protos import uplink_pb2, uplink_pb2_grpc

log = logging.getLogger(__name__)

DUE_PART = 2 / 3            # of life, at the latest
JITTER_PART = 1 / 15        # of life, sooner
RED_PART = 9 / 10
BACK_OFF_S_MIN = 1.0
BACK_OFF_S_MAX = 3600.0
BACK_OFF_PART_MAX = 1 / 50  # of life: a certificate of a minute is tried again within the second
CALL_S_MAX = 15.0
SLEEP_S_MAX = 30.0          # then the clock is read again: it may have been set, the machine may have slept

_US = 1_000_000


class Health(Enum):
    """How a certificate stands. What has expired is never green, whatever else goes well."""

    GREEN = "green"
    AMBER = "amber"    # renewal is overdue
    RED = "red"        # nine tenths of life are over
    EXPIRED = "expired"


def health(identity: Identity, now_us: int) -> Health:
    life_us = identity.not_after_us - identity.issued_us
    if now_us >= identity.not_after_us:
        return Health.EXPIRED
    if now_us >= identity.issued_us + life_us * RED_PART:
        return Health.RED
    return Health.AMBER if now_us >= identity.issued_us + life_us * DUE_PART else Health.GREEN


class Renewal:
    """When to try. Told of success and failure; asked for the time until the next try."""

    def __init__(
        self, identity: Identity, clock: Clock = clock_us, chance: random.Random | None = None
    ) -> None:
        self._clock = clock
        self._chance = chance or random.Random()
        self.renewed(identity)

    def renewed(self, identity: Identity) -> None:
        """A new certificate is in place."""
        self._life_us = identity.not_after_us - identity.issued_us
        part = DUE_PART - self._chance.random() * JITTER_PART
        self._next_us = identity.issued_us + int(self._life_us * part)
        self._failures = 0

    def failed(self) -> None:
        """A try came to nothing: the next one waits twice as long, up to a bound, less half by chance."""
        longest_s = min(BACK_OFF_S_MAX, max(BACK_OFF_S_MIN, self._life_us / _US * BACK_OFF_PART_MAX))
        wait_s = min(longest_s, BACK_OFF_S_MIN * 2 ** min(self._failures, 30))
        self._failures += 1
        self._next_us = self._clock() + int(wait_s * self._chance.uniform(0.5, 1.0) * _US)

    @property
    def failures(self) -> int:
        """Failed tries in a row."""
        return self._failures

    def wait_s(self) -> float:
        """Seconds until the next try; 0 when it is due. An expired certificate is still tried: the clock that
        says so may be the one that is wrong."""
        return max(0.0, (self._next_us - self._clock()) / _US)


def renew(identity: Identity, *, timeout_s: float = CALL_S_MAX, clock: Clock = clock_us) -> Identity:
    """Renews over the first hub that answers and returns the identity that now counts; blocking.

    Forbidden when the region refuses (revoked), Unavailable when no hub can be asked now, NotAuthenticated
    when what came back can't be used. The old pair stays until the new one has carried a call.
    """
    failure: MissError = Unavailable("this identity names no hub to dial")
    for address in identity.hub_addresses:
        try:
            return _renew_at(identity, address, timeout_s, clock)
        except Unavailable as error:
            failure = error
    raise failure


def _renew_at(identity: Identity, address: str, timeout_s: float, clock: Clock) -> Identity:
    key = identities.pending_key(identity.folder, f"renewal of {identity.fingerprint}")
    request = uplink_pb2.RenewRequest(csr_der=make_request(key))
    issued = _issued(identity, _call(identity, address, request, timeout_s), clock)
    staged = identities.stage(identity.folder, issued)
    # The same request again, over the new pair: it gives the same certificate, and shows that the pair works.
    if _issued(identity, _call(staged, address, request, timeout_s), clock).chain_pem != issued.chain_pem:
        raise NotAuthenticated("the hub gave two certificates for one key")
    log.info("renewed: %s, serial %s", staged.uri, staged.certificate.serial)
    return identities.switch(staged, drop_older=True)


def _call(
    identity: Identity, address: str, request: uplink_pb2.RenewRequest, timeout_s: float
) -> uplink_pb2.RenewReply:
    with channel_sync(identity, address) as channel:
        try:
            stub = uplink_pb2_grpc.CertificatesStub(channel)
            reply: uplink_pb2.RenewReply = stub.Renew(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
                raise Forbidden(f"the hub refuses to renew: {error.details()}") from error
            raise Unavailable(f"no renewal at {address}: {error.code().name} {error.details()}") from error
    return reply


def _issued(identity: Identity, reply: uplink_pb2.RenewReply, clock: Clock) -> Issued:
    """The reply as something to install: for the same member, under a bundle that is no older."""
    try:
        chain = [x509.load_der_x509_certificate(der) for der in reply.chain_der]
        roots = [x509.load_der_x509_certificate(der) for der in reply.roots_der]
        if read_der(reply.chain_der[0]).member != identity.certificate.member:
            raise InvalidInput("it names another member")
        if reply.bundle_version < identity.bundle_version:
            raise InvalidInput("its bundle is older than the one held")
        verify_chain(chain, roots, clock())
    except (ValueError, IndexError, InvalidInput) as error:
        raise NotAuthenticated(f"the renewed certificate can't be used: {error}") from error
    return Issued(
        chain_pem=b"".join(part.public_bytes(Encoding.PEM) for part in chain),
        roots_pem=b"".join(root.public_bytes(Encoding.PEM) for root in roots),
        bundle_version=reply.bundle_version,
        assignment=identity.assignment,
    )


class RenewalThread:
    """Keeps an identity renewed in a process, and tells `on_renewed` (in this thread) of every new one:
    time to make new channels. A hub gives its own way to renew, beside the authority."""

    def __init__(
        self, identity: Identity, *, on_renewed: Callable[[Identity], None] = lambda identity: None,
        renew: Callable[[Identity], Identity] = renew, clock: Clock = clock_us,
        chance: random.Random | None = None,
    ) -> None:
        self._identity = identity
        self._on_renewed = on_renewed
        self._renew = renew
        self._clock = clock
        self._renewal = Renewal(identity, clock, chance)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def failures(self) -> int:
        """Failed tries in a row."""
        return self._renewal.failures

    @property
    def health(self) -> Health:
        return health(self._identity, self._clock())

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 2 * CALL_S_MAX) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.wait(min(self._renewal.wait_s(), SLEEP_S_MAX)):
            if self._renewal.wait_s() > 0:
                continue
            try:
                renewed = self._renew(self._identity)
                if renewed.fingerprint == self._identity.fingerprint:
                    raise Unavailable("the certificate is still the old one")  # else it would be due at once
                self._identity = renewed
                self._renewal.renewed(renewed)
                self._on_renewed(renewed)
            except MissError as error:
                self._failed(str(error))
            except Exception as error:  # a full disk among them: renewal goes on when there is room again
                self._failed(type(error).__name__)

    def _failed(self, why: str) -> None:
        self._renewal.failed()
        level = logging.WARNING if self.health is Health.GREEN else logging.ERROR
        log.log(level, "renewal of %s failed (%d in a row, certificate %s): %s",
                self._identity.uri, self._renewal.failures, self.health.value, why)
