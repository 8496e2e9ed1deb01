"""Owns the account of a C-MOVE's or C-GET's sub-operations (PS3.4 C.4.2.1.6 to .9, C.4.2.3.1; M1 to M3): the
counts, the final status and the list of what failed; and how many retrieves go on at once. It never sends
anything."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydicom.dataset import Dataset

from node.dimse.identifiers import write_identifier
from node.dimse.messages import (
    COMPLETED_SUBOPERATIONS,
    FAILED_SUBOPERATIONS,
    REMAINING_SUBOPERATIONS,
    WARNING_SUBOPERATIONS,
    short,
)
from node.dimse.status import CANCELLED, PENDING, SUCCESS, is_stored

CANNOT_COUNT = 0xA701
CANNOT_PERFORM = 0xA702
UNKNOWN_DESTINATION = 0xA801
SOME_FAILED = 0xB000
COUNT_MAX = 0xFFFF  # the counts are US
TURN_LOOK_S = 0.2   # how often who waits for a turn looks after its peer

STATUSES: Mapping[int, str] = {
    SUCCESS: "every sub-operation succeeded, or nothing matched",
    PENDING: "sub-operations go on; the counts say how far",
    CANCELLED: "cancelled by C-CANCEL; those under way were finished first, or failed",
    SOME_FAILED: "sub-operations are over: some failed or had a warning; the list names those that failed",
    CANNOT_COUNT: "the archive could not be asked, or more instances match than one retrieve may have",
    CANNOT_PERFORM: "every sub-operation failed, no association with the destination could be had, or too "
                    "many retrieves go on",
    0x0124: "the device may not read",
    0xA900: "the identifier does not fit its SOP class: level, a missing unique key, several values above "
            "the lowest level, a UID that is none",
    0xC000: "the identifier can't be read, or there is none",
}


@dataclass(slots=True)
class Account:
    """What became of `total` sub-operations. Several threads may write it."""

    total: int
    completed: int = 0
    warning: int = 0
    failed: list[str] = field(default_factory=list)
    octets: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    comment: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def remaining(self) -> int:
        return self.total - self.done

    @property
    def done(self) -> int:
        return self.completed + self.warning + len(self.failed)

    def note(self, sop_instance_uid: str, status: int, comment: str = "", octets: int = 0) -> None:
        """One is over, with its C-STORE status."""
        with self._lock:
            self.statuses[status] += 1
            if status == SUCCESS:
                self.completed += 1
            elif is_stored(status):
                self.warning += 1
            else:
                self.failed.append(sop_instance_uid)
                self.comment = self.comment or comment
                return
            self.octets += octets

    def pending(self) -> bytes:
        """The counts of a pending response, as elements of its command set."""
        return short(REMAINING_SUBOPERATIONS, min(self.remaining, COUNT_MAX)) + self._counts()

    def final(self, *, cancelled: bool = False) -> Final:
        """How the retrieve ends: what remains is said of a cancelled one only, and so it is with the list of
        failures (M2)."""
        more = self.pending() if cancelled else self._counts()
        if cancelled:
            status = CANCELLED
        elif self.completed == self.total:
            status = SUCCESS
        elif len(self.failed) == self.total:
            status = CANNOT_PERFORM
        else:
            status = SOME_FAILED
        return Final(status, more, tuple(self.failed), self.comment if self.failed else "")

    def _counts(self) -> bytes:
        return (short(COMPLETED_SUBOPERATIONS, min(self.completed, COUNT_MAX))
                + short(FAILED_SUBOPERATIONS, min(len(self.failed), COUNT_MAX))
                + short(WARNING_SUBOPERATIONS, min(self.warning, COUNT_MAX)))

    def __str__(self) -> str:
        return (f"{self.total} instances: {self.completed} sent, {self.warning} with a warning, "
                f"{len(self.failed)} failed, {self.remaining} not begun; {self.octets / 1e6:.1f} MB")


@dataclass(frozen=True, slots=True)
class Final:
    """The last response: its status, counts, and what failed."""

    status: int
    more: bytes
    failed: tuple[str, ...]
    comment: str

    def dataset(self, transfer_syntax_uid: str) -> bytes | None:
        """Failed SOP Instance UID List (0008,0058); None when nothing failed."""
        if not self.failed:
            return None
        identifier = Dataset()
        identifier.FailedSOPInstanceUIDList = list(self.failed)
        return write_identifier(identifier, transfer_syntax_uid)


class Turns:
    """How many retrieves go on at once, in all and of one device; the others wait in turn."""

    def __init__(self, at_once_max: int, per_device_max: int, wait_s: float) -> None:
        self._at_once_max = at_once_max
        self._per_device_max = per_device_max
        self._wait_s = wait_s
        self._going: Counter[str] = Counter()
        self._left = threading.Condition()

    @contextmanager
    def of(self, ae_title: str, given_up: Callable[[], bool]) -> Iterator[bool]:
        """A turn, as soon as there is one; False when there was none within the time, or `given_up` said so,
        which is asked a few times a second."""
        got = self._take(ae_title, given_up)
        try:
            yield got
        finally:
            if got:
                with self._left:
                    self._going[ae_title] -= 1
                    self._going += Counter()  # drops the zeros
                    self._left.notify_all()

    def _take(self, ae_title: str, given_up: Callable[[], bool]) -> bool:
        until_s = time.monotonic() + self._wait_s
        while True:
            with self._left:
                if self._left.wait_for(lambda: self._is_free(ae_title), TURN_LOOK_S):
                    self._going[ae_title] += 1
                    return True
            if given_up() or time.monotonic() > until_s:
                return False

    def _is_free(self, ae_title: str) -> bool:
        return (self._going.total() < self._at_once_max
                and self._going[ae_title] < self._per_device_max)
