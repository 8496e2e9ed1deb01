"""Makes and checks the hashes of passwords: argon2id, the same work for names that do not exist. It keeps
nothing and bounds nothing: hashes live in the ledger, who asks bounds how many are checked at once, and
failures are counted by `guessing.py`."""

from __future__ import annotations

from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from archive.errors import InvalidInput

LENGTH_MIN = 12
LENGTH_MAX = 256

# argon2id with 64 MiB and 3 passes: some 0.2 s of two cores. Parallel verifications are to be bounded, as
# each takes the 64 MiB: a login must not be a way to exhaust memory.
_HASHER = PasswordHasher(time_cost=3, memory_cost=64 << 10, parallelism=4)
VERIFICATIONS_AT_ONCE = 2

# Of the passwords that people choose most, those that are long enough to pass the length rule (OWASP ASVS
# 6.2.4).
_COMMON = frozenset(
    {
        "passwordpassword",
        "password1234",
        "password12345",
        "password123456",
        "123456789012",
        "1234567890123",
        "12345678901234",
        "123456789012345",
        "1234567890123456",
        "qwertyuiop123",
        "qwertyuiopasdf",
        "qwertyqwerty",
        "qwerty123456",
        "qwertyuiop[]",
        "1q2w3e4r5t6y",
        "1q2w3e4r5t6y7u",
        "1qaz2wsx3edc",
        "1qaz2wsx3edc4rfv",
        "q1w2e3r4t5y6",
        "adminadminadmin",
        "administrator",
        "administrator1",
        "letmeinletmein",
        "changemechangeme",
        "changeme1234",
        "welcome12345",
        "iloveyou1234",
        "iloveyouiloveyou",
        "unknownunknown",
        "abcdefghijkl",
        "abcdefghijklm",
        "abc123abc123",
        "abcd1234abcd",
        "radiology123",
        "radiologia123",
        "ospedale1234",
        "hospital1234",
        "asdfghjkl123",
        "asdfasdfasdf",
        "zaq12wsxcde3",
        "111111111111",
        "000000000000",
    }
)


def hash_password(password: str, user: str = "") -> str:
    """The text that the ledger keeps for `password`; InvalidInput when the password breaks a rule."""
    check_rules(password, user)
    return _HASHER.hash(password)


def check_rules(password: str, user: str = "") -> None:
    """Length counts, not composition, and nothing that is guessed first (OWASP ASVS 6.2)."""
    if not LENGTH_MIN <= len(password) <= LENGTH_MAX:
        raise InvalidInput(f"a password has {LENGTH_MIN} to {LENGTH_MAX} characters")
    lowered = password.casefold()
    if lowered in _COMMON or len(set(lowered)) < 4:
        raise InvalidInput("this password is among those that are tried first")
    if len(user) >= 4 and user.casefold() in lowered and len(password) < len(user) + LENGTH_MIN // 2:
        raise InvalidInput("the password is hardly more than the user's name")


def matches(stored: str | None, password: str) -> bool:
    """Whether `password` is the one that `stored` was made of; None for a user that does not exist."""
    if len(password) > LENGTH_MAX:
        password = ""  # no rule lets it exist; the work stays the same
    try:
        return _HASHER.verify(stored if stored is not None else decoy(), password) and stored is not None
    except (VerificationError, InvalidHashError):
        return False


def is_outdated(stored: str) -> bool:
    """Whether a newer release would hash with more work."""
    return _HASHER.check_needs_rehash(stored)


def rehash(password: str) -> str:
    """The text to keep for a password that was right and may break a newer rule."""
    return _HASHER.hash(password)


@cache
def decoy() -> str:
    """What an unknown user's password is checked against: the work, and so the time, is the same. To be made
    before it is needed: the first unknown user must not take longer than the others."""
    return _HASHER.hash("no user has this password")
