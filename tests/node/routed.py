"""Routing over a served archive for the tests: rules in a file, devices that receive, a queue to look at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from archive.ledger import Destination, Device, Routed, RouteKind, RouteSummary
from node.availability import AvailabilityScu
from node.commitment import CommitmentScu
from node.destinations import Destinations
from node.forwarding import Forwarder
from node.routing.orders import RouteOrders
from node.routing.senders import Senders
from node.routing.service import Routing
from node.settings import RoutingSettings, TlsSettings
from tests.forked import PATIENT
from tests.node.storing import WARD, Storing, storing

QUICK = {"backoff_first_s": 0.02, "backoff_cap_s": 0.1, "poll_s": 0.01}


@dataclass(frozen=True)
class RunningRoutes:
    """A node's routing, and what it works on."""

    served: Storing
    routing: Routing
    rules: Path
    orders: RouteOrders

    def queue(self) -> list[Routed]:
        return self.served.ledger.routes(10_000)

    def summary(self, ae_title: str) -> RouteSummary:
        to = Destination(RouteKind.DEVICE, ae_title)
        return next((one for one in self.served.ledger.route_summaries() if one.to == to), RouteSummary(to))

    def rewrite(self, text: str) -> None:
        """The file as an editor leaves it: another one under its name."""
        fresh = self.rules.with_suffix(".new")
        fresh.write_text(text)
        os.replace(fresh, self.rules)


def device(served: Storing, ae_title: str, port: int) -> None:
    """Lets the node call a device on this machine."""
    served.ledger.add_device(Device(ae_title, "127.0.0.1", ae_title.lower(), port=port))


@contextmanager
def routing(
    served: Storing, rules: str | None, /, *, commitment: CommitmentScu | None = None, **settings: Any
) -> Iterator[RunningRoutes]:
    """Routing with these rules (None: without a file) and these settings over quick ones."""
    path = served.archive.settings.state / "routes.toml"
    if rules is not None:
        path.write_text(rules)
    chosen = RoutingSettings(**{**QUICK, **settings})
    destinations = Destinations(served.ledger, TlsSettings())
    senders = Senders(served.archive, Forwarder(served.archive, destinations, "MISS", ward=WARD),
                      AvailabilityScu(destinations, "MISS"), commitment=commitment)
    running = Routing(served.archive, served.ledger, WARD, chosen, path, senders, commit_poll_s=0.05)
    orders = RouteOrders(served.archive, served.ledger, WARD, path, chosen.queue_max, running.changed)
    running.start()
    try:
        yield RunningRoutes(served, running, path, orders)
    finally:
        running.stop()


def serve_routing(folder: Path, says: Connection) -> None:
    """What a process runs that is killed: a node's archive, its listener and its routing."""
    with storing(folder, limits=PATIENT) as served, routing(served, None):
        says.send(served.port)
        with suppress(EOFError, OSError):
            says.recv()
