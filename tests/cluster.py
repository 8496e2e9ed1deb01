"""A region of real processes for the journeys: `miss/local.py` runs it, exactly as the demo does; this adds
people, senders and readers, and the ways in which a test breaks things."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any

import httpx
from dicomweb_client.api import DICOMwebClient
from dicomweb_client.session_utils import create_session_from_user_pass

from archive.ledger import User, WardState
from federation.policy import Role
from miss.backlog import Backlog, node_backlog
from miss.local import HOST, LocalRegion, LocalWard, Ports, WardPlan
from miss.processes import listening, wait_until
from miss.user import create
from node.dimse import contexts
from node.dimse.requestor import Peer, Requestor
from tests.datasets import CT, EXPLICIT, Instance

CALLING = "MODALITY"
EXPLICIT_CT = (CT, EXPLICIT)
PASSWORD = "correct horse battery"
RADIOLOGY = WardPlan("San Martino", "Radiology", "SAN-MARTINO")
GALLIERA = WardPlan("Galliera", "Radiology", "GALLIERA")
SETTLE_TIMEOUT_S = 60.0


class Cluster:
    """A running region with a physician, an IT person and a technician for each ward."""

    def __init__(self, state: Path, wards: Sequence[WardPlan] = (RADIOLOGY, GALLIERA), *, portal: bool = True,
                 ward_portal: bool = False, hold: bool = False,
                 devices_see_region: Sequence[str] = (), log_level: str = "INFO") -> None:
        self.region = LocalRegion(
            state, "trial", wards, Ports.free(len(wards)), basic_auth=True, portal=portal,
            ward_portal=ward_portal, node_overrides=["uplink.hold=true"] if hold else [],
            devices_see_region=devices_see_region, log_level=log_level)
        self.portal_wanted = portal

    def __enter__(self) -> Cluster:
        self.region.start()
        for ward in self.region.wards:
            ward.allow([CALLING, "STORESCU", "FINDSCU", "ECHOSCU"])
        if self.portal_wanted:
            self._add_people()
        return self

    def __exit__(self, *_: object) -> None:
        self.region.stop()

    def ward(self, plan: WardPlan = RADIOLOGY) -> LocalWard:
        return next(ward for ward in self.region.wards if ward.plan == plan)

    # --- sending

    def peer(self, plan: WardPlan = RADIOLOGY) -> Peer:
        ward = self.ward(plan)
        return Peer(HOST, ward.port, ward.ae_title)

    def send(self, instances: Sequence[Instance], plan: WardPlan = RADIOLOGY) -> None:
        """C-STORE, each answered 0000 or the test fails."""
        for proposed in contexts.plan((one.sop_class_uid, one.transfer_syntax_uid) for one in instances):
            with Requestor.connect(self.peer(plan), CALLING, proposed) as requestor:
                for instance in instances:
                    context = requestor.context(instance.sop_class_uid, instance.transfer_syntax_uid)
                    if context is not None:
                        status = requestor.store(context, instance.sop_instance_uid, [instance.dataset])
                        assert status == 0, f"{status:04X}"

    def settle(self, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Returns when the region has receipts for all that the wards hold."""
        wait_until("the region's taking over everything", lambda: self.settled() or None, timeout_s=timeout_s)

    def settled(self) -> bool:
        return all(self.backlog(ward.plan).pending == 0 for ward in self.region.wards)

    def backlog(self, plan: WardPlan = RADIOLOGY) -> Backlog:
        """What the node's own disk says."""
        return node_backlog(self.ward(plan).state)

    def ward_state(self, plan: WardPlan = RADIOLOGY) -> WardState:
        """What the hub keeps of the ward."""
        with self.region.ledger() as ledger:
            return ledger.ward_states()[plan.id]

    # --- breaking

    def restart_node(self, plan: WardPlan = RADIOLOGY) -> None:
        """Starts a node that was killed or stopped; returns when it answers."""
        ward = self.ward(plan)
        ward.node.start()
        wait_until("the node", lambda: listening(HOST, ward.port), timeout_s=30, children=[ward.node])

    def restart_hub(self) -> None:
        self.region.hub.start()
        wait_until("the hub", lambda: listening(HOST, self.region.ports.hub), timeout_s=30,
                   children=[self.region.hub])

    # --- reading

    @contextmanager
    def browser(self, user: str = "physician", *, ward_portal: bool = False) -> Iterator[httpx.Client]:
        """An HTTP client signed in by HTTP Basic, at the regional portal or at the first ward's own."""
        port = self.region.ports.ward_portal if ward_portal else self.region.ports.portal
        with httpx.Client(base_url=f"http://{HOST}:{port}", auth=(user, PASSWORD), timeout=60) as client:
            yield client

    def dicomweb(self, user: str = "physician") -> DICOMwebClient:
        session = create_session_from_user_pass(user, PASSWORD)
        return DICOMwebClient(f"{self.region.url}/dicom-web", session=session)

    def _add_people(self) -> None:
        people = [User("physician", "Physician", Role.PHYSICIAN.value), User("it", "IT", Role.IT.value)]
        people += [User(technician(ward.plan), "Technician", Role.TECHNICIAN.value, ward.plan.id)
                   for ward in self.region.wards]
        with self.region.ledger() as ledger:
            for person in people:
                if ledger.user(person.name) is None:
                    create(ledger, person, PASSWORD)
        first = self.region.wards[0]
        with first.ledger() as ledger:
            for person in people:
                if person.ward in (None, first.plan.id) and ledger.user(person.name) is None:
                    create(ledger, person, PASSWORD)


