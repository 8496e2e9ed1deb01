"""Owns the check of the user that a requestor names (PS3.7 D.3.3.7), against the node's own users: by name,
or by name and passcode. Whether the device may come at all is admission's; what the user may do is nobody's
yet. The passcode is looked at here, kept nowhere and said to nobody."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

from archive.ledger import Ledger
from federation import passwords
from federation.guessing import NAME_LENGTH_MAX, SLEEPERS_MAX, Guessing
from node.dimse.acceptor import TEMPORARY_CONGESTION, Refusal
from node.dimse.pdu import Rejection, UserIdentity

log = logging.getLogger(__name__)

# "rejected-permanent" by the "service-provider (ACSE related function)": PS3.7 D.3.3.7 for an identity that
# is refused; which part of it was wrong is not said.
IDENTITY_REFUSED = Rejection(1, 2, 1)

NAMELESS = "it names no user, and dimse.user_identity requires one"
OTHER_KIND = "it names its user by what this node does not check: "
WRONG = "the user or the passcode is wrong: "
TOO_MANY = "too many wrong passcodes for the user: "
BUSY = "too many passcodes are being checked"

_KINDS = {3: "a Kerberos ticket", 4: "a SAML assertion", 5: "a JSON web token"}
CHECKS_WAITING_MAX = 30
CHECK_WAIT_S = 10.0     # for a turn; ARTIM of most peers is longer
REMEMBERED_US = 60 * 1_000_000  # a passcode that was right: senders that associate for each image exist
REMEMBERED_MAX = 256


class UserPolicy(Enum):
    """What becomes of a named user; the values are those of `dimse.user_identity`."""

    IGNORE = "ignore"
    CHECK = "check"
    REQUIRE = "require"


@dataclass(frozen=True, slots=True)
class KnownUser:
    """Who it is: "" when none was named, or none is looked at. `answer` is the server response to be sent,
    for these kinds an empty one."""

    name: str = ""
    answer: bytes | None = None


NOBODY = KnownUser()


class UserCheck:
    """Judges user identities over one ledger; from any thread."""

    def __init__(self, ledger: Ledger, policy: UserPolicy) -> None:
        self._ledger = ledger
        self._policy = policy
        self._guessing = Guessing(ledger, _now_us)
        self._room = threading.BoundedSemaphore(passwords.VERIFICATIONS_AT_ONCE + CHECKS_WAITING_MAX)
        self._sleepers = threading.BoundedSemaphore(SLEEPERS_MAX)
        # Few threads at a time, which have views of the ledger: an association's own thread gets none.
        self._workers = ThreadPoolExecutor(passwords.VERIFICATIONS_AT_ONCE, "passcode")
        self._lock = threading.Lock()
        self._remembered: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self._key = secrets.token_bytes(32)
        if policy is not UserPolicy.IGNORE:
            passwords.decoy()

    def judge(self, identity: UserIdentity | None, address: str) -> KnownUser | Refusal:
        """Who the user is, or why the association is refused."""
        if self._policy is UserPolicy.IGNORE:
            return NOBODY
        required = self._policy is UserPolicy.REQUIRE
        if identity is None:
            return Refusal(IDENTITY_REFUSED, NAMELESS) if required else NOBODY
        if identity.kind not in (1, 2):
            kind = _KINDS.get(identity.kind, f"a user identity of type {identity.kind}")
            log.warning("%s: %s is not checked here and %s", address, kind,
                        "refused" if required else "passed over")
            return Refusal(IDENTITY_REFUSED, OTHER_KIND + kind) if required else NOBODY
        return self._check(identity, address)

    def close(self) -> None:
        self._workers.shutdown(cancel_futures=True)

    def _check(self, identity: UserIdentity, address: str) -> KnownUser | Refusal:
        name = _text(identity.primary).strip()[:NAME_LENGTH_MAX]
        if not self._room.acquire(blocking=False):
            return Refusal(TEMPORARY_CONGESTION, BUSY)
        try:
            refuse_s, sleep_s = self._workers.submit(self._guessing.waits, name, address).result(CHECK_WAIT_S)
            if refuse_s > 0:
                return Refusal(IDENTITY_REFUSED, TOO_MANY + _shown(name))
            if sleep_s > 0 and not self._sleep(sleep_s):
                return Refusal(TEMPORARY_CONGESTION, BUSY)
            right = self._workers.submit(self._is_right, identity, name, address).result(CHECK_WAIT_S)
        except TimeoutError:
            return Refusal(TEMPORARY_CONGESTION, BUSY)
        finally:
            self._room.release()
        if not right:
            return Refusal(IDENTITY_REFUSED, WRONG + _shown(name))
        return KnownUser(name, b"" if identity.wants_answer else None)

    def _sleep(self, seconds: float) -> bool:
        if not self._sleepers.acquire(blocking=False):
            return False
        try:
            time.sleep(seconds)
        finally:
            self._sleepers.release()
        return True

    # What follows runs in the workers: every line is a question to the ledger.

    def _is_right(self, identity: UserIdentity, name: str, address: str) -> bool:
        found = self._ledger.user(name)
        stored = found[1] if found is not None and found[0].enabled else None
        by_name = identity.kind == 1
        right = stored is not None if by_name else self._matches(stored, name, identity.secondary)
        if right:
            self._guessing.note_success(name, address)
        else:
            self._guessing.note_failure(name, address)
        return right

    def _matches(self, stored: str | None, name: str, passcode: bytes) -> bool:
        """A passcode that was right stands for a minute, as long as the hash is the same."""
        fingerprint = hashlib.blake2b(name.encode() + b"\0" + passcode, key=self._key).digest()
        with self._lock:
            hashed, until_us = self._remembered.get(fingerprint, ("", 0))
        if stored is not None and stored == hashed and until_us > _now_us():
            return True
        right = passwords.matches(stored, _text(passcode))
        if right and stored is not None:
            with self._lock:
                self._remembered[fingerprint] = stored, _now_us() + REMEMBERED_US
                while len(self._remembered) > REMEMBERED_MAX:
                    self._remembered.popitem(last=False)
        return right


def _text(octets: bytes) -> str:
    """UTF-8 by the standard; what is none is nobody's name and nobody's password. Some pad with NUL or a
    space to an even length."""
    return octets.rstrip(b"\0").decode("utf-8", "replace")


def _shown(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name[:64])


def _now_us() -> int:
    return int(time.time() * 1e6)
