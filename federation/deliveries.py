"""How a node hands images of its ward to another ward: it orders at the hub that they be delivered. It moves
no bytes: the region gets them by replication in any case, and the other ward fetches them there
(`deliveries_taking.py`). Called from any thread but the uplink's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc.aio

from archive.archive import Archive
from archive.errors import Forbidden
from archive.ledger import Delivery, DeliveryKey
from archive.ledger.deliveries import ORDER_MAX
from archive.model import StoredInstance
from federation import serde
from federation.deliveries_grants import origin_ward
from federation.uplink import Uplink
from protos import delivery_pb2
from protos.delivery_pb2_grpc import DeliveriesStub

ORDER_S = 30.0


class Deliveries:
    """What this ward hands to others."""

    def __init__(self, archive: Archive, ward: str, uplink: Uplink) -> None:
        self._archive = archive
        self._ward = ward
        self._uplink = uplink

    def is_own(self, instance: StoredInstance) -> bool:
        """Whether it is this ward's to hand over: what came by delivery is the other ward's."""
        origin = instance.head.provenance
        return origin.ward == self._ward and origin_ward(origin.device) is None

    def send(self, ward_id: str, instances: Sequence[StoredInstance]) -> None:
        """Orders that these be delivered to the ward; the order is durable at the hub when this returns, and
        ordering the same again changes nothing. What came from that ward is passed over.

        Raises Forbidden for an instance that is not this ward's own, or by the region's pairs; NotFound for a
        ward that is none; Unavailable while the hub is away; OutOfResources when too many wait there.
        """
        wanted = [
            one for one in instances if origin_ward(one.head.provenance.device) != ward_id
        ]
        if not all(map(self.is_own, wanted)):
            raise Forbidden("a ward delivers what it acquired itself, not what another delivered to it")
        for start in range(0, len(wanted), ORDER_MAX):
            self._order(ward_id, wanted[start : start + ORDER_MAX])

    def _order(self, ward_id: str, instances: Sequence[StoredInstance]) -> None:
        order = delivery_pb2.DeliveryOrder(
            to_ward=ward_id, instances=[serde.ordered_to(self._ordered(ward_id, one)) for one in instances]
        )

        async def ask(line: grpc.aio.Channel) -> delivery_pb2.DeliveryOrderReply:
            reply: delivery_pb2.DeliveryOrderReply = await DeliveriesStub(line).Order(order, timeout=ORDER_S)
            return reply

        self._uplink.call(ask, ORDER_S)
        if self._uplink.settings.hold:  # or the region would not get them
            for one in instances:
                self._archive.index.mark_urgent(one.study_uid, one.head.sop_instance_uid)
        self._uplink.ordered()

    def _ordered(self, ward_id: str, one: StoredInstance) -> Delivery:
        origin = one.head.provenance
        key = DeliveryKey(self._ward, ward_id, one.head.sop_instance_uid, one.digest)
        size = one.location.length - one.location.dataset_offset
        return Delivery(key, origin.issuer, origin.calling_ae, size, ordered_us=0)
