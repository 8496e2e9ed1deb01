"""How fast a node takes small instances in, beside a stock pynetdicom storescp, on this machine in one run.

    python -m bench.intake [--instances 8000] [--associations 4] [--bytes 8192] [--rounds 2]

Both receive the same corpus, made here, from the same sender: one process per association, sockets and PDUs
of its own, so that the sender is nobody's code under test. The node syncs to disk before it answers, and
indexes; storescp writes a file each and syncs nothing. Prints both rates, the refusals, and the ratio.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

from miss.backlog import node_backlog
from miss.local import LocalRegion, LocalWard, Ports, WardPlan
from miss.processes import free_ports, listening, wait_until

CT = b"1.2.840.10008.5.1.4.1.1.2\0"
EXPLICIT = b"1.2.840.10008.1.2.1"
ROOT = "2.25.7391"
MAX_PDU = 128 << 10


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    port: int
    called_ae: str


def element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
    """One element, explicit VR little endian (PS3.5 7.1.2)."""
    value += (b"\0" if vr in (b"UI", b"OW") else b" ") * (len(value) % 2)
    if vr == b"OW":
        return struct.pack("<HH2sHI", group, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", group, number, vr, len(value)) + value


def dataset(number: int, seed: str, pixels: bytes) -> tuple[bytes, bytes]:
    """A small CT slice: 20 to a series, one series to a study. Gives its UID and its encoding."""
    study = number // 20
    uid = f"{ROOT}.{seed}.{study}.1.{number}".encode()
    side = int((len(pixels) // 2) ** 0.5)
    parts = [
        element(0x0008, 0x0005, b"CS", b"ISO_IR 192"),
        element(0x0008, 0x0016, b"UI", CT), element(0x0008, 0x0018, b"UI", uid),
        element(0x0008, 0x0020, b"DA", b"20260301"), element(0x0008, 0x0030, b"TM", b"101500"),
        element(0x0008, 0x0050, b"SH", f"A{study}".encode()), element(0x0008, 0x0060, b"CS", b"CT"),
        element(0x0008, 0x1030, b"LO", b"Synthetic load"),
        element(0x0010, 0x0010, b"PN", f"Load^{study}".encode()),
        element(0x0010, 0x0020, b"LO", f"L{study:06d}".encode()),
        element(0x0020, 0x000D, b"UI", f"{ROOT}.{seed}.{study}".encode()),
        element(0x0020, 0x000E, b"UI", f"{ROOT}.{seed}.{study}.1".encode()),
        element(0x0020, 0x0011, b"IS", b"1"), element(0x0020, 0x0013, b"IS", str(number % 20 + 1).encode()),
        element(0x0028, 0x0002, b"US", struct.pack("<H", 1)),
        element(0x0028, 0x0004, b"CS", b"MONOCHROME2"),
        *(element(0x0028, at, b"US", struct.pack("<H", value))
          for at, value in ((0x10, side), (0x11, side), (0x100, 16), (0x101, 16), (0x102, 15), (0x103, 0))),
        element(0x7FE0, 0x0010, b"OW", pixels),
    ]
    return uid, b"".join(parts)


def corpus(count: int, size: int, seed: str) -> Iterator[tuple[bytes, bytes]]:
    pixels = os.urandom(2 * int((size // 2) ** 0.5) ** 2)
    for number in range(count):
        yield dataset(number, seed, struct.pack("<I", number) + pixels[4:])


# --- the sender: PS3.8 Table 9-11 and after, PS3.7 9.3.1, and nothing more


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def _associate(called: str) -> bytes:
    context = _item(0x20, b"\1\0\0\0" + _item(0x30, CT.rstrip(b"\0")) + _item(0x40, EXPLICIT))
    user = _item(0x50, _item(0x51, struct.pack(">I", MAX_PDU)) + _item(0x52, b"2.25.7391.1"))
    body = struct.pack(">HH16s16s32x", 1, 0, called.encode().ljust(16), b"RAWSCU".ljust(16))
    body += _item(0x10, b"1.2.840.10008.3.1.1.1") + context + user
    return struct.pack(">BBI", 1, 0, len(body)) + body


def _store(message: int, uid: bytes) -> bytes:
    def implicit(number: int, value: bytes) -> bytes:
        return struct.pack("<HHI", 0, number, len(value)) + value

    uid += b"\0" * (len(uid) % 2)
    body = (implicit(0x0002, CT) + implicit(0x0100, b"\1\0") + implicit(0x0110, struct.pack("<H", message))
            + implicit(0x0700, b"\0\0") + implicit(0x0800, b"\1\0") + implicit(0x1000, uid))
    return implicit(0, struct.pack("<I", len(body))) + body


def _pdata(control: int, fragment: bytes) -> bytes:
    return struct.pack(">BBIIBB", 4, 0, len(fragment) + 6, len(fragment) + 2, 1, control) + fragment


def _read(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        if not (more := connection.recv(count - len(parts))):
            raise ConnectionError("the peer closed")
        parts += more
    return bytes(parts)


def _pdu(connection: socket.socket) -> tuple[int, bytes]:
    kind, _, length = struct.unpack(">BBI", _read(connection, 6))
    return kind, _read(connection, length)


def _status(body: bytes) -> int:
    at = 6
    while at + 8 <= len(body):
        group, number, length = struct.unpack_from("<HHI", body, at)
        if (group, number) == (0, 0x0900):
            return int(struct.unpack_from("<H", body, at + 8)[0])
        at += 8 + length
    return -1


def send(target: Target, work: list[tuple[bytes, bytes]], gate: Barrier,
         results: multiprocessing.Queue[tuple[int, int, float, float]]) -> None:
    """One association: waits at the gate, sends everything, reports how many were stored and when."""
    gate.wait()
    started, stored, refused = time.perf_counter(), 0, 0
    with socket.create_connection(("127.0.0.1", target.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(_associate(target.called_ae))
        kind, _ = _pdu(connection)
        if kind != 2:
            results.put((0, len(work), started, time.perf_counter()))
            return
        step = 16_000  # below every peer's maximum
        for number, (uid, data) in enumerate(work):
            pieces = [_pdata(3, _store(number % 65_000 + 1, uid))]
            pieces += [_pdata(2 if at + step >= len(data) else 0, data[at : at + step])
                       for at in range(0, len(data), step)]
            connection.sendall(b"".join(pieces))
            kind, body = _pdu(connection)
            if kind == 4 and _status(body) == 0:
                stored += 1
            else:
                refused += 1
        connection.sendall(struct.pack(">BBII", 5, 0, 4, 0))
        _pdu(connection)
    results.put((stored, refused, started, time.perf_counter()))


def measure(target: Target, instances: list[tuple[bytes, bytes]], associations: int) -> tuple[float, int]:
    """Instances per second that were answered 0000, and how many were not."""
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(associations), context.Queue()
    senders = [
        context.Process(target=send, args=(target, instances[lot::associations], gate, results))
        for lot in range(associations)
    ]
    for sender in senders:
        sender.start()
    reports = [results.get(timeout=600) for _ in senders]
    for sender in senders:
        sender.join()
    wall = max(report[3] for report in reports) - min(report[2] for report in reports)
    return sum(report[0] for report in reports) / wall, sum(report[1] for report in reports)


# --- the two receivers


def run_stock(folder: Path, instances: list[tuple[bytes, bytes]], associations: int) -> tuple[float, int]:
    """pynetdicom's own storescp as it comes; each file is written, none is synced."""
    [port] = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "pynetdicom", "storescp", str(port), "-od", str(folder), "-aet", "STOCK",
         "-q"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until("storescp", lambda: listening("127.0.0.1", port), timeout_s=30)
        return measure(Target("pynetdicom storescp", port, "STOCK"), instances, associations)
    finally:
        process.terminate()
        process.wait(30)


