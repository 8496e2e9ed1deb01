"""A node compares with the region what it gave to it, and has what differs mended: what the region lacks is
pushed again, what is damaged or missing here is brought back or listed, what both lost is told to people.
Nothing is deleted. Lives in the uplink's event loop; what touches the archive runs in a thread of its own.

When: each night at an hour of the settings, when somebody asks (a command here, the hub by `Come`), on a disk
that was not compared yet, and at once when the region's store stands further back than it was seen, is
another one, or does not have the last that it confirmed: then it came from a backup, and nothing is evicted
until all was compared (`held`). A hub of an older release is compared with never, and holds nothing.

What is pushed or stored meanwhile is no difference: what waits for a receipt is in no inventory, and what
seems to differ is looked at once more, here and there, before anything is done. Every step is safe to repeat;
a node killed in between compares again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import grpc
import grpc.aio

from archive.archive import Archive
from archive.errors import MissError, Unavailable
from federation import status
from federation.abilities import INVENTORY
from federation.line import Line, LinePart, RegionPolicy
from federation.reconcile_notes import Notes, Outcome, is_back, outcome_to
from federation.reconcile_work import CALL_S, Comparison, look, stub_of
from federation.restoring import Restoring
from federation.settings import ReconcileSettings
from protos import inventory_pb2, uplink_pb2

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LAST_LOOKED_AT = 200    # receipts, at each attach
LOOK_AGAIN_S = 600.0    # not more often, however the line flaps
SEEN_S = 60.0           # how often it is kept how far the store was seen
TICK_S = 0.5
RETRY_S = 60.0

FIRST, NIGHTLY, ASKED, BACK, DAMAGE = (
    "this disk was not compared yet", "nightly", "asked for", "the region's store was restored", "damage")
_STATE = inventory_pb2.ContentStates


class Reconciling(LinePart):
    """See the module's docstring. `policy` is what the region laid down last, `restoring` brings bytes."""

    def __init__(
        self,
        archive: Archive,
        ward: str,
        settings: ReconcileSettings,
        *,
        restoring: Restoring,
        policy: Callable[[], RegionPolicy | None],
        clock: Callable[[], int] = lambda: time.time_ns() // 1000,
        state: Path | None = None,
    ) -> None:
        self._archive = archive
        self._ward = ward
        self._settings = settings
        self._restoring = restoring
        self._policy = policy
        self._clock = clock
        self.notes = Notes(state or archive.settings.state)
        self._line: Line | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._wake = asyncio.Event()
        self._reason = ""
        self._waiting: list[tuple[bool, concurrent.futures.Future[Outcome]]] = []
        self._unchecked = False
        self._looked_s = -LOOK_AGAIN_S
        self._seen_s = -SEEN_S
        self._nightly_us = 0
        self._quiet_until_s = 0.0

    # What rides on the line

    def line_up(self, line: Line) -> None:
        self._line = line
        self._unchecked = INVENTORY in line.abilities
        self._wake.set()

    def line_down(self) -> None:
        self._line = None

    def come(self, come: uplink_pb2.Come) -> None:
        if come.reconcile:
            self._reason = ASKED
            self._wake.set()

    def held(self) -> bool:
        """Whether nothing may be evicted now: the region may lack what it gave receipts for. Any thread."""
        noted, policy = self.notes.now, self._policy()
        if noted.held or self._unchecked:
            return True
        return policy is not None and bool(policy.store) and self._went_back(policy)

    def damage_found(self) -> None:
        """Something here was found to be damaged: it is brought back. Any thread."""
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._note_damage)

    def _note_damage(self) -> None:
        self._reason = self._reason or DAMAGE
        self._wake.set()

    def ask(self, *, dry_run: bool = False) -> concurrent.futures.Future[Outcome]:
        """Compare now; a future of what came of it. Any thread but the uplink's. Raises Unavailable."""
        loop = self._loop
        if loop is None or self._line is None or INVENTORY not in self._line.abilities:
            raise Unavailable("there is no line now to a hub that compares")
        future: concurrent.futures.Future[Outcome] = concurrent.futures.Future()

        def note() -> None:
            self._waiting.append((dry_run, future))
            self._wake.set()

        loop.call_soon_threadsafe(note)
        return future

    async def run(self) -> None:
        self._wake = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, "reconciling")
        self._loop = asyncio.get_running_loop()
        self._nightly_us = self._next_night()
        try:
            while True:
                await self._step()
                self._wake.clear()
                try:
                    async with asyncio.timeout(TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            self._loop = None
            for _, future in self._waiting:
                future.cancel()
            self._waiting = []
            pool, self._pool = self._pool, None
            await asyncio.to_thread(pool.shutdown, wait=True, cancel_futures=True)

    async def _step(self) -> None:
        line = self._line
        if line is None or INVENTORY not in line.abilities:
            return
        asked, self._waiting = self._waiting, []
        if not asked and time.monotonic() < self._quiet_until_s:
            return
        dry_run = bool(asked) and all(dry for dry, _ in asked)
        reason = ""
        try:
            reason = ASKED if asked else await self._due(line)
            outcome = await self._reconcile(line, reason, dry_run=dry_run) if reason else None
        except Exception as error:
            if isinstance(error, asyncio.CancelledError):
                raise
            self._quiet_until_s = time.monotonic() + RETRY_S
            words = _words(error)
            log.warning("the comparison with the region did not end: %s", words)
            failed = Outcome(reason or "a look at the last receipts", self._clock(), failure=words)
            for _, future in asked:
                future.set_result(failed)
            return
        for _, future in asked:
            if outcome is not None:
                future.set_result(outcome)

    # When

    async def _due(self, line: Line) -> str:
        """Why to compare now; "" for no reason."""
        noted, policy = self.notes.now, self._policy()
        if policy is not None and policy.store:
            if self._went_back(policy) and not noted.held:
                await self._in_pool(self.notes.change, held=True)
            elif not noted.held and time.monotonic() - self._seen_s > SEEN_S:
                self._seen_s = time.monotonic()
                await self._in_pool(self._see, policy)
        if self._unchecked and not self.notes.now.held:
            if time.monotonic() - self._looked_s > LOOK_AGAIN_S and await self._is_missing_the_last(line):
                await self._in_pool(self.notes.change, held=True)
            self._looked_s, self._unchecked = time.monotonic(), False
        if self.notes.now.held:
            return BACK
        if noted.last is None:
            return FIRST
        epoch = self._archive.epoch.hex()
        if epoch != noted.epoch:
            if noted.epoch:
                return FIRST
            await self._in_pool(self.notes.change, epoch=epoch)  # its first pack
        reason, self._reason = self._reason, ""
        if self._clock() >= self._nightly_us:
            self._nightly_us = self._next_night()
            return NIGHTLY
        return reason

    def _went_back(self, policy: RegionPolicy) -> bool:
        stores = self.notes.now.stores
        other = bool(stores) and policy.store.hex() not in stores
        return other or is_back(self.notes.now, policy.store, policy.store_position)

    def _see(self, policy: RegionPolicy) -> None:
        stores = {**self.notes.now.stores, policy.store.hex(): policy.store_position}
        self.notes.change(stores=stores)

    async def _is_missing_the_last(self, line: Line) -> bool:
        """Whether the region lacks any of the last that it confirmed: what a backup lacks is the newest."""
        last = await self._in_pool(self._archive.index.inventories.last_confirmed, LAST_LOOKED_AT)
        states = await look(line, last)
        return any(state == _STATE.ABSENT for state in states.values())

    def _next_night(self) -> int:
        now = datetime.fromtimestamp(self._clock() / 1e6)
        at = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(hours=self._settings.at_hour)
        at += timedelta(seconds=random.uniform(0.0, self._settings.jitter_s))
        return int((at if at > now else at + timedelta(days=1)).timestamp() * 1e6)

    # How

    async def _reconcile(self, line: Line, reason: str, *, dry_run: bool) -> Outcome:
        policy, epoch = self._policy(), self._archive.epoch.hex()
        work = Comparison(
            self._archive, self._ward, line, Outcome(reason, self._clock(), dry_run=dry_run),
            restoring=self._restoring, clock=self._clock, in_pool=self._in_pool,
            refill_days=self._settings.refill_days,
        )  # fmt: skip
        if reason != DAMAGE:
            await work.compare()
        await work.mend_damaged()
        await work.refill()
        outcome = replace(work.outcome, ended_us=self._clock())
        level = logging.ERROR if outcome.alarms else logging.INFO
        log.log(level, "compared with the region (%s): %s", reason, outcome.words())
        if not dry_run and reason != DAMAGE:
            changes: dict[str, Any] = {"last": outcome, "epoch": epoch, "held": False}
            if policy is not None and policy.store:
                stores = {**self.notes.now.stores, policy.store.hex(): policy.store_position}
                changes |= {"stores": stores, "compared": policy.store.hex()}
            self._unchecked = False
            await self._in_pool(partial(self.notes.change, **changes))
            await stub_of(line).Note(inventory_pb2.InventoryOutcome(json=outcome_to(outcome)), timeout=CALL_S)
        return outcome

    async def _in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._pool is None:
            raise Unavailable("the uplink stops")
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, lambda: function(*args, **kwargs)
        )


def _words(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return str(status.restored(error))
    if isinstance(error, MissError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    log.error("the comparison met an error that it does not know", exc_info=error)
    return type(error).__name__
