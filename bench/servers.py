"""The servers under load, each on fresh data in a folder of its own: a node of MISS, Orthanc, DCMTK's
storescp, pynetdicom's. Each says where it listens, which process it is, and whether it holds what it
acknowledged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from archive.errors import Unavailable
from archive.settings import describe
from bench import programs
from bench.certificates import Certificates
from miss.device import make_device
from miss.ledgers import open_ledger
from miss.load.instances import Numbered
from miss.load.measure import check, statuses
from miss.load.sender import Tally, Target
from miss.load.temporary_node import HOST, TemporaryNode
from miss.processes import free_ports, listening, wait_until
from node.settings import NodeSettings

START_S_MAX = 60.0
STOP_S_MAX = 30.0
ANSWER_S_MAX = 30.0
PDU_BYTES = str(128 << 10)  # the most that DCMTK takes
OWN = ("identity", "node.toml", "ledger.db*", "writer.lock")  # a node's own, whatever it holds


class Server(ABC):
    """A server for the time of one run. `tls` makes it listen with TLS, on `target`'s port; `nagle` leaves
    programs of DCMTK's family as they come; `destinations` are AE titles that it may move to, and their ports
    here."""

    name: ClassVar[str]

    def __init__(self, folder: Path, tls: Certificates | None = None, *, nagle: bool = False,
                 destinations: Mapping[str, int] | None = None) -> None:
        self.folder = folder
        self.tls = tls
        self.nagle = nagle
        self.destinations = destinations or {}

    @classmethod
    @abstractmethod
    def missing(cls, *, tls: bool) -> str:
        """Why it can't be run here; empty when it can."""

    @property
    @abstractmethod
    def pid(self) -> int: ...

    @property
    @abstractmethod
    def target(self) -> Target: ...

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def problem(self, corpus: Numbered, tally: Tally) -> str:
        """What is wrong with the answers that it gave to the only load it had; empty when nothing is."""

    @property
    @abstractmethod
    def held_in(self) -> Path:
        """The folder with what it holds, and with nothing else but OWN."""

    def keep(self, template: Path) -> None:
        """Copies what it holds, once it is stopped."""
        partial = template.with_name(f"{template.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.held_in, partial, ignore=shutil.ignore_patterns(*OWN))
        partial.rename(template)

    def take(self, template: Path) -> None:
        """Holds what another of its kind kept, before it is started."""
        shutil.copytree(template, self.held_in, dirs_exist_ok=True)


class Miss(Server):
    """A node, enrolled, its uplink off: what it takes in only waits for the region."""

    name = "MISS"

    def __init__(self, folder: Path, tls: Certificates | None = None, *, nagle: bool = False,
                 destinations: Mapping[str, int] | None = None) -> None:
        super().__init__(folder, tls, nagle=nagle, destinations=destinations)
        overrides: list[str] = []
        self._tls_port = 0
        if tls is not None:
            [self._tls_port] = free_ports(1, HOST)
            overrides = [f"dimse.tls.{key}={value}" for key, value in (
                ("port", self._tls_port), ("certificate", tls.server), ("key", tls.server_key),
                ("trust", tls.trust), ("client_certificates", "require"))]
        self.node = TemporaryNode(folder, overrides)
        with open_ledger(self.node.place.state) as ledger:
            for ae_title, port in self.destinations.items():
                ledger.add_device(make_device(ae_title, HOST, port=port))

    @classmethod
    def missing(cls, *, tls: bool) -> str:
        known = {setting.key for setting in describe(NodeSettings)}
        return "TLS is not configured" if tls and "dimse.tls.port" not in known else ""

    @property
    def pid(self) -> int:
        return self.node.child.pid

    @property
    def target(self) -> Target:
        plain = self.node.place.target
        return plain if self.tls is None else Target(self._tls_port, plain.called_ae, HOST, self.tls.sender)

    def __enter__(self) -> Self:
        self.node.__enter__()
        try:
            wait_until("the node's TLS port", lambda: listening(HOST, self.target.port),
                       timeout_s=START_S_MAX, children=[self.node.child])
        except BaseException:
            self.node.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.node.__exit__()

    def problem(self, corpus: Numbered, tally: Tally) -> str:
        return check(self.node.place, corpus, tally)

    @property
    def held_in(self) -> Path:
        return self.node.place.state


class Peer(Server):
    """A program of others."""

    called_ae: ClassVar[str]

    def __init__(self, folder: Path, tls: Certificates | None = None, *, nagle: bool = False,
                 destinations: Mapping[str, int] | None = None) -> None:
        super().__init__(folder, tls, nagle=nagle, destinations=destinations)
        self.data = folder / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        [self._port] = free_ports(1, HOST)
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def held(self) -> int:
        """How many instances it holds."""

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process.pid

    @property
    def target(self) -> Target:
        return Target(self._port, self.called_ae, HOST, self.tls.sender if self.tls else None)

    def __enter__(self) -> Self:
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=programs.environment(nagle=self.nagle), start_new_session=True)
        try:
            wait_until(self.name, self._up, timeout_s=START_S_MAX)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _up(self) -> bool | None:
        if self._process is not None and self._process.poll() is not None:
            raise Unavailable(f"{self.name} ended with code {self._process.returncode}; its log is "
                              f"{self.folder / 'log'}")
        return listening(HOST, self._port)

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def held_in(self) -> Path:
        return self.data

    def problem(self, corpus: Numbered, tally: Tally) -> str:
        if tally.failures:
            return f"answered other than 0000: {statuses(tally.failures)}"
        held = self.held()
        return "" if held == tally.stored else f"{tally.stored} were acknowledged, and it holds {held}"


