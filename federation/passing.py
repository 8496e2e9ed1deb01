"""How the hub passes an instance on while it arrives: its data set in order, what is in the region already
from there, what a ward sends now from what the region's own intake has written of it (`tapping.py`).

The last chunk is held until the instance is durable and indexed here and the whole that was passed on has its
digest. A push that breaks off is waited for: what the ward sends again goes on where the reader stands.

Bounds: instances passed on at once, one chunk of 1 MiB held of each, no instance waited for longer than the
promise (`promote_deadline_s`) without a byte of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass

from archive.archive import Archive
from archive.errors import Corrupt, Evicted, NotFound, OutOfResources, Unavailable
from archive.model import Location, Scope
from archive.packs.growing import Growing
from federation.arrivals import Arrivals
from federation.pools import Pools
from federation.reading import CHUNK_BYTES
from federation.tapping import Taps

PASSED_MAX = 128      # instances at once
NOT_ITS_DIGEST = "a stored instance does not match its digest"
LOOK_S = 0.03         # between two looks at what has come
LOOK_AGAIN_S = 1.0    # at the index, should nobody have told
REMOVALS_MAX = 100    # of one UID, that are looked through


@dataclass(frozen=True, slots=True)
class Wanted:
    """One content of an instance."""

    study_uid: str
    series_uid: str
    uid: str
    digest: bytes


class Passing:
    """Lives in the hub's event loop; reads in its threads."""

    def __init__(
        self, archive: Archive, taps: Taps, arrivals: Arrivals, pools: Pools, idle_s: float
    ) -> None:
        self._archive = archive
        self._taps = taps
        self._arrivals = arrivals
        self._pools = pools
        self._idle_s = idle_s
        self._passed = 0

    async def chunks(self, wanted: Wanted, scope: Scope, start: int = 0) -> AsyncIterator[bytes]:
        """The data set from `start` on, of what readers with this scope may see; whoever calls has decided
        that. Raises Unavailable when it does not come, Corrupt when what came is not what its digest says."""
        if self._passed >= PASSED_MAX:
            raise OutOfResources("too many instances are being passed on at once")
        self._passed += 1
        try:
            at = 0
            async for chunk in self._checked(wanted, scope):
                if at + len(chunk) > start:
                    yield chunk[max(start - at, 0) :]
                at += len(chunk)
        finally:
            self._passed -= 1

    async def _checked(self, wanted: Wanted, scope: Scope) -> AsyncIterator[bytes]:
        running, held, at = hashlib.sha256(), b"", 0
        async for chunk in self._arriving(wanted, scope):
            if held:
                yield held
            running.update(chunk)
            held, at = chunk, at + len(chunk)
        location = await self._pools.work(self.find, wanted, scope)
        if location is None:
            raise Unavailable("it is not here any more")
        rest = _Rest(self._archive, location, at)
        while (piece := await self._pools.work(rest.next)) is not None:
            if held:
                yield held
            running.update(piece)
            held = piece
        if running.digest() != wanted.digest:
            raise Corrupt("what arrived is not what its digest says" if at else NOT_ITS_DIGEST)
        if held:
            yield held

    async def _arriving(self, wanted: Wanted, scope: Scope) -> AsyncIterator[bytes]:
        """What can be read of it before it is stored; ends when it is stored."""
        growing: Growing | None = None
        at, heard_s, looked_s, hidden = 0, time.monotonic(), 0.0, True
        came = self._arrivals.expect(wanted.uid)
        try:
            while True:
                now_s = time.monotonic()
                if came.done() or now_s - looked_s > LOOK_AGAIN_S:
                    looked_s = now_s
                    if came.done():
                        came = self._arrivals.expect(wanted.uid)
                    if await self._pools.work(self.find, wanted, scope) is not None:
                        return
                    hidden = await self._pools.work(self._is_removed, wanted)
                is_open = self._taps.is_open(wanted.uid, scope) and not hidden
                if growing is None and is_open:
                    growing = await self._pools.work(self._taps.read_beside, wanted.uid, scope)
                piece = b""
                if growing is not None:
                    piece = await self._pools.work(growing.read, at, CHUNK_BYTES)
                if piece:
                    at, heard_s = at + len(piece), time.monotonic()
                    yield piece
                    continue
                if growing is not None and not is_open:
                    growing.close()  # stored by now, or broken off: then it comes again
                    growing = None
                if now_s - heard_s > self._idle_s:
                    raise Unavailable("it did not arrive in time")
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(came), LOOK_S)
        finally:
            self._arrivals.forget(wanted.uid, came)
            if growing is not None:
                growing.close()

    def _is_removed(self, wanted: Wanted) -> bool:
        """Whether a removal may cover it, so that nothing of it is passed on before intake has decided."""
        index = self._archive.index
        if not index.has_removals():
            return False
        uids = (wanted.study_uid, wanted.series_uid, wanted.uid)
        return not all(uids) or any(index.removals(REMOVALS_MAX, uid=uid, in_force=True) for uid in uids)

    def find(self, wanted: Wanted, scope: Scope) -> Location | None:
        """Where the region has it, for readers with this scope. Evicted where only its row is here."""
        found = self._archive.index.instances(
            wanted.study_uid, wanted.series_uid or None, wanted.uid, scope=scope
        )
        for instance in found:
            if instance.digest == wanted.digest:
                if instance.evicted:
                    raise Evicted("its bytes are not here")
                return instance.location
        return None


class _Rest:
    """A stored data set from a place on, in chunks."""

    def __init__(self, archive: Archive, location: Location, at: int) -> None:
        self._chunks: Iterator[bytes] = iter(())
        if at < location.length - location.dataset_offset:
            self._chunks = archive.dataset_chunks(location, offset=at, chunk_bytes=CHUNK_BYTES)

    def next(self) -> bytes | None:
        try:
            return next(self._chunks, None)
        except NotFound as error:
            raise Unavailable("it was moved while it was read") from error
