"""A node as a process of its own, enrolled in a region of the tests, to be stopped or killed."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from archive.ledger import Device, Ledger
from archive.settings import render_toml
from node.dimse.errors import AssociationEnded
from node.dimse.requestor import Peer, echo
from node.settings import DimseSettings, NodeSettings
from tests.federation.regions import Region
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
RUN = "import sys, logging, pathlib; from archive.settings import load; from node.service import Node\n" \
      "from node.settings import NodeSettings; logging.basicConfig(level='INFO')\n" \
      "Node(load(NodeSettings, pathlib.Path(sys.argv[1]))).run()"


def enrolled(region: Region, folder: Path, hub_address: str) -> NodeSettings:
    """The settings of an enrolled node, with a device CT1."""
    identity = region.node(region.add_ward("San Martino", "Radiology", "SANMARTINO"), hub_address)
    made = NodeSettings(
        state=folder / "node", identity=identity.folder,
        dimse=DimseSettings(host="127.0.0.1", port=0, stop_grace_s=2.0),
    )
    made.state.mkdir()
    made = replace(made, archive=replace(made.archive, free_bytes_min=0))
    ledger = Ledger.open(made.ledger_url)
    ledger.add_device(Device("CT1", "127.0.0.1"))
    ledger.close()
    return made


class Process:
    """A node as a process of its own."""

    def __init__(self, settings: NodeSettings) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        own = replace(settings, dimse=replace(settings.dimse, port=self.port))
        file = settings.state / "node.toml"
        file.write_text(render_toml(own))
        self.log = settings.state / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", RUN, str(file)], cwd=REPOSITORY,
                                            stderr=log)
        self.peer = Peer("127.0.0.1", self.port, "MISS")
        try:
            wait_for(self._answers, "the node answers", 30)
        except BaseException:
            self.process.kill()
            raise

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.text()
        try:
            return echo(self.peer, "CT1") == 0
        except AssociationEnded:
            return False

    def text(self) -> str:
        return self.log.read_text()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.wait(10)
