"""Who asks, in a form that travels: signed by whoever knows it, and verified by the hub and by each node on
their own before they decide.

A portal signs for people, with its identity's key: a hub that was broken into can't invent a reader, since it
holds no portal's key. A node signs for the devices of its own ward and for nobody else. That says who asks
and not how far it may look: a ward that believed another ward's node alone would be open to whoever breaks
into one node of the region. So what a device may see beyond its ward takes two: its own node, which says that
this device asks, and the hub, which countersigns that very assertion once the region's grant was looked up
(`federation/policy.py`, granted). Neither a node nor a hub gets anything of a ward by itself.

Canonical form: a line that names the form and its version, then each field as its length (4 bytes, big
endian) and its UTF-8 bytes, the expiry as 8 bytes. Nothing can be moved from one field into the next, and no
other signature of the same key can be taken for one of these. It lives a minute: as long as one question
takes, with slow clocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from archive.errors import InvalidInput, NotAuthenticated, SettingsError
from certs.certificate import read_certificate, verify_chain
from certs.identity import Identity
from certs.profiles import Member, Profile
from federation.policy import (
    PURPOSE_LENGTH_MAX,
    USER_LENGTH_MAX,
    Principal,
    Reach,
    Role,
    reach_named,
    role_named,
)

FORM = b"miss assertion 1\n"
DEVICE_FORM = b"miss device assertion 1\n"
COUNTER_FORM = b"miss countersigned assertion 1\n"
LIFE_S = 60
LIFE_S_MAX = 300
CHAIN_MAX = 4
SIGNERS_MAX = 16
CORRELATION_LENGTH_MAX = 32


@dataclass(frozen=True, slots=True)
class Assertion:
    """A principal, signed. `chain` is the signer's certificate and what leads to the root, leaf first.

    A device's names the `reach` that its node's ledger gives it, and the `correlation` by which the audit
    logs of all that answer it know its question; `countersignature` is the hub's, for more than the ward.
    """

    user: str
    role: str
    ward: str
    purpose: str
    expires_at_us: int
    signature: bytes
    chain: tuple[bytes, ...]
    reach: str = ""
    correlation: str = ""
    countersignature: bytes = b""
    counter_chain: tuple[bytes, ...] = ()

    @property
    def canonical(self) -> bytes:
        """What is signed."""
        texts = [self.user, self.role, self.ward, self.purpose]
        if self.reach:
            texts += [self.reach, self.correlation]
        form = DEVICE_FORM if self.reach else FORM
        parts = (part for text in texts for part in (len(text.encode()).to_bytes(4, "big"), text.encode()))
        return form + b"".join(parts) + self.expires_at_us.to_bytes(8, "big", signed=True)

    @property
    def counter_canonical(self) -> bytes:
        """What the hub signs: this assertion as its node signed it, and no other."""
        return COUNTER_FORM + hashlib.sha256(self.canonical).digest() + self.signature


def sign(
    principal: Principal, identity: Identity, now_us: int, *, life_s: float = LIFE_S, correlation: str = ""
) -> Assertion:
    """The assertion of `principal` by the portal, or for a device by the node, whose identity this is.
    `correlation` is of a device's question."""
    key, chain = _signer(identity)
    is_device = principal.role is Role.DEVICE
    bare = Assertion(
        user=principal.user[:USER_LENGTH_MAX],
        role=principal.role.value,
        ward=principal.ward or "",
        purpose=principal.purpose[:PURPOSE_LENGTH_MAX],
        expires_at_us=now_us + int(life_s * 1e6),
        signature=b"",
        chain=chain,
        reach=principal.reach.value if is_device else "",
        correlation=correlation[:CORRELATION_LENGTH_MAX] if is_device else "",
    )
    return replace(bare, signature=key.sign(bare.canonical, ec.ECDSA(SHA256())))


