"""A whole region on this machine: hub, portal and nodes as processes of their own, each the same `miss`
command that a person would run, each let in by a real invite. The demo and the tests run on it. It sends
nothing and shows nothing; what it makes once it finds again.

    STATE/region/    ca, ledger, hub.toml, the regional store
    STATE/wards/hospital-ward/    a node's folder each
    STATE/portal/    the portal's
    STATE/logs/      what each process says
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archive.ledger import Ledger, WardState
from archive.ledger.certificates import ACTIVE
from certs import identity as identities
from certs.identity import Identity
from certs.profiles import slug
from federation.coverage import is_present
from miss import configuration, region
from miss.configuration import Process
from miss.device import make_device
from miss.processes import Child, free_ports, listening, wait_until

HOST = "127.0.0.1"
REGION, WARDS, PORTAL, LOGS = "region", "wards", "portal", "logs"
INVITE_LIFE_S = 600
START_TIMEOUT_S = 60.0
ATTACH_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class WardPlan:
    """A ward to be: what its invite will say."""

    hospital: str
    name: str
    issuer: str

    @property
    def id(self) -> str:
        return f"{slug(self.hospital)}/{slug(self.name)}"

    @property
    def full_name(self) -> str:
        """As people say it: a ward's own name is not unique in the region."""
        return f"{self.hospital} {self.name}"

    @property
    def folder(self) -> str:
        return self.id.replace("/", "-")


@dataclass(frozen=True, slots=True)
class Ports:
    """Where everything listens. `ward_portal` is of the first ward."""

    portal: int
    hub: int
    enrolment: int
    ward_portal: int
    dimse: tuple[int, ...]

    @classmethod
    def based_on(cls, base: int, wards: int) -> Ports:
        return cls(base, base + 1, base + 2, base + 3, tuple(range(base + 10, base + 10 + wards)))

    @classmethod
    def free(cls, wards: int) -> Ports:
        portal, hub, enrolment, ward_portal, *dimse = free_ports(4 + wards, HOST)
        return cls(portal, hub, enrolment, ward_portal, tuple(dimse))


@dataclass(slots=True)
class LocalWard:
    """A ward of the region here, and the process of its node."""

    plan: WardPlan
    state: Path
    port: int
    node: Child

    @property
    def settings(self) -> Path:
        return self.state / Process.NODE.file

    @property
    def ae_title(self) -> str:
        return configuration.node(self.settings).dimse.ae_title

    @property
    def rules(self) -> Path:
        """The file of its routing rules, if there are any."""
        return configuration.node(self.settings).routes_path

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        with _opened(configuration.node(self.settings).ledger_url) as ledger:
            yield ledger

    def allow(self, ae_titles: Sequence[str], address: str = HOST, **options: Any) -> None:
        """Lets devices connect from `address`, with options of `make_device`; those that are listed already
        stay as they are."""
        with self.ledger() as ledger:
            known = {device.ae_title for device in ledger.devices()}
            for ae_title in ae_titles:
                if ae_title not in known:
                    ledger.add_device(make_device(ae_title, address, **options))


