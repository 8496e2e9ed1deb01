"""What a bare gRPC stream carries on this machine: mutual TLS, messages of raw octets, and nothing done with
them.

    python -m bench.ceiling serve PORT CERTIFICATES
    python -m bench.ceiling send ADDRESS CERTIFICATES BYTES MESSAGE_BYTES
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

METHOD = "/bench.Ceiling/Put"
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
UP_S_MAX = 20.0


def serve(port: int, folder: Path) -> None:
    """Takes streams until it is ended; answers how many octets came."""

    def put(messages: Iterator[bytes], _: Any) -> bytes:
        return b"%d" % sum(map(len, messages))

    handler = grpc.method_handlers_generic_handler(
        "bench.Ceiling", {"Put": grpc.stream_unary_rpc_method_handler(put)})
    server = grpc.server(futures.ThreadPoolExecutor(2), options=OPTIONS)
    server.add_generic_rpc_handlers((handler,))
    key, certificate, trust = (_octets(folder, name) for name in ("server.key", "server.pem", "trust.pem"))
    credentials = grpc.ssl_server_credentials([(key, certificate)], trust, require_client_auth=True)
    server.add_secure_port(f"0.0.0.0:{port}", credentials)
    server.start()
    server.wait_for_termination()


def send(address: str, folder: Path, total: int, size: int) -> float:
    """Octets a second of one stream."""
    trust, key, certificate = (_octets(folder, name) for name in ("trust.pem", "client.key", "client.pem"))
    credentials = grpc.ssl_channel_credentials(trust, key, certificate)
    options = (*OPTIONS, ("grpc.ssl_target_name_override", "localhost"))
    message = bytes(range(256)) * (size // 256 + 1)
    count = max(total // size, 1)
    with grpc.secure_channel(address, credentials, options) as channel:
        grpc.channel_ready_future(channel).result(UP_S_MAX)
        start = time.perf_counter()
        put: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHOD)
        answer = put(message[:size] for _ in range(count))
        spent = time.perf_counter() - start
    if int(answer) != count * size:
        raise SystemExit("not everything arrived")
    return count * size / spent


def _octets(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(send(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])))
