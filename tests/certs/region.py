"""A region on real ports for the tests of this folder: authority, ledger, gRPC hub with the gate, enrolment
port.

The hub's services here answer with little, so that what is tried is who may call, not what is answered.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from archive.ledger import Ledger
from certs import joining
from certs.authority import Authority, hub_identity
from certs.credentials import SERVER_OPTIONS, server_credentials
from certs.enrolment import EnrolmentServer
from certs.gate import Gate, peer
from certs.identity import Identity
from certs.invites import create_invite
from certs.profiles import Profile
from certs.reissue import CertificatesServicer
from certs.settings import EnrolmentSettings
from protos import (
    delivery_pb2,
    delivery_pb2_grpc,
    facts_pb2_grpc,
    inventory_pb2_grpc,
    region_pb2,
    region_pb2_grpc,
    restore_pb2_grpc,
    uplink_pb2,
    uplink_pb2_grpc,
    window_pb2,
    window_pb2_grpc,
)

WAIT_S_MAX = 20.0
HOLD_S = 600.0  # how long a held call would last: far beyond every test


class Uplink(uplink_pb2_grpc.UplinkServicer):
    """All four kinds of call of a node that the protocol has, yielding and writing."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    async def Attach(self, request_iterator: Any, context: Any) -> AsyncIterator[uplink_pb2.HubMessage]:
        try:
            yield uplink_pb2.HubMessage(welcome=uplink_pb2.Welcome(version=peer(context).ward))
            await asyncio.sleep(HOLD_S)
        except asyncio.CancelledError:
            self.cancelled.append("Attach")
            raise

    async def Push(  # type: ignore[override]  # writes its replies, which the stub has no type for
        self, request_iterator: Any, context: Any
    ) -> None:
        async for _ in request_iterator:
            await context.write(uplink_pb2.PushReply(receipt=uplink_pb2.Receipt(outcome=peer(context).uri)))

    async def Offer(self, request: uplink_pb2.OfferRequest, context: Any) -> uplink_pb2.OfferReply:
        return uplink_pb2.OfferReply(
            verdicts=[uplink_pb2.OfferVerdict(have_bytes=item.size) for item in request.items])


    async def Answer(self, request: uplink_pb2.SearchAnswer, context: Any) -> uplink_pb2.AnswerReply:
        return uplink_pb2.AnswerReply()


class Deliveries(delivery_pb2_grpc.DeliveriesServicer):
    """A node's other calls."""

    async def Order(self, request: Any, context: Any) -> delivery_pb2.DeliveryOrderReply:
        return delivery_pb2.DeliveryOrderReply()

    async def Next(self, request: Any, context: Any) -> delivery_pb2.NextDeliveriesReply:
        return delivery_pb2.NextDeliveriesReply()

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[uplink_pb2.PushRequest]:
        yield uplink_pb2.PushRequest()

    async def Done(self, request: Any, context: Any) -> delivery_pb2.DeliveriesDoneReply:
        return delivery_pb2.DeliveriesDoneReply()

    async def Standing(self, request: Any, context: Any) -> delivery_pb2.DeliveryStandingReply:
        return delivery_pb2.DeliveryStandingReply()


async def _no_answer(self: object, request: object, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED)


class Facts(facts_pb2_grpc.FactsServicer):
    """Behind the gate there is nothing: the gate alone is tried. So with the next two."""

    Tell = Next = _no_answer  # type: ignore[assignment]


class Restore(restore_pb2_grpc.RestoreServicer):
    Fetch = _no_answer  # type: ignore[assignment]


class Inventory(inventory_pb2_grpc.InventoryServicer):
    Compare = Look = Describe = Note = _no_answer  # type: ignore[assignment]


class Window(window_pb2_grpc.WindowServicer):
    """A window that shows nothing."""

    async def Search(self, request: Any, context: Any) -> AsyncIterator[window_pb2.WindowSearchPage]:
        yield window_pb2.WindowSearchPage(last=True)

    async def Instances(self, request: Any, context: Any) -> AsyncIterator[window_pb2.WindowInstancesPage]:
        yield window_pb2.WindowInstancesPage()

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[window_pb2.WindowChunk]:
        yield window_pb2.WindowChunk()


