"""The hub's end of deliveries from ward to ward: the calls by which a ward orders, fetches and acknowledges,
and the word to an attached ward that something waits for it. Who calls is the certificate's word, by
`certs/gate.py`; what is done with it is `deliveries_desk.py`'s.

A word that is lost costs a few seconds: wards for which something waits are told again and again. Bounds:
fetches at once in all and for each ward, each with about 1 MiB in memory, and 10,000 arrivals noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from archive.errors import MissError, OutOfResources
from certs.gate import peer
from federation import serde, status
from federation.arrivals import Arrivals
from federation.attachments import Attachments
from federation.deliveries_desk import NEXT_MAX, DeliveryDesk
from federation.pools import Pools
from protos import delivery_pb2, delivery_pb2_grpc, uplink_pb2

log = logging.getLogger(__name__)

FETCHES_MAX = 32
FETCHES_PER_WARD_MAX = 4
ARRIVED_MAX = 10_000
ARRIVED_PAGE = 1_000
TELL_S = 5.0   # how often wards are told that something waits
LOOK_S = 60.0  # how often all that is awaited is looked at, whatever was heard


class DeliveriesService(delivery_pb2_grpc.DeliveriesServicer):
    """Implements `miss.v1.Deliveries`. `start` before it serves, `stop` after."""

    def __init__(
        self, desk: DeliveryDesk, attachments: Attachments, arrivals: Arrivals, pools: Pools
    ) -> None:
        self._desk = desk
        self._attachments = attachments
        self._pools = pools
        self._fetches: Counter[str] = Counter()
        self._awaiting = True  # whether anything waits for an instance to come
        self._unsure = 0       # orders and looks under way, by which that may change
        self._arrived: set[str] = set()
        self._look_now = True
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        arrivals.tell(self._came)

    async def Order(
        self, request: delivery_pb2.DeliveryOrder, context: Any
    ) -> delivery_pb2.DeliveryOrderReply:
        ward = peer(context).ward
        self._unsure += 1
        try:
            added, is_ready = await self._pools.work(self._desk.order, ward, request)
        except Exception as error:
            await status.abort(context, error)
        finally:
            self._awaiting = True
            self._unsure -= 1
        if is_ready:
            self._tell([request.to_ward])
        return delivery_pb2.DeliveryOrderReply(added=added)

    async def Next(
        self, request: delivery_pb2.NextDeliveries, context: Any
    ) -> delivery_pb2.NextDeliveriesReply:
        ward = peer(context).ward
        try:
            found = await self._pools.ledger(self._desk.next, ward, request.limit or NEXT_MAX)
        except Exception as error:
            await status.abort(context, error)
        return delivery_pb2.NextDeliveriesReply(deliveries=[
            delivery_pb2.WaitingDelivery(key=serde.delivery_key_to(one.key), size=one.size) for one in found
        ])  # fmt: skip

    async def Fetch(  # type: ignore[override]
        self, request: delivery_pb2.FetchDeliveries, context: Any
    ) -> None:
        ward = peer(context).ward
        if self._fetches.total() >= FETCHES_MAX or self._fetches[ward] >= FETCHES_PER_WARD_MAX:
            await status.abort(context, OutOfResources("too many fetches at once"))
        self._fetches[ward] += 1
        try:
            keys = [serde.delivery_key_from(key, to_ward=ward) for key in request.keys]
            messages = self._desk.messages(ward, keys)
            while (message := await self._pools.work(next, messages, None)) is not None:
                await context.write(message)
        except Exception as error:
            await status.abort(context, error)
        finally:
            self._fetches[ward] -= 1

    async def Done(
        self, request: delivery_pb2.DeliveriesDone, context: Any
    ) -> delivery_pb2.DeliveriesDoneReply:
        ward = peer(context).ward
        try:
            await self._pools.ledger(self._desk.done, ward, request)
        except Exception as error:
            await status.abort(context, error)
        return delivery_pb2.DeliveriesDoneReply()

    async def Standing(
        self, request: delivery_pb2.DeliveryStandingRequest, context: Any
    ) -> delivery_pb2.DeliveryStandingReply:
        ward = peer(context).ward
        try:
            standings = await self._pools.ledger(self._desk.standings, ward)
        except Exception as error:
            await status.abort(context, error)
        return delivery_pb2.DeliveryStandingReply(standings=[serde.standing_to(one) for one in standings])

    # What makes a delivery ready, and who is told.

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="deliveries")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        """Looks at what came, and tells the wards for which something waits."""
        loop = asyncio.get_running_loop()
        look_at_s = 0.0
        while True:
            self._wake.clear()
            try:
                await self._take_arrivals()
                if self._look_now or loop.time() >= look_at_s:
                    self._look_now, look_at_s = False, loop.time() + LOOK_S
                    await self._look()
                self._tell(await self._pools.ledger(self._desk.waiting))
            except MissError as error:
                self._look_now = True
                log.warning("deliveries can't be looked at: %s", error)
                await asyncio.sleep(TELL_S)
            except Exception:
                self._look_now = True
                log.exception("deliveries can't be looked at")
                await asyncio.sleep(TELL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_S):
                    await self._wake.wait()

    def _came(self, uids: Iterable[str]) -> None:
        if not self._awaiting and not self._unsure:
            return
        self._arrived.update(uids)
        if len(self._arrived) > ARRIVED_MAX:  # too many to note: all that is awaited is looked at instead
            self._arrived.clear()
            self._look_now = True
        self._wake.set()

    async def _take_arrivals(self) -> None:
        while self._arrived:
            page = {self._arrived.pop() for _ in range(min(ARRIVED_PAGE, len(self._arrived)))}
            await self._pools.work(self._desk.arrived, page)

    async def _look(self) -> None:
        self._unsure += 1
        try:
            after = await self._pools.work(self._desk.look, None)
            while after is not None:
                after = await self._pools.work(self._desk.look, after)
            await self._pools.ledger(self._desk.age)
            self._awaiting = False  # an order that comes now says so again
            if await self._pools.ledger(self._desk.awaits):
                self._awaiting = True
        finally:
            self._unsure -= 1

    def _tell(self, wards: Iterable[str]) -> None:
        for ward in wards:
            attachment = self._attachments.attached(ward)
            if attachment is not None:
                with contextlib.suppress(OutOfResources):  # it is told again
                    attachment.send(uplink_pb2.HubMessage(deliveries=uplink_pb2.DeliveriesWait()))
