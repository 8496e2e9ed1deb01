"""Which ledger a command means: the region's, beside its hub.toml, or a node's, beside its node.toml."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from archive.errors import InvalidInput, SettingsError
from miss import configuration
from miss.configuration import Process

if TYPE_CHECKING:
    from archive.ledger import Ledger

LEDGER = "ledger.db"


@contextmanager
def open_ledger(state: Path) -> Iterator[Ledger]:
    """The ledger of the region or the node whose folder `state` is."""
    from archive.ledger import Ledger

    ledger = Ledger.open(ledger_url(state))
    try:
        yield ledger
    finally:
        ledger.close()


def ledger_url(state: Path) -> str:
    hub, node = state / Process.HUB.file, state / Process.NODE.file
    if hub.exists():
        return configuration.hub(hub).ledger
    if node.exists():
        return configuration.node(node).ledger_url
    raise no_state(state)


def no_state(state: Path) -> SettingsError:
    """What to say of a folder that is neither the region's nor a node's."""
    return SettingsError(f"{state} holds neither {Process.HUB.file} nor {Process.NODE.file}: give "
                         "--state DIR, the region's folder or the node's")


def require_region(state: Path) -> None:
    """Refuses a folder that is not the region's: only the region has an authority."""
    if not (state / Process.HUB.file).exists():
        raise SettingsError(f"{state} holds no {Process.HUB.file}: give --state DIR, the region's folder")


def require_node(state: Path) -> None:
    """Refuses a folder that is not a node's: only nodes have devices."""
    if not (state / Process.NODE.file).exists():
        raise SettingsError(f"{state} holds no {Process.NODE.file}: give --state DIR, the folder of the node")


def require_known_ward(ledger: Ledger, ward: str) -> None:
    """Refuses a ward that the region does not know; "" is none."""
    if ward and ward not in (known := [one.id for one in ledger.wards()]):
        raise InvalidInput(f"no ward {ward!r} in this region; there are: {', '.join(known) or 'none yet'}")


def require_ward(ledger: Ledger, state: Path, ward: str) -> None:
    """Refuses a ward that is not there, naming those that are."""
    if (state / Process.HUB.file).exists():
        known = [one.id for one in ledger.wards()]
    else:
        from certs.identity import Identity

        known = [Identity.load(configuration.node(state / Process.NODE.file).identity).ward]
    if not ward:
        raise InvalidInput(f"a ward technician needs --ward; there are: {', '.join(known) or 'none yet'}")
    if ward not in known:
        raise InvalidInput(f"no ward {ward!r} here; there are: {', '.join(known) or 'none yet'}")
