"""The upkeep of an archive's disk, in its writer's process: a thread that carries out evictions and
compactions, one after the other and never faster than intake allows, gives back what is due, and keeps what
recovery set aside within its bounds. What it decides it leaves to `eviction.py` and `compaction.py`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from archive.errors import MissError, OutOfResources
from archive.index.index import Index
from archive.packs.asides import trim
from archive.packs.packs import Packs
from archive.space.compaction import Compacted, Compaction
from archive.space.eviction import Eviction, EvictionReport, EvictionRequest
from archive.space.pace import Pace
from archive.space.purging import Purging

log = logging.getLogger(__name__)

T = TypeVar("T")

JOBS_MAX = 100
_TICK_S = 1.0
_TRIM_S = 600.0
_RETRY_S = 30.0
_CLOSE_S_MAX = 30.0


class Upkeep:
    """See the module's docstring. `close` ends it at the next pause of what it does; `eviction` and
    `compaction` are called directly by nobody else while its thread runs."""

    def __init__(
        self,
        packs: Packs,
        index: Index,
        eviction: Eviction,
        compaction: Compaction,
        purging: Purging,
        *,
        pressed: Callable[[], bool],
        bytes_per_s: float,
        set_aside_bytes_max: int,
        set_aside_age_s_max: float,
    ) -> None:
        self._packs = packs
        self._index = index
        self.eviction = eviction
        self.compaction = compaction
        self.purging = purging
        self.rounds: list[Callable[[Pace], object]] = []  # every ten minutes, in its thread
        self._pressed = pressed
        self._bytes_per_s = bytes_per_s
        self._set_aside_bytes_max = set_aside_bytes_max
        self._set_aside_age_s_max = set_aside_age_s_max
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue(JOBS_MAX)
        self._working = threading.Lock()  # one of its works at a time
        self._stopping = threading.Event()
        self._quiet_until_s = 0.0
        self._trimmed_s = time.monotonic() - _TRIM_S  # once soon after the start
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        with contextlib.suppress(queue.Full):  # then it is awake already
            self._jobs.put_nowait(lambda: None)
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S_MAX)

    def drain(self) -> None:
        """Return when everything that was asked so far is carried out."""
        self._jobs.join()

    def evict(self, request: EvictionRequest) -> Future[EvictionReport]:
        """Evict, then let go of the packs that hold nothing any more. Raises OutOfResources when too much
        waits."""
        return self._submit(lambda: self._evict(request))

    def compact(self, number: int | None = None) -> Future[list[Compacted]]:
        """Compact one pack, or all that are worth it."""
        return self._submit(lambda: self._compact(number))

    def work(self, job: Callable[[Pace], T]) -> Future[T]:
        """Carry out another's work in turn."""
        return self._submit(lambda: job(self._pace()))

    def _evict(self, request: EvictionRequest) -> EvictionReport:
        report = self.eviction.evict(request, self._pace())
        if not request.dry_run:
            self._let_go(report)
        return report

    def _let_go(self, report: EvictionReport) -> None:
        """The packs that hold nothing any more, and, where nothing can be punched, those that hold little."""
        punches = self._packs.storage.capabilities.punch_holes
        for number in sorted(report.packs):
            try:
                self.compaction.compact(number, self._pace(), only_empty=punches)
            except OutOfResources as error:
                log.warning("pack %d is not compacted: %s", number, error)
        self.eviction.give_back()

    def _compact(self, number: int | None) -> list[Compacted]:
        numbers = self.compaction.candidates() if number is None else [number]
        done = [self.compaction.compact(each, self._pace()) for each in numbers]
        self.eviction.give_back()
        return done

    def _pace(self) -> Pace:
        return Pace(self._bytes_per_s, pressed=self._pressed, stopping=self._stopping)

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            try:
                with self._working:
                    future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, MissError):
                    log.exception("the upkeep met an error that it does not know")

        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise OutOfResources(f"{JOBS_MAX} works of this kind wait already") from None
        return future

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                job = self._jobs.get(timeout=_TICK_S)
            except queue.Empty:
                self._tick()
                continue
            try:
                job()
            finally:
                self._jobs.task_done()
        self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            job()  # its first pause ends it
            self._jobs.task_done()

    def _tick(self) -> None:
        """Nothing was asked for a moment: what is due, and what lies aside."""
        now_s = time.monotonic()
        if now_s < self._quiet_until_s:
            return
        try:
            with self._working:
                if self._index.has_due(time.time_ns() // 1000):
                    self.eviction.give_back()
            if now_s - self._trimmed_s > _TRIM_S:
                self._trimmed_s = now_s
                self.trim()
                with self._working:
                    for look in self.rounds:
                        look(self._pace())
        except (MissError, OSError) as error:
            self._quiet_until_s = now_s + _RETRY_S
            log.warning("space is not given back, next try in %.0f s: %s", _RETRY_S, error)
        except Exception:
            self._quiet_until_s = now_s + _RETRY_S
            log.exception("the upkeep met an error that it does not know")

    def trim(self) -> None:
        """Keep what recovery set aside within its bounds."""
        trim(
            self._packs.storage, bytes_max=self._set_aside_bytes_max, age_s_max=self._set_aside_age_s_max,
            now_us=time.time_ns() // 1000,
        )  # fmt: skip


def answer_of(future: Future[T], timeout_s: float) -> T | None:
    """What came of a work; None when it still goes on. Raises what it raised."""
    try:
        return future.result(timeout_s)
    except FutureTimeout:
        return None
