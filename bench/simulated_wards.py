"""Wards without archives, many in one process: each has a certificate of the region's authority and a
channel of its own, attaches, reports, and answers searches with what it is told to hold, when it is told to,
or never. What the hub sees of them is real: TLS, gRPC, asks, answers. They push nothing, and verify nobody.

    python -m bench.simulated_wards REGION ADDRESS COUNT

Each line on stdin is JSON, {ward's number: [pending, delay in s, hangs]}; those not named are idle. It says
on stdout, a line each: that all are attached; for each line read, that all have reported so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc.aio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from archive.database import sqlite_url
from archive.ledger import Ledger
from archive.model import Ward
from certs.authority import Authority
from certs.credentials import channel
from certs.identity import Assignment, Identity
from certs.profiles import Member
from certs.registry import row_of
from protos import common_pb2, uplink_pb2
from protos.uplink_pb2_grpc import UplinkStub

LIFE_S = 2 * 86400
REPORT_S = 5.0
ATTACHING_AT_ONCE = 16
START_S_MAX = 300.0
ROOT = "1.2.826.0.1.3680043.10.543.31"
INSTANCES_EACH_STUDY = 10


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a ward holds alone, how long it takes to say so, and whether it says so at all."""

    pending: int = 0
    delay_s: float = 0.0
    hangs: bool = False
    aside: bool = False  # what it holds alone was set aside: it does not come to the region


IDLE = Behaviour()


def ward_number(number: int) -> Ward:
    return Ward(f"bench/ward-{number:04}", "Bench", f"Ward {number:04}", f"BENCH{number}")


def identity_of(authority: Authority, ledger: Ledger, member: Member, address: str) -> Identity:
    """An identity as an invite would give it, in memory alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue(member, key.public_key(), life_s=LIFE_S)
    ledger.add_certificate(row_of(certificate))
    bundle = authority.bundle
    return Identity(
        folder=Path(), generation="",
        key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        chain_pem=certificate.pem + bundle.issuing_pem, roots_pem=bundle.roots_pem,
        bundle_version=bundle.version, assignment=Assignment(hub_addresses=(address,)),
        certificate=certificate,
    )  # fmt: skip


@dataclass
class SimulatedWard:
    """One ward: its line, and what it does."""

    number: int
    identity: Identity
    behaviour: Behaviour = IDLE
    attached: bool = False
    asked: int = 0
    _call: Any = None
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, places: asyncio.Semaphore) -> None:
        """Attaches, and again when the line breaks, until it is cancelled."""
        while True:
            try:
                async with channel(self.identity, self.identity.hub_address) as line:
                    await self._attach(UplinkStub(line), places)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, EOFError):
                self.attached = False
            await asyncio.sleep(0.2 + random.random())

    async def report(self) -> None:
        async with self._writing:
            held, aside = self.behaviour.pending, self.behaviour.aside
            report = uplink_pb2.WardReport(
                pending=0 if aside else held, set_aside=held if aside else 0,
                clock_us=time.time_ns() // 1000, instances=held,
            )  # fmt: skip
            await self._call.write(uplink_pb2.NodeMessage(report=report))

    async def _attach(self, stub: Any, places: asyncio.Semaphore) -> None:
        async with places:
            self._call = stub.Attach()
            hello = uplink_pb2.Hello(version="simulated", protocol=1, epoch=b"%08d" % self.number)
            await self._call.write(uplink_pb2.NodeMessage(hello=hello))
            if await self._call.read() is grpc.aio.EOF:
                raise EOFError
            await self.report()
        self.attached = True
        async with asyncio.TaskGroup() as group:
            reporting = group.create_task(self._report_for_ever())
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if message.WhichOneof("message") == "search":
                    self.asked += 1
                    if not self.behaviour.hangs:
                        group.create_task(self._answer(stub, message.search.ask_id))
            reporting.cancel()
        raise EOFError

    async def _report_for_ever(self) -> None:
        await asyncio.sleep(REPORT_S * random.random())
        while True:
            await self.report()
            await asyncio.sleep(REPORT_S)

    async def _answer(self, stub: Any, ask_id: str) -> None:
        await asyncio.sleep(self.behaviour.delay_s)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Answer(
                uplink_pb2.SearchAnswer(ask_id=ask_id, matches=self.matches(), last=True)
            )

    def matches(self) -> list[common_pb2.Match]:
        """Its pending instances as studies, each of one series."""
        found = []
        for first in range(0, self.behaviour.pending, INSTANCES_EACH_STUDY):
            uid = f"{ROOT}.{self.number}.{first}"
            count = min(INSTANCES_EACH_STUDY, self.behaviour.pending - first)
            found.append(common_pb2.Match(
                level="STUDY", issuer=f"BENCH{self.number}",
                patient=common_pb2.Fields(values={"PatientID": str(first), "PatientName": "SIMULATED^WARD"}),
                study=common_pb2.Fields(values={
                    "StudyInstanceUID": uid, "StudyDate": "20300101", "StudyTime": f"{first:06}"}),
                modalities=["CT"], series_count=1, instance_count=count, study_count=1,
                wards=[ward_number(self.number).id],
                holdings=[common_pb2.SeriesHolding(
                    series_uid=f"{uid}.1", modality="CT",
                    sop_instance_uids=[f"{uid}.1.{place}" for place in range(count)])],
            ))  # fmt: skip
        return found


class SimulatedWards:
    """The wards of a region, in a thread with a loop of its own."""

    def __init__(self, region: Path, ledger_url: str, address: str, count: int) -> None:
        authority, ledger = Authority.open(region / "ca"), Ledger.open(ledger_url)
        try:
            self.wards = [self._made(authority, ledger, number, address) for number in range(count)]
        finally:
            ledger.close()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wards", daemon=True)
        self._running: list[asyncio.Task[None]] = []

    @staticmethod
    def _made(authority: Authority, ledger: Ledger, number: int, address: str) -> SimulatedWard:
        ward = ward_number(number)
        ledger.add_ward(ward)
        member = Member.node(authority.region, ward.id)
        return SimulatedWard(number, identity_of(authority, ledger, member, address))

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_S_MAX)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(START_S_MAX)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def behave(self, behaviours: Mapping[int, Behaviour]) -> None:
        """Each does so from now on, and has told the hub how much it holds; the others are idle."""
        asyncio.run_coroutine_threadsafe(self._behave(behaviours), self._loop).result(START_S_MAX)

    async def _start(self) -> None:
        places = asyncio.Semaphore(ATTACHING_AT_ONCE)
        self._running = [asyncio.create_task(ward.run(places)) for ward in self.wards]
        while not all(ward.attached for ward in self.wards):
            await asyncio.sleep(0.05)

    async def _stop(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _behave(self, behaviours: Mapping[int, Behaviour]) -> None:
        changed = []
        for ward in self.wards:
            behaviour = behaviours.get(ward.number, IDLE)
            if behaviour != ward.behaviour:
                ward.behaviour = behaviour
                changed.append(ward.report())
        await asyncio.gather(*changed)


def main() -> None:
    region, address, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    with SimulatedWards(region, sqlite_url(region / "ledger.db"), address, count) as wards:
        print("attached", flush=True)
        for line in sys.stdin:
            told = {int(number): Behaviour(*values) for number, values in json.loads(line).items()}
            wards.behave(told)
            print("reported", flush=True)


if __name__ == "__main__":
    main()
