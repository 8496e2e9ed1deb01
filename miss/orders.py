"""How a command changes an archive: the process that runs is asked through its ledger, and where none runs
the command opens the archive and does the same itself. Either way the order stands in the ledger, and in its
audit log once it is carried out."""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from archive.errors import InvalidInput, MissError, Unavailable
from miss import configuration
from miss.configuration import Process
from miss.ledgers import no_state, open_ledger

if TYPE_CHECKING:
    from archive.archive import Archive, ArchiveSettings
    from archive.ledger import Ledger
    from archive.orders import Handler

WAIT_S = 30.0
POLL_S = 0.05


def carry_out(state: Path, kind: str, detail: Mapping[str, str], *, wait_s: float = WAIT_S) -> str:
    """The answer to an order, by the node or the hub whose folder `state` is. Raises InvalidInput with the
    reason when it failed, Unavailable when it was not carried out in time: it stays in the queue then."""
    settings, outbox = archive_of(state)
    with open_ledger(state) as ledger:
        order = ledger.place_order(kind, detail, person())
        deadline = time.monotonic() + wait_s
        while True:
            answer = ledger.order_answer(order)
            if answer is not None:
                ok, words = answer
                if not ok:
                    raise InvalidInput(words)
                return words
            if not is_held(settings):
                _work_off(state, settings, outbox, ledger)
            elif time.monotonic() > deadline:
                raise Unavailable(f"not carried out within {wait_s:.0f} s: it stays in the queue of the "
                                  "process that runs, and in the audit log once it is done")
            else:
                time.sleep(POLL_S)


def archive_of(state: Path) -> tuple[ArchiveSettings, bool]:
    """The archive of the node or the region whose folder `state` is, and whether it has an outbox."""
    hub = state / Process.HUB.file
    if hub.exists():
        return configuration.hub(hub).archive_settings(), False
    node = state / Process.NODE.file
    if not node.exists():
        raise no_state(state)
    return configuration.node(node).archive_settings(), True


def person() -> str:
    """Who types: the account of the operating system."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in containers
        return f"uid {os.getuid()}"


def is_held(settings: ArchiveSettings) -> bool:
    """Whether a process writes to the archive now."""
    from archive.archive import lock_state

    try:
        os.close(lock_state(settings.state))
    except Unavailable:
        return True
    return False


def _work_off(state: Path, settings: ArchiveSettings, outbox: bool, ledger: Ledger) -> None:
    """Carry out what waits, this order last."""
    from archive.archive import Archive
    from archive.handlers import handlers_of
    from archive.orders import OrderDesk
    from federation.reconcile_notes import Notes

    try:
        archive = Archive.open(settings, outbox=outbox)
    except MissError:
        if is_held(settings):
            return  # a process began in between: it carries the order out
        raise
    with archive:
        held = Notes(settings.state).now.held  # as the node's process left it
        OrderDesk(ledger, handlers_of(archive, _ward_of(state), held=lambda: held)
                  | _handlers_of_node(state, archive, ledger)
                  | _handlers_of_region(state, ledger)).work_off()
        archive.upkeep.drain()  # what was answered as going on goes on to its end


def _handlers_of_region(state: Path, ledger: Ledger) -> dict[str, Handler]:
    """The orders that only a region carries out."""
    from federation.ward_orders import handlers_alone

    return handlers_alone(ledger) if (state / Process.HUB.file).exists() else {}


def _ward_of(state: Path) -> str:
    """The ward of the node in `state`; "" for the region, and for a node that belongs to none."""
    from certs import identity as identities
    from certs.identity import Identity

    file = state / Process.NODE.file
    if not file.exists():
        return ""
    identity = configuration.node(file).identity
    return Identity.load(identity).ward if identities.exists(identity) else ""


def _handlers_of_node(state: Path, archive: Archive, ledger: Ledger) -> dict[str, Handler]:
    """The orders that only a node carries out: none as long as it belongs to no ward."""
    from certs import identity as identities
    from certs.identity import Identity
    from node.routing.orders import RouteOrders

    file = state / Process.NODE.file
    if not file.exists():
        return {}
    settings = configuration.node(file)
    if not identities.exists(settings.identity):
        return {}
    ward = Identity.load(settings.identity).ward
    return RouteOrders(archive, ledger, ward, settings.routes_path, settings.routing.queue_max).handlers()