def technician(plan: WardPlan) -> str:
    return f"tech-{plan.folder}"


def qido(browser: httpx.Client, path: str, **parameters: str) -> list[dict[str, Any]]:
    """What a QIDO-RS search finds; 204 is nothing."""
    answer = browser.get(f"/dicom-web{path}", params=parameters, headers={"accept": "application/dicom+json"})
    assert answer.status_code in (200, 204), f"{answer.status_code} {answer.text[:500]}"
    return list(answer.json()) if answer.status_code == 200 else []


def coverage(answer: httpx.Response) -> dict[str, Any]:
    """What the answer says it covers."""
    return dict(json.loads(answer.headers["miss-coverage"]))


def value(entry: dict[str, Any], tag: str) -> Any:
    """The first value of an attribute of DICOM JSON, None when it has none."""
    found = entry.get(tag, {}).get("Value") or [None]
    return found[0]


def retrieve(browser: httpx.Client, path: str) -> list[bytes]:
    """The Part 10 streams that WADO-RS gives for a study, a series or an instance, as they are stored."""
    accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
    answer = browser.get(f"/dicom-web{path}", headers={"accept": accept})
    assert answer.status_code == 200, f"{answer.status_code} {answer.text[:500]}"
    return parts(answer.headers["content-type"], answer.content)


def parts(content_type: str, body: bytes) -> list[bytes]:
    """The bodies of a multipart answer (RFC 2046 5.1), cut by a reader of our own."""
    header = Message()
    header["content-type"] = content_type
    delimiter = f"\r\n--{header.get_param('boundary')}".encode()
    found: list[bytes] = []
    for piece in (b"\r\n" + body).split(delimiter)[1:]:
        if piece.startswith(b"--"):
            return found
        head, _, content = piece.partition(b"\r\n\r\n")
        assert BytesHeaderParser().parsebytes(head.lstrip())["content-type"], "a part without a type"
        found.append(content)
    raise AssertionError("a multipart answer without its end")


def dataset_of(part10: bytes) -> bytes:
    """The data set of a Part 10 stream: what follows group 2, whose length its first element says."""
    assert part10[128:132] == b"DICM" and part10[132:138] == b"\x02\0\0\0UL"
    return part10[144 + int.from_bytes(part10[140:144], "little"):]
