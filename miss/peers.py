"""Application entities as people type them: AE titles, and peers as AE@HOST:PORT. Opens no connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archive.errors import InvalidInput

if TYPE_CHECKING:
    from node.dimse.requestor import Peer

AE_LENGTH_MAX = 16


def require_ae_title(ae_title: str) -> str:
    title = ae_title.strip(" ")
    if not 0 < len(title) <= AE_LENGTH_MAX or not title.isascii() or not title.isprintable() or "\\" in title:
        raise InvalidInput(f"an AE title has 1 to {AE_LENGTH_MAX} characters, no backslash, no control "
                           "character (PS3.5 6.2)")
    return title


def parse_peer(text: str) -> Peer:
    """AE@HOST:PORT, as DICOM people write an application entity."""
    from certs.invites import split_address
    from node.dimse.requestor import Peer

    ae_title, at, address = text.rpartition("@")
    if not at:
        raise InvalidInput(f"{text!r}: write AE@HOST:PORT, for example MISS@10.2.0.5:11112")
    host, port = split_address(address)
    return Peer(host, port, require_ae_title(ae_title))
