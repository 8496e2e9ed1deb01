"""Owns whom the node may call: the devices of the ledger that listen somewhere, as they are now, each over
the transport that it is listed with. Nobody else is ever called (M9): not whom a request names, not where it
came from."""

from __future__ import annotations

from pathlib import Path

from archive.errors import NotFound
from archive.ledger import Ledger
from node.dimse.requestor import Peer
from node.dimse.tls import Dialling
from node.settings import TlsSettings


class Destinations:
    """The devices that can be called. Safe to use from any thread."""

    def __init__(self, ledger: Ledger, tls: TlsSettings, region_root: Path | None = None) -> None:
        """Over TLS the node shows the certificate of its listener, and trusts what its listener trusts, or
        the region's root."""
        self._ledger = ledger
        self._tls = tls
        self._trust = tls.trust or region_root

    def peer(self, ae_title: str) -> Peer:
        """How to call a device. Raises NotFound when it is not on the list, is disabled, or nobody said where
        it listens; SettingsError when it is called over TLS and the node's files for that do not fit."""
        device = self._ledger.device(ae_title) if ae_title else None
        if device is None or device.ae_title != ae_title or not device.enabled:
            raise NotFound("no device has this AE title")
        if device.callable_at is None:
            raise NotFound("nobody said where this device listens: `miss device add --port`")
        host, port = device.callable_at
        return Peer(host, port, ae_title, self._dialling() if device.transport == "tls" else None)

    def _dialling(self) -> Dialling:
        return Dialling.by(trust=self._trust, certificate=self._tls.certificate, key=self._tls.key)
