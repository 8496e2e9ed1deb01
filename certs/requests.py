"""Certificate signing requests: a way to carry a key and the proof that its private half is there, nothing
more. What a request says of names, usages and lifetimes is never read."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from archive.errors import InvalidInput

REQUEST_BYTES_MAX = 8 << 10  # one of ours is 400 bytes


def make_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request for `key`, DER, with an empty subject: who asks is known otherwise."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def requested_key(request_der: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request carries; InvalidInput unless it is on P-256 and signed the request itself."""
    if len(request_der) > REQUEST_BYTES_MAX:
        raise InvalidInput("the certificate request is too large")
    try:
        request = x509.load_der_x509_csr(request_der)
        key = request.public_key()
        signed = request.is_signature_valid
    except Exception as error:  # the parser's own errors are of many kinds
        raise InvalidInput("the certificate request can't be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput("a member's key is on the curve P-256")
    if not signed:
        raise InvalidInput("the certificate request is not signed by its own key")
    return key
