"""TLS 1.3 and nothing older, tried on a process of its own: gRPC reads its suites when first imported."""

from __future__ import annotations

import ast
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from certs.identity import Identity

ROOT = Path(__file__).parents[2]
AS_OURS = "import protos"
AS_OTHERS = "import grpc"  # before ours: the suites are the default ones, and old handshakes succeed

HUB = """
import json, sys
from pathlib import Path
from tests.certs.region import running_hub
with running_hub(Path(sys.argv[1])) as hub:
    node = hub.enrol()
    print(json.dumps({"address": hub.address, "node": str(node.folder)}), flush=True)
    sys.stdin.readline()
    print(json.dumps(hub.gate.refusals), flush=True)
"""


@contextmanager
def hub_process(folder: Path, first: str) -> Iterator[tuple[str, Identity, subprocess.Popen[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"{first}\n{HUB}", str(folder)], cwd=ROOT, text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("GRPC_")},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield ready["address"], Identity.load(Path(ready["node"])), process
    finally:
        if process.poll() is None:
            process.communicate("\n", timeout=30)


def shown(address: str, node: Identity, *flags: str) -> str:
    """What openssl's client says of a handshake."""
    ran = subprocess.run(
        ["openssl", "s_client", "-connect", address, "-brief", "-alpn", "h2", "-cert", str(node.chain_path),
         "-cert_chain", str(node.chain_path), "-key", str(node.key_path), *flags],
        stdin=subprocess.DEVNULL, capture_output=True)
    return (ran.stdout + ran.stderr).decode(errors="replace")


def test_the_hub_s_port_refuses_every_older_handshake(tmp_path: Path) -> None:
    with hub_process(tmp_path, AS_OURS) as (address, node, _):
        assert "Protocol version: TLSv1.3" in shown(address, node, "-tls1_3")
        for version in ("-tls1_2", "-tls1_1", "-tls1"):
            assert "CONNECTION ESTABLISHED" not in shown(address, node, version)
        every_suite = ("-tls1_2", "-cipher", "ALL:@SECLEVEL=0")
        assert "CONNECTION ESTABLISHED" not in shown(address, node, *every_suite)


def test_should_an_old_handshake_succeed_the_gate_refuses_the_call(tmp_path: Path) -> None:
    with hub_process(tmp_path, AS_OTHERS) as (address, node, process):
        assert "Protocol version: TLSv1.2" in shown(address, node, "-tls1_2")
        call_over_tls_1_2(address, node)
        refusals, _ = process.communicate("\n", timeout=30)
    assert json.loads(refusals) == {"TLS 1.3 is needed": 1}


def call_over_tls_1_2(address: str, node: Identity) -> None:
    """`Offer` with an empty request, in HTTP/2 frames made by hand; gRPC's own client would take TLS 1.3."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=node.roots_pem.decode())
    context.load_cert_chain(node.chain_path, node.key_path)
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    headers = b"".join(literal(name, value) for name, value in (
        (b":method", b"POST"), (b":scheme", b"https"), (b":path", b"/miss.v1.Uplink/Offer"),
        (b":authority", b"hub"), (b"content-type", b"application/grpc"), (b"te", b"trailers")))
    plain = socket.create_connection((host, int(port)), 10)
    with context.wrap_socket(plain, server_hostname=f"hub.{node.region}.miss.internal") as connection:
        assert connection.version() == "TLSv1.2"
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
                           + frame(1, 0x4, 1, headers) + frame(0, 0x1, 1, bytes(5)))
        received = b""
        while not ended(received):
            data = connection.recv(65536)
            assert data, "the hub hung up before it answered"
            received += data


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """RFC 9113, 4.1."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header as a literal without indexing (RFC 7541, 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def ended(received: bytes) -> bool:
    """Whether the last frame of stream 1 is among these."""
    at = 0
    while at + 9 <= len(received):
        length = int.from_bytes(received[at:at + 3], "big")
        kind, flags, stream = struct.unpack(">BBI", received[at + 3:at + 9])
        if stream == 1 and (kind == 3 or flags & 1):
            return True
        at += 9 + length
    return False


def test_every_package_that_imports_grpc_says_first_which_tls_it_speaks() -> None:
    for folder in ("archive", "certs", "federation", "node", "portal", "miss"):
        importing = [path.name for path in (ROOT / folder).rglob("*.py") if "grpc" in imported(path)]
        if importing:
            assert "protos" in imported(ROOT / folder / "__init__.py"), (folder, importing)
    assert not {"grpc", "certs"} & imported(ROOT / "protos" / "__init__.py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for part in ast.walk(ast.parse(path.read_text())):
        if isinstance(part, ast.Import):
            names |= {alias.name.split(".")[0] for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            names.add((part.module or "").split(".")[0])
    return names
