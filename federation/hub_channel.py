"""A portal's channel to the hub, for threads: made when it is first needed, made anew with a renewed
certificate.
"""

from __future__ import annotations

import threading

import grpc

from certs.credentials import channel_sync
from certs.identity import Identity
from certs.renewal import RenewalThread
from protos.region_pb2_grpc import RegionStub

DRAIN_S = 120.0  # what calls on the channel of an older certificate get to end


class HubChannel:
    """The channel, and the identity that signs what is asked. `start` keeps the certificate renewed."""

    def __init__(self, identity: Identity, address: str = "") -> None:
        self._identity = identity
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

    def _renewed(self, identity: Identity) -> None:
        with self._lock:
            older, self._channel, self._stub = self._channel, None, None
            self._identity = identity
        if older is not None:
            timer = threading.Timer(DRAIN_S, older.close)
            timer.daemon = True
            timer.start()
