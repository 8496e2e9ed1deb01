"""Who is at the other end of a request: sign-in with a password, the server's own sessions, and HTTP Basic
where the settings allow it. It decides who somebody is and never what somebody may do
(`federation/policy.py`), nor how long a wrong password makes one wait (`federation/guessing.py`).

A session is 256 random bits in a cookie; the ledger keeps its hash. It ends after 30 idle minutes, after
twelve hours, when the user signs out and, at the next request, when the user is disabled. Wrong passwords
make the next try wait: long for this name from this address, short for the name from elsewhere, so that
nobody can lock another person out."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from archive.errors import Forbidden, NotAuthenticated, OutOfResources
from archive.ledger import AuditRow, Ledger, Session, User
from federation.guessing import NAME_LENGTH_MAX, SLEEPERS_MAX, Guessing
from federation.policy import Principal, role_named
from portal.passwords import Passwords
from portal.settings import SignInSettings
from portal.workers import Workers

TOUCH_INTERVAL_US = 60 * 1_000_000  # how stale "last seen" may be: not every request is a write
BASIC_CACHE_US = 60 * 1_000_000
BASIC_CACHE_MAX = 256


@dataclass(frozen=True, slots=True)
class Visitor:
    """A person who has signed in. `csrf` is empty without a session (HTTP Basic)."""

    user: User
    principal: Principal
    csrf: str = ""
    session: bytes = b""


class TooManyTries(NotAuthenticated):
    """Wrong passwords came too fast; `wait_s` until the next try is looked at."""

    def __init__(self, wait_s: int) -> None:
        super().__init__(f"too many wrong passwords: try again in {wait_s} seconds")
        self.wait_s = wait_s


WRONG = "The name or the password is wrong."


class SignIn:
    """Sessions and passwords over the ledger; `clock` gives microseconds since 1970."""

    def __init__(
        self, ledger: Ledger, settings: SignInSettings, workers: Workers, clock: Callable[[], int]
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._workers = workers
        self._clock = clock
        self._passwords = Passwords()
        self._guessing = Guessing(ledger, clock)
        self._sleepers = 0
        self._basic: OrderedDict[bytes, tuple[str, str, int]] = OrderedDict()
        self._basic_key = secrets.token_bytes(32)

    async def sign_in(self, name: str, password: str, address: str, old_token: str | None) -> str:
        """A new session's token; the session that the browser had before is over. NotAuthenticated when
        wrong."""
        user = await self._authenticate(name, password, address)
        token = secrets.token_urlsafe(32)
        await self._workers.run(self._open_session, user, token, old_token, address)
        return token

    async def visitor(self, token: str, *, touch: bool = True) -> Visitor | None:
        """Who this session's token belongs to, None when nobody's or no longer. A page that refreshes itself
        does not `touch` the session: nobody is there."""
        return await self._workers.run(self._visitor, token, touch)

    async def basic(self, header: str, address: str) -> Visitor:
        """Who an Authorization header of scheme Basic names (RFC 7617). A password that was right stands
        for a minute, so that each frame does not cost an argon2; the user and the hash are looked at every
        time."""
        fingerprint = hashlib.blake2b(header.encode(), key=self._basic_key).digest()
        known = self._basic.get(fingerprint)
        if known is not None and known[2] > self._clock():
            found = await self._workers.run(self._ledger.user, known[0])
            if found is not None and found[0].enabled and found[1] == known[1]:
                return _visitor(found[0])
        name, password = _credentials(header)
        user = await self._authenticate(name, password, address)
        found = await self._workers.run(self._ledger.user, user.name)
        if found is not None:
            self._basic[fingerprint] = (user.name, found[1], self._clock() + BASIC_CACHE_US)
            while len(self._basic) > BASIC_CACHE_MAX:
                self._basic.popitem(last=False)
        return _visitor(user)

    async def sign_out(self, visitor: Visitor, address: str) -> None:
        await self._workers.run(self._close_session, visitor, address)

    def close(self) -> None:
        self._passwords.close()

    async def _authenticate(self, name: str, password: str, address: str) -> User:
        name = name.strip()[:NAME_LENGTH_MAX]
        await self._throttle(name, address)
        found = await self._workers.run(self._ledger.user, name)
        enabled = found is not None and found[0].enabled
        matches = await self._passwords.matches(found[1] if found is not None and enabled else None, password)
        if found is None or not matches:
            await self._workers.run(self._note_failure, name, address)
            raise NotAuthenticated(WRONG)
        await self._workers.run(self._guessing.note_success, name, address)
        if self._passwords.is_outdated(found[1]):
            await self._workers.run(self._ledger.set_password, name, await self._passwords.rehash(password))
        return found[0]

    async def _throttle(self, name: str, address: str) -> None:
        refuse_s, sleep_s = await self._workers.run(self._guessing.waits, name, address)
        if refuse_s > 0:
            await self._workers.run(self._audit, name, "sign-in", "refused: too many tries", address)
            raise TooManyTries(int(refuse_s) + 1)
        if sleep_s > 0:
            if self._sleepers >= SLEEPERS_MAX:
                raise OutOfResources("too many sign-ins at once")
            self._sleepers += 1
            try:
                await asyncio.sleep(sleep_s)
            finally:
                self._sleepers -= 1

    # What follows runs in a thread: every line is a question to the ledger.

    def _note_failure(self, name: str, address: str) -> None:
        self._guessing.note_failure(name, address)
        self._audit(name, "sign-in", "refused: wrong name or password", address)

    def _open_session(self, user: User, token: str, old_token: str | None, address: str) -> None:
        now_us = self._clock()
        if old_token:
            self._ledger.end_session(_hash(old_token))
        self._ledger.purge_sessions(
            seen_before_us=now_us - self._settings.idle_s * 1_000_000,
            created_before_us=now_us - self._settings.absolute_s * 1_000_000,
        )
        self._audit(user.name, "sign-in", "success", address, user)
        self._ledger.create_session(
            Session(_hash(token), user.name, now_us, now_us, secrets.token_urlsafe(24))
        )

    def _visitor(self, token: str, touch: bool) -> Visitor | None:
        session = self._ledger.session(_hash(token))
        now_us = self._clock()
        if session is None:
            return None
        if (
            now_us - session.seen_us > self._settings.idle_s * 1_000_000
            or now_us - session.created_us > self._settings.absolute_s * 1_000_000
        ):
            self._ledger.end_session(session.id_hash)
            return None
        found = self._ledger.user(session.user)
        if found is None or not found[0].enabled:
            return None
        if touch and now_us - session.seen_us > TOUCH_INTERVAL_US:
            self._ledger.touch_session(session.id_hash, now_us)
        return _visitor(found[0], session)

    def _close_session(self, visitor: Visitor, address: str) -> None:
        self._ledger.end_session(visitor.session)
        self._audit(visitor.user.name, "sign-out", "success", address, visitor.user)

    def _audit(self, name: str, act: str, outcome: str, address: str, user: User | None = None) -> None:
        role, ward = (user.role, user.ward or "") if user else ("", "")
        self._ledger.audit(AuditRow(self._clock(), name, role, ward, act, "", outcome, address))


def _visitor(user: User, session: Session | None = None) -> Visitor:
    try:
        role = role_named(user.role)
    except Forbidden as error:
        raise NotAuthenticated(str(error)) from error
    principal = Principal(user.name, role, user.ward)
    return Visitor(user, principal, session.csrf if session else "", session.id_hash if session else b"")


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _credentials(header: str) -> tuple[str, str]:
    try:
        decoded = base64.b64decode(header.partition(" ")[2].strip(), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        raise NotAuthenticated("an Authorization header that can't be read") from None
    name, separator, password = decoded.partition(":")
    if not separator:
        raise NotAuthenticated("an Authorization header that can't be read")
    return name, password
