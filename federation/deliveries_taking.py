"""How a node takes what other wards deliver to it: it asks the hub what waits, fetches it, stores it through
its own intake and says what became of it. Lives in the uplink's event loop; what touches the archive runs in
its pool.

Nothing is kept here. What is not acknowledged waits at the hub, and what was stored before an acknowledgement
was lost is found by its digest and acknowledged again: a node that is killed at any point takes everything
once. What it takes is this ward's instance from then on, and is replicated as such; its provenance names the
ward that delivered it in the place of a device, and the issuer under which that ward acquired it.

Bounds: 256 deliveries asked for at once, fetched over a few streams with a message of about 1 MiB each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import grpc
import grpc.aio

from archive.archive import Archive
from archive.backoff import Backoff
from archive.errors import MissError, Unavailable
from archive.ledger import DeliveryKey, DeliveryStanding
from archive.model import ConflictPolicy
from federation import serde, status
from federation.calls import raise_if_ours
from federation.deliveries_grants import Accepted
from federation.receiving import Incoming, Pushed
from federation.replicator import Refused
from federation.settings import DeliverySettings
from protos import delivery_pb2, uplink_pb2
from protos.delivery_pb2_grpc import DeliveriesStub

if TYPE_CHECKING:
    from protos.delivery_pb2_grpc import DeliveriesAsyncStub  # a type of the stubs alone

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PAGE = 256
CALL_S = 30.0
STALL_S = 120.0  # then a hub that sends nothing more is given up
PAUSE_FIRST_S = 0.5
PAUSE_MAX_S = 60.0
STANDING_S = 15.0  # how often it asks how its deliveries stand, while any wait
# What a hub of an older release, or one that does not let nodes do this, answers.
_NOT_OFFERED = frozenset({grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED})

Note = Callable[[Sequence[DeliveryStanding]], None]


class Taking:
    """A ward's end of deliveries. `note` keeps how they stand, for people; it may write to a disk."""

    def __init__(
        self,
        archive: Archive,
        ward: str,
        settings: DeliverySettings,
        pool: Executor,
        clock: Callable[[], int],
        note: Note,
    ) -> None:
        self._archive = archive
        self._ward = ward
        self._streams = settings.streams
        self._accepted = Accepted.of(settings.accept_from)
        self._policy = ConflictPolicy(settings.on_conflict)
        self._pool = pool
        self._clock = clock
        self._note = note
        self._noted: list[DeliveryStanding] | None = None
        self._asked_s = 0.0
        self._stub: DeliveriesAsyncStub | None = None
        self._wake = asyncio.Event()
        self._backoff = Backoff(PAUSE_FIRST_S, PAUSE_MAX_S)

    def line_up(self, line: grpc.aio.Channel) -> None:
        """The node is attached: what waits is fetched over this channel."""
        self._stub = DeliveriesStub(line)
        self._wake.set()

    def line_down(self) -> None:
        """The attach ended: nothing is fetched until there is another."""
        self._stub = None

    def told(self) -> None:
        """Something waits at the hub, or how deliveries stand has changed."""
        self._wake.set()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        failures = 0
        while True:
            await self._until_told()
            self._wake.clear()
            if (stub := self._stub) is None:
                continue
            try:
                try:
                    while await self._round(stub):
                        failures = 0
                        await self._ask_standing(stub, every_s=STANDING_S)
                finally:  # also of what goes wrong people are to know how it stands
                    if self._stub is stub and not _is_leaving():
                        await self._ask_standing(stub)
            except (Exception, asyncio.CancelledError) as error:
                raise_if_ours(error)
                if isinstance(error, grpc.aio.AioRpcError) and error.code() in _NOT_OFFERED:
                    log.info("the hub takes no part in deliveries: %s", error.details())
                    if self._stub is stub:
                        self._stub = None
                    continue
                _say("deliveries can't be taken now", error)
                failures += 1
                await asyncio.sleep(self._backoff.pause_s(failures))
                self._wake.set()

    async def _until_told(self) -> None:
        """Waits for a word of the hub; while deliveries wait, not for ever."""
        is_any = any(one.waiting for one in self._noted or ())
        try:
            async with asyncio.timeout(STANDING_S if is_any and self._stub is not None else None):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _round(self, stub: DeliveriesAsyncStub) -> bool:
        """Takes a page of what waits. Whether there may be more."""
        reply = await stub.Next(delivery_pb2.NextDeliveries(limit=PAGE), timeout=CALL_S)
        keys = [serde.delivery_key_from(one.key, to_ward=self._ward) for one in reply.deliveries]
        if not keys:
            return False
        wanted = [key for key in keys if self._accepted.takes_from(key.from_ward)]
        await self._say_done(stub, refused=[
            (key, "the ward does not take deliveries of this one", True)
            for key in keys if not self._accepted.takes_from(key.from_ward)
        ])  # fmt: skip
        here = set(await self._in_pool(self._here, wanted))
        await self._say_done(stub, delivered=[key for key in wanted if key in here])
        over = len(keys) - len(wanted) + len(here)
        left = [key for key in wanted if key not in here]
        shares = [left[start :: self._streams] for start in range(self._streams)]
        fetches = [asyncio.create_task(self._fetch(stub, share)) for share in shares if share]
        try:
            if fetches:
                await asyncio.wait(fetches)
        finally:  # when it is cancelled, what is half here is let go of first
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)
        return over + sum([fetch.result() for fetch in fetches]) > 0

    def _here(self, keys: Sequence[DeliveryKey]) -> list[DeliveryKey]:
        """Those whose very bytes are here and durable: stored before a crash, or by a machine of the ward."""
        self._archive.wait_indexed()
        return [
            key for key in keys if self._archive.index.has_content(key.sop_instance_uid, key.digest)
        ]

    async def _fetch(self, stub: DeliveriesAsyncStub, keys: Sequence[DeliveryKey]) -> int:
        """Takes these over one stream and says what became of each: of how many. Raises what ended it."""
        asked = delivery_pb2.FetchDeliveries(keys=[serde.delivery_key_to(key) for key in keys])
        incoming = Incoming(self._archive, self._ward, self._policy)
        pushed: list[Pushed] = []
        refused: list[Refused] = []
        ours: Exception | None = None  # what went wrong here, and is not the line's fault
        theirs: BaseException | None = None
        call = stub.Fetch(asked)
        try:
            while isinstance(
                message := await asyncio.wait_for(call.read(), STALL_S), uplink_pb2.PushRequest
            ):  # else it is the end
                self._stamp(message)
                taken = await self._in_pool(incoming.take, [message])
                pushed += taken.pushed
                refused += taken.refused
                if taken.error is not None:
                    ours = taken.error
                    break
        except (Exception, asyncio.CancelledError) as error:
            raise_if_ours(error)
            theirs = error
        finally:
            call.cancel()
            await self._in_pool(incoming.abort)
        try:
            await self._in_pool(_wait_durable, pushed)
        except MissError as error:
            pushed, ours = [], error
        verdicts = [
            (self._key(keys, refusal.sop_instance_uid, refusal.digest), refusal.reason, refusal.permanent)
            for refusal in refused
        ]
        if ours is not None:
            over = {(one.uid, one.digest) for one in pushed}
            over |= {(refusal.sop_instance_uid, refusal.digest) for refusal in refused}
            at = next((key for key in keys if (key.sop_instance_uid, key.digest) not in over), None)
            words = str(ours) if isinstance(ours, MissError) else "an unexpected error; the ward's log has it"
            verdicts += [(at, words, False)] if at is not None else []
        await self._say_done(
            stub,
            delivered=[key for one in pushed if (key := self._key(keys, one.uid, one.digest)) is not None],
            refused=[(key, reason, permanent) for key, reason, permanent in verdicts if key is not None],
        )
        if ours is not None or theirs is not None:
            raise Unavailable("a fetch broke off") from (ours or theirs)
        return len(pushed) + len(verdicts)

    def _stamp(self, message: uplink_pb2.PushRequest) -> None:
        """It is received now, by this ward's clock."""
        begun = [whole.begin for whole in message.group.objects] if message.HasField("group") else []
        for begin in [message.begin] if message.HasField("begin") else begun:
            begin.head.received_at_us = self._clock()

    def _key(self, keys: Sequence[DeliveryKey], uid: str, digest: bytes) -> DeliveryKey | None:
        return next((key for key in keys if (key.sop_instance_uid, key.digest) == (uid, digest)), None)

    async def _say_done(
        self,
        stub: DeliveriesAsyncStub,
        *,
        delivered: Sequence[DeliveryKey] = (),
        refused: Sequence[tuple[DeliveryKey, str, bool]] = (),
    ) -> None:
        if not delivered and not refused:
            return
        for key, reason, _ in refused:
            log.warning("a delivery of %s was not taken: %s: %s", key.from_ward, key.sop_instance_uid, reason)
        await stub.Done(
            delivery_pb2.DeliveriesDone(
                delivered=[serde.delivery_key_to(key) for key in delivered],
                refused=[
                    delivery_pb2.DeliveryRefusal(
                        key=serde.delivery_key_to(key), reason=reason, permanent=permanent
                    )
                    for key, reason, permanent in refused
                ],
            ),
            timeout=CALL_S,
        )

    async def _ask_standing(self, stub: DeliveriesAsyncStub, *, every_s: float = 0.0) -> None:
        if every_s and time.monotonic() - self._asked_s < every_s:
            return
        self._asked_s = time.monotonic()
        reply = await stub.Standing(delivery_pb2.DeliveryStandingRequest(), timeout=CALL_S)
        now_us = self._clock()
        told = [serde.standing_from(one, at_us=now_us) for one in reply.standings]
        if self._noted is None or _undated(told) != _undated(self._noted):
            try:
                await self._in_pool(self._note, told)
            except MissError as error:
                log.warning("how deliveries stand can't be kept: %s", error)
                return
        self._noted = told

    def _in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))


def _undated(standings: Sequence[DeliveryStanding]) -> list[DeliveryStanding]:
    return [replace(one, at_us=0) for one in standings]


def _wait_durable(pushed: Sequence[Pushed]) -> None:
    for one in pushed:
        one.ticket.wait_durable()


def _is_leaving() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _say(what: str, error: BaseException) -> None:
    cause = error.__cause__ or error
    if isinstance(cause, grpc.aio.AioRpcError):
        log.info("%s: %s", what, status.restored(cause))
    elif isinstance(cause, (MissError, TimeoutError, asyncio.InvalidStateError, asyncio.CancelledError)):
        log.warning("%s: %s", what, cause)
    else:
        log.error(what, exc_info=cause)

