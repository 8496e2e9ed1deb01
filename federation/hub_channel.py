"""A portal's channel to the hub, for threads: made when it is first needed, made anew with a renewed
certificate; and what a portal asks the hub over it, signed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import grpc

from archive.errors import MissError
from archive.model import Match, Query
from certs.authority import clock_us
from certs.credentials import channel_sync
from certs.identity import Identity
from certs.renewal import RenewalThread
from federation import serde, status
from federation.assertion import sign
from federation.fanout import WardMatches
from federation.policy import Principal
from federation.source import Promoted, WardsSaid
from protos import region_pb2
from protos.region_pb2_grpc import RegionStub

HUB_MARGIN_S = 1.0  # what the hub itself may take beyond the wards' deadline
DRAIN_S = 120.0  # what calls on the channel of an older certificate get to end


class HubChannel:
    """The channel, and the identity that signs what is asked: a `WardsPart` for `RegionSource`. `start` keeps
    the certificate renewed."""

    def __init__(
        self, identity: Identity, address: str = "", *, clock: Callable[[], int] = clock_us
    ) -> None:
        self._identity = identity
        self._clock = clock
        self._address = address or identity.hub_address
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._stub: RegionStub | None = None
        self._renewal = RenewalThread(identity, on_renewed=self._renewed)
        self._started = False

    def start(self) -> None:
        self._started = True
        self._renewal.start()

    def stop(self) -> None:
        if self._started:
            self._renewal.stop()
        with self._lock:
            channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            channel.close()

    def __enter__(self) -> HubChannel:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def stub(self) -> RegionStub:
        """The calls; any thread may make them."""
        with self._lock:
            if self._stub is None:
                self._channel = channel_sync(self._identity, self._address)
                self._stub = RegionStub(self._channel)
            return self._stub

    def search(self, principal: Principal, query: Query, deadline_s: float) -> WardsSaid:
        request = region_pb2.SearchRequest(
            query=serde.query_to(replace(query, limit=None, offset=0, after=None)),
            assertion=serde.assertion_to(sign(principal, self.identity, self._clock())),
            deadline_s=deadline_s,
        )
        with errors_restored():
            reply = self.stub.Search(request, timeout=deadline_s + HUB_MARGIN_S)
        by_ward: dict[str, list[Match]] = {}
        for match in map(serde.match_from, reply.matches):
            by_ward.setdefault("".join(match.wards[:1]), []).append(match)
        return WardsSaid(
            [WardMatches(ward, tuple(matches)) for ward, matches in by_ward.items()],
            [serde.coverage_from(one) for one in reply.coverage],
        )

    def promote(
        self, principal: Principal, study_uid: str, sop_instance_uid: str | None, deadline_s: float
    ) -> Promoted:
        request = region_pb2.PromoteRequest(
            study_uid=study_uid,
            sop_instance_uid=sop_instance_uid or "",
            assertion=serde.assertion_to(sign(principal, self.identity, self._clock())),
            deadline_s=deadline_s,
        )
        with errors_restored():
            reply = self.stub.Promote(request, timeout=deadline_s + HUB_MARGIN_S)
        return Promoted(reply.complete, [serde.coverage_from(one) for one in reply.coverage])

    def _renewed(self, identity: Identity) -> None:
        with self._lock:
            older, self._channel, self._stub = self._channel, None, None
            self._identity = identity
        if older is not None:
            timer = threading.Timer(DRAIN_S, older.close)
            timer.daemon = True
            timer.start()


@contextmanager
def errors_restored() -> Iterator[None]:
    """What the other side raised is raised here, as the same class."""
    try:
        yield
    except grpc.RpcError as error:
        raise restored(error) from error


def restored(error: Exception) -> MissError:
    """The error of a call that failed, as the same class as if it had been raised here."""
    return status.restored(error) if isinstance(error, grpc.Call) else MissError(type(error).__name__)
