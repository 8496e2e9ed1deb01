"""A portal's channel to the hub, for threads: made when it is first needed, made anew with a renewed
certificate; and what a portal asks the hub over it, signed.

There may be several hubs, and one of them answers: the others stand by. When a call finds a hub away or
standing by, it is made once more at each of the others, and the one that answers is asked from then on. A
ward's node that hangs is no reason: the hub that waited for it has answered.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import grpc

from archive.errors import MissError, SettingsError, Unavailable
from archive.model import Match, Query, StoredInstance
from certs.authority import clock_us
from certs.credentials import channel_sync
from certs.identity import Identity
from certs.renewal import RenewalThread
from federation import serde, status
from federation.assertion import sign
from federation.fanout import WardMatches
from federation.gathering import Coming, Held
from federation.policy import Principal
from federation.serde_gathering import coming_from
from federation.source import WardsSaid
from monitoring import tracing
from protos import region_pb2
from protos.region_pb2_grpc import RegionStub

log = logging.getLogger(__name__)

T = TypeVar("T")

HUB_MARGIN_S = 1.0  # what the hub itself may take beyond the wards' deadline
GATHER_S_MAX = 3_600.0  # of one study's arrival
DRAIN_S = 120.0  # what calls on the channel of an older certificate get to end


class HubChannel:
    """The channel, and the identity that signs what is asked: a `WardsPart` for `RegionSource`. `start` keeps
    the certificate renewed."""

    def __init__(
        self, identity: Identity, address: str = "", *, clock: Callable[[], int] = clock_us
    ) -> None:
        self._identity = identity
        self._clock = clock
        self._addresses = tuple(dict.fromkeys((address,) if address else identity.hub_addresses))
        if not self._addresses:
            raise SettingsError("no hub is known: neither the invite nor the setting names one")
        self._at = 0  # which of them is asked
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
                self._channel = channel_sync(self._identity, self._addresses[self._at])
                self._stub = RegionStub(self._channel)
            return self._stub

    def ask(self, call: Callable[[RegionStub], T]) -> T:
        """What `call` gives at the first hub that is there and does not stand by; gRPC's errors as they
        come. Reading alone goes this way: a hub may have answered when its answer was lost."""
        for left in reversed(range(len(self._addresses))):
            stub = self.stub
            try:
                return call(stub)
            except grpc.RpcError as error:
                if not left or not _is_away(error):
                    raise
                log.info("no answer of the hub at %s: %s", self._addresses[self._at], restored(error))
                self._turn_from(stub)
        raise AssertionError("there is at least one hub")

    def _turn_from(self, stub: RegionStub) -> None:
        """The next hub is asked, unless another thread has turned to it already."""
        with self._lock:
            if self._stub is not stub:
                return
            older, self._channel, self._stub = self._channel, None, None
            self._at = (self._at + 1) % len(self._addresses)
        _close_later(older)

    def search(self, principal: Principal, query: Query, deadline_s: float) -> WardsSaid:
        request = region_pb2.SearchRequest(
            query=serde.query_to(replace(query, limit=None, offset=0, after=None)),
            assertion=serde.assertion_to(sign(principal, self.identity, self._clock())),
            deadline_s=deadline_s,
        )
        with errors_restored():
            reply = self.ask(
                lambda stub: stub.Search(
                    request, timeout=deadline_s + HUB_MARGIN_S, metadata=tracing.metadata()
                )
            )
        by_ward: dict[str, list[Match]] = {}
        for match in map(serde.match_from, reply.matches):
            by_ward.setdefault("".join(match.wards[:1]), []).append(match)
        return WardsSaid(
            [WardMatches(ward, tuple(matches)) for ward, matches in by_ward.items()],
            [serde.coverage_from(one) for one in reply.coverage],
        )

    def gather(
        self, principal: Principal, study_uid: str, sop_instance_uid: str | None, deadline_s: float
    ) -> Coming:
        """What wards list comes while a thread listens for it; from a hub of an earlier release when it has
        come."""
        request = region_pb2.PromoteRequest(
            study_uid=study_uid,
            sop_instance_uid=sop_instance_uid or "",
            assertion=serde.assertion_to(sign(principal, self.identity, self._clock())),
            deadline_s=deadline_s,
        )
        with errors_restored():
            return self.ask(lambda stub: _gather(stub, request, deadline_s))

    def passing(self, principal: Principal, instance: StoredInstance) -> Iterator[bytes]:
        request = region_pb2.FetchRequest(
            study_uid=instance.study_uid,
            series_uid=instance.series_uid,
            sop_instance_uid=instance.head.sop_instance_uid,
            digest=instance.digest,
            assertion=serde.assertion_to(sign(principal, self.identity, self._clock())),
        )
        call = self.stub.Fetch(request, timeout=GATHER_S_MAX, metadata=tracing.metadata())
        try:
            with errors_restored():
                for chunk in call:
                    yield chunk.dataset
        finally:
            call.cancel()

    def _renewed(self, identity: Identity) -> None:
        with self._lock:
            older, self._channel, self._stub = self._channel, None, None
            self._identity = identity
        _close_later(older)


def _close_later(older: grpc.Channel | None) -> None:
    """Lets the calls on it end."""
    if older is not None:
        timer = threading.Timer(DRAIN_S, older.close)
        timer.daemon = True
        timer.start()


def _is_away(error: Exception) -> bool:
    """Whether the hub can't be reached or stands by."""
    return isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAVAILABLE


def _gather(stub: RegionStub, request: region_pb2.PromoteRequest, deadline_s: float) -> Coming:
    call = stub.Gather(request, timeout=GATHER_S_MAX, metadata=tracing.metadata())
    overdue = threading.Timer(deadline_s + HUB_MARGIN_S, call.cancel)
    overdue.daemon = True
    overdue.start()
    try:
        coming = _listed(call)
    except grpc.RpcError as error:
        if not _is_unknown(error):
            raise
        reply = stub.Promote(
            request, timeout=deadline_s + HUB_MARGIN_S, metadata=tracing.metadata()
        )
        return Coming(
            complete=reply.complete, coverage=[serde.coverage_from(one) for one in reply.coverage]
        )
    finally:
        overdue.cancel()
    if coming.over:
        call.cancel()
    else:
        listen = tracing.carried(_listen, call, coming)
        threading.Thread(target=listen, name="coming", daemon=True).start()
    return coming


def _is_unknown(error: Exception) -> bool:
    """Whether the hub is of a release that does not know this call."""
    return isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNIMPLEMENTED


def _listed(call: Iterator[region_pb2.Gathered]) -> Coming:
    held: list[Held] = []
    for page in call:
        held += map(coming_from, page.coming)
        if page.listed:
            return Coming(
                held, complete=page.complete, coverage=[serde.coverage_from(one) for one in page.coverage]
            )
    raise Unavailable("the hub's answer ended early")


def _listen(call: Iterator[region_pb2.Gathered], coming: Coming) -> None:
    try:
        for page in call:
            coming.arrived(page.arrived)
            if page.over:
                break
        coming.end()
    except grpc.RpcError as error:
        words = restored(error)
        log.info("what wards hold does not come: %s", words)
        coming.end(str(words))
    except Exception:
        coming.end("an unexpected error")
        raise


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
