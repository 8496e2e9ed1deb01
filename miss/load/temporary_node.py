"""A node for the time of a measurement: its own folder, a free port, an identity of an authority that exists
for this folder alone, and no uplink. It is the same `miss node run` that a ward runs; nothing in it is
weaker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from archive.archive import Archive
from archive.model import Totals
from certs import identity as identities
from certs.authority import Authority
from certs.identity import Assignment, Identity, Issued
from certs.profiles import Member
from miss import configuration, region
from miss.configuration import Process
from miss.device import make_device
from miss.ledgers import open_ledger
from miss.load.sender import CALLING_AE, Target
from miss.processes import Child, free_ports, listening, wait_until
from node.settings import DimseSettings, NodeSettings

HOST = "127.0.0.1"
AE_TITLE = "MISS-LOADED"
REGION, WARD = "bench", "bench/load"
START_S_MAX = 60.0
INDEX_S_MAX = 120.0


@dataclass(frozen=True, slots=True)
class Place:
    """A node's folder that is ready to run."""

    state: Path
    settings: Path
    port: int

    @classmethod
    def prepare(cls, folder: Path) -> Place:
        """Makes `folder`/node with its identity, node.toml and a ledger that admits the sender."""
        state = folder / "node"
        state.mkdir(parents=True, mode=0o700)
        _issue(folder / region.AUTHORITY, state / region.IDENTITY)
        [port] = free_ports(1, HOST)
        settings = NodeSettings(state=Path("."), dimse=DimseSettings(host=HOST, port=port, ae_title=AE_TITLE))
        settings = replace(settings, uplink=replace(settings.uplink, enabled=False))
        file = state / Process.NODE.file
        region.write_settings(file, settings)
        with open_ledger(state) as ledger:
            ledger.add_device(make_device(CALLING_AE, HOST))
        return cls(state, file, port)

    @property
    def target(self) -> Target:
        return Target(self.port, AE_TITLE)

    def totals(self) -> Totals:
        """What its index holds, once everything that was acknowledged is in it."""
        archive = self.open_archive()
        try:
            archive.wait_indexed(INDEX_S_MAX)
            return archive.index.totals()
        finally:
            archive.close()

    def open_archive(self) -> Archive:
        """To read, beside the node."""
        settings = configuration.node(self.settings).archive_settings()
        return Archive.open(settings, outbox=True, read_only=True)


class TemporaryNode:
    """Runs as long as its `with` block."""

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        self.place = Place.prepare(folder)
        flags = [part for override in overrides for part in ("--set", override)]
        self.child = Child("node", ["node", "run", "--settings", str(self.place.settings), *flags,
                                    "--log-level", "WARNING"], folder / "node.log")

    def __enter__(self) -> Self:
        self.child.start()
        try:
            wait_until("the node", lambda: listening(HOST, self.place.port), timeout_s=START_S_MAX,
                       children=[self.child])
        except BaseException:
            self.child.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.child.stop()


def _issue(authority_folder: Path, folder: Path) -> Identity:
    authority = Authority.init(authority_folder, REGION)
    key = identities.pending_key(folder)
    certificate = authority.issue(Member.node(REGION, WARD), key.public_key())
    bundle = authority.bundle
    return identities.install(folder, Issued(
        certificate.pem + bundle.issuing_pem, bundle.roots_pem, bundle.version,
        Assignment("Bench", "Load", "BENCH")), drop_older=True)
