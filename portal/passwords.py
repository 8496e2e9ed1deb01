"""Checks passwords off the portal's event loop, a bounded number at a time. What a password is, and how its
hash is made, is for `federation/passwords.py`."""

from __future__ import annotations

from federation import passwords
from portal.workers import Workers

VERIFICATIONS_WAITING_MAX = 30


class Passwords:
    """Checks passwords off the event loop, few at a time."""

    def __init__(self) -> None:
        self._workers = Workers("argon2", passwords.VERIFICATIONS_AT_ONCE, VERIFICATIONS_WAITING_MAX)
        passwords.decoy()

    async def matches(self, stored: str | None, password: str) -> bool:
        """Whether `password` is the one that `stored` was made of; None for a user that does not exist."""
        return await self._workers.run(passwords.matches, stored, password)

    def is_outdated(self, stored: str) -> bool:
        """Whether a newer release would hash with more work."""
        return passwords.is_outdated(stored)

    async def rehash(self, password: str) -> str:
        return await self._workers.run(passwords.rehash, password)

    def close(self) -> None:
        self._workers.close()
