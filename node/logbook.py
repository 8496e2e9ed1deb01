"""Owns how the connection log is written: by one thread, many rows in one transaction, so that an association
that is over waits for no disk; and how much strangers may write.

An accepted association has a row of its own. So has a refused one while there are few: past
REFUSED_ROWS_PER_MINUTE_MAX those of the same address and cause share one row for ten minutes, which counts
them. A connection that never became an association shares its row from the first repeat on. Of such shared
rows there are at most SHARED_MAX at once; what comes from further addresses is counted in rows of "many".
So a million port scans make some thousands of rows a day, and push nobody else's out of the log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue

from archive.ledger import Connection, Ledger

log = logging.getLogger(__name__)

QUEUE_MAX = 10_000                  # rows that wait for the ledger; past it the newest is not written
BATCH_MAX = 500                     # rows of one transaction
FLUSH_S = 1.0                       # how soon the count of a shared row is written
SHARED_S = 600.0
SHARED_MAX = 200
REFUSED_ROWS_PER_MINUTE_MAX = 60
SHARED_MANY_MAX = 50                # rows of "many" by cause, which may name a user that was made up
MANY = "many"                       # in place of an address
MANY_CAUSES = "many causes"

_Key = tuple[str, str, str, str, str]


@dataclass(slots=True)
class _Shared:
    """A row that stands for several connections."""

    row: Connection
    key: str
    since_s: float
    unwritten: bool = False


class LogBook:
    """The connection log of one node. `close` writes what it has."""

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._queue: Queue[Connection | None] = Queue(QUEUE_MAX)
        self._shared: dict[_Key, _Shared] = {}
        self._refused = 0
        self._minute = -1
        self._lost = 0
        self._flushed_s = self._clock() - FLUSH_S
        self._thread = threading.Thread(target=self._run, name="connection-log", daemon=True)
        self._thread.start()

    def add(self, entry: Connection) -> None:
        """Have an entry written soon; never waits."""
        try:
            self._queue.put_nowait(entry)
        except Full:
            self._lost += 1

    def close(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            entries, going = self._collect()
            own = [entry for entry in entries if not self._share(entry)]
            for at in range(0, len(own), BATCH_MAX):
                self._write(own[at:at + BATCH_MAX])
            self._write_shared(not going)
            if self._lost:
                log.warning("%d entries of the connection log were not written: too many at once", self._lost)
                self._lost = 0

    def _collect(self) -> tuple[list[Connection], bool]:
        """What has come, waiting for the first; and whether to go on."""
        entries: list[Connection] = []
        waiting = any(shared.unwritten for shared in self._shared.values())
        try:
            entry = self._queue.get(timeout=FLUSH_S if waiting else None)
            while entry is not None:
                entries.append(entry)
                if len(entries) >= QUEUE_MAX:
                    break
                entry = self._queue.get_nowait()
            else:
                return entries, False
        except Empty:
            pass
        return entries, True

    def _share(self, entry: Connection) -> bool:
        """Whether an entry was counted in a row that others share; the first of its kind makes that row."""
        if entry.outcome == "accepted" or (entry.outcome == "refused" and self._has_room()):
            return False
        now_s = self._clock()
        for key, shared in list(self._shared.items()):
            if now_s - shared.since_s > SHARED_S and not shared.unwritten:
                del self._shared[key]
        refused = entry.outcome == "refused"
        names = (entry.calling_ae, entry.called_ae) if refused else ("", "")
        cause = entry.reason if refused else entry.ended
        kinds = ((entry.address, cause, names), (MANY, cause, ("", "")), (MANY, MANY_CAUSES, ("", "")))
        for address, why, shown in kinds:
            key = (address, entry.transport, why, *shown)
            held = self._shared.get(key)
            if held is not None:
                held.row = replace(held.row, times=held.row.times + 1, ended_us=entry.ended_us,
                                   bytes_in=held.row.bytes_in + entry.bytes_in,
                                   bytes_out=held.row.bytes_out + entry.bytes_out)
                held.unwritten = True
                return True
            room = SHARED_MAX if address != MANY else SHARED_MAX + SHARED_MANY_MAX
            if len(self._shared) < room or why == MANY_CAUSES:
                row = replace(entry, address=address, calling_ae=shown[0], called_ae=shown[1])
                if why != cause:
                    row = replace(row, reason=why) if refused else replace(row, ended=why)
                self._shared[key] = _Shared(row, "", now_s, unwritten=True)
                return True
        return True

    def _has_room(self) -> bool:
        """Whether a refusal may still have a row of its own in this minute."""
        minute = int(self._clock() // 60)
        if minute != self._minute:
            self._minute, self._refused = minute, 0
        self._refused += 1
        return self._refused <= REFUSED_ROWS_PER_MINUTE_MAX

    def _write(self, entries: list[Connection]) -> None:
        try:
            self._ledger.log_connections(entries)
        except Exception as error:  # whatever the database's driver raises
            log.error("%d entries of the connection log were not written: %s", len(entries),
                      type(error).__name__)

    def _write_shared(self, closing: bool) -> None:
        """A new row at once, a further count not sooner than a second after the last."""
        now_s = self._clock()
        due = now_s - self._flushed_s >= FLUSH_S or closing
        changed = [shared for shared in self._shared.values() if shared.unwritten and (due or not shared.key)]
        if not changed:
            return
        if due:
            self._flushed_s = now_s
        try:
            keys = self._ledger.log_connections([shared.row for shared in changed],
                                                [shared.key for shared in changed])
        except Exception as error:
            log.error("the connection log could not be written: %s", type(error).__name__)
            keys = [shared.key for shared in changed]
        for shared, key in zip(changed, keys, strict=True):
            shared.key, shared.unwritten = key, False
