"""Owns the requests that devices made and the reports that are due to them: durable in the ledger, and for
each report one who sends it at a time. It never verifies and never dials."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from archive.backoff import Backoff
from archive.errors import MissError, NotFound
from archive.ledger import Commitment, Ledger
from archive.ledger.commitments import ANSWERING, DONE, GIVEN_UP, SCP
from node.destinations import Destinations
from node.dimse.commitments import Information, outcome
from node.dimse.status import SUCCESS, meaning
from node.settings import CommitmentSettings

log = logging.getLogger(__name__)

DAY_US = 86_400 * 1_000_000
NOT_ANSWERED = "it did not answer the report"

OnRequest = Callable[[Sequence[str]], None]  # the SOP instance UIDs of a request that was taken


def now_us() -> int:
    return time.time_ns() // 1000


class CommitmentDesk:
    """See the module's docstring. Safe to use from any thread."""

    def __init__(self, ledger: Ledger, destinations: Destinations, settings: CommitmentSettings, *,
                 retrieve_ae: str, idle_timeout_s: float, on_request: OnRequest | None = None) -> None:
        self._ledger = ledger
        self._destinations = destinations
        self._settings = settings
        self._retrieve_ae = retrieve_ae
        self._idle_timeout_s = idle_timeout_s
        self._on_request = on_request
        self._backoff = Backoff(settings.retry_first_s, settings.retry_max_s)
        self._lock = threading.Lock()
        self._settled: set[str] = set()   # with a report, in this process's life
        self._held: set[str] = set()      # reports that somebody sends just now
        self._here: Counter[str] = Counter()  # associations that wait for reports, by device
        self.asked: Callable[[], None] = lambda: None     # told of a new request
        self.due: Callable[[], None] = lambda: None       # told of a report that may be sent

    # What the service asks

    def accept(self, device: str, information: Information) -> str:
        """See `node/dimse/services/commitment.py`."""
        found, is_new = self._ledger.open_commitment(
            SCP, device, information.transaction_uid, information.referenced,
            open_max=self._settings.open_per_device_max)
        if found.state == ANSWERING:  # asked again: perhaps the report was lost
            with self._lock:
                self._settled.add(found.id)
        self.asked()
        if is_new and self._on_request is not None:
            try:
                self._on_request(tuple(information.referenced))
            except Exception:
                log.exception("a request for storage commitment could not be told to the others")
        return found.id

    def is_settled(self, request_id: str) -> bool:
        return request_id in self._settled

    def reports(self, device: str) -> Sequence[HeldReport]:
        """All reports to a device that nobody else sends just now, held by the caller."""
        try:
            found = self._ledger.commitments_of(SCP, device, ANSWERING)
        except MissError as error:
            log.warning("reports on storage commitment wait: %s", error)
            return []
        return [HeldReport(self, one) for one in found if self.hold(one)]

    @contextmanager
    def here_for(self, device: str) -> Iterator[float]:
        with self._lock:
            self._here[device] += 1
        try:
            yield self._settings.same_association_s if self._is_callable(device) else self._idle_timeout_s
        finally:
            with self._lock:
                self._here[device] -= 1
                if not self._here[device]:
                    del self._here[device]
            self.due()

    def _is_callable(self, device: str) -> bool:
        try:
            self._destinations.peer(device)
        except NotFound:
            return False
        except MissError:
            pass
        return True

    # What verifier and couriers ask

    def settled(self, request_id: str) -> None:
        """There is a report."""
        with self._lock:
            self._settled.add(request_id)
        self.due()

    def due_reports(self) -> list[Commitment]:
        """Reports to devices that do not wait for them on an association of their own, nor get them now."""
        if not self._ledger.has_live_commitments(SCP, ANSWERING):
            return []
        found = self._ledger.live_commitments(SCP, ANSWERING, due_us=now_us())
        with self._lock:
            return [one for one in found if one.device not in self._here and one.id not in self._held]

    def hold(self, one: Commitment) -> bool:
        """Whether the caller is the one who sends this report now."""
        with self._lock:
            if one.id in self._held:
                return False
            self._held.add(one.id)
            return True

    def information(self, one: Commitment) -> Information:
        """What the report on a request says."""
        items = self._ledger.commitment_items(one.id)
        return outcome(one.transaction_uid,
                       [(item.sop_class_uid, item.sop_instance_uid, item.reason) for item in items],
                       self._retrieve_ae)

    def answered(self, one: Commitment, status: int | None, error: str) -> None:
        """A report was heard, or not: then it is somebody else's again, after a while if that was an
        answer or somebody could not be called (`error`)."""
        try:
            if status == SUCCESS:
                self._end(one, DONE, "")
            elif status is not None or error:
                self._failed(one, error or f"it answered {status:04X}, {meaning(status or 0)}")
        except MissError as unwritten:  # then it is sent once more
            log.warning("the answer to a report on storage commitment is not written down: %s", unwritten)
        with self._lock:
            self._held.discard(one.id)
        if status is None and not error:
            self.due()

    def _failed(self, one: Commitment, error: str) -> None:
        log.info("storage commitment for %s: a report failed: %s", one.device, error)
        if now_us() - one.settled_us > self._settings.report_days * DAY_US:
            self._end(one, GIVEN_UP, error)
        else:
            self._ledger.note_failed_try(one.id, error, now_us() + self._backoff.pause_us(one.tries + 1))

    def _end(self, one: Commitment, state: str, error: str) -> None:
        self._ledger.end_commitment(one.id, state, error)
        with self._lock:
            self._settled.discard(one.id)


class HeldReport:
    """A report that its holder alone may send."""

    def __init__(self, desk: CommitmentDesk, one: Commitment) -> None:
        self._desk = desk
        self.one = one

    @cached_property
    def information(self) -> Information:
        return self._desk.information(self.one)

    def answered(self, status: int | None, error: str = "") -> None:
        self._desk.answered(self.one, status, error)
