"""`miss demo`: a region on this machine, loaded with images, and what to do with it. It keeps demo.json true:
where everything is, who may sign in, what was loaded."""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archive.errors import InvalidInput, Unavailable
from miss.console import err, program
from miss.demofile import Stopped, ignoring_signals, only_one, read_json, until_stopped, write_json
from miss.welcome import show_demo

if TYPE_CHECKING:
    from miss.samples import Plan

STATE = Path("demo-state")
PORT_BASE = 11100
WARDS = 3
WARDS_MAX = 50
REGION_NAME = "demo"
JSON, PLAN, SAMPLES = "demo.json", "demo-plan.json", "samples"
PORT_WAIT_S = 30.0   # a demo that was killed outright leaves children that take a moment to stop
WATCH_S = 0.3
QUIET_S_MAX = 60.0   # without any progress of replication

# Who may connect from this machine: DCMTK's and pynetdicom's tools as they call themselves, and our own.
DEVICES = ("MODALITY", "MISS-SEND", "STORESCU", "DCMSEND", "ECHOSCU", "FINDSCU", "MOVESCU", "GETSCU",
           "RAWSCU", "PYNETDICOM")
REGIONAL_DEVICES = ("REGIONSCU",)  # search and retrieve what any ward holds, through their own node

HOSPITALS = (("San Martino", "Radiology"), ("Galliera", "Radiology"), ("San Martino", "Emergency"),
             ("Gaslini", "Paediatrics"), ("Galliera", "Cardiology"), ("Villa Scassi", "Radiology"))
OTHER_HOSPITAL = 1  # the number of a ward of another hospital than the first's


