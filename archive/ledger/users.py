"""People who sign in: accounts, their sessions, and the counts that slow down guessing.

A password's hash is text that the portal makes and reads; a session is kept by the hash of its id alone, so
that whoever reads the ledger can't become anyone. A change of password, a disabled or a removed account end
its sessions in the same transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, or_, select, update

from archive.errors import InvalidInput
from archive.ledger.tables import Subject, as_row, sign_in_failure, user_account, user_session

THROTTLE_SUBJECTS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class User:
    """An account. `role` is one of `federation/policy.py`; `ward` binds it to one ward."""

    name: str
    display_name: str
    role: str
    ward: str | None = None
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in browser; `id_hash` is a hash of what the cookie holds."""

    id_hash: bytes
    user: str
    created_us: int
    seen_us: int
    csrf: str


@dataclass(frozen=True, slots=True)
class Throttle:
    """How often signing in failed for a subject (an account, or an address) since it last succeeded."""

    failures: int
    last_us: int


class Users(Subject):
    """Accounts, sessions and failed sign-ins."""

    def add_user(self, user: User, password_hash: str) -> None:
        """Add an account; InvalidInput when the name is taken."""
        row = as_row(user) | {"password_hash": password_hash}

        def work(connection: Connection) -> None:
            if connection.execute(
                select(user_account.c.name).where(user_account.c.name == user.name)
            ).fetchone():
                raise InvalidInput("an account of that name is there already")
            connection.execute(insert(user_account).values(row))

        self._database.write(work)

    def user(self, name: str) -> tuple[User, str] | None:
        """The account and its password hash."""
        query = select(user_account).where(user_account.c.name == name.replace("\x00", ""))
        row = self._database.read(lambda c: c.execute(query).fetchone())
        return None if row is None else (_user(row), row.password_hash)

    def users(self) -> list[User]:
        query = select(user_account).order_by(user_account.c.name)
        return [_user(row) for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def set_password(self, name: str, password_hash: str) -> bool:
        """Change a password and end the account's sessions."""
        return self._change(name, password_hash=password_hash)

    def disable_user(self, name: str) -> bool:
        """Lock an account out and end its sessions."""
        return self._change(name, enabled=False)

    def change_user(self, user: User) -> bool:
        """Change an account's display name, role, ward and state; its sessions end, since a role may have
        gone."""
        return self._change(**as_row(user))

    def remove_user(self, name: str) -> bool:
        def work(connection: Connection) -> bool:
            connection.execute(delete(user_session).where(user_session.c.user_name == name))
            return connection.execute(delete(user_account).where(user_account.c.name == name)).rowcount > 0

        return self._database.write(work)

    def _change(self, name: str, **values: object) -> bool:
        def work(connection: Connection) -> bool:
            connection.execute(delete(user_session).where(user_session.c.user_name == name))
            statement = update(user_account).where(user_account.c.name == name).values(**values)
            return connection.execute(statement).rowcount > 0

        return self._database.write(work)

    def create_session(self, session: Session) -> None:
        row = {
            "id_hash": session.id_hash,
            "user_name": session.user,
            "csrf": session.csrf,
            "created_us": session.created_us,
            "seen_us": session.seen_us,
        }
        self._database.write(lambda c: c.execute(insert(user_session).values(row)))

    def session(self, id_hash: bytes) -> Session | None:
        """The session with this hash, also one that is too old: its age is the portal's to judge."""
        row = self._database.quick(
            "SELECT id_hash, user_name, created_us, seen_us, csrf FROM user_session WHERE id_hash = ?",
            (id_hash,),
        )
        return None if row is None else Session(bytes(row[0]), *row[1:])

    def touch_session(self, id_hash: bytes, seen_us: int) -> None:
        statement = update(user_session).where(user_session.c.id_hash == id_hash).values(seen_us=seen_us)
        self._database.write(lambda c: c.execute(statement))

    def end_session(self, id_hash: bytes) -> bool:
        statement = delete(user_session).where(user_session.c.id_hash == id_hash)
        return self._database.write(lambda c: c.execute(statement).rowcount > 0)

    def end_user_sessions(self, name: str) -> int:
        statement = delete(user_session).where(user_session.c.user_name == name)
        return self._database.write(lambda c: c.execute(statement).rowcount)

    def purge_sessions(self, *, seen_before_us: int, created_before_us: int) -> int:
        """Drop the sessions that were idle or alive for too long."""
        statement = delete(user_session).where(
            or_(user_session.c.seen_us < seen_before_us, user_session.c.created_us < created_before_us)
        )
        return self._database.write(lambda c: c.execute(statement).rowcount)

    def note_failure(self, subject: str, at_us: int, *, forget_before_us: int = 0) -> Throttle:
        """Count one more failed sign-in of `subject`; counts last touched before `forget_before_us` start
        anew. Past 100,000 subjects the oldest go: guessing from many addresses must not fill the ledger."""
        table = sign_in_failure

        def work(connection: Connection) -> Throttle:
            connection.execute(delete(table).where(table.c.last_us < forget_before_us))
            row = connection.execute(select(table.c.failures).where(table.c.subject == subject)).fetchone()
            failures = 1 if row is None else row.failures + 1
            if row is None:
                oldest = select(table.c.subject).order_by(table.c.last_us.desc(), table.c.subject)
                crowd = oldest.offset(THROTTLE_SUBJECTS_MAX - 1).limit(100).subquery()
                connection.execute(delete(table).where(table.c.subject.in_(select(crowd.c.subject))))
                connection.execute(insert(table).values(subject=subject, failures=1, last_us=at_us))
            else:
                connection.execute(
                    update(table).where(table.c.subject == subject).values(failures=failures, last_us=at_us)
                )
            return Throttle(failures, at_us)

        return self._database.write(work)

    def throttle(self, subject: str) -> Throttle:
        """What is known of `subject`; no failures when nothing is."""
        row = self._database.quick(
            "SELECT failures, last_us FROM sign_in_failure WHERE subject = ?", (subject,)
        )
        return Throttle(0, 0) if row is None else Throttle(*row)

    def clear_failures(self, subject: str) -> None:
        """The subject signed in."""
        statement = delete(sign_in_failure).where(sign_in_failure.c.subject == subject)
        self._database.write(lambda c: c.execute(statement))


def _user(row: object) -> User:
    columns = ("name", "display_name", "role", "ward", "enabled")
    return User(**{column: getattr(row, column) for column in columns})
