"""What the hub does with deliveries from ward to ward: the synchronous half, run in a pool of threads. Orders
are rows of the region's ledger; what is fetched is read from the regional archive, and the ward that fetches
it checks the digest.

An order is ready when the region holds that very content from the ward that ordered it: a receipt was given,
so nothing is delivered that its ward could still lose. Knows no wire: it makes messages, others send them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from archive.archive import Archive
from archive.errors import InvalidInput, MissError, NotFound
from archive.ledger import Delivery, DeliveryKey, DeliveryStanding, Ledger
from archive.ledger.deliveries import ORDER_MAX, PAGE_MAX
from archive.model import Provenance
from federation import serde
from federation.deliveries_grants import DeliveryGrants, origin_device
from federation.outgoing import is_held_by
from federation.outgoing import messages as outgoing_messages
from federation.reading import Content, find_content
from protos import delivery_pb2, uplink_pb2

log = logging.getLogger(__name__)

NEXT_MAX = 256
PAGES_MAX = 8  # of what is given up, before one question is answered
REFUSAL_CHARS_MAX = 200
NOT_LET = "the region does not let the one deliver to the other any more"


class DeliveryDesk:
    """The region's deliveries, over its ledger and its archive."""

    def __init__(
        self, archive: Archive, ledger: Ledger, grants: DeliveryGrants, clock: Callable[[], int]
    ) -> None:
        self._archive = archive
        self._ledger = ledger
        self._grants = grants
        self._clock = clock

    def order(self, from_ward: str, order: delivery_pb2.DeliveryOrder) -> tuple[int, bool]:
        """Keeps what a ward orders for another: how many are new, and whether any may be fetched now. Raises
        NotFound for a ward that is none, Forbidden by the region's pairs, OutOfResources."""
        to_ward, now_us = order.to_ward, self._clock()
        if len(order.instances) > ORDER_MAX:
            raise InvalidInput(f"more than {ORDER_MAX:,} instances in one order")
        if to_ward == from_ward:
            raise InvalidInput("a ward does not deliver to itself")
        if self._ledger.ward(to_ward) is None:
            raise NotFound("the region has no such ward")
        self._grants.require(from_ward, to_ward)
        wanted = [
            serde.ordered_from(one, from_ward=from_ward, to_ward=to_ward, now_us=now_us)
            for one in order.instances
        ]
        fresh = self._ledger.order_deliveries(wanted, now_us)
        return len(fresh), self._make_ready(fresh)

    def arrived(self, uids: Iterable[str]) -> bool:
        """These came into the region: whether any delivery is ready by that."""
        asked, is_any, after = set(uids), False, None
        while asked:
            page = self._ledger.awaited_deliveries(uids=asked, after=after)
            is_any = self._make_ready([one.key for one in page]) or is_any
            if len(page) < PAGE_MAX:
                break
            after = page[-1].key
        return is_any

    def look(self, after: DeliveryKey | None) -> DeliveryKey | None:
        """A page of all that is awaited is looked at, behind `after`; where the next begins, None at the
        end."""
        page = self._ledger.awaited_deliveries(after=after)
        self._make_ready([one.key for one in page])
        return page[-1].key if len(page) == PAGE_MAX else None

    def awaits(self) -> bool:
        """Whether anything waits for an instance to come into the region."""
        return bool(self._ledger.awaited_deliveries(1))

    def next(self, ward: str, limit: int) -> list[Delivery]:
        """What the ward may fetch now. What the region no longer lets be delivered is given up, some pages of
        it at once."""
        allowed: list[Delivery] = []
        for _ in range(PAGES_MAX):
            found = self._ledger.next_deliveries(ward, self._clock(), min(limit, NEXT_MAX))
            allowed = [one for one in found if self._allows(one)]
            for one in found:
                if not self._allows(one):
                    self._refuse(one.key, NOT_LET, permanent=True)
            if allowed or not found:
                break
        return allowed

    def messages(self, ward: str, keys: Sequence[DeliveryKey]) -> Iterator[uplink_pb2.PushRequest]:
        """What the ward may fetch of these, as messages of a push stream: small ones in groups, large ones in
        chunks. One that can't be read is left out and counted as refused; when it breaks off in between, so
        does the stream."""
        ready = filter(self._allows, self._ledger.ready_of(keys[:NEXT_MAX]))
        under_way: dict[tuple[str, bytes], Delivery] = {}

        def outgoing() -> Iterator[tuple[Content, uplink_pb2.PushBegin]]:
            for delivery in ready:
                content = self._content(delivery)
                if content is not None:
                    under_way[(content.head.sop_instance_uid, content.digest)] = delivery
                    yield content, _begin(delivery, content)

        def blame(content: Content, error: MissError | OSError) -> None:
            self._blame(under_way[(content.head.sop_instance_uid, content.digest)], error)

        return outgoing_messages(self._archive, outgoing(), blame)

    def done(self, ward: str, done: delivery_pb2.DeliveriesDone) -> None:
        """What became of them at the ward."""
        if len(done.delivered) + len(done.refused) > NEXT_MAX:
            raise InvalidInput(f"more than {NEXT_MAX} deliveries at once")
        now_us = self._clock()
        delivered = [serde.delivery_key_from(key, to_ward=ward) for key in done.delivered]
        self._ledger.finish_deliveries(delivered, now_us)
        for refusal in done.refused:
            key = serde.delivery_key_from(refusal.key, to_ward=ward)
            self._refuse(key, refusal.reason[:REFUSAL_CHARS_MAX], permanent=refusal.permanent)

    def waiting(self) -> list[str]:
        """The wards for which something may be fetched now."""
        return self._ledger.wards_with_deliveries(self._clock())

    def age(self) -> None:
        """What is too old is given up, and in the end forgotten."""
        self._ledger.age_deliveries(self._clock())

    def standings(self, ward: str) -> list[DeliveryStanding]:
        """How the deliveries from and to a ward stand."""
        return self._ledger.delivery_standings(self._clock(), ward)

    def _allows(self, delivery: Delivery) -> bool:
        """By the pairs of today: an order may be older than they are."""
        return self._grants.allows(delivery.key.from_ward, delivery.key.to_ward)

    def _make_ready(self, keys: Sequence[DeliveryKey]) -> bool:
        held = [
            key for key in keys
            if is_held_by(self._archive, key.from_ward, key.sop_instance_uid, key.digest)
        ]  # fmt: skip
        self._ledger.ready_deliveries(held, self._clock())
        return bool(held)

    def _content(self, delivery: Delivery) -> Content | None:
        key = delivery.key
        content = find_content(self._archive, key.sop_instance_uid, key.digest)
        if content is None:
            self._refuse(key, "the region does not hold it any more", permanent=False)
        return content

    def _blame(self, delivery: Delivery, error: MissError | OSError) -> None:
        words = str(error) if isinstance(error, MissError) else f"its pack can't be read ({error.strerror})"
        self._refuse(delivery.key, f"in the region: {words}", permanent=False)

    def _refuse(self, key: DeliveryKey, reason: str, *, permanent: bool) -> None:
        log.warning("delivery of %s from %s to %s: %s", key.sop_instance_uid, key.from_ward, key.to_ward,
                    reason)  # fmt: skip
        self._ledger.refuse_delivery(key, reason, self._clock(), permanent=permanent)


def _begin(delivery: Delivery, content: Content) -> uplink_pb2.PushBegin:
    """It comes to its new ward from the ward that delivers it, as the patient of the same issuer; the time of
    receipt is set by who receives."""
    origin = Provenance(
        delivery.key.to_ward, delivery.issuer, origin_device(delivery.key.from_ward), delivery.calling_ae, 0
    )
    head = serde.head_to(replace(content.head, provenance=origin))
    return uplink_pb2.PushBegin(head=head, size=content.size)
