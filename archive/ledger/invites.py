"""One-time invites: who may enrol as what. Checking an invite and binding it to a key are one transaction.

The secret is kept by its hash. The same invite with the same key always leads to the same certificate, so
that a reply that was lost does no harm; with another key it is burnt.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace
from enum import Enum

from sqlalchemy import Connection, insert, select, update

from archive.errors import InvalidInput, NotFound
from archive.ledger.certificates import CertificateRow
from archive.ledger.tables import Subject, as_row, certificate, invite

OPEN, USED, BURNT, EXPIRED = "open", "used", "burnt", "expired"


@dataclass(frozen=True, slots=True)
class Invite:
    """An invite. `spki` is the key it is bound to (hex); `state` is open, used, burnt or expired."""

    id: str
    secret_hash: bytes
    profile: str
    hospital: str
    ward_name: str
    issuer: str
    ward_id: str
    created_us: int
    expires_us: int
    tries_left: int = 5
    spki: str | None = None
    certificate_serial: str | None = None
    state: str = OPEN


class Binding(Enum):
    """What became of an attempt to use an invite."""

    BOUND = "bound"  # to this key, now
    SAME_KEY = "same key"  # bound to this key before: the same certificate is due
    WRONG_SECRET = "wrong secret"  # a try is spent, the last one burns the invite
    OTHER_KEY = "other key"  # bound to another key: burnt now
    BURNT = "burnt"
    EXPIRED = "expired"
    UNKNOWN = "unknown"


class Invites(Subject):
    """The invites of the region."""

    def add_invite(self, new: Invite) -> None:
        self._database.write(lambda c: c.execute(insert(invite).values(as_row(new))))

    def invite(self, invite_id: str) -> Invite | None:
        return self._database.read(lambda c: _find(c, invite_id))

    def invites(self) -> list[Invite]:
        """Every invite, newest first."""
        query = select(invite).order_by(invite.c.created_us.desc(), invite.c.id)
        return [Invite(**row._mapping) for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def bind_invite(
        self, invite_id: str, spki: str, *, now_us: int, secret_hash: bytes | None = None
    ) -> tuple[Binding, Invite | None]:
        """Bind the invite to a key, once, and say what became of it and how the invite stands now. With
        `secret_hash` the secret is checked in the same transaction, before anything is told or changed."""

        def work(connection: Connection) -> tuple[Binding, Invite | None]:
            found = _find(connection, invite_id, lock=True)
            if found is None:
                return Binding.UNKNOWN, None
            binding, after = _bound(found, spki, now_us, secret_hash)
            if after != found:
                connection.execute(update(invite).where(invite.c.id == invite_id).values(as_row(after)))
            return binding, after

        return self._database.write(work)

    def complete_invite(self, invite_id: str, row: CertificateRow) -> CertificateRow:
        """Register the certificate that the invite led to, and mark it used, in one transaction. Of two
        that do this at once the second gets the certificate of the first."""

        def work(connection: Connection) -> CertificateRow:
            found = _find(connection, invite_id, lock=True)
            if found is None:
                raise NotFound("no such invite")
            if found.certificate_serial is not None:
                query = select(certificate).where(certificate.c.serial == found.certificate_serial)
                return CertificateRow(**connection.execute(query).one()._mapping)
            if found.spki != row.spki or found.state == BURNT:
                raise InvalidInput("the invite is not bound to this key")
            connection.execute(insert(certificate).values(as_row(row)))
            connection.execute(
                update(invite)
                .where(invite.c.id == invite_id)
                .values(certificate_serial=row.serial, state=USED)
            )
            return row

        return self._database.write(work)

    def spend_try(self, invite_id: str) -> int:
        """Take away one try and say how many are left; the last one burns the invite."""

        def work(connection: Connection) -> int:
            found = _find(connection, invite_id, lock=True)
            if found is None:
                return 0
            after = _one_try_less(found)
            connection.execute(update(invite).where(invite.c.id == invite_id).values(as_row(after)))
            return after.tries_left

        return self._database.write(work)

    def burn_invite(self, invite_id: str) -> bool:
        statement = (
            update(invite).where(invite.c.id == invite_id, invite.c.state != BURNT).values(state=BURNT)
        )
        return self._database.write(lambda c: c.execute(statement).rowcount > 0)


def _bound(found: Invite, spki: str, now_us: int, secret_hash: bytes | None) -> tuple[Binding, Invite]:
    if found.state == BURNT:
        return Binding.BURNT, found
    if secret_hash is not None and not hmac.compare_digest(secret_hash, found.secret_hash):
        return Binding.WRONG_SECRET, _one_try_less(found)
    if found.spki == spki:
        return Binding.SAME_KEY, found
    if found.spki is not None:
        return Binding.OTHER_KEY, replace(found, state=BURNT)
    if found.state == EXPIRED or now_us >= found.expires_us:
        return Binding.EXPIRED, replace(found, state=EXPIRED)
    return Binding.BOUND, replace(found, spki=spki)


def _one_try_less(found: Invite) -> Invite:
    left = max(0, found.tries_left - 1)
    return replace(found, tries_left=left, state=found.state if left else BURNT)


def _find(connection: Connection, invite_id: str, *, lock: bool = False) -> Invite | None:
    query = select(invite).where(invite.c.id == invite_id.replace("\x00", ""))
    row = connection.execute(query.with_for_update() if lock else query).fetchone()
    return None if row is None else Invite(**row._mapping)