class Region(region_pb2_grpc.RegionServicer):
    """A portal's calls."""

    async def Search(self, request: region_pb2.SearchRequest, context: Any) -> region_pb2.SearchReply:
        return region_pb2.SearchReply()

    async def Promote(self, request: region_pb2.PromoteRequest, context: Any) -> region_pb2.PromoteReply:
        return region_pb2.PromoteReply(complete=True)

    async def Gather(
        self, request: region_pb2.PromoteRequest, context: Any
    ) -> AsyncIterator[region_pb2.Gathered]:
        yield region_pb2.Gathered(listed=True, complete=True)

    async def Fetch(
        self, request: region_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[region_pb2.FetchChunk]:
        yield region_pb2.FetchChunk()

    async def Wards(self, request: region_pb2.WardsRequest, context: Any) -> region_pb2.WardsReply:
        return region_pb2.WardsReply(version=peer(context).uri)


async def _count(request_iterator: Any, context: Any) -> bytes:
    return str(len([message async for message in request_iterator])).encode()


async def _tick(request: bytes, context: Any) -> AsyncIterator[bytes]:
    while True:
        yield b"tick"
        await asyncio.sleep(0.05)


class Other(grpc.GenericRpcHandler):
    """The two kinds of call that the protocol does not have: for a gate with a table that allows them."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return {
            "/test/Count": grpc.stream_unary_rpc_method_handler(_count),
            "/test/Tick": grpc.unary_stream_rpc_method_handler(_tick),
        }.get(str(details.method))


class Clock:
    """The machine's clock, plus what a test adds."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> int:
        return time.time_ns() // 1000 + int(self.ahead_s * 1_000_000)


class RunningHub:
    """The hub in a thread with an event loop of its own, as its process would have it."""

    def __init__(self, folder: Path, *, life_s: int = 30 * 86400, poll_s: float = 0.2) -> None:
        self.folder = folder
        self.life_s = life_s
        self.poll_s = poll_s
        self.clock = Clock()
        if not (folder / "ca").exists():
            Authority.init(folder / "ca", "Liguria")
        self.authority = Authority.open(folder / "ca")
        self.identity = hub_identity(folder / "ca", folder / "hub")
        self.ledger = Ledger.open(f"sqlite:///{folder / 'ledger.db'}")
        self.uplink = Uplink()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="hub", daemon=True)

    def start(self, port: int = 0) -> None:
        self.thread.start()
        self.run(self._start(port))

    async def _start(self, port: int) -> None:
        self.gate = Gate(self.ledger, clock=self.clock, poll_s=self.poll_s)
        await self.gate.start()
        self.server = grpc.aio.server(interceptors=[self.gate], options=SERVER_OPTIONS)
        uplink_pb2_grpc.add_UplinkServicer_to_server(self.uplink, self.server)
        region_pb2_grpc.add_RegionServicer_to_server(Region(), self.server)
        window_pb2_grpc.add_WindowServicer_to_server(Window(), self.server)
        delivery_pb2_grpc.add_DeliveriesServicer_to_server(Deliveries(), self.server)
        # Who is let in hears that these are not there.
        restore_pb2_grpc.add_RestoreServicer_to_server(
            restore_pb2_grpc.RestoreServicer(), self.server)  # type: ignore[abstract]
        facts_pb2_grpc.add_FactsServicer_to_server(
            facts_pb2_grpc.FactsServicer(), self.server)  # type: ignore[abstract]
        inventory_pb2_grpc.add_InventoryServicer_to_server(
            inventory_pb2_grpc.InventoryServicer(), self.server)  # type: ignore[abstract]
        facts_pb2_grpc.add_FactsServicer_to_server(Facts(), self.server)
        restore_pb2_grpc.add_RestoreServicer_to_server(Restore(), self.server)
        inventory_pb2_grpc.add_InventoryServicer_to_server(Inventory(), self.server)
        uplink_pb2_grpc.add_CertificatesServicer_to_server(
            CertificatesServicer(self.authority, self.ledger, life_s=self.life_s, clock=self.clock),
            self.server)
        self.server.add_generic_rpc_handlers((Other(),))
        self.port = self.server.add_secure_port(f"127.0.0.1:{port}", server_credentials(self.identity))
        await self.server.start()
        self.enrolment = EnrolmentServer(self.authority, self.ledger, self.identity, EnrolmentSettings(
            host="127.0.0.1", port=0, hub_addresses=[self.address], certificate_life_s=self.life_s))
        await self.enrolment.start()

    def stop(self) -> None:
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(WAIT_S_MAX)
        self.loop.close()
        self.ledger.close()

    async def _stop(self) -> None:
        await self.enrolment.stop()
        await self.server.stop(0)
        await self.gate.stop()

    def run(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(WAIT_S_MAX)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def enrolment_address(self) -> str:
        return f"127.0.0.1:{self.enrolment.port}"

    def invite(
        self, ward: str = "Radiology", hospital: str = "San Martino", profile: Profile = Profile.NODE,
        **more: Any,
    ) -> str:
        """An invite's line, as `miss ca invite` would print it."""
        named: dict[str, Any] = {"hospital": hospital, "issuer": "HSM"} if profile is Profile.NODE else {}
        return create_invite(self.ledger, profile=profile, ward=ward, address=self.enrolment_address,
                             pin=self.authority.pin, **named, **more)

    def enrol(self, ward: str = "Radiology", profile: Profile = Profile.NODE) -> Identity:
        return joining.enrol(self.invite(ward, profile=profile), self.folder / profile.value / ward)


@contextmanager
def running_hub(folder: Path, **settings: Any) -> Iterator[RunningHub]:
    hub = RunningHub(folder, **settings)
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    """The status of a call that must fail."""
    try:
        call()
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    raise AssertionError("the call was let through")


def offer(channel: grpc.Channel) -> object:
    """A node's smallest call."""
    return uplink_pb2_grpc.UplinkStub(channel).Offer(uplink_pb2.OfferRequest(), timeout=10)


def wards(channel: grpc.Channel) -> object:
    """A portal's smallest call."""
    return region_pb2_grpc.RegionStub(channel).Wards(region_pb2.WardsRequest(), timeout=10)
