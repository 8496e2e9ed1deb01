"""Who asks, in a form that travels: the portal signs it with its identity's key, and the hub and each node
verify it on their own before they decide. A hub that was broken into can thus not invent a reader: it holds
no portal's key.

Canonical form: a line that names the form and its version, then each field as its length (4 bytes, big
endian) and its UTF-8 bytes, the expiry as 8 bytes. Nothing can be moved from one field into the next, and no
other signature of the same key can be taken for one of these. It lives a minute: as long as one question
takes, with slow clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from archive.errors import InvalidInput, NotAuthenticated, SettingsError
from certs.certificate import read_certificate, verify_chain
from certs.identity import Identity
from certs.profiles import Profile
from federation.policy import PURPOSE_LENGTH_MAX, USER_LENGTH_MAX, Principal, role_named

FORM = b"miss assertion 1\n"
LIFE_S = 60
LIFE_S_MAX = 300
CHAIN_MAX = 4
SIGNERS_MAX = 16


@dataclass(frozen=True, slots=True)
class Assertion:
    """A principal, signed. `chain` is the portal's certificate and what leads to the root, leaf first."""

    user: str
    role: str
    ward: str
    purpose: str
    expires_at_us: int
    signature: bytes
    chain: tuple[bytes, ...]

    @property
    def canonical(self) -> bytes:
        """What is signed."""
        texts = (self.user, self.role, self.ward, self.purpose)
        parts = (part for text in texts for part in (len(text.encode()).to_bytes(4, "big"), text.encode()))
        return FORM + b"".join(parts) + self.expires_at_us.to_bytes(8, "big", signed=True)


def sign(principal: Principal, identity: Identity, now_us: int, *, life_s: float = LIFE_S) -> Assertion:
    """The assertion of `principal` by the portal whose identity this is."""
    key, chain = _signer(identity)
    bare = Assertion(
        user=principal.user[:USER_LENGTH_MAX],
        role=principal.role.value,
        ward=principal.ward or "",
        purpose=principal.purpose[:PURPOSE_LENGTH_MAX],
        expires_at_us=now_us + int(life_s * 1e6),
        signature=b"",
        chain=chain,
    )
    signature = key.sign(bare.canonical, ec.ECDSA(SHA256()))
    return Assertion(bare.user, bare.role, bare.ward, bare.purpose, bare.expires_at_us, signature, chain)


def verify(assertion: Assertion, roots_pem: bytes, region: str, now_us: int) -> Principal:
    """The principal, when a portal of this region signed it and it has not expired; NotAuthenticated
    otherwise.
    """
    if not 1 <= len(assertion.chain) <= CHAIN_MAX:
        raise NotAuthenticated("an assertion comes with its portal's certificates")
    if len(assertion.user) > USER_LENGTH_MAX or len(assertion.purpose) > PURPOSE_LENGTH_MAX:
        raise NotAuthenticated("an assertion past its bounds")
    if not now_us < assertion.expires_at_us <= now_us + LIFE_S_MAX * 1_000_000:
        raise NotAuthenticated("an assertion that has expired, or lives too long")
    try:
        chain = [x509.load_der_x509_certificate(der) for der in assertion.chain]
        verify_chain(chain, x509.load_pem_x509_certificates(roots_pem), now_us)
        member = read_certificate(chain[0]).member
    except (InvalidInput, ValueError) as error:
        raise NotAuthenticated(f"an assertion whose certificates do not hold: {error}") from None
    if member.profile is not Profile.PORTAL or member.region != region:
        raise NotAuthenticated("an assertion is signed by a portal of this region")
    key = chain[0].public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise NotAuthenticated("an assertion is signed by a key on a curve")
    try:
        key.verify(assertion.signature, assertion.canonical, ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise NotAuthenticated("an assertion whose signature does not hold") from None
    return Principal(assertion.user, role_named(assertion.role), assertion.ward or None, assertion.purpose)


def _signer(identity: Identity) -> tuple[ec.EllipticCurvePrivateKey, tuple[bytes, ...]]:
    return _read_signer(identity.key_pem, identity.chain_pem)


@lru_cache(maxsize=SIGNERS_MAX)
def _read_signer(key_pem: bytes, chain_pem: bytes) -> tuple[ec.EllipticCurvePrivateKey, tuple[bytes, ...]]:
    key = load_pem_private_key(key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError("a member's key is on the curve P-256")
    chain = x509.load_pem_x509_certificates(chain_pem)
    return key, tuple(certificate.public_bytes(Encoding.DER) for certificate in chain)