class LocalRegion:
    """The region in `state`: `start` makes what is missing and runs everything, `stop` ends it in order."""

    def __init__(self, state: Path, name: str, wards: Sequence[WardPlan], ports: Ports, *,
                 basic_auth: bool = False, portal: bool = True, ward_portal: bool = False,
                 node_overrides: Sequence[str] = (), devices_see_region: Sequence[str] = (),
                 rules: Mapping[str, str] | None = None, log_level: str = "INFO") -> None:
        """`devices_see_region` are the wards whose devices may look into the whole region, as the region's
        settings begin; `rules` are the routing rules that a ward begins with, by its id."""
        self.state = state.absolute()
        self.name = name
        self.ports = ports
        self._basic_auth = basic_auth
        self._log_level = log_level
        self._devices_see_region = tuple(devices_see_region)
        self._rules = dict(rules or {})
        self._node_overrides = [part for override in node_overrides for part in ("--set", override)]
        self.folder = self.state / REGION
        self.hub = self._child("hub", ["hub", "run", "--settings", str(self.hub_toml)])
        self.portal = self._child("portal", ["portal", "run", "--settings", str(self.portal_toml)]
                                  ) if portal else None
        self.wards = [self._ward(plan, port) for plan, port in zip(wards, ports.dimse, strict=True)]
        self.ward_portal = self._ward_portal(self.wards[0]) if ward_portal else None

    @property
    def hub_toml(self) -> Path:
        return self.folder / Process.HUB.file

    @property
    def portal_toml(self) -> Path:
        return self.state / PORTAL / Process.PORTAL.file

    @property
    def hub_address(self) -> str:
        return f"{HOST}:{self.ports.hub}"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.ports.portal}"

    @property
    def children(self) -> list[Child]:
        """Everything that runs, in the order in which it is started."""
        return [self.hub, *(ward.node for ward in self.wards), *self.portals]

    @property
    def portals(self) -> list[Child]:
        return [child for child in (self.portal, self.ward_portal) if child is not None]

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        with _opened(configuration.hub(self.hub_toml).ledger) as ledger:
            yield ledger

    def start(self, *, progress: Callable[[str], None] = lambda what: None) -> None:
        """Makes what is missing, starts everything, and returns when all of it answers."""
        self.state.mkdir(parents=True, exist_ok=True)
        os.chmod(self.state, 0o700)  # passwords and keys lie below
        try:
            self._prepare_region()
            progress("hub")
            self.hub.start()
            if not self._all_enrolled():
                self._await_ports(self.hub, self.ports.hub, self.ports.enrolment)
            for ward in self.wards:
                progress(f"node of {ward.plan.hospital} {ward.plan.name}")
                self._prepare_ward(ward)
                ward.node.start()
            progress("portal")
            if self.portal is not None:
                self._prepare_portal()
            for portal in self.portals:
                portal.start()
            self.await_ready()
        except BaseException:
            self.stop()
            raise

    def await_ready(self) -> None:
        """Returns when every port answers and every node is attached to the hub."""
        self._await_ports(self.hub, self.ports.hub, self.ports.enrolment)
        for ward in self.wards:
            self._await_ports(ward.node, ward.port)
        if self.portal is not None:
            self._await_ports(self.portal, self.ports.portal)
        if self.ward_portal is not None:
            self._await_ports(self.ward_portal, self.ports.ward_portal)
        self.await_attached()

    def await_attached(self, timeout_s: float = ATTACH_TIMEOUT_S) -> None:
        """Returns when every node that the region still admits is attached to the hub that runs now."""
        with self.ledger() as ledger:
            admitted = {row.ward for row in ledger.certificates() if row.state == ACTIVE}
            wait_until("the nodes' attaching to the hub",
                       lambda: self._attached(admitted, ledger.ward_states()),
                       timeout_s=timeout_s, children=[self.hub, *(ward.node for ward in self.wards)])

    def _attached(self, admitted: Collection[str | None], states: Mapping[str, WardState]) -> bool | None:
        now_us = int(time.time() * 1e6)
        there = [states.get(ward.plan.id) for ward in self.wards if ward.plan.id in admitted]
        return all(state is not None and is_present(state, now_us) for state in there) or None

    def stop(self) -> None:
        """Portals first, then nodes, then the hub: nobody loses whom they talk to."""
        for group in (self.portals, [ward.node for ward in self.wards], [self.hub]):
            for child in group:
                child.ask_to_stop()
            for child in group:
                child.stop()

    def _prepare_region(self) -> None:
        if not self.hub_toml.exists():
            region.create_region(self.folder, self.name, host=HOST, port=self.ports.hub,
                                 enrol_port=self.ports.enrolment, listen_host=HOST)
            _adjust(self.hub_toml, configuration.hub(self.hub_toml),
                    {"devices_see_region": self._devices_see_region})
        _adjust(self.hub_toml, configuration.hub(self.hub_toml), {
            "port": self.ports.hub, "enrolment.port": self.ports.enrolment,
            "enrolment.hub_addresses": [self.hub_address]})

    def _prepare_ward(self, ward: LocalWard) -> None:
        if not ward.settings.exists():
            self._enrol_ward(ward)
        _adjust(ward.settings, configuration.node(ward.settings), {
            "dimse.port": ward.port, "uplink.hub_address": self.hub_address})
        if ward.plan.id in self._rules and not ward.rules.exists():
            ward.rules.write_text(self._rules[ward.plan.id])

    def _enrol_ward(self, ward: LocalWard) -> None:
        plan = ward.plan
        if identities.exists(ward.state / region.IDENTITY):  # stopped between certificate and settings
            region.write_node_settings(Identity.load(ward.state / region.IDENTITY), ward.state, host=HOST,
                                       port=ward.port, private_classes=True)
            return
        with self.ledger() as ledger:
            invite = region.make_invite(ledger, self.folder, hospital=plan.hospital, ward=plan.name,
                                        issuer=plan.issuer, life_s=INVITE_LIFE_S, who=self.name)
        region.enrol_node(invite, ward.state, host=HOST, port=ward.port, private_classes=True)

    def _prepare_portal(self) -> None:
        folder = self.portal_toml.parent
        if not self.portal_toml.exists():
            if not identities.exists(folder / region.IDENTITY):
                with self.ledger() as ledger:
                    invite = region.make_invite(ledger, self.folder, portal="portal", life_s=INVITE_LIFE_S,
                                                who=self.name)
                region.enrol_portal(invite, folder, self.folder, port=self.ports.portal,
                                    basic_auth=self._basic_auth)
            else:
                region.write_portal_settings(folder, self.folder, port=self.ports.portal,
                                             basic_auth=self._basic_auth)
        hub = configuration.hub(self.hub_toml)
        _adjust(self.portal_toml, configuration.portal(self.portal_toml), {
            "listen.port": self.ports.portal, "region.hub_address": self.hub_address,
            "region.state": hub.state, "ledger_url": hub.ledger})

    def _all_enrolled(self) -> bool:
        folders = [ward.state for ward in self.wards]
        if self.portal is not None:
            folders.append(self.portal_toml.parent)
        return all(identities.exists(folder / region.IDENTITY) for folder in folders)

    def _ward(self, plan: WardPlan, port: int) -> LocalWard:
        state = self.state / WARDS / plan.folder
        node = self._child(plan.folder, ["node", "run", "--settings", str(state / Process.NODE.file),
                                         *self._node_overrides])
        return LocalWard(plan, state, port, node)

    def _ward_portal(self, ward: LocalWard) -> Child:
        return self._child(f"portal-{ward.plan.folder}", [
            "portal", "run", "--node", str(ward.state), "--set", f"listen.port={self.ports.ward_portal}",
            "--set", f"sign_in.basic_auth={str(self._basic_auth).lower()}"])

    def _child(self, name: str, arguments: list[str]) -> Child:
        return Child(name, [*arguments, "--log-level", self._log_level], self.state / LOGS / f"{name}.log")

    def _await_ports(self, child: Child, *ports: int) -> None:
        for port in ports:
            wait_until(f"{child.name} at port {port}", lambda port=port: listening(HOST, port),  # type: ignore[misc]
                       timeout_s=START_TIMEOUT_S, children=[child])


@contextmanager
def _opened(url: str) -> Iterator[Ledger]:
    ledger = Ledger.open(url)
    try:
        yield ledger
    finally:
        ledger.close()


def _adjust(path: Path, settings: Any, wanted: dict[str, Any]) -> None:
    """Writes the file again when ports or folders moved; whatever else a person set in it stays."""
    changed = settings
    for key, value in wanted.items():
        changed = _replaced(changed, key.split("."), value)
    if changed != settings:
        region.write_settings(path, changed)


def _replaced(settings: Any, steps: list[str], value: Any) -> Any:
    first, *rest = steps
    inner = _replaced(getattr(settings, first), rest, value) if rest else value
    return dataclasses.replace(settings, **{first: inner})
