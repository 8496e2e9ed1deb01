"""A node for foreign programs: a process of its own, as a ward runs it, its devices, and what it holds; and
the programs themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from archive.model import StoredInstance
from bench import programs
from miss.device import make_device
from miss.ledgers import open_ledger
from miss.load.temporary_node import AE_TITLE, HOST, Place
from miss.processes import free_ports, listening, wait_until
from node.dimse.errors import AssociationEnded
from node.dimse.requestor import Peer, echo
from tests.cluster import dataset_of
from tests.datasets import Instance
from tests.waiting import wait_for

PROGRAM_S_MAX = 60.0
MODALITY = "MODALITY"


@dataclass(frozen=True)
class RunningNode:
    """A node that listens; `MODALITY` may do everything."""

    place: Place

    @property
    def address(self) -> tuple[str, str]:
        return HOST, str(self.place.port)

    def allow(self, ae_title: str, port: int | None = None) -> None:
        """Lets a device connect from here, and be called when it listens."""
        with open_ledger(self.place.state) as ledger:
            ledger.add_device(make_device(ae_title, HOST, port=port))

    def stored(self, study_uid: str, count: int) -> list[tuple[StoredInstance, bytes]]:
        """The instances of a study and their data sets, once there are so many."""
        archive = self.place.open_archive()
        try:
            wait_for(lambda: len(archive.instances(study_uid)) >= count,
                     f"{count} instances of the study in the node")
            found = archive.instances(study_uid)
            return [(one, b"".join(archive.dataset_chunks(one.location))) for one in found]
        finally:
            archive.close()


def same_instances(node: RunningNode, sent: Sequence[Instance]) -> None:
    """The node holds exactly the data sets that were sent."""
    held = {one.head.sop_instance_uid: octets for one, octets in node.stored(sent[0].study_uid, len(sent))}
    assert held == {one.sop_instance_uid: one.dataset for one in sent}


def program(name: str) -> str:
    """Where a foreign program is; the test that asks is skipped where it is not installed."""
    path = programs.find(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def script(name: str) -> str:
    """As `program`, of one that is a script."""
    for folder in ("/usr/bin", "/usr/local/bin"):
        if (Path(folder) / name).exists():
            return f"{folder}/{name}"
    pytest.skip(f"{name} is not installed")


def pynetdicom(application: str) -> list[str]:
    return [sys.executable, "-P", "-m", "pynetdicom", application]


def run(command: Sequence[str | Path], *, folder: Path | None = None, code: int | None = 0) -> str:
    """What a program says, once it ended as it should."""
    done = subprocess.run(list(map(str, command)), cwd=folder, env=programs.environment(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PROGRAM_S_MAX,
                          check=False, errors="replace")
    ended = f"{command[0]} ended with code {done.returncode}: {done.stdout}"
    assert code is None or done.returncode == code, ended
    return done.stdout


@contextmanager
def serving(command: Sequence[str | Path], port: int, folder: Path, *, echoes_as: str = ""
            ) -> Iterator[subprocess.Popen[bytes]]:
    """A foreign server, while it listens on `port`. One that a mere connection would end is asked by C-ECHO,
    as the AE title that it has."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, env=programs.environment(),
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        wait_until(str(command[0]), lambda: _up(process, port, log, echoes_as), timeout_s=PROGRAM_S_MAX)
        yield process
    finally:
        process.terminate()
        process.wait(PROGRAM_S_MAX)


def _up(process: subprocess.Popen[bytes], port: int, log: Path, echoes_as: str) -> bool | None:
    assert process.poll() is None, log.read_text(errors="replace")[-2000:]
    if not echoes_as:
        return listening(HOST, port)
    try:
        return echo(Peer(HOST, port, echoes_as), MODALITY) == 0 or None
    except AssociationEnded:
        return None


def free_port() -> int:
    [port] = free_ports(1, HOST)
    return port


def written(folder: Path, instances: Iterable[Instance]) -> list[Path]:
    """A Part 10 file of each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for number, instance in enumerate(instances):
        paths.append(folder / f"{number:03d}.dcm")
        paths[-1].write_bytes(instance.part10)
    return paths


def data_sets(folder: Path) -> dict[str, bytes]:
    """The data sets of all Part 10 files below a folder, by SOP Instance UID, as they lie there."""
    found: dict[str, bytes] = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 132 and path.name != "server.log":
            octets = path.read_bytes()
            uid = str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID)
            found[uid] = dataset_of(octets)
    return found


def identifiers(folder: Path) -> list[Dataset]:
    """The answers that findscu wrote with `-X`."""
    return [pydicom.dcmread(path, force=True) for path in sorted(folder.glob("rsp*.dcm"))]


__all__ = [
    "AE_TITLE", "HOST", "MODALITY", "RunningNode", "data_sets", "free_port", "identifiers", "program",
    "pynetdicom", "run", "same_instances", "script", "serving", "written",
]
