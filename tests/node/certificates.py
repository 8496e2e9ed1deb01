"""A region's authority and what it issued to a listener and to devices, for tests of DICOM over TLS; and
authorities that nobody trusts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from archive.database import sqlite_url
from archive.ledger import Ledger
from certs.authority import Authority
from certs.devices import DeviceName, issue_device
from node.dimse.tls import ClientCertificates, Dialling, Listener, TlsFiles

REGION = "liguria"
WARD = "san-martino/radiology"


@dataclass(frozen=True)
class Papers:
    """A folder with what `miss ca device` makes."""

    folder: Path

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    @property
    def trust(self) -> Path:
        return self.folder / "trust.pem"

    def dialling(self, trust: Path | None = None) -> Dialling:
        return Dialling.by(trust=trust or self.trust, certificate=self.certificate, key=self.key)


class Region:
    """Issues certificates below one folder."""

    def __init__(self, folder: Path, name: str = REGION) -> None:
        self.folder = folder
        Authority.init(folder / "ca", name)
        self.ledger = Ledger.open(sqlite_url(folder / "ledger.db"))

    def issue(self, ae_title: str, *, ward: str = "", use_rsa: bool = False, into: str = "") -> Papers:
        out = self.folder / (into or ae_title)
        issue_device(self.folder / "ca", self.ledger, DeviceName(ae_title, ward, ip=("127.0.0.1",)), out,
                     use_rsa=use_rsa)
        return Papers(out)

    def listener(self, clients: ClientCertificates = ClientCertificates.REQUIRE) -> Listener:
        papers = self.issue("MISS", into="listener")
        return Listener(TlsFiles(papers.certificate, papers.key, papers.trust), clients)
