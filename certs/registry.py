"""The region's registry of certificates: what was issued to whom, and what was taken back. Every act is
audited.

A key gets one certificate, ever: asked again for the same key the registry gives the same certificate, and
a key that belongs to somebody else is nobody's. Signs nothing.
"""

from __future__ import annotations

from archive.errors import Forbidden, NotFound
from archive.ledger import AuditRow, CertificateRow, Ledger
from certs.authority import Clock, clock_us
from certs.certificate import Certificate

ACTIVE, REVOKED, SUPERSEDED = "active", "revoked", "superseded"

SECURITY_ALERT = "security alert"  # DICOM PS3.15 A.5.3.12 has the event of the same name


def row_of(certificate: Certificate, *, clock: Clock = clock_us) -> CertificateRow:
    """The registry's row of a certificate that was just issued: to the microsecond, where a certificate
    itself says when to the second, so that of two the later is known."""
    member = certificate.member
    return CertificateRow(
        serial=certificate.serial, fingerprint=certificate.fingerprint, spki=certificate.spki,
        identity=member.uri, profile=member.profile.value, ward=member.ward,
        not_before_us=certificate.not_before_us, not_after_us=certificate.not_after_us, state=ACTIVE,
        issued_us=clock(), reason="", der=certificate.der,
    )


def known_key(ledger: Ledger, spki: str, identity: str) -> CertificateRow | None:
    """The certificate this key already has; Forbidden when it is another member's or was revoked."""
    for row in ledger.certificates(spki=spki):
        if row.identity != identity:
            raise Forbidden("the key belongs to another member of the region")
        if row.state == REVOKED:
            raise Forbidden("the key's certificate was revoked: make a new key")
        return row
    return None


def supersede_older(ledger: Ledger, newest: CertificateRow) -> None:
    """The newest certificate of a member has carried a call: the older ones are kept for calls still open."""
    for row in ledger.certificates(identity=newest.identity):
        if row.state == ACTIVE and row.issued_us < newest.issued_us:
            ledger.supersede_certificate(row.fingerprint)


def revoke(
    ledger: Ledger, subject: str, *, reason: str, who: str, clock: Clock = clock_us
) -> list[CertificateRow]:
    """Takes back every certificate of the member that `subject` names: a ward ("hospital/ward"), an identity
    URI, or the serial or fingerprint of one of its certificates.

    It is the member that is revoked, not one certificate: whoever holds a stolen key could have renewed it
    meanwhile. The member comes back by a new invite. Returns the certificates that were revoked by this call.
    """
    identity = _identity(ledger, subject)
    revoked: list[CertificateRow] = []
    # Twice: a renewal that was let in before the first pass may have added a row after it. One that adds
    # later finds its caller revoked (certs/reissue.py looks again after it has added).
    for _ in range(2):
        for row in ledger.certificates(identity=identity):
            if row.state != REVOKED and ledger.revoke_certificate(row.fingerprint, reason):
                revoked.append(row)
    outcome = "success" if revoked else "nothing to revoke"
    audit(ledger, act="revoke", subject=identity, who=who, clock=clock, outcome=outcome)
    return revoked


def audit(
    ledger: Ledger, *, act: str, subject: str, who: str, clock: Clock = clock_us, outcome: str = "success",
    address: str = "", ward: str = "",
) -> None:
    """Writes one act of the authority to the audit log."""
    ledger.audit(AuditRow(
        at_us=clock(), who=who, ward=ward, act=act, subject=subject, outcome=outcome, address=address))


def _identity(ledger: Ledger, subject: str) -> str:
    named = ledger.certificate(subject)
    if named is not None:
        return named.identity
    for row in ledger.certificates():
        if subject in (row.identity, row.ward):
            return row.identity
    raise NotFound("no certificate of the region has that serial, fingerprint, identity or ward")