def run_node(folder: Path, instances: list[tuple[bytes, bytes]], associations: int) -> tuple[float, int]:
    """A node, enrolled and alone: the WAN is down, so that its backlog only grows."""
    region = LocalRegion(folder, "bench", [WardPlan("Bench", "Radiology", "BENCH")], Ports.free(1),
                         portal=False, log_level="WARNING")
    region.start()
    try:
        ward = region.wards[0]
        ward.allow(["RAWSCU"])
        region.hub.stop()
        rate = measure(Target("node", ward.port, ward.ae_title), instances, associations)
        check(ward, rate[1], len(instances))
        return rate
    finally:
        region.stop()


def check(ward: LocalWard, refused: int, count: int) -> None:
    """What was answered 0000 is in the index: a fast answer that was not true would be no result."""
    held = node_backlog(ward.state)
    if held.pending != count - refused:
        raise SystemExit(f"the node holds {held.pending} of {count - refused} that it acknowledged")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=8_000)
    parser.add_argument("--associations", type=int, default=4)
    parser.add_argument("--bytes", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    print(f"{given.instances} instances of {given.bytes} bytes of pixels at {given.associations} "
          f"associations, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    best: dict[str, float] = {}
    for number in range(1, given.rounds + 1):
        instances = list(corpus(given.instances, given.bytes, str(number)))
        for name, run in (("stock pynetdicom storescp", run_stock), ("MISS node", run_node)):
            with tempfile.TemporaryDirectory(prefix="miss-bench-") as folder:
                rate, refused = run(Path(folder), instances, given.associations)
            best[name] = max(best.get(name, 0.0), rate)
            print(f"round {number}: {name}: {rate:,.0f} instances/s, {refused} refused", flush=True)
    stock, node = best.values()
    print(f"best of {given.rounds}: storescp {stock:,.0f}/s, node {node:,.0f}/s: {node / stock:.1f} times")


if __name__ == "__main__":
    main()
