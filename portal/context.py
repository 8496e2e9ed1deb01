"""What every handler is given, composed once in `app.py`: no handler opens or configures anything itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import tzinfo

from archive.ledger import Ledger
from federation.source import Source
from portal.audit import Audit
from portal.settings import PortalSettings
from portal.signin import SignIn
from portal.workers import Workers


@dataclass(frozen=True)
class Context:
    """`search` asks wards, `fetch` waits until they have delivered, `read` reads what is here, `decode`
    computes: neither a ward that hangs nor a large picture stops images that are here. `clock` gives
    microseconds since 1970; `site` is what the header calls this portal."""

    settings: PortalSettings
    source: Source
    ledger: Ledger
    sign_in: SignIn
    audit: Audit
    search: Workers
    fetch: Workers
    read: Workers
    decode: Workers
    clock: Callable[[], int]
    zone: tzinfo
    site: str