def countersign(assertion: Assertion, identity: Identity) -> Assertion:
    """The device's assertion with the hub's word that the region lets it look beyond its ward. Whoever calls
    this has verified the assertion and asked the policy."""
    key, chain = _signer(identity)
    signature = key.sign(assertion.counter_canonical, ec.ECDSA(SHA256()))
    return replace(assertion, countersignature=signature, counter_chain=chain)


def verify(assertion: Assertion, roots_pem: bytes, region: str, now_us: int) -> Principal:
    """The principal, when a portal of this region signed it, or a device's own node did, and it has not
    expired; NotAuthenticated otherwise. A device reaches beyond its ward only where a hub countersigned.
    """
    _require_bounds(assertion, now_us)
    signer = _verified(
        assertion.signature, assertion.canonical, assertion.chain, roots_pem, region, now_us
    )
    role = role_named(assertion.role)
    if role is Role.DEVICE:
        if signer.profile is not Profile.NODE or signer.ward != assertion.ward or not assertion.reach:
            raise NotAuthenticated("a device's assertion is signed by its own ward's node")
    elif signer.profile is not Profile.PORTAL or assertion.reach:
        raise NotAuthenticated("an assertion is signed by a portal of this region")
    reach = _reach(assertion, roots_pem, region, now_us) if role is Role.DEVICE else Reach.WARD
    return Principal(assertion.user, role, assertion.ward or None, assertion.purpose, reach)


def _reach(assertion: Assertion, roots_pem: bytes, region: str, now_us: int) -> Reach:
    if reach_named(assertion.reach) is Reach.WARD or not assertion.countersignature:
        return Reach.WARD
    signer = _verified(
        assertion.countersignature,
        assertion.counter_canonical,
        assertion.counter_chain,
        roots_pem,
        region,
        now_us,
    )
    if signer.profile is not Profile.HUB:
        raise NotAuthenticated("a device's reach is countersigned by a hub of this region")
    return Reach.REGION


def _require_bounds(assertion: Assertion, now_us: int) -> None:
    if len(assertion.user) > USER_LENGTH_MAX or len(assertion.purpose) > PURPOSE_LENGTH_MAX:
        raise NotAuthenticated("an assertion past its bounds")
    if len(assertion.correlation) > CORRELATION_LENGTH_MAX:
        raise NotAuthenticated("an assertion past its bounds")
    if not now_us < assertion.expires_at_us <= now_us + LIFE_S_MAX * 1_000_000:
        raise NotAuthenticated("an assertion that has expired, or lives too long")


def _verified(
    signature: bytes, signed: bytes, chain: Sequence[bytes], roots_pem: bytes, region: str, now_us: int
) -> Member:
    """The member of this region whose signature this is."""
    if not 1 <= len(chain) <= CHAIN_MAX:
        raise NotAuthenticated("an assertion comes with its signer's certificates")
    try:
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        verify_chain(certificates, x509.load_pem_x509_certificates(roots_pem), now_us)
        member = read_certificate(certificates[0]).member
    except (InvalidInput, ValueError) as error:
        raise NotAuthenticated(f"an assertion whose certificates do not hold: {error}") from None
    if member.region != region:
        raise NotAuthenticated("an assertion is signed by a portal or node of this region")
    key = certificates[0].public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise NotAuthenticated("an assertion is signed by a key on a curve")
    try:
        key.verify(signature, signed, ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise NotAuthenticated("an assertion whose signature does not hold") from None
    return member


def _signer(identity: Identity) -> tuple[ec.EllipticCurvePrivateKey, tuple[bytes, ...]]:
    return _read_signer(identity.key_pem, identity.chain_pem)


@lru_cache(maxsize=SIGNERS_MAX)
def _read_signer(key_pem: bytes, chain_pem: bytes) -> tuple[ec.EllipticCurvePrivateKey, tuple[bytes, ...]]:
    key = load_pem_private_key(key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError("a member's key is on the curve P-256")
    chain = x509.load_pem_x509_certificates(chain_pem)
    return key, tuple(certificate.public_bytes(Encoding.DER) for certificate in chain)
