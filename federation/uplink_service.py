"""The hub's end of what nodes send: Offer, Push and Answer; Attach is that of `federation/attach_service.py`.
It moves messages between calls and the classes that know what to do with them; who calls is the certificate's
word, by `certs/gate.py`, and no field's.

Bounds: push streams in all and for each ward, two messages of about 2 MiB read ahead on each, twelve batches
of objects on their way to the disk on each. Past them a node is told to come later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from archive.errors import MissError, Unavailable
from certs.gate import peer
from federation import serde, status
from federation.arrivals import Arrivals
from federation.attach_service import AttachService
from federation.attachments import Attachments
from federation.fair_queue import FairQueue, cost_of, names
from federation.pools import Pools
from federation.push_admission import Place, PushAdmission
from federation.push_wire import PushMessage
from federation.receiving import Incoming, Pushed, Receiver
from federation.replicator import Received, Refused
from federation.serde_gathering import listed_from
from federation.settings import HubSettings
from protos import uplink_pb2, uplink_pb2_grpc

log = logging.getLogger(__name__)

READ_AHEAD = 2
BATCH_MESSAGES_MAX = 2
SETTLING_MAX = 12

# What was read of a push stream; None is its end.
Ahead = asyncio.Queue[PushMessage | Exception | None]


class UplinkService(uplink_pb2_grpc.UplinkServicer):
    """Implements `miss.v1.Uplink`."""

    def __init__(
        self,
        settings: HubSettings,
        attachments: Attachments,
        receiver: Receiver,
        arrivals: Arrivals,
        pools: Pools,
        attaching: AttachService,
    ) -> None:
        self._attachments = attachments
        self._receiver = receiver
        self._arrivals = arrivals
        self._pools = pools
        self._attaching = attaching
        self._admission = PushAdmission(settings.pushes_max, settings.pushes_per_ward_max)
        self._queue = FairQueue()

    def stop(self) -> None:
        """The hub stops: each push stream ends after what it has read, with the verdicts of that."""
        self._admission.end_all()

    # grpc.aio takes a coroutine that writes as well as a generator, which the generated stubs do not know.

    async def Attach(  # type: ignore[override]
        self, request_iterator: Any, context: Any
    ) -> None:
        await self._attaching.attach(request_iterator, context)

    async def Offer(self, request: uplink_pb2.OfferRequest, context: Any) -> uplink_pb2.OfferReply:
        ward = peer(context).ward
        try:
            found = await self._pools.work(self._receiver.verdicts, ward, list(request.items))
        except Exception as error:
            await status.abort(context, error)
        self._came(ward, [verdict.receipt for verdict in found if verdict.receipt is not None])
        return uplink_pb2.OfferReply(verdicts=[serde.verdict_to(verdict) for verdict in found])

    async def Push(  # type: ignore[override]
        self, request_iterator: Any, context: Any
    ) -> None:
        ward = peer(context).ward
        try:
            place = self._admission.enter(ward)
        except MissError as error:
            await status.abort(context, error)
        incoming = self._receiver.incoming(ward)
        try:
            await self._receive(place, incoming, aiter(request_iterator), context)
        finally:
            self._admission.leave(place)
            await asyncio.shield(self._pools.push(incoming.abort))

    async def Answer(self, request: uplink_pb2.SearchAnswer, context: Any) -> uplink_pb2.AnswerReply:
        ward = peer(context).ward
        try:
            if request.HasField("report") and self._attachments.attached(ward) is not None:
                await self._attachments.report(ward, serde.report_from(request.report))
            if not self._attachments.hears(ward, request.ask_id, request.ByteSize()):
                return uplink_pb2.AnswerReply()  # nobody waits for it any more
            matches = [serde.match_of_ward(match, ward) for match in request.matches]
            if request.lists:
                listed = [listed_from(one, ward) for one in request.listed]
                self._attachments.listed(ward, request.ask_id, listed, request.left_out)
        except MissError as error:
            self._attachments.failed(ward, request.ask_id, f"its answer can't be used: {error}")
            await status.abort(context, error)
        self._attachments.answered(
            ward, request.ask_id, matches, last=request.last, truncated=request.truncated
        )
        return uplink_pb2.AnswerReply()

    # Push.

    async def _receive(
        self, place: Place, incoming: Incoming, messages: AsyncIterator[PushMessage], context: Any
    ) -> None:
        """Reads ahead, takes what was read in batches, and settles one batch while the next is taken."""
        ahead: Ahead = asyncio.Queue(READ_AHEAD)
        place.wake = partial(_end, ahead)
        ward = place.ward
        reader = asyncio.create_task(_read_ahead(messages, ahead))
        settling: list[asyncio.Task[None]] = []
        try:
            ended = False
            while not ended and not place.given_up:
                batch, ended = await _batch(ahead)
                urgent = self._arrivals.is_awaited(names(batch))
                turn = await self._queue.enter(ward, cost_of(batch), urgent=urgent)
                taking = asyncio.ensure_future(self._pools.push(incoming.take, batch))
                batch = []
                taking.add_done_callback(turn.taken)  # its thread goes on, also when the call is gone
                try:
                    taken = await asyncio.shield(taking)
                except BaseException:
                    taking.add_done_callback(turn.leave)
                    raise
                before = settling[-1] if settling else None
                settle = asyncio.create_task(
                    self._settle(ward, taken.pushed, taken.refused, before, context)
                )
                settle.add_done_callback(turn.leave)
                settling.append(settle)
                if len(settling) > SETTLING_MAX:
                    await settling.pop(0)
                if taken.error is not None:
                    await asyncio.gather(*settling)
                    await status.abort(context, taken.error)
            await asyncio.gather(*settling)
            if place.given_up and not reader.done():  # in words: gRPC would call it an internal error
                await status.abort(context, Unavailable("this stream's place is wanted; come again"))
        finally:
            reader.cancel()
            for task in settling:
                task.cancel()
            await asyncio.gather(reader, *settling, return_exceptions=True)

    async def _settle(
        self,
        ward: str,
        pushed: list[Pushed],
        refused: list[Refused],
        before: asyncio.Task[None] | None,
        context: Any,
    ) -> None:
        """Writes the verdicts of one batch, after those of the batch before it."""
        if not pushed and not refused:
            if before is not None:
                await before
            return
        try:
            receipts = await self._pools.wait(self._receiver.settle, ward, pushed)
            if before is not None:
                await before
        except Exception as error:
            await status.abort(context, error)
        self._came(ward, receipts, refused)
        await context.write(
            uplink_pb2.PushReply(
                group=uplink_pb2.PushVerdicts(
                    receipts=[serde.receipt_to(receipt) for receipt in receipts],
                    refusals=[serde.refusal_to(refusal) for refusal in refused],
                )
            )
        )
        for refusal in refused:
            log.warning("refused %s of %s: %s", refusal.sop_instance_uid, ward, refusal.reason)

    def _came(self, ward: str, receipts: list[Received], refused: list[Refused] | None = None) -> None:
        if receipts:
            self._attachments.receipted(ward)
        self._arrivals.came(one.sop_instance_uid for one in (*receipts, *(refused or ())))


async def _read_ahead(messages: AsyncIterator[PushMessage], ahead: Ahead) -> None:
    try:
        async for message in messages:
            await ahead.put(message)
        await ahead.put(None)
    except Exception as error:
        await ahead.put(error)


def _end(ahead: Ahead) -> None:
    """The stream is to end after what was read of it."""
    if not ahead.full():  # one that is full is looked at soon anyway
        ahead.put_nowait(None)


async def _batch(ahead: Ahead) -> tuple[list[PushMessage], bool]:
    """What has been read, at least one message, and whether the stream has ended."""
    batch: list[PushMessage] = []
    while True:
        message = await ahead.get()
        if isinstance(message, Exception):
            raise message
        if message is None:
            return batch, True
        batch.append(message)
        if len(batch) >= BATCH_MESSAGES_MAX or ahead.empty():
            return batch, False
