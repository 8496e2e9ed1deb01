"""What only the hub has that writes the region's store: the archive, and the services over it. Exactly one
hub is that, by the lock that an archive's writer holds and that goes with its process; the others stand by
until they get it. A new service is added here by two lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from archive.archive import Archive
from archive.handlers import handlers_of
from archive.ledger import Ledger
from archive.orders import OrderDesk
from archive.space.scrubber import Scrubber
from certs.identity import Identity
from federation import reconcile_orders, ward_orders
from federation.arrivals import Arrivals
from federation.asking import WardAsking
from federation.attach_service import AttachService
from federation.attachments import Attachments
from federation.bringing import Bringing
from federation.deliveries_desk import DeliveryDesk
from federation.deliveries_grants import DeliveryGrants
from federation.deliveries_service import DeliveriesService
from federation.facts_service import FactsService
from federation.inventory_service import InventoryService
from federation.methods import Methods
from federation.passing import Passing
from federation.pools import Pools
from federation.push_wire import PUSH, push_handler
from federation.receiving import Receiver
from federation.reconcile_notes import Notes
from federation.region_service import RegionService
from federation.restoring_service import RestoreService
from federation.settings import HubSettings
from federation.uplink_service import UplinkService
from federation.window_service import WindowService
from protos import (
    delivery_pb2_grpc,
    facts_pb2_grpc,
    inventory_pb2_grpc,
    region_pb2_grpc,
    restore_pb2_grpc,
    uplink_pb2_grpc,
    window_pb2_grpc,
)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a hub has whether it writes or stands by."""

    settings: HubSettings
    ledger: Ledger
    identity: Identity
    pools: Pools
    attachments: Attachments
    attaching: AttachService
    clock: Callable[[], int]
    version: str


class HubWriter:
    """The archive and the services, between `start` and `stop`. `stop_taking` comes before, while the server
    still answers; `close` when nobody asks any more."""

    def __init__(self, standing: Standing, archive: Archive) -> None:
        self.archive = archive
        settings, attachments, pools = standing.settings, standing.attachments, standing.pools
        ledger, identity, version = standing.ledger, standing.identity, standing.version
        arrivals = Arrivals()
        asking = WardAsking(settings, attachments, pools)
        bringing = Bringing(settings, asking, attachments, arrivals, archive, pools)
        receiver = Receiver(archive, standing.clock)
        self.pushes = receiver.measures
        self.notes = Notes(settings.state)
        passing = Passing(archive, receiver.taps, arrivals, pools, settings.promote_deadline_s)
        desk = DeliveryDesk(archive, ledger, DeliveryGrants.of(settings.deliveries), standing.clock)
        orders = handlers_of(archive) | ward_orders.handlers_at(attachments, asyncio.get_running_loop())
        self.scrubber = Scrubber(
            archive, interval_s=settings.scrub.interval_days * 86_400.0,
            bytes_per_s_max=settings.scrub.bytes_per_s_max,
            found=reconcile_orders.asks_wards(archive, attachments, asyncio.get_running_loop()),
        )  # fmt: skip
        self._scrubs = settings.scrub.enabled
        orders |= reconcile_orders.handlers_at_hub(
            ledger, attachments, self.scrubber, asyncio.get_running_loop()
        )
        self._orders = OrderDesk(ledger, orders)
        self._uplinks = UplinkService(
            settings, attachments, receiver, arrivals, pools, standing.attaching
        )
        self._regions = RegionService(
            asking, bringing, passing, attachments, ledger, identity.roots_pem, pools, version
        )
        self._windows = WindowService(
            settings, asking, bringing, passing, archive, ledger, identity, pools
        )
        self._deliveries = DeliveriesService(desk, attachments, arrivals, pools)
        self._restores = RestoreService(archive, pools)
        self._inventories = InventoryService(archive, pools, self.notes)
        self._facts = FactsService(archive, attachments, arrivals, pools)

    def add_to(self, methods: Methods) -> None:
        """From here on the hub can be asked what only a writer can."""
        server = methods.server
        uplink_pb2_grpc.add_UplinkServicer_to_server(self._uplinks, server)
        region_pb2_grpc.add_RegionServicer_to_server(self._regions, server)
        window_pb2_grpc.add_WindowServicer_to_server(self._windows, server)
        delivery_pb2_grpc.add_DeliveriesServicer_to_server(self._deliveries, server)
        facts_pb2_grpc.add_FactsServicer_to_server(self._facts, server)
        restore_pb2_grpc.add_RestoreServicer_to_server(self._restores, server)
        inventory_pb2_grpc.add_InventoryServicer_to_server(self._inventories, server)
        methods.add(PUSH, push_handler(self._uplinks.Push))
        methods.standing_by = False

    def start(self) -> None:
        self._orders.start()
        if self._scrubs:
            self.scrubber.start()
        self._deliveries.start()
        self._facts.start()

    def stop_taking(self) -> None:
        """Each push ends after what has been read of it."""
        self._uplinks.stop()

    async def stop(self) -> None:
        await self._deliveries.stop()
        await self._facts.stop()
        self._windows.stop()

    async def close(self) -> None:
        """Lets go of the store; the lock is free afterwards."""
        await asyncio.to_thread(self._orders.stop)
        await asyncio.to_thread(self.scrubber.stop)
        await asyncio.to_thread(self.archive.close)
