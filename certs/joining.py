"""How a new member gets in: the bootstrap of trust, from the one line of an invite to an identity on disk.

The new member knows nobody. All it holds is the invite, which a person carried to it and which says, by a
pin, what the region's root key is. So it goes in three steps, and says nothing of itself before the third:

1. It connects without checking anything and asks for the bundle, which is public. From it it keeps only a
root
   whose key has the pinned hash; finds it none, it stops.
2. It closes that connection and opens a new one that must prove, under that root alone, to be a hub of the
region:
   chain, name, usage, profile. A relay or an impostor fails here, having heard nothing.
3. Now it sends id, secret and a request for the key it made itself. The key waits on disk from before the
first
   connection, so that whatever is lost on the way is asked for again with the same key, and the hub answers
   with the same certificate. What comes back must be for this key, lead to the pinned root and be of its
   region.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from archive.errors import Forbidden, InvalidInput, NotAuthenticated, SettingsError, Unavailable
from certs import identity as identities
from certs.authority import Clock, clock_us, pin_of
from certs.certificate import read_der, read_pem, spki_fingerprint, trust_domain, verify_chain
from certs.identity import Assignment, Identity, Issued
from certs.invites import InviteText, split_address
from certs.profiles import Profile, hub_dns_name
from certs.requests import make_request

REPLY_BYTES_MAX = 64 << 10
ROOTS_MAX = 4
TIMEOUT_S = 15.0


def enrol(
    invite: str, folder: Path, *, replace: bool = False, timeout_s: float = TIMEOUT_S, clock: Clock = clock_us
) -> Identity:
    """Enrols by the invite's line and puts the identity into `folder`. Safe to repeat until it returns.

    Raises InvalidInput for a line that is no invite, Unavailable when nobody answers, NotAuthenticated when
    who answers is not the region that the invite pins, Forbidden when the region refuses, with its reason,
    and SettingsError when the folder holds an identity already (unless `replace`).
    """
    text = InviteText.parse(invite)
    if identities.exists(folder) and not replace:
        raise SettingsError(f"{folder} holds the identity {Identity.load(folder).uri} already; "
                            "--replace takes a new one in its place")
    key = identities.pending_key(folder, f"invite {text.id}")
    root = _pinned_root(text, timeout_s)
    region = trust_domain(root)
    request = x509.load_der_x509_csr(make_request(key)).public_bytes(Encoding.PEM).decode()
    with _verified(text, root, region, timeout_s) as connection:
        reply = _exchange(connection, text, "POST", "/enrol", {
            "id": text.id, "secret": text.secret, "csr": request})
    issued = _issued(reply, root, clock)
    leaf = read_pem(issued.chain_pem)
    if leaf.member.region != region or leaf.spki != spki_fingerprint(key.public_key()):
        raise NotAuthenticated("the certificate that came back is not for this key in this region")
    return identities.install(folder, issued, drop_older=True)


def _pinned_root(text: InviteText, timeout_s: float) -> x509.Certificate:
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # step 1: what is fetched here is checked by the pin
    unverified.minimum_version = ssl.TLSVersion.TLSv1_3
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    with _connect(text, unverified, None, timeout_s) as connection:
        bundle = _exchange(connection, text, "GET", "/bundle")
    try:
        roots = x509.load_pem_x509_certificates(str(bundle["roots"]).encode())[:ROOTS_MAX]
        for root in roots:
            if pin_of(root) in text.pins:
                root.verify_directly_issued_by(root)
                return root
    except Exception as error:  # a stranger's bytes: whatever is wrong with them
        raise NotAuthenticated(f"{text.address} did not send the region's roots") from error
    raise NotAuthenticated(
        f"{text.address} is not the region that made this invite (its root has another key); "
        "the secret was not sent")


def _verified(
    text: InviteText, root: x509.Certificate, region: str, timeout_s: float
) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the chain and the name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=root.public_bytes(Encoding.PEM).decode())
    connection = _connect(text, context, hub_dns_name(region), timeout_s)
    try:
        member = read_der(connection.getpeercert(binary_form=True) or b"").member
        if member.profile is not Profile.HUB or member.region != region:
            raise InvalidInput("it is no hub")
    except InvalidInput as error:
        connection.close()
        raise NotAuthenticated(f"{text.address} is not a hub of {region}; the secret was not sent") from error
    return connection


def _connect(
    text: InviteText, context: ssl.SSLContext, name: str | None, timeout_s: float
) -> ssl.SSLSocket:
    try:
        plain = socket.create_connection(split_address(text.address), timeout_s)
    except OSError as error:
        raise Unavailable(f"the enrolment port {text.address} does not answer: {error}") from error
    try:
        return context.wrap_socket(plain, server_hostname=name)
    except ssl.SSLCertVerificationError as error:
        plain.close()
        raise NotAuthenticated(
            f"{text.address} does not prove to be the region that made this invite ({error.verify_message}); "
            "the secret was not sent") from error
    except OSError as error:
        plain.close()
        raise Unavailable(f"no TLS 1.3 with the enrolment port {text.address}: {error}") from error


def _exchange(
    connection: ssl.SSLSocket, text: InviteText, method: str, path: str, sent: dict[str, str] | None = None
) -> dict[str, Any]:
    """One request and its reply on a connection that is open and, if it matters, verified."""
    http_connection = http.client.HTTPConnection(*split_address(text.address))
    http_connection.sock = connection
    try:
        body = None if sent is None else json.dumps(sent)
        headers = {"content-type": "application/json", "connection": "close"}
        http_connection.request(method, path, body, headers)
        response = http_connection.getresponse()
        raw = response.read(REPLY_BYTES_MAX + 1)
        reply = json.loads(raw) if len(raw) <= REPLY_BYTES_MAX else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable(f"{text.address} broke off: {type(error).__name__}") from error
    if not isinstance(reply, dict):
        raise Unavailable(f"{text.address} gave no answer of this protocol")
    if response.status == 429 or response.status >= 500:
        raise Unavailable(f"try again later: {reply.get('message', response.reason)}")
    if response.status != 200:
        code, message = reply.get("code", response.status), reply.get("message", "")
        raise Forbidden(f"enrolment refused ({code}): {message}")
    return reply


def _issued(reply: dict[str, Any], root: x509.Certificate, clock: Clock) -> Issued:
    try:
        issued = Issued(
            chain_pem=str(reply["chain"]).encode(), roots_pem=str(reply["roots"]).encode(),
            bundle_version=int(reply["bundle_version"]),
            assignment=Assignment(
                hospital=str(reply["hospital"]), ward_name=str(reply["ward_name"]),
                issuer=str(reply["issuer"]), hub_addresses=tuple(map(str, reply["hub_addresses"]))))
        verify_chain(x509.load_pem_x509_certificates(issued.chain_pem), [root], clock())
        if root not in x509.load_pem_x509_certificates(issued.roots_pem):
            raise InvalidInput("the roots do not hold the pinned one")
    except (KeyError, TypeError, ValueError, InvalidInput) as error:
        raise NotAuthenticated(
            f"the certificate that came back can't be used: {error} (is this clock right?)") from error
    return issued