def demo(
    state: Annotated[Path, typer.Option(
        "--state", "-d", metavar="DIR", file_okay=False,
        help="Where everything is kept; a second start finds it again.")] = STATE,
    port_base: Annotated[int | None, typer.Option(
        help=f"The first port: portal, hub, and ten further on the nodes; 0 takes free ones (at first "
             f"{PORT_BASE}, later those of the first start)", min=0, max=65_000, show_default=False)] = None,
    wards: Annotated[int | None, typer.Option(
        help=f"How many wards (at first {WARDS}, later as many as there are)", min=1, max=WARDS_MAX,
        show_default=False)] = None,
    load: Annotated[Path | None, typer.Option(
        metavar="DIR", exists=True, file_okay=False, show_default=False,
        help="Send this folder in place of the samples; what is no DICOM is skipped and counted.")] = None,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print demo.json when ready; all else to stderr.")] = False,
) -> None:
    """Runs a whole region on this machine: hub, portal, nodes of two hospitals, and images to look at.

    Each is a process of its own, started by the same commands as a real one and let in by a real invite.
    The images are sent by C-STORE: real files that the pydicom package installs, and computed phantoms.
    Passwords are made at the first start and kept in DIR (readable by you alone). Ctrl-C stops everything.

    \b
    Examples:
      miss demo
      miss demo --state /tmp/region --port-base 20000 --wards 5
      miss demo --load ~/images --json > demo.json
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with only_one(state), until_stopped():
        _Demo(state.absolute(), port_base, wards, load.absolute() if load else None, as_json).run()


class _Demo:
    """One run of the demo."""

    def __init__(self, state: Path, port_base: int | None, wards: int | None, load: Path | None,
                 as_json: bool) -> None:
        from miss.demowork import rules
        from miss.local import LocalRegion, Ports

        self.state, self.load, self.as_json = state, load, as_json
        self.plan = read_json(state / PLAN)
        count = wards or int(self.plan.get("wards", WARDS))
        if count < int(self.plan.get("wards", 0)):
            raise InvalidInput(f"{state} has {self.plan['wards']} wards: give another --state for fewer")
        base = int(self.plan.get("port_base", PORT_BASE)) if port_base is None else port_base
        kept = Ports(**self.plan["ports"]) if "ports" in self.plan and port_base is None else None
        if kept is None or len(kept.dimse) != count:
            kept = Ports.based_on(base, count) if base else Ports.free(count)
        self.ports = kept
        self.plan |= {"wards": count, "port_base": base,
                      "ports": {"portal": kept.portal, "hub": kept.hub, "enrolment": kept.enrolment,
                                "ward_portal": kept.ward_portal, "dimse": list(kept.dimse)}}
        plans = ward_plans(count)
        handed_on = {plans[0].id: rules(plans[OTHER_HOSPITAL].id)} if count > OTHER_HOSPITAL else {}
        self.region = LocalRegion(state, REGION_NAME, plans, kept, basic_auth=True, ward_portal=True,
                                  devices_see_region=["*"], rules=handed_on)
        self.dead: set[str] = set()

    def run(self) -> None:
        self._await_free_ports()
        write_json(self.state / PLAN, self.plan)
        started = time.monotonic()
        try:
            with err.status("starting ...") as status:
                self.region.start(progress=lambda what: status.update(f"starting {what} ..."))
            for ward in self.region.wards:
                ward.allow(DEVICES)
                ward.allow(REGIONAL_DEVICES, reach="region")
            self._add_users()
            self._schedule()
            self._load()
            self._write()
            show_demo(self._contents(), self.state, time.monotonic() - started, as_json=self.as_json)
            self._watch()
        except Stopped:
            err.print("\nstopping ...")
        finally:
            with ignoring_signals():
                self.region.stop()
                # Nothing runs any more: a file that says otherwise would not be true.
                self._write_stopped()
        err.print("stopped; the same command starts it again")

    def _await_free_ports(self) -> None:
        from miss.local import HOST
        from miss.processes import listening

        ports = (self.ports.portal, self.ports.hub, self.ports.enrolment, self.ports.ward_portal,
                 *self.ports.dimse)
        deadline = time.monotonic() + (PORT_WAIT_S if (self.state / JSON).exists() else 0)
        while taken := [port for port in ports if listening(HOST, port)]:
            if time.monotonic() >= deadline:
                raise Unavailable(f"port {taken[0]} is taken by another program: give --port-base, for "
                                  f"example --port-base {PORT_BASE + 1000}, or 0 for free ones")
            time.sleep(0.1)

    # --- people

    def _add_users(self) -> None:
        """Makes the accounts that are missing, with passwords that nobody else has."""
        from archive.ledger import User
        from federation.policy import Role
        from miss.user import create, make_password

        wanted: list[tuple[str, Role, str | None, str]] = [
            (f"tech-{ward.ae_title.lower()}", Role.TECHNICIAN, ward.plan.id,
             f"Technician, {ward.plan.hospital} {ward.plan.name}") for ward in self.region.wards]
        wanted += [("physician", Role.PHYSICIAN, None, "Regional physician"),
                   ("it", Role.IT, None, "Regional IT")]
        known = {user["name"]: user for user in self.plan.get("users", [])}
        self.plan["users"] = [
            known.get(name) or {"name": name, "password": make_password(), "role": role.value, "ward": ward}
            for name, role, ward, _ in wanted]
        write_json(self.state / PLAN, self.plan)
        passwords = {user["name"]: user["password"] for user in self.plan["users"]}
        first = self.region.wards[0]
        for name, role, of_ward, title in wanted:
            user = User(name, title, role.value, of_ward)
            with self.region.ledger() as ledger:
                if ledger.user(name) is None:
                    create(ledger, user, passwords[name])
            if of_ward in (None, first.plan.id):  # for when the WAN is down, a ward portal has its own people
                with first.ledger() as ledger:
                    if ledger.user(name) is None:
                        create(ledger, user, passwords[name])

    # --- work

    def _schedule(self) -> None:
        """Puts a step on the first ward's worklist, or the same one anew: it is to be done today."""
        from miss.demowork import step

        with self.region.wards[0].ledger() as ledger:
            ledger.schedule([step(datetime.now())])

    # --- images

    def _load(self) -> None:
        """Sends what was not sent yet, and waits until the region has all of it."""
        from miss.samples import demo_plan, folder_plan

        source = str(self.load) if self.load else "samples"
        loaded = self.plan.get("loaded")
        if loaded is not None and (self.load is None or loaded["source"] == source):
            return
        with err.status(f"reading {self.load or 'the samples'} ..."):
            count = len(self.region.wards)
            plan = folder_plan(self.load, count) if self.load else demo_plan(count, self.state / SAMPLES)
        sent, failed = self._send(plan)
        self._await_replication()
        self.plan["loaded"] = {
            "source": source, "sent": sent, "failed": failed.total(), "skipped": plan.skipped.total(),
            "failed_by_reason": dict(failed), "skipped_by_reason": dict(plan.skipped)}
        write_json(self.state / PLAN, self.plan)

    def _send(self, plan: Plan) -> tuple[int, Counter[str]]:
        """Sends the files as modalities would; how many were taken, and why others were not."""
        from miss.local import HOST
        from miss.progress import failures, sending_bar
        from node.dimse.requestor import Peer
        from node.dimse.sending import send_files

        sent, failed = 0, Counter[str]()
        with sending_bar(plan.count, "C-STORE to the wards") as show:
            for lot in plan.lots:
                ward = self.region.wards[lot.ward]
                report = send_files(Peer(HOST, ward.port, ward.ae_title), DEVICES[0], lot.files, show)
                sent += report.sent
                failed += failures(report)
                plan.skipped.update(reason for _, reason in report.skipped)
        return sent, failed

    def _await_replication(self) -> None:
        """Polls the wards' own word in the ledger until each was complete after the last was sent."""
        sent_us = int(time.time() * 1e6)
        last, quiet_since = None, time.monotonic()
        with self.region.ledger() as ledger, err.status("the region takes it over ...") as status:
            while True:
                states = [states.get(ward.plan.id) for states in (ledger.ward_states(),)
                          for ward in self.region.wards]
                if all(state is not None and state.complete_to_us >= sent_us for state in states):
                    return
                pending = sum(state.pending for state in states if state is not None)
                if pending != last:
                    last, quiet_since = pending, time.monotonic()
                    status.update(f"the region takes it over ... {pending} to go")
                self._report_dead()
                if time.monotonic() - quiet_since > QUIET_S_MAX:
                    err.print(f"[yellow]{pending} instances are still at the wards (`miss status` says why); "
                              "going on without waiting[/]")
                    return
                time.sleep(0.1)

    # --- demo.json

    def _contents(self, *, running: bool = True) -> dict[str, Any]:
        from miss.local import HOST, LOGS

        pids = {"demo": os.getpid() if running else None}
        pids |= {child.name: child.pid if running and child.running else None
                 for child in self.region.children}
        loaded = self.plan.get("loaded", {})
        names = {ward.plan.id: ward.plan.full_name for ward in self.region.wards}
        users = [user | {"ward": names.get(user["ward"]), "ward_id": user["ward"]}
                 for user in self.plan.get("users", [])]
        return {
            "portal": {"url": self.region.url, "users": users, "settings": str(self.region.portal_toml)},
            "hub": {"address": self.region.hub_address, "settings": str(self.region.hub_toml),
                    "state": str(self.region.folder)},
            "wards": [{
                "id": ward.plan.id, "name": ward.plan.full_name, "hospital": ward.plan.hospital,
                "issuer": ward.plan.issuer, "ae_title": ward.ae_title, "host": HOST, "dicom_port": ward.port,
                "devices": list(DEVICES), "regional_devices": list(REGIONAL_DEVICES),
                "settings": str(ward.settings), "state": str(ward.state), "pid": pids[ward.node.name],
                "rules": str(ward.rules) if ward.rules.exists() else None,
            } for ward in self.region.wards],
            "ward_portal": {"url": f"http://{HOST}:{self.ports.ward_portal}",
                            "ward": self.region.wards[0].plan.full_name},
            "logs": str(self.state / LOGS),
            "pids": pids,
            "loaded": {key: loaded.get(key, 0) for key in ("sent", "failed", "skipped")} | {
                key: loaded.get(key, {}) for key in ("failed_by_reason", "skipped_by_reason")},
        }

    def _write(self) -> None:
        write_json(self.state / JSON, self._contents())

    def _write_stopped(self) -> None:
        if (self.state / JSON).exists():
            write_json(self.state / JSON, self._contents(running=False))

    def _watch(self) -> None:
        while True:
            if self._report_dead():
                self._write()
            time.sleep(WATCH_S)

    def _report_dead(self) -> bool:
        """Says which processes ended since it was last asked. They are not started again: whoever stopped one
        wants to see what happens, and starts it with the line that is printed."""
        new = [child for child in self.region.children if not child.running and child.name not in self.dead]
        for child in new:
            self.dead.add(child.name)
            err.print(f"[red]{child.name} ended with code {child.exit_code}[/]; log: {child.log}\n"
                      f"  to start it again: {program()} {' '.join(child.arguments)}", soft_wrap=True)
        return bool(new)


def ward_plans(count: int) -> list[Any]:
    """The wards of a demo: the third is of the first one's hospital, and shares its issuer."""
    from certs.profiles import slug
    from miss.local import WardPlan

    names = list(HOSPITALS) + [(f"Hospital {number}", "Radiology") for number in range(7, WARDS_MAX + 1)]
    return [WardPlan(hospital, name, slug(hospital).upper()) for hospital, name in names[:count]]