class Orthanc(Peer):
    """Orthanc with SQLite as it comes: a file each, synced, and its index in the same answer."""

    name = "Orthanc"
    called_ae = "ORTHANC"

    def __init__(self, folder: Path, tls: Certificates | None = None, *, nagle: bool = False,
                 destinations: Mapping[str, int] | None = None) -> None:
        super().__init__(folder, tls, nagle=nagle, destinations=destinations)
        [self._http_port] = free_ports(1, HOST)

    @classmethod
    def missing(cls, *, tls: bool) -> str:
        return "" if programs.find("Orthanc") else "Orthanc is not installed"

    def command(self) -> list[str]:
        settings: dict[str, object] = {
            "Name": "bench", "StorageDirectory": str(self.data), "IndexDirectory": str(self.data),
            "DicomAet": self.called_ae, "DicomPort": self._port, "HttpPort": self._http_port,
            "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True, "DicomAlwaysAllowGet": True, "DicomAlwaysAllowMove": True,
            "DicomModalities": {ae_title: [ae_title, HOST, port]
                                for ae_title, port in self.destinations.items()},
            "Plugins": [],
        }
        if self.tls is not None:
            settings |= {
                "DicomTlsEnabled": True, "DicomTlsCertificate": str(self.tls.server),
                "DicomTlsPrivateKey": str(self.tls.server_key),
                "DicomTlsTrustedCertificates": str(self.tls.trust),
            }
        file = self.folder / "orthanc.json"
        file.write_text(json.dumps(settings, indent=1))
        return [programs.find("Orthanc") or "Orthanc", str(file)]

    @property
    def url(self) -> str:
        """Of its REST API."""
        return f"http://{HOST}:{self._http_port}"

    def held(self) -> int:
        with urllib.request.urlopen(f"{self.url}/statistics", timeout=ANSWER_S_MAX) as answer:
            return int(json.load(answer)["CountInstances"])


class FileServer(Peer):
    """Writes a file for each instance, keeps no index, syncs nothing."""

    def held(self) -> int:
        return sum(1 for _ in self.data.iterdir())


class Storescp(FileServer):
    """DCMTK's storescp with +B, one association after the other, as it comes."""

    name = "DCMTK storescp"
    called_ae = "STORESCP"

    @classmethod
    def missing(cls, *, tls: bool) -> str:
        if tls:
            return "not compared over TLS"
        return "" if programs.find("storescp") else "DCMTK is not installed"

    def command(self) -> list[str]:
        return [programs.find("storescp") or "storescp", "+B", "-aet", self.called_ae, "-od", str(self.data),
                str(self._port)]


class ForkingStorescp(Storescp):
    """DCMTK's storescp with a process for each association."""

    name = "DCMTK storescp --fork"

    def command(self) -> list[str]:
        program, *options = super().command()
        return [program, "--fork", *options]


class IgnoringStorescp(Storescp):
    """Takes everything and keeps nothing: for measuring who sends. With the longest PDUs that it takes: with
    its default of 16 KB pynetdicom waits for delayed acknowledgements, and sends a fifth of what it can."""

    name = "DCMTK storescp --ignore"

    def command(self) -> list[str]:
        return [programs.find("storescp") or "storescp", "--ignore", "--fork", "-pdu", PDU_BYTES,
                "-aet", self.called_ae, str(self._port)]

    def problem(self, corpus: Numbered, tally: Tally) -> str:
        return ""


class Pynetdicom(FileServer):
    """pynetdicom's own storescp application."""

    name = "pynetdicom storescp"
    called_ae = "PYNETDICOM"

    @classmethod
    def missing(cls, *, tls: bool) -> str:
        return "not compared over TLS" if tls else ""

    def command(self) -> list[str]:
        return [sys.executable, "-P", "-m", "pynetdicom", "storescp", str(self._port), "-q",
                "-aet", self.called_ae, "-od", str(self.data)]
