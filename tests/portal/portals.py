"""A portal over a ledger in a file, with three people who may sign in. What it shows comes from the source
that a test gives it."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from starlette.applications import Starlette
from starlette.testclient import TestClient

from archive.archive import Archive
from archive.errors import NotFound
from archive.index.removed import Tombstone
from archive.ledger import Session, User
from archive.model import ConflictRow, PatientKey, Provenance, Query, Scope, StoredInstance, Ward
from federation.coverage import CoverageState, WardCoverage
from federation.gathering import Found
from federation.node_source import NodeSource
from federation.passwords import hash_password
from federation.policy import Act, Principal, require
from federation.source import Answer, Listing
from portal.access import cookie_name
from portal.context import Context
from tests.datasets import Instance

NOW_US = 1_790_000_000_000_000
WARD = "san-martino/radiology"
PASSWORD = "a long enough phrase"
# One hash for everybody: making one takes 0.2 s on purpose.
HASH = hash_password(PASSWORD)
USERS = (
    User("tech", "Tina Tech", "ward technician", WARD),
    User("doc", "Dr. Dora", "regional physician"),
    User("it", "Ivo IT", "regional IT"),
)


@dataclass
class Clock:
    """A clock that a test turns."""

    now_us: int = NOW_US

    def __call__(self) -> int:
        return self.now_us

    def pass_s(self, seconds: float) -> None:
        self.now_us += int(seconds * 1e6)


@dataclass
class EmptySource:
    """An archive that holds nothing, of wards in the states that a test wants to see on a page."""

    wards: tuple[WardCoverage, ...] = (
        WardCoverage(WARD, "San Martino", "Radiology", CoverageState.UP_TO_DATE, NOW_US, seen_at_us=NOW_US),
    )
    searches: int = 0

    def search(self, principal: Principal, query: Query) -> Answer:
        require(principal, Act.SEARCH)
        self.searches += 1
        return Answer([], list(self.wards))

    def listing(self, principal: Principal, query: Query, most: int) -> Listing:
        return Listing(self.search(principal, query))

    def instances(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found:
        require(principal, Act.READ)
        raise NotFound("nothing is here")

    def at_hand(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found | None:
        return self.instances(principal, study_uid, series_uid, sop_instance_uid)

    def arrived(self, instance: StoredInstance) -> StoredInstance:
        return instance

    def passing(self, principal: Principal, instance: StoredInstance) -> Iterator[bytes]:
        raise NotFound("nothing is here")

    def open_payload(self, instance: StoredInstance) -> BinaryIO:
        raise NotFound("nothing is here")

    def coverage(self) -> list[WardCoverage]:
        return list(self.wards)

    def conflicts(self, principal: Principal, limit: int) -> list[ConflictRow]:
        return []

    def removals(self, principal: Principal, limit: int) -> list[Tombstone]:
        return []

    def person_of(self, principal: Principal, study_uid: str) -> PatientKey | None:
        return None


AppMaker = Callable[..., Starlette]


def client_of(app: Starlette, address: str = "127.0.0.1", base_url: str = "http://127.0.0.1") -> TestClient:
    return TestClient(
        app,
        base_url=base_url,
        client=(address, 50_000),
        follow_redirects=False,
        raise_server_exceptions=False,
    )


def form_token(html: str) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', html)
    assert found is not None
    return found.group(1)


def sign_in(client: TestClient, name: str, password: str = PASSWORD, next_page: str = "") -> Any:
    token = form_token(client.get("/login").text)
    return client.post("/login", data={"csrf": token, "name": name, "password": password, "next": next_page})


def signed_in(app: Starlette, name: str, address: str = "127.0.0.1") -> TestClient:
    """A browser with a session, made in the ledger: `test_signin.py` goes through the form, which takes its
    time on purpose."""
    client = client_of(app, address)
    context: Context = app.state.context
    token = secrets.token_urlsafe(32)
    now_us = context.clock()
    hashed = hashlib.sha256(token.encode()).digest()
    context.ledger.create_session(Session(hashed, name, now_us, now_us, secrets.token_urlsafe(24)))
    client.cookies.set(cookie_name(context.settings), token, domain="127.0.0.1", path="/")
    return client


class ArchiveSource(NodeSource):
    """The node's own source over an archive of several wards, with the coverage that a test wants."""

    def __init__(self, archive: Archive, wards: tuple[WardCoverage, ...] = EmptySource().wards) -> None:
        super().__init__(archive, Ward(WARD, "San Martino", "Radiology", "SANMARTINO"))
        self.archive = archive
        self.wards = wards

    def coverage(self) -> list[WardCoverage]:
        return list(self.wards)

    def _scope(self, principal: Principal, act: Act) -> Scope:
        return require(principal, act)


def provenance(ward: str = WARD, issuer: str = "SANMARTINO") -> Provenance:
    return Provenance(ward, issuer, "CT1", "CT1", NOW_US)


def take_in(archive: Archive, instances: Iterable[Instance], origin: Provenance | None = None) -> None:
    """Stores as C-STORE does; in the index when this returns."""
    for instance in instances:
        reception = archive.intake.begin(instance.head(origin or provenance()))
        reception.write(instance.dataset)
        ticket = reception.commit()
        ticket.wait_durable()
        ticket.wait_indexed()
