"""The register of certificates that the region issued, with the state each is in. It signs and checks
nothing."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, insert, or_, select, update

from archive.ledger.tables import Subject, as_row, certificate, counter

ACTIVE, REVOKED, SUPERSEDED = "active", "revoked", "superseded"


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """A certificate: serial, fingerprint (SHA-256 of the DER) and spki (SHA-256 of the key) in lower-case
    hex; `state` is active, revoked or superseded."""

    serial: str
    fingerprint: str
    spki: str
    identity: str
    profile: str
    ward: str | None
    not_before_us: int
    not_after_us: int
    state: str = ACTIVE
    issued_us: int = 0
    reason: str = ""
    der: bytes = b""


class CertificateRegister(Subject):
    """Certificates, and a counter that grows with every change of a state."""

    def add_certificate(self, row: CertificateRow) -> None:
        self._database.write(lambda c: c.execute(insert(certificate).values(as_row(row))))

    def certificate(self, fingerprint: str) -> CertificateRow | None:
        """The certificate with this fingerprint, or with this serial."""
        query = select(certificate).where(_named(fingerprint))
        row = self._database.read(lambda c: c.execute(query).fetchone())
        return None if row is None else CertificateRow(**row._mapping)

    def certificates(self, *, identity: str | None = None, spki: str | None = None) -> list[CertificateRow]:
        """Every certificate, newest first; of one identity or of one key alone when given."""
        query = select(certificate).order_by(certificate.c.issued_us.desc(), certificate.c.fingerprint)
        if identity is not None:
            query = query.where(certificate.c.identity == identity)
        if spki is not None:
            query = query.where(certificate.c.spki == spki)
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        return [CertificateRow(**row._mapping) for row in rows]

    def revoke_certificate(self, name: str, reason: str) -> bool:
        """Revoke by serial or fingerprint; False when there is none such, or it is revoked already."""
        return self._move(name, REVOKED, reason, (ACTIVE, SUPERSEDED))

    def supersede_certificate(self, name: str) -> bool:
        """A newer certificate of the same identity has carried a call: this one is not expected any more."""
        return self._move(name, SUPERSEDED, "renewed", (ACTIVE,))

    def revocation_version(self) -> int:
        """A number that grows when a certificate's state changes; microseconds on SQLite, as every call
        asks."""
        return int(self._database.quick("SELECT value FROM counter WHERE name = 'revocation'")[0])

    def _move(self, name: str, state: str, reason: str, states: tuple[str, ...]) -> bool:
        def work(connection: Connection) -> bool:
            statement = update(certificate).where(_named(name), certificate.c.state.in_(states))
            if not connection.execute(statement.values(state=state, reason=reason)).rowcount:
                return False
            changed = update(counter).where(counter.c.name == "revocation")
            connection.execute(changed.values(value=counter.c.value + 1))
            return True

        return self._database.write(work)


def _named(name: str) -> ColumnElement[bool]:
    lowered = name.lower()
    return or_(certificate.c.fingerprint == lowered, certificate.c.serial == lowered)
