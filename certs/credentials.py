"""Run-time credentials: gRPC servers and channels that prove who they are on both sides, TLS 1.3 and
nothing older.

A server's credentials look at the identity folder at every handshake, so that a renewed certificate or
another root is in use without a restart; a channel's are fixed when it is made (gRPC for Python can't reload
them: after a renewal make a new channel and let the old one drain). Sets no policy on calls:
`certs/gate.py` does.

How gRPC is kept from older TLS stands in `protos/__init__.py`.
"""

from __future__ import annotations

import threading

import grpc
import grpc.aio

from certs import identity as identities
from certs.identity import Identity
from certs.profiles import hub_dns_name

Options = list[tuple[str, int | str]]

MESSAGE_BYTES_MAX = 8 << 20     # a 1 MiB chunk, a group of small objects, 1,000 matches: with room
METADATA_BYTES_MAX = 16 << 10   # gRPC's own default, stated
STREAMS_MAX = 256               # calls at once on one connection: 8 pushes, asks and answers, with room
KEEPALIVE_MS = 20_000           # below the 30 s after which the strictest NATs forget a connection
KEEPALIVE_TIMEOUT_MS = 10_000   # a dead peer is known after half a minute, not after TCP's quarter of an hour
CONNECTION_AGE_MS = 15 * 60_000  # then a new handshake: expiry and a changed root reach long-lived members
CONNECTION_GRACE_MS = 10 * 60_000  # for calls that began before; the longest is a large object on a thin line
RECONNECT_MS_MAX = 10_000       # the back-off's ceiling, so that a hub that is back is found soon

_COMMON: Options = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
]

SERVER_OPTIONS: Options = [
    *_COMMON,
    ("grpc.max_concurrent_streams", STREAMS_MAX),
    ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
    ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),  # else their pings cut clients
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),  # a second hub on the same port must fail, not take half of the calls
]

_CHANNEL_OPTIONS: Options = [
    *_COMMON,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
    # Otherwise channels with equal arguments share one TCP flow: after a renewal it would be the old one's.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # the environment's proxy is for browsers, not for the uplink
]


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Credentials for `grpc.server` and `grpc.aio.server`: the current certificate of the identity's
    folder, and only clients whose certificate leads to its roots."""
    first = identities.latest(identity)
    in_use = first.folder, first.generation

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        # None when it is still the same: gRPC frees what it had when it is given another, also under a
        # handshake of another connection that begins at that moment. Given one for each of many handshakes
        # at once, the process dies.
        nonlocal in_use
        held = identities.latest(identity)
        with changing:
            if (held.folder, held.generation) == in_use:
                return None
            in_use = held.folder, held.generation
        return _configuration(held)

    changing = threading.Lock()
    return grpc.dynamic_ssl_server_credentials(
        _configuration(first), renewed,  # type: ignore[arg-type]  # None is documented, not in the stubs
        require_client_authentication=True)


def _configuration(held: Identity) -> grpc.ServerCertificateConfiguration:
    """A fresh one each time: gRPC takes the object over and may not be given it again."""
    return grpc.ssl_server_certificate_configuration(
        [(held.key_pem, held.chain_pem)], root_certificates=held.roots_pem)


def channel(identity: Identity, address: str, *, options: Options | None = None) -> grpc.aio.Channel:
    """A channel to a hub of the identity's region at `address` (host:port), for asyncio."""
    return grpc.aio.secure_channel(
        address, _channel_credentials(identity), _channel_options(identity, options))


def channel_sync(identity: Identity, address: str, *, options: Options | None = None) -> grpc.Channel:
    """A channel to a hub of the identity's region at `address` (host:port), for threads."""
    return grpc.secure_channel(address, _channel_credentials(identity), _channel_options(identity, options))


def _channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(identity.roots_pem, identity.key_pem, identity.chain_pem)


def _channel_options(identity: Identity, options: Options | None) -> Options:
    # The name that the peer must prove (`hub_dns_name` says why it is not the address).
    name: Options = [("grpc.ssl_target_name_override", hub_dns_name(identity.region))]
    return [*_CHANNEL_OPTIONS, *name, *(options or [])]
